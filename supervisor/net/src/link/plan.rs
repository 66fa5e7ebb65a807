//! What one namespace of a link should hold, against what it does hold. Pure.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::netlink::{Address, Link, Mac, Neighbour, Route, Rule, TableRoute, mac_text};

/// A namespace as it should be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Settings, in the order they are made.
    pub(super) sysctls: Vec<(String, &'static str)>,
    pub(super) devices: Vec<Device>,
    /// `None`: rules are left alone.
    pub(super) policy: Option<Policy>,
}

/// Exactly these rules and routes in a block of priorities and the table of the same number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Policy {
    /// First of its priorities, and the number of its table.
    pub(super) base: u32,
    /// The interface that next hops are on.
    pub(super) device: String,
    /// Routes of the table; without a next hop: unreachable.
    pub(super) hops: Vec<Hop>,
    /// In the order in which they are asked.
    pub(super) rules: Vec<Rule>,
}

/// Priorities of one [`Policy`].
pub(super) const POLICY_PRIORITIES: u32 = 4;

/// An interface as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Device {
    pub(super) name: String,
    /// `None` for devices whose own values are fine (loopback).
    pub(super) mtu: Option<u32>,
    pub(super) mac: Option<Mac>,
    pub(super) alias: Option<String>,
    /// Whether the kernel may send group reports through it.
    pub(super) multicast: bool,
    pub(super) addresses: Vec<IpNet>,
    pub(super) neighbours: Vec<(IpAddr, Mac)>,
    pub(super) routes: Vec<Hop>,
    /// What is not wanted goes.
    pub(super) exclusive: bool,
}

/// A route on a [`Device`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Hop {
    pub(super) dst: IpNet,
    pub(super) gateway: Option<IpAddr>,
}

/// A namespace as it is.
#[derive(Debug, Clone, Default)]
pub(super) struct Observed {
    /// Only the wanted ones; absent where this kernel has no such setting.
    pub(super) sysctls: BTreeMap<String, String>,
    pub(super) links: Vec<Link>,
    pub(super) addresses: Vec<Address>,
    pub(super) routes: Vec<Route>,
    pub(super) neighbours: Vec<Neighbour>,
    /// Only those of the wanted policy's priorities.
    pub(super) rules: Vec<Rule>,
    /// Only those of the wanted policy's table.
    pub(super) table: Vec<TableRoute>,
}

/// One thing to change. Shown, it is the sentence that says what is wrong now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Step {
    /// Interface name; empty for a setting.
    pub(super) device: String,
    /// Its index; 0 when it is not there.
    pub(super) index: u32,
    pub(super) action: Action,
}

/// See [`Step`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    Sysctl {
        key: String,
        value: &'static str,
    },
    /// Cannot be made here: a pair is made with its other end.
    Absent,
    Mtu(u32),
    Mac(Mac),
    Alias(String),
    Multicast(bool),
    AddAddress(IpNet),
    Up,
    AddNeighbour(Neighbour),
    AddRoute(Route),
    DropRoute(Route),
    DropNeighbour(Neighbour),
    DropAddress(IpNet),
    AddTableRoute(TableRoute),
    AddRule(Rule),
    DropRule(Rule),
    DropTableRoute(TableRoute),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let device = &self.device;
        match &self.action {
            Action::Sysctl { key, value } => write!(f, "{key} is not {value}"),
            Action::Absent => write!(f, "{device} is missing"),
            Action::Mtu(mtu) => write!(f, "{device} has not the MTU {mtu}"),
            Action::Mac(mac) => write!(f, "{device} has not the hardware address {}", mac_text(*mac)),
            Action::Alias(alias) => write!(f, "{device} has not the alias {alias}"),
            Action::Multicast(on) => {
                write!(f, "{device} has not multicast {}", if *on { "on" } else { "off" })
            }
            Action::AddAddress(net) => write!(f, "{device} has no address {net}"),
            Action::Up => write!(f, "{device} is down"),
            Action::AddNeighbour(n) => {
                write!(f, "{device} has no neighbour {} at {}", n.address, mac_text(n.mac))
            }
            Action::AddRoute(route) => write!(f, "{device} has no route to {}", route.dst),
            Action::DropRoute(route) => write!(f, "{device} has a stray route to {}", route.dst),
            Action::DropNeighbour(n) => write!(f, "{device} has a stray neighbour {}", n.address),
            Action::DropAddress(net) => write!(f, "{device} has a stray address {net}"),
            Action::AddTableRoute(route) => {
                write!(f, "table {} has no route to {}", route.table, route.dst)
            }
            Action::AddRule(rule) => write!(f, "rule {} is missing: {}", rule.priority, selector(rule)),
            Action::DropRule(rule) => write!(f, "rule {} is stray: {}", rule.priority, selector(rule)),
            Action::DropTableRoute(route) => {
                write!(f, "table {} has a stray route to {}", route.table, route.dst)
            }
        }
    }
}

