//! A headless Chromium that stands in a node, driven by the DevTools protocol over a pair of pipes.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use podtether_devnet::lab::Node;
use serde_json::{Value, json};

/// A browser on two busy processors takes its time to start.
const PATIENCE: Duration = Duration::from_secs(60);
/// What distributions call it; the first is built for nothing else.
const PROGRAMS: [&str; 3] = ["chromium-headless-shell", "chromium", "chromium-browser"];
/// Where the browser reads commands and writes answers.
const PIPES: [RawFd; 2] = [3, 4];

pub(crate) struct Browser {
    child: Child,
    to: io::PipeWriter,
    from: Receiver<Value>,
    calls: u64,
    session: Option<String>,
    /// What came besides answers.
    events: Vec<Value>,
}

fn program() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs: Vec<PathBuf> = std::env::split_paths(&path).collect();
    PROGRAMS.iter().find_map(|name| dirs.iter().map(|dir| dir.join(name)).find(|file| file.is_file()))
}

impl Browser {
    /// Starts one inside `node`; `None` where none is installed, which is said.
    pub(crate) fn start(node: &Node, dir: &Path) -> Option<Self> {
        let Some(program) = program() else {
            println!("SKIPPED: none of {PROGRAMS:?} is on PATH");
            return None;
        };
        let home = dir.join("browser");
        fs::create_dir_all(&home).unwrap();
        let (commands, to) = io::pipe().unwrap();
        let (from, answers) = io::pipe().unwrap();
        let ends = [commands.as_raw_fd(), answers.as_raw_fd()];
        let log = File::create(home.join("log")).unwrap();
        let mut command = node.command(&program);
        command
            .args([
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
            ])
            .args(["--disable-background-networking", "--disable-extensions", "--remote-debugging-pipe"])
            .arg(format!("--user-data-dir={}", home.display()))
            .arg("about:blank")
            .env("HOME", &home)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        let place = move || {
            let mut high = [0; 2];
            for (end, copy) in ends.into_iter().zip(&mut high) {
                // SAFETY: fcntl with integers only.
                *copy = unsafe { libc::fcntl(end, libc::F_DUPFD_CLOEXEC, 10) };
            }
            for (copy, at) in high.into_iter().zip(PIPES) {
                // SAFETY: dup2 with integers only.
                if unsafe { libc::dup2(copy, at) } < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: between fork and exec only descriptors are duplicated, which allocates nothing.
        unsafe { command.pre_exec(place) };
        let child = command.spawn().unwrap();
        drop((commands, answers));
        let (send, received) = channel();
        std::thread::spawn(move || {
            let mut from = BufReader::new(from);
            let mut message = Vec::new();
            // Each ends with a zero byte.
            while from.read_until(0, &mut message).is_ok_and(|n| n > 0) {
                message.pop();
                if send.send(serde_json::from_slice(&message).unwrap()).is_err() {
                    return;
                }
                message.clear();
            }
        });
        let mut browser = Self { child, to, from: received, calls: 0, session: None, events: Vec::new() };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" }))["targetId"].clone();
        let attached = browser.call("Target.attachToTarget", json!({ "targetId": target, "flatten": true }));
        browser.session = Some(attached["sessionId"].as_str().unwrap().to_owned());
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        browser.call("Page.bringToFront", json!({}));
        browser.call("Emulation.setFocusEmulationEnabled", json!({ "enabled": true }));
        Some(browser)
    }

    /// One command and its result.
    pub(crate) fn call(&mut self, method: &str, params: Value) -> Value {
        self.calls += 1;
        let mut message = json!({ "id": self.calls, "method": method, "params": params });
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        let mut bytes = serde_json::to_vec(&message).unwrap();
        bytes.push(0);
        self.to.write_all(&bytes).unwrap();
        let until = Instant::now() + PATIENCE;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let mut message = self
                .from
                .recv_timeout(left)
                .unwrap_or_else(|e| panic!("{method}: no answer of the browser: {e}"));
            if message["id"] == self.calls {
                assert!(message.get("error").is_none(), "{method}: {message}");
                return message["result"].take();
            }
            self.events.push(message);
        }
    }

    /// What a piece of script comes to.
    pub(crate) fn eval(&mut self, script: &str) -> Value {
        let params = json!({ "expression": script, "returnByValue": true, "awaitPromise": true });
        let mut said = self.call("Runtime.evaluate", params);
        assert!(said.get("exceptionDetails").is_none(), "{script}: {said}");
        said["result"]["value"].take()
    }

    /// Goes there and waits until it is loaded.
    pub(crate) fn open(&mut self, url: &str) {
        let went = self.call("Page.navigate", json!({ "url": url }));
        assert!(went.get("errorText").is_none(), "{went}");
        let until = Instant::now() + PATIENCE;
        while self.eval("document.readyState") != "complete" {
            assert!(Instant::now() < until, "{url} does not load");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Gives a page of this size.
    pub(crate) fn resize(&mut self, width: u32, height: u32) {
        let size = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.call("Emulation.setDeviceMetricsOverride", size);
    }

    /// As somebody sees it who likes it `dark` or `light`.
    pub(crate) fn prefer(&mut self, scheme: &str) {
        let features = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.call("Emulation.setEmulatedMedia", features);
    }

    /// Presses a key.
    pub(crate) fn press(&mut self, key: &str, code: u32) {
        let text = if key.chars().count() == 1 { key } else { "" };
        let text = if key == "Enter" { "\r" } else { text };
        let down = if text.is_empty() { "rawKeyDown" } else { "keyDown" };
        for (kind, text) in [(down, text), ("keyUp", "")] {
            let event = json!({ "type": kind, "key": key, "windowsVirtualKeyCode": code, "text": text });
            self.call("Input.dispatchKeyEvent", event);
        }
    }

    /// What is seen now, as a PNG.
    pub(crate) fn screenshot(&mut self, path: &Path) {
        let shot = self.call("Page.captureScreenshot", json!({ "format": "png" }));
        fs::write(path, BASE64_STANDARD.decode(shot["data"].as_str().unwrap()).unwrap()).unwrap();
    }

    /// What the console was told so far, errors of the policy and uncaught exceptions included.
    pub(crate) fn complaints(&mut self) -> Vec<String> {
        self.eval("0");
        let said = self.events.iter().filter(|event| {
            ["Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"]
                .iter()
                .any(|method| event["method"] == **method)
        });
        said.map(Value::to_string).collect()
    }

    /// Every address that was asked for so far.
    pub(crate) fn requests(&mut self) -> Vec<String> {
        self.eval("0");
        let asked = self.events.iter().filter(|event| event["method"] == "Network.requestWillBeSent");
        asked.map(|event| event["params"]["request"]["url"].as_str().unwrap().to_owned()).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        if let Ok(group) = i32::try_from(self.child.id()) {
            let _ = nix::sys::signal::killpg(
                nix::unistd::Pid::from_raw(group),
                nix::sys::signal::Signal::SIGKILL,
            );
        }
        let _ = self.child.wait();
    }
}
