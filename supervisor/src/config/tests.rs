use super::*;

const MINIMAL: &str = r#"
[tailnet.default]
control_url = "http://127.0.0.1:8080"
tags = ["tag:k8s-pod"]
[tailnet.default.credentials]
kind = "oauth"
client_id_file = "/etc/podtether/id"
client_secret_file = "/etc/podtether/secret"
"#;

fn inputs(file: &str) -> Inputs {
    Inputs { path: "/x/supervisor.toml".into(), file: Some(file.to_owned()), ..Inputs::default() }
}

fn load(file: &str) -> Result<Config, String> {
    Config::load(&inputs(file)).map_err(|e| e.to_string())
}

fn with(env: &[(&str, &str)], flags: &[(&str, &str)], file: &str) -> Result<Config, String> {
    let own = |pairs: &[(&str, &str)]| pairs.iter().map(|(a, b)| ((*a).into(), (*b).into())).collect();
    let inputs = Inputs { env: own(env), flags: own(flags), ..inputs(file) };
    Config::load(&inputs).map_err(|e| e.to_string())
}

#[test]
fn a_small_file_gets_the_defaults() {
    let config = load(MINIMAL).unwrap();
    let node = &config.node;
    assert_eq!(node.cluster_name, "k8s");
    assert_eq!(node.state_dir.to_str(), Some("/var/lib/podtether"));
    assert_eq!(node.http_listen.unwrap().to_string(), "127.0.0.1:9465");
    assert_eq!(node.metrics_listen, None);
    assert_eq!(node.uid_base, 200_000);
    assert_eq!(node.exempt_namespaces, ["kube-system", "podtether"]);
    assert_eq!((node.join, config.namespaces.len()), (crate::choose::Join::OptOut, 0));
    let tailnet = &config.tailnets["default"];
    assert_eq!(tailnet.hostname_template, "{cluster}-{namespace}-{pod}");
    assert!(!tailnet.ephemeral);
    assert_eq!((tailnet.dns, tailnet.dns_servers.len()), (crate::dns::DnsMode::Off, 0));
    assert_eq!(tailnet.routing, Routing::default());
    let more = MINIMAL.replace("tags", "exit_node = \"gw\"\naccept_routes = true\ntags");
    let more = load(&format!("{more}\n[node]\ncluster_cidrs = [\"10.244.1.0/16\"]")).unwrap();
    assert_eq!(
        more.tailnets["default"].routing,
        Routing { accept_routes: true, exit_node: Some("gw".into()) }
    );
    assert_eq!(more.node.cluster_cidrs, ["10.244.0.0/16".parse::<IpNet>().unwrap()]);
    let Credentials::OAuth { api_url, auth_key_ttl, .. } = &tailnet.credentials else { panic!() };
    assert_eq!(api_url, "https://api.tailscale.com");
    assert_eq!(auth_key_ttl.as_secs(), 300);
}

#[test]
fn namespaces_are_given_what_their_tables_say() {
    let file = format!(
        "{MINIMAL}\n[namespace.shop]\ntags = [\"tag:web\", \"tag:shop-*\"]\n[namespace.\"*\"]\n\
         hostnames = [\"{{namespace}}-*\"]\n[node]\njoin = \"opt-in\""
    );
    let env = [("PODTETHER_NAMESPACE_TEAM_A_EXIT_NODES", "gw-1, gw-2")];
    let config = with(&env, &[("namespace.shop.tailnets", "default")], &file).unwrap();
    assert_eq!(config.namespaces["shop"].tags, ["tag:web", "tag:shop-*"]);
    assert_eq!(config.namespaces["shop"].tailnets, ["default"]);
    assert_eq!(config.namespaces["*"].hostnames, ["{namespace}-*"]);
    assert_eq!(config.namespaces["team-a"].exit_nodes, ["gw-1", "gw-2"]);
    assert_eq!(config.node.join, crate::choose::Join::OptIn);
    let wrong = [
        ("[namespace.shop]\ntags = [\"web\"]", "namespace.shop.tags (/x/supervisor.toml): `web` is no tag"),
        ("[namespace.shop]\ntailnets = [\"x\"]", "`x` is no [tailnet.NAME] of this file"),
        (
            "[namespace.shop]\ntag = []",
            "unknown key namespace.shop.tag in /x/supervisor.toml, did you mean tags?",
        ),
        ("[namespace.Shop]\ntags = []", "namespace.Shop in /x/supervisor.toml: no namespace is called so"),
        ("namespace = 1", "namespace in /x/supervisor.toml: expected a table"),
        ("[node]\njoin = \"all\"", "node.join (/x/supervisor.toml): `all` is neither opt-out nor opt-in"),
    ];
    for (more, sentence) in wrong {
        let file =
            if more.starts_with('[') { format!("{MINIMAL}\n{more}") } else { format!("{more}\n{MINIMAL}") };
        let error = load(&file).unwrap_err();
        assert!(error.contains(sentence), "{error}");
    }
    let fixed = "[tailnet.default]\nnamespace_tag = true\n[tailnet.default.credentials]\nkind = \"auth-key\"\n\
                 auth_key_file = \"/key\"";
    assert!(load(fixed).unwrap_err().contains("tailnet.default.namespace_tag"), "a key's tags are fixed");
}

