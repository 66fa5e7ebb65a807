//! Host names of control and DERP servers, resolved with nothing but UDP sockets: a confined engine
//! has no `/etc/resolv.conf`, so the supervisor says which name servers and hosts entries there are.
//!
//! The last good answer of each name is kept and used when no name server answers, so that a DNS
//! outage does not stop a reconnect.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use podtether_proto::engine::Underlay;
use tokio::net::UdpSocket;

/// One server's time to answer; there are [`ROUNDS`] over all of them.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(1500);
const ROUNDS: usize = 2;
/// How long one family's addresses wait for the other's.
const OTHER_FAMILY: Duration = Duration::from_millis(100);
const MAX_REMEMBERED: usize = 64;
const MAX_ADDRESSES: usize = 16;

/// Why a name has no address; each sentence says what to look at.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub(crate) enum ResolveError {
    #[error("{0:?} is not a host name")]
    BadName(String),
    #[error("{0} does not exist in DNS")]
    NoSuchName(String),
    #[error("{0} has no address in DNS")]
    NoAddress(String),
    #[error("no name server is known for {0}: the node's resolv.conf names none")]
    NoServers(String),
    #[error("no name server answered for {0} (asked {1})")]
    NoAnswer(String, String),
}

/// Shared by everything that dials; cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Resolver(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    name_servers: Vec<SocketAddr>,
    hosts: Vec<(String, IpAddr)>,
    remembered: HashMap<String, Vec<IpAddr>>,
}

impl Resolver {
    /// Takes over the name servers and hosts entries of now.
    pub(crate) fn set_underlay(&self, underlay: &Underlay) {
        let mut state = self.state();
        state.name_servers.clone_from(&underlay.name_servers);
        state.hosts.clone_from(&underlay.hosts);
    }

    /// Addresses of `host`, in the order to try them.
    pub(crate) async fn lookup(&self, host: &str) -> Result<Vec<IpAddr>, ResolveError> {
        if let Some(known) = self.without_asking(host) {
            return Ok(known);
        }
        let servers = self.state().name_servers.clone();
        match ask_all(host, &servers).await {
            Ok(addresses) => {
                self.remember(host, &addresses);
                Ok(addresses)
            }
            Err(error) => match self.state().remembered.get(host) {
                Some(old) => {
                    tracing::warn!(host, %error, "using the last known addresses");
                    Ok(old.clone())
                }
                None => Err(error),
            },
        }
    }

