//! What `deploy/` renders to: objects that Kubernetes takes, down to the last field, the chart's the same as
//! kustomize's, and configurations that the supervisor takes.
//!
//! The base and the chart's default are checked everywhere. Overlays need kubectl, and the chart's templates helm on
//! PATH; without, this says what it did not check. So that nobody changes a template without rendering it, the
//! rendered chart is kept with a hash of its sources: `make chart`, with helm.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]
#![allow(clippy::print_stdout, reason = "what was not checked is for people to know")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Service, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use podtether_supervisor::config::{Config, Inputs, arguments};
use podtether_supervisor::install_cni;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// Rendered by a helm without a cluster, which assumes an old one otherwise.
const HELM: [&str; 6] = [
    "template",
    "podtether",
    "--namespace=podtether",
    "--kube-version=1.34.0",
    "--skip-tests",
    "--include-crds",
];

/// The ConfigMap with `supervisor.toml`.
const CONFIG: &str = "podtether-config";

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn read(path: &str) -> String {
    let path = deploy().join(path);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn documents(yaml: &str) -> Vec<Value> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(yaml).unwrap();
    documents.into_iter().filter(|document| !document.is_null()).collect()
}

/// Kind and name.
fn key(object: &Value) -> (String, String) {
    let name = object["metadata"]["name"].as_str().unwrap().to_owned();
    (object["kind"].as_str().unwrap().to_owned(), name)
}

/// Whatever the type does not know is lost on the way through it.
fn is_a<T: DeserializeOwned + Serialize>(object: &Value) {
    let typed: T =
        serde_json::from_value(object.clone()).unwrap_or_else(|e| panic!("{:?}: {e}", key(object)));
    let mut back = serde_json::to_value(typed).unwrap();
    for field in ["apiVersion", "kind"] {
        back[field] = object[field].clone();
    }
    assert_eq!(back, *object, "a field that Kubernetes does not have, or an empty one");
}

fn check(objects: &[Value]) {
    for object in objects {
        let kind = (object["apiVersion"].as_str().unwrap(), object["kind"].as_str().unwrap());
        match kind {
            ("v1", "Namespace") => is_a::<Namespace>(object),
            ("v1", "ServiceAccount") => is_a::<ServiceAccount>(object),
            ("v1", "ConfigMap") => is_a::<ConfigMap>(object),
            ("v1", "Service") => is_a::<Service>(object),
            ("apps/v1", "DaemonSet") => is_a::<DaemonSet>(object),
            ("rbac.authorization.k8s.io/v1", "ClusterRole") => is_a::<ClusterRole>(object),
            ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding") => is_a::<ClusterRoleBinding>(object),
            ("rbac.authorization.k8s.io/v1", "Role") => is_a::<Role>(object),
            ("rbac.authorization.k8s.io/v1", "RoleBinding") => is_a::<RoleBinding>(object),
            // The operator's own; its types are not Kubernetes'.
            ("monitoring.coreos.com/v1", "PodMonitor" | "ServiceMonitor" | "PrometheusRule") => {}
            other => panic!("{other:?} is unknown here"),
        }
        if kind.1 == "DaemonSet" {
            commands_are_understood(object);
        }
        if let Some(config) = object["data"]["supervisor.toml"].as_str() {
            configuration(config);
        }
    }
    if let Some(set) = objects.iter().find(|object| object["kind"] == "DaemonSet") {
        its_end_can_be_seen(objects, set);
    }
}

/// The Role names the DaemonSet, and `install-cni` asks for that: else our entry stays when all is uninstalled.
fn its_end_can_be_seen(objects: &[Value], set: &Value) {
    let (namespace, name) = (set["metadata"]["namespace"].as_str().unwrap(), &set["metadata"]["name"]);
    let rules = objects.iter().filter(|object| object["kind"] == "Role").flat_map(|role| {
        assert_eq!(role["metadata"]["namespace"], namespace);
        role["rules"].as_array().unwrap()
    });
    let named: Vec<&Value> = rules.filter_map(|rule| rule["resourceNames"].as_array()).flatten().collect();
    assert_eq!(named, [name]);
    let argument = format!("--daemonset={namespace}/{}", name.as_str().unwrap());
    let cni = &set["spec"]["template"]["spec"]["containers"][1]["args"];
    assert!(cni.as_array().unwrap().contains(&argument.clone().into()), "{argument}: {cni}");
}

/// A configuration as the supervisor prints it.
fn configuration(toml: &str) -> String {
    let inputs = Inputs { path: "supervisor.toml".into(), file: Some(toml.to_owned()), ..Inputs::default() };
    Config::load(&inputs).unwrap_or_else(|e| panic!("{e}\n{toml}")).to_string()
}

