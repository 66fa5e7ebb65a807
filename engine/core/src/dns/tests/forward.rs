//! Questions that others answer.

use std::time::Duration;

use hickory_proto::rr::Record;
use hickory_proto::rr::rdata::A;

use super::*;

const FIRST: &str = "10.0.0.1:53";
const SECOND: &str = "10.0.0.2:53";
const CLUSTER: &str = "10.96.0.10:53";

/// A world of resolvers around a [`Dns`], with a clock.
struct World {
    dns: Dns,
    now: Instant,
    replies: Vec<Message>,
    asks: Vec<(AskId, SocketAddr, bool, Vec<u8>)>,
    stopped: Vec<AskId>,
}

impl World {
    fn new() -> Self {
        let mut dns = tailnet();
        let route = |addrs: &[&str]| {
            addrs.iter().map(|a| Resolver { addr: (*a).into(), ..Resolver::default() }).collect::<Vec<_>>()
        };
        let mut config = config();
        config.routes = [
            ("corp.example.".to_owned(), route(&[FIRST, SECOND])),
            ("deep.corp.example".to_owned(), route(&["10.0.0.3:5353"])),
            ("local.corp.example".to_owned(), vec![]),
            ("sub.tail1.ts.net".to_owned(), route(&["10.0.0.4"])),
            ("64.100.in-addr.arpa".to_owned(), route(&["10.0.0.5"])),
            ("secret.example".to_owned(), route(&["https://dns.example/q"])),
        ]
        .into();
        dns.configure(&node(1, "me.tail1.ts.net.", &["100.64.0.1"]), &config);
        dns.set_capacity(Capacity { udp4: 4, udp6: 1, tcp4: 1, tcp6: 1 });
        Self { dns, now: Instant::now(), replies: vec![], asks: vec![], stopped: vec![] }
    }

    fn with_defaults(resolvers: &[&str]) -> Self {
        let mut world = Self::new();
        let list = |a: &&str| Resolver { addr: (*a).into(), ..Resolver::default() };
        let config = DnsConfig { resolvers: resolvers.iter().map(list).collect(), ..config() };
        world.dns.configure(&node(1, "me.tail1.ts.net.", &["100.64.0.1"]), &config);
        world
    }

    fn pump(&mut self) {
        while let Some(action) = self.dns.poll_action() {
            match action {
                // What a server says is passed on also where it makes no sense.
                Action::Reply { message, .. } => self.replies.extend(Message::from_vec(&message)),
                Action::Ask { ask, server, stream, message } => {
                    self.asks.push((ask, server, stream, message))
                }
                Action::Stop { ask } => self.stopped.push(ask),
            }
        }
    }

    fn ask(&mut self, query: &Message) {
        self.ask_bytes(&query.to_vec().unwrap(), None);
    }

    fn ask_bytes(&mut self, query: &[u8], meant_for: Option<&str>) {
        let meant_for = meant_for.map(|s| s.parse().unwrap());
        self.dns.handle_query(Asked { client: client(), meant_for }, query, self.now);
        self.pump();
    }

    fn answer(&mut self, ask: AskId, answer: &Message) {
        self.dns.handle_answer(ask, Ok(&answer.to_vec().unwrap()), self.now);
        self.pump();
    }

    fn fail(&mut self, ask: AskId) {
        self.dns.handle_answer(ask, Err(Failure), self.now);
        self.pump();
    }

    /// Lets time pass until `end`, stopping wherever something is due.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(at) = self.dns.poll_timeout().filter(|at| *at <= end) {
            self.now = at.max(self.now);
            self.dns.handle_timeout(self.now);
            self.pump();
        }
        self.now = end;
    }

    fn servers(&self) -> Vec<String> {
        self.asks.iter().map(|(_, server, ..)| server.to_string()).collect()
    }

    fn sent(&self, n: usize) -> Message {
        Message::from_vec(&self.asks[n].3).unwrap()
    }

    fn count(&self, name: &str) -> u64 {
        self.dns.counts().find(|(n, _)| *n == name).unwrap().1
    }
}

/// The answer to a message as it was sent.
fn to(sent: &Message, ip: [u8; 4]) -> Message {
    let mut answer = Message::response(sent.metadata.id, OpCode::Query);
    answer.add_query(sent.queries[0].clone());
    let [a, b, c, d] = ip;
    let data = RData::A(A::new(a, b, c, d));
    answer.add_answer(Record::from_rdata(sent.queries[0].name.clone(), 60, data));
    answer
}

