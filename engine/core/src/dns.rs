//! MagicDNS: what a pod's questions are answered with.
//!
//! A question comes to the service address, or to a name server in front of which this node stands
//! (interception). In both cases the tailnet's own names are answered here, and those under a suffix with
//! resolvers by these. Of the rest, what was meant for a name server is passed on to it byte for byte and so
//! are its answers; what came to the service address goes to the tailnet's default resolvers, or is refused
//! where there are none, so that a stub resolver asks the next server.
//!
//! Only the pod itself is answered. Sockets are the shell's: [`Dns`] says which server to ask over what
//! ([`Action::Ask`]) and gets the answer or the failure back.

mod cache;
mod forward;
mod names;
mod reverse;
mod upstream;
mod wire;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use hickory_proto::op::Message;
use hickory_proto::rr::RecordType;
use hickory_proto::serialize::binary::BinDecodable;

use self::forward::Forwarder;
pub use self::forward::{AskId, Capacity, Failure};
use self::names::{Found, Names};
use self::upstream::Upstreams;
pub(crate) use self::upstream::ports as server_ports;
use self::wire::{Odd, Question, code};
use crate::random::Random;
use crate::tailcfg::{DnsConfig, Node, NodeId};

const CLASS_IN: u16 = 1;
/// Names under this one, asked of a name server in front of which this node stands, are that server's,
/// whatever zones, routes and nodes the tailnet has: no tailnet may answer a pod's questions for the services
/// of its cluster, or hear them.
const CLUSTER: &str = "cluster.local";

/// Who asked, for the shell to find again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Client {
    /// Number of the listener.
    pub listener: u16,
    /// Where from.
    pub from: SocketAddr,
    /// Number of the connection; `None` for UDP.
    pub stream: Option<u64>,
}

/// How a question came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// By whom.
    pub client: Client,
    /// The name server it was meant for; `None` when it came to the service address.
    pub meant_for: Option<SocketAddr>,
}

/// What the shell has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send this to who asked.
    Reply {
        /// Who.
        to: Client,
        /// A DNS message.
        message: Vec<u8>,
    },
    /// Send a message to a server through a socket of its own, and report every message that comes back with
    /// [`Dns::handle_answer`] until told to stop.
    Ask {
        /// Names this asking.
        ask: AskId,
        /// Whom.
        server: SocketAddr,
        /// Over TCP.
        stream: bool,
        /// A DNS message.
        message: Vec<u8>,
    },
    /// The socket of an asking is free again.
    Stop {
        /// Which.
        ask: AskId,
    },
}

macro_rules! counts {
    ($(#[doc = $doc:literal] $name:ident = $text:literal,)*) => {
        /// What is counted. A bounded set: these become metric labels.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Count {
            $(#[doc = $doc] $name,)*
        }

        impl Count {
            const NAMES: &'static [&'static str] = &[$($text),*];
            const MEANINGS: &'static [&'static str] = &[$($doc),*];
        }
    };
}

counts! {
    /// Shorter than a header.
    Short = "dns_short",
    /// A response where a question belongs.
    Response = "dns_not_a_question",
    /// Another operation than a query.
    Operation = "dns_operation",
    /// A question that does not parse.
    Question = "dns_malformed",
    /// Not from the pod itself.
    Stranger = "dns_not_from_the_pod",
    /// An answer that is to another question.
    WrongAnswer = "dns_wrong_answer",
    /// No server answered in time.
    Timeout = "dns_timeout",
    /// More questions at a time than are worked on.
    Busy = "dns_busy",
}

/// Counters since the start.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counts([u64; Count::NAMES.len()]);

impl Counts {
    pub(crate) fn add(&mut self, count: Count) {
        self.0[count as usize] += 1;
    }

    fn named(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Count::NAMES.iter().copied().zip(self.0)
    }
}

/// A sentence about one of the reasons that [`Dns::counts`] names.
#[must_use]
pub fn meaning(reason: &str) -> Option<&'static str> {
    let at = Count::NAMES.iter().position(|name| *name == reason)?;
    Count::MEANINGS.get(at).map(|text| text.trim_ascii())
}

