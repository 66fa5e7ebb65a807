//! Questions that others answer: whom to ask, for how long, and whose answer counts.
//!
//! A question to a list of resolvers goes to the first; the next is asked as well when that one is silent for
//! a moment, and instead of it when it fails. The first good answer wins. A question passed on to the name
//! server that it was meant for is sent once, as it is: its asker asks again by itself, as it would without us.
//!
//! Every asking has a socket of its own, connected to the server, so that the kernel drops what comes from
//! elsewhere and each question leaves from another port. There are few of them. When they are used up, the
//! oldest question that was passed on gives way: its asker has the least to lose.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::cache::Cache;
use super::upstream::Upstreams;
use super::wire::{self, Question, code};
use super::{Action, Client, Count, Counts};
use crate::random::Random;

/// Questions worked on at a time.
const MAX_EXCHANGES: usize = 64;
/// Askings of one question at a time.
const MAX_ASKS: usize = 4;
/// After this a question has failed.
const PATIENCE: Duration = Duration::from_secs(10);
/// A server that is silent so long is not waited for alone.
const STAGGER: Duration = Duration::from_millis(500);
/// When all were asked, they are asked again so much later.
const AGAIN: Duration = Duration::from_secs(2);
/// A passed-on question's asker has given up by then (a stub resolver's patience is 5 s).
const PASSED_ON_PATIENCE: Duration = Duration::from_secs(6);
/// A server that was silent while another answered goes to the end of the list for so long.
const DOUBT: Duration = Duration::from_secs(30);
/// Servers in doubt that are remembered.
const MAX_DOUBTS: usize = 32;
/// Kinds of question whose answer may be many messages.
const TRANSFERS: [u16; 2] = [251, 252];

/// Names an asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AskId(pub u64);

/// Sockets for asking, by family and protocol.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Capacity {
    /// UDP over IPv4.
    pub udp4: usize,
    /// UDP over IPv6.
    pub udp6: usize,
    /// TCP over IPv4.
    pub tcp4: usize,
    /// TCP over IPv6.
    pub tcp6: usize,
}

/// Why an asking came to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failure;

/// A kind of socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kind {
    v4: bool,
    stream: bool,
}

impl Kind {
    fn of(server: SocketAddr, stream: bool) -> Self {
        Self { v4: server.is_ipv4(), stream }
    }

    fn capacity(self, capacity: Capacity) -> usize {
        match (self.v4, self.stream) {
            (true, false) => capacity.udp4,
            (false, false) => capacity.udp6,
            (true, true) => capacity.tcp4,
            (false, true) => capacity.tcp6,
        }
    }
}

/// One question.
#[derive(Debug)]
struct Exchange {
    client: Client,
    query: Vec<u8>,
    how: How,
    deadline: Instant,
}

#[derive(Debug)]
enum How {
    /// To one server, unchanged.
    PassedOn {
        /// Where the question ends, if it parsed.
        end: Option<usize>,
        /// More messages may follow the first answer.
        many: bool,
    },
    /// To some of a list.
    Forwarded(Forwarded),
}

#[derive(Debug)]
struct Forwarded {
    question: Question,
    /// As it is sent: under an id of our own.
    sent: Vec<u8>,
    servers: Vec<SocketAddr>,
    /// How many times somebody was asked; counts through the list again and again.
    turns: usize,
    next: Instant,
    /// The best of the answers that are none.
    fallback: Option<Vec<u8>>,
}

#[derive(Debug, Clone, Copy)]
struct Ask {
    exchange: u64,
    server: SocketAddr,
    kind: Kind,
}

#[derive(Debug)]
pub(super) struct Forwarder {
    random: Random,
    capacity: Capacity,
    cache: Cache,
    /// In the order they began.
    exchanges: BTreeMap<u64, Exchange>,
    asks: BTreeMap<AskId, Ask>,
    doubts: HashMap<SocketAddr, Instant>,
    numbers: u64,
}

impl Forwarder {
    pub(super) fn new(random: Random) -> Self {
        Self {
            random,
            capacity: Capacity::default(),
            cache: Cache::default(),
            exchanges: BTreeMap::new(),
            asks: BTreeMap::new(),
            doubts: HashMap::new(),
            numbers: 0,
        }
    }

