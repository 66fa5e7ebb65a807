//! Configuration: TOML, then environment, then flags, into one typed struct.
//!
//! Every key is listed once, in [`keys`]. A key that is not in the list, or has the wrong kind, stops
//! the program with a sentence that names it and where it was set. Secrets are read from files when
//! they are needed and never print.

mod keys;
mod sources;
mod value;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use podtether_proto::node::Routing;

pub use sources::{Inputs, arguments, inputs_from};
pub use value::{SecretSource, parse_duration};

use podtether_proto::secret::SecretString;

use crate::choose::{Grant, Join};
use crate::dns::DnsMode;
use keys::{
    API_HOST_VALUE, API_PORT_VALUE, CLIENT_ID_VALUE, CLIENT_SECRET_VALUE, NO_PROXY_VALUE, PROXY_VALUE,
    Section,
};
use sources::Values;

/// Where the file is when no flag says otherwise.
pub const DEFAULT_PATH: &str = "/etc/podtether/supervisor.toml";
/// `run_dir/engines/<id>/engine.sock` has to fit a Unix socket address.
const MAX_RUN_DIR_BYTES: usize = 68;

/// An engine takes 1.5 to 3 MB, 10 to 20 among ten thousand peers while their map comes in, and its snapshot,
/// which is charged to it, up to 16.
const DEFAULT_ENGINE_MIB: i64 = 128;
const MIN_ENGINE_MIB: u64 = 8;

/// What is wrong with the configuration: one sentence that names the key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub String);

/// Everything the supervisor was told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// `[tailnet.NAME]`, by name.
    pub tailnets: BTreeMap<String, Tailnet>,
    /// `[namespace.NAME]`, by name; `*` is for all of them.
    pub namespaces: BTreeMap<String, Grant>,
    /// `[node]`
    pub node: Node,
}

/// One tailnet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tailnet {
    /// Control server.
    pub control_url: String,
    /// ACL tags of its pods.
    pub tags: Vec<String>,
    /// Whether they get `tag:ns-NAMESPACE` as well.
    pub namespace_tag: bool,
    /// See [`crate::hostname`].
    pub hostname_template: String,
    /// Extra roots for control, DERP and API.
    pub ca_file: Option<PathBuf>,
    /// Whether control may forget a pod that is away.
    pub ephemeral: bool,
    /// What is done about names that pods ask their own name servers for.
    pub dns: DnsMode,
    /// Name servers of pods whose runtime does not tell them.
    pub dns_servers: Vec<IpAddr>,
    /// What its pods use of other nodes' routes, unless a pod's annotations say otherwise.
    pub routing: Routing,
    /// How its devices get in.
    pub credentials: Credentials,
}

/// How a tailnet's devices get in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credentials {
    /// OAuth client: mints single-use keys and deletes devices.
    OAuth {
        /// Admin API.
        api_url: String,
        /// Client id.
        client_id: SecretSource,
        /// Client secret.
        client_secret: SecretSource,
        /// Life of a minted key.
        auth_key_ttl: Duration,
    },
    /// None: a person opens a URL for each device.
    Interactive,
    /// One reusable key.
    AuthKey {
        /// The key.
        key: SecretSource,
    },
    /// Headscale's API key: mints single-use keys and deletes nodes.
    Headscale {
        /// Headscale.
        api_url: String,
        /// API key.
        api_key: SecretSource,
        /// Owner of the nodes, by name or number.
        user: Option<String>,
        /// Life of a minted key.
        auth_key_ttl: Duration,
    },
}

impl Credentials {
    /// Whether each pod gets a key of its own, with tags of its own.
    #[must_use]
    pub fn mints(&self) -> bool {
        matches!(self, Credentials::OAuth { .. } | Credentials::Headscale { .. })
    }

