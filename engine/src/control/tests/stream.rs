//! What the map stream does with messages that are large, late or no messages.

use std::collections::BTreeSet;

use serde_json::json;

use super::*;

fn passed_over() -> u64 {
    crate::refused::named().find(|(name, _)| *name == "control_map_message").map_or(0, |(_, count)| count)
}

/// The next message, and the ids of the peers that came ahead of it.
async fn message(control: &mut Control) -> (BTreeSet<u64>, Box<MapResponse>) {
    let mut ids = BTreeSet::new();
    let waiting = async {
        loop {
            match control.event().await.unwrap() {
                Event::Peers(_, nodes) => ids.extend(nodes.iter().map(|node| node.id.0)),
                Event::Map(message) => return message,
                Event::PeersUnfinished => ids.clear(),
                _ => {}
            }
        }
    };
    let message = tokio::time::timeout(PATIENCE, waiting).await.unwrap();
    (ids, message)
}

#[tokio::test]
async fn a_large_map_comes_in_portions() {
    let place = Place::new(|config| config.crowd.peers = 1000).await;
    let mut control = place.start(&Node::new(Some(&place.key())));
    let mut portions = Vec::new();
    let rest = until(&mut control, |event| match event {
        Event::Peers(list, nodes) => {
            assert_eq!(*list, PeerList::All);
            portions.push(nodes.len());
            None
        }
        Event::Map(message) => Some((message.node.is_some(), message.peers.len())),
        _ => None,
    });
    assert_eq!(rest.await, (true, 0));
    assert_eq!(portions.iter().sum::<usize>(), 1000);
    assert!(portions.iter().all(|portion| *portion <= 32), "{portions:?}");
}

#[tokio::test]
async fn what_is_no_message_is_passed_over_and_the_stream_goes_on() {
    let place = Place::new(|config| config.keep_alive = Duration::from_secs(3600)).await;
    let mut control = place.start(&Node::new(Some(&place.key())));
    let (_, first) = message(&mut control).await;
    assert!(first.node.is_some());
    let node = place.devnet.node("pod").unwrap();
    let before = passed_over();
    // The second of them dies in the middle of its peers.
    let peer = |id: u64| json!({"ID": id, "Key": format!("nodekey:{id:064x}")}).to_string();
    let peers: Vec<String> = (500..600).map(peer).collect();
    for bad in ["nonsense", &format!("{{\"Peers\":[{}", peers.join(",")), "[]", "\"text\""] {
        assert!(place.devnet.tell_raw(node.id, bad.as_bytes()));
    }
    assert!(place.devnet.tell(node.id, json!({"Domain": "behind.test"})));
    let behind = until(&mut control, |event| match event {
        Event::Map(message) => Some(message.domain.clone()),
        Event::SessionLost => panic!("the session ended"),
        _ => None,
    });
    assert_eq!(behind.await, "behind.test");
    assert_eq!(place.devnet.node("pod").unwrap().session, node.session);
    // Other tests of this process count as well.
    assert!(passed_over() >= before + 4);
}

#[tokio::test]
async fn a_bad_first_message_costs_the_session_and_each_try_waits_longer() {
    let place = Place::new(|_| {}).await;
    place.devnet.set_first_message(Some(b"nonsense"));
    let mut control = place.start(&Node::new(Some(&place.key())));
    let mut tries = Vec::new();
    while tries.len() < 7 {
        let reason = until(&mut control, |event| {
            assert!(!matches!(event, Event::Map(_)), "a message behind one that is none");
            trying(event)
        });
        assert!(reason.await.contains("bad map message: it is not JSON"));
        tries.push(Instant::now());
    }
    assert_grows(&tries);
    place.devnet.set_first_message(None);
    let (_, first) = message(&mut control).await;
    assert!(first.node.is_some());
}

/// Ten tries at a server that accepts, does what `each` says and hangs up.
async fn ten_tries(each: impl AsyncFn(&mut TcpStream)) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let mut place = Place::new(|_| {}).await;
    place.url = format!("http://{}", listener.local_addr().unwrap());
    let mut control = place.start(&Node::new(None));
    let (mut accepted, mut tries) = (0, Vec::new());
    while tries.len() < 10 {
        tokio::select! {
            socket = listener.accept() => {
                accepted += 1;
                each(&mut socket.unwrap().0).await;
            }
            _ = until(&mut control, trying) => tries.push(Instant::now()),
        }
    }
    assert_grows(&tries);
    assert!((10..=20).contains(&accepted), "{accepted} connections in ten tries");
}

/// Each wait is at least half of n² times 10 ms, however fast the server is.
fn assert_grows(tries: &[Instant]) {
    for (n, pair) in (1_u64..).zip(tries.windows(2)) {
        let wait = pair[1] - pair[0];
        assert!(wait >= Duration::from_millis(n * n * 5), "wait {n} was {wait:?}");
    }
}

#[tokio::test]
async fn a_server_that_hangs_up_at_once_is_asked_ever_less_often() {
    ten_tries(async |_| {}).await;
}

#[tokio::test]
async fn a_server_that_talks_nonsense_is_asked_ever_less_often() {
    ten_tries(async |socket| {
        let _ = tokio::io::AsyncWriteExt::write_all(socket, b"220 mail.example ready\r\n\r\n").await;
    })
    .await;
}