    pub(super) fn set_capacity(&mut self, capacity: Capacity) {
        self.capacity = capacity;
    }

    /// What was learnt from resolvers that may not be the ones to ask any more.
    pub(super) fn forget(&mut self) {
        self.cache.clear();
        self.doubts.clear();
    }

    #[expect(clippy::too_many_arguments, reason = "one question with all that belongs to it")]
    pub(super) fn forward(
        &mut self,
        client: Client,
        query: &[u8],
        question: Question,
        servers: Upstreams,
        now: Instant,
        actions: &mut VecDeque<Action>,
        counts: &mut Counts,
    ) {
        if let Some(answer) = self.cache.get(query, &question, now) {
            return reply(client, &question, answer, actions);
        }
        if servers.is_empty() || !self.make_room(actions, counts) {
            if !servers.is_empty() {
                counts.add(Count::Busy);
            }
            return fail(client, query, Some(&question), actions);
        }
        let mut servers = servers.to_vec();
        servers.sort_by_key(|server| self.doubts.get(server).is_some_and(|until| *until > now));
        let mut sent = query.to_vec();
        if let Some(id) = sent.get_mut(..2) {
            id.copy_from_slice(&self.random.bytes::<2>());
        }
        let how = Forwarded { question, sent, servers, turns: 0, next: now, fallback: None };
        let number = self.number();
        let deadline = now + PATIENCE;
        let exchange = Exchange { client, query: query.to_vec(), how: How::Forwarded(how), deadline };
        self.exchanges.insert(number, exchange);
        self.advance(number, now, actions, counts);
    }

    #[expect(clippy::too_many_arguments, reason = "one question with all that belongs to it")]
    pub(super) fn pass_on(
        &mut self,
        client: Client,
        query: &[u8],
        end: Option<usize>,
        kind: Option<u16>,
        server: SocketAddr,
        now: Instant,
        actions: &mut VecDeque<Action>,
        counts: &mut Counts,
    ) {
        let stream = client.stream.is_some();
        if !self.make_room(actions, counts) || !self.free(Kind::of(server, stream), actions, counts) {
            // As if it had been lost on its way: the asker knows what to do then.
            return counts.add(Count::Busy);
        }
        let many = kind.is_some_and(|kind| TRANSFERS.contains(&kind));
        let number = self.number();
        let how = How::PassedOn { end, many };
        let deadline = now + PASSED_ON_PATIENCE;
        self.exchanges.insert(number, Exchange { client, query: query.to_vec(), how, deadline });
        self.ask(number, server, stream, query.to_vec(), actions);
    }

    /// Room for one more exchange.
    fn make_room(&mut self, actions: &mut VecDeque<Action>, counts: &mut Counts) -> bool {
        if self.exchanges.len() < MAX_EXCHANGES {
            return true;
        }
        let oldest = self.exchanges.iter().find(|(_, e)| matches!(e.how, How::PassedOn { .. }));
        let Some(number) = oldest.map(|(number, _)| *number) else { return false };
        counts.add(Count::Busy);
        self.end(number, actions);
        true
    }

    /// A socket of this kind.
    fn free(&mut self, kind: Kind, actions: &mut VecDeque<Action>, counts: &mut Counts) -> bool {
        let most = kind.capacity(self.capacity);
        if self.asks.values().filter(|ask| ask.kind == kind).count() < most {
            return true;
        }
        let passed_on = |ask: &&Ask| {
            ask.kind == kind
                && self.exchanges.get(&ask.exchange).is_some_and(|e| matches!(e.how, How::PassedOn { .. }))
        };
        let Some(number) = self.asks.values().find(passed_on).map(|ask| ask.exchange) else { return false };
        counts.add(Count::Busy);
        self.end(number, actions);
        true
    }

    fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    fn ask(
        &mut self,
        exchange: u64,
        server: SocketAddr,
        stream: bool,
        message: Vec<u8>,
        actions: &mut VecDeque<Action>,
    ) {
        let ask = AskId(self.number());
        self.asks.insert(ask, Ask { exchange, server, kind: Kind::of(server, stream) });
        actions.push_back(Action::Ask { ask, server, stream, message });
    }

    fn stop(&mut self, ask: AskId, actions: &mut VecDeque<Action>) {
        if self.asks.remove(&ask).is_some() {
            actions.push_back(Action::Stop { ask });
        }
    }