fn refusal(sent: &Message, code: ResponseCode) -> Message {
    let mut answer = Message::response(sent.metadata.id, OpCode::Query);
    answer.metadata.response_code = code;
    answer.add_query(sent.queries[0].clone());
    answer
}

#[test]
fn the_longest_suffix_decides_who_answers() {
    let table: &[(&str, RecordType, &[&str])] = &[
        ("a.corp.example.", RecordType::A, &[FIRST]),
        ("corp.example.", RecordType::A, &[FIRST]),
        ("CORP.Example.", RecordType::MX, &[FIRST]),
        ("x.y.deep.corp.example.", RecordType::A, &["10.0.0.3:5353"]),
        ("x.local.corp.example.", RecordType::A, &[]),
        ("xcorp.example.", RecordType::A, &[]),
        ("host.sub.tail1.ts.net.", RecordType::A, &["10.0.0.4:53"]),
        ("gone.tail1.ts.net.", RecordType::A, &[]),
        ("web.tail1.ts.net.", RecordType::A, &[]),
        ("9.9.64.100.in-addr.arpa.", RecordType::PTR, &["10.0.0.5:53"]),
        ("2.0.64.100.in-addr.arpa.", RecordType::PTR, &[]),
        ("9.9.65.100.in-addr.arpa.", RecordType::PTR, &[]),
        ("intern.example.com.", RecordType::A, &[]),
    ];
    for (name, kind, servers) in table {
        let mut world = World::new();
        world.ask(&query(name, *kind));
        assert_eq!(world.servers(), *servers, "{name}");
        assert_eq!(world.replies.len(), usize::from(servers.is_empty()), "{name}");
    }
    let mut world = World::new();
    world.ask(&query("x.local.corp.example.", RecordType::A));
    assert_eq!(code(&world.replies[0]), ResponseCode::NXDomain, "a route without resolvers");
    world.ask(&query("other.test.", RecordType::A));
    assert_eq!(code(&world.replies[1]), ResponseCode::Refused, "no default resolvers");
    world.ask(&query("a.secret.example.", RecordType::A));
    assert_eq!(code(&world.replies[2]), ResponseCode::ServFail, "nobody who can be asked");
    assert!(world.dns.problems().next().unwrap().contains("https://dns.example/q of secret.example"));
}

#[test]
fn an_answer_comes_back_as_asked_and_is_kept_for_its_time() {
    let mut world = World::with_defaults(&[FIRST]);
    world.ask(&query("Some.Where.test.", RecordType::A));
    let sent = world.sent(0);
    assert_ne!(sent.metadata.id, 4711, "an id of our own (1 in 65,536 by chance, but the seed is fixed)");
    assert_eq!(sent.queries[0].name.to_ascii(), "Some.Where.test.");
    let ask = world.asks[0].0;
    world.answer(ask, &to(&sent, [192, 0, 2, 7]));
    assert_eq!(
        (world.replies[0].metadata.id, addresses(&world.replies[0])),
        (4711, vec!["192.0.2.7".into()])
    );
    assert_eq!(world.stopped, [ask]);
    world.pass(Duration::from_secs(10));
    world.ask(&query("sOME.where.test.", RecordType::A));
    assert_eq!(world.asks.len(), 1, "from memory");
    assert_eq!(world.replies[1].queries[0].name.to_ascii(), "sOME.where.test.");
    assert_eq!(world.replies[1].answers[0].ttl, 50);
    world.ask(&query("some.where.test.", RecordType::AAAA));
    assert_eq!(world.asks.len(), 2, "another question");
    world.pass(Duration::from_secs(60));
    world.ask(&query("some.where.test.", RecordType::A));
    assert!(world.asks.len() > 2, "its time is over");

    let mut world = World::with_defaults(&[FIRST]);
    world.ask(&query("a.test.", RecordType::A));
    world.answer(world.asks[0].0, &to(&world.sent(0), [192, 0, 2, 7]));
    world.dns.configure(&node(1, "me.tail1.ts.net.", &["100.64.0.1"]), &config());
    world.ask(&query("a.test.", RecordType::A));
    assert_eq!(code(&world.replies[1]), ResponseCode::Refused, "another configuration");
}

