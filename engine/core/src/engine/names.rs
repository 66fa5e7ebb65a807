//! The pod's questions for names.

use super::*;
use crate::dns::{Action, AskId, Asked, Capacity, Failure};

impl Engine {
    /// A DNS message that came to one of the node's listeners. At the service address only the node's own
    /// addresses are answered: it is no resolver for the tailnet.
    pub fn handle_dns(&mut self, asked: Asked, query: &[u8], now: Instant) {
        if asked.meant_for.is_none() && !self.own.contains(&asked.client.from.ip()) {
            return self.dns.refuse_stranger();
        }
        self.dns.handle_query(asked, query, now);
    }

    /// A message from a name server that [`Action::Ask`] named, or why there will be none.
    pub fn handle_dns_answer(&mut self, ask: AskId, answer: Result<&[u8], Failure>, now: Instant) {
        self.dns.handle_answer(ask, answer, now);
    }

    /// How many name servers the shell can ask at a time.
    pub fn set_dns_capacity(&mut self, capacity: Capacity) {
        self.dns.set_capacity(capacity);
    }

    /// The next thing for the shell to do about names. Ask after every call until there is none.
    pub fn poll_dns(&mut self) -> Option<Action> {
        self.dns.poll_action()
    }

    /// What went wrong with questions for names, by reason.
    pub fn dns_counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.dns.counts()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dns::Client;
    use crate::tailcfg::{MapResponse, Node};

    #[test]
    fn only_the_node_itself_is_answered() {
        let now = Instant::now();
        let config = Config {
            node_key: NodePrivate::from_bytes([1; 32]),
            disco_key: DiscoPrivate::from_bytes([2; 32]),
            mtu: 1280,
            random_seed: [3; 32],
            standby: None,
            wall: UnixTime::from_secs(1_800_000_000),
            snapshot: None,
        };
        let mut engine = Engine::new(config, now);
        let ask = |engine: &mut Engine, from: &str, meant_for: Option<&str>| {
            let client = Client { listener: 0, from: from.parse().unwrap(), stream: None };
            let meant_for = meant_for.map(|server| server.parse().unwrap());
            let query = b"\0\x07\x01\0\0\x01\0\0\0\0\0\0\x01a\x04test\0\0\x01\0\x01";
            engine.handle_dns(Asked { client, meant_for }, query, now);
            engine.poll_dns()
        };
        let own = "100.64.0.1:4000";
        assert_eq!(ask(&mut engine, own, None), None, "not known to be its own yet");
        let node = Node {
            name: "me.test.".into(),
            addresses: vec!["100.64.0.1/32".parse().unwrap(), "fd7a:115c:a1e0::1/128".parse().unwrap()],
            ..Node::default()
        };
        let map = MapResponse { node: Some(node), ..MapResponse::default() };
        let mut out = Outbox::default();
        engine.handle_control(ControlEvent::Map(Box::new(map)), now, &mut out);
        for from in [own, "[fd7a:115c:a1e0::1]:4000"] {
            assert!(matches!(ask(&mut engine, from, None), Some(Action::Reply { .. })), "{from}");
        }
        for from in ["100.64.0.2:4000", "10.0.0.1:4000", "127.0.0.1:4000", "[fd7a:115c:a1e0::2]:4000"] {
            assert_eq!(ask(&mut engine, from, None), None, "{from}");
        }
        assert!(engine.dns_counts().any(|count| count == ("dns_not_from_the_pod", 5)));
        // A stand-in is on the pod's own loopback: there the pod may come from any address it has.
        engine.set_dns_capacity(Capacity { udp4: 1, ..Capacity::default() });
        let passed_on = ask(&mut engine, "10.244.1.7:4000", Some("10.96.0.10:53"));
        assert!(matches!(passed_on, Some(Action::Ask { .. })));
    }
}
