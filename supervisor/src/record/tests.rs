use super::*;
use std::collections::BTreeSet;
use std::fs;

fn identity(id: &str) -> Identity {
    Identity {
        id: id.into(),
        key: IdentityKey { tailnet: "default".into(), pod_uid: "u1".into(), ifname: "ts0".into() },
        pod: PodRef { uid: "u1".into(), namespace: "ns".into(), name: "web".into() },
        hostname: "k8s-ns-web".into(),
        machine_key: SecretKey::new([1; 32]),
        node_key: SecretKey::new([2; 32]),
        old_node_key: None,
        registered: true,
        addresses: vec!["100.64.0.1".parse().unwrap()],
        stable_id: String::new(),
        keep_until_unix_s: None,
        leaving: false,
        login_url: String::new(),
        tags: Some(vec!["tag:web".into()]),
        ephemeral: None,
        other_names: Vec::new(),
        name_taken: String::new(),
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn what_was_saved_loads_and_is_private() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("state");
    let store = Store::open(&root).unwrap();
    store.save(&identity("a")).unwrap();
    store.save(&Identity { registered: false, ..identity("b") }).unwrap();
    store.save(&identity("b")).unwrap();
    assert_eq!(mode(&root), 0o700);
    assert_eq!(mode(&root.join("identities/a.json")), 0o600);
    let (mut records, asides) = store.load::<Identity>().unwrap();
    records.sort_by(|a, b| a.id.cmp(&b.id));
    assert_eq!((records, asides), (vec![identity("a"), identity("b")], vec![]));
    assert!(store.load::<Attachment>().unwrap().0.is_empty());
    store.remove::<Identity>("a").unwrap();
    store.remove::<Identity>("a").unwrap();
    assert_eq!(store.load::<Identity>().unwrap().0.len(), 1);
    let whole: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(root.join("identities/b.json")).unwrap()).unwrap();
    assert_eq!(whole["version"], 1);
}

#[test]
fn every_cut_and_every_flipped_byte_is_kept_aside_and_the_rest_loads() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.save(&identity("good")).unwrap();
    store.save(&identity("bad")).unwrap();
    let path = dir.path().join("identities/bad.json");
    let whole = fs::read(&path).unwrap();
    let newline = whole.len() - 1;
    let cuts = (0..newline).map(|n| whole[..n].to_vec());
    let flips = (0..newline).step_by(7).map(|n| {
        let mut bytes = whole.clone();
        bytes[n] ^= 1;
        bytes
    });
    for bytes in cuts.chain(flips) {
        fs::write(&path, &bytes).unwrap();
        let (records, asides) = store.load::<Identity>().unwrap();
        assert_eq!(records, [identity("good")], "{}", String::from_utf8_lossy(&bytes));
        assert_eq!(asides.len(), 1);
        assert_eq!(fs::read(&asides[0].path).unwrap(), bytes);
        assert!(!asides[0].reason.contains("[1,1"), "no key in a message");
        assert!(!path.exists());
        fs::remove_file(&asides[0].path).unwrap();
    }
}

#[test]
fn a_newer_version_and_a_renamed_file_are_reported() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.save(&identity("x")).unwrap();
    let path = dir.path().join("identities/x.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"version\":1", "\"version\":2")).unwrap();
    fs::write(dir.path().join("identities/y.json"), &text).unwrap();
    fs::write(dir.path().join("identities/.z.tmp"), "half").unwrap();
    let (records, mut asides) = store.load::<Identity>().unwrap();
    asides.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(records.is_empty());
    assert!(asides[0].path.ends_with("x.bad-newer"));
    assert!(asides[0].reason.contains("newer podtether"));
    assert!(asides[1].path.ends_with("y.bad-foreign"));
    assert!(!dir.path().join("identities/.z.tmp").exists());
    let (records, again) = store.load::<Identity>().unwrap();
    assert!(records.is_empty());
    let told = |asides: &[Aside]| asides.iter().map(|a| a.path.clone()).collect::<BTreeSet<_>>();
    assert_eq!(told(&again), told(&asides), "they are told of until somebody removes them");
}

#[test]
fn a_second_supervisor_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let first = Store::open(dir.path()).unwrap();
    let error = Store::open(dir.path()).unwrap_err().to_string();
    assert!(error.starts_with("another supervisor uses the state directory"), "{error}");
    drop(first);
    Store::open(dir.path()).unwrap();
}
