//! Whether the node or the cluster itself uses addresses of the tailnet's ranges: pods' routes would lead those
//! into the tailnet.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::Found;
use crate::config::Config;

/// A range in use, and by what.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Used {
    net: IpNet,
    by: String,
}

pub(super) fn all(config: Option<&Config>, conf_dir: &Path) -> Vec<Found> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let mut used = routes_v4(&read("/proc/net/route"));
    used.extend(routes_v6(&read("/proc/net/ipv6_route")));
    used.extend(subnets(conf_dir));
    if let Some(ip) = std::env::var("KUBERNETES_SERVICE_HOST").ok().and_then(|ip| ip.parse::<IpAddr>().ok()) {
        used.push(Used { net: ip.into(), by: "the API server's Service".to_owned() });
    }
    let (mut excluded, mut cluster) = (Vec::new(), Vec::new());
    if let Some(config) = config {
        excluded.clone_from(&config.node.exclude_cidrs);
        cluster.clone_from(&config.node.cluster_cidrs);
    }
    used.extend(cluster.into_iter().map(|net| Used { net, by: "node.cluster_cidrs".to_owned() }));
    overlaps(&used, &excluded)
}

fn tailnet() -> [IpNet; 2] {
    let v4 = Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 10);
    let v6 = Ipv6Net::new_assert(Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, 0), 48);
    [v4.into(), v6.into()]
}

fn overlaps(used: &[Used], excluded: &[IpNet]) -> Vec<Found> {
    let meets = |a: &IpNet, b: &IpNet| a.contains(b) || b.contains(a);
    let mut found: Vec<Found> = Vec::new();
    let mut told: Vec<IpNet> = Vec::new();
    for Used { net, by } in used {
        let inside =
            tailnet().iter().any(|range| range.contains(net) || (net.prefix_len() > 0 && meets(range, net)));
        // The node's own tailscaled: its tailnet is no part of the cluster.
        if !inside
            || by.contains("tailscale")
            || excluded.iter().any(|range| range.contains(net))
            || told.contains(net)
        {
            continue;
        }
        told.push(*net);
        found.push(Found::fail(
            format!("{net} ({by}) lies in the tailnet's ranges: pods would send it into the tailnet"),
            format!("add \"{net}\" to node.exclude_cidrs, or give the cluster another range"),
        ));
    }
    if found.is_empty() {
        let but = if excluded.is_empty() { "" } else { " beside node.exclude_cidrs" };
        found.push(Found::ok(format!(
            "nothing of the node or the cluster uses 100.64.0.0/10 or fd7a:115c:a1e0::/48{but}"
        )));
    }
    found
}

/// `/proc/net/route`: interface, destination and mask in the host's byte order.
fn routes_v4(text: &str) -> Vec<Used> {
    let route = |line: &str| {
        let mut fields = line.split_whitespace();
        let interface = fields.next()?;
        let ip = |hex: &str| Some(Ipv4Addr::from(u32::from_str_radix(hex, 16).ok()?.to_ne_bytes()));
        let destination = ip(fields.next()?)?;
        let mask = ip(fields.nth(5)?)?;
        let net = Ipv4Net::with_netmask(destination, mask).ok()?;
        Some(Used { net: net.into(), by: format!("a route of {interface}") })
    };
    text.lines().skip(1).filter_map(route).collect()
}

/// `/proc/net/ipv6_route`: destination, prefix length, …, interface.
fn routes_v6(text: &str) -> Vec<Used> {
    let route = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let address = Ipv6Addr::from(u128::from_str_radix(fields.first()?, 16).ok()?);
        let length = u8::from_str_radix(fields.get(1)?, 16).ok()?;
        let net = Ipv6Net::new(address, length).ok()?;
        Some(Used { net: net.into(), by: format!("a route of {}", fields.last()?) })
    };
    text.lines().filter_map(route).collect()
}

/// Subnets in the runtime's network configurations.
fn subnets(dir: &Path) -> Vec<Used> {
    let mut used = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
        let Ok(json) = serde_json::from_str::<serde_json::Value>(&text) else { continue };
        let mut left = vec![&json];
        while let Some(value) = left.pop() {
            match value {
                serde_json::Value::Object(object) => {
                    let subnet = object.get("subnet").and_then(|s| s.as_str()).and_then(|s| s.parse().ok());
                    used.extend(subnet.map(|net| Used { net, by: format!("a subnet in {name}") }));
                    left.extend(object.values());
                }
                serde_json::Value::Array(array) => left.extend(array),
                serde_json::Value::Null
                | serde_json::Value::Bool(_)
                | serde_json::Value::Number(_)
                | serde_json::Value::String(_) => {}
            }
        }
    }
    used
}

#[cfg(test)]
mod tests {
    use super::super::Grade;
    use super::*;

    const V4: &str = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n\
        eth0\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
        cni0\t00004064\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n\
        tailscale0\t0100 x\n";
    const V6: &str = "fd7a115ca1e000000000000000000001 80 00000000000000000000000000000000 00 \
        00000000000000000000000000000000 00000100 00000001 00000000 00000001 tailscale0\n\
        00000000000000000000000000000000 00 0 00 0 0 0 0 0 lo\n";

    #[test]
    fn the_cluster_may_not_use_the_tailnets_ranges_unless_they_are_excluded() {
        let used: Vec<Used> = routes_v4(V4).into_iter().chain(routes_v6(V6)).collect();
        assert_eq!(used.len(), 4, "{used:?}");
        assert_eq!(
            used[1],
            Used { net: "100.64.0.0/16".parse::<IpNet>().unwrap().trunc(), by: "a route of cni0".into() },
            "on a little-endian machine"
        );
        let found = overlaps(&used, &[]);
        assert_eq!(found.len(), 1);
        assert!(found[0].0 == Grade::Fail && found[0].2.contains("node.exclude_cidrs"), "{}", found[0].1);
        assert_eq!(overlaps(&used, &["100.64.0.0/12".parse().unwrap()])[0].0, Grade::Ok);
        let whole = [Used { net: "100.0.0.0/8".parse().unwrap(), by: "x".into() }];
        assert_eq!(overlaps(&whole, &[])[0].0, Grade::Fail, "it covers the range");
        assert_eq!(overlaps(&[], &[])[0].0, Grade::Ok);
    }

    #[test]
    fn subnets_are_found_wherever_they_stand() {
        let dir = tempfile::tempdir().unwrap();
        let text = r#"{"plugins":[{"type":"bridge","ipam":{"ranges":[[{"subnet":"100.65.0.0/24"}]]}}]}"#;
        std::fs::write(dir.path().join("10-a.conflist"), text).unwrap();
        std::fs::write(dir.path().join("20-b.conflist"), "{").unwrap();
        let found = overlaps(&subnets(dir.path()), &[]);
        assert!(found[0].1.contains("100.65.0.0/24 (a subnet in 10-a.conflist)"), "{}", found[0].1);
    }
}
