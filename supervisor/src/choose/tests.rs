//! One line per cell: annotation, level, and whether it is granted.

use super::*;
use crate::config::Inputs;

const CONFIG: &str = r#"
[tailnet.default]
control_url = "http://127.0.0.1:8080"
tags = ["tag:k8s-pod", "tag:batch"]
exit_node = "gw-0"
[tailnet.default.credentials]
kind = "oauth"
client_id_file = "/id"
client_secret_file = "/secret"
[tailnet.prod]
control_url = "http://127.0.0.1:8081"
tags = ["tag:prod"]
namespace_tag = true
ephemeral = true
accept_routes = true
[tailnet.prod.credentials]
kind = "headscale"
api_key_file = "/key"
[tailnet.fixed]
control_url = "http://127.0.0.1:8082"
[tailnet.fixed.credentials]
kind = "auth-key"
auth_key_file = "/key"
[namespace.shop]
tags = ["tag:web", "tag:shop-*"]
hostnames = ["db", "shop-*"]
exit_nodes = ["gw-1"]
tailnets = ["prod", "fixed"]
[namespace."*"]
hostnames = ["{namespace}-x-*"]
tags = ["tag:team-{namespace}"]
[node]
cluster_name = "k8s"
exempt_namespaces = ["kube-system"]
"#;

fn config(more: &str) -> Config {
    let file = Some(format!("{CONFIG}\n{more}"));
    Config::load(&Inputs { path: "supervisor.toml".into(), file, ..Inputs::default() }).unwrap()
}

fn annotations(of: &[(&str, &str)]) -> Annotations {
    of.iter().map(|(key, value)| (format!("{PREFIX}{key}"), (*value).to_owned())).collect()
}

type Pairs<'a> = &'a [(&'a str, &'a str)];

fn decide(config: &Config, namespace: &str, own: Pairs<'_>, defaults: Pairs<'_>) -> Verdict {
    let (own, defaults) = (annotations(own), annotations(defaults));
    let facts = Facts {
        namespace,
        pod: "web-5d4f8c7b9-x2x4z",
        own: &own,
        defaults: &defaults,
        owner: Some("ReplicaSet"),
        tailnet: "default",
    };
    choose(&facts, config)
}

/// What a verdict says of one setting, as a person would be told: value and source, or what is refused.
fn cell(verdict: &Verdict, key: Key) -> String {
    let told = match verdict {
        Verdict::Refused(refused) => {
            let one = refused.refusals.iter().find(|r| r.key == key);
            return one.map_or("other".into(), |r| format!("refused ({}): {}", r.source, r.why));
        }
        Verdict::Nothing(told) => told,
        Verdict::Join(choice) => &choice.told,
    };
    let of_key: Vec<&Setting> = told.settings.iter().filter(|s| s.name == key.name()).collect();
    let said = of_key.iter().map(|s| format!("{} ({})", s.value, s.source));
    said.collect::<Vec<_>>().join(" + ")
}

