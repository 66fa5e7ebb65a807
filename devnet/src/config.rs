//! What a devnet is started with.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use crate::acl::Policy;
use crate::control::crowd::Crowd;

/// Everything a devnet is told at start. The defaults give a working tailnet on loopback.
#[derive(Clone, Debug)]
pub struct DevnetConfig {
    /// Addresses of the plain control and admin API listeners; port 0 takes a free one.
    pub http_listen: Vec<SocketAddr>,
    /// Addresses of the TLS control and admin API listeners.
    pub https_listen: Vec<SocketAddr>,
    /// Further DNS names or addresses the certificate is valid for.
    pub tls_names: Vec<String>,
    /// MagicDNS suffix, without dots at its ends.
    pub base_domain: String,
    /// What nodes are told about names beside those of the tailnet.
    pub dns: DnsSettings,
    /// First IPv4 address to hand out; two devnets with the same start hand out the same ones.
    pub ipv4_start: Ipv4Addr,
    /// First IPv6 address to hand out.
    pub ipv6_start: Ipv6Addr,
    /// DERP regions, each with a STUN server.
    pub regions: Vec<RegionConfig>,
    /// Access rules; `None` allows everything.
    pub policy: Option<Policy>,
    /// OAuth client of the admin API.
    pub oauth: OauthConfig,
    /// Longest silence on a map stream.
    pub keep_alive: Duration,
    /// How long a node may be without a map stream before its peers see it offline.
    pub offline_delay: Duration,
    /// How long an ephemeral node may be offline before it is forgotten.
    pub ephemeral_timeout: Duration,
    /// Lifetime of an untagged node's key when the client asks for none; `None` is for ever.
    pub node_key_lifetime: Option<Duration>,
    /// How long a client may leave a map stream or DERP connection unread before it is cut off.
    pub write_timeout: Duration,
    /// Whose error texts to answer with.
    pub dialect: Dialect,
    /// Most nodes the tailnet holds.
    pub max_nodes: usize,
    /// Whether the relays serve everybody, for another control server's nodes.
    pub open_relays: bool,
    /// Which addresses its nodes get.
    pub families: Families,
    /// The admin API is Headscale's; `None` for the hosted service's.
    pub headscale: Option<HeadscaleApi>,
    /// Peers that exist in netmaps alone.
    pub crowd: Crowd,
}

/// Address families of a tailnet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Families {
    /// IPv4 and IPv6.
    Both,
    /// IPv4 alone.
    V4,
    /// IPv6 alone.
    V6,
}

/// An admin API as Headscale has it: ids are numbers, and there are users.
#[derive(Clone, Debug)]
pub struct HeadscaleApi {
    /// The API key; a random one when empty.
    pub api_key: String,
    /// Whether the second API, which has the hosted service's shape, is there beside the first.
    pub v2: bool,
}

impl Default for DevnetConfig {
    fn default() -> Self {
        Self {
            http_listen: vec![SocketAddr::from(([127, 0, 0, 1], 0))],
            https_listen: vec![SocketAddr::from(([127, 0, 0, 1], 0))],
            tls_names: Vec::new(),
            base_domain: "tailnet.test".into(),
            dns: DnsSettings::default(),
            ipv4_start: Ipv4Addr::new(100, 64, 0, 1),
            ipv6_start: Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, 1),
            regions: vec![RegionConfig::new(1, vec![IpAddr::V4(Ipv4Addr::LOCALHOST)])],
            policy: None,
            oauth: OauthConfig::default(),
            keep_alive: Duration::from_secs(50),
            offline_delay: Duration::from_secs(10),
            ephemeral_timeout: Duration::from_secs(120),
            node_key_lifetime: None,
            write_timeout: Duration::from_secs(10),
            dialect: Dialect::Headscale,
            max_nodes: 20_000,
            open_relays: false,
            families: Families::Both,
            headscale: None,
            crowd: Crowd::default(),
        }
    }
}

/// Name resolution beyond the tailnet's own names.
#[derive(Clone, Debug, Default)]
pub struct DnsSettings {
    /// Resolvers for everything else.
    pub resolvers: Vec<String>,
    /// Resolvers by suffix; none for a suffix means that nodes answer it themselves.
    pub routes: Vec<(String, Vec<String>)>,
    /// Further names and their addresses.
    pub extra_records: Vec<(String, IpAddr)>,
}

/// The two servers whose error texts are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// Headscale's sentences.
    Headscale,
    /// Tailscale's hosted service's sentences.
    Saas,
}

/// One DERP region: a relay and a STUN server on the same addresses.
#[derive(Clone, Debug)]
pub struct RegionConfig {
    /// Region id, not 0.
    pub id: u32,
    /// Short code, such as `r1`.
    pub code: String,
    /// At most one IPv4 and one IPv6 address to listen on and to announce.
    pub addresses: Vec<IpAddr>,
    /// TCP port of the relay; 0 takes a free one.
    pub derp_port: u16,
    /// UDP port of the STUN server; 0 takes a free one.
    pub stun_port: u16,
    /// How far away the region is: added to every round trip to its relay and its STUN server. At most
    /// 10 s counts.
    pub distance: Duration,
}

impl RegionConfig {
    /// A region on these addresses with free ports.
    #[must_use]
    pub fn new(id: u32, addresses: Vec<IpAddr>) -> Self {
        Self { id, code: format!("r{id}"), addresses, derp_port: 0, stun_port: 0, distance: Duration::ZERO }
    }

    /// The same, so far away.
    #[must_use]
    pub fn at(self, distance: Duration) -> Self {
        Self { distance, ..self }
    }

    /// The name in the relay's certificate.
    #[must_use]
    pub fn host_name(&self, base_domain: &str) -> String {
        format!("derp{}.{base_domain}", self.id)
    }
}

/// The admin API's OAuth client. Empty strings are replaced by random ones at start.
#[derive(Clone, Debug)]
pub struct OauthConfig {
    /// Client id.
    pub client_id: String,
    /// Client secret.
    pub client_secret: String,
    /// Tags the client may give to keys.
    pub tags: Vec<String>,
    /// Lifetime of an access token.
    pub token_lifetime: Duration,
}

impl Default for OauthConfig {
    fn default() -> Self {
        Self {
            client_id: String::new(),
            client_secret: String::new(),
            tags: vec!["tag:k8s-pod".into()],
            token_lifetime: Duration::from_secs(3600),
        }
    }
}
