//! What an engine at rest holds: anonymous memory with ten peers, before and after a run at full speed.
//!
//! The bars are the same for every build. What differs between them is what the loader writes to (about 0.2 MiB of
//! a position-independent program) and how deep the stack gets; both are far from the distance to the bars.

#![allow(clippy::unwrap_used)]

mod common;

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use common::{Join, Pod, underlay_addresses};
use podtether_devnet::{AuthKeyOptions, Crowd, Devnet, DevnetConfig};
use podtether_net::testing::{block_on, in_namespaces};

/// Beside the one that has traffic.
const OTHERS: u32 = 9;
const IDLE_KIB: u64 = 1536;
const AFTER_LOAD_KIB: u64 = 3072;
const AFTER_LOAD_WITHIN: Duration = Duration::from_secs(30);
/// The end of the first snapshots, of the netcheck and of the handshake's follow-ups.
const SETTLED_WITHIN: Duration = Duration::from_secs(30);

fn anonymous_kib(pod: &Pod) -> u64 {
    let pid = pod.engine.as_ref().unwrap().child.id();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// Waits until the engine has no more than this, and tells after how long.
async fn no_more_than(pod: &Pod, kib: u64, within: Duration) -> Duration {
    let began = Instant::now();
    loop {
        let now = anonymous_kib(pod);
        if now <= kib {
            return began.elapsed();
        }
        assert!(
            began.elapsed() < within,
            "{} has {now} KiB after {within:?}, wanted at most {kib}",
            pod.name
        );
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

/// Sends `bytes` from one pod to another over TCP.
async fn stream(from: &Pod, to: &Pod, address: IpAddr, bytes: usize) {
    let address = SocketAddr::new(address, 9);
    let listener = to.link.pod.run(move || TcpListener::bind(address).unwrap()).await.unwrap();
    let reading = tokio::task::spawn_blocking(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut got = 0;
        let mut buffer = vec![0; 1 << 18];
        loop {
            match stream.read(&mut buffer).unwrap() {
                0 => return got,
                n => got += n,
            }
        }
    });
    let writing = from.link.pod.run(move || TcpStream::connect(address).unwrap()).await.unwrap();
    let written = tokio::task::spawn_blocking(move || {
        let mut stream = writing;
        let piece = vec![7; 1 << 18];
        for _ in 0..bytes / piece.len() {
            stream.write_all(&piece).unwrap();
        }
    });
    written.await.unwrap();
    assert_eq!(reading.await.unwrap(), bytes);
}

#[test]
fn an_engine_at_rest_is_small() {
    in_namespaces("an_engine_at_rest_is_small", |dir| {
        block_on(async {
            let addresses = underlay_addresses(&["10.9.0.1/32"]).await;
            let devnet = Devnet::start(DevnetConfig::default()).await.unwrap();
            devnet.set_crowd(Crowd { peers: OTHERS, deltas_per_second: 0 });
            let options = AuthKeyOptions { reusable: true, ..AuthKeyOptions::default() };
            let join = Join {
                control_url: devnet.https_url(),
                ca_pem: devnet.ca_pem().to_owned(),
                auth_key: Some(devnet.create_auth_key(options).secret),
                addresses,
            };
            let (mut a, mut b) = (Pod::make(dir, "a").await, Pod::make(dir, "b").await);
            a.join(&join).await;
            let to = b.join(&join).await[0];
            stream(&a, &b, to, 1 << 18).await;
            let settled = no_more_than(&a, IDLE_KIB, SETTLED_WITHIN).await;
            println!("ten peers: {} KiB after {settled:?}", anonymous_kib(&a));

            let began = Instant::now();
            stream(&a, &b, to, 128 << 20).await;
            println!("128 MiB in {:?}; {} and {} KiB", began.elapsed(), anonymous_kib(&a), anonymous_kib(&b));
            for pod in [&a, &b] {
                let freed = no_more_than(pod, AFTER_LOAD_KIB, AFTER_LOAD_WITHIN).await;
                println!("{}: {} KiB after {freed:?}", pod.name, anonymous_kib(pod));
            }
        });
    });
}
