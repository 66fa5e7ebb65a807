//! The table of every configuration key: names, kinds and help. File, environment, flags and the
//! message about an unknown key all come from it.

/// Which part of the configuration a key belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Section {
    /// `[node]`
    Node,
    /// `[tailnet.NAME]`
    Tailnet,
    /// `[tailnet.NAME.credentials]`
    Credentials,
    /// `[namespace.NAME]`
    Namespace,
}

/// What a key's value looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Text.
    Text,
    /// `true` or `false`.
    Bool,
    /// Whole number.
    Number,
    /// List of texts; in the environment and in flags separated by commas.
    List,
}

impl Kind {
    /// For messages.
    pub(super) fn expected(self) -> &'static str {
        match self {
            Kind::Text => "a text in quotes",
            Kind::Bool => "true or false",
            Kind::Number => "a whole number",
            Kind::List => "a list of texts",
        }
    }
}

/// One key.
#[derive(Debug, Clone, Copy)]
pub(super) struct Key {
    /// Where it belongs.
    pub(super) section: Section,
    /// Its name in the file.
    pub(super) name: &'static str,
    /// Its kind.
    pub(super) kind: Kind,
    /// One line for `--help`.
    pub(super) help: &'static str,
}

const fn key(section: Section, name: &'static str, kind: Kind, help: &'static str) -> Key {
    Key { section, name, kind, help }
}

/// Every key.
pub(super) const KEYS: &[Key] = &[
    key(Section::Tailnet, "control_url", Kind::Text, "control server, http:// or https://"),
    key(Section::Tailnet, "tags", Kind::List, "ACL tags of the pods' devices"),
    key(
        Section::Tailnet,
        "hostname_template",
        Kind::Text,
        "device names: {cluster} {namespace} {pod} {workload} and plain text",
    ),
    key(Section::Tailnet, "namespace_tag", Kind::Bool, "every pod also gets tag:ns-NAMESPACE"),
    key(Section::Tailnet, "ca_file", Kind::Text, "extra roots for control, DERP and API, PEM"),
    key(Section::Tailnet, "ephemeral", Kind::Bool, "let the server forget a pod that is away for long"),
    key(Section::Tailnet, "dns", Kind::Text, "off, or intercept: answer tailnet names in the pods' own DNS"),
    key(
        Section::Tailnet,
        "dns_servers",
        Kind::List,
        "name servers of the pods, where the runtime does not tell them",
    ),
    key(Section::Tailnet, "accept_routes", Kind::Bool, "pods use the networks of subnet routers"),
    key(Section::Tailnet, "exit_node", Kind::Text, "node that carries pods' traffic out of the cluster"),
    key(Section::Credentials, "kind", Kind::Text, "oauth, auth-key, headscale or interactive"),
    key(Section::Credentials, "api_url", Kind::Text, "admin API of the tailnet"),
    key(Section::Credentials, "client_id_file", Kind::Text, "oauth: file with the client id"),
    key(Section::Credentials, "client_secret_file", Kind::Text, "oauth: file with the client secret"),
    key(Section::Credentials, "auth_key_file", Kind::Text, "auth-key: file with a reusable key"),
    key(Section::Credentials, "api_key_file", Kind::Text, "headscale: file with an API key"),
    key(Section::Credentials, "user", Kind::Text, "headscale: owner of the nodes, a name or a number"),
    key(Section::Credentials, "auth_key_ttl", Kind::Text, "life of a minted key, for example 5m"),
    key(
        Section::Node,
        "name",
        Kind::Text,
        "the node's name in Kubernetes; empty: the API server is not asked",
    ),
    key(Section::Node, "api_server", Kind::Text, "Kubernetes' API server; default what its variables name"),
    key(Section::Node, "service_account_dir", Kind::Text, "token, ca.crt and namespace for the API server"),
    key(
        Section::Node,
        "kubeconfig",
        Kind::Text,
        "a kubeconfig for the API server, where the supervisor is no pod of the cluster",
    ),
    key(Section::Node, "cluster_name", Kind::Text, "{cluster} in device names"),
    key(Section::Node, "state_dir", Kind::Text, "records and keys, 0700"),
    key(Section::Node, "run_dir", Kind::Text, "supervisor.sock, engines/, netns/"),
    key(Section::Node, "http_listen", Kind::Text, "loopback address of /metrics /healthz /readyz /v1"),
    key(Section::Node, "metrics_listen", Kind::Text, "address of /metrics /healthz /readyz alone"),
    key(Section::Node, "engine_path", Kind::Text, "podtether-engine; default beside the supervisor"),
    key(Section::Node, "udp_port_range", Kind::Text, "engines' UDP ports, FIRST-LAST; default any"),
    key(Section::Node, "uid_base", Kind::Number, "first uid of the engines"),
    key(Section::Node, "cgroup_root", Kind::Text, "cgroup of the engines; \"\" for none of their own"),
    key(Section::Node, "engine_memory_mib", Kind::Number, "memory that one engine may use"),
    key(Section::Node, "exclude_cidrs", Kind::List, "cluster ranges that overlap the tailnet's"),
    key(
        Section::Node,
        "cluster_cidrs",
        Kind::List,
        "ranges of the cluster's pods, services and nodes: never through another node of the tailnet",
    ),
    key(Section::Node, "exempt_namespaces", Kind::List, "namespaces whose pods join nothing"),
    key(
        Section::Node,
        "join",
        Kind::Text,
        "opt-out: every pod that does not say no; opt-in: those that say yes (annotation tailscale.com/enabled)",
    ),
    key(
        Section::Node,
        "identity_grace",
        Kind::Text,
        "keep an identity this long when nobody can say whether its pod lives, for example 10m",
    ),
    key(Section::Node, "require_sandbox", Kind::Bool, "refuse pods when an engine cannot be confined fully"),
    key(Section::Namespace, "tags", Kind::List, "tags that annotations in the namespace may ask for"),
    key(
        Section::Namespace,
        "hostnames",
        Kind::List,
        "host names that annotations in the namespace may ask for",
    ),
    key(
        Section::Namespace,
        "exit_nodes",
        Kind::List,
        "exit nodes that annotations in the namespace may ask for",
    ),
    key(Section::Namespace, "tailnets", Kind::List, "tailnets that annotations in the namespace may ask for"),
];

