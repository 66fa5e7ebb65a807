//! The supervisor's own edges: whoever calls it badly costs nobody else anything.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod rig;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use podtether_net::testing::{block_on, in_namespaces};
use rig::*;

/// More than either listener has places.
const CALLERS: usize = 600;

#[test]
fn callers_that_say_nothing_do_not_keep_others_out() {
    in_namespaces("callers_that_say_nothing_do_not_keep_others_out", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        rig.start();
        block_on(async {
            rig.client().await;
            let socket = dir.join("run/supervisor.sock");
            // Half of a call, and of a request.
            let silent: Vec<UnixStream> = (0..CALLERS)
                .map(|_| {
                    let mut stream = UnixStream::connect(&socket).unwrap();
                    stream.write_all(&[0, 0, 1, 0, 3]).unwrap();
                    stream
                })
                .collect();
            let web: Vec<TcpStream> = (0..100)
                .map(|_| {
                    let mut stream = TcpStream::connect("127.0.0.1:9465").unwrap();
                    stream.write_all(b"GET /metrics HTT").unwrap();
                    stream
                })
                .collect();
            rig.netns("a").await;
            let start = Instant::now();
            rig.add("a").await.unwrap();
            println!("ADD behind {CALLERS} silent callers: {:?}", start.elapsed());
            let start = Instant::now();
            assert_eq!(rig.pod("a")["state"], "running");
            println!("GET behind {} silent callers: {:?}", web.len(), start.elapsed());
            for mut stream in silent {
                stream.set_read_timeout(Some(TIMEOUT)).unwrap();
                assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0, "hung up on");
            }
            drop(web);
        });
    });
}

#[test]
fn only_root_and_its_own_user_are_heard_and_nobody_else_finds_a_secret() {
    in_namespaces("only_root_and_its_own_user_are_heard_and_nobody_else_finds_a_secret", |dir| {
        let devnet = devnet(|_| {});
        let mut rig = Rig::oauth(dir, &devnet);
        let log = dir.join("log");
        rig.stderr = Some(log.clone());
        rig.start();
        block_on(async {
            let client = rig.client().await;
            rig.netns("a").await;
            rig.add("a").await.unwrap();
            for (path, mode) in [
                ("run", 0o700),
                ("run/supervisor.sock", 0o600),
                ("run/engines", 0o700),
                ("state", 0o700),
                ("state/identities", 0o700),
                ("state/attachments", 0o700),
            ] {
                let found = std::fs::metadata(dir.join(path)).unwrap().permissions().mode() & 0o7777;
                assert_eq!(found, mode, "{path} has mode {found:o}");
            }
            let mut files = vec![dir.join("run/engines"), dir.join("state")];
            while let Some(path) = files.pop() {
                let meta = std::fs::symlink_metadata(&path).unwrap();
                assert_eq!(meta.permissions().mode() & 0o077, 0, "{} is open to others", path.display());
                if meta.is_dir() {
                    files.extend(std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
                }
            }

            // Somebody else gets to the socket nevertheless.
            std::fs::set_permissions(dir, PermissionsExt::from_mode(0o755)).unwrap();
            std::fs::set_permissions(dir.join("run"), PermissionsExt::from_mode(0o755)).unwrap();
            let socket = dir.join("run/supervisor.sock");
            std::fs::set_permissions(&socket, PermissionsExt::from_mode(0o666)).unwrap();
            if std::fs::read_to_string("/proc/self/uid_map").unwrap().trim_end().ends_with(" 1") {
                println!("SKIPPED in part: there is no other uid here");
            } else {
                // SAFETY: a child that makes system calls alone and ends by _exit.
                let child = unsafe { libc::fork() };
                if child == 0 {
                    // SAFETY: a plain system call.
                    let gid = unsafe { libc::setresgid(77_777, 77_777, 77_777) };
                    // SAFETY: a plain system call.
                    let uid = unsafe { libc::setresuid(77_777, 77_777, 77_777) };
                    let heard = UnixStream::connect(&socket).map(|mut s| s.read(&mut [0]).unwrap_or(0));
                    let refused = (gid, uid) == (0, 0) && heard.is_ok_and(|bytes| bytes == 0);
                    // SAFETY: ends the child without running anything of the test's.
                    unsafe { libc::_exit(i32::from(!refused)) };
                }
                let mut status = -1;
                // SAFETY: `status` outlives the call.
                assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
                assert_eq!(status, 0);
                assert!(http("/metrics").contains("podtether_refused_total{reason=\"rpc_peer\"} 1"));
            }
            drop(client);

            // What the records hold is nowhere else.
            let mut secrets = vec![std::fs::read_to_string(dir.join("secret")).unwrap()];
            let minted = devnet.auth_keys();
            assert!(!minted.is_empty());
            secrets.extend(minted.into_iter().map(|key| key.secret));
            let record = std::fs::read_dir(dir.join("state/identities")).unwrap().next().unwrap().unwrap();
            let record: serde_json::Value =
                serde_json::from_str(&std::fs::read_to_string(record.path()).unwrap()).unwrap();
            for key in ["machine_key", "node_key"] {
                let bytes: Vec<u8> = serde_json::from_value(record["body"][key].clone()).unwrap();
                assert_eq!(bytes.len(), 32);
                secrets.push(bytes.iter().map(|byte| format!("{byte:02x}")).collect());
                secrets.push(format!("{bytes:?}"));
                secrets.push(serde_json::to_string(&bytes).unwrap());
            }
            rig.del("a").await.unwrap();
            let said = [std::fs::read_to_string(&log).unwrap(), http("/metrics"), http("/v1/pods")].concat();
            assert!(said.len() > 1000);
            for secret in secrets {
                assert!(secret.len() > 4 && !said.contains(&secret), "{secret} is in what was said");
            }
        });
    });
}
