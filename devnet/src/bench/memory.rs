//! What engines keep, beside what tailscaled keeps.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::figure::{Figure, median};
use super::iperf::{Iperf, Load};
use super::speed::put;
use super::usage;
use super::world::{Lane, Side, World, engine_pid};
use crate::Crowd;
use crate::lab::Pod;

/// Peers of each of ours, and of tailscaled.
const PEERS: usize = 10;
/// Beside them for the figure per peer.
const CROWD: u32 = 10_000;
/// What a start takes is given back by then.
const SETTLED: Duration = Duration::from_secs(10);
const AFTER_LOAD: Duration = Duration::from_secs(30);
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(200);

fn kib_to_mb(kib: u64) -> Result<f64> {
    Ok(f64::from(u32::try_from(kib)?) * 1024.0 / 1e6)
}

/// Anonymous memory of both ends, with [`PEERS`] peers: before anything was sent, and some time after as much as
/// goes was. Comes before whatever else sends.
pub(super) fn engines(
    world: &World,
    iperf: &Iperf,
    time: Duration,
    say: &mut dyn FnMut(&str),
) -> Result<Vec<Figure>> {
    while world.devnet.nodes().len() <= PEERS {
        let name = format!("peer-{}", world.devnet.nodes().len());
        if world.devnet.add_node(&name).is_empty() {
            bail!("the devnet takes no more nodes");
        }
    }
    let lanes: Vec<Lane> = world.across().into_iter().filter(|lane| lane.side != Side::Bare).collect();
    let read = |figure: &mut Figure, of: fn(u32) -> Result<u64>| -> Result<()> {
        for lane in &lanes {
            for pid in world.carriers(*lane)?.into_iter().flatten() {
                put(figure, lane.side, kib_to_mb(of(pid)?)?);
            }
        }
        Ok(())
    };
    say(&format!("memory: {SETTLED:?} of rest"));
    std::thread::sleep(SETTLED);
    let mut idle =
        Figure::new("memory.idle", format!("RssAnon of an engine, idle, {PEERS} peers, both ends"), "MB");
    let mut pss = Figure::new("memory.idle_pss", "Pss of an engine, few engines, idle", "MB");
    read(&mut idle, usage::rss_anon_kib)?;
    read(&mut pss, usage::pss_kib)?;
    for lane in lanes.iter().flat_map(|lane| [*lane, lane.back()]) {
        let ([from, to], target) = (world.ends(lane)?, world.target(lane, false)?);
        iperf.run(from, to, target, Load::Tcp { streams: 8 }, time)?;
    }
    say(&format!("memory: {AFTER_LOAD:?} of rest after TCP in both directions"));
    std::thread::sleep(AFTER_LOAD);
    let mut after = Figure::new("memory.after_load", "RssAnon of an engine, 30 s after full speed", "MB");
    read(&mut after, usage::rss_anon_kib)?;
    Ok(vec![idle, pss, after])
}

/// What each of ten thousand peers adds to an engine that joins beside them.
pub(super) fn per_peer(world: &mut World, say: &mut dyn FnMut(&str)) -> Result<Vec<Figure>> {
    say(&format!("memory: joining beside {CROWD} peers"));
    let small = joined(world, "few-peers", Crowd::default())?;
    let large = joined(world, "many-peers", Crowd { peers: CROWD, deltas_per_second: 0 })?;
    let each = (f64::from(u32::try_from(large)?) - f64::from(u32::try_from(small)?)) / f64::from(CROWD);
    Ok(vec![
        Figure::of("memory.peer", "RssAnon of an engine for each of 10,000 peers", "KiB", each),
        Figure::of("memory.10000", "RssAnon of an engine with 10,000 peers", "MB", kib_to_mb(large)?),
    ])
}

/// Anonymous memory in KiB of an engine that joined beside these peers and came to rest.
fn joined(world: &mut World, name: &str, crowd: Crowd) -> Result<u64> {
    world.devnet.set_crowd(crowd);
    let Some(node) = world.nodes.first_mut() else { bail!("no node") };
    let mut pod: Pod = node.create_pod(name)?;
    let result = (|| {
        pod.add(node)?;
        let own = format!("pod=\"{name}\"");
        let until = Instant::now() + PATIENCE;
        let known = || -> Result<Option<f64>> {
            let text = node.http_get("/metrics")?;
            let lines =
                text.lines().filter(|line| line.starts_with("podtether_pod_peers{") && line.contains(&own));
            Ok(lines.map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
        };
        while known()?.is_none_or(|peers| peers < f64::from(crowd.peers)) {
            if Instant::now() > until {
                bail!("{name} does not know its peers within {PATIENCE:?}");
            }
            std::thread::sleep(POLL);
        }
        std::thread::sleep(SETTLED);
        usage::rss_anon_kib(engine_pid(node, name)?)
    })();
    world.devnet.set_crowd(Crowd::default());
    pod.del(node)?;
    node.destroy_last(pod)?;
    result
}

/// The mean of a process's share of memory over these, in MB, and the middle one of what is its alone.
pub(super) fn of_many(pids: &[u32]) -> Result<Vec<Figure>> {
    let mut shares = Vec::new();
    let mut own = Vec::new();
    for pid in pids {
        shares.push(kib_to_mb(usage::pss_kib(*pid)?)?);
        own.push(kib_to_mb(usage::rss_anon_kib(*pid)?)?);
    }
    let count = pids.len();
    let name = format!("Pss of an engine beside {} others", count.saturating_sub(1));
    let pss = Figure { ours: shares, ..Figure::new("idle.pss", name, "MB") };
    let rss = median(&own).unwrap_or_default();
    Ok(vec![pss, Figure::of("idle.rss", "RssAnon of an engine beside them", "MB", rss)])
}
