//! The page of a node, seen by a real browser in it.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use podtether_devnet::DevnetConfig;
use podtether_devnet::probe::ping::Pinging;
use serde_json::json;

use crate::browser::Browser;
use crate::{Rig, engine_pid, lab_test, wait_for, wait_for_within, wait_reachable};

const PAGE: &str = "http://127.0.0.1:9465/";
/// What would make itself noticed if it became anything but text.
const HOSTILE: &str =
    "<img src=http://evil.example/x onerror=document.title='owned'><script>document.title='owned'</script>";

/// The text of each pod's row, in the order in which they stand.
fn rows(browser: &mut Browser) -> Vec<String> {
    let script =
        "[...document.querySelectorAll('#table tbody')].map((b) => b.innerText.replace(/\\s+/g, ' '))";
    let rows = browser.eval(script);
    rows.as_array().unwrap().iter().map(|row| row.as_str().unwrap().to_owned()).collect()
}

fn text(browser: &mut Browser, of: &str) -> String {
    browser.eval(&format!("document.querySelector({of:?}).innerText")).as_str().unwrap().to_owned()
}

/// Writes pictures where the variable says, for the documents.
fn picture(browser: &mut Browser, name: &str) {
    if let Some(dir) = std::env::var_os("PODTETHER_PICTURES") {
        browser.screenshot(&PathBuf::from(dir).join(name));
    }
}

/// What is seen while the engine of a pod is killed whenever there is one.
fn in_trouble(browser: &mut Browser) {
    wait_for("an engine that is not restarted at once", || {
        let first = rows(browser).first().cloned().unwrap_or_default();
        let state = ["restarting", "backoff"].iter().any(|state| first.contains(state));
        (state && first.contains("shop/web-x2x8l") && first.contains("the engine crashed")).then_some(())
    });
    wait_for("the sum to say so", || text(browser, "#sum").contains("4 joined").then_some(()));
    wait_for("the title to say so", || {
        browser.eval("document.title").as_str().unwrap().starts_with("(1) podtether ").then_some(())
    });
    picture(browser, "page-light.png");
    browser.prefer("dark");
    picture(browser, "page-dark.png");
    browser.resize(380, 900);
    let fits = "document.documentElement.scrollWidth <= document.documentElement.clientWidth";
    assert_eq!(browser.eval(fits), true);
    picture(browser, "page-narrow.png");
    browser.resize(1180, 720);
    browser.prefer("light");
}