#[test]
fn answers_to_other_questions_do_not_count() {
    let mut world = World::with_defaults(&[FIRST]);
    world.ask(&query("a.test.", RecordType::A));
    let sent = world.sent(0);
    let ask = world.asks[0].0;
    let mut wrong = vec![];
    for change in 0..6 {
        let mut answer = to(&sent, [6, 6, 6, 6]);
        match change {
            0 => answer.metadata.id = answer.metadata.id.wrapping_add(1),
            1 => answer.queries[0].name = Name::from_ascii("b.test.").unwrap(),
            2 => answer.queries[0].query_type = RecordType::AAAA,
            3 => answer.queries[0].query_class = DNSClass::CH,
            4 => answer.queries.clear(),
            _ => answer.add_query(sent.queries[0].clone()).metadata.authoritative = true,
        }
        wrong.push(answer.to_vec().unwrap());
    }
    wrong.push(world.asks[0].3.clone());
    wrong.push(vec![]);
    wrong.push(to(&sent, [6, 6, 6, 6]).to_vec().unwrap()[..20].to_vec());
    for answer in &wrong {
        world.dns.handle_answer(ask, Ok(answer), world.now);
        world.pump();
        assert!(world.replies.is_empty(), "{answer:?}");
    }
    assert_eq!(world.count("dns_wrong_answer"), 9);
    let mut right = to(&sent, [192, 0, 2, 1]);
    right.queries[0].name = Name::from_ascii("A.TEST.").unwrap();
    world.answer(ask, &right);
    assert_eq!(addresses(&world.replies[0]), ["192.0.2.1"]);
    world.answer(ask, &right);
    assert_eq!(world.replies.len(), 1, "once");
}

#[test]
fn a_silent_resolver_costs_half_a_second_once() {
    let mut world = World::new();
    world.ask(&query("a.corp.example.", RecordType::A));
    world.pass(Duration::from_millis(499));
    assert_eq!(world.servers(), [FIRST]);
    world.pass(Duration::from_millis(1));
    assert_eq!(world.servers(), [FIRST, SECOND]);
    world.answer(world.asks[1].0, &to(&world.sent(1), [192, 0, 2, 2]));
    assert_eq!(addresses(&world.replies[0]), ["192.0.2.2"]);
    assert_eq!(world.stopped.len(), 2, "both sockets are free");
    world.ask(&query("b.corp.example.", RecordType::A));
    assert_eq!(world.servers()[2], SECOND, "the one that answered is asked first now");
    world.pass(Duration::from_secs(31));
    world.ask(&query("c.corp.example.", RecordType::A));
    assert_eq!(world.servers().last().unwrap(), FIRST);

    // The first may still answer after the second was asked.
    let mut world = World::new();
    world.ask(&query("a.corp.example.", RecordType::A));
    world.pass(Duration::from_millis(600));
    world.answer(world.asks[0].0, &to(&world.sent(0), [192, 0, 2, 1]));
    assert_eq!(addresses(&world.replies[0]), ["192.0.2.1"]);
}

#[test]
fn a_resolver_that_fails_makes_way_at_once() {
    for how in [ResponseCode::ServFail, ResponseCode::Refused, ResponseCode::NotImp, ResponseCode::NoError] {
        let mut world = World::new();
        world.ask(&query("a.corp.example.", RecordType::A));
        if how == ResponseCode::NoError {
            world.fail(world.asks[0].0);
        } else {
            world.answer(world.asks[0].0, &refusal(&world.sent(0), how));
        }
        assert_eq!(world.servers(), [FIRST, SECOND], "{how}");
        world.answer(world.asks[1].0, &refusal(&world.sent(1), ResponseCode::Refused));
        assert_eq!(code(&world.replies[0]), ResponseCode::Refused, "when all fail, the last word counts");
        assert_eq!(world.stopped.len(), 2);
        assert_eq!(world.dns.poll_timeout(), None);
    }
    let mut world = World::new();
    world.ask(&query("a.corp.example.", RecordType::A));
    world.answer(world.asks[0].0, &refusal(&world.sent(0), ResponseCode::NXDomain));
    assert_eq!(code(&world.replies[0]), ResponseCode::NXDomain, "that is an answer");
    let mut world = World::new();
    world.ask(&query("a.corp.example.", RecordType::A));
    world.fail(world.asks[0].0);
    world.fail(world.asks[1].0);
    assert_eq!(code(&world.replies[0]), ResponseCode::ServFail, "nobody is there");
}