    /// Its secrets, each with the key that names its file.
    pub(crate) fn secrets(&self) -> Vec<(&'static str, &SecretSource)> {
        match self {
            Credentials::OAuth { client_id, client_secret, .. } => {
                vec![
                    ("credentials.client_id_file", client_id),
                    ("credentials.client_secret_file", client_secret),
                ]
            }
            Credentials::AuthKey { key } => vec![("credentials.auth_key_file", key)],
            Credentials::Interactive => Vec::new(),
            Credentials::Headscale { api_key, .. } => vec![("credentials.api_key_file", api_key)],
        }
    }
}

/// The node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its name in Kubernetes; `None` where no API server is asked.
    pub name: Option<String>,
    /// Kubernetes' API server.
    pub api_server: Option<String>,
    /// What the API server is asked with: `token`, `ca.crt`, `namespace`.
    pub service_account_dir: PathBuf,
    /// Where the API server is and what it is asked with, instead of these two.
    pub kubeconfig: Option<PathBuf>,
    /// `{cluster}`.
    pub cluster_name: String,
    /// Records and keys.
    pub state_dir: PathBuf,
    /// Sockets, snapshots and namespace mounts.
    pub run_dir: PathBuf,
    /// Everything over HTTP, loopback only.
    pub http_listen: Option<SocketAddr>,
    /// Metrics and health alone.
    pub metrics_listen: Option<SocketAddr>,
    /// The engine's binary; `None` for the one beside the supervisor.
    pub engine_path: Option<PathBuf>,
    /// Proxy for TLS connections to control and DERP, as `HTTPS_PROXY` and `NO_PROXY` name it.
    pub proxy: Option<Proxy>,
    /// Engines' UDP ports.
    pub udp_port_range: Option<RangeInclusive<u16>>,
    /// First uid of the engines.
    pub uid_base: u32,
    /// Cgroup of the engines, below the root of every hierarchy; empty for none of their own.
    pub cgroup_root: String,
    /// Memory that one engine may use, in bytes.
    pub engine_memory_bytes: u64,
    /// Ranges that pods do not route into the tailnet.
    pub exclude_cidrs: Vec<IpNet>,
    /// The cluster's own ranges: no route of another node covers them.
    pub cluster_cidrs: Vec<IpNet>,
    /// Namespaces whose pods join nothing.
    pub exempt_namespaces: Vec<String>,
    /// Which pods join when neither they nor their namespace says so.
    pub join: Join,
    /// How long an identity is kept when nobody can say whether its pod lives.
    pub identity_grace: Duration,
    /// Refuse pods whose engine cannot be confined fully.
    pub require_sandbox: bool,
}

/// An HTTP proxy.
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    /// With credentials, if it wants any.
    pub url: SecretString,
    /// What is reached without it.
    pub bypass: String,
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "(from HTTPS_PROXY) bypass={:?}", self.bypass)
    }
}

impl Config {
    /// Reads and checks everything.
    ///
    /// # Errors
    /// The first thing that is wrong, with the name of its key.
    pub fn load(inputs: &Inputs) -> Result<Config, ConfigError> {
        let values = Values::collect(inputs)?;
        let mut tailnets = BTreeMap::new();
        for name in values.tailnet_names() {
            tailnets.insert(name.clone(), tailnet(&values, &name)?);
        }
        if tailnets.is_empty() {
            return Err(ConfigError(format!(
                "no tailnet is configured: add a [tailnet.default] table to {}",
                inputs.path.display()
            )));
        }
        let mut namespaces = BTreeMap::new();
        for name in values.namespace_names() {
            let grant = grant(&values, &name, &tailnets)?;
            namespaces.insert(name, grant);
        }
        Ok(Config { tailnets, namespaces, node: node(&values)? })
    }

    /// What is wrong with the files of the tailnets as they are now, one sentence each.
    #[must_use]
    pub fn unusable_files(&self) -> Vec<ConfigError> {
        let tailnets = self.tailnets.iter();
        let wrong = tailnets.flat_map(|(name, tailnet)| {
            let files = crate::credentials::unusable_files(tailnet).into_iter();
            files.map(move |(key, e)| ConfigError(format!("tailnet.{name}.{key}: {e}")))
        });
        wrong.collect()
    }

