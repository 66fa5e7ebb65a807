//! The few fields of Kubernetes objects that are read. Every one may be missing.

use std::collections::BTreeMap;

use serde::Deserialize;

/// `metadata`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Meta {
    /// Name.
    pub name: String,
    /// Namespace, empty for what has none.
    pub namespace: String,
    /// UID.
    pub uid: String,
    /// Where a watch goes on.
    pub resource_version: String,
    /// `null` where there are none.
    pub annotations: Option<BTreeMap<String, String>>,
    /// Set from the moment that somebody deletes it.
    pub deletion_timestamp: Option<String>,
    /// Who made it.
    pub owner_references: Option<Vec<Owner>>,
}

/// One of `ownerReferences`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Owner {
    /// `ReplicaSet`, …
    pub kind: String,
    /// The one that manages it.
    pub controller: Option<bool>,
}

/// A pod.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct PodObject {
    /// `metadata`
    pub metadata: Meta,
    /// `spec`
    pub spec: PodSpec,
    /// `status`
    pub status: PodStatus,
}

/// Of a pod's `spec`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodSpec {
    /// Conditions that its readiness waits for.
    pub readiness_gates: Option<Vec<Gate>>,
}

/// One of `readinessGates`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Gate {
    /// Type of a condition.
    pub condition_type: String,
}

/// Of a pod's `status`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct PodStatus {
    /// `Pending`, `Running`, `Succeeded`, `Failed`, `Unknown`.
    pub phase: String,
}

/// A namespace.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct NamespaceObject {
    /// `metadata`
    pub metadata: Meta,
}

/// What a watch begins with, a page of it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct List {
    /// Of the list.
    pub metadata: ListMeta,
    /// Objects, each read by itself so that an odd one costs no other.
    pub items: Option<Vec<serde_json::Value>>,
}

/// `metadata` of a list.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ListMeta {
    /// From where to watch.
    pub resource_version: String,
    /// For the next page.
    #[serde(rename = "continue")]
    pub next: Option<String>,
}

/// A line of a watch.
#[derive(Debug, Deserialize)]
pub(super) struct Event {
    /// `ADDED`, `MODIFIED`, `DELETED`, `BOOKMARK`, `ERROR`.
    #[serde(rename = "type")]
    pub kind: String,
    /// What it is about.
    pub object: serde_json::Value,
}

/// What an error says.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Status {
    /// HTTP status.
    pub code: u16,
    /// For people.
    pub message: String,
    /// For programs.
    pub reason: String,
}
