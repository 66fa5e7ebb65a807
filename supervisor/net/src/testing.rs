//! Help for tests on the real kernel.

use std::future::Future;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;
use std::process::{Command, Stdio};

use rtnetlink::LinkUnspec;

use crate::error::Result;
use crate::isolate;
use crate::netlink::Netlink;
use crate::netns::Netns;

/// Names the test whose isolated process this is.
const TEST: &str = "PODTETHER_TEST";

/// Runs `body` in namespaces of its own ([`isolate`]), as root there, with loopback up and a directory on
/// a private tmpfs. `name` is the test's own full path within its binary: the test is executed again in
/// a child, whose failure is this test's failure.
///
/// # Panics
/// When the body does, or when namespaces cannot be made: such a test fails, it is never skipped.
#[expect(clippy::print_stdout, reason = "output of the test inside belongs to the test's")]
pub fn in_namespaces(name: &str, body: impl FnOnce(&Path)) {
    if std::env::var(TEST).is_ok_and(|inside| inside == name) {
        let dir = block_on(isolate::settle()).unwrap_or_else(|e| panic!("{e}"));
        body(&dir);
        return;
    }
    let exe = std::env::current_exe().unwrap_or_else(|e| panic!("own path: {e}"));
    let mut command = Command::new(exe);
    command
        .args([name, "--exact", "--include-ignored", "--nocapture", "--test-threads=1"])
        .env(TEST, name)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = isolate::spawn(command).unwrap_or_else(|e| panic!("{e}"));
    let output = child.wait_with_output().unwrap_or_else(|e| panic!("{e}"));
    let stdout = String::from_utf8_lossy(&output.stdout);
    print!("{stdout}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name} failed inside its namespaces ({})", output.status);
    assert!(stdout.contains("1 passed"), "{name} is not this test's full path: nothing ran");
}

/// Runs a future on a current-thread runtime of its own.
///
/// # Panics
/// When no runtime can be made.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap_or_else(|e| panic!("runtime: {e}"))
        .block_on(future)
}

/// Moves an interface into another namespace, as somebody with the rights might.
///
/// # Errors
/// As the kernel says.
pub async fn move_link(netlink: &Netlink, link: u32, to: &Netns) -> Result<()> {
    let message = LinkUnspec::new_with_index(link).setns_by_fd(to.as_fd().as_raw_fd()).build();
    netlink.set(message, || format!("move link {link} to another namespace")).await
}