#[test]
fn the_page_shows_pods_as_they_are_now_and_strangers_words_as_text() {
    lab_test("page::the_page_shows_pods_as_they_are_now_and_strangers_words_as_text", |dir| {
        let mut rig = Rig::start(dir, 1, DevnetConfig::default());
        let Some(mut browser) = Browser::start(&rig.nodes[0], dir) else { return };
        browser.resize(1180, 720);
        browser.prefer("light");
        browser.open(PAGE);
        wait_for("the sentence that nobody is here", || {
            text(&mut browser, "#empty").starts_with("No pod of this node is in a tailnet").then_some(())
        });
        picture(&mut browser, "page-empty.png");

        let names = [
            ("shop", "web-7d4b9"),
            ("shop", "web-x2x8l"),
            ("shop", "db-0"),
            ("ops", "backup-29381"),
            ("ops", "prometheus-0"),
        ];
        let mut pods = Vec::new();
        for (namespace, name) in names {
            let mut pod = rig.nodes[0].create_pod(name).unwrap();
            namespace.clone_into(&mut pod.namespace);
            pod.add(&rig.nodes[0]).unwrap();
            pods.push(pod);
        }
        let node = &rig.nodes[0];
        for other in &pods[1..] {
            wait_reachable(&pods[0], other.v4().unwrap());
        }
        let pair = |from: usize, to: usize, every: u64| {
            Pinging::start(&pods[from].netns, pods[to].v4().unwrap(), Duration::from_millis(every), None)
                .unwrap()
        };
        let traffic = [pair(0, 2, 5), pair(1, 2, 20), pair(4, 0, 50)];
        wait_for("every pod, running, with its traffic", || {
            let rows = rows(&mut browser);
            let busy = |row: &String| row.contains("running") && !row.contains(" 0B/s in");
            (rows.len() == 5 && rows.iter().filter(|row| busy(row)).count() >= 4).then_some(())
        });
        assert_eq!(text(&mut browser, "#sum"), "5 pods: 5 joined, 0 pending, 0 failed");
        let events = text(&mut browser, "#events");
        assert!(events.contains("pod joined addresses=[100.64.0."), "with its fields: {events}");

        // What control says of a node is a stranger's word.
        let devices = rig.devnet.nodes();
        let device = devices.iter().find(|device| device.name.starts_with("prometheus")).unwrap();
        assert!(rig.devnet.tell(device.id, json!({ "Health": [HOSTILE] })));
        wait_for("the stranger's word, as text", || {
            rows(&mut browser).iter().any(|row| row.contains(HOSTILE)).then_some(())
        });
        assert!(rows(&mut browser)[0].contains("prometheus-0"), "what is not well stands on top");
        assert_eq!(browser.eval("document.querySelectorAll('img, #table script').length"), 0);
        assert!(!browser.eval("document.title").as_str().unwrap().contains("owned"));
        assert!(rig.devnet.tell(device.id, json!({ "Health": [] })));
        wait_for("all well again", || (!rows(&mut browser).concat().contains(HOSTILE)).then_some(()));

        // An engine that dies again and again is in trouble, and the first thing that is seen.
        let (caller, stop) = (node.caller(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let killing = scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    if let Some(pid) = engine_pid(&caller, "web-x2x8l") {
                        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
            });
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| in_trouble(&mut browser)));
            stop.store(true, Ordering::Relaxed);
            killing.join().unwrap();
            if let Err(failure) = done {
                std::panic::resume_unwind(failure);
            }
        });
        wait_for_within(Duration::from_secs(120), "the pod to be well again", || {
            let rows = rows(&mut browser);
            let of_it = rows.iter().find(|row| row.contains("shop/web-x2x8l"))?;
            of_it.contains("running").then_some(())
        });

        // Without a mouse.
        browser.press("/", 191);
        for key in ["d", "b", "-"] {
            browser.press(key, 0);
        }
        assert_eq!(rows(&mut browser).len(), 1);
        browser.press("Tab", 9);
        browser.press("Enter", 13);
        wait_for("all that is known of the pod", || {
            let row = rows(&mut browser)[0].clone();
            (row.contains("home relay") && row.contains("db-0.tailnet.test")).then_some(())
        });
        picture(&mut browser, "page-details.png");
        browser.eval("document.querySelector('#find').focus()");
        browser.press("Escape", 27);
        assert_eq!(rows(&mut browser).len(), 5);

        // Nothing was loaded from elsewhere, and nothing went wrong in it.
        let asked = browser.requests();
        assert!(asked.iter().all(|url| url.starts_with(PAGE) || url.starts_with("data:")), "{asked:?}");
        assert!(asked.iter().any(|url| url.ends_with("/v1/live")), "{asked:?}");
        let said = browser.complaints();
        assert!(said.is_empty(), "{said:#?}");

        // A supervisor that is gone is told of, and so is that it is back.
        for pinging in traffic {
            pinging.stop(Duration::ZERO).unwrap();
        }
        rig.nodes[0].kill_supervisor().unwrap();
        wait_for("the page to say that nobody answers", || {
            let shown = browser.eval("!document.querySelector('#lost').hidden") == true;
            (shown && text(&mut browser, "#lost").contains("connection to the supervisor is lost"))
                .then_some(())
        });
        picture(&mut browser, "page-lost.png");
        rig.nodes[0].start_supervisor().unwrap();
        wait_for("the page to go on", || {
            let well = browser.eval("document.querySelector('#lost').hidden") == true;
            (well && rows(&mut browser).iter().filter(|row| row.contains("running")).count() == 5)
                .then_some(())
        });
    });
}
