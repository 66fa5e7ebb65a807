use std::time::Duration;

use podtether_devnet::fault::{Fault, Target};
use podtether_devnet::{Devnet, DevnetConfig, HeadscaleApi};

use super::*;
use crate::credentials::Roots;

async fn devnet(v2: bool) -> Devnet {
    let headscale = Some(HeadscaleApi { api_key: String::new(), v2 });
    Devnet::start(DevnetConfig { headscale, ..DevnetConfig::default() }).await.unwrap()
}

/// For one kind of device.
struct For {
    api: Api,
    tags: Vec<String>,
}

impl For {
    async fn mint(&self, hostname: &str, deadline: Instant) -> Result<Key, CredentialError> {
        self.api.mint(Wish { hostname, tags: &self.tags, ephemeral: false }, deadline).await
    }
}

impl std::ops::Deref for For {
    type Target = Api;
    fn deref(&self) -> &Api {
        &self.api
    }
}

fn api_with(devnet: &Devnet, key: SecretSource, user: Option<&str>, tags: &[&str]) -> For {
    let http = Http::new(Arc::new(Roots::new(None).unwrap())).unwrap();
    let tags = tags.iter().map(|tag| (*tag).to_owned()).collect();
    let ttl = Duration::from_secs(300);
    For { api: Api::new(http, devnet.http_url(), key, user.map(str::to_owned), ttl), tags }
}

