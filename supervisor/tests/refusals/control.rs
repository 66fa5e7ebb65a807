//! A tailnet whose servers are down, hang, or answer with errors.

use std::time::Duration;

use podtether_devnet::fault::{Fault, Target};
use podtether_devnet::lab::{CniCall, Pod, Tailnet};
use podtether_devnet::{Devnet, DevnetConfig};
use podtether_net::testing::{block_on, in_namespaces};

use crate::place::{PATIENCE, Place, refusal};

/// What ADD waits, in seconds.
const TIMEOUT: u32 = 5;

struct Case {
    name: &'static str,
    fault: Option<(Target, Fault)>,
    /// What the sentence says, beside the pod's name.
    says: &'static [&'static str],
    /// What becomes of the key that was minted; nothing when there is none.
    key: &'static str,
    /// Trying again within the timeout is pointless.
    at_once: bool,
}

const DELETED: &str = "the minted auth key was deleted";
const LEFT: &str = "left to expire";

fn cases() -> Vec<Case> {
    let case = |name, target, fault, says, key| Case {
        name,
        fault: Some((target, fault)),
        says,
        key,
        at_once: false,
    };
    let early = |case: Case| Case { at_once: true, ..case };
    let hang = Fault::hang;
    vec![
        Case {
            name: "down",
            fault: None,
            says: &["OAuth token", "refused", "no auth key was minted"],
            key: "",
            at_once: false,
        },
        case(
            "token-hang",
            Target::OauthToken,
            hang(),
            &["OAuth token", "no answer", "no auth key was minted"],
            "",
        ),
        case(
            "token-500",
            Target::OauthToken,
            Fault::status(500),
            &["OAuth token", "500", "no auth key was minted"],
            "",
        ),
        early(case(
            "token-429",
            Target::OauthToken,
            Fault::rate_limit(90),
            &["rate limit", "wait ", "no auth key was minted"],
            "",
        )),
        case("api-hang", Target::Api, hang(), &["mint an auth key", "no answer"], ""),
        case("api-503", Target::Api, Fault::status(503), &["mint an auth key", "503"], ""),
        early(case("api-429", Target::Api, Fault::rate_limit(90), &["rate limit", "wait "], "")),
        case("key-hang", Target::Key, hang(), &["rolled back"], DELETED),
        case("key-500", Target::Key, Fault::status(500), &["/key answered HTTP 500", "rolled back"], DELETED),
        case(
            "upgrade-500",
            Target::Upgrade,
            Fault::status(500),
            &["/ts2021 answered HTTP 500", "rolled back"],
            DELETED,
        ),
        case("register-hang", Target::Register, hang(), &["rolled back"], DELETED),
        case(
            "register-500",
            Target::Register,
            Fault::status(500),
            &["HTTP 500 to the registration", "rolled back"],
            DELETED,
        ),
        case(
            "register-429",
            Target::Register,
            Fault::rate_limit(60),
            &["HTTP 429 to the registration", "rolled back"],
            DELETED,
        ),
        case("map-hang", Target::Map, hang(), &["rolled back"], ""),
        case("map-500", Target::Map, Fault::status(500), &["HTTP 500", "rolled back"], ""),
        case("register-hang-then-all", Target::Register, hang(), &["control server"], LEFT),
    ]
}

/// One ADD of a tailnet in trouble.
fn attempt(place: &Place, devnet: &Devnet, pod: &Pod, case: &Case) {
    let timeout_s = if case.at_once { 60 } else { TIMEOUT };
    let call = CniCall { timeout_s, tailnet: case.name.into(), ..CniCall::new("ADD") };
    let outcome = std::thread::scope(|scope| {
        let adding = scope.spawn(|| place.call(pod, &call));
        if case.key == LEFT {
            place.wait("minted", || !devnet.auth_keys().is_empty());
            devnet.set_fault(Target::Api, Fault::status(500));
        }
        adding.join().unwrap()
    });
    let name = format!("pod default/{}", case.name);
    let says: Vec<&str> = [name.as_str(), case.key].iter().chain(case.says).copied().collect();
    refusal(case.name, &outcome, 11, &says);
    let limit = if case.at_once { 10 } else { TIMEOUT };
    assert!(outcome.took < Duration::from_secs(limit.into()), "{}: {:?}", case.name, outcome.took);
    if case.key != LEFT {
        assert!(devnet.auth_keys().iter().all(|key| key.revoked || key.used), "{}: a key is left", case.name);
    }
    if case.key == DELETED {
        assert_eq!(devnet.auth_keys().len(), 1, "{}", case.name);
    }
}