#[test]
fn when_nobody_answers_it_fails_after_ten_seconds() {
    let mut world = World::new();
    world.ask(&query("a.corp.example.", RecordType::A));
    world.pass(Duration::from_millis(9_999));
    assert!(world.replies.is_empty());
    assert!((6..=12).contains(&world.asks.len()), "asked again, not too often: {}", world.asks.len());
    world.pass(Duration::from_millis(1));
    assert_eq!(code(&world.replies[0]), ResponseCode::ServFail);
    assert_eq!(world.stopped.len(), world.asks.len());
    assert_eq!(world.count("dns_timeout"), 1);
    assert_eq!(world.dns.poll_timeout(), None);
}

#[test]
fn a_cut_answer_is_fetched_over_tcp_and_cut_for_who_cannot_take_it() {
    let mut world = World::with_defaults(&[FIRST, SECOND]);
    let mut asked = query("big.test.", RecordType::A);
    let mut edns = Edns::new();
    edns.set_max_payload(1000);
    asked.set_edns(edns);
    world.ask(&asked);
    let mut cut = refusal(&world.sent(0), ResponseCode::NoError);
    cut.metadata.truncation = true;
    world.answer(world.asks[0].0, &cut);
    assert_eq!((world.asks[1].1, world.asks[1].2), (FIRST.parse().unwrap(), true));
    let mut whole = to(&world.sent(1), [192, 0, 2, 1]);
    for n in 0..100 {
        let name = world.sent(1).queries[0].name.clone();
        whole.add_answer(Record::from_rdata(name, 60, RData::A(A::new(192, 0, 2, n))));
    }
    world.answer(world.asks[1].0, &whole);
    let reply = &world.replies[0];
    assert!(reply.metadata.truncation && reply.answers.is_empty());
    assert_eq!(reply.edns.as_ref().unwrap().max_payload(), 1232);
    // The same asker over TCP gets it from memory.
    let asked_again = Asked { client: Client { stream: Some(1), ..client() }, meant_for: None };
    world.dns.handle_query(asked_again, &asked.to_vec().unwrap(), world.now);
    world.pump();
    assert_eq!((world.asks.len(), world.replies[1].answers.len()), (2, 101));

    // Where TCP fails, the next is asked, and a cut answer is better than none.
    let mut world = World::with_defaults(&[FIRST, SECOND]);
    world.ask(&query("big.test.", RecordType::A));
    let mut cut = refusal(&world.sent(0), ResponseCode::NoError);
    cut.metadata.truncation = true;
    world.answer(world.asks[0].0, &cut);
    world.fail(world.asks[1].0);
    assert_eq!(world.servers(), [FIRST, FIRST, SECOND]);
    world.fail(world.asks[2].0);
    assert!(world.replies[0].metadata.truncation);
}

/// A pod's own search list is kubelet's, so the tailnet's domains are not in it.
#[test]
fn an_intercepted_name_of_one_label_is_looked_for_in_the_search_domains() {
    let mut world = World::with_defaults(&[FIRST]);
    let config = DnsConfig { domains: vec!["none.example".into(), "Tail1.ts.net.".into()], ..config() };
    world.dns.configure(&node(1, "me.tail1.ts.net.", &["100.64.0.1"]), &config);
    let replies = world.replies.len();
    world.ask_bytes(&query("WEB.", RecordType::A).to_vec().unwrap(), Some(CLUSTER));
    let reply = &world.replies[replies];
    assert_eq!(reply.queries[0].name().to_string(), "WEB.");
    assert_eq!((reply.answers.len(), reply.answers[0].name.to_string().as_str()), (1, "WEB."));
    let asks = world.asks.len();
    for (n, name) in ["gone.", "web.default.", "local.", "."].into_iter().enumerate() {
        world.ask_bytes(&query(name, RecordType::A).to_vec().unwrap(), Some(CLUSTER));
        assert_eq!(world.servers()[asks + n], CLUSTER, "{name}");
    }
    // Whoever asks MagicDNS itself has a search list of its own.
    world.ask_bytes(&query("web.", RecordType::A).to_vec().unwrap(), None);
    assert_eq!(world.replies[replies + 1].metadata.response_code, ResponseCode::Refused);
}