    fn without_asking(&self, host: &str) -> Option<Vec<IpAddr>> {
        if let Ok(address) = host.parse() {
            return Some(vec![address]);
        }
        let state = self.state();
        let same = |name: &str| name.trim_end_matches('.').eq_ignore_ascii_case(host.trim_end_matches('.'));
        let listed: Vec<IpAddr> = state
            .hosts
            .iter()
            .filter(|(name, _)| same(name))
            .map(|(_, ip)| *ip)
            .take(MAX_ADDRESSES)
            .collect();
        if !listed.is_empty() {
            return Some(listed);
        }
        same("localhost").then(|| vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()])
    }

    fn remember(&self, host: &str, addresses: &[IpAddr]) {
        let mut state = self.state();
        if state.remembered.len() >= MAX_REMEMBERED && !state.remembered.contains_key(host) {
            state.remembered.clear();
        }
        state.remembered.insert(host.to_owned(), addresses.to_vec());
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn ask_all(host: &str, servers: &[SocketAddr]) -> Result<Vec<IpAddr>, ResolveError> {
    let mut name = Name::from_ascii(host).map_err(|_| ResolveError::BadName(host.to_owned()))?;
    name.set_fqdn(true);
    if servers.is_empty() {
        return Err(ResolveError::NoServers(host.to_owned()));
    }
    for _ in 0..ROUNDS {
        for server in servers {
            let (v4, v6) = ask_both(&name, *server).await;
            let (failed, no_such_name) = match (&v4, &v6) {
                (Answer::Failed, Answer::Failed) => (true, false),
                (Answer::NoSuchName, _) | (_, Answer::NoSuchName) => (false, true),
                _ => (false, false),
            };
            // A server that only answers one of the two is used for that one.
            let mut addresses = v4.addresses();
            addresses.extend(v6.addresses());
            addresses.truncate(MAX_ADDRESSES);
            if !addresses.is_empty() {
                return Ok(addresses);
            }
            if no_such_name {
                return Err(ResolveError::NoSuchName(host.to_owned()));
            }
            if !failed {
                return Err(ResolveError::NoAddress(host.to_owned()));
            }
        }
    }
    let asked = servers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    Err(ResolveError::NoAnswer(host.to_owned(), asked))
}

/// Asks for both families at once. When one has addresses, the other gets little more time: some servers
/// never answer for IPv6.
async fn ask_both(name: &Name, server: SocketAddr) -> (Answer, Answer) {
    let (ask_v4, ask_v6) = (ask(name, RecordType::A, server), ask(name, RecordType::AAAA, server));
    let patience = tokio::time::sleep(ANSWER_TIMEOUT);
    tokio::pin!(ask_v4, ask_v6, patience);
    let (mut v4, mut v6) = (None, None);
    while v4.is_none() || v6.is_none() {
        let answer = tokio::select! {
            answer = &mut ask_v4, if v4.is_none() => v4.insert(answer),
            answer = &mut ask_v6, if v6.is_none() => v6.insert(answer),
            () = &mut patience => break,
        };
        if matches!(answer, Answer::Addresses(found) if !found.is_empty()) {
            patience.as_mut().reset(tokio::time::Instant::now() + OTHER_FAMILY);
        }
    }
    (v4.unwrap_or(Answer::Failed), v6.unwrap_or(Answer::Failed))
}

enum Answer {
    Addresses(Vec<IpAddr>),
    NoSuchName,
    Failed,
}

impl Answer {
    fn addresses(self) -> Vec<IpAddr> {
        match self {
            Self::Addresses(addresses) => addresses,
            Self::NoSuchName | Self::Failed => Vec::new(),
        }
    }
}

async fn ask(name: &Name, kind: RecordType, server: SocketAddr) -> Answer {
    exchange(name, kind, server).await.unwrap_or(Answer::Failed)
}

async fn exchange(name: &Name, kind: RecordType, server: SocketAddr) -> std::io::Result<Answer> {
    // Connecting binds it; a confined engine may not do so itself.
    let family = if server.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = std::net::UdpSocket::from(socket(family, SockType::Datagram, flags, None)?);
    let socket = UdpSocket::from_std(socket)?;
    socket.connect(server).await?;
    let mut query = Message::query();
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(name.clone(), kind));
    socket.send(&query.to_vec().map_err(std::io::Error::other)?).await?;
    let mut buffer = [0; 4096];
    loop {
        let length = socket.recv(&mut buffer).await?;
        let Ok(reply) = Message::from_vec(&buffer[..length]) else { continue };
        if reply.metadata.id != query.metadata.id || reply.queries != query.queries {
            continue;
        }
        let code = reply.metadata.response_code;
        return Ok(if code == ResponseCode::NoError {
            Answer::Addresses(reply.answers.iter().filter_map(|record| record.data.ip_addr()).collect())
        } else if code == ResponseCode::NXDomain {
            Answer::NoSuchName
        } else {
            Answer::Failed
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::op::MessageType;
    use hickory_proto::rr::{RData, Record, rdata};

    /// A name server that knows `control.test` (A only), answers SERVFAIL for `broken.test`.
    async fn name_server() -> (SocketAddr, tokio::task::JoinHandle<()>) {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let mut buffer = [0; 512];
            loop {
                let (n, from) = socket.recv_from(&mut buffer).await.unwrap();
                let mut m = Message::from_vec(&buffer[..n]).unwrap();
                m.metadata.message_type = MessageType::Response;
                let query = m.queries[0].clone();
                match query.name().to_ascii().as_str() {
                    "control.test." if query.query_type() == RecordType::A => {
                        let data = RData::A(rdata::A::new(192, 0, 2, 7));
                        m.add_answer(Record::from_rdata(query.name().clone(), 5, data));
                    }
                    "lame.test." if query.query_type() == RecordType::A => {
                        let data = RData::A(rdata::A::new(192, 0, 2, 8));
                        m.add_answer(Record::from_rdata(query.name().clone(), 5, data));
                    }
                    "lame.test." => continue,
                    "odd.test." if query.query_type() == RecordType::A => {
                        let data = RData::A(rdata::A::new(192, 0, 2, 9));
                        m.add_answer(Record::from_rdata(query.name().clone(), 5, data));
                    }
                    "control.test." => {}
                    "broken.test." => m.metadata.response_code = ResponseCode::ServFail,
                    _ => m.metadata.response_code = ResponseCode::NXDomain,
                }
                // A forged answer comes first and must be passed over.
                let mut forged = m.clone();
                forged.metadata.id = forged.metadata.id.wrapping_add(1);
                socket.send_to(&forged.to_vec().unwrap(), from).await.unwrap();
                socket.send_to(&m.to_vec().unwrap(), from).await.unwrap();
            }
        });
        (address, task)
    }

    #[tokio::test]
    async fn asks_several_servers_and_remembers() {
        let (server, task) = name_server().await;
        let dead = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let resolver = Resolver::default();
        resolver.set_underlay(&Underlay {
            name_servers: vec![dead.local_addr().unwrap(), server],
            ..Underlay::default()
        });
        let expected = vec![IpAddr::from([192, 0, 2, 7])];
        assert_eq!(resolver.lookup("control.test").await, Ok(expected.clone()));
        task.abort();
        let _ = task.await;
        assert_eq!(resolver.lookup("control.test").await, Ok(expected));
    }

    #[tokio::test]
    async fn a_server_that_is_wrong_about_one_family_is_good_for_the_other() {
        let (server, task) = name_server().await;
        let resolver = Resolver::default();
        resolver.set_underlay(&Underlay { name_servers: vec![server], ..Underlay::default() });
        // Silent about IPv6, and sure that the name does not exist in IPv6.
        for (name, last) in [("lame.test", 8), ("odd.test", 9)] {
            assert_eq!(resolver.lookup(name).await, Ok(vec![IpAddr::from([192, 0, 2, last])]), "{name}");
        }
        task.abort();
    }

    #[tokio::test]
    async fn every_failure_is_named() {
        let (server, task) = name_server().await;
        let resolver = Resolver::default();
        assert!(matches!(resolver.lookup("a.test").await, Err(ResolveError::NoServers(_))));
        resolver.set_underlay(&Underlay { name_servers: vec![server], ..Underlay::default() });
        assert!(matches!(resolver.lookup("nowhere.test").await, Err(ResolveError::NoSuchName(_))));
        assert!(matches!(resolver.lookup("broken.test").await, Err(ResolveError::NoAnswer(..))));
        assert!(matches!(resolver.lookup("bad name\0.test").await, Err(ResolveError::BadName(_))));
        task.abort();
    }

    #[tokio::test]
    async fn literals_and_hosts_need_no_server() {
        let resolver = Resolver::default();
        let entry = ("Control.Test".to_owned(), IpAddr::from([10, 0, 0, 1]));
        resolver.set_underlay(&Underlay { hosts: vec![entry], ..Underlay::default() });
        assert_eq!(resolver.lookup("::1").await, Ok(vec![IpAddr::V6(Ipv6Addr::LOCALHOST)]));
        assert_eq!(resolver.lookup("control.test.").await, Ok(vec![IpAddr::from([10, 0, 0, 1])]));
        assert_eq!(resolver.lookup("localhost").await.unwrap().len(), 2);
    }
}
