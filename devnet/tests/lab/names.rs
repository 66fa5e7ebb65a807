//! Names: the tailnet's beside the cluster's, with and without an engine.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use podtether_devnet::lab::{CniCall, Pod};
use podtether_devnet::probe::dns;
use podtether_devnet::{DevnetConfig, DnsSettings};
use podtether_net::Netns;
use podtether_net::intercept::Owner;
use serde_json::json;

use crate::{PATIENCE, Rig, engine_pid, lab_test, wait_for, wait_reachable};

/// What the fake name servers answer everything with.
pub(crate) const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 99);
const MAGIC: &str = "100.100.100.100:53";
const QUERY: [u8; 12] = [0x70, 0x64, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];

/// A name server that knows every name; remembers who asked.
#[derive(Clone, Default)]
pub(crate) struct Everything {
    askers: Arc<Mutex<BTreeSet<IpAddr>>>,
    /// UDP answers are cut.
    cut: bool,
}

impl Everything {
    fn answer(&self, query: &[u8], from: SocketAddr, cut: bool) -> Vec<u8> {
        self.askers.lock().unwrap().insert(from.ip());
        let question = query[12..].iter().position(|b| *b == 0).unwrap() + 12 + 5;
        let mut answer = query[..question].to_vec();
        answer[2] |= 0x80;
        answer[6..12].copy_from_slice(&[0; 6]);
        if cut {
            answer[2] |= 2;
            return answer;
        }
        if answer[question - 3] == 1 {
            answer[7] = 1;
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
            answer.extend(ELSEWHERE.octets());
        }
        answer
    }

    /// Serves UDP and TCP on `at` in `ns` until the test's process ends.
    pub(crate) fn serve(&self, ns: &Netns, at: SocketAddr) {
        let bound = ns.run_blocking(|| (UdpSocket::bind(at), TcpListener::bind(at))).unwrap();
        let (udp, tcp) = (bound.0.unwrap(), bound.1.unwrap());
        let own = self.clone();
        thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((length, from)) = udp.recv_from(&mut buffer) {
                let _ = udp.send_to(&own.answer(&buffer[..length], from, own.cut), from);
            }
        });
        let own = self.clone();
        thread::spawn(move || {
            for stream in tcp.incoming().flatten() {
                let own = own.clone();
                thread::spawn(move || {
                    let from = stream.peer_addr().unwrap();
                    let mut stream = stream;
                    while let Some(query) = read_framed(&mut stream) {
                        let answer = own.answer(&query, from, false);
                        write_framed(&mut stream, &answer);
                    }
                });
            }
        });
    }

    pub(crate) fn askers(&self) -> Vec<IpAddr> {
        self.askers.lock().unwrap().iter().copied().collect()
    }
}

fn read_framed(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length).ok()?;
    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut message).ok()?;
    Some(message)
}

fn write_framed(stream: &mut TcpStream, message: &[u8]) {
    let length = u16::try_from(message.len()).unwrap().to_be_bytes();
    let _ = stream.write_all(&[&length[..], message].concat());
}

