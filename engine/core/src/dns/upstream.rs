//! Resolvers of the tailnet: which of them can be asked.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use crate::tailcfg::{DnsConfig, Resolver};

/// Servers to ask, in order; shared by everything that asks them.
pub(super) type Upstreams = Arc<[SocketAddr]>;

const PORT: u16 = 53;
/// Most servers kept of one list.
const MAX_UPSTREAMS: usize = 8;
/// Most sentences about servers that cannot be asked.
const MAX_PROBLEMS: usize = 8;
/// Where a node's own resolver answers.
pub(super) const SERVICE_V4: Ipv4Addr = Ipv4Addr::new(100, 100, 100, 100);
/// See [`SERVICE_V4`].
pub(super) const SERVICE_V6: Ipv6Addr = Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, 0x53);

/// The servers of `resolvers` that plain DNS reaches. What is wrong with the others goes to `problems`:
/// names that only those know are answered with a failure, never by somebody else.
pub(super) fn usable(what: &str, resolvers: &[Resolver], problems: &mut Vec<String>) -> Upstreams {
    let mut servers = Vec::new();
    for resolver in resolvers {
        match server(&resolver.addr) {
            Ok(server) if servers.contains(&server) => {}
            Ok(server) if servers.len() < MAX_UPSTREAMS => servers.push(server),
            Ok(_) => {}
            Err(why) if problems.len() < MAX_PROBLEMS => {
                // Bounded, since it comes from outside.
                let shown: String = resolver.addr.chars().filter(|c| !c.is_control()).take(100).collect();
                problems.push(format!("DNS resolver {shown} of {what} is not used: {why}"));
            }
            Err(_) => {}
        }
    }
    servers.into()
}

/// TCP ports of every server that plain DNS reaches.
pub(crate) fn ports(config: &DnsConfig) -> impl Iterator<Item = u16> {
    let split = config.routes.values().flatten();
    let all = config.resolvers.iter().chain(&config.fallback_resolvers).chain(split);
    all.filter_map(|resolver| Some(server(&resolver.addr).ok()?.port()))
}

fn server(text: &str) -> Result<SocketAddr, &'static str> {
    if text.starts_with("https://") || text.starts_with("http://") {
        // Its bootstrap addresses may answer plain DNS, but who asked for an encrypted way wants no other.
        return Err("DNS over HTTPS and peers' DNS proxies are not supported, give an address");
    }
    let address = text
        .parse::<SocketAddr>()
        .or_else(|_| text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, PORT)))
        .map_err(|_| "it is no address")?;
    let ip = address.ip();
    if ip == SERVICE_V4 || ip == SERVICE_V6 {
        return Err("it is MagicDNS itself");
    }
    if ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || address.port() == 0 {
        return Err("nobody can be asked there");
    }
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_asked() {
        let resolver = |addr: &str| Resolver { addr: addr.into(), ..Resolver::default() };
        let good = ["10.0.0.53", "10.0.0.53:53", "10.0.0.53:5353", "2001:db8::1", "[2001:db8::1]:5300"];
        let bad = [
            "https://dns.example/dns-query",
            "http://100.64.0.9:1234/dns-query",
            "100.100.100.100",
            "[fd7a:115c:a1e0::53]:53",
            "127.0.0.53",
            "0.0.0.0",
            "224.0.0.251",
            "10.0.0.53:0",
            "dns.example",
            "",
        ];
        let list: Vec<Resolver> = good.into_iter().chain(bad).map(resolver).collect();
        let mut problems = Vec::new();
        let servers = usable("corp.example", &list, &mut problems);
        let texts: Vec<String> = servers.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["10.0.0.53:53", "10.0.0.53:5353", "[2001:db8::1]:53", "[2001:db8::1]:5300"]);
        assert_eq!(problems.len(), MAX_PROBLEMS);
        assert!(problems[0].contains("https://dns.example/dns-query of corp.example"), "{}", problems[0]);
        let many: Vec<Resolver> = (1..99).map(|n| resolver(&format!("10.0.0.{n}"))).collect();
        assert_eq!(usable("", &many, &mut problems).len(), MAX_UPSTREAMS);
    }
}
