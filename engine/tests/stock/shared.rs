//! Nodes of one tailnet that are shared with a user of another: ours and stock's, seen by ours and by stock.

use std::io::Read as _;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::Stdio;
use std::time::{Duration, Instant};

use hickory_proto::rr::RecordType as T;
use podtether_devnet::{AuthKeyOptions, Devnet, DnsSettings};
use podtether_proto::engine::PeerStatus;
use serde_json::Value;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::task::JoinSet;

use super::common::{Join, PATIENCE, Pod, echo, patient, probe};
use super::{
    ECHO_PORT, Node, Said, Stock, engine_says, make_underlay, serve_echo, start_devnet, stock_says, until,
};

const GREETING_PORT: u16 = 9001;
const GREETING: &str = "well met";
const NO_ERROR: u16 = 0;
const SERVER_FAILURE: u16 = 2;
const NAME_ERROR: u16 = 3;
const REFUSED: u16 = 5;

/// A pod and a stock node of one user.
struct Pair<'a> {
    pod: Pod,
    node: Node<'a>,
    /// Their addresses, and what control calls them by.
    addresses: [IpAddr; 2],
    ids: [u64; 2],
    _services: [JoinSet<()>; 2],
}

impl<'a> Pair<'a> {
    async fn join(stock: &'a Stock, devnet: &Devnet, underlay: IpAddr, user: u64, names: [&str; 2]) -> Self {
        let key = || AuthKeyOptions { user: Some(user), ..AuthKeyOptions::default() };
        let mut pod = Pod::make(&stock.dir, names[0]).await;
        let join = Join {
            control_url: devnet.https_url(),
            ca_pem: devnet.ca_pem().to_owned(),
            auth_key: Some(devnet.create_auth_key(key()).secret),
            addresses: vec![underlay],
        };
        let ours = pod.join(&join).await[0];
        let at = SocketAddr::new(ours, GREETING_PORT);
        let listener = pod.link.pod.run(move || TcpListener::bind(at)).await.unwrap().unwrap();
        let services = [greet(listener), echo(&pod, SocketAddr::new(ours, ECHO_PORT)).await];
        let node = stock.join_with(names[1], devnet, &[], key()).await;
        let addresses = [ours, node.address().await];
        let ids = names.map(|name| devnet.node(name).unwrap().id);
        Self { pod, node, addresses, ids, _services: services }
    }

    /// Whether each of the two has answers from each of the others, when control asks them to ping: the pod,
    /// then the stock node.
    async fn ping(&self, devnet: &Devnet, kind: &str, to: [IpAddr; 2]) -> [[bool; 2]; 2] {
        let ask = async |id, to| {
            let said = devnet.ping_peer(id, kind, to, Duration::from_secs(2)).await;
            said.is_ok_and(|said| {
                let said: Value = serde_json::from_slice(&said).unwrap();
                said["Err"].as_str().is_none_or(str::is_empty)
            })
        };
        let [pod, node] = self.ids;
        let (a, b, c, d) = tokio::join!(ask(pod, to[0]), ask(pod, to[1]), ask(node, to[0]), ask(node, to[1]));
        [[a, b], [c, d]]
    }

    async fn until_pings(&self, what: &str, devnet: &Devnet, to: &Self, wanted: [[bool; 2]; 2]) {
        let (begun, mut last) = (Instant::now(), None);
        let wait = async {
            while last != Some(wanted) {
                last = Some(self.ping(devnet, "ICMP", to.addresses).await);
            }
        };
        let reached = tokio::time::timeout(PATIENCE, wait).await.is_ok();
        assert!(reached, "{what}: {last:?}, not {wanted:?}\n{}", self.node.log());
        println!("{what}: after {:?}", begun.elapsed());
    }

