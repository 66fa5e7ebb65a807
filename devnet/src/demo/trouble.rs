//! What goes wrong, and what it costs: an engine is killed, UDP is blocked, pods leave.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill as send_signal};
use nix::unistd::Pid;
use podtether_devnet::probe::ping::Pinging;
use podtether_devnet::probe::tcp;
use podtether_net::netlink::Netlink;
use podtether_proto::engine::PathStatus;

use super::display::{Progress, Row, duration};
use super::reach::nothing_lost;
use super::world::{Place, TRANSFER_PORT, World, wait_until};

const TRANSFER_BYTES: u64 = 64 << 20;
/// Between chunks of 64 KiB, so that the transfer lasts longer than what happens to it.
const TRANSFER_PACE: Duration = Duration::from_millis(2);
const PING_EVERY: Duration = Duration::from_millis(5);
const REPLY_WITHIN: Duration = Duration::from_secs(5);
const RESTART_WITHIN: Duration = Duration::from_secs(10);
/// A direct path is trusted for some seconds after its last answer, and looked for every few.
const PATHS_WITHIN: Duration = Duration::from_secs(45);
const LEAVE_WITHIN: Duration = Duration::from_secs(5);

/// What has to stay the same when an engine is replaced.
#[derive(Debug, PartialEq, Eq)]
struct Lasting {
    addresses: Vec<IpAddr>,
    ifindex: u32,
    mac: String,
    udp_port: u16,
    udp6_port: u16,
}

impl Lasting {
    fn of(place: &Place<'_>) -> Result<Self> {
        Ok(Self {
            addresses: place.field("addresses")?,
            ifindex: ifindex(place)?,
            mac: place.field("mac")?,
            udp_port: place.field("udpPort")?,
            udp6_port: place.field("udp6Port")?,
        })
    }
}

/// As the pod sees it.
fn ifindex(place: &Place<'_>) -> Result<u32> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let link = runtime.block_on(async { Netlink::open(&place.pod.netns).await?.link("ts0").await })?;
    Ok(link.with_context(|| format!("{} has no ts0", place.pod.name))?.index)
}

/// Pings of one pair, and where from and to.
type Run<'a> = (Place<'a>, Place<'a>, Pinging);

fn ping_along<'a>(pairs: Vec<(Place<'a>, Place<'a>)>, every: Duration) -> Result<Vec<Run<'a>>> {
    let start = |(from, to): (Place<'a>, Place<'a>)| {
        Ok((from, to, Pinging::start(&from.pod.netns, to.pod.v4()?, every, None)?))
    };
    pairs.into_iter().map(start).collect()
}

