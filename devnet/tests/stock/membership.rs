//! Joining, paths, access rules, what the server asks, leaving.

use podtether_devnet::{AuthKeyOptions, Mode};

use crate::{ADDRESS, PATIENCE, Stock, make_underlay, serve_banner, start_devnet, stock_test, until};

#[test]
fn stock_nodes_join_meet_and_leave() {
    stock_test("membership::stock_nodes_join_meet_and_leave", scenario);
}

async fn scenario(stock: &Stock) {
    make_underlay().await;
    let devnet = start_devnet(&stock.dir).await;
    let single = || devnet.create_auth_key(AuthKeyOptions::default());
    let tagged = AuthKeyOptions { tags: vec!["tag:k8s-pod".into()], ..AuthKeyOptions::default() };

    // Joining, over plain HTTP and over TLS.
    let one = stock.start("one", &[]).await;
    let first_key = single();
    let (joined, text) = one.up(&devnet.http_url(), "one", &first_key, &[]).await;
    assert!(joined, "{text}\n{}", one.log());
    let two = stock.start("two", &[]).await;
    let (joined, text) = two.up(&devnet.https_url(), "two", &first_key, &[]).await;
    assert!(!joined && two.log().contains("authkey already used"), "{text}");
    drop(two);
    let two = stock.start("two-again", &[]).await;
    let ephemeral = devnet.create_auth_key(AuthKeyOptions { ephemeral: true, ..tagged.clone() });
    let (joined, text) = two.up(&devnet.https_url(), "two", &ephemeral, &[]).await;
    assert!(joined, "{text}\n{}", two.log());
    let status = one.status().await;
    assert_eq!(status["BackendState"], "Running");
    assert_eq!(status["Self"]["TailscaleIPs"], serde_json::json!(["100.64.0.1", "fd7a:115c:a1e0::1"]));
    assert_eq!(status["MagicDNSSuffix"], "tailnet.test");
    until("one sees two", async || one.peers().await == ["two.tailnet.test."]).await;

    // Paths: direct, and over the relay for a node that cannot send UDP to its peers.
    let pong = one.ping("two").await;
    assert!(pong.contains("via 192.168.77.1:"), "{pong}");
    let three = stock.start("three", &[("TS_DEBUG_NEVER_DIRECT_UDP", "1")]).await;
    let key = devnet.create_auth_key(tagged.clone());
    let (joined, text) = three.up(&devnet.http_url(), "three", &key, &[]).await;
    assert!(joined, "{text}");
    let pong = three.ping("two").await;
    assert!(pong.contains("via DERP(r1)") && !pong.contains(ADDRESS), "{pong}");
    assert!(devnet.region_stats(1).unwrap().packets > 0);
    devnet.restart_region(1);
    until("the relay is found again", async || three.ping("two").await.contains("via DERP(r1)")).await;

    // Access rules, and their change.
    for port in [8000, 8001] {
        serve_banner(port).await;
    }
    let allow =
        |port| format!("[[rules]]\nsrc=['one']\ndst=['tag:k8s-pod']\nports=['{port}']\nproto=['tcp']");
    for (open, closed) in [(8000, 8001), (8001, 8000)] {
        devnet.set_policy(Some(allow(open).parse().unwrap()));
        until("the open port answers", async || one.fetch("two", open).await.is_some()).await;
        assert_eq!(one.fetch("two", open).await.unwrap(), format!("port {open}"));
        assert_eq!(one.fetch("two", closed).await, None);
    }
    until("three sees only one", async || three.peers().await == ["one.tailnet.test."]).await;
    devnet.set_policy(None);
    until("three sees two again", async || three.peers().await.len() == 2).await;

    // What the server asks and does.
    let id = |name: &str| devnet.node(name).unwrap().id;
    let echo = devnet.ping(id("one"), "c2n", b"POST /echo HTTP/1.0\r\nContent-Length: 2\r\n\r\nhi", PATIENCE);
    let answer = String::from_utf8(echo.await.unwrap()).unwrap();
    assert!(answer.contains("200 OK") && answer.ends_with("hi"), "{answer}");
    assert!(devnet.ping(id("two"), "", b"", PATIENCE).await.is_ok(), "plain liveness check");
    let session = devnet.node("one").unwrap().session;
    devnet.drop_connections();
    let renewed = devnet
        .wait_for(PATIENCE, |nodes| nodes.iter().all(|node| node.streaming) && nodes[0].session > session);
    assert!(renewed.await, "all reconnect");
    devnet.set_region(1, Mode::Down);
    assert!(one.ping("two").await.contains("via 192.168.77.1:"), "direct paths need no relay");
    devnet.set_region(1, Mode::Up);

    // Leaving: an ephemeral node by logging out, one by deletion, one by expiry.
    assert!(two.run(&["logout"]).await.0);
    assert!(devnet.wait_for(PATIENCE, |nodes| nodes.iter().all(|node| node.name != "two")).await);
    until("one sees three alone", async || one.peers().await == ["three.tailnet.test."]).await;
    assert!(devnet.delete_node(id("three")));
    until("one is alone", async || one.peers().await.is_empty()).await;
    devnet.expire_node(id("one"));
    until("one must log in", async || one.status().await["BackendState"] == "NeedsLogin").await;
    // A stock client that is told to log in anew registers twice, and gives the first answer up.
    let key = devnet.create_auth_key(AuthKeyOptions { reusable: true, ..AuthKeyOptions::default() });
    let (joined, text) = one.up(&devnet.http_url(), "one", &key, &["--force-reauth"]).await;
    assert!(joined, "{text}\n{}", one.log());
    assert_eq!(one.status().await["Self"]["TailscaleIPs"][0], "100.64.0.1", "the address is kept");
    assert_eq!(devnet.complaints(), Vec::<String>::new(), "a stock client does nothing wrong");
}