    /// The engine's binary.
    #[must_use]
    pub fn engine_path(&self) -> PathBuf {
        self.node.engine_path.clone().unwrap_or_else(|| {
            let beside = |p: PathBuf| p.with_file_name("podtether-engine");
            std::env::current_exe().map_or_else(|_| PathBuf::from("podtether-engine"), beside)
        })
    }
}

fn grant(values: &Values, name: &str, tailnets: &BTreeMap<String, Tailnet>) -> Result<Grant, ConfigError> {
    let at = values.at(Section::Namespace, name);
    let list = |key: &str| at.list(key).map(Option::unwrap_or_default);
    let grant = Grant {
        tags: list("tags")?,
        hostnames: list("hostnames")?,
        exit_nodes: list("exit_nodes")?,
        tailnets: list("tailnets")?,
    };
    for tag in &grant.tags {
        // What a pattern stands for is a tag's own: enough that its beginning is one's.
        if !is_tag(&tag.replace("{namespace}", "n").replace('*', "x")) {
            return Err(at.error("tags", &format!("`{tag}` is no tag (write tag:name or tag:name-*)")));
        }
    }
    for tailnet in &grant.tailnets {
        if !tailnets.contains_key(tailnet) {
            return Err(at.error("tailnets", &format!("`{tailnet}` is no [tailnet.NAME] of this file")));
        }
    }
    Ok(grant)
}

fn tailnet(values: &Values, name: &str) -> Result<Tailnet, ConfigError> {
    let at = values.at(Section::Tailnet, name);
    let control_url = at.text("control_url")?.unwrap_or("https://controlplane.tailscale.com").to_owned();
    check_url(&control_url).map_err(|e| at.error("control_url", &e))?;
    let tags = at.list("tags")?.unwrap_or_default();
    for tag in &tags {
        if !is_tag(tag) {
            return Err(at.error("tags", &format!("`{tag}` is no tag (write tag:name)")));
        }
    }
    let hostname_template = at.text("hostname_template")?.unwrap_or("{cluster}-{namespace}-{pod}").to_owned();
    crate::hostname::check_template(&hostname_template).map_err(|e| at.error("hostname_template", &e))?;
    let dns = at.text("dns")?.unwrap_or("off");
    let dns = DnsMode::parse(dns)
        .ok_or_else(|| at.error("dns", &format!("`{dns}` is neither off nor intercept")))?;
    let mut dns_servers = Vec::new();
    for text in at.list("dns_servers")?.unwrap_or_default() {
        let server = text.parse().map_err(|_| at.error("dns_servers", &format!("`{text}` is no address")))?;
        dns_servers.push(server);
    }
    let credentials = credentials(values, name, &control_url)?;
    if tags.is_empty() && matches!(credentials, Credentials::Headscale { user: None, .. }) {
        return Err(values.at(Section::Credentials, name).error(
            "user",
            "is missing: without tags Headscale's nodes belong to a user, by name or number",
        ));
    }
    if tags.is_empty() && matches!(credentials, Credentials::OAuth { .. }) {
        return Err(at.error("tags", "an OAuth client mints keys for tags only: name at least one"));
    }
    let namespace_tag = at.bool("namespace_tag")?.unwrap_or(false);
    if namespace_tag && !credentials.mints() {
        return Err(at.error(
            "namespace_tag",
            "needs credentials of kind oauth or headscale: the tags of an auth key or a person's login are fixed",
        ));
    }
    Ok(Tailnet {
        control_url,
        tags,
        namespace_tag,
        hostname_template,
        ca_file: at.path("ca_file")?,
        ephemeral: at.bool("ephemeral")?.unwrap_or(false),
        dns,
        dns_servers,
        routing: Routing {
            accept_routes: at.bool("accept_routes")?.unwrap_or(false),
            exit_node: crate::routing::exit_node(at.text("exit_node")?.unwrap_or_default())
                .map_err(|e| at.error("exit_node", &e))?,
        },
        credentials,
    })
}