    /// Forgets a question and frees its sockets.
    fn end(&mut self, number: u64, actions: &mut VecDeque<Action>) -> Option<Exchange> {
        for ask in self.asks_of(number).collect::<Vec<_>>() {
            self.stop(ask, actions);
        }
        self.exchanges.remove(&number)
    }

    fn asks_of(&self, number: u64) -> impl Iterator<Item = AskId> {
        self.asks.iter().filter(move |(_, ask)| ask.exchange == number).map(|(id, _)| *id)
    }

    /// Asks whoever is next, and ends the question when nobody is left to wait for.
    fn advance(&mut self, number: u64, now: Instant, actions: &mut VecDeque<Action>, counts: &mut Counts) {
        loop {
            let Some(exchange) = self.exchanges.get_mut(&number) else { return };
            if now >= exchange.deadline {
                return self.give_up(number, now, actions, counts);
            }
            let How::Forwarded(how) = &mut exchange.how else { return };
            if how.next > now {
                return;
            }
            let place = how.turns % how.servers.len();
            how.turns += 1;
            how.next = now + if how.turns < how.servers.len() { STAGGER } else { AGAIN };
            let (Some(server), message) = (how.servers.get(place).copied(), how.sent.clone()) else { return };
            let asks: Vec<AskId> = self.asks_of(number).collect();
            if let (Some(oldest), MAX_ASKS..) = (asks.first(), asks.len()) {
                self.stop(*oldest, actions);
            }
            if self.free(Kind::of(server, false), actions, counts) {
                return self.ask(number, server, false, message, actions);
            }
            self.failed(number, now);
        }
    }

    /// Of a question's askings one came to nothing: the next server's turn comes at once, but everyone's
    /// second turn only in its time.
    fn failed(&mut self, number: u64, now: Instant) {
        if let Some(Exchange { how: How::Forwarded(how), .. }) = self.exchanges.get_mut(&number)
            && how.turns < how.servers.len()
        {
            how.next = now;
        }
    }

    /// The time is over, or everybody has refused.
    fn give_up(&mut self, number: u64, now: Instant, actions: &mut VecDeque<Action>, counts: &mut Counts) {
        for ask in self.asks_of(number).collect::<Vec<_>>() {
            if let Some(server) = self.asks.get(&ask).map(|ask| ask.server) {
                self.doubt(server, now);
            }
        }
        let Some(exchange) = self.end(number, actions) else { return };
        let How::Forwarded(how) = exchange.how else { return };
        match how.fallback {
            Some(mut answer) => {
                wire::readdress(&mut answer, &exchange.query, how.question.end);
                reply(exchange.client, &how.question, answer, actions);
            }
            None => {
                counts.add(Count::Timeout);
                fail(exchange.client, &exchange.query, Some(&how.question), actions);
            }
        }
    }

    fn doubt(&mut self, server: SocketAddr, now: Instant) {
        if self.doubts.len() >= MAX_DOUBTS {
            self.doubts.retain(|_, until| *until > now);
        }
        if self.doubts.len() < MAX_DOUBTS {
            self.doubts.insert(server, now + DOUBT);
        }
    }

