//! Policies by chance, as people write them: what reaches a pod is what reaches a stock node in its place.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use podtether_devnet::lab::{HeadscaleConfig, Tailnet};
use podtether_devnet::probe::ping::ping;
use podtether_devnet::probe::tcp::{self, Serve, TcpServer};
use podtether_devnet::probe::udp::{self, UdpEcho};
use podtether_net::Netns;
use serde_json::{Value, json};

use super::{World, headscale_test, open_policy, wait_ping};
use crate::wait_for;

/// Ports that are served, over TCP and UDP.
const PORTS: [u16; 4] = [22, 80, 443, 8080];
/// As long as nobody answers.
const SILENCE: Duration = Duration::from_millis(700);
/// As long as nodes may need to take a policy up, and to speak again with whom the one before hid from them.
const SETTLING: Duration = Duration::from_secs(60);

/// An agreement that takes longer is told of.
const SLOW: Duration = Duration::from_secs(4);

/// A generator whose whole run follows from its seed (splitmix64).
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % u64::try_from(end).unwrap()).unwrap()
    }

    fn of<'a>(&mut self, all: &[&'a str]) -> &'a str {
        all[self.below(all.len())]
    }

    /// One to three of them.
    fn some(&mut self, all: &[&str]) -> Vec<String> {
        (0..=self.below(3)).map(|_| self.of(all).to_owned()).collect()
    }
}

/// A policy; it may be one that Headscale refuses. `x` is the address of the node that asks most.
fn policy(chance: &mut Chance, x: IpAddr, number: u32) -> Value {
    let x_net = format!("{x}/32");
    let sources = [
        "*",
        "tag:t",
        "tag:x",
        "u1@",
        "u2@",
        "group:both",
        "group:one",
        "autogroup:member",
        "autogroup:tagged",
        "from-x",
        "100.64.0.0/10",
        &x_net,
        "192.0.2.0/24",
    ];
    let targets = [
        "*",
        "tag:t",
        "tag:t",
        "tag:x",
        "u1@",
        "u1@",
        "group:one",
        "autogroup:member",
        "autogroup:tagged",
        "tailnet",
        "100.64.0.0/10",
        "fd7a:115c:a1e0::/48",
    ];
    let ports =
        ["*", "22", "80", "80,443", "400-500", "8080", "22,400-9000", "0-65535", "1-79", "53", "443,8080"];
    let protocols = ["", "", "", "tcp", "udp", "icmp", "6", "17", "1", "ipv6-icmp", "sctp"];
    let mut acls = Vec::new();
    for _ in 0..chance.below(4) {
        let (source, mut rule) = (chance.some(&sources), json!({"action": "accept"}));
        let protocol = chance.of(&protocols);
        let portless = ["icmp", "1", "ipv6-icmp"].contains(&protocol);
        let mut dst: Vec<String> = Vec::new();
        for target in chance.some(&targets) {
            let ports = if portless { "*" } else { chance.of(&ports) };
            let target = if target.starts_with("fd7a") { format!("[{target}]") } else { target };
            dst.push(format!("{target}:{ports}"));
        }
        if chance.below(6) == 0 {
            rule["src"] = json!(["autogroup:member"]);
            rule["dst"] = json!([format!("autogroup:self:{}", chance.of(&ports))]);
        } else {
            rule["src"] = json!(source);
            rule["dst"] = json!(dst);
        }
        if !protocol.is_empty() {
            rule["proto"] = json!(protocol);
        }
        acls.push(rule);
    }
    let mut grants = Vec::new();
    let kinds = ["*", "tcp:22", "udp:*", "443", "tcp:80-443", "icmp:*", "udp:22", "tcp:*", "8000-8100"];
    for _ in 0..chance.below(3) {
        let targets: Vec<String> = chance.some(&targets);
        grants.push(json!({"src": chance.some(&sources), "dst": targets, "ip": chance.some(&kinds)}));
    }
    json!({
        "groups": {"group:both": ["u1@", "u2@"], "group:one": ["u1@"]},
        "hosts": {"from-x": x_net, "tailnet": "100.64.0.0/10"},
        "tagOwners": {"tag:t": ["u1@"], "tag:x": ["group:both"], "tag:k8s-pod": []},
        "randomizeClientPort": chance.below(2) == 0,
        "nodeAttrs": [{"target": ["*"], "attr": [format!("policy-{number}")]}],
        "acls": acls,
        "grants": grants,
    })
}