#[test]
fn headscale_is_asked_where_control_is() {
    let file = r#"
        [tailnet.default]
        control_url = "https://hs.example:8443/some/path"
        [tailnet.default.credentials]
        kind = "headscale"
        api_key_file = "/etc/podtether/key"
        user = "ref"
    "#;
    let config = load(file).unwrap();
    let Credentials::Headscale { api_url, user, auth_key_ttl, .. } = &config.tailnets["default"].credentials
    else {
        panic!()
    };
    assert_eq!((api_url.as_str(), user.as_deref()), ("https://hs.example:8443", Some("ref")));
    assert_eq!(auth_key_ttl.as_secs(), 300);
    let elsewhere = [("tailnet.default.credentials.api_url", "http://127.0.0.1:8080/")];
    let config = with(&[], &elsewhere, file).unwrap();
    let Credentials::Headscale { api_url, .. } = &config.tailnets["default"].credentials else { panic!() };
    assert_eq!(api_url, "http://127.0.0.1:8080");
    assert!(config.to_string().contains("kind=\"headscale\""), "{config}");
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let config = with(
        &[],
        &[
            ("tailnet.default.ca_file", dir.path().join("ca").to_str().unwrap()),
            ("tailnet.default.credentials.client_secret_file", dir.path().join("empty").to_str().unwrap()),
            ("tailnet.default.credentials.client_id_file", dir.path().join("id").to_str().unwrap()),
        ],
        MINIMAL,
    )
    .unwrap();
    std::fs::write(dir.path().join("empty"), "\n").unwrap();
    std::fs::write(dir.path().join("id"), "id").unwrap();
    let wrong: Vec<String> = config.unusable_files().iter().map(ToString::to_string).collect();
    assert_eq!(wrong.len(), 2, "{wrong:?}");
    assert!(wrong[0].starts_with("tailnet.default.ca_file: cannot read "), "{wrong:?}");
    assert!(wrong[1].starts_with("tailnet.default.credentials.client_secret_file: "), "{wrong:?}");
    assert!(wrong[1].ends_with("is empty"), "{wrong:?}");
}

