//! The same questions to a pod and to a stock node under one Headscale.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use podtether_devnet::lab::{CniCall, HeadscaleConfig};
use podtether_devnet::probe::dns::{self, Answer};
use podtether_net::Netns;

use super::{headscale_test, open_policy, wait_ping};
use crate::names::{ELSEWHERE, Everything};
use crate::routes::make_uplink;
use crate::{PATIENCE, wait_for};

/// Names that are there but have no address. A pod says so; stock says that they do not exist, which lets
/// resolvers forget the names below them.
const EXIST_WITHOUT_ADDRESS: [&str; 2] = ["ts.example", "2.0.64.100.in-addr.arpa"];
/// Headscale's own address at the router, where the name servers are as well.
const GLOBAL: &str = "10.255.0.1";
const SPLIT: &str = "fd10:ffff::1";
const MAGIC: [&str; 2] = ["100.100.100.100:53", "[fd7a:115c:a1e0::53]:53"];

fn ask(ns: &Netns, server: SocketAddr, name: &str, v6: bool) -> Result<Answer, String> {
    let mut answer = dns::lookup(ns, server, name, v6, Duration::from_secs(3)).map_err(|e| e.to_string())?;
    answer.addresses.sort();
    Ok(answer)
}

#[test]
fn a_pod_answers_names_as_a_stock_node_does() {
    let name = "headscale::names::a_pod_answers_names_as_a_stock_node_does";
    let dns = format!(
        "  override_local_dns: true
  nameservers: {{global: ['{GLOBAL}'], split: {{corp.test: ['{SPLIT}']}}}}
  search_domains: [corp.test]
  extra_records:
    - {{name: printer.ts.example, type: A, value: 100.64.0.77}}
    - {{name: printer.ts.example, type: AAAA, value: 'fd7a:115c:a1e0::77'}}
    - {{name: grafana.other.test, type: A, value: 100.64.0.78}}
"
    );
    headscale_test(
        name,
        |_| HeadscaleConfig { dns, ..HeadscaleConfig::default() },
        &open_policy(),
        |mut world| {
            let node = world.add_node("");
            make_uplink(&world.lab);
            let (global, split, cluster) =
                (Everything::default(), Everything::default(), Everything::default());
            global.serve(world.lab.router(), SocketAddr::new(GLOBAL.parse().unwrap(), 53));
            split.serve(world.lab.router(), SocketAddr::new(SPLIT.parse().unwrap(), 53));
            let server: SocketAddr = "10.244.1.1:53".parse().unwrap();
            cluster.serve(&world.nodes[node].netns, server);
            let stock = world.join_stock("stock", &["--tags", "tag:k8s-pod"], &[]);
            let stock_ips = world.stocks[stock].addresses().unwrap();
            let pod = world.join(node, "pod");
            wait_ping(&pod.netns, stock_ips[0], "the stock node");
            let theirs = world.stocks[stock].node.netns.clone();
            wait_ping(&theirs, pod.v4().unwrap(), "the pod");

            let names = [
                "stock.ts.example",
                "pod.ts.example",
                "POD.ts.Example",
                "pod.ts.example.",
                "nobody.ts.example",
                "ts.example",
                "sub.pod.ts.example",
                "printer.ts.example",
                "PRINTER.ts.example",
                "grafana.other.test",
                "other.test",
                "wiki.corp.test",
                "corp.test",
                "a.b.corp.test",
                "example.org",
                "kubernetes.default.svc.cluster.local",
                "localhost",
                "2.0.64.100.in-addr.arpa",
            ];
            let mut differ = Vec::new();
            let mut asked = 0;
            for server in MAGIC.map(|server| server.parse().unwrap()) {
                for name in names {
                    for v6 in [false, true] {
                        asked += 1;
                        let pair = || (ask(&pod.netns, server, name, v6), ask(&theirs, server, name, v6));
                        let mut answers = pair();
                        if answers.0 != answers.1 {
                            // One that was late on a loaded machine.
                            answers = pair();
                        }
                        if answers.0 != answers.1 && !EXIST_WITHOUT_ADDRESS.contains(&name) {
                            differ.push(format!(
                                "{name} v6={v6} at {server}:\n  pod {:?}\n  stock {:?}",
                                answers.0, answers.1
                            ));
                        }
                    }
                }
            }
            println!("{asked} questions, {} answered otherwise\n{}", differ.len(), differ.join("\n"));
            assert!(differ.is_empty());

            let at = |server: &str, name: &str| {
                ask(&pod.netns, server.parse().unwrap(), name, false).unwrap().addresses
            };
            assert_eq!(at(MAGIC[0], "stock.ts.example"), stock_ips[..1]);
            assert_eq!(at(MAGIC[0], "printer.ts.example"), ["100.64.0.77".parse::<IpAddr>().unwrap()]);
            assert_eq!(at(MAGIC[0], "example.org"), [IpAddr::V4(ELSEWHERE)]);
            for (server, place) in [(&global, "10.244.1."), (&split, "fd44:1::")] {
                let askers = server.askers();
                assert!(askers.iter().any(|ip| ip.to_string().starts_with(place)), "{askers:?}");
            }

            // Intercepted: the tailnet's names and routes at the cluster's name server, the rest as before.
            let mut caught = world.nodes[node].create_pod("caught").unwrap();
            let call = CniCall {
                annotations: vec![("podtether.dev/dns".into(), "intercept".into())],
                name_servers: vec![server.ip()],
                ..CniCall::new("ADD")
            };
            caught.add_with(&world.nodes[node], &call).unwrap();
            let asked = |name: &str| {
                dns::lookup(&caught.netns, server, name, false, PATIENCE)
                    .map(|a| a.addresses)
                    .unwrap_or_default()
            };
            wait_for("the interception", || (asked("stock.ts.example") == stock_ips[..1]).then_some(()));
            assert_eq!(asked("printer.ts.example"), ["100.64.0.77".parse::<IpAddr>().unwrap()]);
            assert_eq!(asked("grafana.other.test"), ["100.64.0.78".parse::<IpAddr>().unwrap()]);
            assert_eq!(asked("kubernetes.default.svc.cluster.local"), [IpAddr::V4(ELSEWHERE)]);
            let by = cluster.askers();
            assert!(by.iter().all(|ip| ip.to_string().starts_with("10.244.1.")) && !by.is_empty(), "{by:?}");
        },
    );
}