/// Annotation, value, what comes of it in a namespace that was given a lot, and in one that was given nothing.
const CELLS: &[(Key, &str, &str, &str)] = &[
    (Key::Enabled, "true", "true", "true"),
    (Key::Enabled, "false", "false", "false"),
    (Key::Enabled, "yes", "refused: is neither true nor false", "refused: is neither true nor false"),
    (Key::Enabled, "", "refused: is neither true nor false", "refused: is neither true nor false"),
    (Key::Tags, "tag:batch", "tag:batch", "tag:batch"),
    (Key::Tags, "tag:web, tag:shop-a", "tag:web,tag:shop-a", "refused: asks for tag:web, which"),
    (Key::Tags, "tag:k8s-pod,tag:admin", "refused: asks for tag:admin, which", "refused: asks for tag:admin"),
    (Key::Tags, "tag:team-shop", "tag:team-shop", "refused: asks for tag:team-shop"),
    (Key::Tags, "tag:shop", "refused: asks for tag:shop", "refused: asks for tag:shop"),
    (Key::Tags, "web", "refused: has \"web\", which is no tag", "refused: has \"web\", which is no tag"),
    (Key::Tags, "", "refused: has \"\", which is no tag", "refused: has \"\", which is no tag"),
    (Key::Tags, "tag:a\u{7}", "refused: has \"tag:a\\u{7}\"", "refused: has \"tag:a\\u{7}\""),
    (Key::Hostname, "db", "db", "refused: comes to db, a name"),
    (Key::Hostname, "shop-{workload}", "shop-web", "refused: comes to shop-web"),
    (Key::Hostname, "{namespace}-x-{pod}", "shop-x-web-5d4f8c7b9-x2x4z", "other-x-web-5d4f8c7b9-x2x4z"),
    (Key::Hostname, "admin", "refused: comes to admin", "refused: comes to admin"),
    (Key::Hostname, "Db", "refused: is no host name", "refused: is no host name"),
    (Key::Hostname, "a.b", "refused: is no host name", "refused: is no host name"),
    (Key::Hostname, "-a", "refused: is no host name", "refused: is no host name"),
    (Key::Hostname, "", "refused: is empty", "refused: is empty"),
    (Key::Hostname, "{node}", "refused: {node} is none of", "refused: {node} is none of"),
    (Key::Ephemeral, "true", "true", "true"),
    (Key::Ephemeral, "1", "refused: is neither true nor false", "refused: is neither true nor false"),
    (Key::ExitNode, "gw-0", "gw-0", "gw-0"),
    (Key::ExitNode, "", "", ""),
    (Key::ExitNode, "gw-1", "gw-1", "refused: is an exit node that"),
    (Key::ExitNode, "gw-2", "refused: is an exit node that", "refused: is an exit node that"),
    (Key::ExitNode, "not a node", "refused: is no node", "refused: is no node"),
    (Key::AcceptRoutes, "true", "true", "true"),
    (Key::AcceptRoutes, "maybe", "refused: is neither true nor false", "refused: is neither true nor false"),
    (Key::Required, "false", "false", "false"),
    (Key::Required, "no", "refused: is neither true nor false", "refused: is neither true nor false"),
    (Key::Tailnet, "default", "default", "default"),
    (Key::Tailnet, "prod", "prod", "refused: is no tailnet that namespace other may use"),
    (Key::Tailnet, "nowhere", "refused: is no tailnet that namespace shop", "refused: is no tailnet"),
    (Key::Tailnet, "../x", "refused: is no tailnet that namespace shop", "refused: is no tailnet"),
];

#[test]
fn every_annotation_on_every_level_granted_and_not() {
    let config = config("");
    for (key, value, in_shop, elsewhere) in CELLS {
        for (namespace, wanted) in [("shop", in_shop), ("other", elsewhere)] {
            let given = [(key.name(), *value)];
            for (source, own, defaults) in
                [(Source::Pod, &given[..], &[][..]), (Source::Namespace, &[][..], &given[..])]
            {
                let verdict = decide(&config, namespace, own, defaults);
                let said = cell(&verdict, *key);
                let wanted = match wanted.strip_prefix("refused: ") {
                    Some(why) => format!("refused ({source}): {why}"),
                    None => format!("{wanted} ({source})"),
                };
                assert!(said.starts_with(&wanted), "{key:?} {value:?} {namespace}: {said}, not {wanted}");
                if let Verdict::Refused(refused) = &verdict {
                    let sentence = refused.refusals[0].to_string();
                    assert!(sentence.contains(&key.annotation()), "{sentence}");
                    assert!(!sentence.contains(char::is_control) && sentence.len() < 500, "{sentence}");
                    assert!(!refused.refusals[0].fix.is_empty());
                }
            }
        }
    }
}

#[test]
fn without_annotations_the_clusters_configuration_counts() {
    let config = config("");
    let verdict = decide(&config, "other", &[], &[]);
    let Verdict::Join(choice) = &verdict else { panic!("{verdict:?}") };
    for (key, wanted) in [
        (Key::Enabled, "true (cluster)"),
        (Key::Tags, "tag:k8s-pod,tag:batch (cluster)"),
        (Key::Hostname, "k8s-other-web-5d4f8c7b9-x2x4z (cluster)"),
        (Key::Ephemeral, "false (cluster)"),
        (Key::ExitNode, "gw-0 (cluster)"),
        (Key::AcceptRoutes, "false (cluster)"),
        (Key::Required, "true (cluster)"),
        (Key::Tailnet, "default (cluster)"),
    ] {
        assert_eq!(cell(&verdict, key), wanted);
    }
    assert_eq!((choice.tailnet.as_str(), choice.required, choice.ephemeral), ("default", true, false));
    assert_eq!(choice.tags, ["tag:batch", "tag:k8s-pod"]);
    assert!(choice.told.settings.iter().all(|s| !s.rule.is_empty()), "{choice:?}");
}

