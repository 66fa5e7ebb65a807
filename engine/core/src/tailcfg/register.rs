//! Registration messages and the server's keys.

use serde::{Deserialize, Serialize};

use super::lenient::{or_default, soft};
use super::{Hostinfo, UnixTime, User, time};
use crate::key::{ChallengePublic, MachinePublic, NodePublic};

/// Answer to `GET /key`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServerKeys {
    /// Key of the retired protocol.
    #[serde(deserialize_with = "soft")]
    pub legacy_public_key: MachinePublic,
    /// The server's Noise static key.
    pub public_key: MachinePublic,
}

/// The server's first words in a session, before HTTP/2.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EarlyNoise {
    /// To prove possession of a node key to.
    pub node_key_challenge: ChallengePublic,
}

/// Asks for membership under a node key; with an expiry in the past, gives it up.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RegisterRequest {
    /// Capability version.
    pub version: u16,
    /// The key to register.
    pub node_key: NodePublic,
    /// The key it replaces, or zero.
    pub old_node_key: NodePublic,
    /// How the node proves its right.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auth: Option<RegisterAuth>,
    /// Wanted expiry; none leaves it to the server.
    #[serde(with = "time::optional")]
    pub expiry: Option<UnixTime>,
    /// The URL whose visit is waited for.
    #[serde(deserialize_with = "or_default")]
    pub followup: String,
    /// What the node says about itself.
    pub hostinfo: Option<Hostinfo>,
    /// The server may forget the node when it is away. Headscale asks the auth key instead.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "is_false")]
    pub ephemeral: bool,
    /// When the request was made.
    #[serde(with = "time::optional", skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<UnixTime>,
}

fn is_false(value: &bool) -> bool {
    !*value
}

impl std::fmt::Debug for RegisterRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegisterRequest")
            .field("node_key", &self.node_key)
            .field("old_node_key", &self.old_node_key)
            .field("auth", &self.auth)
            .field("expiry", &self.expiry)
            .finish_non_exhaustive()
    }
}

/// Proof of the right to join.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RegisterAuth {
    /// A pre-authentication key.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub auth_key: String,
}

impl std::fmt::Debug for RegisterAuth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.auth_key.is_empty() { "RegisterAuth(none)" } else { "RegisterAuth(redacted)" })
    }
}

/// The server's verdict. Failures come as HTTP 200 with `error` set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RegisterResponse {
    /// The owner.
    #[serde(deserialize_with = "soft")]
    pub user: User,
    /// The owner's login.
    #[serde(deserialize_with = "soft")]
    pub login: Login,
    /// The node key has run out and must be replaced.
    #[serde(deserialize_with = "or_default")]
    pub node_key_expired: bool,
    /// The device is approved.
    #[serde(deserialize_with = "or_default")]
    pub machine_authorized: bool,
    /// Where a person must log in first.
    #[serde(rename = "AuthURL", deserialize_with = "or_default")]
    pub auth_url: String,
    /// Why it failed.
    #[serde(deserialize_with = "or_default")]
    pub error: String,
}

/// A login in a registration answer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Login {
    /// The login's number.
    #[serde(rename = "ID", deserialize_with = "soft")]
    pub id: u64,
    /// Such as `google`.
    #[serde(deserialize_with = "soft")]
    pub provider: String,
    /// Such as `alice@example.com`.
    #[serde(deserialize_with = "soft")]
    pub login_name: String,
    /// Such as `Alice`.
    #[serde(deserialize_with = "soft")]
    pub display_name: String,
}