#[test]
fn mistakes_are_named() {
    let table = [
        // appended to MINIMAL, the message holds
        (
            "[node]\nstate_dirr = \"/x\"",
            "unknown key node.state_dirr in /x/supervisor.toml, did you mean state_dir?",
        ),
        ("[node]\nuid_base = \"x\"", "node.uid_base in /x/supervisor.toml: expected a whole number"),
        ("[node]\nuid_base = -4", "node.uid_base"),
        ("[nodes]\nx = 1", "unknown key nodes"),
        ("[node]\nhttp_listen = \"0.0.0.0:9465\"", "must be a loopback address"),
        ("[node]\nhttp_listen = \"9465\"", "is no address with a port"),
        ("[node]\nudp_port_range = \"9-1\"", "node.udp_port_range"),
        ("[node]\nidentity_grace = \"soon\"", "node.identity_grace"),
        ("[node]\nexclude_cidrs = [\"10.0.0.0\"]", "node.exclude_cidrs"),
        ("[node]\nexclude_cidrs = \"10.0.0.0/8\"", "expected a list of texts"),
        ("[node]\ncluster_cidrs = [\"10.0.0.0/40\"]", "node.cluster_cidrs"),
        (
            "[tailnet.b]\nexit_node = \"a node\"",
            "tailnet.b.exit_node (/x/supervisor.toml): `a node` is no node",
        ),
        ("[tailnet.b]\naccept_routes = \"yes\"", "expected true or false"),
        ("[node]\nstate_dir = \"var\"", "is no absolute path"),
        ("[node]\nrequire_sandbox = \"yes\"", "expected true or false"),
        ("[tailnet.b]\ncontrol_url = \"ftp://x\"", "tailnet.b.control_url"),
        ("[tailnet.b]\ntags = [\"web\"]", "`web` is no tag"),
        ("[tailnet.b]\nhostname_template = \"{node}\"", "tailnet.b.hostname_template"),
        ("[tailnet.b]\nfoo = 1", "unknown key tailnet.b.foo"),
        ("[tailnet.b.credentials]\nauth_key_file = \"/k\"", "tailnet.b.credentials.kind: is missing"),
        (
            "[tailnet.b.credentials]\nkind = \"interactive\"\nauth_key_file = \"/k\"",
            "does not belong to kind = \"interactive\"",
        ),
        ("[tailnet.b.credentials]\nkind = \"headscale\"", "tailnet.b.credentials.api_key_file"),
        (
            "[tailnet.b.credentials]\nkind = \"headscale\"\napi_key_file = \"/k\"",
            "tailnet.b.credentials.user: is missing",
        ),
        (
            "[tailnet.b.credentials]\nkind = \"headscale\"\nauth_key_file = \"/k\"",
            "does not belong to kind = \"headscale\"",
        ),
        (
            "[tailnet.b.credentials]\nkind = \"auth-key\"\nauth_key_file = \"/k\"\nuser = \"x\"",
            "does not belong to kind = \"auth-key\"",
        ),
        ("[tailnet.b.credentials]\nkind = \"magic\"", "`magic` is none of"),
        ("[tailnet.b.credentials]\nkind = \"auth-key\"", "tailnet.b.credentials.auth_key_file: is missing"),
        (
            "[tailnet.b.credentials]\nkind = \"auth-key\"\nauth_key_file = \"/k\"\nclient_id_file = \"/i\"",
            "client_id_file (/x/supervisor.toml): does not belong",
        ),
        ("[tailnet.B]\n", "a tailnet's name is"),
        ("[[[", "is not TOML"),
    ];
    for (more, want) in table {
        let error = load(&format!("{MINIMAL}\n{more}")).unwrap_err();
        assert!(error.contains(want), "{more:?} said {error:?}");
        assert!(!error.contains('\n'), "{error:?}");
    }
    assert!(load("").unwrap_err().contains("no tailnet is configured"));
}

#[test]
fn later_sources_win() {
    let env = [("PODTETHER_NODE_CLUSTER_NAME", "env"), ("PODTETHER_NODE_UID_BASE", "300000")];
    let config = with(&env, &[("node.cluster_name", "flag")], MINIMAL).unwrap();
    assert_eq!(config.node.cluster_name, "flag");
    assert_eq!(config.node.uid_base, 300_000);
}

#[test]
fn the_environment_reaches_every_tailnet() {
    let env = [
        ("PODTETHER_TAILNET_EU_WEST_CONTROL_URL", "https://h.example"),
        ("PODTETHER_TAILNET_EU_WEST_CREDENTIALS_KIND", "auth-key"),
        ("PODTETHER_TAILNET_EU_WEST_CREDENTIALS_AUTH_KEY_FILE", "/k"),
        ("PODTETHER_TAILNET_DEFAULT_TAGS", "tag:a, tag:b"),
        ("PODTETHER_BIN_DIR", "/not/ours"),
    ];
    let config = with(&env, &[], MINIMAL).unwrap();
    assert_eq!(config.tailnets["eu-west"].control_url, "https://h.example");
    assert_eq!(config.tailnets["default"].tags, ["tag:a", "tag:b"]);
    let error = with(&[("PODTETHER_NODE_NONSENSE", "1")], &[], MINIMAL).unwrap_err();
    assert_eq!(error, "unknown key node.nonsense in PODTETHER_NODE_NONSENSE");
    assert!(
        with(&[("PODTETHER_TAILNET_NOPE", "1")], &[], MINIMAL)
            .unwrap_err()
            .contains("PODTETHER_TAILNET_NOPE")
    );
    assert!(
        with(&[("PODTETHER_NODE_REQUIRE_SANDBOX", "maybe")], &[], MINIMAL).unwrap_err().contains("maybe")
    );
}

