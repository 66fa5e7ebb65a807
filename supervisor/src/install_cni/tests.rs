//! Whole directories: what a runtime sees at every moment of an installation, and what others may do meanwhile.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::conf::{Form, Network, OURS};
use super::plan::{File, Plan, SAVED, Step};
use super::*;

type Dir = BTreeMap<String, String>;
/// Files by name.
type Given<'a> = &'a [(&'a str, &'a str)];

pub(super) fn entry() -> Entry {
    Entry {
        socket: "/run/podtether/supervisor.sock".into(),
        tailnet: "default".into(),
        timeout_seconds: 60,
        failure_policy: "closed".into(),
    }
}

const FLANNEL: &str = r#"{
  "name": "cbr0",
  "cniVersion": "1.0.0",
  "plugins": [
    {"type": "flannel", "delegate": {"hairpinMode": true, "forceAddress": true, "isDefaultGateway": true}},
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
"#;
/// As Cilium writes it.
const CILIUM: &str = "\n{\n  \"cniVersion\": \"0.3.1\",\n  \"name\": \"cilium\",\n  \"plugins\": [\n    {\n       \
    \"type\": \"cilium-cni\",\n       \"enable-debug\": false,\n       \"log-file\": \"/var/run/cilium/cilium-cni.log\"\n    }\n  ]\n}";
const BRIDGE: &str = r#"{"cniVersion":"0.4.0","name":"net","type":"bridge","x-vendor":[1.0,2e3],"ipam":{"type":"host-local"}}"#;

fn dir(files: &[(&str, &str)]) -> Dir {
    files.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
}

fn files(dir: &Dir) -> Vec<File> {
    // The order of a directory is any.
    dir.iter().rev().map(|(name, text)| File { name: name.clone(), text: Ok(text.clone()) }).collect()
}

fn act(dir: &mut Dir, step: &Step) {
    match step {
        Step::Write { name, expected, text } => {
            assert_eq!(dir.insert(name.clone(), text.clone()), *expected, "{name}");
        }
        Step::Move { name, expected, to, replace } => {
            let text = dir.remove(name).unwrap();
            assert_eq!(text, *expected);
            let there = dir.insert(to.clone(), text);
            assert!(*replace || there.is_none(), "{to}");
        }
        Step::Remove { name, expected } => assert_eq!(dir.remove(name).as_ref(), Some(expected)),
    }
}

fn finish(dir: &mut Dir, plan: impl Fn(&[File]) -> Plan) -> Plan {
    for _ in 0..4 {
        let now = plan(&files(dir));
        if now.steps.is_empty() {
            return now;
        }
        now.steps.iter().for_each(|step| act(dir, step));
    }
    panic!("it does not come to rest: {dir:?}")
}

/// What a runtime that passes over what it cannot use would run: types of plugins.
fn runs(dir: &Dir) -> Option<Vec<String>> {
    let usable = |(name, text): (&String, &String)| {
        let network = Network::read(conf::form(name)?, text).ok()?;
        Some(network.types)
    };
    dir.iter().find_map(usable)
}

fn primary(dir: &Dir) -> Option<Vec<String>> {
    runs(dir).map(|types| types.into_iter().filter(|kind| kind != OURS).collect())
}

/// Each directory, and the file that our entry must be in.
fn directories() -> Vec<(Dir, &'static str)> {
    let backup = [("10-flannel.conflist", FLANNEL), ("99-old.conflist.bak", "{"), ("README", "x")];
    vec![
        (dir(&backup), "10-flannel.conflist"),
        (dir(&[("05-cilium.conflist", CILIUM), ("10-flannel.conflist", FLANNEL)]), "05-cilium.conflist"),
        (dir(&[("10-bridge.conf", BRIDGE)]), "10-bridge.conflist"),
        (dir(&[("10-bridge.json", BRIDGE), ("20-x.conflist", FLANNEL)]), "10-bridge.conflist"),
        (dir(&[("10-bridge.conf", BRIDGE), ("10-bridge.conflist", FLANNEL)]), "10-bridge-podtether.conflist"),
        (dir(&[("00-broken.conflist", "{"), ("10-flannel.conflist", FLANNEL)]), "10-flannel.conflist"),
        (dir(&[("00-list.conf", FLANNEL), ("10-flannel.conflist", FLANNEL)]), "10-flannel.conflist"),
    ]
}

#[test]
fn whenever_it_is_cut_off_pods_start_and_it_can_be_finished_or_undone() {
    let install = |files: &[File]| plan::install(files, &entry());
    for (before, wanted) in directories() {
        let mut whole = before.clone();
        let plan = finish(&mut whole, install);
        assert!(plan.is_done(), "{plan:?}");
        assert_eq!(runs(&whole).unwrap().last().unwrap(), OURS, "{whole:?}");
        assert!(whole[wanted].contains(OURS), "{whole:?}");
        assert_eq!(primary(&whole), primary(&before));
        let mut undone = whole.clone();
        finish(&mut undone, plan::uninstall);
        assert_eq!(undone, before, "uninstalling leaves what was there");

        for cut in 0..=install(&files(&before)).steps.len() {
            let mut broken_off = before.clone();
            for step in &install(&files(&before)).steps[..cut] {
                act(&mut broken_off, step);
                assert_eq!(primary(&broken_off), primary(&before), "after {step:?}");
            }
            let mut finished = broken_off.clone();
            finish(&mut finished, install);
            assert_eq!(finished, whole, "finished after {cut} steps");
            finish(&mut broken_off, plan::uninstall);
            assert_eq!(broken_off, before, "undone after {cut} steps");
        }
        for cut in 0..=plan::uninstall(&files(&whole)).steps.len() {
            let mut broken_off = whole.clone();
            for step in &plan::uninstall(&files(&whole)).steps[..cut] {
                act(&mut broken_off, step);
                assert_eq!(primary(&broken_off), primary(&before), "after {step:?}");
            }
            finish(&mut broken_off, plan::uninstall);
            assert_eq!(broken_off, before, "after {cut} steps");
        }
    }
}

#[test]
fn what_cannot_be_used_is_refused_with_a_sentence_and_left_alone() {
    let old = FLANNEL.replace("1.0.0", "0.2.0");
    let table: [(Given<'_>, bool, &str); 7] = [
        (&[], false, ""),
        (&[("10-a.conflist", "{\"name\":")], false, "10-a.conflist is not JSON"),
        (&[("10-a.conflist", "{\"name\":"), ("20-b.conflist", FLANNEL)], true, "left as it is"),
        (&[("10-a.conflist", &old)], false, "speaks CNI \"0.2.0\""),
        (
            &[("10-a.conflist", r#"{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"podtether-cni"}]}"#)],
            false,
            "needs a primary plugin",
        ),
        (
            &[("10-a.conf", r#"{"name":"n","cniVersion":"1.0.0","type":"podtether-cni"}"#)],
            false,
            "needs a primary",
        ),
        (&[("10-a.conf", FLANNEL)], false, "from a .conflist only"),
    ];
    for (given, possible, says) in table {
        let before = dir(given);
        let plan = plan::install(&files(&before), &entry());
        assert_eq!(plan.possible, possible, "{plan:?}");
        assert!(plan.refused.join(";").contains(says), "{says}: {plan:?}");
        assert!(possible || plan.steps.is_empty(), "{plan:?}");
    }
    let mut unreadable = files(&dir(&[("20-b.conflist", FLANNEL)]));
    unreadable.push(File { name: "10-a.conflist".into(), text: Err("is a link to x".into()) });
    let plan = plan::install(&unreadable, &entry());
    assert_eq!((plan.chosen.as_deref(), plan.steps.len()), (Some("20-b.conflist"), 1));
    // Where our name stands in something that cannot be read, the plugin must stay.
    let plan = plan::uninstall(&files(&dir(&[("10-a.conflist", "{\"podtether-cni\"")])));
    assert!(!plan.possible && plan.refused[0].contains("mend or remove"), "{plan:?}");
    assert!(plan::uninstall(&files(&dir(&[("10-a.conflist", "{")]))).possible);
}

#[test]
fn a_writer_that_comes_back_is_followed() {
    let install = |files: &[File]| plan::install(files, &entry());
    // The primary CNI writes its .conf again, changed.
    let mut now = dir(&[("10-bridge.conf", BRIDGE)]);
    finish(&mut now, install);
    let changed = BRIDGE.replace("2e3", "7");
    now.insert("10-bridge.conf".into(), changed.clone());
    finish(&mut now, install);
    assert!(now["10-bridge.conflist"].contains("[1.0,7]"), "{now:?}");
    assert_eq!(now.get(&format!("10-bridge.conf{SAVED}")), Some(&changed));
    // And then a list that it made of it itself: what is ours goes, what is its own stays.
    now.insert("10-bridge.conflist".into(), FLANNEL.into());
    finish(&mut now, install);
    finish(&mut now, plan::uninstall);
    assert_eq!(now, dir(&[("10-bridge.conflist", FLANNEL)]));
    // Another primary comes before the one that had our entry, which goes there.
    let mut now = dir(&[("10-flannel.conflist", FLANNEL)]);
    finish(&mut now, install);
    now.insert("05-cilium.conflist".into(), CILIUM.into());
    finish(&mut now, install);
    assert_eq!(now["10-flannel.conflist"], FLANNEL);
    assert!(now["05-cilium.conflist"].contains(OURS));
}

fn on_disk(dir: &Path) -> Dir {
    let read =
        |e: fs::DirEntry| (e.file_name().into_string().unwrap(), fs::read_to_string(e.path()).unwrap());
    fs::read_dir(dir).unwrap().map(|e| read(e.unwrap())).collect()
}

fn put(dir: &Path, files: &Dir) {
    for (name, text) in files {
        fs::write(dir.join(name), text).unwrap();
    }
}

/// Directories of a node of its own.
struct Node {
    _dir: tempfile::TempDir,
    options: Options,
}

impl Node {
    fn new(mode: Mode) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("bin")).unwrap();
        fs::write(at("podtether-cni"), "the plugin").unwrap();
        let socket = at("s").to_str().unwrap().to_owned();
        let options = Options {
            conf_dir: at("net.d"),
            bin_dirs: vec![at("none"), at("bin")],
            plugin: at("podtether-cni"),
            entry: Entry { socket, ..entry() },
            mode,
            cluster: None,
            daemon_set: None,
            taint: None,
        };
        disk::list(&options.conf_dir).unwrap();
        Self { _dir: dir, options }
    }

    fn conf(&self, name: &str) -> PathBuf {
        self.options.conf_dir.join(name)
    }

    fn plugin(&self) -> PathBuf {
        self.options.bin_dirs[1].join(OURS)
    }

    /// Waits until our entry is in this file.
    async fn chained(&self, name: &str) {
        let watch = Watch::new(std::slice::from_ref(&self.options.conf_dir)).unwrap();
        let chained = async {
            while !fs::read_to_string(self.conf(name)).is_ok_and(|text| text.contains(OURS)) {
                watch.changed().await.unwrap();
            }
        };
        tokio::time::timeout(Duration::from_secs(60), chained).await.expect("it is chained");
    }
}

#[test]
fn steps_on_a_disk_do_what_they_do_in_the_plan() {
    for (before, _) in directories() {
        let node = Node::new(Mode::Check);
        let dir = &node.options.conf_dir;
        put(dir, &before);
        let mode = |name: &str| fs::metadata(dir.join(name)).unwrap().permissions();
        let first = before.keys().find(|name| name.ends_with("flannel.conflist"));
        if let Some(name) = first {
            use std::os::unix::fs::PermissionsExt as _;
            fs::set_permissions(dir.join(name), fs::Permissions::from_mode(0o640)).unwrap();
        }
        let modes: Vec<_> = first.iter().map(|name| mode(name)).collect();
        let round = node.options.round().unwrap();
        assert!(round.wrote && round.plan.is_done());
        let mut wanted = before.clone();
        finish(&mut wanted, |files| plan::install(files, &node.options.entry));
        assert_eq!(on_disk(dir), wanted);
        assert_eq!(first.iter().map(|name| mode(name)).collect::<Vec<_>>(), modes);
        assert_eq!(fs::read_to_string(node.plugin()).unwrap(), "the plugin");
        assert!(!node.options.round().unwrap().wrote);
        assert!(node.options.missing().unwrap().is_none());
        remove(&node.options).unwrap();
        assert_eq!(on_disk(dir), before);
        assert!(!node.plugin().exists());
        assert!(node.options.missing().unwrap().is_some());
        remove(&node.options).unwrap();
    }
}

#[test]
fn a_plan_that_was_overtaken_changes_nothing() {
    let node = Node::new(Mode::Check);
    let dir = &node.options.conf_dir;
    let here = dir.join("10-a.conf");
    let write = |expected: Option<&str>| Step::Write {
        name: "10-a.conf".into(),
        expected: expected.map(str::to_owned),
        text: "ours".into(),
    };
    let step =
        |replace| Step::Move { name: "10-a.conf".into(), expected: "old".into(), to: "x".into(), replace };
    let gone = Step::Remove { name: "10-a.conf".into(), expected: "old".into() };
    for step in [write(Some("old")), step(true), gone.clone()] {
        assert_eq!(disk::apply(dir, &step).unwrap(), Done::Overtaken, "no file: {step:?}");
    }
    fs::write(&here, "newer").unwrap();
    for step in [write(Some("old")), write(None), step(true), step(false), gone] {
        assert_eq!(disk::apply(dir, &step).unwrap(), Done::Overtaken, "{step:?}");
        assert_eq!(on_disk(dir), [("10-a.conf".to_owned(), "newer".to_owned())].into(), "{step:?}");
    }
    fs::write(&here, "old").unwrap();
    fs::write(dir.join("x"), "somebody's").unwrap();
    assert_eq!(disk::apply(dir, &step(false)).unwrap(), Done::Overtaken);
    assert_eq!(disk::apply(dir, &write(Some("old"))).unwrap(), Done::Yes);
    assert_eq!(fs::read_to_string(&here).unwrap(), "ours");
    fs::write(partial_of(dir), "cut off").unwrap();
    disk::tidy(dir).unwrap();
    assert!(!partial_of(dir).exists());
}

fn partial_of(dir: &Path) -> PathBuf {
    dir.join(".10-a.conf.podtether-partial")
}

#[test]
fn links_and_large_files_are_left_alone() {
    let node = Node::new(Mode::Check);
    let other = node.options.plugin.with_file_name("elsewhere");
    fs::write(&other, FLANNEL).unwrap();
    std::os::unix::fs::symlink(&other, node.conf("10-a.conflist")).unwrap();
    fs::write(node.conf("20-b.conflist"), " ".repeat(2 << 20)).unwrap();
    fs::create_dir(node.conf("30-c.conflist")).unwrap();
    let round = node.options.round().unwrap();
    assert!(!round.plan.is_done());
    let refused = round.plan.refused.join("; ");
    assert!(refused.contains("is a link to") && refused.contains("larger than 1 MiB"), "{refused}");
    assert_eq!(fs::read_to_string(other).unwrap(), FLANNEL);
}

#[test]
fn nothing_another_writer_says_is_lost() {
    /// Replaces the file, as careful writers do, or writes into it.
    fn writer(path: &Path, in_place: bool, stop: &AtomicBool) -> u64 {
        let mut serial = 0;
        while !stop.load(Ordering::Relaxed) {
            serial += 1;
            let text = FLANNEL.replace("\"name\"", &format!("\"serial\": {serial}, \"name\""));
            // As fast as that, now and then somebody else has a turn.
            std::thread::sleep(Duration::from_micros(serial * 7919 % 30_000));
            if in_place {
                fs::write(path, text).unwrap();
            } else {
                let whole = path.with_extension("new");
                fs::write(&whole, text).unwrap();
                fs::rename(&whole, path).unwrap();
            }
        }
        serial
    }
    for in_place in [false, true] {
        let node = Node::new(Mode::Check);
        let path = node.conf("10-flannel.conflist");
        let stop = AtomicBool::new(false);
        let mut wrote = 0;
        let last = std::thread::scope(|scope| {
            let writing = scope.spawn(|| writer(&path, in_place, &stop));
            while wrote < 20 {
                match node.options.round() {
                    Ok(round) => wrote += u32::from(round.wrote),
                    Err(e) => assert!(e.to_string().contains("faster"), "{e}"),
                }
            }
            stop.store(true, Ordering::Relaxed);
            writing.join().unwrap()
        });
        println!("in place: {in_place}: chained {wrote} times during {last} writes");
        node.options.round().unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(&format!("\"serial\": {last},")) && text.contains(OURS), "{last}: {text}");
        assert_eq!(Network::read(Form::List, &text).unwrap().types, ["flannel", "portmap", OURS]);
        assert_eq!(on_disk(&node.options.conf_dir).len(), 1, "nothing is left beside it");
    }
}

#[tokio::test]
async fn it_waits_for_the_primary_cni_and_for_the_supervisor_and_comes_back() {
    let node = Node::new(Mode::Watch);
    let options = node.options.clone();
    let keeping = tokio::spawn(async move { keep(&options, &Notify::new()).await });
    // The plugin comes first, and nothing names it while no supervisor serves.
    let bin = Watch::new(&node.options.bin_dirs).unwrap();
    while !node.plugin().exists() {
        tokio::time::timeout(Duration::from_secs(60), bin.changed()).await.unwrap().unwrap();
    }
    fs::write(node.conf("10-flannel.conflist"), FLANNEL).unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(fs::read_to_string(node.conf("10-flannel.conflist")).unwrap(), FLANNEL);
    let listener = tokio::net::UnixListener::bind(&node.options.entry.socket).unwrap();
    node.chained("10-flannel.conflist").await;
    drop(listener);
    // Dropped while no supervisor serves: it was in force, and comes back at once.
    for text in [FLANNEL.to_owned(), FLANNEL.replace("portmap", "bandwidth")] {
        fs::write(node.conf("10-flannel.conflist"), text).unwrap();
        node.chained("10-flannel.conflist").await;
    }
    fs::write(node.conf("05-cilium.conflist"), CILIUM).unwrap();
    node.chained("05-cilium.conflist").await;
    // The whole directory goes and comes.
    fs::remove_dir_all(&node.options.conf_dir).unwrap();
    let _ = fs::create_dir(&node.options.conf_dir);
    fs::write(node.conf("10-flannel.conflist"), FLANNEL).unwrap();
    node.chained("10-flannel.conflist").await;
    // So does the plugin.
    fs::remove_file(node.plugin()).unwrap();
    while !node.plugin().exists() {
        tokio::time::timeout(Duration::from_secs(60), bin.changed()).await.unwrap().unwrap();
    }
    assert!(!keeping.is_finished());
    keeping.abort();
}

#[tokio::test]
async fn plugins_behind_a_link_that_turns() {
    let mut node = Node::new(Mode::Watch);
    let data = node.options.plugin.with_file_name("data");
    for dir in ["v1/bin", "v2/bin"] {
        fs::create_dir_all(data.join(dir)).unwrap();
    }
    std::os::unix::fs::symlink(data.join("v1"), data.join("current")).unwrap();
    node.options.bin_dirs = vec![data.join("current/bin")];
    fs::write(node.conf("10-flannel.conflist"), FLANNEL).unwrap();
    let _listener = tokio::net::UnixListener::bind(&node.options.entry.socket).unwrap();
    let options = node.options.clone();
    let keeping = tokio::spawn(async move { keep(&options, &Notify::new()).await });
    node.chained("10-flannel.conflist").await;
    assert!(data.join("v1/bin/podtether-cni").exists());
    let watch = Watch::new(&[data.join("v2/bin")]).unwrap();
    std::os::unix::fs::symlink(data.join("v2"), data.join("turned")).unwrap();
    fs::rename(data.join("turned"), data.join("current")).unwrap();
    while !data.join("v2/bin/podtether-cni").exists() {
        tokio::time::timeout(Duration::from_secs(60), watch.changed()).await.unwrap().unwrap();
    }
    keeping.abort();
}

#[tokio::test]
async fn once_waits_as_long_as_it_was_told_and_says_what_for() {
    let node = Node::new(Mode::Check);
    let late = once(&node.options, Duration::from_millis(50)).await.unwrap_err().to_string();
    assert!(late.contains("a primary CNI, which is not installed yet"), "{late}");
    fs::write(node.conf("10-flannel.conflist"), "{").unwrap();
    let wrong = once(&node.options, Duration::from_millis(50)).await.unwrap_err().to_string();
    assert!(wrong.contains("10-flannel.conflist is not JSON"), "{wrong}");
    assert_eq!(fs::read_to_string(node.conf("10-flannel.conflist")).unwrap(), "{");
    let (waiting, ()) = tokio::join!(once(&node.options, Duration::from_secs(60)), async {
        tokio::task::yield_now().await;
        fs::write(node.conf("10-flannel.conflist"), FLANNEL).unwrap();
    });
    waiting.unwrap();
    let mut nowhere = node.options.clone();
    nowhere.bin_dirs.truncate(1);
    let told = nowhere.round().unwrap_err().to_string();
    assert!(told.contains("--cni-bin-dir"), "{told}");
}
