//! What engines are told about the node: its addresses, its resolvers, its hosts file.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use podtether_net::Netns;
use podtether_net::underlay::Monitor;
use podtether_proto::engine::Underlay;

use crate::table::Handle;

/// How often the files are read again; a changed address is noticed at once.
const FILES_EVERY: Duration = Duration::from_secs(10);
/// More entries than this of a hosts file are not for the names that an engine dials.
const MAX_HOSTS: usize = 256;
const MAX_NAME_SERVERS: usize = 8;
const MAX_FILE_BYTES: u64 = 256 << 10;

/// Keeps an [`Underlay`] up to date.
#[derive(Debug)]
pub struct Watch {
    monitor: Option<Monitor>,
}

impl Watch {
    /// Starts watching this process's own namespace.
    pub async fn open() -> Watch {
        let monitor = match Netns::current() {
            Ok(ns) => Monitor::open(&ns).await,
            Err(e) => Err(e),
        };
        Watch {
            monitor: monitor
                .inspect_err(|e| tracing::warn!("the node's addresses are not watched: {e}"))
                .ok(),
        }
    }

    /// As it is now.
    #[must_use]
    pub fn now(&self) -> Underlay {
        let addresses = self.monitor.as_ref().map(|m| m.addresses().to_vec()).unwrap_or_default();
        let read = |path| {
            use std::io::Read;
            let mut text = String::new();
            let file = std::fs::File::open(path).ok();
            file.and_then(|f| f.take(MAX_FILE_BYTES).read_to_string(&mut text).ok());
            text
        };
        Underlay {
            addresses,
            name_servers: name_servers(&read("/etc/resolv.conf")),
            hosts: hosts(&read("/etc/hosts")),
        }
    }

    /// Tells the table about every change, for ever.
    pub async fn follow(mut self, table: Handle) {
        loop {
            let changed = async {
                match &mut self.monitor {
                    Some(monitor) => monitor.changed().await.map(drop),
                    None => std::future::pending().await,
                }
            };
            match tokio::time::timeout(FILES_EVERY, changed).await {
                Ok(Ok(())) | Err(_) => {}
                Ok(Err(e)) => {
                    tracing::warn!("the node's addresses are not watched any more: {e}");
                    tokio::time::sleep(FILES_EVERY).await;
                    self = Watch::open().await;
                }
            }
            // The table drops what is no change.
            table.set_underlay(self.now()).await;
        }
    }
}

fn name_servers(resolv_conf: &str) -> Vec<SocketAddr> {
    resolv_conf
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some("nameserver")).then(|| words.next())?
        })
        .filter_map(|text| text.split('%').next()?.parse::<IpAddr>().ok())
        .map(|ip| SocketAddr::new(ip, 53))
        .take(MAX_NAME_SERVERS)
        .collect()
}

fn hosts(text: &str) -> Vec<(String, IpAddr)> {
    let entries = text.lines().flat_map(|line| {
        let line = line.split('#').next().unwrap_or_default();
        let mut words = line.split_whitespace();
        let ip = words.next().and_then(|w| w.parse::<IpAddr>().ok());
        words.filter_map(move |name| Some((name.to_lowercase(), ip?)))
    });
    entries.take(MAX_HOSTS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf() {
        let text =
            "# c\nnameserver 10.0.0.2\nsearch a b\nnameserver fe80::1%eth0\nnameserver junk\nnameserver\n";
        let got: Vec<String> = name_servers(text).iter().map(ToString::to_string).collect();
        assert_eq!(got, ["10.0.0.2:53", "[fe80::1]:53"]);
    }

    #[test]
    fn hosts_file() {
        let got = hosts("127.0.0.1 localhost A.example # x\n::1 ip6\nbad name\n#1.2.3.4 no\n");
        let names: Vec<&str> = got.iter().map(|(n, _)| n.as_str()).collect();
        assert_eq!(names, ["localhost", "a.example", "ip6"]);
    }
}
