//! Ways to the server: dial plans, proxies, ports.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use podtether_core::tailcfg::{DerpNode, DerpRegion, RegionId};
use podtether_net::testing::{block_on, in_namespaces};
use podtether_proto::engine::ProxySettings;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};

use super::*;

fn candidate(ip: &str) -> ControlIpCandidate {
    ControlIpCandidate { ip: ip.parse().ok(), dial_timeout_sec: 5.0, ..ControlIpCandidate::default() }
}

#[tokio::test]
async fn a_dial_plan_does_without_dns_and_dns_without_the_plan() {
    let mut place = Place::new(|config| config.tls_names = vec!["control.test".into()]).await;
    let port = place.devnet.https_addresses()[0].port();
    place.url = format!("https://control.test:{port}");
    // Nobody knows the name; one address of the plan is dead.
    place.plan = ControlDialPlan { candidates: vec![candidate("127.0.0.9"), candidate("127.0.0.1")] };
    let mut control = place.start(&Node::new(Some(&place.key())));
    until(&mut control, started).await;
    // A plan that leads nowhere.
    place.hosts(&[("control.test", "127.0.0.1")]);
    place.plan = ControlDialPlan { candidates: vec![candidate("127.0.0.9")] };
    let mut control = place.start(&Node::new(Some(&place.key())));
    until(&mut control, started).await;
    // A plan that leads to somebody else.
    let other = TcpListener::bind(("127.0.0.7", port)).await.unwrap();
    tokio::spawn(async move { while other.accept().await.is_ok() {} });
    place.plan = ControlDialPlan { candidates: vec![candidate("127.0.0.7")] };
    let mut control = place.start(&Node::new(Some(&place.key())));
    assert!(until(&mut control, trying).await.contains("control.test"));
    until(&mut control, started).await;
}

#[tokio::test]
async fn a_plan_that_arrives_is_used_for_the_next_session() {
    let place = Place::new(|config| config.tls_names = vec!["control.test".into()]).await;
    let mut place = place;
    place.url = format!("https://control.test:{}", place.devnet.https_addresses()[0].port());
    place.hosts(&[("control.test", "127.0.0.1")]);
    let mut control = place.start(&Node::new(Some(&place.key())));
    until(&mut control, started).await;
    let id = place.devnet.node("pod").unwrap().id;
    let plan = serde_json::json!({"Candidates": [{"IP": "127.0.0.1", "DialTimeoutSec": 5}]});
    assert!(place.devnet.tell(id, serde_json::json!({"ControlDialPlan": plan})));
    until(&mut control, |event| match event {
        Event::Map(message) => message.control_dial_plan.as_ref().map(|_| ()),
        _ => None,
    })
    .await;
    place.hosts(&[]);
    place.devnet.drop_connections();
    until(&mut control, started).await;
}

/// Passes connections on and counts them.
async fn forward(listener: TcpListener, to: SocketAddr) -> Arc<AtomicUsize> {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    tokio::spawn(async move {
        while let Ok((mut from, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(async move {
                let mut to = TcpStream::connect(to).await.unwrap();
                let _ = copy_bidirectional(&mut from, &mut to).await;
            });
        }
    });
    count
}

/// A proxy that takes every name for loopback; gives the targets it was asked for.
async fn proxy() -> (SocketAddr, tokio::sync::mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (asked, targets) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut from, _)) = listener.accept().await {
            let asked = asked.clone();
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    if from.read_buf(&mut head).await.unwrap() == 0 {
                        return;
                    }
                }
                let head = String::from_utf8(head).unwrap();
                assert!(head.contains("Proxy-Authorization: Basic dXNlcjpzZXNhbWU="), "{head}");
                let target = head.split(' ').nth(1).unwrap().to_owned();
                let port: u16 = target.rsplit(':').next().unwrap().parse().unwrap();
                let mut to = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                asked.send(target).unwrap();
                from.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
                let _ = copy_bidirectional(&mut from, &mut to).await;
            });
        }
    });
    (address, targets)
}

#[tokio::test]
async fn control_and_relays_are_reached_through_a_proxy() {
    let mut place = Place::new(|config| config.tls_names = vec!["control.test".into()]).await;
    let (address, mut targets) = proxy().await;
    let settings = ProxySettings {
        url: SecretString::new(format!("http://user:sesame@{address}")),
        bypass: "direct.test".into(),
    };
    place.dialer.proxy = Some(Arc::new(Proxy::new(&settings).unwrap()));
    let port = place.devnet.https_addresses()[0].port();
    place.url = format!("https://control.test:{port}");
    let node = Node::new(Some(&place.key()));
    let mut control = place.start(&node);
    until(&mut control, started).await;
    // For the key and for the session; no name server was asked, there is none.
    for _ in 0..2 {
        assert_eq!(targets.recv().await.unwrap(), format!("control.test:{port}"));
    }

    let region = place.devnet.regions().remove(0);
    let server = DerpNode {
        region_id: RegionId(1),
        host_name: region.host_name(place.devnet.base_domain()),
        derp_port: region.derp_port.into(),
        ..DerpNode::default()
    };
    let target = format!("{}:{}", server.host_name, region.derp_port);
    let servers = DerpRegion { region_id: RegionId(1), nodes: vec![server], ..DerpRegion::default() };
    let mut relays = crate::derp::Regions::new(podtether_core::key::NodePrivate::from_bytes(node.node_key));
    relays.connect(RegionId(1), servers, &place.dialer);
    let message = tokio::time::timeout(PATIENCE, relays.message()).await.unwrap();
    assert!(matches!(message.event, crate::derp::Event::Connected), "{message:?}");
    assert_eq!(targets.recv().await.unwrap(), target);

    // What the list names goes straight.
    place.hosts(&[("direct.test", "127.0.0.1")]);
    place.url = format!("https://direct.test:{port}");
    let mut control = place.start(&Node::new(Some(&place.key())));
    assert!(until(&mut control, trying).await.contains("TLS"), "the certificate has another name");
    assert!(targets.try_recv().is_err());
}