    /// What both say of a name.
    async fn say(&self, name: &str, kind: T) -> [Said; 2] {
        let said = [
            engine_says(&self.pod, self.addresses[0], name, kind).await,
            stock_says(&self.node, name, kind).await,
        ];
        println!("{name} {kind}: {said:?}");
        said
    }

    /// Whether the pod has an answer to a datagram.
    async fn echoes(&self, from: IpAddr) -> bool {
        let to = SocketAddr::new(from, ECHO_PORT);
        probe(&self.pod, self.addresses[0], to, 1, Duration::from_millis(20)).await.answered == 1
    }

    /// Whether the pod is greeted over TCP by an address, and the stock node by the same or by a name.
    async fn greeted(&self, by: IpAddr, name: &str) -> [bool; 2] {
        let to = SocketAddr::new(by, GREETING_PORT);
        let greeting = self.pod.link.pod.run(move || {
            let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2))?;
            stream.set_read_timeout(Some(Duration::from_secs(2)))?;
            let mut text = String::new();
            stream.read_to_string(&mut text).map(|_| text)
        });
        let pod = greeting.await.unwrap().is_ok_and(|text| text == GREETING);
        [pod, nc(&self.node, name).await == GREETING]
    }

    async fn peers(&self) -> Vec<PeerStatus> {
        self.pod.client().peers(patient()).await.unwrap()
    }

    async fn status(&self) -> Value {
        serde_json::from_str(&self.node.run(&["status", "--json"]).await.1).unwrap()
    }
}

/// Greets whoever connects.
fn greet(listener: TcpListener) -> JoinSet<()> {
    listener.set_nonblocking(true).unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    let mut task = JoinSet::new();
    task.spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.write_all(GREETING.as_bytes()).await;
        }
    });
    task
}