/// An A question as a stub resolver writes it.
fn question(name: &str) -> Vec<u8> {
    let mut query = QUERY.to_vec();
    for label in name.split('.') {
        query.push(u8::try_from(label.len()).unwrap());
        query.extend(label.bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    query
}

/// The last four bytes of an answer with one A record.
fn address(answer: &[u8]) -> IpAddr {
    IpAddr::from(<[u8; 4]>::try_from(&answer[answer.len() - 4..]).unwrap())
}

fn over_udp(pod: &Pod, server: SocketAddr, name: &str) -> IpAddr {
    let answer = dns::lookup(&pod.netns, server, name, false, PATIENCE).unwrap();
    assert_eq!(answer.addresses.len(), 1, "{name} at {server}: {answer:?}");
    answer.addresses[0]
}

fn over_tcp(pod: &Pod, server: SocketAddr, names: &[&str]) -> Vec<IpAddr> {
    let stream = pod.netns.run_blocking(|| TcpStream::connect_timeout(&server, PATIENCE)).unwrap();
    let mut stream = stream.unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    for name in names {
        write_framed(&mut stream, &question(name));
    }
    names.iter().map(|_| address(&read_framed(&mut stream).unwrap())).collect()
}

/// The primary CNI's addresses of a pod, and those of its node on the same network.
fn primary(pod: &Pod) -> (Vec<IpAddr>, [SocketAddr; 2]) {
    let ips = pod.primary_result["ips"].as_array().unwrap().iter();
    let own: Vec<IpAddr> =
        ips.map(|ip| ip["address"].as_str().unwrap().split('/').next().unwrap().parse().unwrap()).collect();
    let node = own.iter().map(|ip| match ip {
        IpAddr::V4(ip) => {
            let [a, b, c, _] = ip.octets();
            SocketAddr::from(([a, b, c, 1], 53))
        }
        IpAddr::V6(ip) => {
            let mut segments = ip.segments();
            segments[7] = 1;
            SocketAddr::from((segments, 53))
        }
    });
    let node: Vec<SocketAddr> = node.collect();
    (own, node.try_into().unwrap())
}

fn intercepted(servers: &[SocketAddr]) -> CniCall {
    CniCall {
        annotations: vec![("podtether.dev/dns".into(), "intercept".into())],
        name_servers: servers.iter().map(SocketAddr::ip).collect(),
        ..CniCall::new("ADD")
    }
}

#[test]
fn an_intercepted_pod_knows_both_worlds_and_keeps_the_clusters_when_its_engine_dies() {
    lab_test(
        "names::an_intercepted_pod_knows_both_worlds_and_keeps_the_clusters_when_its_engine_dies",
        |dir| {
            let mut rig = Rig::start(dir, 1, DevnetConfig::default());
            let peer = rig.join(&[(0, "peer")]).remove(0);
            let mut pod = rig.nodes[0].create_pod("pod").unwrap();
            let (own, servers) = primary(&pod);
            let cluster = Everything::default();
            for server in servers {
                cluster.serve(&rig.nodes[0].netns, server);
            }
            pod.add_with(&rig.nodes[0], &intercepted(&servers)).unwrap();
            wait_reachable(&pod, peer.v4().unwrap());
            let ours = format!("peer.{}", rig.devnet.base_domain());
            let theirs = "kubernetes.default.svc.cluster.local";
            let tailnet_names_are_known = |pod: &Pod| {
                for server in servers {
                    wait_for("the interception", || {
                        let answer = dns::lookup(&pod.netns, server, &ours, false, PATIENCE).ok()?;
                        (answer.addresses == [peer.v4().unwrap()]).then_some(())
                    });
                }
            };
            tailnet_names_are_known(&pod);
            cluster.askers.lock().unwrap().clear();
            for server in servers {
                assert_eq!(over_udp(&pod, server, &ours), peer.v4().unwrap());
                assert_eq!(over_udp(&pod, server, theirs), ELSEWHERE);
                // Both kinds in one connection.
                assert_eq!(over_tcp(&pod, server, &[&ours, theirs]).len(), 2);
                assert_eq!(over_tcp(&pod, server, &[&ours]), [peer.v4().unwrap()]);
                assert_eq!(over_tcp(&pod, server, &[theirs, theirs]), [ELSEWHERE, ELSEWHERE]);
            }
            assert_eq!(cluster.askers(), own, "asked from the pod's own addresses alone");
            // Whoever is not intercepted is not.
            assert_eq!(over_udp(&peer, servers[0], &ours), ELSEWHERE);

            // Another engine takes them over.
            let pid = engine_pid(&rig.nodes[0], "pod");
            crate::operator::json(&rig.nodes[0], &["restart", "pod"]);
            assert_ne!(engine_pid(&rig.nodes[0], "pod"), pid);
            assert_eq!(over_udp(&pod, servers[0], theirs), ELSEWHERE);
            tailnet_names_are_known(&pod);
            assert_eq!(over_tcp(&pod, servers[0], &[&ours, theirs]).len(), 2);

            // Cluster names while the engine dies, every 20 ms, by an asker that keeps its socket and by one
            // that takes a new one each time.
            let socket = pod.netns.run_blocking(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
            socket.connect(servers[0]).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(400))).unwrap();
            let (mut asked, mut unanswered, mut longest) = (0, [0, 0], Duration::ZERO);
            let restarts =
                |node: &podtether_devnet::lab::Node| node.pod_report("pod").unwrap()["restarts"].as_u64();
            let before = restarts(&rig.nodes[0]);
            let started = Instant::now();
            let mut last = started;
            let mut killed = false;
            while !killed
                || restarts(&rig.nodes[0]) == before
                || last.elapsed() < Duration::from_millis(1)
                || asked < 100
            {
                if !killed && asked == 20 {
                    let pid = engine_pid(&rig.nodes[0], "pod").unwrap();
                    nix::sys::signal::kill(
                        nix::unistd::Pid::from_raw(pid),
                        nix::sys::signal::Signal::SIGKILL,
                    )
                    .unwrap();
                    killed = true;
                }
                asked += 1;
                let mut buffer = [0; 512];
                let kept = socket.send(&question(theirs)).is_ok() && socket.recv(&mut buffer).is_ok();
                unanswered[0] += u32::from(!kept);
                let fresh = dns::lookup(&pod.netns, servers[0], theirs, false, Duration::from_millis(400));
                unanswered[1] += u32::from(fresh.is_err());
                if kept {
                    longest = longest.max(last.elapsed());
                    last = Instant::now();
                }
                thread::sleep(Duration::from_millis(20));
                assert!(started.elapsed() < PATIENCE * 2, "the engine is not started again");
            }
            println!(
                "engine killed: {asked} cluster names asked twice, unanswered {unanswered:?} (kept socket, new \
             socket), longest silence {longest:?}"
            );
            assert!(unanswered.iter().all(|n| *n <= 3), "{unanswered:?} of {asked}");
            tailnet_names_are_known(&pod);

            // DEL takes the rules with it.
            pod.del(&rig.nodes[0]).unwrap();
            for server in servers {
                wait_for("the name server itself", || {
                    let answer = dns::lookup(&pod.netns, server, &ours, false, PATIENCE).ok()?;
                    (answer.addresses == [IpAddr::V4(ELSEWHERE)]).then_some(())
                });
            }
            assert_eq!(rig.devnet.complaints(), [""; 0]);
        },
    );
}

#[test]
fn names_of_other_domains_are_asked_where_the_tailnet_says() {
    lab_test("names::names_of_other_domains_are_asked_where_the_tailnet_says", |dir| {
        // The second pod's tailnet address, which the first asks through the tunnel.
        let dns = DnsSettings {
            resolvers: vec!["10.244.1.1:5301".into()],
            routes: vec![
                ("corp.test".into(), vec!["10.244.1.1:9".into(), "100.64.0.1:5300".into()]),
                ("long.test".into(), vec!["10.244.1.1:5302".into()]),
                ("nobody.test".into(), vec!["10.244.1.1:9".into()]),
            ],
            extra_records: vec![("printer.corp.test".into(), "100.64.0.77".parse().unwrap())],
        };
        let mut rig = Rig::start(dir, 1, DevnetConfig { dns, ..DevnetConfig::default() });
        let peer = rig.join(&[(0, "peer")]).remove(0);
        let pod = rig.join(&[(0, "pod")]).remove(0);
        assert_eq!(peer.v4().unwrap().to_string(), "100.64.0.1");
        wait_reachable(&pod, peer.v4().unwrap());
        let (own, node) = primary(&pod);
        assert_eq!(node[0].ip().to_string(), "10.244.1.1");
        let (inside, outside) = (Everything::default(), Everything::default());
        let cut = Everything { cut: true, ..Everything::default() };
        inside.serve(&peer.netns, "100.64.0.1:5300".parse().unwrap());
        outside.serve(&rig.nodes[0].netns, "10.244.1.1:5301".parse().unwrap());
        cut.serve(&rig.nodes[0].netns, "10.244.1.1:5302".parse().unwrap());
        let magic: SocketAddr = MAGIC.parse().unwrap();

        let started = Instant::now();
        assert_eq!(
            over_udp(&pod, magic, "a.corp.test"),
            ELSEWHERE,
            "the second resolver, through the tunnel"
        );
        println!("with a dead first resolver: {:?}", started.elapsed());
        assert_eq!(inside.askers(), [pod.v4().unwrap()]);
        assert_eq!(over_tcp(&pod, magic, &["b.corp.test"]), [ELSEWHERE]);
        assert_eq!(over_udp(&pod, magic, "printer.corp.test").to_string(), "100.64.0.77");
        assert_eq!(over_udp(&pod, magic, "example.org"), ELSEWHERE);
        assert_eq!(outside.askers(), own[..1], "as the pod would ask it itself");
        assert_eq!(over_udp(&pod, magic, "cut.long.test"), ELSEWHERE, "cut over UDP, whole over TCP");
        let failed = dns::lookup(&pod.netns, magic, "a.nobody.test", false, PATIENCE).unwrap();
        assert!(!failed.ok && failed.code.contains("Server Failure"), "{failed:?}");

        // A peer has no resolver in this pod: neither at the service address nor at the pod's own.
        let short = Duration::from_millis(500);
        for server in [SocketAddr::new(pod.v4().unwrap(), 53), SocketAddr::new(pod.v6().unwrap(), 53)] {
            assert!(dns::lookup(&peer.netns, server, "example.org", false, short).is_err(), "{server}");
        }
    });
}

#[test]
fn a_pod_that_cannot_be_intercepted_says_so_and_what_to_do() {
    lab_test("names::a_pod_that_cannot_be_intercepted_says_so_and_what_to_do", |dir| {
        let mut rig = Rig::start(dir, 1, DevnetConfig::default());
        let mut pod = rig.nodes[0].create_pod("pod").unwrap();
        let (_, servers) = primary(&pod);
        // Somebody else has the table's name in the pod.
        let other = Owner::open(&pod.netns).unwrap();
        other.arm("podtether-ts0", &[]).unwrap();
        pod.add_with(&rig.nodes[0], &intercepted(&servers)).unwrap();
        let problem = wait_for("the report", || {
            let report = rig.nodes[0].pod_report("pod").unwrap();
            let found =
                report["health"].as_array()?.iter().find(|h| h["title"] == "its DNS is not intercepted");
            found.cloned()
        });
        println!("{problem}");
        let text = problem["text"].as_str().unwrap();
        for says in ["nf_tables", "podtether.dev/dns", "delete the pod"] {
            assert!(text.contains(says), "{says}: {text}");
        }
        let error = pod.cni(&rig.nodes[0], &CniCall::new("CHECK")).unwrap().answer;
        println!("{error}");
        assert_eq!(error["code"], 103);
        assert!(
            error["msg"].as_str().unwrap().contains("pod default/pod: its DNS is not intercepted"),
            "{error}"
        );
        // Everything else of it works, and the next engine gets what this one did not.
        drop(other);
        let pid = engine_pid(&rig.nodes[0], "pod").unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
        wait_for("the interception", || {
            let report = rig.nodes[0].pod_report("pod").unwrap();
            (report["restarts"] == 1 && report["state"] == "running" && report["health"] == json!([]))
                .then_some(())
        });
        pod.del(&rig.nodes[0]).unwrap();
    });
}