/// The programs take the arguments, and every mount has its volume.
fn commands_are_understood(set: &Value) {
    let spec = &set["spec"]["template"]["spec"];
    let names = |list: &Value| -> Vec<String> {
        list.as_array().into_iter().flatten().map(|x| x["name"].as_str().unwrap().to_owned()).collect()
    };
    let volumes = names(&spec["volumes"]);
    for container in spec["containers"].as_array().unwrap() {
        assert!(names(&container["volumeMounts"]).iter().all(|name| volumes.contains(name)), "{container}");
        let words = |list: &Value| -> Vec<String> {
            list.as_array().into_iter().flatten().map(|x| x.as_str().unwrap().to_owned()).collect()
        };
        let whole = [words(&container["command"]), words(&container["args"])].concat();
        let probe = words(&container["readinessProbe"]["exec"]["command"]);
        for mut command in [whole, probe].into_iter().filter(|command| !command.is_empty()) {
            if container["env"].to_string().contains("PODTETHER_NODE_NAME") && container["name"] == "cni" {
                command.push("--node=n".into());
            }
            let known = arguments().subcommands(install_cni::commands());
            known.try_get_matches_from(&command).unwrap_or_else(|e| panic!("{command:?}: {e}"));
        }
    }
}

fn sort(list: &mut Value, by: &str) {
    let list = list.as_array_mut().unwrap();
    list.sort_by_key(|item| item[by].as_str().unwrap().to_owned());
}

fn volumes(object: &mut Value) -> impl Iterator<Item = &mut Value> {
    object.pointer_mut("/spec/template/spec/volumes").and_then(Value::as_array_mut).into_iter().flatten()
}

/// Objects by kind and name, without what a tool adds so that a change of the configuration is rolled out.
fn comparable(objects: &[Value]) -> BTreeMap<(String, String), Value> {
    let hashed = objects.iter().map(key).find(|(kind, _)| kind == "ConfigMap").unwrap().1;
    let plain = |object: &Value| {
        let mut object = object.clone();
        // Nobody else may be called so: kustomize writes the name with the hash wherever it finds the bare one.
        let config = |name: &mut Value| {
            if *name == hashed {
                *name = CONFIG.into();
            }
        };
        if object["kind"] == "ConfigMap" {
            config(&mut object["metadata"]["name"]);
        }
        for volume in volumes(&mut object) {
            for source in
                volume.pointer_mut("/projected/sources").and_then(Value::as_array_mut).into_iter().flatten()
            {
                if let Some(name) = source.pointer_mut("/configMap/name") {
                    config(name);
                }
            }
        }
        if let Some(template) = object.pointer_mut("/spec/template/metadata").and_then(Value::as_object_mut) {
            template.remove("annotations");
        }
        // Patches put theirs first; the order means nothing.
        if let Some(spec) = object.pointer_mut("/spec/template/spec") {
            sort(&mut spec["volumes"], "name");
            for container in spec["containers"].as_array_mut().unwrap() {
                sort(&mut container["volumeMounts"], "mountPath");
            }
        }
        if let Some(config) = object.pointer_mut("/data/supervisor.toml") {
            *config = configuration(config.as_str().unwrap()).into();
        }
        object
    };
    objects.iter().map(plain).map(|object| (key(&object), object)).collect()
}

/// The base without kubectl: a list of files, a namespace, and a ConfigMap.
fn base() -> Vec<Value> {
    let list = documents(&read("kustomize/base/kustomization.yaml")).remove(0);
    let files = list["resources"].as_array().unwrap();
    let mut objects: Vec<Value> = files
        .iter()
        .flat_map(|file| documents(&read(&format!("kustomize/base/{}", file.as_str().unwrap()))))
        .collect();
    assert_eq!(list["configMapGenerator"], json!([{"name": CONFIG, "files": ["supervisor.toml"]}]));
    let metadata = json!({"name": CONFIG, "namespace": "podtether"});
    let data = json!({"supervisor.toml": read("kustomize/base/supervisor.toml")});
    objects.push(json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}));
    objects
}

fn on_path(program: &str) -> bool {
    let there =
        std::env::var("PATH").unwrap_or_default().split(':').any(|dir| Path::new(dir).join(program).exists());
    if !there {
        println!("{program} is not on PATH: what it renders was not checked");
    }
    there
}

fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(arguments).current_dir(deploy()).output().unwrap();
    if output.status.success() {
        Ok(String::from_utf8(output.stdout).unwrap())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

fn kustomize(dir: &str) -> Vec<Value> {
    documents(&run("kubectl", &["kustomize", &format!("kustomize/{dir}")]).unwrap())
}

fn helm(settings: &[&str]) -> Result<String, String> {
    let mut arguments = HELM.to_vec();
    arguments.insert(2, "helm/podtether");
    arguments.extend(settings.iter().flat_map(|setting| ["--set", *setting]));
    run("helm", &arguments)
}

fn daemon_set(objects: &[Value]) -> &Value {
    objects.iter().find(|object| object["kind"] == "DaemonSet").unwrap()
}

#[test]
fn kubernetes_takes_the_base_and_so_does_the_supervisor() {
    check(&base());
}

#[test]
fn a_field_that_kubernetes_does_not_have_is_found() {
    let mut objects = base();
    let set = objects.iter_mut().find(|object| object["kind"] == "DaemonSet").unwrap();
    set["spec"]["template"]["spec"]["hostPid"] = true.into();
    let set = set.clone();
    let found = std::panic::catch_unwind(|| check(&[set]));
    assert!(found.is_err());
}

#[test]
fn every_overlay_renders_to_what_kubernetes_takes() {
    if !on_path("kubectl") {
        return;
    }
    assert_eq!(comparable(&kustomize("base")), comparable(&base()));
    let base = comparable(&base());
    for (overlay, changed) in [
        ("overlays/tailscale", &["ConfigMap"][..]),
        ("overlays/headscale", &["ConfigMap"][..]),
        ("overlays/k3s", &["DaemonSet"][..]),
        ("overlays/opt-out", &["DaemonSet"][..]),
        ("overlays/taint", &["DaemonSet", "ClusterRole", "ClusterRoleBinding"][..]),
    ] {
        let objects = kustomize(overlay);
        check(&objects);
        let rendered = comparable(&objects);
        let mut different: Vec<&str> = rendered
            .iter()
            .filter(|(key, object)| base.get(*key) != Some(*object))
            .map(|(key, _)| &*key.0)
            .collect();
        different.retain(|kind| !changed.contains(kind));
        assert_eq!(different, [""; 0], "{overlay}");
        assert!(base.keys().all(|key| rendered.contains_key(key)), "{overlay}");
    }
    let k3s = daemon_set(&kustomize("overlays/k3s")).to_string();
    assert!(!k3s.contains("/opt/cni") && !k3s.contains("--cni-conf-dir=/etc"), "{k3s}");
}

/// Every file of the chart, in the order of names.
fn chart_files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    files.into_iter().flat_map(|path| if path.is_dir() { chart_files(&path) } else { vec![path] }).collect()
}

