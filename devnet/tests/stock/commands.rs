//! What people do with a stock node, under the devnet as control server.

use podtether_devnet::AuthKeyOptions;
use serde_json::Value;

use crate::{Stock, make_underlay, start_devnet, stock_test, until};

#[test]
fn stock_commands_say_what_they_say_elsewhere() {
    stock_test("commands::stock_commands_say_what_they_say_elsewhere", scenario);
}

async fn scenario(stock: &Stock) {
    make_underlay().await;
    let devnet = start_devnet(&stock.dir).await;
    let key = devnet.create_auth_key(AuthKeyOptions { reusable: true, ..AuthKeyOptions::default() });
    let one = stock.start("one", &[]).await;
    let two = stock.start("two", &[]).await;
    for (node, name) in [(&one, "one"), (&two, "two")] {
        let (joined, text) = node.up(&devnet.https_url(), name, &key, &[]).await;
        assert!(joined, "{text}\n{}", node.log());
    }
    until("one sees two", async || one.peer("two").await["Online"] == true).await;

    // Every kind of ping, and what status says of the path.
    until("a direct path", async || one.ping("two").await.contains("via 192.168.77.1:")).await;
    for kind in ["--tsmp", "--icmp", "--peerapi"] {
        let mut said = String::new();
        let answered = async || {
            said = one.run(&["ping", kind, "-c", "1", "--timeout", "3s", "two"]).await.1;
            said.contains("pong from two") || said.contains("hit peerapi")
        };
        until(kind, answered).await;
    }
    let peer = one.peer("two").await;
    assert!(peer["CurAddr"].as_str().is_some_and(|a| a.starts_with("192.168.77.1:")), "{peer}");
    assert_eq!(
        (&peer["Relay"], &peer["ExitNodeOption"]),
        (&Value::from("r1"), &Value::from(false)),
        "{peer}"
    );
    let own = one.status().await["Self"].clone();
    assert_eq!((&own["Online"], &own["Relay"]), (&Value::from(true), &Value::from("r1")), "{own}");

    // The network around it, over STUN and over HTTPS.
    let report = json_in(&one.ok(&["netcheck", "--format=json"]).await);
    assert_eq!((&report["UDP"], &report["IPv4"]), (&Value::from(true), &Value::from(true)), "{report}");
    assert_eq!(report["PreferredDERP"], 1, "{report}");
    assert!(report["RegionLatency"]["1"].as_u64().is_some_and(|ns| ns > 0), "{report}");

    // Who and where.
    let whois = json_in(&one.ok(&["whois", "--json", "100.64.0.2"]).await);
    assert_eq!(whois["Node"]["Name"], "two.tailnet.test.", "{whois}");
    assert!(whois["UserProfile"]["LoginName"].as_str().is_some_and(|name| !name.is_empty()), "{whois}");
    assert!(!one.run(&["whois", "100.64.9.9"]).await.0);
    let dns = one.ok(&["dns", "query", "two.tailnet.test"]).await;
    assert!(dns.contains("100.64.0.2"), "{dns}");

    // A new name reaches control and the others.
    two.ok(&["set", "--hostname=renamed"]).await;
    until("one sees the new name", async || one.peers().await == ["renamed.tailnet.test."]).await;

    // Down and up again, with the same address; then out.
    two.ok(&["down"]).await;
    until("two is offline", async || one.peer("renamed").await["Online"] == false).await;
    two.ok(&["up", "--timeout=20s", &format!("--login-server={}", devnet.https_url()), "--hostname=renamed"])
        .await;
    until("two is back", async || one.peer("renamed").await["Online"] == true).await;
    assert_eq!(two.status().await["Self"]["TailscaleIPs"][0], "100.64.0.2");
    two.ok(&["logout"]).await;
    until("two has logged out", async || two.status().await["BackendState"] == "NeedsLogin").await;
    until("its key is expired for the others", async || {
        let peer = one.peer("renamed").await;
        peer.is_null() || peer["Expired"] == true
    })
    .await;
    assert_eq!(devnet.complaints(), Vec::<String>::new());
}

/// The first JSON value of an output that has log lines around it.
fn json_in(text: &str) -> Value {
    let begin = text.find('{').unwrap_or_default();
    serde_json::Deserializer::from_str(&text[begin..]).into_iter().next().unwrap().unwrap()
}
