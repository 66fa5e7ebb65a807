//! Peers that exist in netmaps alone, and news of them at a rate: what a large tailnet is to a client.
//!
//! They are added to a session's first message, and every session is sent the same ready-made deltas. The
//! tailnet's own state knows nothing of them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use podtether_core::key::{DiscoPublic, MachinePublic, NodePublic};
use serde::Deserialize;
use serde_json::{Value, json};

use super::wire::{self, Timestamp3339};
use crate::config::{DevnetConfig, Families};
use crate::shared::Shared;

/// Most such peers: their addresses have a range of their own.
pub(crate) const MAX_PEERS: u32 = 100_000;
const FIRST_ID: u64 = 1_000_000_000;
const STEP: Duration = Duration::from_millis(5);
/// Deltas in which one peer is moved, goes offline, goes, comes back and is moved again.
const ROUND: u64 = 5;

/// How many peers there are that nobody can reach, and how much is told of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Crowd {
    /// Peers in the first message of each session that begins from now on; at most 100,000.
    pub peers: u32,
    /// Messages a second about one of them each, to every session.
    pub deltas_per_second: u32,
}

/// All of them, as a session's first message has them.
pub(crate) fn peers(config: &DevnetConfig, count: u32) -> Vec<wire::Node> {
    (0..count.min(MAX_PEERS)).map(|n| node(config, n, 0)).collect()
}

fn node(config: &DevnetConfig, n: u32, turn: u64) -> wire::Node {
    let id = FIRST_ID + u64::from(n);
    let [_, high, middle, low] = n.to_be_bytes();
    let v4 = format!("100.{}.{middle}.{low}/32", 72 + high);
    let v6 = format!("fd7a:115c:a1e0:c::{n:x}/128");
    let addresses = match config.families {
        Families::Both => vec![v4, v6],
        Families::V4 => vec![v4],
        Families::V6 => vec![v6],
    };
    let hostinfo = json!({
        "OS": "linux", "Hostname": format!("production-web-frontend-{n}"), "IPNVersion": "1.90.6-t2b1c5f4a6",
        "OSVersion": "6.8.0-1021-aws", "Distro": "debian", "DistroVersion": "12.8", "GoArch": "amd64",
        "Services": [{"Proto": "peerapi4", "Port": 41_000}, {"Proto": "peerapi6", "Port": 41_000}],
    });
    wire::Node {
        id,
        stable_id: format!("nCrowd{n:08}CNTRL"),
        name: format!("production-web-frontend-{n}.{}.", config.base_domain),
        user: wire::USER,
        sharer: 0,
        key: NodePublic::from_bytes(key(n, turn, 1)),
        key_expiry: None,
        machine: MachinePublic::from_bytes(key(n, 0, 2)),
        disco_key: Some(DiscoPublic::from_bytes(key(n, turn, 3))),
        allowed_ips: addresses.clone(),
        addresses,
        primary_routes: Vec::new(),
        endpoints: endpoints(n, turn).iter().filter_map(|text| text.parse().ok()).collect(),
        home_derp: region(config, turn),
        hostinfo: if let Value::Object(fields) = hostinfo { fields } else { wire::Hostinfo::new() },
        created: Timestamp3339(Timestamp::UNIX_EPOCH),
        cap: wire::MIN_VERSION,
        tags: vec!["tag:web".into(), "tag:production".into()],
        last_seen: None,
        online: true,
        machine_authorized: true,
        cap_map: [("https://tailscale.com/cap/is-admin", Vec::new()), ("funnel", vec![json!(1)])].into(),
        expired: false,
        is_jailed: false,
        is_wireguard_only: false,
        self_v4_masq: None,
        self_v6_masq: None,
    }
}