/// Kills the engine of one pod while it sends, and the others ping.
pub(super) fn kill(world: &World, progress: &Progress<'_>) -> Result<Vec<Row>> {
    let (victim, to) = (world.place("web-1")?, world.place("web-2")?);
    let sink = SocketAddr::new(to.pod.v4()?, TRANSFER_PORT);
    let _server = tcp::TcpServer::start(&to.pod.netns, sink, tcp::Serve::Sink)?;
    let before = Lasting::of(&victim)?;
    let (pid, restarts): (i32, u64) = (victim.field("enginePid")?, victim.field("restarts")?);

    let (own, others): (Vec<_>, Vec<_>) =
        world.pairs().into_iter().partition(|(a, b)| [a, b].iter().any(|p| p.pod.name == victim.pod.name));
    let others = ping_along(others, PING_EVERY)?;
    let own = ping_along(own, PING_EVERY)?;
    let transfer = tcp::Transfer::start(&victim.pod.netns, sink, TRANSFER_BYTES, TRANSFER_PACE)?;
    progress.say("transfer under way");
    wait_until(REPLY_WITHIN * 4, || {
        let sent = transfer.sent();
        Ok((sent < TRANSFER_BYTES / 2)
            .then(|| format!("half of {TRANSFER_BYTES} bytes should be sent, and {sent} are")))
    })?;

    let killed_at: Vec<Duration> = own.iter().map(|(_, _, run)| run.elapsed()).collect();
    send_signal(Pid::from_raw(pid), Signal::SIGKILL).with_context(|| format!("kill -9 {pid}"))?;
    progress.say(&format!("engine {pid} of {} killed", victim.pod.name));
    let report = transfer.finish().context("the transfer whose engine was killed")?;
    ensure!(
        report.bytes == TRANSFER_BYTES,
        "of {TRANSFER_BYTES} bytes, {} arrived as they were sent",
        report.bytes
    );
    wait_until(RESTART_WITHIN, || {
        let now: (Option<i32>, u64, String) =
            (victim.field("enginePid")?, victim.field("restarts")?, victim.field("state")?);
        let good = now.0.is_some_and(|new| new != pid) && now.1 == restarts + 1 && now.2 == "running";
        Ok((!good).then(|| {
            let name = &victim.pod.name;
            format!(
                "{name} should run a new engine after one restart (was {pid}, {restarts}), and is {now:?}"
            )
        }))
    })?;
    victim.pod.check(victim.node).context("CHECK of the pod whose engine was killed")?;
    let after = Lasting::of(&victim)?;
    ensure!(before == after, "the pod's link should have stayed {before:?}, and is {after:?}");

    let mut gap = Duration::ZERO;
    for ((from, to, run), killed_at) in own.into_iter().zip(killed_at) {
        ensure!(
            run.wait_for_replies(20, RESTART_WITHIN),
            "pings from {} to {} should go on after the kill, and do not",
            from.pod.name,
            to.pod.name
        );
        let end = run.elapsed();
        // Pings may be lost here, so their replies are not waited for.
        gap = gap.max(run.stop(Duration::ZERO)?.longest_gap(killed_at, end));
    }
    let (mut sent, mut pairs) = (0, 0);
    for (from, to, run) in others {
        let report = run.stop(REPLY_WITHIN)?;
        nothing_lost(&report, &from, &to)?;
        sent += report.sent;
        pairs += 1;
    }
    let mebibytes = TRANSFER_BYTES >> 20;
    Ok(vec![
        Row::passed(
            format!("{}'s engine killed halfway through TCP", victim.pod.name),
            format!("{mebibytes} MiB right in {}, longest silence {}", duration(report.took), duration(gap)),
        ),
        Row::passed("the other pods meanwhile", format!("0/{sent} pings lost, {pairs} pairs, every 5 ms")),
        Row::passed(
            "after one restart",
            format!("same address, ifindex {}, UDP port {}", after.ifindex, after.udp_port),
        ),
    ])
}

pub(super) fn is_direct(path: &PathStatus) -> bool {
    matches!(path, PathStatus::Direct { .. })
}

fn is_relay(path: &PathStatus) -> bool {
    matches!(path, PathStatus::Relay { .. })
}

/// Waits until every engine reports a path of one kind to the peers that `concerns` names.
pub(super) fn wait_for_paths(
    world: &World,
    patience: Duration,
    concerns: impl Fn(&Place<'_>, &Place<'_>) -> bool,
    wanted: fn(&PathStatus) -> bool,
    kind: &str,
) -> Result<Duration> {
    let pairs: Vec<_> = world.pairs().into_iter().filter(|(from, to)| concerns(from, to)).collect();
    wait_until(patience, || {
        for (from, to) in &pairs {
            let path = from.path_to(to)?;
            if !wanted(&path) {
                let (from, to) = (&from.pod.name, &to.pod.name);
                return Ok(Some(format!("the path from {from} to {to} should be {kind}, and is {path:?}")));
            }
        }
        Ok(None)
    })
}

