//! Nodes shared between tailnets, as the netmaps of both sides tell it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use podtether_devnet::AuthKeyOptions;
use serde_json::{Value, json};
use support::{Machine, devnet, names};

/// The whole of a peer, when a message tells it.
fn peer(message: &Value, id: u64) -> Option<Value> {
    let changed = message["PeersChanged"].as_array().into_iter().flatten();
    changed.chain(message["Peers"].as_array().into_iter().flatten()).find(|peer| peer["ID"] == id).cloned()
}

fn profiles(message: &Value) -> Vec<u64> {
    message["UserProfiles"].as_array().unwrap().iter().map(|user| user["ID"].as_u64().unwrap()).collect()
}

#[tokio::test]
async fn a_shared_node_is_in_the_netmaps_of_whom_it_is_shared_with() {
    let devnet = devnet(|_| {}).await;
    let admin = devnet.add_user("admin@tailnet.test", "Admin");
    let them = devnet.add_tailnet_user("other.test", "them@other.test", "Them");
    let colleague = devnet.add_tailnet_user("other.test", "colleague@other.test", "Colleague");
    let of = |user, tag: &str| {
        let tags = if tag.is_empty() { Vec::new() } else { vec![tag.to_owned()] };
        AuthKeyOptions { user: Some(user), tags, ..AuthKeyOptions::default() }
    };
    let (_db, mut shared) = Machine::new("db").join(&devnet, of(1, "tag:db")).await;
    let (_near, _) = Machine::new("near").join(&devnet, of(1, "")).await;
    let (_guest, mut guest) = Machine::new("guest").join(&devnet, of(them, "")).await;
    // The same name in the other tailnet.
    let (_namesake, _) = Machine::new("db").join(&devnet, of(colleague, "")).await;
    let (_tagged, _) = Machine::new("tagged").join(&devnet, of(them, "tag:db")).await;
    let id = |at: usize| devnet.nodes()[at].id;
    let [db, visitor, namesake] = [0, 2, 3].map(id);
    let first = guest.next().await.unwrap();
    assert_eq!(
        (&first["Node"]["Name"], &first["Domain"]),
        (&json!("guest.other.test."), &json!("other.test"))
    );
    assert_eq!(first["DNSConfig"]["Domains"], json!(["other.test"]));
    assert_eq!(first["DNSConfig"]["Routes"]["other.test"], json!([]));
    assert_eq!(first.get("Peers"), None);
    assert_eq!(profiles(&first), [them, colleague, 2_147_455_555]);
    let own = guest.find(|message| peer(message, namesake)).await;
    assert_eq!(own["Name"], "db.other.test.");

    let refused = [(99, them, admin), (db, admin, 1), (db, them, colleague), (db, 99, admin), (db, them, 99)];
    for (node, with, by) in refused {
        assert!(!devnet.share_node(node, with, by, true), "{node} {with} {by}");
    }
    assert!(devnet.share_node(db, them, admin, true));
    let seen = guest
        .find(|message| {
            let seen = peer(message, db)?;
            assert_eq!(profiles(message), [1, admin, them, colleague, 2_147_455_555]);
            Some(seen)
        })
        .await;
    assert_eq!((&seen["Name"], &seen["IsJailed"]), (&json!("db.tailnet.test."), &json!(true)));
    assert_eq!((&seen["User"], &seen["Sharer"]), (&json!(1), &json!(admin)));
    assert_eq!(seen.get("Tags"), None);
    assert_eq!(seen["Hostinfo"]["Hostname"], "db");
    let sharee = shared
        .find(|message| {
            let sharee = peer(message, visitor)?;
            assert_eq!(profiles(message), [1, admin, them, 2_147_455_555]);
            Some(sharee)
        })
        .await;
    assert_eq!((&sharee["Name"], &sharee["User"]), (&json!(""), &json!(them)));
    let about = json!({"OS": "linux", "Hostname": "device-of-shared-to-user", "ShareeNode": true});
    assert_eq!(sharee["Hostinfo"], about);
    assert_eq!((sharee.get("IsJailed"), sharee.get("Sharer")), (None, None));

    // The sharer is told of only where it is not the owner.
    assert!(devnet.share_node(db, them, 1, false));
    let seen = guest.find(|message| peer(message, db)).await;
    assert_eq!((seen.get("IsJailed"), seen.get("Sharer")), (None, None));

    // A policy is each tailnet's own; whom it is shared with gets in besides.
    devnet.set_policy(Some("[[rules]]\nsrc = ['tag:db']\ndst = ['tag:db']".parse().unwrap()));
    let addresses = |at| devnet.nodes().into_iter().find(|node| node.id == at).unwrap().addresses;
    let rules = shared.find(|message| message["PacketFilters"].get("base").cloned()).await;
    assert_eq!(rules[0]["SrcIPs"], json!(addresses(db)), "tagged as it is, the other tailnet's is no source");
    assert_eq!(rules[1]["SrcIPs"], json!(addresses(visitor)));
    let destinations: Vec<&Value> =
        rules[1]["DstPorts"].as_array().unwrap().iter().map(|to| &to["IP"]).collect();
    assert_eq!(json!(destinations), json!(addresses(db)));

    assert!(devnet.unshare_node(db, them) && !devnet.unshare_node(db, them));
    let removed =
        |message: &Value, id| message["PeersRemoved"].as_array()?.contains(&json!(id)).then_some(());
    guest.find(|message| removed(message, db)).await;
    let rules = shared
        .find(|message| {
            removed(message, visitor)?;
            message["PacketFilters"].get("base").cloned()
        })
        .await;
    assert_eq!(rules.as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn nobody_else_sees_what_is_shared() {
    let devnet = devnet(|_| {}).await;
    let them = devnet.add_tailnet_user("other.test", "them@other.test", "Them");
    let colleague = devnet.add_tailnet_user("other.test", "colleague@other.test", "Colleague");
    let of = |user, tag: &str| {
        let tags = if tag.is_empty() { Vec::new() } else { vec![tag.to_owned()] };
        AuthKeyOptions { user: Some(user), tags, ..AuthKeyOptions::default() }
    };
    let (_db, _stream) = Machine::new("db").join(&devnet, of(1, "")).await;
    assert!(devnet.share_node(devnet.nodes()[0].id, them, 1, true));
    for (name, user, tag, seen) in [
        ("guest", them, "", &["db"][..]),
        ("tagged", them, "tag:x", &["guest"]),
        ("colleague", colleague, "", &["guest", "tagged"]),
        ("near", 1, "", &["db"]),
    ] {
        let (_control, mut stream) = Machine::new(name).join(&devnet, of(user, tag)).await;
        let first = stream.next().await.unwrap();
        assert_eq!(names(&first["Peers"]), seen, "{name}");
    }
}