fn credentials(values: &Values, name: &str, control_url: &str) -> Result<Credentials, ConfigError> {
    let at = values.at(Section::Credentials, name);
    let kind = match at.text("kind")? {
        Some(kind) => kind,
        // The predecessor had nothing else, so its environment means this kind.
        None if at.text(CLIENT_SECRET_VALUE)?.is_some() => "oauth",
        // No table at all: nobody but a person can let devices in.
        None if at.is_empty() => "interactive",
        None => return Err(at.error("kind", "is missing: write oauth, auth-key, headscale or interactive")),
    };
    let only = |allowed: &[&str]| -> Result<(), ConfigError> {
        for key in ["client_id_file", "client_secret_file", "auth_key_file", "api_key_file", "user"] {
            if at.text(key)?.is_some() && !allowed.contains(&key) {
                return Err(at.error(key, &format!("does not belong to kind = \"{kind}\"")));
            }
        }
        Ok(())
    };
    let secret = |file: &str, value: Option<&str>| -> Result<SecretSource, ConfigError> {
        if let Some(path) = at.path(file)? {
            return Ok(SecretSource::File(path));
        }
        if let Some(text) = value.map(|v| at.text(v)).transpose()?.flatten() {
            return Ok(SecretSource::Value(podtether_proto::secret::SecretString::new(text.to_owned())));
        }
        Err(at.error(file, &format!("is missing: kind = \"{kind}\" needs it")))
    };
    let api_url = |default: &str| -> Result<String, ConfigError> {
        let url = at.text("api_url")?.unwrap_or(default);
        check_url(url).map_err(|e| at.error("api_url", &e))?;
        Ok(url.trim_end_matches('/').to_owned())
    };
    let auth_key_ttl = || -> Result<Duration, ConfigError> {
        let ttl = at.duration("auth_key_ttl")?.unwrap_or(Duration::from_secs(300));
        if ttl < Duration::from_secs(10) {
            return Err(at.error("auth_key_ttl", "is shorter than a join takes: at least 10s"));
        }
        Ok(ttl)
    };
    match kind {
        "oauth" => {
            only(&["client_id_file", "client_secret_file"])?;
            Ok(Credentials::OAuth {
                api_url: api_url("https://api.tailscale.com")?,
                client_id: secret("client_id_file", Some(CLIENT_ID_VALUE))?,
                client_secret: secret("client_secret_file", Some(CLIENT_SECRET_VALUE))?,
                auth_key_ttl: auth_key_ttl()?,
            })
        }
        "auth-key" => {
            only(&["auth_key_file"])?;
            Ok(Credentials::AuthKey { key: secret("auth_key_file", None)? })
        }
        "interactive" => {
            only(&[])?;
            Ok(Credentials::Interactive)
        }
        "headscale" => {
            only(&["api_key_file", "user"])?;
            Ok(Credentials::Headscale {
                api_url: api_url(&origin(control_url))?,
                api_key: secret("api_key_file", None)?,
                user: at.text("user")?.map(str::to_owned),
                auth_key_ttl: auth_key_ttl()?,
            })
        }
        other => {
            Err(at.error("kind", &format!("`{other}` is none of oauth, auth-key, headscale, interactive")))
        }
    }
}

