//! What people do about nodes, and what control asks of them.

use std::time::Duration;

use podtether_devnet::AuthKeyOptions;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::{Stock, make_underlay, start_devnet, stock_test, until};

#[test]
fn a_stock_node_logs_in_by_url_waits_for_approval_and_pings_for_control() {
    let name = "people::a_stock_node_logs_in_by_url_waits_for_approval_and_pings_for_control";
    stock_test(name, people);
}

/// Opens a login's page and presses its button.
async fn visit(url: &str) -> String {
    let (address, path) = url.trim_start_matches("http://").split_once('/').unwrap();
    let mut answers = String::new();
    for method in ["GET", "POST"] {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request =
            format!("{method} /{path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        stream.read_to_string(&mut answers).await.unwrap();
    }
    answers
}

/// What people do about nodes: a login, an approval, a login after an expiry.
async fn people(stock: &Stock) {
    make_underlay().await;
    let devnet = start_devnet(&stock.dir).await;
    devnet.set_device_approval(true);
    let one = stock.start("one", &[]).await;
    let server = format!("--login-server={}", devnet.http_url());
    let arguments = ["up", &server, "--hostname=one", "--timeout=25s"];
    let person = async {
        let mut url = String::new();
        until("there is a URL", async || {
            url = one.status().await["AuthURL"].as_str().unwrap_or_default().to_owned();
            !url.is_empty()
        })
        .await;
        let answers = visit(&url).await;
        assert!(answers.contains("<button>") && answers.contains("The device is in."), "{answers}");
        assert!(visit(&url).await.contains("404"), "once is enough");
        until("it waits for approval", async || one.status().await["BackendState"] == "NeedsMachineAuth")
            .await;
        assert!(devnet.set_authorized(devnet.node("one").unwrap().id, true));
        url
    };
    let ((joined, text), url) = tokio::join!(one.run(&arguments), person);
    assert!(joined && text.contains(&url), "{text}\n{}", one.log());
    until("it runs", async || one.status().await["BackendState"] == "Running").await;

    // A key that is pre-approved, and what control asks the two for.
    let two = stock.start("two", &[]).await;
    let key = devnet.create_auth_key(AuthKeyOptions::default());
    let (joined, text) = two.up(&devnet.http_url(), "two", &key, &[]).await;
    assert!(joined, "{text}\n{}", two.log());
    until("one sees two", async || one.peers().await == ["two.tailnet.test."]).await;
    let (one_id, peer) = (devnet.node("one").unwrap().id, devnet.node("two").unwrap().addresses[0]);
    for kind in ["disco", "TSMP"] {
        let mut answer = Value::Null;
        until("the ping is answered", async || {
            let said = devnet.ping_peer(one_id, kind, peer, Duration::from_secs(12)).await;
            answer = said.ok().and_then(|said| serde_json::from_slice(&said).ok()).unwrap_or_default();
            answer["LatencySeconds"].as_f64().is_some_and(|latency| latency > 0.0)
        })
        .await;
        println!("{answer}");
        assert_eq!((&answer["Type"], &answer["NodeName"]), (&kind.into(), &"two".into()));
    }

    // The key runs out, and a person logs the node in again.
    let before = devnet.node("one").unwrap();
    devnet.expire_node(before.id);
    until("it must log in", async || one.status().await["BackendState"] == "NeedsLogin").await;
    let arguments = ["up", &server, "--hostname=one", "--timeout=25s", "--force-reauth"];
    let person = async {
        let mut url = String::new();
        until("there is another URL", async || {
            url = one.status().await["AuthURL"].as_str().unwrap_or_default().to_owned();
            devnet.approve_login(&url).is_ok()
        })
        .await;
    };
    let ((joined, text), ()) = tokio::join!(one.run(&arguments), person);
    assert!(joined, "{text}\n{}", one.log());
    until("it runs again", async || one.status().await["BackendState"] == "Running").await;
    let after = devnet.node("one").unwrap();
    assert_eq!((after.id, &after.addresses), (before.id, &before.addresses));
    assert_ne!(after.node_key, before.node_key);
    assert_eq!(devnet.complaints(), Vec::<String>::new(), "a stock client does nothing wrong");
}