fn selector(rule: &Rule) -> String {
    let part = |net: Option<IpNet>| net.map_or_else(|| "all".to_owned(), |net| net.to_string());
    format!("from {} to {} look up {}", part(rule.src), part(rule.dst), rule.table)
}

/// The steps from `observed` to `wanted`, in an order that works: settings before devices go up, routes
/// after that, and what goes away goes last, so that traffic never lacks a route in between.
pub(super) fn plan(wanted: &Wanted, observed: &Observed) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut overwritten: Vec<(&str, &str)> = Vec::new();
    for (key, value) in &wanted.sysctls {
        // Setting "all" of some settings sets every device's and the default too.
        let by_all = overwritten.iter().any(|(head, tail)| key.starts_with(head) && key.ends_with(tail));
        if observed.sysctls.get(key).is_some_and(|found| by_all || found != value) {
            overwritten.extend(key.split_once("all/").filter(|(head, _)| head.ends_with("/conf/")));
            let action = Action::Sysctl { key: key.clone(), value };
            steps.push(Step { device: String::new(), index: 0, action });
        }
    }
    for device in &wanted.devices {
        let found = observed.links.iter().find(|l| l.name == device.name);
        let index = found.map_or(0, |l| l.index);
        let actions = match found {
            None => vec![Action::Absent],
            Some(link) => plan_device(device, link, observed),
        };
        steps.extend(actions.into_iter().map(|action| Step { device: device.name.clone(), index, action }));
    }
    if let Some(policy) = &wanted.policy {
        steps.extend(plan_policy(policy, observed));
    }
    steps
}

/// Routes before the rules that lead to them, exceptions before the rule they except from, and the other
/// way round when they go: in no moment does a packet leave by a way that neither state allows.
fn plan_policy(policy: &Policy, observed: &Observed) -> Vec<Step> {
    let index = observed.links.iter().find(|l| l.name == policy.device).map(|l| l.index);
    let table: Vec<TableRoute> = policy
        .hops
        .iter()
        .filter_map(|hop| {
            let hop_at = match hop.gateway {
                Some(gateway) => Some((index?, gateway)),
                None => None,
            };
            Some(TableRoute { table: policy.base, dst: hop.dst, hop: hop_at })
        })
        .collect();
    let mut actions = Vec::new();
    actions.extend(table.iter().filter(|r| !observed.table.contains(r)).copied().map(Action::AddTableRoute));
    let mut new: Vec<Rule> = policy.rules.iter().filter(|r| !observed.rules.contains(r)).copied().collect();
    new.sort_by_key(|rule| rule.priority);
    actions.extend(new.into_iter().map(Action::AddRule));
    let mut stray: Vec<Rule> = observed.rules.iter().filter(|r| !policy.rules.contains(r)).copied().collect();
    stray.sort_by_key(|rule| std::cmp::Reverse(rule.priority));
    actions.extend(stray.into_iter().map(Action::DropRule));
    actions.extend(observed.table.iter().filter(|r| !table.contains(r)).copied().map(Action::DropTableRoute));
    let step = |action| Step { device: policy.device.clone(), index: index.unwrap_or(0), action };
    actions.into_iter().map(step).collect()
}

