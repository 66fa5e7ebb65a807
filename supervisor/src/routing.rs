//! Which routes of other nodes a pod uses: what may be asked for, and what follows for its interface.
//! Pure; the table keeps and applies it.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};
use podtether_net::link::{Exit, PodConfig, subtract};
use podtether_proto::engine;
use podtether_proto::node::Routing;

/// Most routes of other nodes that one pod gets.
pub const MAX_ROUTES: usize = 8192;
/// A stable id or a name.
const MAX_EXIT_NODE: usize = 253;
/// Where a node's own helpers are, such as a DNS cache: never behind an exit node.
const LINK_LOCAL: Ipv4Net = Ipv4Net::new_assert(std::net::Ipv4Addr::new(169, 254, 0, 0), 16);

/// The node that a configuration, an annotation or a call names; `None` for an empty name.
///
/// # Errors
/// When it can be neither a name, an address nor an id.
pub fn exit_node(text: &str) -> Result<Option<String>, String> {
    let text = text.trim();
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':');
    if text.len() > MAX_EXIT_NODE || !text.chars().all(plain) {
        let shown: String = text.chars().filter(|c| !c.is_control()).take(60).collect();
        return Err(format!("`{shown}` is no node: write its name, one of its addresses or its stable id"));
    }
    Ok((!text.is_empty()).then(|| text.to_owned()))
}

/// What is known of the cluster around a pod.
#[derive(Debug, Clone, Copy)]
pub struct Cluster<'a> {
    /// `node.cluster_cidrs` and `node.exclude_cidrs`.
    pub configured: &'a [IpNet],
    /// What the primary CNI's result leads to by more than a default route.
    pub primary: &'a [IpNet],
    /// The node's own addresses, the pod's name servers.
    pub near: &'a [IpAddr],
}

impl Cluster<'_> {
    /// Every range that no other node carries, as few prefixes as possible.
    #[must_use]
    pub fn protected(&self) -> Vec<IpNet> {
        let mut all: Vec<IpNet> = self.configured.iter().chain(self.primary).map(IpNet::trunc).collect();
        all.extend(self.near.iter().map(|ip| IpNet::from(*ip)));
        IpNet::aggregate(&all)
    }
}

/// Refuses what would cut a pod off from its cluster.
///
/// # Errors
/// One sentence that says what to do.
pub fn check(routing: &Routing, cluster_cidrs: &[IpNet], primary: &[IpNet]) -> Result<(), String> {
    if routing.exit_node.is_some() && cluster_cidrs.is_empty() && primary.is_empty() {
        return Err(
            "with an exit node the cluster's own ranges have to stay outside, and they are not known: set \
             node.cluster_cidrs to the pods', services' and nodes' ranges"
                .to_owned(),
        );
    }
    Ok(())
}

/// What the engine is told.
#[must_use]
pub fn for_engine(routing: &Routing, cluster: &Cluster<'_>) -> engine::Routing {
    let in_use = routing.accept_routes || routing.exit_node.is_some();
    engine::Routing {
        accept_routes: routing.accept_routes,
        exit_node: routing.exit_node.clone(),
        exclude: if in_use { cluster.protected() } else { Vec::new() },
    }
}

/// What the pod's interface should carry, of `tailnet`, the tailnet's own ranges, and of what the engine
/// accepts.
#[must_use]
pub fn pod_config(
    addresses: Vec<IpNet>,
    tailnet: Vec<IpNet>,
    routing: &Routing,
    accepted: &[IpNet],
    cluster: &Cluster<'_>,
) -> PodConfig {
    let mut config = PodConfig { addresses, routes: tailnet, ..PodConfig::default() };
    if !routing.accept_routes && routing.exit_node.is_none() {
        return config;
    }
    let protected = cluster.protected();
    if routing.accept_routes {
        let outside =
            |net: &&IpNet| net.prefix_len() > 0 && !config.routes.iter().any(|had| had.contains(*net));
        let accepted: Vec<IpNet> = accepted.iter().filter(outside).copied().collect();
        config.accepted = subtract(&accepted, &protected);
        config.accepted.truncate(MAX_ROUTES);
    }
    if routing.exit_node.is_some() {
        let mut bypass = protected;
        bypass.push(LINK_LOCAL.into());
        config.exit = Some(Exit { bypass: IpNet::aggregate(&bypass) });
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|t| t.parse().unwrap()).collect()
    }

    fn routing(accept_routes: bool, exit: Option<&str>) -> Routing {
        Routing { accept_routes, exit_node: exit.map(str::to_owned) }
    }

    #[test]
    fn exit_nodes() {
        assert_eq!(exit_node(" fd7a:115c:a1e0::9 "), Ok(Some("fd7a:115c:a1e0::9".into())));
        assert_eq!(exit_node(""), Ok(None));
        for odd in ["a b", "a\nb", &"a".repeat(254)] {
            assert!(exit_node(odd).unwrap_err().contains("is no node"), "{odd:?}");
        }
    }

    #[test]
    fn an_exit_node_needs_to_know_the_cluster() {
        let exit = routing(false, Some("gw"));
        assert!(check(&exit, &[], &[]).unwrap_err().contains("node.cluster_cidrs"));
        check(&exit, &nets(&["10.244.0.0/16"]), &[]).unwrap();
        check(&exit, &[], &nets(&["10.244.1.0/24"])).unwrap();
        check(&routing(true, None), &[], &[]).unwrap();
    }

    #[test]
    fn what_a_pod_gets() {
        let configured = nets(&["10.244.0.0/16", "10.96.0.0/12"]);
        let primary = nets(&["10.244.1.0/24"]);
        let near = ["10.1.0.2".parse().unwrap()];
        let cluster = Cluster { configured: &configured, primary: &primary, near: &near };
        let tailnet = nets(&["100.64.0.0/10", "fd7a:115c:a1e0::/48"]);
        let accepted = nets(&[
            "10.244.7.0/24",
            "10.244.0.0/15",
            "192.168.0.0/16",
            "10.1.0.2/32",
            "0.0.0.0/0",
            "fd7a:115c:a1e0:b1a::/96",
        ]);
        let of = |routing: Routing| pod_config(vec![], tailnet.clone(), &routing, &accepted, &cluster);

        assert_eq!(of(routing(false, None)), PodConfig { routes: tailnet.clone(), ..PodConfig::default() });
        let with = of(routing(true, None));
        assert_eq!(with.accepted, nets(&["10.245.0.0/16", "192.168.0.0/16"]));
        assert_eq!((with.exit, &with.routes), (None, &tailnet));
        let with = of(routing(false, Some("gw")));
        assert_eq!(with.accepted, nets(&[]));
        let bypass = nets(&["10.1.0.2/32", "10.96.0.0/12", "10.244.0.0/16", "169.254.0.0/16"]);
        assert_eq!(with.exit, Some(Exit { bypass }));

        assert_eq!(for_engine(&routing(false, None), &cluster), engine::Routing::default());
        let told = for_engine(&routing(true, Some("gw")), &cluster);
        assert_eq!((told.accept_routes, told.exit_node.as_deref()), (true, Some("gw")));
        assert_eq!(told.exclude, nets(&["10.1.0.2/32", "10.96.0.0/12", "10.244.0.0/16"]));
    }
}
