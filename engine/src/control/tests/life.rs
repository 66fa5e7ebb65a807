//! Registration, the map stream's liveness, and what control asks for.

use podtether_proto::exit::EngineExit;
use serde_json::json;
use tokio::io::AsyncReadExt as _;

use super::*;

#[tokio::test]
async fn a_silent_stream_is_dropped_and_dialled_again() {
    let mut place = Place::new(|config| config.keep_alive = Duration::from_millis(100)).await;
    place.timing.watchdog = Duration::from_secs(2);
    let mut control = place.start(&Node::new(Some(&place.key())));
    until(&mut control, started).await;
    // Keepalives alone keep it.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let session = place.devnet.node("pod").unwrap().session;
    place.devnet.set_stalled(true);
    until(&mut control, |event| matches!(event, Event::SessionLost).then_some(())).await;
    assert!(until(&mut control, trying).await.contains("silent for 2 s"));
    // Also over a request that is not answered.
    assert!(until(&mut control, trying).await.contains("silent for 2 s"));
    place.devnet.set_stalled(false);
    until(&mut control, started).await;
    assert!(place.devnet.node("pod").unwrap().session > session);
    assert_eq!(place.devnet.complaints(), Vec::<String>::new());
}

#[tokio::test]
async fn a_node_deleted_behind_an_open_stream_learns_it() {
    let mut place = Place::new(|config| config.keep_alive = Duration::from_millis(100)).await;
    place.timing.still_known = Duration::from_millis(500);
    let mut control = place.start(&Node::new(Some(&place.key())));
    until(&mut control, started).await;
    let node = place.devnet.node("pod").unwrap();
    // Being asked again and again does no harm.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(place.devnet.node("pod").unwrap(), node);
    assert!(place.devnet.delete_node_silently(node.id));
    let ending = until(&mut control, |event| {
        assert_eq!(trying(event), None, "no other session was needed to learn it");
        ended(event)
    });
    assert_eq!(ending.await.exit, EngineExit::NodeUnknown);
    assert_eq!(place.devnet.complaints(), Vec::<String>::new());
}

#[tokio::test]
async fn a_person_lets_the_node_in_once_and_for_all_lives() {
    let place = Place::new(|_| {}).await;
    let mut node = Node::new(None);
    let mut control = place.start(&node);
    let url = until(&mut control, login).await;
    // It survives a lost connection: the same URL is waited for.
    place.devnet.drop_connections();
    until(&mut control, trying).await;
    assert_eq!(until(&mut control, login).await, url);
    // And the process.
    drop(control);
    node.login_url = Some(url.clone());
    let mut control = place.start(&node);
    assert_eq!(until(&mut control, login).await, url, "the one that the person may have open");
    place.devnet.approve_login(&url).unwrap();
    assert!(until(&mut control, registered).await);
    until(&mut control, started).await;
    drop(control);
    // Completed while nobody waited: answered at once, without another login.
    let mut node = Node::new(None);
    let mut control = place.start(&node);
    let url = until(&mut control, login).await;
    drop(control);
    place.devnet.approve_login(&url).unwrap();
    node.login_url = Some(url);
    let mut control = place.start(&node);
    let first = until(&mut control, |event| match event {
        Event::NeedsLogin { .. } => Some(false),
        Event::Registered { .. } => Some(true),
        _ => None,
    });
    assert!(first.await, "the login was done");
    assert_eq!(place.devnet.complaints(), Vec::<String>::new());
}

#[tokio::test]
async fn a_login_that_ran_out_is_replaced() {
    let place = Place::new(|_| {}).await;
    let mut node = Node::new(None);
    let mut control = place.start(&node);
    let old = until(&mut control, login).await;
    place.devnet.forget_logins();
    let new = until(&mut control, login).await;
    assert_ne!(new, old);
    // A server that was restarted, or another machine's login: refused, and then asked for anew.
    drop(control);
    node.login_url = Some("https://elsewhere.test/not-a-login".into());
    let mut control = place.start(&node);
    let fresh = until(&mut control, login).await;
    assert!(fresh.contains("/register/"), "{fresh}");
    place.devnet.approve_login(&fresh).unwrap();
    until(&mut control, started).await;
}

#[tokio::test]
async fn without_a_person_a_login_is_a_missing_key() {
    let place = Place::new(|_| {}).await;
    let node = Node { interactive: false, ..Node::new(None) };
    let ending = until(&mut place.start(&node), ended).await;
    assert_eq!(ending.exit, EngineExit::KeyRejected);
    let wrapped = format!("{}--TLc2lnbmF0dXJl-cHJpdmF0ZQ", place.key());
    let ending = until(&mut place.start(&Node::new(Some(&wrapped))), ended).await;
    assert_eq!(ending.exit, EngineExit::KeyRejected);
    assert!(ending.reason.contains("tailnet lock") && !ending.reason.contains("cHJpdmF0ZQ"), "{ending:?}");
    assert!(place.devnet.nodes().is_empty());
}