#[test]
fn what_is_meant_for_a_name_server_goes_there_byte_for_byte() {
    let mut world = World::with_defaults(&[FIRST]);
    let mut update = query("kubernetes.default.svc.cluster.local.", RecordType::A).to_vec().unwrap();
    update[2] |= 5 << 3;
    let odd = [&query("a.b.", RecordType::A).to_vec().unwrap()[..], b"trailing"].concat();
    let whole = query("kubernetes.default.svc.cluster.local.", RecordType::A).to_vec().unwrap();
    let chaos = {
        let mut chaos = query("version.bind.", RecordType::TXT);
        chaos.queries[0].query_class = DNSClass::CH;
        chaos.to_vec().unwrap()
    };
    for (n, message) in [whole, update, odd, chaos].into_iter().enumerate() {
        world.ask_bytes(&message, Some(CLUSTER));
        let (ask, server, stream, sent) = world.asks[n].clone();
        assert_eq!((server.to_string().as_str(), stream, &sent), (CLUSTER, false, &message));
        let mut answer = message.clone();
        answer[2] |= 0x80;
        answer.extend(b"whatever it says");
        let mut wrong = answer.clone();
        wrong[0] ^= 1;
        world.dns.handle_answer(ask, Ok(&wrong), world.now);
        assert_eq!(world.dns.poll_action(), None);
        world.dns.handle_answer(ask, Ok(&answer), world.now);
        assert_eq!(world.dns.poll_action(), Some(Action::Reply { to: client(), message: answer }));
        assert_eq!(world.dns.poll_action(), Some(Action::Stop { ask }));
    }
    // What is ours is answered here, and a route's names are asked of its resolvers.
    for name in ["web.tail1.ts.net.", "gone.tail1.ts.net.", "intern.example.com.", "2.0.64.100.in-addr.arpa."]
    {
        world.ask_bytes(&query(name, RecordType::AAAA).to_vec().unwrap(), Some(CLUSTER));
        assert_eq!(world.asks.len(), 4, "{name}");
    }
    assert_eq!(world.replies.len(), 4);
    world.ask_bytes(&query("a.corp.example.", RecordType::A).to_vec().unwrap(), Some(CLUSTER));
    assert_eq!(world.servers()[4], FIRST);
    // A response or a stub of a message is nobody's question.
    let mut response = query("a.b.", RecordType::A).to_vec().unwrap();
    response[2] |= 0x80;
    world.ask_bytes(&response, Some(CLUSTER));
    world.ask_bytes(b"short", Some(CLUSTER));
    assert_eq!(world.asks.len(), 5);
}

#[test]
fn passed_on_questions_end_and_give_way() {
    let mut world = World::new();
    for n in 0..6 {
        world.ask_bytes(&query(&format!("h{n}.test."), RecordType::A).to_vec().unwrap(), Some(CLUSTER));
    }
    let ids: Vec<AskId> = world.asks.iter().map(|(ask, ..)| *ask).collect();
    assert_eq!(world.stopped, ids[..2], "four sockets: the oldest two gave way");
    assert_eq!(world.count("dns_busy"), 2);
    world.ask(&query("a.corp.example.", RecordType::A));
    assert_eq!(world.stopped, ids[..3], "also to one for a resolver");
    world.pass(Duration::from_secs(6));
    assert!(ids.iter().all(|id| world.stopped.contains(id)), "nobody waits for an answer any more");
    assert!(world.replies.is_empty(), "a lost question stays lost, its asker knows what to do");

    let mut world = World::new();
    world.dns.set_capacity(Capacity::default());
    world.ask_bytes(&query("h.test.", RecordType::A).to_vec().unwrap(), Some(CLUSTER));
    assert_eq!((world.asks.len(), world.dns.poll_timeout()), (0, None), "no sockets, nothing kept");
    world.ask(&query("a.corp.example.", RecordType::A));
    world.pass(Duration::from_secs(11));
    assert_eq!(code(&world.replies[0]), ResponseCode::ServFail);
}

#[test]
fn a_transfer_is_many_messages() {
    let mut world = World::new();
    let asked = query("zone.test.", RecordType::AXFR).to_vec().unwrap();
    let over_tcp =
        Asked { client: Client { stream: Some(1), ..client() }, meant_for: Some(CLUSTER.parse().unwrap()) };
    world.dns.handle_query(over_tcp, &asked, world.now);
    world.pump();
    assert!(world.asks[0].2);
    let mut part = asked.clone();
    part[2] |= 0x80;
    for n in 1..=3 {
        world.dns.handle_answer(world.asks[0].0, Ok(&part), world.now);
        world.pump();
        assert_eq!((world.replies.len(), world.stopped.len()), (n, 0));
    }
    world.fail(world.asks[0].0);
    assert_eq!(world.stopped.len(), 1);
}

