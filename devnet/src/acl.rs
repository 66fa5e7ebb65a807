//! Access rules: a small file, compiled per node into the packet filter that node enforces.
//!
//! ```toml
//! [hosts]
//! database = "100.64.0.9"
//!
//! [[rules]]
//! src = ["tag:web", "laptop", "100.64.0.0/24"]
//! dst = ["tag:api", "database"]
//! ports = ["443", "8000-8099"]   # default: all
//! proto = ["tcp"]                # default: TCP, UDP and ICMP
//! ```
//!
//! A policy may also approve routes by itself:
//!
//! ```toml
//! [autoApprovers]
//! exitNode = ["tag:exit"]
//! [autoApprovers.routes]
//! "10.0.0.0/8" = ["tag:router"]  # and every part of it
//! ```
//!
//! A selector is `*`, a tag, a CIDR or address, or the name of a host or node. A node gets only the
//! rules that name it as a destination, and sees only peers that some rule connects it with.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// A policy file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// Not TOML or JSON of the expected shape.
    #[error("policy does not parse: {0}")]
    Syntax(String),
    /// A value of the right type without meaning.
    #[error("policy: {what} {value:?} is not valid")]
    Value {
        /// Which kind of value.
        what: &'static str,
        /// What the file says.
        value: String,
    },
}

/// Parsed access rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    hosts: BTreeMap<String, IpNet>,
    rules: Vec<Rule>,
    exit_approvers: Vec<Selector>,
    route_approvers: Vec<(IpNet, Vec<Selector>)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    sources: Vec<Selector>,
    destinations: Vec<Selector>,
    ports: Vec<PortRange>,
    protocols: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Selector {
    Any,
    Tag(String),
    Net(IpNet),
    Name(String),
}

/// An inclusive range of ports, as the wire has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct PortRange {
    /// Lowest.
    pub first: u16,
    /// Highest.
    pub last: u16,
}

impl PortRange {
    /// Every port.
    pub const ALL: Self = Self { first: 0, last: u16::MAX };
}

/// One rule of a node's packet filter, as the wire has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct FilterRule {
    /// Sources: address, CIDR or `*`.
    #[serde(rename = "SrcIPs")]
    pub src_ips: Vec<String>,
    /// Destinations with their ports.
    pub dst_ports: Vec<NetPortRange>,
    /// Protocol numbers; empty means TCP, UDP, ICMP and ICMPv6.
    #[serde(rename = "IPProto", skip_serializing_if = "Vec::is_empty")]
    pub ip_proto: Vec<u8>,
}

/// A destination and its ports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct NetPortRange {
    /// Address, CIDR or `*`.
    #[serde(rename = "IP")]
    pub ip: String,
    /// Ports.
    pub ports: PortRange,
}

