//! What a link's two namespaces should hold.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::plan::{Device, Hop, Wanted};
use super::{
    Configured, GATEWAY_V4, GATEWAY_V6, Ipv6, LINK_SIDE_NAME, LinkSpec, PodConfig, SERVICE_V4, SERVICE_V6,
    TUN_NAME,
};
use crate::netlink::{self, Mac};

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
        }
    }

    /// The pod's side. Without `config` what addresses and routes there are stay.
    pub(super) fn pod_side(&self, v6: bool, config: Option<&PodConfig>) -> Wanted {
        let mut sysctls = quiet_ipv6(&self.ifname);
        // Loose: strict filtering may be the pod's default, and a pod's own routing rules may send answers
        // another way than the question came.
        sysctls.push((format!("net/ipv4/conf/{}/rp_filter", self.ifname), "2"));
        let mut neighbours = vec![(IpAddr::V4(GATEWAY_V4), self.link_side_mac())];
        if v6 {
            neighbours.push((IpAddr::V6(GATEWAY_V6), self.link_side_mac()));
        }
        let made = config.map(|c| configured(c, v6, Ipv6::Available));
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
        }
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
pub(super) fn configured(config: &PodConfig, v6: bool, ipv6: Ipv6) -> Configured {
    let usable = |net: &&IpNet| v6 || is_v4(net);
    let gateway = |net: &IpNet| match net {
        IpNet::V4(_) => IpAddr::V4(GATEWAY_V4),
        IpNet::V6(_) => IpAddr::V6(GATEWAY_V6),
    };
    Configured {
        addresses: config.addresses.iter().filter(usable).copied().collect(),
        routes: config.routes.iter().filter(usable).map(|net| (*net, gateway(net))).collect(),
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