#[test]
fn the_work_at_a_time_is_bounded() {
    let mut world = World::with_defaults(&[FIRST]);
    world.dns.set_capacity(Capacity { udp4: 1000, ..Capacity::default() });
    for n in 0..200 {
        world.ask(&query(&format!("h{n}.test."), RecordType::A));
    }
    assert_eq!((world.asks.len(), world.replies.len()), (64, 136));
    assert!(world.replies.iter().all(|r| code(r) == ResponseCode::ServFail));
    assert_eq!(world.count("dns_busy"), 136);
}

proptest! {
    #[test]
    fn fuzz_any_answer_is_survived(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..300),
        tidy in any::<bool>(), passed_on in any::<bool>(), damaged in any::<prop::sample::Index>(),
    ) {
        let mut world = World::with_defaults(&[FIRST]);
        let asked = query("a.test.", RecordType::A).to_vec().unwrap();
        world.ask_bytes(&asked, passed_on.then_some(CLUSTER));
        let sent = world.sent(0);
        if tidy {
            let mut good = to(&sent, [192, 0, 2, 1]).to_vec().unwrap();
            let at = damaged.index(good.len());
            good[at] = bytes.first().copied().unwrap_or(0);
            good.append(&mut bytes);
            bytes = good;
        }
        world.dns.handle_answer(world.asks[0].0, Ok(&bytes), world.now);
        while let Some(action) = world.dns.poll_action() {
            if let Action::Reply { message, .. } = action {
                prop_assert_eq!(&message[..2], &asked[..2]);
                prop_assert!(passed_on || message.len() <= 512);
            }
        }
        world.pass(Duration::from_secs(1));
        world.ask_bytes(&asked, None);
        world.pass(Duration::from_secs(20));
        prop_assert_eq!(world.dns.poll_timeout(), None);
    }
}

#[test]
fn what_a_pod_asks_its_cluster_or_the_public_is_asked_of_nobody_else() {
    let mut world = World::with_defaults(&["10.0.0.9"]);
    // A tailnet that claims everything it can: the root, one label, the cluster's own domain, a node in it.
    let route = || vec![Resolver { addr: FIRST.into(), ..Resolver::default() }];
    let mut greedy = config();
    greedy.resolvers = route();
    greedy.routes = ["", ".", "local", "cluster.local", "svc.cluster.local.", "corp.example"]
        .map(|suffix| (suffix.to_owned(), route()))
        .into();
    greedy.extra_records.push(DnsRecord {
        name: "kubernetes.default.svc.cluster.local".into(),
        value: "100.64.0.9".into(),
        ..DnsRecord::default()
    });
    world.dns.configure(&node(1, "me.cluster.local.", &["100.64.0.1"]), &greedy);
    world.dns.upsert(&node(7, "db.default.svc.cluster.local.", &["100.64.0.7"]));
    let theirs = [
        "kubernetes.default.svc.cluster.local.",
        "DB.default.svc.Cluster.Local.",
        "nobody.cluster.local.",
        "cluster.local.",
        "example.org.",
        "corp.example.org.",
        "evilcorp.example.",
        "com.",
    ];
    for name in theirs {
        let question = query(name, RecordType::A).to_vec().unwrap();
        world.ask_bytes(&question, Some(CLUSTER));
        let (_, server, _, sent) = world.asks.last().unwrap();
        assert_eq!((server.to_string().as_str(), sent), (CLUSTER, &question), "{name}");
        let ask = world.asks.last().unwrap().0;
        world.fail(ask);
    }
    assert_eq!(world.asks.len(), theirs.len(), "one asking each: nobody else is asked when that one fails");
    assert!(world.replies.is_empty(), "and nothing is made up: {:?}", world.replies);
    // What the tailnet may claim goes to its resolver, and only there.
    for name in ["a.corp.example.", "printer.local."] {
        world.ask_bytes(&query(name, RecordType::A).to_vec().unwrap(), Some(CLUSTER));
        assert_eq!(world.asks.last().unwrap().1.to_string(), FIRST, "{name}");
    }
}