impl From<Odd> for Count {
    fn from(odd: Odd) -> Self {
        match odd {
            Odd::Short => Self::Short,
            Odd::Response => Self::Response,
            Odd::Operation => Self::Operation,
            Odd::Question => Self::Question,
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Dns {
    names: Names,
    /// Asked about what nobody here knows.
    defaults: Upstreams,
    problems: Vec<String>,
    forwarder: Forwarder,
    counts: Counts,
    actions: VecDeque<Action>,
}

impl Dns {
    /// No names and nobody to ask: every query is refused. The seed is for what nobody may guess.
    #[must_use]
    pub fn new(seed: [u8; 32]) -> Self {
        Self {
            names: Names::default(),
            defaults: Arc::new([]),
            problems: Vec::new(),
            forwarder: Forwarder::new(Random::new(seed)),
            counts: Counts::default(),
            actions: VecDeque::new(),
        }
    }

    /// Sets zones, routes, resolvers, further records and which addresses are told. The node itself is told
    /// about with [`Self::upsert`] like any other.
    pub fn configure(&mut self, self_node: &Node, dns: &DnsConfig) {
        let mut problems = Vec::new();
        let mut changed = self.names.configure(self_node, dns, |suffix, resolvers| {
            upstream::usable(suffix, resolvers, &mut problems)
        });
        let resolvers = if dns.resolvers.is_empty() { &dns.fallback_resolvers } else { &dns.resolvers };
        let defaults = upstream::usable("the tailnet", resolvers, &mut problems);
        changed |= self.defaults != defaults;
        self.defaults = defaults;
        self.problems = problems;
        if changed {
            self.forwarder.forget();
        }
    }

    /// Adds a node, or takes its new name and addresses.
    pub fn upsert(&mut self, node: &Node) {
        self.names.upsert(node);
    }

    /// Forgets a node.
    pub fn remove(&mut self, id: NodeId) {
        self.names.remove(id);
    }

    /// Forgets every node; zones, routes and further records stay.
    pub fn clear_nodes(&mut self) {
        self.names.clear_nodes();
    }

    /// How many nodes have a name.
    #[must_use]
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// True without any node.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many servers can be asked at a time. Before it is said, nobody is asked.
    pub fn set_capacity(&mut self, capacity: Capacity) {
        self.forwarder.set_capacity(capacity);
    }

    /// Resolvers that control gave and that cannot be asked, a sentence each.
    pub fn problems(&self) -> impl Iterator<Item = &str> {
        self.problems.iter().map(String::as_str)
    }

    /// What went wrong so far, by reason.
    pub fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.counts.named()
    }

    /// A question that did not come from the pod: it is not answered.
    pub(crate) fn refuse_stranger(&mut self) {
        self.counts.add(Count::Stranger);
    }

    /// A question of the pod.
    pub fn handle_query(&mut self, asked: Asked, query: &[u8], now: Instant) {
        let question = match Question::parse(query) {
            Ok(question) => question,
            Err(odd) => return self.odd(asked, query, odd, now),
        };
        let clusters = asked.meant_for.is_some() && names::is_within(&question.name, CLUSTER);
        let found = if question.class == CLASS_IN && !clusters {
            self.names.find(&question.name, RecordType::from(question.kind))
        } else {
            Found::NotOurs
        };
        // kubelet writes the pod's search list, so tailnet domains are not in it. A resolver asks for a name of one
        // label as it is when its own list is through.
        let searched = (found == Found::NotOurs && asked.meant_for.is_some() && !clusters)
            .then(|| self.names.search(&question.name, RecordType::from(question.kind)))
            .flatten()
            .filter(|_| question.class == CLASS_IN);
        let found = searched.unwrap_or(found);
        match (found, asked.meant_for) {
            (Found::Via(servers), _) => self.forward(asked, query, question, servers, now),
            (Found::NotOurs, Some(server)) => self.pass_on(asked, query, Some(&question), server, now),
            (Found::NotOurs, None) if !self.defaults.is_empty() => {
                let servers = Arc::clone(&self.defaults);
                self.forward(asked, query, question, servers, now);
            }
            (found, _) => self.answer(asked, query, &question, found),
        }
    }

    fn answer(&mut self, asked: Asked, query: &[u8], question: &Question, found: Found) {
        let mut reply = Vec::new();
        let written = match Message::from_bytes(query) {
            Ok(message) => match message.queries.first() {
                Some(first) => {
                    let stream = asked.client.stream.is_some();
                    names::write_reply(&message, first, found, stream, &mut reply)
                }
                None => false,
            },
            Err(_) => {
                self.counts.add(Count::Question);
                return self.fail(asked, query, Some(question), code::FORM_ERR);
            }
        };
        if !written {
            return self.fail(asked, query, Some(question), code::SERV_FAIL);
        }
        self.actions.push_back(Action::Reply { to: asked.client, message: reply });
    }

    fn fail(&mut self, asked: Asked, query: &[u8], question: Option<&Question>, code: u8) {
        let mut message = Vec::new();
        wire::fail(query, question, code, &mut message);
        self.actions.push_back(Action::Reply { to: asked.client, message });
    }

    fn odd(&mut self, asked: Asked, query: &[u8], odd: Odd, now: Instant) {
        if let (Some(server), Odd::Operation | Odd::Question) = (asked.meant_for, odd) {
            // Whatever it is, the name server would have got it.
            return self.pass_on(asked, query, None, server, now);
        }
        self.counts.add(odd.into());
        match odd {
            Odd::Short | Odd::Response => {}
            Odd::Operation => self.fail(asked, query, None, code::NOT_IMP),
            Odd::Question => self.fail(asked, query, None, code::FORM_ERR),
        }
    }

    fn forward(&mut self, asked: Asked, query: &[u8], question: Question, servers: Upstreams, now: Instant) {
        self.forwarder.forward(
            asked.client,
            query,
            question,
            servers,
            now,
            &mut self.actions,
            &mut self.counts,
        );
    }

    fn pass_on(
        &mut self,
        asked: Asked,
        query: &[u8],
        question: Option<&Question>,
        server: SocketAddr,
        now: Instant,
    ) {
        let end = question.map(|question| question.end);
        let kind = question.map(|question| question.kind);
        self.forwarder.pass_on(
            asked.client,
            query,
            end,
            kind,
            server,
            now,
            &mut self.actions,
            &mut self.counts,
        );
    }

    /// A message from the server of an asking, or why there will be none.
    pub fn handle_answer(&mut self, ask: AskId, answer: Result<&[u8], Failure>, now: Instant) {
        self.forwarder.handle_answer(ask, answer, now, &mut self.actions, &mut self.counts);
    }

    /// When to call [`Self::handle_timeout`] next.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.forwarder.deadline()
    }

    /// The time of [`Self::poll_timeout`] has come. Calling early does no harm.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.forwarder.handle_timeout(now, &mut self.actions, &mut self.counts);
    }

    /// The next thing for the shell to do. Ask after every call until there is none.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }
}

#[cfg(test)]
mod tests;
