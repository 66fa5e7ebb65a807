use super::*;

fn bound(address: &str) -> (Udp, SocketAddr) {
    let socket = std::net::UdpSocket::bind(address).unwrap();
    let local = socket.local_addr().unwrap();
    let mut udp = Udp::new(socket.into()).unwrap();
    udp.begin().unwrap();
    (udp, local)
}

/// Everything that arrives until there are `count` datagrams.
async fn arrived(receiver: &mut Udp, count: usize) -> Vec<(SocketAddr, Vec<u8>)> {
    let mut got = Vec::new();
    while got.len() < count {
        let ready = tokio::time::timeout(
            std::time::Duration::from_secs(5),
            std::future::poll_fn(|cx| receiver.poll_ready(cx)),
        )
        .await;
        assert!(ready.is_ok(), "{} of {count} datagrams arrived", got.len());
        assert_eq!(receiver.receive(), 0);
        got.extend(receiver.datagrams().map(|(from, datagram)| (from, datagram.to_vec())));
    }
    got
}

#[tokio::test]
async fn batches_arrive_whole_with_their_source() {
    for (loopback, cuts) in [("127.0.0.1:0", true), ("[::1]:0", true), ("127.0.0.1:0", false)] {
        let (mut sender, from) = bound(loopback);
        let (mut receiver, to) = bound(loopback);
        sender.cuts = cuts;
        let mut out = Batch::new();
        // Trains of every length, their ends shorter than the rest, and datagrams alone.
        let mut sent = Vec::new();
        for n in 0..40_u8 {
            let length = if n % 7 == 6 { 40 } else { 1300 };
            let kind = if n % 5 == 0 { n } else { 4 };
            let datagram = [&[kind][..], &vec![n; length]].concat();
            assert!(out.push(to, &datagram));
            sent.push((from, datagram));
        }
        for n in 0..40_u8 {
            let datagram = [&[4][..], &vec![n; 200 - usize::from(n)]].concat();
            assert!(out.push(to, &datagram));
            sent.push((from, datagram));
        }
        // Another family's datagram.
        let other: SocketAddr = if to.is_ipv4() { "[::1]:9" } else { "127.0.0.1:9" }.parse().unwrap();
        assert!(out.push(other, b"other"));
        let mut drops = Drops::default();
        sender.send(&out, &mut drops).await;
        assert_eq!(drops.named().count(), 0);
        assert_eq!(arrived(&mut receiver, sent.len()).await, sent);
        assert_eq!(without_socket(&out, false, true), if to.is_ipv4() { 80 } else { 1 });
        receiver.release();
        // And again after its memory was given back.
        sender.send(&out, &mut drops).await;
        assert_eq!(arrived(&mut receiver, sent.len()).await, sent);
    }
}

#[tokio::test]
async fn what_is_too_long_to_be_ours_is_told_and_left_out() {
    let (mut sender, _) = bound("127.0.0.1:0");
    let (mut receiver, to) = bound("127.0.0.1:0");
    let mut out = Batch::new();
    assert!(out.push(to, b"good"));
    assert!(out.push(to, &[0; LONGEST + 1]));
    sender.send(&out, &mut Drops::default()).await;
    let mut unusable = 0;
    let mut got = Vec::new();
    while got.is_empty() || unusable == 0 {
        std::future::poll_fn(|cx| receiver.poll_ready(cx)).await.unwrap();
        unusable += receiver.receive();
        got.extend(receiver.datagrams().map(|(_, datagram)| datagram.to_vec()));
    }
    assert_eq!((unusable, got), (1, vec![b"good".to_vec()]));
}

#[tokio::test]
async fn one_bad_destination_does_not_cost_the_others() {
    let (mut sender, from) = bound("127.0.0.1:0");
    let (mut receiver, to) = bound("127.0.0.1:0");
    let mut out = Batch::new();
    // Port 0 is refused by the kernel, as a train and alone.
    let nowhere = "127.0.0.1:0".parse().unwrap();
    for (to, data) in [(to, [4, 1]), (nowhere, [4, 2]), (nowhere, [4, 3]), (to, [4, 4]), (nowhere, [4, 5])] {
        assert!(out.push(to, &data));
    }
    let mut drops = Drops::default();
    sender.send(&out, &mut drops).await;
    assert_eq!(drops.named().collect::<Vec<_>>(), [("udp_send_error", 3)]);
    assert_eq!(arrived(&mut receiver, 2).await, [(from, vec![4, 1]), (from, vec![4, 4])]);
}

#[tokio::test]
async fn one_call_asks_for_no_more_than_stays_in_the_cache() {
    let (mut sender, _) = bound("127.0.0.1:0");
    let (mut receiver, to) = bound("127.0.0.1:0");
    let mut trains = Batch::new();
    // Two trains: what a socket's default buffer holds.
    for _ in 0..48 * 2 {
        assert!(trains.push(to, &[4; 1312]));
    }
    sender.send(&trains, &mut Drops::default()).await;
    assert_eq!(arrived(&mut receiver, trains.len()).await.len(), trains.len());
    assert!((1..=3).contains(&receiver.ask), "{}", receiver.ask);
    let mut single = Batch::new();
    assert!(single.push(to, &[7; 80]));
    sender.send(&single, &mut Drops::default()).await;
    assert_eq!(arrived(&mut receiver, 1).await.len(), 1);
    assert_eq!(receiver.ask, 2, "another, and whether there are more");
    let mut burst = Batch::new();
    for n in 0..40 {
        assert!(burst.push(to, &[7, n]));
    }
    sender.send(&burst, &mut Drops::default()).await;
    assert_eq!(arrived(&mut receiver, burst.len()).await.len(), burst.len());
    assert!(receiver.ask >= 8, "{}", receiver.ask);
}

#[tokio::test]
async fn a_socket_that_was_emptied_by_a_call_is_not_asked_again_until_something_comes() {
    let (mut sender, _) = bound("127.0.0.1:0");
    let (mut receiver, to) = bound("127.0.0.1:0");
    for n in 0..3 {
        let mut single = Batch::new();
        assert!(single.push(to, &[7, n]));
        sender.send(&single, &mut Drops::default()).await;
        std::future::poll_fn(|cx| receiver.poll_ready(cx)).await.unwrap();
        receiver.ask = 2;
        assert_eq!(receiver.receive(), 0);
        assert_eq!(receiver.datagrams().map(|(_, datagram)| datagram[1]).collect::<Vec<_>>(), [n]);
        let ready = std::future::poll_fn(|cx| std::task::Poll::Ready(receiver.poll_ready(cx))).await;
        assert!(ready.is_pending(), "no call that finds nothing");
    }
}

#[test]
fn the_room_of_what_was_sent_serves_the_next_batch() {
    let mut batch = Batch::new();
    for n in 0..9 {
        assert!(batch.push("127.0.0.1:1".parse().unwrap(), &[7, n]));
    }
    let chunk = Chunk::new(Vec::new(), &mut messages(&batch, true, true));
    assert_eq!(chunk.left().len(), 9);
    let at = chunk.messages.as_ptr().cast::<()>();
    let room = chunk.room();
    assert!(
        room.is_empty() && room.capacity() >= 9 && room.as_ptr().cast() == at,
        "nothing is allocated anew"
    );
}