/// What stock's `nc` hears from a host, which it ends at once when its own input does.
async fn nc(node: &Node<'_>, host: &str) -> String {
    let mut child = Command::new(&node.stock.client)
        .arg(format!("--socket={}", node.dir.join("sock").display()))
        .args(["nc", host, &GREETING_PORT.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let _input = child.stdin.take();
    let output = tokio::time::timeout(Duration::from_secs(5), child.wait_with_output()).await;
    output.map_or_else(|_| String::new(), |out| String::from_utf8_lossy(&out.unwrap().stdout).into_owned())
}

/// What a status of stock's says about the peer with this address.
fn peer(status: &Value, address: IpAddr) -> &Value {
    let has = |peer: &&Value| {
        let ips = peer["TailscaleIPs"].as_array();
        ips.is_some_and(|ips| ips.iter().any(|ip| *ip == address.to_string()))
    };
    let peers = status["Peer"].as_object();
    peers.and_then(|peers| peers.values().find(has)).unwrap_or(&Value::Null)
}

fn reverse(ip: IpAddr) -> String {
    let text = ip.to_string();
    let octets: Vec<&str> = text.split('.').rev().collect();
    format!("{}.in-addr.arpa.", octets.join("."))
}

/// Both know a name by the same records.
fn agreed([ours, stock]: [Said; 2]) -> Said {
    assert_eq!(ours, stock, "ours, then stock's");
    ours
}

const ALL: [[bool; 2]; 2] = [[true; 2]; 2];
const NONE: [[bool; 2]; 2] = [[false; 2]; 2];

pub(super) async fn shared(stock: &Stock) {
    let ip = make_underlay().await;
    let devnet = start_devnet(&stock.dir, ip, DnsSettings::default()).await;
    let _echo = serve_echo().await;
    let _greeting = greet(TcpListener::bind(("127.0.0.1", GREETING_PORT)).unwrap());
    let [us, admin, them] = [
        devnet.add_user("us@tailnet.test", "Us"),
        devnet.add_user("admin@tailnet.test", "Admin"),
        devnet.add_tailnet_user("other.test", "them@other.test", "Them"),
    ];
    let hosts = Pair::join(stock, &devnet, ip, us, ["db", "files"]).await;
    let mut guests = Pair::join(stock, &devnet, ip, them, ["pod", "stock"]).await;
    let [db, files] = hosts.addresses;
    let share =
        |with, quarantined| hosts.ids.iter().all(|id| devnet.share_node(*id, with, admin, quarantined));

    for pair in [&hosts, &guests] {
        until("a tailnet knows its own", async || {
            let stock = pair.status().await["Peer"].as_object().map_or(0, serde_json::Map::len);
            (pair.peers().await.len(), stock) == (1, 1)
        })
        .await;
    }
    assert_eq!(guests.ping(&devnet, "ICMP", hosts.addresses).await, NONE);
    assert!(share(them, true));
    guests.until_pings("what is shared is reached", &devnet, &hosts, ALL).await;
    assert!(guests.echoes(db).await && guests.echoes(files).await);

    // By name: of the other tailnet, in full.
    for (name, address) in [("db", db), ("files", files)] {
        let full = format!("{name}.tailnet.test");
        assert_eq!(
            agreed(guests.say(&format!("{full}."), T::A).await),
            (NO_ERROR, vec![address.to_string()])
        );
        assert_eq!(agreed(guests.say(&format!("{full}."), T::AAAA).await).0, NO_ERROR);
        assert_eq!(agreed(guests.say(&reverse(address), T::PTR).await), (NO_ERROR, vec![format!("{full}.")]));
        // Not as if it were of the own tailnet.
        assert_eq!(agreed(guests.say(&format!("{name}.other.test."), T::A).await), (NAME_ERROR, vec![]));
        assert_eq!(guests.greeted(address, &full).await, [true, true], "{}", guests.node.log());
        assert_eq!(nc(&guests.node, name).await, "");
        let alone = [(REFUSED, vec![]), (SERVER_FAILURE, vec![])];
        assert_eq!(guests.say(&format!("{name}."), T::A).await, alone);
    }
    // The rest of that tailnet's names are for others to know: stock fails, we refuse.
    let unknown = [(REFUSED, vec![]), (SERVER_FAILURE, vec![])];
    assert_eq!(guests.say("gone.tailnet.test.", T::A).await, unknown);

    // Whose they are.
    let status = guests.status().await;
    for (name, address) in [("db", db), ("files", files)] {
        let peer = peer(&status, address);
        assert_eq!(peer["DNSName"], format!("{name}.tailnet.test."));
        assert_eq!((&peer["UserID"], &peer["AltSharerUserID"]), (&us.into(), &admin.into()));
        assert_eq!(peer["ShareeNode"], Value::Null);
        let whois = guests.node.run(&["whois", "--json", &address.to_string()]).await.1;
        let whois: Value = serde_json::from_str(&whois).unwrap_or_else(|e| panic!("{e}: {whois}"));
        assert_eq!(whois["UserProfile"]["LoginName"], "us@tailnet.test");
        let ours = guests.peers().await;
        let ours = ours.iter().find(|peer| peer.addresses.contains(&address)).unwrap();
        assert_eq!(ours.name, format!("{name}.tailnet.test"));
    }
    // Stock's status has profiles of whole netmaps alone.
    guests.node.restart().await;
    until("stock has a whole netmap", async || !peer(&guests.status().await, db).is_null()).await;
    let status = guests.status().await;
    for (id, login) in [(us, "us@tailnet.test"), (admin, "admin@tailnet.test")] {
        assert_eq!(status["User"][id.to_string()]["LoginName"], login, "{}", status["User"]);
    }
    guests.until_pings("what is shared is reached again", &devnet, &hosts, ALL).await;
    // Those they are shared with have no names there.
    let status = hosts.status().await;
    let shown = hosts.node.run(&["status"]).await.1;
    for address in guests.addresses {
        let peer = peer(&status, address);
        assert_eq!((&peer["ShareeNode"], &peer["UserID"]), (&true.into(), &them.into()), "{peer}");
        assert_eq!((&peer["DNSName"], &peer["HostName"]), (&"".into(), &"device-of-shared-to-user".into()));
        assert!(!shown.contains(&address.to_string()), "{shown}");
        let ours = hosts.peers().await;
        let ours = ours.iter().find(|peer| peer.addresses.contains(&address)).unwrap();
        assert_eq!(ours.name, address.to_string());
        // Stock gives such an address the name of the root.
        let nameless = [(NAME_ERROR, vec![]), (NO_ERROR, vec![".".to_owned()])];
        assert_eq!(hosts.say(&reverse(address), T::PTR).await, nameless);
    }
    assert_eq!(hosts.say("pod.other.test.", T::A).await, unknown);

    // In quarantine they answer and begin nothing.
    assert_eq!(hosts.ping(&devnet, "ICMP", guests.addresses).await, NONE);
    for address in guests.addresses {
        assert!(!hosts.echoes(address).await);
        assert_eq!(hosts.greeted(address, &address.to_string()).await, [false, false]);
    }
    assert_eq!(hosts.ping(&devnet, "TSMP", guests.addresses).await, ALL, "no part of what a jail keeps");
    assert!(share(them, false));
    hosts.until_pings("out of quarantine", &devnet, &guests, ALL).await;
    for address in guests.addresses {
        assert!(hosts.echoes(address).await);
        assert_eq!(hosts.greeted(address, &address.to_string()).await, [true, true]);
    }

    // Known by other addresses, as two tailnets may have given the same one twice.
    let mask: IpAddr = "100.99.0.1".parse().unwrap();
    assert!(guests.ids.iter().all(|viewer| devnet.masquerade(hosts.ids[0], *viewer, mask)));
    until("by its mask", async || guests.ping(&devnet, "ICMP", [mask, files]).await == ALL).await;
    assert_eq!(agreed(guests.say("db.tailnet.test.", T::A).await), (NO_ERROR, vec![mask.to_string()]));
    assert_eq!(guests.greeted(mask, "db.tailnet.test").await, [true, true]);
    assert!(guests.ids.iter().all(|viewer| devnet.unmask(hosts.ids[0], *viewer)));
    guests.until_pings("by its own address", &devnet, &hosts, ALL).await;

    // Shared both ways, then only the other way: who was a guest is in quarantine.
    assert!(guests.ids.iter().all(|id| devnet.share_node(*id, us, them, true)));
    until("the guests have names", async || {
        let named = (NO_ERROR, vec![guests.addresses[0].to_string()]);
        hosts.say("pod.other.test.", T::A).await == [named.clone(), named]
    })
    .await;
    guests.until_pings("there, shared both ways", &devnet, &hosts, ALL).await;
    hosts.until_pings("back, shared both ways", &devnet, &guests, ALL).await;
    assert!(hosts.ids.iter().all(|id| devnet.unshare_node(*id, them)));
    guests.until_pings("there, shared the other way alone", &devnet, &hosts, NONE).await;
    hosts.until_pings("back, shared the other way alone", &devnet, &guests, ALL).await;

    // No share is left: nobody is there.
    assert!(guests.ids.iter().all(|id| devnet.unshare_node(*id, us)));
    hosts.until_pings("no way back", &devnet, &guests, NONE).await;
    guests.until_pings("no way there", &devnet, &hosts, NONE).await;
    assert!(!guests.echoes(db).await && !hosts.echoes(guests.addresses[0]).await);
    for pair in [&guests, &hosts] {
        assert_eq!(pair.peers().await.len(), 1);
        assert_eq!(pair.status().await["Peer"].as_object().unwrap().len(), 1);
    }
    assert_eq!(guests.say("db.tailnet.test.", T::A).await, unknown);
    assert_eq!(guests.greeted(db, "db.tailnet.test").await, [false, false]);
    assert_eq!(devnet.complaints(), [""; 0]);
}
