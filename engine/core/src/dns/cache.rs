//! Answers from elsewhere, kept for as long as they say, within fixed bounds.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::wire::{self, HEADER, Question};

const MAX_ENTRIES: usize = 256;
const MAX_BYTES: usize = 128 << 10;
/// Longer answers are asked for again: a few of them would push out all the others.
const MAX_ANSWER: usize = 4096;
const MAX_AGE: Duration = Duration::from_secs(3600);
const MAX_NEGATIVE_AGE: Duration = Duration::from_secs(300);

/// Everything of a question that may change its answer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    question: Box<[u8]>,
    flags: u8,
    /// Whether it has EDNS, and with it DNSSEC records.
    edns: Option<bool>,
}

impl Key {
    fn of(query: &[u8], question: &Question) -> Self {
        let wire = query.get(HEADER..question.end).unwrap_or_default();
        Self {
            question: wire.to_ascii_lowercase().into(),
            flags: question.flags,
            edns: question.edns.map(|edns| edns.dnssec_ok),
        }
    }
}

#[derive(Debug)]
struct Entry {
    answer: Box<[u8]>,
    ttls: Box<[u16]>,
    since: Instant,
    until: Instant,
    /// Tells it from an older entry of the same key in `order`.
    number: u64,
}

#[derive(Debug, Default)]
pub(super) struct Cache {
    entries: HashMap<Key, Entry>,
    /// Oldest first; those that were replaced are still in it.
    order: VecDeque<(Key, u64)>,
    bytes: usize,
    numbers: u64,
}

impl Cache {
    /// The kept answer to `query`, made out to it.
    pub(super) fn get(&mut self, query: &[u8], question: &Question, now: Instant) -> Option<Vec<u8>> {
        let entry = self.entries.get(&Key::of(query, question)).filter(|entry| entry.until > now)?;
        let mut answer = entry.answer.to_vec();
        let age = now.saturating_duration_since(entry.since).as_secs();
        wire::age(&mut answer, &entry.ttls, u32::try_from(age).unwrap_or(u32::MAX));
        wire::readdress(&mut answer, query, question.end);
        Some(answer)
    }

    /// Keeps a whole answer to `query`, if it may be kept.
    pub(super) fn put(&mut self, query: &[u8], question: &Question, answer: &[u8], now: Instant) {
        let code = wire::response_code(answer);
        if answer.len() > MAX_ANSWER || !matches!(code, wire::code::OK | wire::code::NX_DOMAIN) {
            return;
        }
        let Some(life) = wire::lifetime(answer) else { return };
        let negative = code == wire::code::NX_DOMAIN || answer.get(6..8) == Some(&[0, 0]);
        let most = if negative { MAX_NEGATIVE_AGE } else { MAX_AGE };
        let age = Duration::from_secs(life.seconds.into()).min(most);
        if age.is_zero() {
            return;
        }
        let key = Key::of(query, question);
        self.numbers += 1;
        let entry = Entry {
            answer: answer.into(),
            ttls: life.ttls.into(),
            since: now,
            until: now + age,
            number: self.numbers,
        };
        self.order.push_back((key.clone(), entry.number));
        self.bytes += size(&key, &entry);
        if let Some(former) = self.entries.insert(key.clone(), entry) {
            self.bytes -= size(&key, &former);
        }
        while self.entries.len() > MAX_ENTRIES || self.bytes > MAX_BYTES || self.order.len() > 2 * MAX_ENTRIES
        {
            let Some((key, number)) = self.order.pop_front() else { break };
            if self.entries.get(&key).is_some_and(|entry| entry.number == number)
                && let Some(entry) = self.entries.remove(&key)
            {
                self.bytes -= size(&key, &entry);
            }
        }
    }

    pub(super) fn clear(&mut self) {
        *self = Self { numbers: self.numbers, ..Self::default() };
    }
}