/// What the rules need to know of a node.
#[derive(Clone, Debug)]
pub struct Subject<'a> {
    /// Its first DNS label.
    pub name: &'a str,
    /// Its tags.
    pub tags: &'a [String],
    /// Its tailnet addresses.
    pub addresses: &'a [IpAddr],
    /// Routes that it carries.
    pub routes: &'a [IpNet],
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PolicyFile {
    #[serde(default)]
    hosts: BTreeMap<String, String>,
    #[serde(default)]
    rules: Vec<RuleFile>,
    #[serde(default, rename = "autoApprovers")]
    auto_approvers: ApproversFile,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ApproversFile {
    #[serde(default)]
    routes: BTreeMap<String, Vec<String>>,
    #[serde(default, rename = "exitNode")]
    exit_node: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleFile {
    src: Vec<String>,
    dst: Vec<String>,
    #[serde(default)]
    ports: Vec<String>,
    #[serde(default)]
    proto: Vec<String>,
}

impl FromStr for Policy {
    type Err = PolicyError;

    /// Reads TOML, or JSON when the text begins with a brace.
    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let file: PolicyFile = if text.trim_start().starts_with('{') {
            serde_json::from_str(text).map_err(|error| PolicyError::Syntax(error.to_string()))?
        } else {
            toml::from_str(text).map_err(|error| PolicyError::Syntax(error.to_string()))?
        };
        let mut hosts = BTreeMap::new();
        for (name, value) in file.hosts {
            let net = parse_net(&value).ok_or(PolicyError::Value { what: "host address", value })?;
            hosts.insert(name, net);
        }
        let rules = file.rules.into_iter().map(Rule::try_from).collect::<Result<_, _>>()?;
        let approvers = |list: Vec<String>| {
            list.into_iter().map(|value| Selector::parse(value, "approver")).collect::<Result<Vec<_>, _>>()
        };
        let mut route_approvers = Vec::new();
        for (value, list) in file.auto_approvers.routes {
            let net = parse_net(&value).ok_or(PolicyError::Value { what: "route", value })?;
            route_approvers.push((net, approvers(list)?));
        }
        let exit_approvers = approvers(file.auto_approvers.exit_node)?;
        Ok(Self { hosts, rules, exit_approvers, route_approvers })
    }
}

impl TryFrom<RuleFile> for Rule {
    type Error = PolicyError;

    fn try_from(file: RuleFile) -> Result<Self, PolicyError> {
        let selectors = |list: Vec<String>, what| {
            if list.is_empty() {
                return Err(PolicyError::Value { what, value: String::new() });
            }
            list.into_iter().map(|value| Selector::parse(value, what)).collect::<Result<Vec<_>, _>>()
        };
        let mut ports = Vec::with_capacity(file.ports.len());
        for value in file.ports {
            ports.push(parse_ports(&value).ok_or(PolicyError::Value { what: "port range", value })?);
        }
        if ports.is_empty() {
            ports.push(PortRange::ALL);
        }
        let mut protocols = Vec::new();
        for value in file.proto {
            match value.as_str() {
                "icmp" => protocols.extend([1, 58]),
                "tcp" => protocols.push(6),
                "udp" => protocols.push(17),
                "sctp" => protocols.push(132),
                number => protocols.push(
                    number
                        .parse()
                        .map_err(|_| PolicyError::Value { what: "protocol", value: value.clone() })?,
                ),
            }
        }
        Ok(Self {
            sources: selectors(file.src, "src")?,
            destinations: selectors(file.dst, "dst")?,
            ports,
            protocols,
        })
    }
}

impl Selector {
    fn parse(value: String, what: &'static str) -> Result<Self, PolicyError> {
        if value == "*" {
            return Ok(Self::Any);
        }
        if let Some(tag) = value.strip_prefix("tag:") {
            return if tag.is_empty() {
                Err(PolicyError::Value { what, value })
            } else {
                Ok(Self::Tag(value))
            };
        }
        if let Some(net) = parse_net(&value) {
            return Ok(Self::Net(net));
        }
        if value.is_empty() || value.contains(['/', ':']) {
            return Err(PolicyError::Value { what, value });
        }
        Ok(Self::Name(value))
    }

    /// The same for destinations: whoever carries a part of a network gets the rules for it. An exit node
    /// carries everything outside the tailnet.
    fn reaches(&self, node: &Subject<'_>, hosts: &BTreeMap<String, IpNet>) -> bool {
        let through = |net: &IpNet| {
            node.routes.iter().any(|route| match route.prefix_len() {
                0 => !podtether_net::link::tailnet_ranges().iter().any(|range| range.contains(net)),
                _ => route.contains(net) || net.contains(route),
            })
        };
        self.matches(node, hosts)
            || match self {
                Self::Net(net) => through(net),
                Self::Name(name) => hosts.get(name).is_some_and(through),
                Self::Any | Self::Tag(_) => false,
            }
    }

    fn matches(&self, node: &Subject<'_>, hosts: &BTreeMap<String, IpNet>) -> bool {
        let inside = |net: &IpNet| node.addresses.iter().any(|address| net.contains(address));
        match self {
            Self::Any => true,
            Self::Tag(tag) => node.tags.iter().any(|own| own == tag),
            Self::Net(net) => inside(net),
            Self::Name(name) => name == node.name || hosts.get(name).is_some_and(inside),
        }
    }
}

fn parse_net(text: &str) -> Option<IpNet> {
    text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

fn parse_ports(text: &str) -> Option<PortRange> {
    if text == "*" {
        return Some(PortRange::ALL);
    }
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let range = PortRange { first: first.trim().parse().ok()?, last: last.trim().parse().ok()? };
    (range.first <= range.last).then_some(range)
}

/// The filter of a tailnet without policy.
#[must_use]
pub fn allow_all() -> Vec<FilterRule> {
    vec![FilterRule {
        src_ips: vec!["*".into()],
        dst_ports: vec![NetPortRange { ip: "*".into(), ports: PortRange::ALL }],
        ip_proto: Vec::new(),
    }]
}

impl Policy {
    /// Whether a route that `node` advertises needs nobody's approval.
    #[must_use]
    pub fn auto_approves(&self, node: &Subject<'_>, route: &IpNet) -> bool {
        let named = |list: &[Selector]| list.iter().any(|selector| selector.matches(node, &self.hosts));
        if route.prefix_len() == 0 {
            return named(&self.exit_approvers);
        }
        self.route_approvers.iter().any(|(net, list)| net.contains(route) && named(list))
    }

    /// Whether some rule lets one of the two reach the other.
    #[must_use]
    pub fn connects(&self, one: &Subject<'_>, other: &Subject<'_>) -> bool {
        self.rules.iter().any(|rule| {
            let from = |node| rule.sources.iter().any(|selector| selector.matches(node, &self.hosts));
            let to = |node| rule.destinations.iter().any(|selector| selector.reaches(node, &self.hosts));
            (from(one) && to(other)) || (from(other) && to(one))
        })
    }

    /// The rules `node` has to enforce, in file order.
    #[must_use]
    pub fn filter_for<'a>(
        &self,
        node: &Subject<'_>,
        everyone: impl Iterator<Item = Subject<'a>> + Clone,
    ) -> Vec<FilterRule> {
        let mut compiled = Vec::new();
        for rule in &self.rules {
            let mut targets: Vec<String> = Vec::new();
            for selector in &rule.destinations {
                if !selector.reaches(node, &self.hosts) {
                    continue;
                }
                match selector {
                    Selector::Any => targets.push("*".into()),
                    Selector::Net(net) => targets.push(net.to_string()),
                    Selector::Name(name) if !selector.matches(node, &self.hosts) => {
                        targets.extend(self.hosts.get(name).map(ToString::to_string));
                    }
                    Selector::Tag(_) | Selector::Name(_) => {
                        targets.extend(node.addresses.iter().map(ToString::to_string));
                    }
                }
            }
            let mut sources: Vec<String> = Vec::new();
            for selector in &rule.sources {
                match selector {
                    Selector::Any => sources.push("*".into()),
                    Selector::Net(net) => sources.push(net.to_string()),
                    Selector::Tag(_) | Selector::Name(_) => {
                        for peer in everyone.clone().filter(|peer| selector.matches(peer, &self.hosts)) {
                            sources.extend(peer.addresses.iter().map(ToString::to_string));
                        }
                        if let Selector::Name(name) = selector
                            && let Some(net) = self.hosts.get(name)
                        {
                            sources.push(net.to_string());
                        }
                    }
                }
            }
            if targets.is_empty() || sources.is_empty() {
                continue;
            }
            for list in [&mut targets, &mut sources] {
                list.sort();
                list.dedup();
            }
            compiled.push(FilterRule {
                src_ips: sources,
                dst_ports: targets
                    .iter()
                    .flat_map(|ip| rule.ports.iter().map(|&ports| NetPortRange { ip: ip.clone(), ports }))
                    .collect(),
                ip_proto: rule.protocols.clone(),
            });
        }
        compiled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: &str = r#"
        [hosts]
        database = "100.64.0.9"
        [[rules]]
        src = ["tag:web"]
        dst = ["tag:api", "database"]
        ports = ["443", "8000-8099"]
        proto = ["tcp"]
        [[rules]]
        src = ["laptop"]
        dst = ["100.64.0.0/24"]
        proto = ["icmp"]
    "#;

    struct Machine {
        name: &'static str,
        tags: Vec<String>,
        addresses: Vec<IpAddr>,
    }

    impl Machine {
        fn new(name: &'static str, tag: Option<&str>, address: &str) -> Self {
            Self {
                name,
                tags: tag.into_iter().map(Into::into).collect(),
                addresses: vec![address.parse().unwrap()],
            }
        }

        fn subject(&self) -> Subject<'_> {
            Subject { name: self.name, tags: &self.tags, addresses: &self.addresses, routes: &[] }
        }
    }

    fn machines() -> [Machine; 4] {
        [
            Machine::new("web-1", Some("tag:web"), "100.64.0.1"),
            Machine::new("api-1", Some("tag:api"), "100.64.1.2"),
            Machine::new("laptop", None, "100.64.1.3"),
            Machine::new("db", None, "100.64.0.9"),
        ]
    }

    #[test]
    fn a_node_gets_only_the_rules_that_name_it() {
        let policy: Policy = POLICY.parse().unwrap();
        let machines = machines();
        let filter = |index: usize| {
            policy.filter_for(&machines[index].subject(), machines.iter().map(Machine::subject))
        };
        let json = |rules: Vec<FilterRule>| serde_json::to_value(rules).unwrap();
        assert_eq!(
            json(filter(1)),
            serde_json::json!([{"SrcIPs": ["100.64.0.1"], "IPProto": [6], "DstPorts": [
                {"IP": "100.64.1.2", "Ports": {"First": 443, "Last": 443}},
                {"IP": "100.64.1.2", "Ports": {"First": 8000, "Last": 8099}}]}])
        );
        assert_eq!(
            json(filter(0)),
            serde_json::json!([{"SrcIPs": ["100.64.1.3"], "IPProto": [1, 58], "DstPorts": [
                {"IP": "100.64.0.0/24", "Ports": {"First": 0, "Last": 65535}}]}])
        );
        assert_eq!(filter(2), []);
        assert_eq!(filter(3).len(), 2, "by host name and by network");
    }

    #[test]
    fn peers_see_each_other_only_through_a_rule() {
        let policy: Policy = POLICY.parse().unwrap();
        let machines = machines();
        let connects = |a: usize, b: usize| policy.connects(&machines[a].subject(), &machines[b].subject());
        let expected = [(0, 1, true), (0, 2, true), (0, 3, true), (1, 2, false), (1, 3, false), (2, 3, true)];
        for (a, b, seen) in expected {
            assert_eq!(connects(a, b), seen, "{} and {}", machines[a].name, machines[b].name);
            assert_eq!(connects(b, a), seen, "{} and {}", machines[b].name, machines[a].name);
        }
    }

    #[test]
    fn json_means_the_same_as_toml() {
        let json: Policy =
            r#"{"rules": [{"src": ["*"], "dst": ["tag:x"], "ports": ["*"]}]}"#.parse().unwrap();
        let toml: Policy = "[[rules]]\nsrc = ['*']\ndst = ['tag:x']".parse().unwrap();
        assert_eq!(json, toml);
    }

    #[test]
    fn nonsense_is_named() {
        for (text, part) in [
            ("rules = 1", "does not parse"),
            ("[[rules]]\nsrc=['*']\ndst=['*']\ncolour='red'", "does not parse"),
            ("[[rules]]\nsrc=[]\ndst=['*']", "src"),
            ("[[rules]]\nsrc=['*']\ndst=['1.2.3.4/99']", "dst"),
            ("[[rules]]\nsrc=['*']\ndst=['*']\nports=['9-1']", "port range"),
            ("[[rules]]\nsrc=['*']\ndst=['*']\nproto=['carrier-pigeon']", "protocol"),
            ("[hosts]\na='b'", "host address"),
        ] {
            let error = text.parse::<Policy>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn fuzz_a_policy_parses_or_is_refused(text in "(\\[\\[rules\\]\\]\n)?[ -~\n]{0,80}", word in "[ -~]{0,24}") {
            let _ = text.parse::<Policy>();
            let json = serde_json::json!({"rules": [{"src": [word], "dst": [word], "ports": [word], "proto": [word]}]});
            let _ = json.to_string().parse::<Policy>();
            let _ = (parse_net(&word), parse_ports(&word));
        }

        #[test]
        fn fuzz_whoever_a_filter_admits_is_a_visible_peer(
            tags in proptest::collection::vec(0_usize..4, 4),
            rules in proptest::collection::vec((0_usize..9, 0_usize..9), 0..4),
        ) {
            let all = ["tag:0", "tag:1", "tag:2", "n0", "n1", "*", "100.64.0.2", "100.64.0.0/30", "n9"];
            let text: String = rules
                .iter()
                .map(|&(src, dst)| format!("[[rules]]\nsrc=['{}']\ndst=['{}']\n", all[src], all[dst]))
                .collect();
            let policy: Policy = text.parse().unwrap();
            let names = ["n0", "n1", "n2", "n3"];
            let machines: Vec<_> = (0..4)
                .map(|n| Machine::new(names[n], Some(all[tags[n].min(2)]), &format!("100.64.0.{}", n + 1)))
                .collect();
            for node in &machines {
                let rules = policy.filter_for(&node.subject(), machines.iter().map(Machine::subject));
                for peer in machines.iter().filter(|peer| peer.name != node.name) {
                    let admits = |source: &String| {
                        source == "*" || parse_net(source).is_some_and(|net| net.contains(&peer.addresses[0]))
                    };
                    if rules.iter().any(|rule| rule.src_ips.iter().any(admits)) {
                        proptest::prop_assert!(policy.connects(&node.subject(), &peer.subject()), "{text}");
                    }
                }
            }
        }
    }
}