/// Blocks UDP between the nodes, and lets it through again.
pub(super) fn relay(world: &World, progress: &Progress<'_>) -> Result<Vec<Row>> {
    let across = |from: &Place<'_>, to: &Place<'_>| !from.is_beside(to);
    let relayed = || world.devnet.region_stats(1).map(|stats| stats.packets).unwrap_or_default();
    let mut runs = Vec::new();
    for (from, to) in world.pairs() {
        runs.push((
            from,
            to,
            Pinging::start(&from.pod.netns, to.pod.v4()?, Duration::from_millis(20), None)?,
        ));
    }

    world.lab.block_udp()?;
    let blocked = Instant::now();
    let blocked_at: Vec<Duration> = runs.iter().map(|(_, _, run)| run.elapsed()).collect();
    progress.say("waiting for the relay");
    wait_for_paths(world, PATHS_WITHIN, across, is_relay, "through the relay")?;
    let to_relay = blocked.elapsed();
    let count_before = relayed();
    all_answer(&runs, progress)?;
    let forwarded = relayed() - count_before;
    ensure!(forwarded > 0, "the relay should carry the pings now, and its counter stands still");
    let mut silence = Duration::ZERO;
    for ((from, to, run), at) in runs.iter().zip(blocked_at) {
        if across(from, to) {
            silence = silence.max(run.report().longest_gap(at, run.elapsed()));
        }
    }

    world.lab.unblock_udp()?;
    let unblocked = Instant::now();
    progress.say("unblocked, waiting for direct paths");
    wait_for_paths(world, PATHS_WITHIN, across, is_direct, "direct again")?;
    let to_direct = unblocked.elapsed();
    all_answer(&runs, progress)?;
    let mut sent = 0;
    for (from, to, run) in runs {
        if !across(&from, &to) {
            let report = run.stop(REPLY_WITHIN)?;
            nothing_lost(&report, &from, &to)?;
            sent += report.sent;
        }
    }
    Ok(vec![
        Row::passed(
            "UDP between nodes blocked: relay only",
            format!("all 8 pairs in {}, longest silence {}", duration(to_relay), duration(silence)),
        ),
        Row::passed("pods on one node meanwhile", format!("0/{sent} pings lost")),
        Row::passed("unblocked: direct again", format!("all 8 pairs in {}", duration(to_direct))),
    ])
}

/// Every run gets further replies.
fn all_answer(runs: &[Run<'_>], progress: &Progress<'_>) -> Result<()> {
    for (from, to, run) in runs {
        progress.say(&format!("{} pings {}", from.pod.name, to.pod.name));
        ensure!(
            run.wait_for_replies(10, REPLY_WITHIN),
            "{} should get replies from {}, and gets none",
            from.pod.name,
            to.pod.name
        );
    }
    Ok(())
}

/// CNI DEL for all pods, then what a runtime does; nothing is left.
pub(super) fn leave(world: &mut World, progress: &Progress<'_>) -> Result<Vec<Row>> {
    let mut slowest = Duration::ZERO;
    let mut engines = Vec::new();
    for place in world.places() {
        engines.push(place.field::<i32>("enginePid")?);
    }
    for Place { node, pod } in world.places() {
        progress.say(&pod.name);
        slowest = slowest.max(pod.del(node)?);
        let device = world.devnet.node(&pod.name);
        ensure!(device.is_none(), "{} should be gone from the tailnet, and is {device:?}", pod.name);
        pod.del(node).context("a second DEL, as kubelet makes it")?;
    }
    for pid in engines {
        ensure!(
            send_signal(Pid::from_raw(pid), None).is_err(),
            "engine {pid} should be gone, and still runs"
        );
    }
    let left = world.devnet.nodes();
    ensure!(left.is_empty(), "the tailnet should be empty, and has {left:?}");
    progress.say("comparing the nodes and the pods with what they were before");
    wait_until(LEAVE_WITHIN, || {
        let now = world.state()?;
        let changed = now.iter().zip(&world.before).flat_map(|((name, now), (_, before))| {
            before.diff(now).into_iter().map(move |line| format!("\n{name}: {line}"))
        });
        let changed: String = changed.collect();
        let expected = "nodes and pods should be as before ADD, and are not:";
        Ok((!changed.is_empty()).then(|| format!("{expected}{changed}\n")))
    })?;
    for site in &mut world.sites {
        for pod in site.pods.drain(..) {
            pod.destroy(&site.node)?;
        }
    }
    let complaints = world.devnet.complaints();
    ensure!(
        complaints.is_empty(),
        "the devnet saw what real servers let pass although it is wrong: {complaints:?}"
    );
    Ok(vec![
        Row::passed(
            "pods leave",
            format!("devices gone from the tailnet, DEL {} at most", duration(slowest)),
        ),
        Row::passed(
            "nodes and pods are as before ADD",
            "links, addresses, neighbours, routes, rules, nft, mounts, processes, files",
        ),
    ])
}
