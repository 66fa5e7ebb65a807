//! What control asks an engine for, answered over the real kernel.

mod common;

use common::{Join, PATIENCE, Pod, underlay_addresses};
use podtether_core::tailcfg::UnixTime;
use podtether_devnet::{AuthKeyOptions, Devnet, DevnetConfig};
use podtether_net::testing::{block_on, in_namespaces};
use podtether_proto::engine::NodeState;
use serde_json::{Value, json};

#[test]
fn control_asks_and_the_engine_answers() {
    in_namespaces("control_asks_and_the_engine_answers", |dir| {
        block_on(Box::pin(async {
            let addresses = underlay_addresses(&["10.9.0.1/32"]).await;
            let devnet = Devnet::start(DevnetConfig::default()).await.unwrap();
            let key = AuthKeyOptions { reusable: true, ..AuthKeyOptions::default() };
            let join = Join {
                control_url: devnet.http_url(),
                ca_pem: devnet.ca_pem().to_owned(),
                auth_key: Some(devnet.create_auth_key(key).secret),
                addresses,
            };
            let (mut a, mut b) = (Pod::make(dir, "a").await, Pod::make(dir, "b").await);
            a.join(&join).await;
            let peer = b.join(&join).await;
            let id = devnet.node("a").unwrap().id;

            // A sign of life, by a connection of its own and through the session.
            assert!(devnet.ping(id, "", b"", PATIENCE).await.is_ok());
            let echo = b"POST /echo HTTP/1.1\r\nContent-Length: 2\r\n\r\nhi";
            let answer = String::from_utf8(devnet.ping(id, "c2n", echo, PATIENCE).await.unwrap()).unwrap();
            assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("\r\n\r\nhi"), "{answer}");
            let secrets = b"GET /debug/prefs HTTP/1.1\r\n\r\n";
            let answer = String::from_utf8(devnet.ping(id, "c2n", secrets, PATIENCE).await.unwrap()).unwrap();
            assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");

            // Every kind of ping, to every address; what is behind the peer is its pod's own kernel.
            let known = async |wanted: usize| {
                a.wait(|s| s.state == NodeState::Running).await;
                devnet
                    .wait_for(PATIENCE, |nodes| nodes.iter().filter(|n| n.home_derp != 0).count() == wanted)
                    .await
            };
            assert!(known(2).await);
            for to in &peer {
                for kind in ["disco", "TSMP", "ICMP"] {
                    let answer = devnet.ping_peer(id, kind, *to, PATIENCE).await.unwrap();
                    let answer: Value = serde_json::from_slice(&answer).unwrap();
                    println!("{answer}");
                    assert_eq!((&answer["Type"], &answer["IP"]), (&json!(kind), &json!(to.to_string())));
                    assert_eq!(answer.get("Err"), None, "{answer}");
                    let latency = answer["LatencySeconds"].as_f64().unwrap();
                    assert!(latency > 0.0 && latency < 5.0, "{answer}");
                    assert_eq!(answer["NodeName"], "b");
                }
            }
            for (kind, to, says) in
                [("peerapi", peer[0], "does not"), ("TSMP", [100, 99, 9, 9].into(), "no matching peer")]
            {
                let answer = devnet.ping_peer(id, kind, to, PATIENCE).await.unwrap();
                let answer: Value = serde_json::from_slice(&answer).unwrap();
                assert!(answer["Err"].as_str().unwrap().contains(says), "{answer}");
            }

            // What control finds wrong, as people see it.
            let message = json!({"Title": "T", "Text": "text", "Severity": "high"});
            assert!(devnet.tell(id, json!({"DisplayMessages": {"x": message}, "Health": ["sick"]})));
            let status = a.wait(|s| s.health.len() == 2).await;
            let told: Vec<_> = status
                .health
                .iter()
                .map(|h| (h.title.as_str(), h.text.as_str(), h.severity.as_str()))
                .collect();
            assert_eq!(told, [("sick", "", "medium"), ("T", "text", "high")]);
            assert!(devnet.tell(id, json!({"DisplayMessages": {"*": null}, "Health": []})));
            a.wait(|s| s.health.is_empty()).await;
            let millis = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis();
            let time = UnixTime::from_millis(i64::try_from(millis).unwrap() - 3 * 3_600_000);
            assert!(devnet.tell(id, json!({"KeepAlive": true, "ControlTime": time.to_string()})));
            assert!(devnet.tell(id, json!({"Health": ["now"]})));
            let status = a.wait(|s| s.health.len() == 2).await;
            assert!(status.health.iter().any(|h| h.title.contains("3 h 0 min ahead of")), "{status:?}");
            assert_eq!(devnet.complaints(), Vec::<String>::new());
        }));
    });
}
