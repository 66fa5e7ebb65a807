//! Limits of an engine: what goes beyond them ends alone, and is counted.

use std::fs;
use std::process::{Command, Stdio};

use podtether_net::testing::block_on;

use crate::outlive::{limited, lives, pid};
use crate::rig::*;
use crate::runtime::{cgroups_named, on_a_node};

#[test]
fn who_wants_too_much_memory_ends_alone() {
    on_a_node("limits::who_wants_too_much_memory_ends_alone", |dir, names| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        names.configure(&mut rig);
        rig.config += "engine_memory_mib = 32\n";
        rig.start();
        block_on(async {
            for name in ["a", "b"] {
                rig.netns(name).await;
                rig.add(name).await.unwrap();
            }
            let before = rig.until("a", "limited", limited).await;
            let other = rig.until("b", "limited", limited).await;
            let is_in = fs::read_to_string(format!("/proc/{}/cgroup", pid(&before))).unwrap();
            let own = is_in.lines().find(|line| line.contains(&names.engines) && line.contains("memory"));
            let own = own.unwrap_or_else(|| is_in.lines().find(|l| l.starts_with("0::")).unwrap());
            let path = own.splitn(3, ':').nth(2).unwrap();
            let memory = cgroups_named(path)
                .into_iter()
                .find(|dir| dir.join("memory.limit_in_bytes").exists() || dir.join("memory.max").exists())
                .unwrap();
            let limit =
                ["memory.limit_in_bytes", "memory.max"].map(|file| fs::read_to_string(memory.join(file)));
            assert_eq!(limit.into_iter().flatten().next().unwrap().trim(), (32 << 20).to_string());

            // Pages of a file in memory count as much as the engine's own, and are nobody's to kill for: the kernel
            // takes the largest process of the cgroup.
            let file = dir.join("filled");
            let fill = format!(
                "echo 0 > {}/cgroup.procs && exec dd if=/dev/zero of={} bs=16k count=4096",
                memory.display(),
                file.display()
            );
            let dd = Command::new("/bin/sh").args(["-c", &fill]).stderr(Stdio::null()).status().unwrap();
            assert!(!dd.success(), "64 MiB do not fit");
            rig.until("a", "killed", |p| p["enginePid"] != before["enginePid"]).await;
            assert!(!lives(pid(&before)));
            fs::remove_file(&file).unwrap();
            let after = rig.until("a", "restarted", limited).await;
            for same in ["ifindex", "udpPort", "addresses", "mac"] {
                assert_eq!(after[same], before[same], "{same}");
            }
            let text = http("/metrics");
            // Once, or until the file had gone.
            assert!(!text.contains("podtether_engine_exits_total{kind=\"memory\"} 0"), "{text}");
            assert!(text.contains("podtether_engine_exits_total{kind=\"crash\"} 0"), "{text}");
            assert_eq!(rig.pod("b")["enginePid"], other["enginePid"]);
            assert_eq!(rig.pod("b")["restarts"], 0);

            // A cgroup that nobody has a record for goes with the next start.
            let stray = memory.with_file_name("stray");
            fs::create_dir(&stray).unwrap();
            rig.kill();
            // As when the supervisor had ended between an engine's start and its limits.
            let outside = memory.parent().unwrap().parent().unwrap().join("cgroup.procs");
            fs::write(&outside, pid(&after).to_string()).unwrap();
            rig.start();
            rig.client().await;
            let adopted = rig.until("a", "taken up and limited", limited).await;
            // The socket stands before what is left is looked at; pods are taken up after.
            assert!(!stray.exists());
            assert_eq!(adopted["enginePid"], after["enginePid"]);
            rig.del("a").await.unwrap();
            rig.del("b").await.unwrap();
            rig.until_clean(TIMEOUT).await;
            assert!(!memory.exists());
        });
    });
}