/// FNV-1a, 64 bits, of names and texts.
fn hash_of_the_chart() -> String {
    let chart = deploy().join("helm/podtether");
    let from_elsewhere = ["dashboards", "rules"];
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for file in chart_files(&chart)
        .into_iter()
        .filter(|file| !from_elsewhere.iter().any(|dir| file.starts_with(chart.join(dir))))
    {
        let name = file.strip_prefix(&chart).unwrap().to_str().unwrap().as_bytes().to_vec();
        for byte in name.into_iter().chain(fs::read(&file).unwrap()) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    format!("{hash:016x}")
}

#[test]
fn the_chart_is_what_kustomize_makes() {
    let first = format!(
        "# deploy/helm/podtether with its own values, rendered by `make chart`; of sources {}\n",
        hash_of_the_chart()
    );
    if std::env::var_os("PODTETHER_RENDER").is_some() {
        fs::write(deploy().join("helm/rendered.yaml"), first.clone() + &helm(&[]).unwrap()).unwrap();
    }
    let kept = read("helm/rendered.yaml");
    assert!(kept.starts_with(&first), "the chart was changed: `make chart`, with helm on PATH\n{first}");
    if on_path("helm") {
        assert_eq!(helm(&[]).unwrap(), kept[first.len()..], "`make chart`");
    }
    let objects = documents(&kept);
    check(&objects);
    // The namespace is helm's to make.
    let mut base = comparable(&base());
    base.retain(|(kind, _), _| kind != "Namespace");
    assert_eq!(comparable(&objects), base);
}

#[test]
fn the_charts_switches_do_what_overlays_do() {
    if !on_path("helm") || !on_path("kubectl") {
        return;
    }
    let chart = |settings: &[&str]| {
        let objects = documents(&helm(settings).unwrap());
        check(&objects);
        objects
    };
    let without_namespace = |overlay: &str| {
        let mut objects = comparable(&kustomize(overlay));
        objects.retain(|(kind, _), _| kind != "Namespace");
        objects
    };
    assert_eq!(comparable(&chart(&["cni.k3s=true"])), without_namespace("overlays/k3s"));
    assert_eq!(comparable(&chart(&["taint.enabled=true"])), without_namespace("overlays/taint"));
    let pinned = chart(&[
        "image.repository=ghcr.io/you/podtether",
        &format!("image.digest=sha256:{}", "0".repeat(64)),
    ]);
    assert!(daemon_set(&pinned).to_string().contains("ghcr.io/you/podtether@sha256:0000"));
    let measured = chart(&[
        "metrics.enabled=true",
        "metrics.podMonitor.enabled=true",
        "metrics.serviceMonitor.enabled=true",
        "dashboards.enabled=true",
        "rules.enabled=true",
    ]);
    let count = |kind: &str| measured.iter().filter(|object| object["kind"] == kind).count();
    let dashboards = fs::read_dir(deploy().join("../grafana/dashboards")).unwrap().count();
    assert_eq!(
        ["PodMonitor", "ServiceMonitor", "Service", "PrometheusRule", "ConfigMap"].map(count),
        [1, 1, 1, 1, 1 + dashboards],
        "what the switches add"
    );
    // As docs/metrics.md has it: a pod's series keep the pod's name, and a node is its name.
    for (kind, list) in [("PodMonitor", "podMetricsEndpoints"), ("ServiceMonitor", "endpoints")] {
        let monitor = measured.iter().find(|object| object["kind"] == kind).unwrap();
        let [endpoint] = &monitor["spec"][list].as_array().unwrap()[..] else { panic!("{monitor}") };
        let instance =
            json!([{"sourceLabels": ["__meta_kubernetes_pod_node_name"], "targetLabel": "instance"}]);
        assert_eq!((&endpoint["honorLabels"], &endpoint["relabelings"]), (&json!(true), &instance), "{kind}");
        assert_eq!(
            endpoint["port"],
            daemon_set(&measured)["spec"]["template"]["spec"]["containers"][0]["ports"][0]["name"]
        );
        assert_eq!(monitor["spec"]["jobLabel"], "app", "the rules ask for job=\"podtether\"");
    }
    chart(&[
        "config.tailnet.prod.control_url=https://x.example",
        "config.tailnet.prod.credentials.kind=interactive",
        "config.namespace.shop.tags={tag:web}",
        "config.node.engine_memory_mib=64",
    ]);
    for (wrong, says) in [
        ("config.node.jon=opt-in", "jon"),
        ("config.node.join=maybe", "join"),
        ("config.tailnet.default.tags=tag:x", "tags"),
        ("image.digest=sha256:1", "digest"),
        ("colour=red", "colour"),
    ] {
        let why = helm(&[wrong]).unwrap_err();
        assert!(why.contains(says), "{wrong}: {why}");
    }
    run("helm", &["lint", "--strict", "helm/podtether"]).unwrap();
}

/// The schema of the chart's values knows every key of the supervisor's configuration and no other.
#[test]
fn the_charts_schema_is_the_supervisors() {
    let schema: Value = serde_json::from_str(&read("helm/podtether/values.schema.json")).unwrap();
    let config = &schema["properties"]["config"]["properties"];
    let tailnet = &config["tailnet"]["additionalProperties"]["properties"];
    let keys = |object: &Value| -> Vec<String> {
        let keys = object.as_object().unwrap().keys().filter(|key| *key != "credentials");
        let mut keys: Vec<String> = keys.cloned().collect();
        keys.sort();
        keys
    };
    let mut known: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let command = arguments();
    for id in command.get_arguments().map(|argument| argument.get_id().as_str()) {
        if let Some((section, key)) = id.rsplit_once('.') {
            known.entry(section).or_default().push(key.to_owned());
        }
    }
    known.values_mut().for_each(|keys| keys.sort());
    assert_eq!(known["node"], keys(&config["node"]["properties"]));
    assert_eq!(known["tailnet.default"], keys(tailnet));
    assert_eq!(known["tailnet.default.credentials"], keys(&tailnet["credentials"]["properties"]));
}

#[test]
fn the_flux_example_is_yaml_with_the_charts_path() {
    let objects = documents(&read("flux/podtether.yaml"));
    let release = objects.iter().find(|object| object["kind"] == "HelmRelease").unwrap();
    let chart = release["spec"]["chart"]["spec"]["chart"].as_str().unwrap();
    assert!(deploy().join("..").join(chart).join("Chart.yaml").exists());
}