#[test]
fn add_fails_in_time_and_rolls_back_while_a_tailnet_is_in_trouble() {
    in_namespaces("control::add_fails_in_time_and_rolls_back_while_a_tailnet_is_in_trouble", |dir| {
        let mut place = Place::bare(dir, DevnetConfig::default());
        let mut tailnets = vec![Tailnet::oauth("default", &place.devnet, &place.ca)];
        let mut attempts = Vec::new();
        for case in cases() {
            let (devnet, ca) = place.lab.start_devnet(DevnetConfig::default()).unwrap();
            place.secret(devnet.oauth_client().1);
            tailnets.push(Tailnet::oauth(case.name, &devnet, &ca));
            let pod = place.pod(case.name);
            match &case.fault {
                Some((target, fault)) => devnet.set_fault(*target, fault.clone()),
                None => devnet.set_refusing(true),
            }
            attempts.push((case, devnet, pod));
        }
        place.node.configure(&tailnets, "").unwrap();
        place.node.start_supervisor().unwrap();
        let mut well = place.pod("well");
        let before: Vec<_> = attempts.iter().map(|(_, _, pod)| place.state(pod)).collect();

        std::thread::scope(|scope| {
            for (case, devnet, pod) in &attempts {
                let place = &place;
                scope.spawn(move || attempt(place, devnet, pod, case));
            }
            // One tailnet's trouble is not another's.
            place.add(&mut well);
            place.del(&well);
        });
        for (case, devnet, _) in attempts.iter().filter(|(case, ..)| case.key != LEFT) {
            assert!(devnet.nodes().is_empty(), "{}: {:?}", case.name, devnet.nodes());
        }
        // Of the one whose key could not be deleted the records may be there, until that is given up.
        let mut left = place.changes(&attempts[0].2, &before[0]);
        left.retain(|l| !l.contains("/state/identities/"));
        let of_one = |l: &&String| l.contains("/run/engines/") || l.contains("/state/attachments/");
        assert!(left.iter().all(|l| l.starts_with("+ file: ") && of_one(&l)) && left.len() <= 7, "{left:#?}");

        // As soon as the tailnet is well again, so is the next ADD, and what could not be told then is told.
        for (_, devnet, _) in &attempts {
            devnet.clear_faults();
        }
        std::thread::scope(|scope| {
            for (case, devnet, pod) in &attempts {
                let place = &place;
                scope.spawn(move || {
                    let with = |verb| CniCall { tailnet: case.name.into(), ..CniCall::new(verb) };
                    place.wait("rolled back", || place.node.pod_report(case.name).is_err());
                    if !case.at_once {
                        place.succeeds(case.name, pod, &with("ADD"));
                        place.note_keys();
                        place.succeeds(case.name, pod, &with("DEL"));
                    }
                    assert!(block_on(devnet.wait_for(PATIENCE, <[_]>::is_empty)), "{}", case.name);
                });
            }
        });
        for ((case, _, pod), before) in attempts.iter().zip(&before) {
            place.soon_unchanged(case.name, pod, before);
        }
        for (_, devnet, _) in &attempts {
            for key in devnet.auth_keys() {
                place.secret(&key.secret);
            }
            assert_eq!(devnet.complaints(), [""; 0]);
        }
        place.finish();
    });
}

#[test]
fn a_pod_can_leave_while_control_is_down_and_its_device_follows() {
    in_namespaces("control::a_pod_can_leave_while_control_is_down_and_its_device_follows", |dir| {
        let mut place = Place::new(dir);
        let mut pod = place.pod("p");
        let before = place.state(&pod);
        place.add(&mut pod);
        place.devnet.set_refusing(true);
        place.succeeds("CHECK during a short outage", &pod, &CniCall::new("CHECK"));
        place.note_keys();
        place.del(&pod);
        let left = place.changes(&pod, &before);
        assert!(
            left.len() == 1 && left[0].contains("/state/identities/"),
            "only who has to leave yet: {left:?}"
        );
        assert_eq!(place.devnet.nodes().len(), 1);
        place.devnet.set_refusing(false);
        place.no_devices();
        place.soon_unchanged("DEL without control", &pod, &before);
        place.finish();
    });
}
