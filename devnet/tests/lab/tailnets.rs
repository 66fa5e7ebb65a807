//! Pods of different tailnets share a node, and even an address.

use std::time::Duration;

use podtether_devnet::lab::{CniCall, Lab, Programs, Tailnet};
use podtether_devnet::probe::tcp::{self, Serve, TcpServer};
use podtether_devnet::{Devnet, DevnetConfig};

use crate::{PATIENCE, lab_test, wait_reachable};

#[test]
fn two_pods_with_the_same_address_run_side_by_side() {
    lab_test("tailnets::two_pods_with_the_same_address_run_side_by_side", |dir| {
        let programs = Programs::find(std::path::Path::new(env!("CARGO_BIN_EXE_podtether-devnet"))).unwrap();
        let mut lab = Lab::new(dir, programs).unwrap();
        let devnets: Vec<(Devnet, _)> = ["blue.test", "green.test"]
            .map(|domain| {
                let base_domain = domain.to_owned();
                lab.start_devnet(DevnetConfig { base_domain, ..DevnetConfig::default() }).unwrap()
            })
            .into();
        let tailnets: Vec<Tailnet> = ["blue", "green"]
            .into_iter()
            .zip(&devnets)
            .map(|(name, (devnet, ca))| Tailnet::oauth(name, devnet, ca))
            .collect();
        let mut nodes = [lab.add_node("node0").unwrap(), lab.add_node("node1").unwrap()];
        let mut pods = Vec::new();
        for (n, node) in nodes.iter_mut().enumerate() {
            node.configure(&tailnets, "").unwrap();
            node.start_supervisor().unwrap();
            for tailnet in ["blue", "green"] {
                let mut pod = node.create_pod(&format!("{tailnet}{n}")).unwrap();
                let call = CniCall { tailnet: tailnet.into(), ..CniCall::new("ADD") };
                pod.add_with(node, &call).unwrap();
                pods.push(pod);
            }
        }
        let [blue0, green0, blue1, green1] = &pods[..] else { panic!("four pods") };
        assert_eq!(blue0.addresses(), green0.addresses(), "the same on one node");
        assert_eq!(blue1.addresses(), green1.addresses());
        for (from, to) in [(blue0, blue1), (green0, green1)] {
            wait_reachable(from, to.v4().unwrap());
            wait_reachable(from, to.v6().unwrap());
        }
        // Each reaches its own tailnet's pod, not the other's of the same address.
        let at = blue1.at(7000).unwrap();
        let _server = TcpServer::start(&blue1.netns, at, Serve::Echo).unwrap();
        tcp::echo_once(&blue0.netns, at, b"blue", PATIENCE).unwrap();
        assert_eq!(tcp::connect(&green0.netns, at, Duration::from_secs(2)).unwrap(), None);
    });
}
