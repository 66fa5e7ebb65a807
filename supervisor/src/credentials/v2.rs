//! Keys and devices as Tailscale's API has them. Headscale's second API has the same shape.

use std::time::{Duration, Instant};

use podtether_proto::secret::SecretString;
use serde::Deserialize;
use serde_json::json;

use super::caller::{Answer, Call, Caller, parse, segment};
use super::{CredentialError, Device, Key, Listed, Wish};

#[derive(Deserialize)]
struct KeyAnswer {
    id: String,
    key: SecretString,
}

#[derive(Deserialize)]
struct DevicesAnswer {
    #[serde(default)]
    devices: Vec<DeviceAnswer>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct DeviceAnswer {
    #[serde(default)]
    id: String,
    #[serde(default)]
    node_id: String,
    #[serde(default)]
    node_key: String,
    #[serde(default)]
    machine_key: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    hostname: String,
    #[serde(default)]
    client_version: String,
    #[serde(default)]
    tags: Option<Vec<String>>,
    #[serde(default)]
    connected_to_control: bool,
    #[serde(default)]
    last_seen: Option<String>,
}

impl DeviceAnswer {
    fn is(&self, device: &Device) -> bool {
        self.node_key == device.node_key || self.machine_key == device.machine_key
    }
}

/// A single-use key; `None` when there is no such API.
pub(super) async fn mint(
    caller: &Caller,
    wish: Wish<'_>,
    ttl: Duration,
    deadline: Instant,
) -> Result<Option<Key>, CredentialError> {
    let description: String = format!("podtether {}", wish.hostname).chars().take(50).collect();
    let request = json!({
        "capabilities": {"devices": {"create": {
            "reusable": false,
            "ephemeral": wish.ephemeral,
            "preauthorized": true,
            "tags": wish.tags,
        }}},
        "expirySeconds": ttl.as_secs(),
        "description": description,
    });
    let what = "mint an auth key";
    match caller.call(Call::post(what, "/api/v2/tailnet/-/keys", &request), deadline).await? {
        Answer::NotFound(_) => Ok(None),
        Answer::Body(body) => {
            let key: KeyAnswer = parse(what, &body)?;
            Ok(Some(Key { secret: key.key, id: Some(key.id), ttl }))
        }
    }
}

pub(super) async fn delete_key(caller: &Caller, id: &str, deadline: Instant) -> Result<(), CredentialError> {
    let path = format!("/api/v2/tailnet/-/keys/{}", segment(id)?);
    caller.delete("delete the unused auth key", &path, deadline).await.map(drop)
}

/// Every device; `None` when there is no such API.
pub(super) async fn devices(
    caller: &Caller,
    deadline: Instant,
) -> Result<Option<Vec<Listed>>, CredentialError> {
    let what = "list the devices";
    let list = Call::get(what, "/api/v2/tailnet/-/devices?fields=all");
    let Answer::Body(body) = caller.call(list, deadline).await? else { return Ok(None) };
    let list: DevicesAnswer = parse(what, &body)?;
    let listed = |d: DeviceAnswer| Listed {
        id: d.id,
        name: d.name,
        hostname: d.hostname,
        tags: d.tags.unwrap_or_default(),
        version: d.client_version,
        is_minted: false,
        machine_key: d.machine_key,
        node_key: d.node_key,
        stable_id: d.node_id,
        online: d.connected_to_control,
        last_seen: d.last_seen.and_then(|text| text.parse().ok()),
    };
    Ok(Some(list.devices.into_iter().map(listed).collect()))
}

/// Deletes every device with these keys; `false` when there is no such API.
///
/// A stable id that is a number comes from Headscale, which gives the same numbers again when its database
/// is new, so such a device has to show its keys first. Tailscale's never change hands.
pub(super) async fn delete_device(
    caller: &Caller,
    device: &Device,
    deadline: Instant,
) -> Result<bool, CredentialError> {
    const DELETE: &str = "delete the device";
    if !device.stable_id.is_empty() && !device.has_numeric_id() {
        let path = format!("/api/v2/device/{}", segment(&device.stable_id)?);
        if caller.delete(DELETE, &path, deadline).await? {
            return Ok(true);
        }
    }
    let what = "find the device to delete";
    if device.has_numeric_id() {
        let path = format!("/api/v2/device/{}", device.stable_id);
        if let Answer::Body(body) = caller.call(Call::get(what, &path), deadline).await?
            && parse::<DeviceAnswer>(what, &body)?.is(device)
        {
            caller.delete(DELETE, &path, deadline).await?;
            return Ok(true);
        }
    }
    let list = Call::get(what, "/api/v2/tailnet/-/devices?fields=all");
    let Answer::Body(body) = caller.call(list, deadline).await? else { return Ok(false) };
    let list: DevicesAnswer = parse(what, &body)?;
    let same_id = |d: &DeviceAnswer| {
        !device.stable_id.is_empty() && !device.has_numeric_id() && d.node_id == device.stable_id
    };
    for ours in list.devices.iter().filter(|d| d.is(device) || same_id(d)) {
        let id = if ours.id.is_empty() { &ours.node_id } else { &ours.id };
        caller.delete(DELETE, &format!("/api/v2/device/{}", segment(id)?), deadline).await?;
    }
    Ok(true)
}
