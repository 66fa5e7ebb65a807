//! What of the tailnet's ranges is routed into a link.

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::net::{Ipv4Addr, Ipv6Addr};

/// The ranges every tailnet uses.
#[must_use]
pub fn tailnet_ranges() -> [IpNet; 2] {
    let v4 = Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 10);
    let v6 = Ipv6Net::new_assert(Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, 0), 48);
    [v4.into(), v6.into()]
}

/// The tailnet's ranges without `exclude` (cluster ranges that overlap them), as few prefixes as possible.
#[must_use]
pub fn tailnet_routes(exclude: &[IpNet]) -> Vec<IpNet> {
    let mut routes = Vec::new();
    for range in tailnet_ranges() {
        without(range, exclude, &mut routes);
    }
    routes
}

/// `nets` without what lies in one of `exclude`, as few prefixes as possible, sorted.
#[must_use]
pub fn subtract(nets: &[IpNet], exclude: &[IpNet]) -> Vec<IpNet> {
    let mut routes = Vec::new();
    for net in nets {
        without(*net, exclude, &mut routes);
    }
    routes.sort_unstable();
    routes.dedup();
    routes
}

/// Halves `net` until each part lies wholly outside or wholly inside an excluded range.
fn without(net: IpNet, exclude: &[IpNet], out: &mut Vec<IpNet>) {
    if exclude.iter().any(|e| e.contains(&net)) {
        return;
    }
    if !exclude.iter().any(|e| net.contains(e)) {
        out.push(net);
        return;
    }
    if let Ok(halves) = net.subnets(net.prefix_len() + 1) {
        for half in halves {
            without(half, exclude, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes(exclude: &[&str]) -> Vec<String> {
        let nets: Vec<IpNet> = exclude.iter().map(|e| e.parse().unwrap()).collect();
        tailnet_routes(&nets).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn excluded_ranges_are_cut_out() {
        let v6 = "fd7a:115c:a1e0::/48";
        assert_eq!(routes(&[]), ["100.64.0.0/10", v6]);
        assert_eq!(routes(&["10.0.0.0/8", "fd00::/96"]), ["100.64.0.0/10", v6]);
        assert_eq!(routes(&["100.96.0.0/11"]), ["100.64.0.0/11", v6]);
        assert_eq!(
            routes(&["100.64.0.0/12", "100.80.0.0/16"]),
            ["100.81.0.0/16", "100.82.0.0/15", "100.84.0.0/14", "100.88.0.0/13", "100.96.0.0/11", v6]
        );
        assert_eq!(routes(&["0.0.0.0/0", "::/0"]), [""; 0]);
        assert_eq!(routes(&["100.64.0.0/32", "fd7a:115c:a1e0::/128"]).len(), 22 + 80);
    }
}