fn node(values: &Values) -> Result<Node, ConfigError> {
    let at = values.at(Section::Node, "");
    let listen = |key: &str, default: &str| -> Result<Option<SocketAddr>, ConfigError> {
        match at.raw_text(key)?.unwrap_or(default) {
            "" => Ok(None),
            text => text.parse().map(Some).map_err(|_| {
                at.error(key, &format!("`{text}` is no address with a port (write 127.0.0.1:9465)"))
            }),
        }
    };
    let http_listen = listen("http_listen", "127.0.0.1:9465")?;
    if http_listen.is_some_and(|a| !a.ip().is_loopback()) {
        return Err(at.error("http_listen", "serves more than metrics, so it must be a loopback address"));
    }
    let run_dir = at.path("run_dir")?.unwrap_or_else(|| "/run/podtether".into());
    if run_dir.as_os_str().len() > MAX_RUN_DIR_BYTES {
        return Err(
            at.error("run_dir", &format!("is too long for Unix sockets (at most {MAX_RUN_DIR_BYTES} bytes)"))
        );
    }
    let ranges = |key: &str| -> Result<Vec<IpNet>, ConfigError> {
        let net = |text: String| match text.parse::<IpNet>() {
            Ok(net) => Ok(net.trunc()),
            Err(_) => Err(at.error(key, &format!("`{text}` is no CIDR range"))),
        };
        at.list(key)?.unwrap_or_default().into_iter().map(net).collect()
    };
    let (exclude_cidrs, cluster_cidrs) = (ranges("exclude_cidrs")?, ranges("cluster_cidrs")?);
    let uid_base = at.number("uid_base")?.unwrap_or(200_000);
    let uid_base = u32::try_from(uid_base)
        .ok()
        .filter(|u| (1..=u32::MAX - 100_000).contains(u))
        .ok_or_else(|| at.error("uid_base", &format!("{uid_base} leaves no room for the engines' uids")))?;
    let cgroup_root = at.raw_text("cgroup_root")?.unwrap_or("podtether").trim_matches('/').to_owned();
    if cgroup_root.split('/').any(|part| part == ".." || part == ".") || cgroup_root.len() > 200 {
        return Err(at.error("cgroup_root", "is no path of a cgroup"));
    }
    let memory = at.number("engine_memory_mib")?.unwrap_or(DEFAULT_ENGINE_MIB);
    let engine_memory_bytes = u64::try_from(memory)
        .ok()
        .filter(|mib| (MIN_ENGINE_MIB..1 << 20).contains(mib))
        .map(|mib| mib << 20)
        .ok_or_else(|| at.error("engine_memory_mib", &format!("{memory} is less than an engine may need")))?;
    let name = at.text("name")?.map(str::to_owned);
    if let Some(name) = &name
        && (name.len() > 253 || !name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-')))
    {
        return Err(at.error("name", "is no node's name"));
    }
    Ok(Node {
        name,
        api_server: api_server(&at)?,
        service_account_dir: at
            .path("service_account_dir")?
            .unwrap_or_else(|| "/var/run/secrets/kubernetes.io/serviceaccount".into()),
        kubeconfig: at.path("kubeconfig")?,
        cluster_name: at.text("cluster_name")?.unwrap_or("k8s").to_owned(),
        state_dir: at.path("state_dir")?.unwrap_or_else(|| "/var/lib/podtether".into()),
        run_dir,
        http_listen,
        metrics_listen: listen("metrics_listen", "")?,
        engine_path: at.path("engine_path")?,
        proxy: proxy(&at)?,
        udp_port_range: value::parse_port_range(at.text("udp_port_range")?.unwrap_or(""))
            .map_err(|e| at.error("udp_port_range", &e))?,
        uid_base,
        cgroup_root,
        engine_memory_bytes,
        exclude_cidrs,
        cluster_cidrs,
        exempt_namespaces: at
            .list("exempt_namespaces")?
            .unwrap_or_else(|| vec!["kube-system".into(), "podtether".into()]),
        join: {
            let join = at.text("join")?.unwrap_or("opt-out");
            Join::parse(join)
                .ok_or_else(|| at.error("join", &format!("`{join}` is neither opt-out nor opt-in")))?
        },
        identity_grace: at.duration("identity_grace")?.unwrap_or(Duration::ZERO),
        require_sandbox: at.bool("require_sandbox")?.unwrap_or(false),
    })
}

fn api_server(at: &sources::At<'_>) -> Result<Option<String>, ConfigError> {
    if let Some(url) = at.text("api_server")? {
        check_url(url).map_err(|e| at.error("api_server", &e))?;
        return Ok(Some(url.trim_end_matches('/').to_owned()));
    }
    let Some(host) = at.text(API_HOST_VALUE)? else { return Ok(None) };
    let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    let port = at.text(API_PORT_VALUE)?.unwrap_or("443");
    let url = format!("https://{host}:{port}");
    check_url(&url).map_err(|e| ConfigError(format!("KUBERNETES_SERVICE_HOST and _PORT: {e}")))?;
    Ok(Some(url))
}

fn proxy(at: &sources::At<'_>) -> Result<Option<Proxy>, ConfigError> {
    let Some(url) = at.text(PROXY_VALUE)? else { return Ok(None) };
    let usable = reqwest::Url::parse(url).is_ok_and(|u| u.scheme() == "http" && u.has_host());
    if !usable {
        return Err(ConfigError(
            "HTTPS_PROXY: no usable proxy (write http://user:password@proxy.example:3128; only http:// proxies \
             are supported)"
                .into(),
        ));
    }
    let bypass = at.text(NO_PROXY_VALUE)?.unwrap_or_default().to_owned();
    Ok(Some(Proxy { url: SecretString::new(url.to_owned()), bypass }))
}

/// Scheme, host and port of a URL that was checked.
fn origin(url: &str) -> String {
    reqwest::Url::parse(url).map_or_else(|_| url.to_owned(), |url| url.origin().ascii_serialization())
}

fn check_url(text: &str) -> Result<(), String> {
    let url = reqwest::Url::parse(text).map_err(|e| format!("`{text}` is no URL: {e}"))?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(format!("`{text}` is no http:// or https:// URL"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("holds a user name or password: credentials go into files".into());
    }
    Ok(())
}

/// Whether it can be an ACL tag: `tag:`, a letter, then letters, digits and dashes.
pub(crate) fn is_tag(tag: &str) -> bool {
    tag.strip_prefix("tag:").is_some_and(|name| {
        // A namespace's has 3 bytes and the namespace's name.
        name.len() <= 66
            && name.starts_with(|c: char| c.is_ascii_alphabetic())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
    })
}

impl fmt::Display for Config {
    /// As it would stand in the file, secrets left out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, t) in &self.tailnets {
            write!(
                f,
                "[tailnet.{name}] control_url={:?} tags={:?} namespace_tag={} hostname_template={:?} ca_file={:?} ephemeral={} dns={} dns_servers={:?} \
                 accept_routes={} exit_node={:?} ",
                t.control_url,
                t.tags,
                t.namespace_tag,
                t.hostname_template,
                t.ca_file.clone().unwrap_or_default(),
                t.ephemeral,
                t.dns.name(),
                t.dns_servers,
                t.routing.accept_routes,
                t.routing.exit_node.as_deref().unwrap_or_default()
            )?;
            match &t.credentials {
                Credentials::OAuth { api_url, client_id, client_secret, auth_key_ttl } => write!(
                    f,
                    "kind=\"oauth\" api_url={api_url:?} client_id={client_id:?} \
                     client_secret={client_secret:?} auth_key_ttl={auth_key_ttl:?} "
                )?,
                Credentials::AuthKey { key } => write!(f, "kind=\"auth-key\" key={key:?} ")?,
                Credentials::Interactive => write!(f, "kind=\"interactive\" ")?,
                Credentials::Headscale { api_url, api_key, user, auth_key_ttl } => write!(
                    f,
                    "kind=\"headscale\" api_url={api_url:?} api_key={api_key:?} user={:?} \
                     auth_key_ttl={auth_key_ttl:?} ",
                    user.as_deref().unwrap_or_default()
                )?,
            }
        }
        for (name, grant) in &self.namespaces {
            write!(f, "[namespace.{name}] {grant:?} ")?;
        }
        write!(f, "[node] {:?}", self.node)
    }
}

#[cfg(test)]
#[path = "config/tests.rs"]
mod tests;
