//! An engine whose supervisor died while it was being started holds the pod's TUN for nobody: it ends.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::{Command, Stdio};

use podtether_proto::exit::EngineExit;
use podtether_proto::fds;

/// The exit code of an engine that is told that `supervisor` is its parent.
fn exit(supervisor: u32) -> Option<i32> {
    let status = Command::new("/bin/sh")
        .args(["-c", "exec \"$0\" 3</dev/null", env!("CARGO_BIN_EXE_podtether-engine")])
        .env_clear()
        .env(fds::ENV, fds::RPC)
        .env(fds::SUPERVISOR_PID, supervisor.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    status.code()
}

#[test]
fn another_parent_than_the_supervisor_means_the_end() {
    assert_eq!(exit(std::process::id() + 1), Some(EngineExit::Orphaned.code().into()));
    // Its own parent: it goes on, to find that /dev/null is no socket.
    assert_eq!(exit(std::process::id()), Some(EngineExit::BadConfig.code().into()));
}
