//! The few fields of Kubernetes objects that are read. Every one may be missing, and an object that is none is as
//! one without any, so that it costs no other of its list.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};

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

/// An object of a list or a watch, whatever it holds.
#[derive(Debug, Clone, Default)]
pub(super) struct Odd<T>(pub(super) T);

impl<'de, T: Default + for<'a> Deserialize<'a>> Deserialize<'de> for Odd<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let value = serde_json::Value::deserialize(from)?;
        Ok(Odd(serde_json::from_value(value).unwrap_or_default()))
    }
}