/// Bytes that differ between peers, turns and kinds of key.
fn key(n: u32, turn: u64, kind: u8) -> [u8; 32] {
    let mut bytes = [kind; 32];
    let own = (u64::from(n) + 1) << 8 | u64::from(kind);
    let mut seed = own.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ turn.wrapping_mul(0xd1b5_4a32_d192_ed03);
    for part in bytes[..31].chunks_mut(8) {
        seed = (seed ^ (seed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        part.copy_from_slice(&seed.to_be_bytes()[..part.len()]);
    }
    bytes
}

/// Addresses where nobody is (RFC 5737, RFC 3849).
fn endpoints(n: u32, turn: u64) -> [String; 3] {
    let port = turn % 60_000 + 1;
    [format!("192.0.2.9:{port}"), format!("198.51.100.{}:41641", n % 250 + 1), "[2001:db8::1]:41641".into()]
}

fn region(config: &DevnetConfig, turn: u64) -> u32 {
    let regions = &config.regions;
    let at = usize::try_from(turn).unwrap_or(0).checked_rem(regions.len()).unwrap_or(0);
    regions.get(at).map_or(0, |region| region.id)
}

/// The delta of a turn. After each round every peer is there.
fn delta(config: &DevnetConfig, count: u32, turn: u64) -> Value {
    // Every peer in turn, far from the one before.
    let round = turn / ROUND;
    let n = u32::try_from(round.wrapping_mul(7919) % u64::from(count.clamp(1, MAX_PEERS))).unwrap_or(0);
    let id = FIRST_ID + u64::from(n);
    match turn % ROUND {
        0 => json!({"PeersChangedPatch": [
            {"NodeID": id, "DERPRegion": region(config, turn), "Endpoints": endpoints(n, turn)}]}),
        1 => json!({"OnlineChange": {id.to_string(): false}}),
        2 => json!({"PeersRemoved": [id]}),
        3 => json!({"PeersChanged": [node(config, n, turn)]}),
        _ => json!({"PeersChangedPatch": [{"NodeID": id, "Endpoints": endpoints(n, turn), "Online": true,
            "DiscoKey": DiscoPublic::from_bytes(key(n, turn, 3))}]}),
    }
}

/// Tells the sessions of the crowd, as fast as is wanted at the time.
pub(crate) async fn churn(shared: Arc<Shared>) {
    let mut wanted = shared.crowd.subscribe();
    let mut turn = 0;
    loop {
        let crowd = *wanted.borrow_and_update();
        let (began, first) = (Instant::now(), turn);
        let mut ticks = tokio::time::interval(STEP);
        while wanted.has_changed().is_ok_and(|changed| !changed)
            && crowd.peers > 0
            && crowd.deltas_per_second > 0
        {
            tokio::select! {
                _ = ticks.tick() => {}
                _ = wanted.changed() => break,
            }
            let due = first + elapsed_us(began) * u64::from(crowd.deltas_per_second) / 1_000_000;
            while turn < due {
                tell(&shared, crowd.peers, &mut turn);
            }
        }
        while turn % ROUND != 0 {
            tell(&shared, crowd.peers, &mut turn);
        }
        wanted.mark_unchanged();
        if *wanted.borrow() == crowd && wanted.changed().await.is_err() {
            return;
        }
    }
}

fn elapsed_us(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX / u64::from(u32::MAX))
}

fn tell(shared: &Shared, peers: u32, turn: &mut u64) {
    let json = delta(&shared.config, peers, *turn).to_string();
    *turn += 1;
    // Without a session nobody is told.
    let _ = shared.deltas.send(json.into());
    shared.deltas_made.fetch_add(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn everybody_has_keys_and_addresses_of_their_own() {
        let all = peers(&DevnetConfig::default(), 20_000);
        let count = |set: BTreeSet<String>| set.len();
        assert_eq!(count(all.iter().map(|node| node.key.to_string()).collect()), 20_000);
        assert_eq!(count(all.iter().filter_map(|node| Some(node.disco_key?.to_string())).collect()), 20_000);
        assert_eq!(count(all.iter().flat_map(|node| node.addresses.clone()).collect()), 40_000);
        let bytes = serde_json::to_vec(&all[7]).unwrap().len();
        assert!((900..1200).contains(&bytes), "{bytes} bytes for a peer: a large tailnet has about 1 KB");
    }

    #[test]
    fn after_a_round_everybody_is_there() {
        let config = DevnetConfig::default();
        let round: Vec<Value> = (10..10 + ROUND).map(|turn| delta(&config, 100, turn)).collect();
        let named = |field: &str| round.iter().filter(|delta| delta.get(field).is_some()).count();
        let fields = ["PeersChangedPatch", "OnlineChange", "PeersRemoved", "PeersChanged"];
        assert_eq!(fields.map(named), [2, 1, 1, 1]);
        assert_eq!(round[2]["PeersRemoved"][0], round[3]["PeersChanged"][0]["ID"]);
    }
}