#[test]
fn the_pods_own_annotation_goes_before_its_namespaces_for_every_key() {
    let config = config("");
    for (key, own, default) in [
        (Key::Enabled, "true", "false"),
        (Key::Tags, "tag:web", "tag:batch"),
        (Key::Hostname, "db", "shop-a"),
        (Key::Ephemeral, "true", "false"),
        (Key::ExitNode, "gw-1", ""),
        (Key::AcceptRoutes, "true", "false"),
        (Key::Required, "false", "true"),
        (Key::Tailnet, "prod", "default"),
    ] {
        let verdict = decide(&config, "shop", &[(key.name(), own)], &[(key.name(), default)]);
        assert!(cell(&verdict, key).starts_with(&format!("{own} (pod)")), "{}", cell(&verdict, key));
        // What the pod does not use of its namespace's may be wrong.
        let verdict = decide(&config, "shop", &[(key.name(), own)], &[(key.name(), "\0")]);
        assert!(cell(&verdict, key).starts_with(&format!("{own} (pod)")), "{}", cell(&verdict, key));
        let verdict = decide(&config, "shop", &[(key.name(), "\0")], &[(key.name(), own)]);
        assert!(cell(&verdict, key).starts_with("refused (pod)"), "{}", cell(&verdict, key));
    }
}

#[test]
fn who_joins() {
    let (out, only) = (config(""), config("join = \"opt-in\""));
    let joins = |config: &Config, namespace: &str, own: Pairs<'_>, defaults: Pairs<'_>| {
        let verdict = decide(config, namespace, own, defaults);
        assert!(!matches!(verdict, Verdict::Refused(_)), "{verdict:?}");
        (matches!(verdict, Verdict::Join(_)), cell(&verdict, Key::Enabled))
    };
    let (yes, no) = ([("enabled", "true")], [("enabled", "false")]);
    for (config, own, defaults, wanted, why) in [
        (&out, &[][..], &[][..], true, "true (cluster)"),
        (&only, &[], &[], false, "false (cluster)"),
        (&out, &no, &[], false, "false (pod)"),
        (&only, &yes, &[], true, "true (pod)"),
        (&out, &[], &no, false, "false (namespace)"),
        (&only, &[], &yes, true, "true (namespace)"),
        (&out, &yes, &no, true, "true (pod)"),
        (&only, &no, &yes, false, "false (pod)"),
    ] {
        assert_eq!(joins(config, "shop", own, defaults), (wanted, why.to_owned()));
        assert_eq!(joins(config, "kube-system", own, defaults), (false, "false (policy)".to_owned()));
    }
    // Whoever joins nothing need not be right about how.
    assert!(!joins(&only, "shop", &[("tags", "nonsense")], &[]).0);
    assert!(!joins(&out, "shop", &[("enabled", "false"), ("tags", "nonsense")], &[]).0);
}

#[test]
fn tailnets_bring_their_own_defaults_and_limits() {
    let config = config("");
    let verdict = decide(&config, "shop", &[("tailnet", "prod")], &[]);
    let Verdict::Join(choice) = &verdict else { panic!("{verdict:?}") };
    assert_eq!(choice.tags, ["tag:ns-shop", "tag:prod"]);
    assert_eq!(cell(&verdict, Key::Tags), "tag:prod (cluster) + tag:ns-shop (policy)");
    assert!(choice.ephemeral && choice.routing.accept_routes && choice.routing.exit_node.is_none());
    let verdict = decide(&config, "shop", &[("tailnet", "prod"), ("tags", "tag:web")], &[]);
    let Verdict::Join(choice) = &verdict else { panic!("{verdict:?}") };
    assert_eq!(choice.tags, ["tag:ns-shop", "tag:web"], "no annotation takes the namespace's tag away");

    let verdict = decide(&config, "shop", &[("tailnet", "fixed")], &[]);
    assert!(matches!(verdict, Verdict::Join(_)), "{verdict:?}");
    let verdict = decide(&config, "shop", &[("tailnet", "fixed"), ("tags", "tag:web")], &[]);
    assert!(cell(&verdict, Key::Tags).contains("fixed by its auth key"), "{verdict:?}");

    let own = Annotations::new();
    let facts = Facts { namespace: "a", pod: "b", own: &own, defaults: &own, owner: None, tailnet: "no" };
    let Verdict::Refused(refused) = choose(&facts, &config) else { panic!() };
    let sentence = refused.refusals[0].to_string();
    assert!(
        sentence.starts_with("no tailnet is called \"no\"") && !sentence.contains("annotation"),
        "{sentence}"
    );
    assert!(sentence.contains("default, fixed, prod"), "{sentence}");
}