fn api(devnet: &Devnet, user: Option<&str>, tags: &[&str]) -> For {
    api_with(devnet, SecretSource::Value(SecretString::new(devnet.api_key())), user, tags)
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn refused(result: Result<Key, CredentialError>, says: &str) {
    match result {
        Err(CredentialError::Refused(text)) => assert!(text.contains(says), "{says}: {text}"),
        other => panic!("{says}: {other:?}"),
    }
}

#[tokio::test]
async fn both_apis_mint_single_use_keys_that_live_and_can_be_ended() {
    for v2 in [true, false] {
        let devnet = devnet(v2).await;
        let api = api(&devnet, None, &["tag:k8s-pod"]);
        let key = api.mint("pod", soon()).await.unwrap();
        assert_eq!(api.version(), Some(if v2 { Version::V2 } else { Version::V1 }));
        assert!(key.secret.expose().starts_with("hskey-auth-"));
        assert!(!format!("{key:?}").contains("hskey"), "a secret never prints");
        let state = || devnet.auth_keys()[0].clone();
        assert!(!state().used && !state().revoked && !state().expired);
        api.delete_key(key.id.as_deref().unwrap(), soon()).await.unwrap();
        assert!(state().revoked || state().expired, "v2={v2}");
        api.delete_key(key.id.as_deref().unwrap(), soon()).await.unwrap();
        api.delete_key("99", soon()).await.unwrap();
        assert!(!format!("{:?}", api.api).contains(&devnet.api_key()));
    }
}

#[tokio::test]
async fn without_tags_the_first_api_takes_the_user_by_name_or_number() {
    for v2 in [true, false] {
        let devnet = devnet(v2).await;
        let id = devnet.add_user("rené@tailnet.test", "R & <D>");
        let by_name = api(&devnet, Some("rené@tailnet.test"), &[]);
        by_name.mint("pod", soon()).await.unwrap();
        api(&devnet, Some(&id.to_string()), &[]).mint("pod", soon()).await.unwrap();
        assert_eq!(devnet.auth_keys().iter().filter(|key| key.user == Some(id)).count(), 2);
        // A number does not change with the name.
        assert!(devnet.rename_user(id, "other", "&<>\"é"));
        by_name.mint("pod", soon()).await.unwrap();
        let start = Instant::now();
        refused(api(&devnet, Some("rené@tailnet.test"), &[]).mint("p", soon()).await, "has no user");
        refused(api(&devnet, Some("77"), &[]).mint("p", soon()).await, "user not found");
        assert!(start.elapsed() < Duration::from_secs(10), "refusals are not tried again");
    }
}

#[tokio::test]
async fn refusals_say_what_to_do_and_passing_faults_pass() {
    for v2 in [true, false] {
        let devnet = devnet(v2).await;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(&path, "hskey-api-wrong").unwrap();
        let api = api_with(&devnet, SecretSource::File(path.clone()), None, &["tag:k8s-pod"]);
        refused(api.mint("p", soon()).await, "make another with `headscale apikeys create`");
        // A rotated file is read again.
        std::fs::write(&path, devnet.api_key()).unwrap();
        api.mint("p", soon()).await.unwrap();
        devnet.set_api_key("hskey-api-next");
        refused(api.mint("p", soon()).await, "401");
        std::fs::write(&path, "hskey-api-next\n").unwrap();
        api.mint("p", soon()).await.unwrap();
        std::fs::remove_file(&path).unwrap();
        refused(api.mint("p", soon()).await, "cannot read");
        std::fs::write(&path, "hskey-api-next").unwrap();

        devnet.set_fault(Target::Api, Fault::status(403));
        refused(api.mint("p", soon()).await, "403");
        devnet.set_fault(Target::Api, Fault::status(503).times(2));
        api.mint("p", soon()).await.unwrap();
        devnet.set_fault(Target::Api, Fault::rate_limit(60));
        let Err(CredentialError::Temporary(text)) = api.mint("p", soon()).await else { panic!() };
        assert!(text.contains("rate limited"), "{text}");
        devnet.clear_faults();
        devnet.stop().await;
        let short = Instant::now() + Duration::from_millis(400);
        let gone = api_with(&devnet, SecretSource::File(path.clone()), None, &["tag:k8s-pod"]);
        assert!(matches!(gone.mint("p", short).await, Err(CredentialError::Temporary(_))));
    }
    let devnet = devnet(false).await;
    refused(api(&devnet, None, &["tag:Pod"]).mint("p", soon()).await, "tag should be lowercase");
}

#[test]
fn a_node_of_the_first_api_is_known_by_the_key_that_it_joined_with() {
    const TTL: Duration = Duration::from_secs(300);
    let node = |change: serde_json::Value| {
        let mut node = json!({
            "id": "7", "machineKey": "mkey:a", "nodeKey": "nodekey:a", "name": "k8s-shop-web-0",
            "givenName": "k8s-shop-web-0", "online": false, "lastSeen": "2026-01-01T00:00:00Z", "user": null,
            "tags": ["tag:a", "tag:b"],
            "preAuthKey": {
                "reusable": false, "used": true, "aclTags": ["tag:b", "tag:a"],
                "createdAt": "2026-01-01T00:00:00.25Z", "expiration": "2026-01-01T00:05:01Z",
            },
        });
        for (pointer, value) in change.as_object().unwrap() {
            *node.pointer_mut(pointer).unwrap() = value.clone();
        }
        serde_json::from_value::<Node>(node).unwrap().listed(TTL)
    };
    let listed = node(json!({}));
    assert_eq!(
        (listed.tags.as_slice(), listed.online),
        (&["tag:a".to_owned(), "tag:b".to_owned()][..], false)
    );
    assert_eq!(listed.last_seen, Some("2026-01-01T00:00:00Z".parse().unwrap()));
    assert_eq!((listed.id.as_str(), listed.version.as_str()), ("7", ""));
    for (change, is_minted) in [
        (json!({}), true),
        (json!({"/preAuthKey/reusable": true}), false),
        (json!({"/preAuthKey/aclTags": ["tag:a"]}), false),
        (json!({"/tags": ["tag:a"]}), false),
        (json!({"/tags": [], "/preAuthKey/aclTags": []}), false),
        // As long as the server's own command makes them.
        (json!({"/preAuthKey/expiration": "2026-01-01T01:00:00Z"}), false),
        (json!({"/preAuthKey/expiration": null}), false),
        (json!({"/preAuthKey": null}), false),
    ] {
        assert_eq!(node(change.clone()).is_minted, is_minted, "{change}");
    }
    // As it was before there was one list of tags.
    let old = json!({"id": "1", "forcedTags": ["tag:b"], "validTags": ["tag:a", "tag:b"]});
    assert_eq!(serde_json::from_value::<Node>(old).unwrap().listed(TTL).tags, ["tag:a", "tag:b"]);
}

#[tokio::test]
async fn both_apis_list_devices() {
    for v2 in [true, false] {
        let devnet = devnet(v2).await;
        let api = api(&devnet, None, &["tag:k8s-pod"]);
        assert!(!devnet.add_node_of("ghost", &["tag:k8s-pod"], "0.1.0-podtether", Duration::ZERO).is_empty());
        let devices = api.devices(soon()).await.unwrap();
        assert_eq!((devices.len(), devices[0].hostname.as_str()), (1, "ghost"), "v2={v2}");
        assert_eq!(devices[0].version.is_empty(), !v2);
        assert!(!devices[0].is_minted && devices[0].last_seen.is_some() && !devices[0].online);
    }
}
