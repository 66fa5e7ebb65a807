//! Pods that join at once: what the API is asked, what is done for each, what is kept of each. Counts and bytes, which
//! a busy machine does not change; `podtether-devnet joins` measures the times.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and tells what it saw"
)]

mod rig;

use std::time::{Duration, Instant};

use podtether_devnet::Devnet;
use podtether_devnet::fault::{Fault, Target};
use podtether_net::testing::{block_on, in_namespaces};
use rig::*;

/// Calls of the supervisor to one API at a time.
const CALLS_AT_ONCE: u64 = 8;
/// What a pod is made of: save, link, key, engine, configure, save.
const STEPS_EACH: u64 = 6;
/// Statuses of an engine on its way up: connecting, running, relay, paths, and what may come apart from these.
const MOST_REPORTS_EACH: u64 = 12;
/// What a pod may take of the supervisor's memory here, where nothing is optimised.
const MOST_KIB_EACH: u64 = 160;
/// What a burst leaves in the heap is given back after this.
const REST: Duration = Duration::from_secs(5);

/// What the supervisor counts under `name`, all labels together.
fn counted(name: &str) -> u64 {
    let text = http("/metrics");
    let lines =
        text.lines().filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])));
    lines.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
}

fn anonymous_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse().unwrap()
}

/// Adds them all at the same moment, and waits until their engines have all that they connect to.
async fn join(rig: &Rig, names: &[String]) {
    let answers = futures_util::future::join_all(names.iter().map(|name| rig.add(name))).await;
    for (name, answer) in names.iter().zip(answers) {
        assert!(answer.is_ok(), "{name}: {answer:?}");
    }
    settled(rig, names).await;
}

async fn settled(rig: &Rig, names: &[String]) {
    for name in names {
        rig.until(name, "connected", |p| {
            p["state"] == "running" && p["controlConnected"] == true && p["homeDerp"] != 0
        })
        .await;
    }
    // Netchecks and endpoints go on after that; a second without news is the end of them.
    let mut before = counted("podtether_engine_reports_total");
    let started = Instant::now();
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let after = counted("podtether_engine_reports_total");
        if std::mem::replace(&mut before, after) == after {
            return;
        }
        assert!(started.elapsed() < TIMEOUT, "engines report on and on: {after}");
    }
}

fn is_used(devnet: &Devnet) -> bool {
    devnet.auth_keys().iter().all(|key| key.used)
}

#[test]
fn joins_at_once_cost_each_pod_what_one_alone_costs() {
    in_namespaces("joins_at_once_cost_each_pod_what_one_alone_costs", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        rig.start();
        block_on(async {
            let names: Vec<String> = (0..42).map(|n| format!("p{n}")).collect();
            for name in &names {
                rig.netns(name).await;
            }
            rig.client().await;

            // What is there once, the first pods bring.
            let (first, rest) = names.split_at(6);
            join(&rig, first).await;
            tokio::time::sleep(REST).await;
            let (few, few_kib) = (u64::try_from(first.len()).unwrap(), anonymous_kib(rig.pid()));
            assert_eq!(counted("podtether_steps_total"), STEPS_EACH * few);
            let reports = counted("podtether_engine_reports_total");
            assert!(reports <= MOST_REPORTS_EACH * few, "{reports} reports of {few} engines");

            let (many, last) = rest.split_at(30 + 5);
            let more = u64::try_from(many.len()).unwrap();
            join(&rig, many).await;
            tokio::time::sleep(REST).await;
            assert_eq!(counted("podtether_steps_total"), STEPS_EACH * (few + more));
            assert_eq!(counted("podtether_adds_total"), few + more);
            assert_eq!(counted("podtether_adds_failed_total"), 0);
            let all = counted("podtether_engine_reports_total");
            assert!(all - reports <= MOST_REPORTS_EACH * more, "{} reports of {more} engines", all - reports);
            let kib = anonymous_kib(rig.pid()).saturating_sub(few_kib);
            println!("{more} pods at once: {} reports, {kib} KiB of the supervisor's memory", all - reports);
            assert!(kib <= MOST_KIB_EACH * more, "{kib} KiB for {more} pods");

            // One key a pod and one token for all, whoever asked at the same time.
            assert_eq!(u64::try_from(devnet.auth_keys().len()).unwrap(), few + more);
            assert!(is_used(&devnet));
            assert_eq!((devnet.calls(Target::Api), devnet.calls(Target::OauthToken)), (few + more, 1));

            // Every engine hears of one more peer, and has nothing to tell of that.
            join(&rig, last).await;
            let after = counted("podtether_engine_reports_total");
            assert!(after - all <= MOST_REPORTS_EACH, "{} reports for one more pod", after - all);
            assert_eq!(counted("podtether_steps_total"), STEPS_EACH * (few + more + 1));
            assert_eq!(counted("podtether_engine_exits_total"), 0);
        });
        rig.terminate();
    });
}

#[test]
fn joins_at_once_obey_the_apis_limit_together() {
    in_namespaces("joins_at_once_obey_the_apis_limit_together", |dir| {
        let devnet = devnet(|_| {});
        devnet.set_fault(Target::Api, Fault::rate_limit(1));
        let mut rig = Rig::oauth(dir, &devnet);
        rig.start();
        block_on(async {
            let names: Vec<String> = (0..30).map(|n| format!("p{n}")).collect();
            for name in &names {
                rig.netns(name).await;
            }
            rig.client().await;
            let begun = Instant::now();
            let joining = futures_util::future::join_all(names.iter().map(|name| rig.add(name)));
            let watched = async {
                while devnet.calls(Target::Api) == 0 {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                let limited = Instant::now();
                // Refused once, and once again a second later: who was on the way, and nobody else.
                while limited.elapsed() < Duration::from_millis(1800) {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                let calls = devnet.calls(Target::Api);
                devnet.clear_fault(Target::Api);
                // A machine that was busy elsewhere looked again later.
                (calls, 1 + begun.elapsed().as_secs())
            };
            let (answers, (calls, rounds)) = tokio::join!(joining, watched);
            println!("{calls} calls were refused in {rounds} rounds, with a second's pause asked for");
            assert!(
                (1..=rounds * CALLS_AT_ONCE).contains(&calls),
                "{calls} calls of 30 pods in {rounds} rounds"
            );
            for (name, answer) in names.iter().zip(answers) {
                assert!(answer.is_ok(), "{name}: {answer:?}");
            }
            assert_eq!(devnet.auth_keys().len(), names.len());
            assert!(is_used(&devnet));
            let after = devnet.calls(Target::Api) - calls;
            let most = u64::try_from(names.len()).unwrap() + CALLS_AT_ONCE;
            assert!(after <= most, "{after} calls for {} keys", names.len());
        });
        rig.terminate();
    });
}