#[test]
fn all_that_is_wrong_is_told_at_once_bounded_and_escaped() {
    let config = config("");
    let long = "ü".repeat(5000);
    let own = [("tags", long.as_str()), ("ephemeral", "\u{1b}[31m"), ("required", "false")];
    let Verdict::Refused(refused) = decide(&config, "shop", &own, &[("accept-routes", "2")]) else {
        panic!()
    };
    assert!(!refused.required, "it says that it need not join");
    let keys: Vec<Key> = refused.refusals.iter().map(|r| r.key).collect();
    assert_eq!(keys, [Key::Tags, Key::Ephemeral, Key::AcceptRoutes]);
    assert_eq!(refused.told.refusals.len(), 3);
    for sentence in &refused.told.refusals {
        assert!(sentence.len() < 700 && !sentence.contains(char::is_control), "{sentence}");
    }
    assert!(refused.told.refusals[2].contains("\"2\" of the namespace"), "{}", refused.told.refusals[2]);
    let many = vec!["tag:batch"; MAX_TAGS + 1].join(",");
    let verdict = decide(&config, "shop", &[("tags", &many)], &[]);
    assert!(cell(&verdict, Key::Tags).contains("more than 16 tags"), "{verdict:?}");
}

#[test]
fn what_looks_like_ours_and_is_not_read_is_noted() {
    let config = config("");
    let own = [("tag", "tag:web"), ("expose", "true"), ("tags", "tag:batch")];
    let Verdict::Join(choice) = decide(&config, "shop", &own, &[("host\nname", "x")]) else { panic!() };
    let notes = &choice.told.notes;
    assert_eq!(notes.len(), 2, "{notes:?}");
    assert!(notes[0].contains("tailscale.com/tag of the pod is not read"), "{notes:?}");
    assert!(notes[1].contains("host\\nname of the namespace"), "{notes:?}");
}

#[test]
fn patterns() {
    for (pattern, text, wanted) in [
        ("a", "a", true),
        ("a", "ab", false),
        ("a-*", "a-b", true),
        ("a-*", "a-", true),
        ("a-*", "b-a-", false),
        ("*", "", true),
        ("*-db", "shop-db", true),
        ("*-db", "shop-db-2", false),
        ("a*b*c", "aXbYbc", true),
        ("a*b*c", "ac", false),
        ("", "", true),
        ("", "a", false),
    ] {
        assert_eq!(policy::matches(pattern, text), wanted, "{pattern} {text}");
    }
}

proptest::proptest! {
    #[test]
    fn fuzz_no_annotation_gives_what_was_not_given(
        values in proptest::collection::vec("[a-z:,{}*. -]{0,24}|true|false|tag:[a-z-]{1,8}|.{0,40}", 16),
    ) {
        let config = config("");
        let of = |from: usize| -> Annotations {
            let pairs = ANNOTATIONS.iter().zip(&values[from..]);
            pairs.filter(|(_, v)| v.len() % 3 != 0).map(|(k, v)| (k.annotation(), v.clone())).collect()
        };
        let (own, defaults) = (of(0), of(8));
        let facts = Facts {
            namespace: "other", pod: "p-0", own: &own, defaults: &defaults, owner: None, tailnet: "default",
        };
        match choose(&facts, &config) {
            Verdict::Join(choice) => {
                proptest::prop_assert_eq!(choice.tailnet, "default");
                let own = ["tag:k8s-pod", "tag:batch", "tag:team-other"];
                proptest::prop_assert!(choice.tags.iter().all(|t| own.contains(&t.as_str())));
                let name = &choice.names.wanted;
                proptest::prop_assert!(name == "k8s-other-p-0" || name.starts_with("other-x-"), "{}", name);
                proptest::prop_assert!(choice.routing.exit_node.is_none_or(|n| n == "gw-0"));
            }
            Verdict::Nothing(told) => proptest::prop_assert!(!told.joins),
            Verdict::Refused(refused) => proptest::prop_assert!(!refused.refusals.is_empty()),
        }
    }
}
