//! What a link's two namespaces should hold.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::plan::{Device, Hop, Policy, Wanted};
use super::{
    Configured, ExitMade, GATEWAY_V4, GATEWAY_V6, Ipv6, LINK_SIDE_NAME, LinkSpec, PodConfig, SERVICE_V4,
    SERVICE_V6, TUN_NAME,
};
use crate::netlink::{self, Family, MAIN_TABLE, Mac, Rule};

impl LinkSpec {
    pub(super) fn alias(&self) -> String {
        format!("podtether:{}", self.id)
    }

    /// Hardware addresses that follow from the id, so that an interface shows whose it is from the moment
    /// it exists, and a rebuilt link has the addresses the pod's neighbour table knows.
    pub(super) fn mac(&self, side: u8) -> Mac {
        // FNV-1a: spreads well, and only this pair ever sees the result.
        let hash = self
            .id
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        let [a, b, c, d, e, ..] = hash.to_le_bytes();
        [side, a, b, c, d, e]
    }

    /// First byte 02: locally administered, unicast.
    pub(super) fn pod_mac(&self) -> Mac {
        self.mac(0x02)
    }

    pub(super) fn link_side_mac(&self) -> Mac {
        self.mac(0x06)
    }

    pub(super) fn is_ours(&self, link: &netlink::Link) -> bool {
        link.kind.as_deref() == Some("veth")
            && (link.mac == Some(self.pod_mac()) || link.alias.as_deref() == Some(&self.alias()))
    }

    /// The link's own namespace. Without `config` what pod-specific state there is stays.
    pub(super) fn link_side(&self, v6: bool, config: Option<&PodConfig>) -> Wanted {
        let mut sysctls: Vec<(String, &'static str)> = vec![
            ("net/ipv4/ip_forward".into(), "1"),
            // New namespaces inherit the node's IPv4 values, whatever they are.
            ("net/ipv4/conf/all/rp_filter".into(), "0"),
            ("net/ipv4/conf/default/rp_filter".into(), "0"),
            ("net/ipv4/conf/all/send_redirects".into(), "0"),
            ("net/ipv4/conf/default/send_redirects".into(), "0"),
            ("net/ipv4/conf/all/log_martians".into(), "0"),
            ("net/ipv4/conf/default/log_martians".into(), "0"),
            ("net/ipv6/conf/all/disable_ipv6".into(), "0"),
            ("net/ipv6/conf/default/disable_ipv6".into(), "0"),
            // The switch for the namespace. The devices' own make them routers that join groups and report it;
            // setting this one sets those too.
            ("net/ipv6/conf/all/forwarding".into(), "1"),
        ];
        for device in ["default", TUN_NAME, LINK_SIDE_NAME] {
            sysctls.push((format!("net/ipv6/conf/{device}/forwarding"), "0"));
            sysctls.extend(quiet_ipv6(device));
            if device != "default" {
                sysctls.push((format!("net/ipv4/conf/{device}/rp_filter"), "0"));
            }
        }
        let empty = PodConfig::default();
        let pod = config.unwrap_or(&empty);
        let addresses: Vec<IpNet> = pod.addresses.iter().copied().filter(|a| v6 || is_v4(a)).collect();
        let mut services = vec![IpNet::from(Ipv4Net::from(SERVICE_V4))];
        let mut defaults = vec![Hop { dst: Ipv4Net::default().into(), gateway: None }];
        if v6 {
            services.push(Ipv6Net::from(SERVICE_V6).into());
            defaults.push(Hop { dst: Ipv6Net::default().into(), gateway: None });
        }
        Wanted {
            sysctls,
            devices: vec![
                Device {
                    name: "lo".into(),
                    mtu: None,
                    mac: None,
                    alias: None,
                    multicast: false,
                    addresses: services,
                    neighbours: vec![],
                    routes: vec![],
                    exclusive: false,
                },
                Device {
                    name: TUN_NAME.into(),
                    mtu: Some(self.mtu),
                    mac: None,
                    alias: None,
                    multicast: false,
                    addresses: vec![],
                    neighbours: vec![],
                    routes: defaults,
                    exclusive: false,
                },
                Device {
                    name: LINK_SIDE_NAME.into(),
                    mtu: Some(self.mtu),
                    mac: Some(self.link_side_mac()),
                    alias: None,
                    multicast: false,
                    addresses: vec![],
                    neighbours: addresses.iter().map(|a| (a.addr(), self.pod_mac())).collect(),
                    routes: addresses.iter().map(|a| Hop { dst: host_net(*a), gateway: None }).collect(),
                    exclusive: config.is_some(),
                },
            ],
            policy: None,
        }
    }

    /// The pod's side, beside the pod's `others`. Without `config` what addresses and routes there are stay.
    pub(super) fn pod_side(&self, v6: bool, config: Option<&PodConfig>, others: &Others) -> Wanted {
        let mut sysctls = quiet_ipv6(&self.ifname);
        // Loose: strict filtering may be the pod's default, and a pod's own routing rules may send answers
        // another way than the question came.
        sysctls.push((format!("net/ipv4/conf/{}/rp_filter", self.ifname), "2"));
        let mut neighbours = vec![(IpAddr::V4(GATEWAY_V4), self.link_side_mac())];
        if v6 {
            neighbours.push((IpAddr::V6(GATEWAY_V6), self.link_side_mac()));
        }
        let made = config.map(|c| configured(self, c, v6, Ipv6::Available, others));
        Wanted {
            sysctls,
            devices: vec![Device {
                name: self.ifname.clone(),
                mtu: Some(self.mtu),
                mac: Some(self.pod_mac()),
                alias: Some(self.alias()),
                multicast: false,
                addresses: made.as_ref().map(|m| m.addresses.clone()).unwrap_or_default(),
                neighbours,
                routes: made
                    .iter()
                    .flat_map(|m| &m.routes)
                    .map(|&(dst, gateway)| Hop { dst, gateway: Some(gateway) })
                    .collect(),
                exclusive: config.is_some(),
            }],
            policy: config.map(|config| self.policy(v6, config, others)),
        }
    }