/// What an entry costs, about.
fn size(key: &Key, entry: &Entry) -> usize {
    2 * key.question.len() + entry.answer.len() + 2 * entry.ttls.len() + 160
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
    use hickory_proto::rr::rdata::{A, SOA};
    use hickory_proto::rr::{Name, RData, Record, RecordType};

    use super::*;

    fn query(name: &str) -> Vec<u8> {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
        message.to_vec().unwrap()
    }

    fn answer(name: &str, ttls: &[u32]) -> Vec<u8> {
        let mut message = Message::response(9, OpCode::Query);
        let name: Name = name.parse().unwrap();
        message.add_query(Query::query(name.clone(), RecordType::A));
        for ttl in ttls {
            message.add_answer(Record::from_rdata(name.clone(), *ttl, RData::A(A::new(192, 0, 2, 1))));
        }
        message.to_vec().unwrap()
    }

    fn absence(name: &str, ttl: u32, minimum: u32) -> Vec<u8> {
        let mut message = Message::response(9, OpCode::Query);
        let name: Name = name.parse().unwrap();
        message.add_query(Query::query(name.clone(), RecordType::A));
        message.metadata.response_code = ResponseCode::NXDomain;
        let soa = SOA::new(name.clone(), name.clone(), 1, 2, 3, 4, minimum);
        message.authorities.push(Record::from_rdata(name, ttl, RData::SOA(soa)));
        message.to_vec().unwrap()
    }

    #[test]
    fn answers_age_and_end_with_their_shortest_time_to_live() {
        let mut cache = Cache::default();
        let now = Instant::now();
        let asked = query("a.example.");
        let question = Question::parse(&asked).unwrap();
        assert_eq!(cache.get(&asked, &question, now), None);
        cache.put(&asked, &question, &answer("a.example.", &[30, 90]), now);
        let again = query("A.eXample.");
        let question = Question::parse(&again).unwrap();
        let kept = cache.get(&again, &question, now + Duration::from_millis(10_900)).unwrap();
        let kept = Message::from_vec(&kept).unwrap();
        assert_eq!((kept.metadata.id, kept.queries[0].name.to_ascii()), (7, "A.eXample.".into()));
        assert_eq!(kept.answers.iter().map(|r| r.ttl).collect::<Vec<_>>(), [20, 80]);
        assert_eq!(cache.get(&again, &question, now + Duration::from_secs(30)), None);
        let flags = Question { flags: 0x10, ..question.clone() };
        assert_eq!(cache.get(&again, &flags, now), None, "another kind of question");
        cache.clear();
        assert_eq!(cache.get(&again, &question, now), None);
    }

    #[test]
    fn what_may_be_kept() {
        let table = [
            (answer("b.example.", &[0]), 0),
            (answer("b.example.", &[u32::MAX]), 0),
            (answer("b.example.", &[1_000_000]), 3600),
            (answer("b.example.", &[]), 0),
            (absence("b.example.", 60, 20), 20),
            (absence("b.example.", 20, 60), 20),
            (absence("b.example.", 9999, 9999), 300),
        ];
        for (answer, seconds) in table {
            let mut cache = Cache::default();
            let now = Instant::now();
            let asked = query("b.example.");
            let question = Question::parse(&asked).unwrap();
            cache.put(&asked, &question, &answer, now);
            let kept = |s: u64| cache.entries.values().any(|e| e.until > now + Duration::from_secs(s));
            assert!(!kept(seconds), "{seconds}");
            assert!(seconds == 0 || kept(seconds - 1), "{seconds}");
            for cut in 0..answer.len() {
                cache.put(&asked, &question, &answer[..cut], now);
            }
        }
    }

    #[test]
    fn entries_and_bytes_are_bounded() {
        let mut cache = Cache::default();
        let now = Instant::now();
        for n in 0..3000_u32 {
            let name = format!("host{}.example.", n % 700);
            let asked = query(&name);
            let long = vec![60; if n.is_multiple_of(3) { 200 } else { 1 }];
            cache.put(&asked, &Question::parse(&asked).unwrap(), &answer(&name, &long), now);
            assert!(cache.entries.len() <= MAX_ENTRIES && cache.bytes <= MAX_BYTES);
            assert!(cache.order.len() <= 2 * MAX_ENTRIES);
        }
        let real: usize = cache.entries.iter().map(|(key, entry)| size(key, entry)).sum();
        assert_eq!(cache.bytes, real);
        let last = query("host199.example.");
        assert!(cache.get(&last, &Question::parse(&last).unwrap(), now).is_some(), "the newest stays");
    }
}
