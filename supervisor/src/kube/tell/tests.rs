use std::sync::Mutex;

use kubeapi::KubeApi;
use podtether_net::testing::block_on;
use tokio::sync::Notify;

use super::super::{Api, Inner, Store, collect};
use super::*;
use crate::config::{Config, Inputs};
use crate::table::LastExit;

#[path = "../../../tests/kubeapi/mod.rs"]
mod kubeapi;

fn pod(state: &'static str) -> PodReport {
    PodReport {
        tailnet: "default".into(),
        pod: "web-0".into(),
        state,
        hostname: "web".into(),
        name: "web.tail.example".into(),
        addresses: vec!["100.64.0.1".parse().unwrap(), "fd7a::1".parse().unwrap()],
        ..PodReport::default()
    }
}

#[test]
fn what_is_worth_an_event() {
    let exit = LastExit { kind: "crash", reason: "it fell".into(), seconds_ago: 1 };
    let looping = PodReport { restarts: 3, last_exit: Some(exit), ..pod("backoff") };
    let numbered = PodReport { name: "web-1.tail.example".into(), ..pod("running") };
    let renamed = PodReport { name: "shop-1.tail.example".into(), ..pod("running") };
    let moved = PodReport {
        hostname: "web-x2x4z".into(),
        name: "web-x2x4z.tail.example".into(),
        name_taken: "web".into(),
        ..pod("running")
    };
    let noted = PodReport { notes: vec!["odd".into()], ..pod("running") };
    let login = PodReport { login_url: "https://login.example/a/1".into(), ..pod("needs-login") };
    type Case = (PodReport, bool, &'static [(&'static str, &'static str)]);
    let table: [Case; 12] = [
        (pod("running"), false, &[("Joined", "default as web.tail.example with 100.64.0.1, fd7a::1")]),
        (pod("running"), true, &[]),
        (PodReport { addresses: vec![], ..pod("running") }, false, &[]),
        (login, false, &[("WaitingForLogin", "open https://login.example/a/1")]),
        (pod("needs-approval"), false, &[("WaitingForApproval", "has to approve the device")]),
        (PodReport { restarts: 2, ..pod("backoff") }, true, &[]),
        (looping, true, &[("EngineCrashLoop", "last crash: it fell")]),
        (numbered, true, &[("HostNameTaken", "another device called web, so this one is web-1")]),
        (moved, true, &[("HostNameTaken", "another device called web, so this one is web-x2x4z")]),
        (renamed, true, &[]),
        (noted, true, &[("Annotation", "odd")]),
        (pod("joining"), false, &[]),
    ];
    for (pod, had_joined, wanted) in table {
        let said = events(&pod, had_joined);
        assert_eq!(said.len(), wanted.len(), "{said:?}");
        for (event, (reason, part)) in said.iter().zip(wanted) {
            assert!(event.reason == *reason && event.message.contains(part), "{event:?}");
            let is_plain = *reason == "Joined" || event.message.contains("web-x2x4z");
            assert_eq!(event.warning, !is_plain, "{event:?}");
        }
    }
}

#[test]
fn what_a_pod_is_annotated_with() {
    let with = annotations(&PodReport { key_expiry_unix_s: Some(1_800_000_000), ..pod("running") }).unwrap();
    assert_eq!(with[ADDRESSES], "100.64.0.1,fd7a::1");
    assert_eq!(
        (with[NAME].as_str(), with[KEY_EXPIRY].as_str()),
        ("web.tail.example", "2027-01-15T08:00:00Z")
    );
    assert_eq!(annotations(&pod("running")).unwrap()[KEY_EXPIRY], "never");
    for state in ["joining", "restarting", "leaving"] {
        assert!(annotations(&pod(state)).is_none(), "{state}");
    }
    assert!(annotations(&PodReport { addresses: vec![], ..pod("joining") }).is_none());
}

#[test]
fn failures_are_told_whole_and_bounded() {
    let error = |code| CniError { code, msg: "m\u{7}".repeat(900), details: "d".into() };
    for (code, reason) in [
        (code::BAD_CONFIG, "AnnotationRefused"),
        (code::REFUSED, "JoinRefused"),
        (code::NEEDS_ACTION, "WaitingForPerson"),
        (code::TRY_AGAIN, "JoinFailed"),
    ] {
        let event = failed(&error(code));
        assert_eq!(event.reason, reason);
        let seen = Seen {
            uid: "u".into(),
            namespace: "ns".into(),
            name: "n".repeat(253),
            annotations: Default::default(),
            owner: None,
            hash: None,
            mirror: false,
            ending: false,
            gate: false,
        };
        let object = object(&seen, &event, &event_name(&seen, u64::MAX), "node-1");
        let message = object["message"].as_str().unwrap();
        assert!(message.len() <= 1024 && !message.contains(char::is_control));
        assert!(object["metadata"]["name"].as_str().unwrap().len() < 253);
    }
}

#[test]
fn an_event_is_told_counted_up_and_told_anew() {
    let at = Instant::now();
    let told = Told { name: "web-0.1".into(), count: 4, at };
    let table = [
        (None, at, Telling::Anew),
        (Some(&told), at, Telling::Known),
        (Some(&told), at + REPEAT_AFTER - Duration::from_secs(1), Telling::Known),
        (Some(&told), at + REPEAT_AFTER, Telling::Again("web-0.1".into(), 5)),
        (Some(&told), at + SERIES_FOR - Duration::from_secs(1), Telling::Again("web-0.1".into(), 5)),
        (Some(&told), at + SERIES_FOR, Telling::Anew),
    ];
    for (told, now, wanted) in table {
        assert_eq!(telling(told, now), wanted, "{:?} later", now - at);
    }
    let mut known = Known::default();
    for n in 0..100 {
        known.told(
            warning("Annotation", n.to_string()),
            Told { at: at + Duration::from_secs(n), ..told.clone() },
        );
    }
    assert_eq!(known.events.len(), MAX_EVENTS);
    assert!(known.events.contains_key(&warning("Annotation", "99")), "the last one told is remembered");
}

#[test]
fn a_repeated_event_is_one_object_for_an_hour() {
    let api = KubeApi::start();
    let text = format!(
        "[tailnet.default]\ncontrol_url = \"http://127.0.0.1:1\"\n[node]\nname = \"node-1\"\napi_server = {:?}\n\
         service_account_dir = \"/nowhere\"\n",
        api.url
    );
    let config = Config::load(&Inputs { file: Some(text), ..Inputs::default() }).unwrap();
    let seen = Seen {
        uid: "uid-web-0".into(),
        namespace: "default".into(),
        name: "web-0".into(),
        annotations: Default::default(),
        owner: None,
        hash: None,
        mirror: false,
        ending: false,
        gate: false,
    };
    block_on(async {
        let inner = Inner {
            store: Mutex::new(Store::default()),
            news: Notify::new(),
            api: Api::new(&config.node).unwrap(),
            node: "node-1".into(),
            descriptions: collect::descriptions(),
            nudge: Notify::new(),
            failed_adds: Mutex::default(),
        };
        let cluster = Cluster { inner: std::sync::Arc::new(inner) };
        let mut teller = Teller { cluster, known: HashMap::new(), not_before: HashMap::new() };
        let event = || warning("WaitingForApproval", "an administrator has to approve the device");
        let begun = Instant::now();
        let mut tell = async |minutes: u64| {
            assert!(teller.event(&seen, event(), begun + Duration::from_secs(60 * minutes)).await);
            let events = api.events();
            let counts = events.iter().map(|event| event["count"].as_u64().unwrap());
            (counts.collect::<Vec<_>>(), api.requests().len())
        };
        assert_eq!(tell(0).await, (vec![1], 1));
        assert_eq!(tell(9).await, (vec![1], 1), "nobody is asked");
        assert_eq!(tell(10).await, (vec![2], 2));
        assert_eq!(tell(69).await, (vec![3], 3), "an hour after it was last told");
        let first = api.events()[0].clone();
        assert_eq!(first["involvedObject"]["uid"], "uid-web-0");
        assert!(first["lastTimestamp"].as_str().unwrap() >= first["firstTimestamp"].as_str().unwrap());
        assert_eq!(tell(130).await, (vec![3, 1], 4), "by then the API server may have forgotten it");
        // It may be forgotten sooner, or RBAC may not give the verb: it is told anew.
        api.forget_events();
        assert_eq!(tell(140).await, (vec![1], 6));
        api.fault(|faults| {
            faults.forbidden.insert("patch events".into());
        });
        assert_eq!(tell(150).await, (vec![1, 1], 8));
    });
}