/// A machine that asks and answers.
struct Machine {
    name: &'static str,
    /// Machines of one class are the same to every policy.
    class: &'static str,
    netns: Netns,
    addresses: Vec<IpAddr>,
}

/// Who reached what: (class that asked, class that answered, what) → the answers by the names of both.
type Matrix = BTreeMap<(String, String, String), BTreeMap<String, bool>>;

fn measure(machines: &[Machine]) -> Matrix {
    let mut matrix = Matrix::new();
    let cells = std::thread::scope(|scope| {
        let mut running = Vec::new();
        for from in machines {
            for to in machines.iter().filter(|to| to.name != from.name) {
                for address in &to.addresses {
                    for port in PORTS {
                        for udp in [false, true] {
                            let target = SocketAddr::new(*address, port);
                            let probe = move || {
                                if udp {
                                    // No route, or a refusal, is no answer.
                                    udp::ask(&from.netns, target, b"x", SILENCE).is_ok_and(|a| a.is_some())
                                } else {
                                    tcp::connect(&from.netns, target, SILENCE).is_ok_and(|a| a.is_some())
                                }
                            };
                            let family = if address.is_ipv4() { "v4" } else { "v6" };
                            let what = format!("{} {family} {port}", if udp { "udp" } else { "tcp" });
                            running.push((from, to, what, scope.spawn(probe)));
                        }
                    }
                    let echo = move || {
                        ping(&from.netns, *address, 2, Duration::from_millis(100), SILENCE)
                            .is_ok_and(|report| report.received > 0)
                    };
                    let what = if address.is_ipv4() { "ping v4" } else { "ping v6" };
                    running.push((from, to, what.to_owned(), scope.spawn(echo)));
                }
            }
        }
        let mut cells = Vec::new();
        for (from, to, what, probe) in running {
            cells.push((from, to, what, probe.join().unwrap()));
        }
        cells
    });
    for (from, to, what, reached) in cells {
        let key = (from.class.to_owned(), to.class.to_owned(), what);
        matrix.entry(key).or_default().insert(format!("{}->{}", from.name, to.name), reached);
    }
    matrix
}

/// Cells in which a pod is treated otherwise than a stock node.
fn disagreements(matrix: &Matrix) -> Vec<String> {
    let odd = matrix.iter().filter(|(_, by)| by.values().any(|r| *r) && by.values().any(|r| !*r));
    odd.map(|((from, to, what), by)| format!("{from} to {to}, {what}: {by:?}")).collect()
}

fn world(mut world: World) -> (World, Vec<Machine>, Vec<podtether_devnet::lab::Pod>) {
    let users = ["u1", "u2"].map(|name| world.server.user(name).unwrap());
    let (url, ca) = (world.server.url(), world.server.ca_file.clone());
    let key = world.server.api_key().unwrap();
    let table = |name: &str| Tailnet::other_headscale(name, &url, &ca, &key);
    world.tailnets = vec![table("default"), table("tagged").tagged(&["tag:t"]), table("owned").of_user("u1")];
    let node = world.add_node("");
    let sx = world.join_stock("sx", &["--tags", "tag:x"], &[]);
    let st = world.join_stock("st", &["--tags", "tag:t"], &[]);
    let su = world.join_stock("su", &["-u", &users[0]], &[]);
    let pods = vec![world.join_in(node, "pt", "tagged"), world.join_in(node, "pu", "owned")];
    let mut machines = Vec::new();
    for (stock, name, class) in [(sx, "sx", "X"), (st, "st", "T"), (su, "su", "U")] {
        let stock = &world.stocks[stock];
        let (netns, addresses) = (stock.node.netns.clone(), stock.addresses().unwrap());
        machines.push(Machine { name, class, netns, addresses });
    }
    for (pod, name, class) in [(&pods[0], "pt", "T"), (&pods[1], "pu", "U")] {
        let (netns, addresses) = (pod.netns.clone(), pod.addresses().to_vec());
        machines.push(Machine { name, class, netns, addresses });
    }
    (world, machines, pods)
}