/// Legacy environment names and the keys of the default tailnet and the node they stand for. The
/// two with a `_value` set a secret itself, which only the environment may do.
pub(super) const LEGACY_ENV: &[(&str, Section, &str)] = &[
    ("TS_OAUTH_CLIENT_ID", Section::Credentials, CLIENT_ID_VALUE),
    ("TS_OAUTH_CLIENT_SECRET", Section::Credentials, CLIENT_SECRET_VALUE),
    ("TS_TAGS", Section::Tailnet, "tags"),
    ("CLUSTER_NAME", Section::Node, "cluster_name"),
    ("AUTH_KEY_TTL", Section::Credentials, "auth_key_ttl"),
    // As every container has them.
    ("KUBERNETES_SERVICE_HOST", Section::Node, API_HOST_VALUE),
    ("KUBERNETES_SERVICE_PORT", Section::Node, API_PORT_VALUE),
    // The later one counts, as for other programs.
    ("https_proxy", Section::Node, PROXY_VALUE),
    ("HTTPS_PROXY", Section::Node, PROXY_VALUE),
    ("no_proxy", Section::Node, NO_PROXY_VALUE),
    ("NO_PROXY", Section::Node, NO_PROXY_VALUE),
];

/// Set by `TS_OAUTH_CLIENT_ID` alone.
pub(super) const CLIENT_ID_VALUE: &str = "client_id_value";
/// Set by `TS_OAUTH_CLIENT_SECRET` alone.
pub(super) const CLIENT_SECRET_VALUE: &str = "client_secret_value";

/// Set by `HTTPS_PROXY` alone: it may hold a password.
pub(super) const PROXY_VALUE: &str = "https_proxy_value";
/// Set by `NO_PROXY` alone.
pub(super) const NO_PROXY_VALUE: &str = "no_proxy_value";
/// Set by `KUBERNETES_SERVICE_HOST` alone.
pub(super) const API_HOST_VALUE: &str = "api_host_value";
/// Set by `KUBERNETES_SERVICE_PORT` alone.
pub(super) const API_PORT_VALUE: &str = "api_port_value";
/// Keys that only the environment sets, under the names above.
pub(super) const ENV_ONLY: [&str; 6] =
    [CLIENT_ID_VALUE, CLIENT_SECRET_VALUE, PROXY_VALUE, NO_PROXY_VALUE, API_HOST_VALUE, API_PORT_VALUE];

/// The key called `name` in `section`.
pub(super) fn find(section: Section, name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|k| k.section == section && k.name == name)
}

/// The key of `section` that `name` was probably meant to be.
pub(super) fn nearest(section: Section, name: &str) -> Option<&'static str> {
    KEYS.iter()
        .filter(|k| k.section == section)
        .map(|k| (distance(k.name, name), k.name))
        .filter(|(d, _)| *d <= 3)
        .min()
        .map(|(_, n)| n)
}

fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let next = if ca == *cb { diagonal } else { 1 + diagonal.min(row[j]).min(row[j + 1]) };
            diagonal = row[j + 1];
            row[j + 1] = next;
        }
    }
    row[b.len()]
}