#[tokio::test]
async fn a_locked_tailnet_says_what_to_sign() {
    let place = Place::new(|_| {}).await;
    place.devnet.refuse_registrations(Some("node key signature required: tailnet lock is enabled"));
    let node = Node::new(Some(&place.key()));
    let mut control = place.start(&node);
    let reason = until(&mut control, trying).await;
    let key = node.identity("http://x").node_key;
    assert!(reason.contains(&format!("tailscale lock sign {key}")), "{reason}");
    // Signed now.
    place.devnet.refuse_registrations(None);
    until(&mut control, started).await;
}

#[tokio::test]
async fn approval_arrives_over_the_map() {
    let place = Place::new(|_| {}).await;
    place.devnet.set_device_approval(true);
    let key = AuthKeyOptions { preauthorized: false, ..AuthKeyOptions::default() };
    let key = place.devnet.create_auth_key(key).secret;
    let mut control = place.start(&Node::new(Some(&key)));
    assert!(!until(&mut control, registered).await);
    let approved = |event: &Event| match event {
        Event::Map(message) => message.node.as_ref().map(|node| node.machine_authorized),
        _ => None,
    };
    assert!(!until(&mut control, approved).await);
    assert!(place.devnet.set_authorized(place.devnet.node("pod").unwrap().id, true));
    assert!(until(&mut control, approved).await);
    // A key that is pre-approved needs none of it.
    let mut control = place.start(&Node::new(Some(&place.key())));
    assert!(until(&mut control, registered).await);
}

#[tokio::test]
async fn a_pause_is_kept_and_an_exit_is_not() {
    let mut place = Place::new(|config| config.keep_alive = Duration::from_millis(100)).await;
    // Shorter than the pause, which is no silence of the server's.
    place.timing.watchdog = Duration::from_secs(1);
    let mut control = place.start(&Node::new(Some(&place.key())));
    let health = |text: &'static str| {
        move |event: &Event| match event {
            Event::Map(message) => {
                message.health.as_ref().filter(|h| h.iter().any(|h| h == text)).map(|_| ())
            }
            Event::SessionLost | Event::Ended(_) => panic!("{event:?}"),
            _ => None,
        }
    };
    until(&mut control, started).await;
    let id = place.devnet.node("pod").unwrap().id;
    let asked = Instant::now();
    assert!(place.devnet.tell(id, json!({"Debug": {"SleepSeconds": 2.0}, "Health": ["first"]})));
    assert!(place.devnet.tell(id, json!({"Debug": {"Exit": 1}, "Health": ["second"]})));
    until(&mut control, health("first")).await;
    assert!(asked.elapsed() >= Duration::from_secs(2), "{:?}", asked.elapsed());
    until(&mut control, health("second")).await;
    assert!(place.devnet.tell(id, json!({"KeepAlive": true, "Debug": {"SleepSeconds": 300}})));
    assert!(place.devnet.tell(id, json!({"Health": ["third"]})));
    until(&mut control, health("third")).await;
}

#[tokio::test]
async fn a_date_to_come_back_is_kept() {
    let place = Place::new(|_| {}).await;
    let at = wall_clock().as_millis() / 1000 + 4;
    let date = http_date(at);
    let busy = Fault { status: Some(503), retry_after: Some(date), ..Fault::default() };
    place.devnet.set_fault(Target::Register, busy.times(1));
    let mut control = place.start(&Node::new(Some(&place.key())));
    assert!(until(&mut control, trying).await.contains("503"));
    until(&mut control, started).await;
    assert!(wall_clock().as_millis() / 1000 >= at, "not before");
}

/// As a server writes a time into a header. The day of the week is for people.
fn http_date(unix_s: i64) -> String {
    let text = UnixTime::from_secs(unix_s).to_string();
    let (date, time) = text.split_at(10);
    let month: usize = date[5..7].parse().unwrap();
    let names = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    format!("Mon, {} {} {} {} GMT", &date[8..], names[month - 1], &date[..4], &time[1..9])
}

#[tokio::test]
async fn answers_leave_for_the_control_server_alone() {
    let place = Place::new(|_| {}).await;
    let mut control = place.start(&Node::new(Some(&place.key())));
    until(&mut control, started).await;
    let inside = TcpListener::bind("127.0.0.2:0").await.unwrap();
    let listens = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let answer = |listener: &TcpListener, body: Option<&[u8]>| ControlAnswer {
        url: format!("http://{}/x", listener.local_addr().unwrap()),
        over_session: false,
        body: body.map(<[u8]>::to_vec),
    };
    control.answer(answer(&inside, None));
    control.answer(answer(&listens, Some(b"{}")));
    let (mut stream, _) = tokio::time::timeout(PATIENCE, listens.accept()).await.unwrap().unwrap();
    let mut request = Vec::new();
    while !request.ends_with(b"{}") {
        assert!(stream.read_buf(&mut request).await.unwrap() > 0);
    }
    let request = String::from_utf8_lossy(&request);
    assert!(request.starts_with("POST /x HTTP/1.1\r\n") && request.ends_with("\r\n\r\n{}"), "{request}");
    let none = tokio::time::timeout(Duration::from_millis(200), inside.accept()).await;
    assert!(none.is_err(), "control made the engine connect to another host");
}