#[test]
fn the_predecessors_names_still_work() {
    let env = [
        ("TS_OAUTH_CLIENT_ID", "kid"),
        ("TS_OAUTH_CLIENT_SECRET", "tskey-client-hush"),
        ("TS_TAGS", "tag:x"),
        ("CLUSTER_NAME", "prod"),
        ("AUTH_KEY_TTL", "10m"),
    ];
    let config = with(&env, &[], "").unwrap();
    let Credentials::OAuth { client_id, client_secret, auth_key_ttl, .. } =
        &config.tailnets["default"].credentials
    else {
        panic!()
    };
    assert_eq!(client_id.read().unwrap().expose(), "kid");
    assert_eq!(client_secret.read().unwrap().expose(), "tskey-client-hush");
    assert_eq!(auth_key_ttl.as_secs(), 600);
    assert_eq!(config.node.cluster_name, "prod");
    assert_eq!(config.tailnets["default"].tags, ["tag:x"]);
    assert!(!config.to_string().contains("hush"));
    assert!(!format!("{config:?}").contains("hush"));
}

#[test]
fn without_credentials_a_person_lets_devices_in() {
    for credentials in ["", "[tailnet.p.credentials]\nkind = \"interactive\""] {
        let config =
            load(&format!("[tailnet.p]\ncontrol_url = \"https://h.example\"\n{credentials}")).unwrap();
        assert_eq!(config.tailnets["p"].credentials, Credentials::Interactive);
        assert!(config.to_string().contains("kind=\"interactive\""), "{config}");
    }
}

#[test]
fn a_proxy_comes_from_the_usual_variables_and_never_prints() {
    let config = with(&[], &[], MINIMAL).unwrap();
    assert_eq!(config.node.proxy, None);
    let env = [
        ("https_proxy", "http://lower.example:1"),
        ("HTTPS_PROXY", "http://u:hush@proxy.example:3128"),
        ("no_proxy", "10.0.0.0/8,.svc"),
    ];
    let config = with(&env, &[], MINIMAL).unwrap();
    let proxy = config.node.proxy.clone().unwrap();
    assert_eq!(
        (proxy.url.expose(), proxy.bypass.as_str()),
        ("http://u:hush@proxy.example:3128", "10.0.0.0/8,.svc")
    );
    assert!(!config.to_string().contains("hush") && !format!("{config:?}").contains("hush"));
    for bad in ["proxy.example", "https://u:hush@p", "socks5://p:1"] {
        let error = with(&[("HTTPS_PROXY", bad)], &[], MINIMAL).unwrap_err();
        assert!(error.contains("HTTPS_PROXY") && !error.contains("hush"), "{error}");
    }
}

#[test]
fn every_key_is_a_flag() {
    arguments().debug_assert();
    let matches = arguments()
        .try_get_matches_from([
            "s",
            "--config",
            "/dev/null",
            "--node-state-dir",
            "/s",
            "--tailnet-default-credentials-kind",
            "auth-key",
            "--tailnet-default-credentials-auth-key-file",
            "/k",
            "--set",
            "tailnet.b.credentials.kind=auth-key",
            "--set",
            "tailnet.b.credentials.auth_key_file=/k2",
        ])
        .unwrap();
    let mut inputs = inputs_from(&matches).unwrap();
    inputs.env.clear();
    let config = Config::load(&inputs).unwrap();
    assert_eq!(config.node.state_dir.to_str(), Some("/s"));
    assert_eq!(config.tailnets.len(), 2);
}

proptest::proptest! {
    #[test]
    fn fuzz_any_file_is_refused_in_one_line(text in "(\\[(node|tailnet|tailnet.default|x)\\]\n|[a-z_.]{1,12} ?= ?([0-9]{1,3}|\"[ -~]{0,9}\"|true|\\[\\])\n|.{0,20}\n){0,8}") {
        if let Err(error) = load(&text) {
            proptest::prop_assert!(!error.contains('\n') && !error.is_empty());
        }
    }

    #[test]
    fn fuzz_values(text in ".{0,30}") {
        let _ = parse_duration(&text);
        let _ = value::parse_port_range(&text);
    }
}
