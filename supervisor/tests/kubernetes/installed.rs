//! The plugin on the node: kept in the list against another writer, and gone with the DaemonSet.

use std::fs;

use serde_json::json;

use crate::cluster::{CONFLIST, Cluster, OVERLAY};
use crate::node::{kubectl, on_a_cluster};
use crate::runtime::PAUSE;

/// Pods of `app` that run.
fn running(app: &str) -> usize {
    let selector = format!("--selector=app={app}");
    let arguments = ["get", "pods", &selector, "--field-selector=status.phase=Running", "-o", "name"];
    kubectl(&arguments, None).0.lines().count()
}

#[test]
fn the_node_is_as_it_was_when_all_is_uninstalled() {
    on_a_cluster("installed::the_node_is_as_it_was_when_all_is_uninstalled", |names| {
        let cluster = Cluster::start(names);
        let runtime = cluster.node.runtime();
        let (list, plugin) = (runtime.conf_dir().join(CONFLIST), runtime.plugin_dir().join("podtether-cni"));
        cluster.deploy("web", 1);
        cluster.settled(1);
        assert!(plugin.exists());

        // Somebody writes the list again, as a primary CNI does when it starts.
        runtime.network("");
        cluster.until("it is back", || cluster.conflist()?.contains("podtether-cni").then_some(()));
        cluster.deploy("db", 1);
        cluster.settled(2);
        cluster.must("-n podtether rollout restart ds/podtether");
        cluster.must("-n podtether rollout status ds/podtether --timeout=120s");
        assert!(cluster.conflist().unwrap().contains("podtether-cni"), "a rollout is no end");
        cluster.must("delete deployment/web deployment/db");
        cluster.nothing_left();

        let chained = fs::read_to_string(&list).unwrap();
        runtime.network("");
        let bare = fs::read_to_string(&list).unwrap();
        cluster.until("it is back", || (cluster.conflist()? == chained).then_some(()));
        // All at once, the account and its role with it, as docs/uninstall.md has it.
        cluster.must(&format!("delete -k {OVERLAY} --wait=false"));
        cluster.until("the list is as it was", || (cluster.conflist()? == bare).then_some(()));
        cluster.until("the plugin is gone", || (!plugin.exists()).then_some(()));
        cluster.deploy("after", 1);
        cluster.until("pods start without podtether", || (running("after") == 1).then_some(()));
    });
}

#[test]
fn a_refused_annotation_is_corrected_in_place() {
    on_a_cluster("installed::a_refused_annotation_is_corrected_in_place", |names| {
        let cluster = Cluster::start(names);
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "greedy", "annotations": {"tailscale.com/tags": "tag:admin"}},
            "spec": {
                "automountServiceAccountToken": false,
                "terminationGracePeriodSeconds": 0,
                "dnsPolicy": "Default",
                "containers": [{"name": "main", "image": PAUSE}],
            },
        });
        cluster.apply(&pod.to_string());
        cluster.until("it is told what is wrong and that it is tried again", || {
            let reason = "--field-selector=reason=AnnotationRefused";
            let (events, done) = kubectl(&["get", "events", reason], None);
            (done && events.contains("tag:admin") && events.contains("next try takes it")).then_some(())
        });
        cluster.must("annotate pod/greedy tailscale.com/tags-");
        cluster.settled(1);
    });
}