#[test]
fn port_80_is_tried_before_443() {
    in_namespaces("control::tests::carriage::port_80_is_tried_before_443", |_| {
        block_on(Box::pin(async {
            let mut place = Place::new(|config| config.tls_names = vec!["control.test".into()]).await;
            place.url = "https://control.test".into();
            place.hosts(&[("control.test", "127.0.0.1")]);
            let listen = async |port: u16| TcpListener::bind(("127.0.0.1", port)).await.unwrap();
            let tls = forward(listen(443).await, place.devnet.https_addresses()[0]).await;
            let joins = async || {
                let before = tls.load(Ordering::SeqCst);
                let mut control = place.start(&Node::new(Some(&place.key())));
                until(&mut control, started).await;
                tls.load(Ordering::SeqCst) - before
            };
            assert_eq!(joins().await, 2, "nobody listens on 80: key and session by TLS");

            let listener = listen(80).await;
            let silent = tokio::spawn(async move {
                let mut held = Vec::new();
                while let Ok((stream, _)) = listener.accept().await {
                    held.push(stream);
                }
            });
            assert_eq!(joins().await, 2, "80 is silent");
            silent.abort();
            let _ = silent.await;

            let listener = listen(80).await;
            let portal = tokio::spawn(async move {
                while let Ok((mut stream, _)) = listener.accept().await {
                    let mut request = [0; 2048];
                    let _ = stream.read(&mut request).await;
                    let moved =
                        b"HTTP/1.1 301 Moved\r\nLocation: https://portal.test/\r\nContent-Length: 0\r\n\r\n";
                    let _ = stream.write_all(moved).await;
                }
            });
            assert_eq!(joins().await, 2, "80 is something else");
            portal.abort();
            let _ = portal.await;

            let plain = forward(listen(80).await, place.devnet.http_addresses()[0]).await;
            assert_eq!(joins().await, 1, "only the key by TLS");
            assert_eq!(plain.load(Ordering::SeqCst), 1);

            // The next session of the same client does not try 80 again.
            let mut control = place.start(&Node::new(Some(&place.key())));
            until(&mut control, started).await;
            let before = (plain.load(Ordering::SeqCst), tls.load(Ordering::SeqCst));
            place.devnet.drop_connections();
            until(&mut control, started).await;
            assert_eq!(plain.load(Ordering::SeqCst), before.0);
            assert!(tls.load(Ordering::SeqCst) > before.1);
        }));
    });
}

#[tokio::test]
async fn one_dead_address_of_several_costs_little() {
    let mut place = Place::new(|_| {}).await;
    let port = place.devnet.http_addresses()[0].port();
    place.url = format!("http://control.test.internal:{port}");
    // A listener whose queue is full answers nothing, as an address that is gone.
    let dead: SocketAddr = ([127, 0, 0, 8], port).into();
    let _held = full_queue(dead);
    place.hosts(&[("control.test.internal", "127.0.0.8"), ("control.test.internal", "127.0.0.1")]);
    let alive = ["127.0.0.1".parse::<IpAddr>().unwrap()];
    crate::dial::race(&alive, port).await.unwrap();
    let both = ["127.0.0.8".parse().unwrap(), alive[0]];
    let began = Instant::now();
    let stream = crate::dial::race(&both, port).await.unwrap();
    let took = began.elapsed();
    assert_eq!(stream.peer_addr().unwrap().ip(), alive[0]);
    println!("connected past a dead address after {took:?}");
    assert!(took >= Duration::from_millis(240), "the dead one did not hang, so this shows nothing");
    let mut control = place.start(&Node::new(Some(&place.key())));
    until(&mut control, started).await;
}

/// A socket that listens and never accepts, with its queue full.
fn full_queue(address: SocketAddr) -> Vec<std::os::fd::OwnedFd> {
    use nix::sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, connect, listen, socket,
    };
    use std::os::fd::AsRawFd as _;
    let SocketAddr::V4(address) = address else { unreachable!("an IPv4 address is given") };
    let tcp =
        |flags| socket(AddressFamily::Inet, SockType::Stream, flags | SockFlag::SOCK_CLOEXEC, None).unwrap();
    let listener = tcp(SockFlag::empty());
    bind(listener.as_raw_fd(), &SockaddrIn::from(address)).unwrap();
    listen(&listener, Backlog::new(0).unwrap()).unwrap();
    let mut held = vec![listener];
    for _ in 0..4 {
        let client = tcp(SockFlag::SOCK_NONBLOCK);
        let _ = connect(client.as_raw_fd(), &SockaddrIn::from(address));
        held.push(client);
    }
    held
}