fn plan_device(device: &Device, link: &Link, observed: &Observed) -> Vec<Action> {
    let mut steps = Vec::new();
    let on_link = link.index;
    steps.extend(device.mtu.filter(|m| *m != link.mtu).map(Action::Mtu));
    steps.extend(device.mac.filter(|m| Some(*m) != link.mac).map(Action::Mac));
    if device.alias.is_some() && device.alias != link.alias {
        steps.extend(device.alias.clone().map(Action::Alias));
    }
    if device.multicast != link.multicast {
        steps.push(Action::Multicast(device.multicast));
    }

    let addresses: Vec<IpNet> =
        observed.addresses.iter().filter(|a| a.link == on_link).map(|a| a.net).collect();
    steps.extend(device.addresses.iter().filter(|a| !addresses.contains(a)).copied().map(Action::AddAddress));
    if !link.up {
        steps.push(Action::Up);
    }

    let neighbours: Vec<Neighbour> =
        observed.neighbours.iter().filter(|n| n.link == on_link).copied().collect();
    let wanted_neighbours: Vec<Neighbour> =
        device.neighbours.iter().map(|&(address, mac)| Neighbour { link: on_link, address, mac }).collect();
    steps.extend(
        wanted_neighbours.iter().filter(|n| !neighbours.contains(n)).copied().map(Action::AddNeighbour),
    );

    let routes: Vec<Route> = observed.routes.iter().filter(|r| r.link == on_link).copied().collect();
    let wanted_routes: Vec<Route> = device
        .routes
        .iter()
        .map(|hop| Route { dst: hop.dst, gateway: hop.gateway, link: on_link, onlink: hop.gateway.is_some() })
        .collect();
    steps.extend(wanted_routes.iter().filter(|r| !routes.contains(r)).copied().map(Action::AddRoute));

    if device.exclusive {
        steps.extend(routes.iter().filter(|r| !wanted_routes.contains(r)).copied().map(Action::DropRoute));
        let known = |n: &Neighbour| device.neighbours.iter().any(|(address, _)| *address == n.address);
        steps.extend(neighbours.iter().filter(|n| !known(n)).copied().map(Action::DropNeighbour));
        steps.extend(
            addresses.iter().filter(|a| !device.addresses.contains(a)).copied().map(Action::DropAddress),
        );
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn device() -> Device {
        Device {
            name: "ts0".into(),
            mtu: Some(1280),
            mac: Some([2, 0, 0, 0, 0, 1]),
            alias: Some("podtether:a".into()),
            multicast: false,
            addresses: vec![net("100.64.0.1/32"), net("fd7a:115c:a1e0::1/128")],
            neighbours: vec![("169.254.1.1".parse().unwrap(), [2, 0, 0, 0, 0, 2])],
            routes: vec![Hop { dst: net("100.64.0.0/10"), gateway: Some("169.254.1.1".parse().unwrap()) }],
            exclusive: true,
        }
    }

    fn link() -> Link {
        Link {
            index: 5,
            name: "ts0".into(),
            up: true,
            running: true,
            multicast: false,
            mtu: 1280,
            mac: Some([2, 0, 0, 0, 0, 1]),
            alias: Some("podtether:a".into()),
            kind: Some("veth".into()),
            peer: Some(3),
            peer_elsewhere: true,
            master: None,
        }
    }

    /// What the kernel would show after the steps.
    fn apply(observed: &mut Observed, steps: &[Step]) {
        for step in steps {
            let link = observed.links.iter_mut().find(|l| l.index == step.index);
            match step.action.clone() {
                Action::Sysctl { key, value } => drop(observed.sysctls.insert(key, value.into())),
                Action::Absent => panic!("nothing to apply: {step}"),
                Action::Mtu(mtu) => link.unwrap().mtu = mtu,
                Action::Mac(mac) => link.unwrap().mac = Some(mac),
                Action::Alias(alias) => link.unwrap().alias = Some(alias),
                Action::Multicast(on) => link.unwrap().multicast = on,
                Action::Up => link.unwrap().up = true,
                Action::AddAddress(net) => {
                    observed.addresses.push(Address { link: step.index, net, global: true, stable: true });
                }
                Action::AddNeighbour(n) => {
                    observed.neighbours.retain(|o| o.address != n.address);
                    observed.neighbours.push(n);
                }
                Action::AddRoute(route) => observed.routes.push(route),
                Action::DropRoute(route) => observed.routes.retain(|r| *r != route),
                Action::DropNeighbour(n) => observed.neighbours.retain(|o| *o != n),
                Action::DropAddress(net) => observed.addresses.retain(|a| a.net != net),
                Action::AddTableRoute(route) => observed.table.push(route),
                Action::AddRule(rule) => observed.rules.push(rule),
                Action::DropRule(rule) => observed.rules.retain(|r| *r != rule),
                Action::DropTableRoute(route) => observed.table.retain(|r| *r != route),
            }
        }
    }

    #[test]
    fn a_fresh_pair_gets_everything_in_an_order_that_works_and_then_nothing() {
        let wanted = Wanted {
            sysctls: vec![("net/ipv4/ip_forward".into(), "1")],
            devices: vec![device()],
            policy: None,
        };
        let fresh = Link { up: false, multicast: true, mtu: 1500, alias: None, ..link() };
        let mut observed = Observed { links: vec![fresh], ..Observed::default() };
        observed.sysctls.insert("net/ipv4/ip_forward".into(), "0".into());
        let steps = plan(&wanted, &observed);
        let text: Vec<String> = steps.iter().map(ToString::to_string).collect();
        assert_eq!(
            text,
            [
                "net/ipv4/ip_forward is not 1",
                "ts0 has not the MTU 1280",
                "ts0 has not the alias podtether:a",
                "ts0 has not multicast off",
                "ts0 has no address 100.64.0.1/32",
                "ts0 has no address fd7a:115c:a1e0::1/128",
                "ts0 is down",
                "ts0 has no neighbour 169.254.1.1 at 02:00:00:00:00:02",
                "ts0 has no route to 100.64.0.0/10",
            ]
        );
        apply(&mut observed, &steps);
        assert_eq!(plan(&wanted, &observed), []);
    }

    #[test]
    fn a_change_adds_before_it_drops_and_leaves_other_devices_alone() {
        let mut observed = Observed { links: vec![link()], ..Observed::default() };
        let mut wanted = Wanted { sysctls: vec![], devices: vec![device()], policy: None };
        let steps = plan(&wanted, &observed);
        apply(&mut observed, &steps);
        let elsewhere = Route { dst: net("0.0.0.0/0"), gateway: None, link: 2, onlink: false };
        observed.routes.push(elsewhere);
        observed.addresses.push(Address { link: 2, net: net("10.0.0.1/24"), global: true, stable: true });

        wanted.devices[0].addresses = vec![net("100.64.0.9/32")];
        wanted.devices[0].routes[0].dst = net("100.64.0.0/11");
        wanted.devices[0].neighbours[0].1 = [2, 0, 0, 0, 0, 9];
        let steps = plan(&wanted, &observed);
        let text: Vec<String> = steps.iter().map(ToString::to_string).collect();
        assert_eq!(
            text,
            [
                "ts0 has no address 100.64.0.9/32",
                "ts0 has no neighbour 169.254.1.1 at 02:00:00:00:00:09",
                "ts0 has no route to 100.64.0.0/11",
                "ts0 has a stray route to 100.64.0.0/10",
                "ts0 has a stray address 100.64.0.1/32",
                "ts0 has a stray address fd7a:115c:a1e0::1/128",
            ]
        );
        apply(&mut observed, &steps);
        assert_eq!(plan(&wanted, &observed), []);
        assert!(observed.routes.contains(&elsewhere));
    }

    #[test]
    fn without_exclusive_nothing_goes_and_an_absent_device_is_named() {
        let mut wanted = Wanted { sysctls: vec![], devices: vec![device()], policy: None };
        let mut observed = Observed { links: vec![link()], ..Observed::default() };
        let steps = plan(&wanted, &observed);
        apply(&mut observed, &steps);
        wanted.devices[0].addresses.clear();
        wanted.devices[0].routes.clear();
        wanted.devices[0].exclusive = false;
        assert_eq!(plan(&wanted, &observed), []);
        observed.links.clear();
        assert_eq!(plan(&wanted, &observed)[0].to_string(), "ts0 is missing");
    }

    #[test]
    fn what_a_change_of_all_overwrites_is_set_again() {
        let key = |device: &str| format!("net/ipv6/conf/{device}/forwarding");
        let sysctls = vec![(key("all"), "1"), (key("default"), "0"), (key("tun0"), "0")];
        let wanted = Wanted { sysctls, devices: vec![], policy: None };
        let mut observed = Observed::default();
        for (device, value) in [("all", "0"), ("default", "0"), ("tun0", "0")] {
            observed.sysctls.insert(key(device), value.into());
        }
        assert_eq!(plan(&wanted, &observed).len(), 3);
        observed.sysctls.insert(key("all"), "1".into());
        assert_eq!(plan(&wanted, &observed), []);
    }

    #[test]
    fn rules_come_after_their_exceptions_and_go_before_them() {
        let rule = |priority, dst: Option<&str>, table| Rule {
            priority,
            family: crate::netlink::Family::V4,
            src: None,
            dst: dst.map(net),
            table,
            suppress_prefix_len: None,
        };
        let gateway = Some("169.254.1.1".parse().unwrap());
        let hops = vec![Hop { dst: net("0.0.0.0/0"), gateway }, Hop { dst: net("0.0.0.0/0"), gateway: None }];
        let exit = rule(20_003, None, 20_000);
        let policy = |hops, rules| Some(Policy { base: 20_000, device: "ts0".into(), hops, rules });
        let mut wanted = Wanted {
            policy: policy(hops.clone(), vec![exit, rule(20_002, Some("10.96.0.0/12"), 254)]),
            ..Wanted::default()
        };
        let mut observed = Observed { links: vec![link()], ..Observed::default() };
        let text = |steps: &[Step]| steps.iter().map(ToString::to_string).collect::<Vec<_>>();
        let steps = plan(&wanted, &observed);
        let on = [
            "table 20000 has no route to 0.0.0.0/0",
            "table 20000 has no route to 0.0.0.0/0",
            "rule 20002 is missing: from all to 10.96.0.0/12 look up 254",
            "rule 20003 is missing: from all to all look up 20000",
        ];
        assert_eq!(text(&steps), on);
        apply(&mut observed, &steps);
        assert_eq!(plan(&wanted, &observed), []);

        // Other exceptions: new ones first.
        wanted.policy = policy(hops.clone(), vec![exit, rule(20_002, Some("10.0.0.0/8"), 254)]);
        let steps = plan(&wanted, &observed);
        let change = [
            "rule 20002 is missing: from all to 10.0.0.0/8 look up 254",
            "rule 20002 is stray: from all to 10.96.0.0/12 look up 254",
        ];
        assert_eq!(text(&steps), change);
        apply(&mut observed, &steps);

        // Who does not look at rules leaves them.
        assert_eq!(plan(&Wanted::default(), &observed), []);
        wanted.policy = policy(vec![], vec![]);
        let steps = plan(&wanted, &observed);
        let off = [
            "rule 20003 is stray: from all to all look up 20000",
            "rule 20002 is stray: from all to 10.0.0.0/8 look up 254",
            "table 20000 has a stray route to 0.0.0.0/0",
            "table 20000 has a stray route to 0.0.0.0/0",
        ];
        assert_eq!(text(&steps), off);
        apply(&mut observed, &steps);
        assert_eq!((observed.rules.len(), observed.table.len()), (0, 0));

        // Without the device only what needs none: nothing leaves by another way.
        wanted.policy = policy(hops, vec![exit]);
        observed.links.clear();
        assert_eq!(plan(&wanted, &observed).len(), 2);
    }

    #[test]
    fn a_setting_this_kernel_lacks_is_no_step() {
        let wanted = Wanted { sysctls: vec![("net/ipv6/x".into(), "1")], devices: vec![], policy: None };
        assert_eq!(plan(&wanted, &Observed::default()), []);
    }
}
