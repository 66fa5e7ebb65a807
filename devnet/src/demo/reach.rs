//! Pods join, and reach each other as far as the access rules say.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use podtether_devnet::probe::ping::{self, PingReport, Pinging};
use podtether_devnet::probe::{dns, tcp};

use super::display::{Progress, Row, duration};
use super::world::{ALLOWED_PORT, DENIED_PORT, Place, World};

const JOIN_WITHIN: Duration = Duration::from_secs(30);
const REPLY_WITHIN: Duration = Duration::from_secs(10);
/// How long somebody who is allowed in may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// How long nobody has to answer for a port to count as closed.
const SILENCE: Duration = Duration::from_secs(1);
const PINGS: u64 = 100;
const PING_EVERY: Duration = Duration::from_millis(10);
/// Where MagicDNS answers in every pod.
const RESOLVERS: [SocketAddr; 2] = [
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(100, 100, 100, 100)), 53),
    SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, 0x53)), 53),
];

/// CNI ADD for all pods, at the same time.
pub(super) fn join(world: &mut World, progress: &Progress<'_>) -> Result<Vec<Row>> {
    world.create_pods()?;
    progress.say("podtether-cni ADD, all at once");
    let took: Vec<Duration> = std::thread::scope(|scope| {
        let mut calls = Vec::new();
        for site in &mut world.sites {
            let node = &site.node;
            for pod in &mut site.pods {
                calls.push(scope.spawn(move || pod.add(node)));
            }
        }
        calls
            .into_iter()
            .map(|call| call.join().unwrap_or_else(|p| std::panic::resume_unwind(p)))
            .collect::<Result<_>>()
    })?;
    let mut rows = Vec::new();
    for (place, took) in world.places().into_iter().zip(took) {
        let Place { node, pod } = place;
        let result = pod.result().context("no result")?;
        let first = |value: &serde_json::Value| value["ips"][0]["address"].clone();
        ensure!(
            first(result) == first(&pod.primary_result),
            "ADD of {}: the first address should stay the primary plugin's {}, and is {}",
            pod.name,
            first(&pod.primary_result),
            first(result)
        );
        let (v4, v6) = (pod.v4()?, pod.v6()?);
        let device = world.devnet.node(&pod.name);
        let device = device.with_context(|| format!("the tailnet has no device called {}", pod.name))?;
        ensure!(
            device.tags == ["tag:k8s-pod"] && device.addresses.contains(&v4),
            "the tailnet's device {} should have {v4} and tag:k8s-pod, and is {device:?}",
            pod.name
        );
        pod.check(node).with_context(|| format!("CHECK of {}, which has just joined", pod.name))?;
        rows.push(Row::passed(
            format!("{} on {} joins", pod.name, node.name),
            format!("{v4} {v6} in {}", duration(took)),
        ));
    }
    let names: Vec<String> = world.devnet.nodes().into_iter().map(|node| node.name).collect();
    ensure!(names.len() == 4, "the tailnet should have four devices, and has {names:?}");
    Ok(rows)
}

/// The first exchange of each pair sets up keys and paths.
pub(super) fn first_contact(world: &World, progress: &Progress<'_>) -> Result<Vec<Row>> {
    let mut waiting = Vec::new();
    for (from, to) in world.pairs() {
        let run = Pinging::start(&from.pod.netns, to.pod.v4()?, Duration::from_millis(50), None)?;
        waiting.push((from, to, run));
    }
    let mut slowest = Duration::ZERO;
    let count = waiting.len();
    for (index, (from, to, run)) in waiting.into_iter().enumerate() {
        progress.say(&format!("{} of {count}", index + 1));
        ensure!(
            run.wait_for_replies(1, REPLY_WITHIN) || run.report().received > 0,
            "{} should get a ping's reply from {} ({}), and got none within {REPLY_WITHIN:?}",
            from.pod.name,
            to.pod.name,
            to.pod.v4()?
        );
        slowest = slowest.max(run.report().arrivals.first().copied().unwrap_or_default());
    }
    let what = format!("first reply, {count} pairs at once");
    let direct = all_direct(world)?;
    Ok(vec![
        Row::passed(what, format!("in {} at most, key exchange included", duration(slowest))),
        Row::passed("all paths are direct", format!("{} after that", duration(direct))),
    ])
}

fn all_direct(world: &World) -> Result<Duration> {
    super::trouble::wait_for_paths(world, JOIN_WITHIN, |_, _| true, super::trouble::is_direct, "direct")
}

/// Every pair, both ways, both families.
pub(super) fn pings(world: &World, progress: &Progress<'_>) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (family, of) in [("IPv4", 0), ("IPv6", 1)] {
        progress.say(family);
        let mut runs = Vec::new();
        for (from, to) in world.pairs() {
            let target = [to.pod.v4()?, to.pod.v6()?][of];
            runs.push((from, to, Pinging::start(&from.pod.netns, target, PING_EVERY, Some(PINGS))?));
        }
        let (mut across, mut beside, mut sent) = (Vec::new(), Vec::new(), 0);
        for (from, to, run) in runs {
            let report = run.finish(REPLY_WITHIN)?;
            nothing_lost(&report, &from, &to)?;
            sent += report.sent;
            if from.is_beside(&to) { &mut beside } else { &mut across }.extend(report.median_rtt());
        }
        rows.push(Row::passed(
            format!("{family}: every pod pings every other"),
            format!(
                "0/{sent} lost, {} across, {} on one node",
                duration(median(across)),
                duration(median(beside))
            ),
        ));
    }
    Ok(rows)
}