fn start_policy() -> Value {
    let mut policy = open_policy();
    policy["tagOwners"] = json!({"tag:t": [], "tag:x": [], "tag:k8s-pod": []});
    policy
}

/// `POLICY_SEED` chooses the first policy, `POLICIES` their number.
#[test]
fn pods_are_reached_as_stock_nodes_are() {
    let name = "headscale::random_policies::pods_are_reached_as_stock_nodes_are";
    headscale_test(
        name,
        |_| HeadscaleConfig::default(),
        &start_policy(),
        |new| {
            let number = |name: &str, default| {
                std::env::var(name).ok().map_or(default, |text| text.parse::<u64>().unwrap())
            };
            let mut seed = [0; 8];
            getrandom::fill(&mut seed).unwrap();
            let seed = number("POLICY_SEED", u64::from_ne_bytes(seed) >> 16);
            let count = number("POLICIES", 12);
            println!("POLICY_SEED={seed} POLICIES={count}");
            let (world, machines, _pods) = world(new);
            let mut servers: Vec<(TcpServer, UdpEcho)> = Vec::new();
            for machine in &machines {
                for port in PORTS {
                    for any in ["0.0.0.0", "::"] {
                        // The IPv6 wildcard takes IPv4 as well.
                        if any == "::" {
                            let at = SocketAddr::new(any.parse().unwrap(), port);
                            let tcp = TcpServer::start(&machine.netns, at, Serve::Echo).unwrap();
                            servers.push((tcp, UdpEcho::start(&machine.netns, at).unwrap()));
                        }
                    }
                }
            }
            for from in &machines {
                for to in machines.iter().filter(|to| to.name != from.name) {
                    wait_ping(&from.netns, to.addresses[0], &format!("{} to {}", from.name, to.name));
                }
            }
            let mut worst = Duration::ZERO;
            let (mut done, mut refused, mut compared, mut open) = (0, 0, 0, 0);
            for number in 0.. {
                if done == count {
                    break;
                }
                let mut chance = Chance(seed.wrapping_add(number));
                let policy = policy(&mut chance, machines[0].addresses[0], u32::try_from(number).unwrap());
                if let Err(why) = world.server.check_policy(&policy) {
                    refused += 1;
                    assert!(refused < 20 * (done + 5), "Headscale takes nearly none: {why}");
                    continue;
                }
                world.server.policy(&policy).unwrap();
                let attribute = format!("policy-{number}");
                for stock in &world.stocks {
                    wait_for("a stock node to have the policy", || {
                        let status = stock.status().ok()?;
                        status["Self"]["CapMap"].get(&attribute).map(|_| ())
                    });
                }
                let start = Instant::now();
                let mut late: Vec<String> = Vec::new();
                let matrix = loop {
                    let matrix = measure(&machines);
                    let odd = disagreements(&matrix);
                    if odd.is_empty() {
                        break matrix;
                    }
                    late.push(format!("{:?}: {} odd, {}", start.elapsed(), odd.len(), odd[0]));
                    assert!(
                        start.elapsed() < SETTLING,
                        "POLICY_SEED={} POLICIES=1:\n{policy:#}\n{}",
                        seed.wrapping_add(number),
                        odd.join("\n")
                    );
                };
                worst = worst.max(start.elapsed());
                if start.elapsed() > SLOW {
                    println!("policy {number} was slow: {:?}\n{}", start.elapsed(), late.join("\n"));
                }
                compared += matrix.values().map(BTreeMap::len).sum::<usize>();
                open += matrix.values().flat_map(BTreeMap::values).filter(|r| **r).count();
                done += 1;
            }
            println!(
                "{done} policies ({refused} that Headscale refuses), {compared} cells compared, {open} open, the \
             slowest agreement after {worst:?}"
            );
            assert!(open > 0 && open < compared);
        },
    );
}