    /// First of this link's rule priorities, and the number of its table: its own, so that two links in
    /// one pod do not take each other's rules away.
    pub(super) fn policy_base(&self) -> u32 {
        let [_, a, b, ..] = self.mac(0);
        20_000 + 4 * (u32::from(u16::from_le_bytes([a, b])) % 2048)
    }

    /// The rules that send everything but the cluster's own into the link, while there is an exit node:
    ///
    /// 1. what comes from an address of another interface (answers, bound sockets) goes that one's way,
    /// 2. so does what the main table has a route for, its default routes aside,
    /// 3. so does what goes to the cluster,
    /// 4. the rest goes into the link, or nowhere when the link does not carry its family.
    fn policy(&self, v6: bool, config: &PodConfig, others: &Others) -> Policy {
        let base = self.policy_base();
        let mut policy = Policy { base, device: self.ifname.clone(), hops: vec![], rules: vec![] };
        let Some(exit) = &config.exit else { return policy };
        let mut families = vec![(Family::V4, Some(IpAddr::V4(GATEWAY_V4)), IpNet::from(Ipv4Net::default()))];
        if v6 || others.addresses.iter().any(IpAddr::is_ipv6) {
            let gateway = v6.then_some(IpAddr::V6(GATEWAY_V6));
            families.push((Family::V6, gateway, Ipv6Net::default().into()));
        }
        for (family, gateway, all) in families {
            if gateway.is_some() {
                policy.hops.push(Hop { dst: all, gateway });
            }
            policy.hops.push(Hop { dst: all, gateway: None });
            let rule = Rule {
                priority: base,
                family,
                src: None,
                dst: None,
                table: MAIN_TABLE,
                suppress_prefix_len: None,
            };
            let own =
                others.addresses.iter().map(|ip| IpNet::from(*ip)).filter(|net| Family::of(net) == family);
            policy.rules.extend(own.map(|net| Rule { src: Some(net), ..rule }));
            policy.rules.push(Rule { priority: base + 1, suppress_prefix_len: Some(0), ..rule });
            let cluster = exit.bypass.iter().filter(|net| Family::of(net) == family);
            policy.rules.extend(cluster.map(|net| Rule { priority: base + 2, dst: Some(*net), ..rule }));
            policy.rules.push(Rule { priority: base + 3, table: base, ..rule });
        }
        policy
    }
}

/// What the pod has beside its link.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Others {
    /// Addresses of other interfaces, loopback and link-local ones aside.
    pub(super) addresses: Vec<IpAddr>,
    /// What those interfaces lead to by more than a default route.
    pub(super) networks: Vec<IpNet>,
}

impl Others {
    /// All that is not on the interface `own`.
    pub(super) fn of(
        own: u32,
        links: &[netlink::Link],
        addresses: &[netlink::Address],
        routes: &[netlink::Route],
    ) -> Self {
        let loopback = |index: u32| links.iter().any(|l| l.index == index && l.name == "lo");
        let beside = || addresses.iter().filter(|a| a.link != own && a.global && !loopback(a.link));
        let mut networks: Vec<IpNet> = beside().map(|a| a.net.trunc()).collect();
        networks.extend(routes.iter().filter(|r| r.link != own && r.dst.prefix_len() > 0).map(|r| r.dst));
        Self { addresses: beside().map(|a| a.net.addr()).collect(), networks }
    }
}

/// No addresses but the given ones, no waiting for duplicates, no listening to routers.
fn quiet_ipv6(device: &str) -> Vec<(String, &'static str)> {
    [("addr_gen_mode", "1"), ("accept_dad", "0"), ("accept_ra", "0"), ("router_solicitations", "0")]
        .into_iter()
        .map(|(key, value)| (format!("net/ipv6/conf/{device}/{key}"), value))
        .collect()
}

/// What of `config` a pod gets.
pub(super) fn configured(
    spec: &LinkSpec,
    config: &PodConfig,
    v6: bool,
    ipv6: Ipv6,
    others: &Others,
) -> Configured {
    let usable = |net: &&IpNet| v6 || is_v4(net);
    let gateway = |net: &IpNet| match net {
        IpNet::V4(_) => IpAddr::V4(GATEWAY_V4),
        IpNet::V6(_) => IpAddr::V6(GATEWAY_V6),
    };
    // Another node's route never takes away what the pod's own networks lead to.
    let covered = |net: &&IpNet| config.routes.iter().chain(&others.networks).any(|had| had.contains(*net));
    let accepted = config.accepted.iter().filter(|net| !covered(net));
    let routes = config.routes.iter().chain(accepted).filter(usable);
    let exit = config.exit.as_ref().map(|_| {
        let all = [IpNet::from(Ipv4Net::default()), Ipv6Net::default().into()];
        let routes = all.iter().filter(usable).map(|net| (*net, gateway(net))).collect();
        ExitMade { table: spec.policy_base(), routes }
    });
    Configured {
        addresses: config.addresses.iter().filter(usable).copied().collect(),
        routes: routes.map(|net| (*net, gateway(net))).collect(),
        exit,
        ipv6,
    }
}

fn is_v4(net: &IpNet) -> bool {
    matches!(net, IpNet::V4(_))
}

fn host_net(net: IpNet) -> IpNet {
    match net {
        IpNet::V4(n) => Ipv4Net::from(n.addr()).into(),
        IpNet::V6(n) => Ipv6Net::from(n.addr()).into(),
    }
}
