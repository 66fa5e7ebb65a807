//! The access rules hold between pods, and a change of them does too.

use std::time::Duration;

use podtether_devnet::DevnetConfig;
use podtether_devnet::acl::Policy;
use podtether_devnet::lab::Pod;
use podtether_devnet::probe::tcp::{self, Serve, TcpServer};
use podtether_devnet::probe::udp::{self, UdpEcho};

use crate::{PATIENCE, Rig, lab_test, wait_for, wait_reachable};

const SHORT: Duration = Duration::from_millis(700);

fn policy(tcp_port: u16) -> Policy {
    let text = format!(
        r#"
        [[rules]]
        src = ["tag:k8s-pod"]
        dst = ["*"]
        proto = ["icmp"]
        [[rules]]
        src = ["tag:k8s-pod"]
        dst = ["tag:k8s-pod"]
        ports = ["{tcp_port}"]
        proto = ["tcp"]
        "#
    );
    text.parse().unwrap()
}

fn connects(from: &Pod, to: &Pod, port: u16) -> bool {
    tcp::connect(&from.netns, to.at(port).unwrap(), SHORT).unwrap().is_some()
}

#[test]
fn an_allowed_port_answers_a_denied_one_does_not_and_a_new_rule_counts_at_once() {
    lab_test("rules::an_allowed_port_answers_a_denied_one_does_not_and_a_new_rule_counts_at_once", |dir| {
        let config = DevnetConfig { policy: Some(policy(8080)), ..DevnetConfig::default() };
        let mut rig = Rig::start(dir, 2, config);
        let pods = rig.join(&[(0, "a"), (0, "beside"), (1, "far")]);
        let [a, beside, far] = &pods[..] else { panic!("three pods") };
        let mut servers = Vec::new();
        for to in [beside, far] {
            wait_reachable(a, to.v4().unwrap());
            for port in [8080, 9090] {
                servers.push(TcpServer::start(&to.netns, to.at(port).unwrap(), Serve::Echo).unwrap());
            }
            tcp::echo_once(&a.netns, to.at(8080).unwrap(), b"hello", PATIENCE).unwrap();
            assert!(!connects(a, to, 9090), "{}", to.name);
            let _echo = UdpEcho::start(&a.netns, a.at(8080).unwrap()).unwrap();
            assert!(udp::ask(&to.netns, a.at(8080).unwrap(), b"x", SHORT).unwrap().is_none());
        }
        rig.devnet.set_policy(Some(policy(9090)));
        for to in [beside, far] {
            wait_for("the new rule", || connects(a, to, 9090).then_some(()));
            assert!(!connects(a, to, 8080), "{}", to.name);
        }
    });
}