    pub(super) fn handle_answer(
        &mut self,
        id: AskId,
        answer: Result<&[u8], Failure>,
        now: Instant,
        actions: &mut VecDeque<Action>,
        counts: &mut Counts,
    ) {
        let Some(ask) = self.asks.get(&id).copied() else { return };
        let Some(exchange) = self.exchanges.get_mut(&ask.exchange) else { return };
        match (&mut exchange.how, answer) {
            (How::PassedOn { .. }, Err(Failure)) => {
                self.end(ask.exchange, actions);
            }
            (How::PassedOn { end, many }, Ok(answer)) => {
                let right = match *end {
                    Some(end) => wire::belongs(answer, &exchange.query, end),
                    None => answer.get(..2) == exchange.query.get(..2),
                };
                // The later messages of a transfer may leave the question out.
                let many = *many;
                let continues = many && answer.get(..2) == exchange.query.get(..2);
                if !(right || continues) {
                    return counts.add(Count::WrongAnswer);
                }
                if many {
                    exchange.deadline = now + PASSED_ON_PATIENCE;
                }
                actions.push_back(Action::Reply { to: exchange.client, message: answer.to_vec() });
                if !many {
                    self.end(ask.exchange, actions);
                }
            }
            (How::Forwarded(_), Err(Failure)) => {
                self.doubt(ask.server, now);
                self.unanswered(id, ask.exchange, now, actions, counts);
            }
            (How::Forwarded(how), Ok(answer)) => {
                if !wire::belongs(answer, &how.sent, how.question.end) {
                    return counts.add(Count::WrongAnswer);
                }
                if wire::is_truncated(answer) && !ask.kind.stream {
                    let message = how.sent.clone();
                    how.fallback.get_or_insert_with(|| answer.to_vec());
                    // Whoever answered is there: the others are not asked until this has failed too.
                    how.next = now + AGAIN;
                    self.stop(id, actions);
                    if self.free(Kind::of(ask.server, true), actions, counts) {
                        return self.ask(ask.exchange, ask.server, true, message, actions);
                    }
                    return self.give_up(ask.exchange, now, actions, counts);
                }
                if !matches!(wire::response_code(answer), code::OK | code::NX_DOMAIN) {
                    how.fallback = Some(answer.to_vec());
                    return self.unanswered(id, ask.exchange, now, actions, counts);
                }
                self.finish(id, ask, answer.to_vec(), now, actions);
            }
        }
    }

    /// An asking brought nothing that helps.
    fn unanswered(
        &mut self,
        id: AskId,
        number: u64,
        now: Instant,
        actions: &mut VecDeque<Action>,
        counts: &mut Counts,
    ) {
        self.stop(id, actions);
        self.failed(number, now);
        let Some(Exchange { how: How::Forwarded(how), .. }) = self.exchanges.get(&number) else { return };
        let everybody = how.turns >= how.servers.len();
        if everybody && self.asks_of(number).next().is_none() {
            // Nobody is left who could answer; the asker may try again.
            return self.give_up(number, now, actions, counts);
        }
        self.advance(number, now, actions, counts);
    }

    fn finish(&mut self, id: AskId, ask: Ask, answer: Vec<u8>, now: Instant, actions: &mut VecDeque<Action>) {
        self.doubts.remove(&ask.server);
        for other in self.asks_of(ask.exchange).collect::<Vec<_>>() {
            // Asked before, and still silent.
            if other < id
                && let Some(server) = self.asks.get(&other).map(|other| other.server)
                && server != ask.server
            {
                self.doubt(server, now);
            }
        }
        let Some(exchange) = self.end(ask.exchange, actions) else { return };
        let How::Forwarded(how) = exchange.how else { return };
        let mut answer = answer;
        wire::readdress(&mut answer, &exchange.query, how.question.end);
        self.cache.put(&exchange.query, &how.question, &answer, now);
        reply(exchange.client, &how.question, answer, actions);
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        let due = |exchange: &Exchange| match &exchange.how {
            How::Forwarded(how) => exchange.deadline.min(how.next),
            How::PassedOn { .. } => exchange.deadline,
        };
        self.exchanges.values().map(due).min()
    }

    pub(super) fn handle_timeout(
        &mut self,
        now: Instant,
        actions: &mut VecDeque<Action>,
        counts: &mut Counts,
    ) {
        let numbers: Vec<u64> = self.exchanges.keys().copied().collect();
        for number in numbers {
            match self.exchanges.get(&number) {
                Some(Exchange { how: How::PassedOn { .. }, deadline, .. }) if *deadline <= now => {
                    self.end(number, actions);
                }
                Some(Exchange { how: How::Forwarded(_), .. }) => self.advance(number, now, actions, counts),
                Some(_) | None => {}
            }
        }
    }
}

/// Sends an answer, cut to what its asker can take.
fn reply(to: Client, question: &Question, mut answer: Vec<u8>, actions: &mut VecDeque<Action>) {
    if to.stream.is_none() && answer.len() > question.limit() {
        wire::truncate(&mut answer, question);
    }
    actions.push_back(Action::Reply { to, message: answer });
}

fn fail(to: Client, query: &[u8], question: Option<&Question>, actions: &mut VecDeque<Action>) {
    let mut message = Vec::new();
    wire::fail(query, question, code::SERV_FAIL, &mut message);
    actions.push_back(Action::Reply { to, message });
}