/// Complains when a reply is missing.
pub(super) fn nothing_lost(report: &PingReport, from: &Place<'_>, to: &Place<'_>) -> Result<()> {
    ensure!(
        report.lost() == 0 && report.sent > 0,
        "pings from {} to {}: none should be lost, and {} of {} were ({} refused by the kernel)",
        from.pod.name,
        to.pod.name,
        report.lost(),
        report.sent + report.refused,
        report.refused
    );
    Ok(())
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// Every pod resolves every other by name, and pings what it was told: the IPv4 address, since a tailnet
/// gives no AAAA records for peers that have one unless it is told to.
pub(super) fn names(world: &World, progress: &Progress<'_>) -> Result<Vec<Row>> {
    let domain = world.devnet.base_domain();
    let (mut asked, mut times, mut sent) = (0_u32, Vec::new(), 0);
    let mut runs = Vec::new();
    for (from, to) in world.pairs() {
        let name = format!("{}.{domain}", to.pod.name);
        progress.say(&format!("{} asks for {name}", from.pod.name));
        let expected = to.pod.v4()?;
        for resolver in RESOLVERS {
            let started = Instant::now();
            let answer = dns::lookup(&from.pod.netns, resolver, &name, false, ANSWER_WITHIN)
                .with_context(|| format!("{} resolves {name}", from.pod.name))?;
            times.push(started.elapsed());
            asked += 1;
            ensure!(
                answer.addresses == [expected],
                "{} asked {} for {name}: the answer should be {expected}, and is {answer:?}",
                from.pod.name,
                resolver.ip()
            );
        }
        runs.push((from, to, Pinging::start(&from.pod.netns, expected, PING_EVERY, Some(10))?));
    }
    for (from, to, run) in runs {
        let report = run.finish(REPLY_WITHIN)?;
        nothing_lost(&report, &from, &to)?;
        sent += report.sent;
    }
    let place = world.place("web-1")?;
    let missing = format!("nobody.{domain}");
    let answer = dns::lookup(&place.pod.netns, RESOLVERS[0], &missing, false, ANSWER_WITHIN)?;
    ensure!(!answer.ok && answer.addresses.is_empty(), "{missing} should not exist, and is {answer:?}");
    Ok(vec![Row::passed(
        format!("by name, as in web-2.{domain}"),
        format!("{asked} lookups right, {} each; 0/{sent} pings lost", duration(median(times))),
    )])
}

/// One port is allowed, one is not, and both are served.
pub(super) fn access(world: &World) -> Result<Vec<Row>> {
    let (from, to) = (world.place("web-1")?, world.place("web-2")?);
    let mut servers = Vec::new();
    let own = [to.pod.v4()?, to.pod.v6()?];
    for port in [ALLOWED_PORT, DENIED_PORT] {
        for address in own {
            let listen = SocketAddr::new(address, port);
            servers.push(tcp::TcpServer::start(&to.pod.netns, listen, tcp::Serve::Echo)?);
        }
    }
    let mut answers = Vec::new();
    for address in own {
        let target = SocketAddr::new(address, ALLOWED_PORT);
        let took = tcp::echo_once(&from.pod.netns, target, b"hello", ANSWER_WITHIN)
            .with_context(|| format!("{} to {target}, which the rules allow", from.pod.name))?;
        answers.push(duration(took));
        let target = SocketAddr::new(address, DENIED_PORT);
        tcp::echo_once(&to.pod.netns, target, b"hello", ANSWER_WITHIN)
            .with_context(|| format!("{} to itself at {target}", to.pod.name))?;
    }
    std::thread::scope(|scope| {
        let tries: Vec<_> = own
            .map(|address| {
                let target = SocketAddr::new(address, DENIED_PORT);
                scope.spawn(move || anyhow::Ok((target, tcp::connect(&from.pod.netns, target, SILENCE)?)))
            })
            .into_iter()
            .collect();
        for one in tries {
            let (target, answered) = one.join().unwrap_or_else(|p| std::panic::resume_unwind(p))?;
            if let Some(took) = answered {
                bail!("{target} is not in the access rules and should be silent, and answered in {took:?}");
            }
        }
        Ok(())
    })?;
    let report = ping::ping(&from.pod.netns, to.pod.v4()?, 5, PING_EVERY, REPLY_WITHIN)?;
    nothing_lost(&report, &from, &to)?;
    Ok(vec![
        Row::passed(
            format!("TCP {ALLOWED_PORT}, allowed by the ACL"),
            format!("answers in {} (IPv4), {} (IPv6)", answers[0], answers[1]),
        ),
        Row::passed(
            format!("TCP {DENIED_PORT}, served but not in the ACL"),
            format!("silent for {}: the peer's filter drops it", duration(SILENCE)),
        ),
    ])
}
