//! Host names of an API and a control server, looked up in the node's hosts file and by its name server. A static
//! program has to do without its C library's modules for that: `PODTETHER_TEST_SUPERVISOR` names one to be tested.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod rig;

use std::net::UdpSocket;
use std::path::Path;
use std::sync::{Arc, Mutex};

use nix::mount::{MsFlags, mount};
use podtether_net::testing::{block_on, in_namespaces};
use rig::*;

const BY_DNS: &str = "api-by-dns.example.test";
const BY_HOSTS: &str = "api-by-hosts.example.test";

/// Puts a file of the test's over one of the node's, in this mount namespace.
fn cover(place: &str, dir: &Path, text: &str) {
    let own = dir.join(place.replace('/', "-"));
    std::fs::write(&own, text).unwrap();
    mount(Some(&own), place, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
}

/// Answers questions for [`BY_DNS`] with 127.0.0.1, and says of everything else that it is not there. The names
/// that were asked for.
fn name_server() -> Arc<Mutex<Vec<String>>> {
    let socket = UdpSocket::bind("127.0.0.1:53").unwrap();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let names = Arc::clone(&asked);
    std::thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let (name, end) = question(&buffer[..length]);
            let [kind_high, kind] = [buffer[end], buffer[end + 1]];
            let (known, wants_v4) = (name == BY_DNS, (kind_high, kind) == (0, 1));
            names.lock().unwrap().push(name);
            let mut answer = buffer[..end + 4].to_vec();
            // A response that may recurse; "no such name" for other names.
            answer[2..4].copy_from_slice(&[0x81, if known { 0x80 } else { 0x83 }]);
            answer[4..12].copy_from_slice(&[0, 1, 0, u8::from(known && wants_v4), 0, 0, 0, 0]);
            if known && wants_v4 {
                // The question's name, A, IN, a minute, four bytes.
                answer.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 127, 0, 0, 1]);
            }
            let _ = socket.send_to(&answer, from);
        }
    });
    asked
}

/// The name in a query, and where it ends.
fn question(query: &[u8]) -> (String, usize) {
    let (mut labels, mut at) = (Vec::new(), 12);
    while query[at] > 0 {
        let end = at + 1 + usize::from(query[at]);
        labels.push(String::from_utf8_lossy(&query[at + 1..end]).into_owned());
        at = end;
    }
    (labels.join("."), at + 1)
}

#[test]
fn names_of_servers_are_looked_up_in_the_hosts_file_and_by_dns() {
    in_namespaces("names_of_servers_are_looked_up_in_the_hosts_file_and_by_dns", |dir| {
        cover("/etc/hosts", dir, &format!("127.0.0.1 localhost\n127.0.0.1 {BY_HOSTS}\n"));
        cover("/etc/resolv.conf", dir, "nameserver 127.0.0.1\n");
        let asked = name_server();
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        for (tailnet, name) in [("default", BY_DNS), ("hosts", BY_HOSTS)] {
            let table = Rig::table(tailnet, dir, &devnet);
            let by_name = table.replace("127.0.0.1", name);
            assert_ne!(by_name, table, "the devnet's URL has its address");
            rig.config = rig.config.replace(&table, "");
            rig.config.insert_str(0, &by_name);
        }
        rig.start();
        block_on(async {
            let client = rig.client().await;
            for (pod, tailnet) in [("a", "default"), ("b", "hosts")] {
                rig.netns(pod).await;
                let mut request = rig.request(pod);
                request.tailnet = tailnet.into();
                let answer = client.add(within(TIMEOUT), request).await.unwrap();
                assert!(answer.is_ok(), "{tailnet}: {answer:?}");
            }
        });
        rig.terminate();
        let asked = asked.lock().unwrap();
        assert!(asked.iter().any(|name| name == BY_DNS), "{asked:?}");
        assert!(!asked.iter().any(|name| name == BY_HOSTS), "{asked:?}");
    });
}
