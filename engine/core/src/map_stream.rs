//! Decodes a map stream while it arrives.
//!
//! The stream is messages, each a u32 little-endian length and that many bytes of JSON. A full map of ten
//! thousand peers is ten megabytes of it. So the elements of `Peers` and `PeersChanged` are decoded and
//! handed on one portion at a time as they come in, and only what is left of the message is gathered
//! until its end. The rules of `PacketFilter` and `PacketFilters` are taken one by one as well: a rule that
//! is in use already is found by its bytes and not decoded, even over sessions. What is odd is skipped and counted; a message that is no JSON object, or is too large
//! without its peers, is passed over, because its length says where the next one begins.

use crate::filter::{MAX_CHUNKS, MAX_FILTER_BYTES, Rule, RuleBook};
use crate::peer::PeerList;
use crate::tailcfg::{MapResponse, Node, counting};

/// Largest message taken, bytes. A netmap of ten thousand peers is a tenth of it.
pub const MAX_MESSAGE_BYTES: usize = 128 << 20;
/// Largest part of a message beside its peers and rules, bytes.
const MAX_REST_BYTES: usize = 16 << 20;
/// Largest description of one peer, bytes; a larger one is skipped.
const MAX_PEER_BYTES: usize = 256 << 10;
/// Largest rule, bytes: a hundred thousand peers by their addresses; a larger one is skipped.
const MAX_RULE_BYTES: usize = 4 << 20;
/// Peers handed on at a time: some tenths of a millisecond to decode and to take in.
const PORTION: usize = 32;
/// JSON of so many bytes is a portion as well.
const PORTION_BYTES: usize = 64 << 10;
/// Rules of so many bytes are decoded in one go: some tenths of a millisecond, unless one is larger.
const RULES_PORTION_BYTES: usize = 32 << 10;
/// Longest name of a field or chunk of the filter that is told apart.
const MAX_KEY: usize = 256;
/// What idle buffers keep allocated, bytes.
const KEEP_BYTES: usize = 16 << 10;

/// The server announced a message over [`MAX_MESSAGE_BYTES`]: it or we have lost the beginning of
/// messages, and the stream cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("map message of {0} bytes is over the limit")]
pub struct TooLarge(pub usize);

/// Why a message cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum BadMessage {
    /// It is too large even without its peers.
    #[error("it is over {MAX_REST_BYTES} bytes without its peers")]
    TooLarge,
    /// It is not a JSON object.
    #[error("it is not JSON: {0}")]
    Json(#[from] serde_json::Error),
}

/// A part of a message. All of its peers come before its end.
#[derive(Debug)]
pub enum Piece {
    /// Some peers of one of its lists.
    Peers(PeerList, Vec<Node>),
    /// Nothing yet: some rules were decoded, and whatever else there is to do can have its turn.
    Pause,
    /// Everything else, which ends the message, and how many elements of all of it were passed over.
    Rest(Box<MapResponse>, u64),
    /// The end of a message that is none. Some of its peers may have been handed on.
    Bad(BadMessage),
}

/// A list whose elements are taken one by one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum List {
    Peers(PeerList),
    Rules,
}

/// Something that is to be handed on.
enum Ready {
    Peers(PeerList),
    Pause,
}

/// Where in a message the scanner is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// Anywhere but in one of the lists.
    Rest,
    /// Between the elements of a list.
    List(List),
    /// In an element of it.
    Element(List),
    /// In a list that nobody needs.
    Unneeded,
    /// Behind what made the message too large.
    TooLarge,
}

/// Incremental decoder: `push` what arrived, then take pieces with `next_piece` until there is none.
///
/// INVARIANT: nothing is set aside for a length that was merely announced; memory grows with what arrived,
/// and by no more than one portion of peers and the rest of one message.
#[derive(Debug)]
pub struct MapStream {
    input: Vec<u8>,
    start: usize,
    prefix: Vec<u8>,
    /// Bytes of the message still to come; none between messages.
    left: Option<usize>,
    at: At,
    depth: u32,
    in_string: bool,
    escaped: bool,
    /// The last string directly in the message's object or that of the filter's chunks, as far as it may be
    /// a list's name.
    key: Vec<u8>,
    /// It was followed by a colon, and the value has not begun.
    key_stands: bool,
    /// In the object of the filter's chunks.
    in_chunks: bool,
    /// The nesting of the list's elements.
    list_depth: u32,
    rest: Vec<u8>,
    element: Vec<u8>,
    element_too_large: bool,
    nodes: Vec<Node>,
    /// Bytes of JSON that `nodes` were.
    nodes_bytes: usize,
    book: RuleBook,
    /// The chunk that the list is; none for the filter in its older form.
    chunk: Option<String>,
    rules: Vec<Rule>,
    /// Bytes of JSON since the last pause.
    rules_bytes: usize,
    /// What this message's rules take.
    rules_footprint: usize,
    /// This message's lists of rules that are whole.
    lists: Vec<(Option<String>, Vec<Rule>)>,
    skipped: u64,
}

impl Default for MapStream {
    fn default() -> Self {
        Self::new()
    }
}

impl MapStream {
    /// An empty decoder.
    #[must_use]
    pub fn new() -> Self {
        Self {
            input: Vec::new(),
            start: 0,
            prefix: Vec::new(),
            left: None,
            at: At::Rest,
            depth: 0,
            in_string: false,
            escaped: false,
            key: Vec::new(),
            key_stands: false,
            in_chunks: false,
            list_depth: 2,
            rest: Vec::new(),
            element: Vec::new(),
            element_too_large: false,
            nodes: Vec::new(),
            nodes_bytes: 0,
            book: RuleBook::default(),
            chunk: None,
            rules: Vec::new(),
            rules_bytes: 0,
            rules_footprint: 0,
            lists: Vec::new(),
            skipped: 0,
        }
    }

    /// Makes ready for another stream, whose rules may be those of the one before.
    pub fn restart(&mut self) {
        *self = Self { book: std::mem::take(&mut self.book), ..Self::new() };
    }

    /// How many rules had to be decoded so far.
    #[must_use]
    pub fn rules_decoded(&self) -> u64 {
        self.book.decoded()
    }

    /// Adds bytes of the response body.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start == self.input.len() {
            self.input.clear();
            self.input.shrink_to(KEEP_BYTES);
        } else {
            self.input.drain(..self.start);
        }
        self.start = 0;
        self.input.extend_from_slice(bytes);
    }

    /// The next piece, if enough of it has arrived.
    ///
    /// # Errors
    /// When the stream cannot go on.
    pub fn next_piece(&mut self) -> Result<Option<Piece>, TooLarge> {
        let input = std::mem::take(&mut self.input);
        let piece = self.scan(&input);
        self.input = input;
        piece
    }

    fn scan(&mut self, input: &[u8]) -> Result<Option<Piece>, TooLarge> {
        loop {
            let Some(left) = self.left else {
                let Some(byte) = input.get(self.start) else { return Ok(None) };
                self.start += 1;
                self.prefix.push(*byte);
                if let Some(prefix) = self.prefix.first_chunk::<4>() {
                    let length = usize::try_from(u32::from_le_bytes(*prefix)).unwrap_or(usize::MAX);
                    if length > MAX_MESSAGE_BYTES {
                        return Err(TooLarge(length));
                    }
                    self.prefix.clear();
                    self.left = Some(length);
                }
                continue;
            };
            if left == 0 {
                return Ok(Some(self.end_message()));
            }
            let here = &input[self.start..input.len().min(self.start + left)];
            if here.is_empty() {
                return Ok(None);
            }
            let (used, ready) = self.take(here);
            self.start += used;
            self.left = Some(left - used);
            match ready {
                None => {}
                Some(Ready::Pause) => {
                    self.rules_bytes = 0;
                    return Ok(Some(Piece::Pause));
                }
                Some(Ready::Peers(list)) => {
                    self.nodes_bytes = 0;
                    return Ok(Some(Piece::Peers(list, std::mem::take(&mut self.nodes))));
                }
            }
        }
    }

    /// How deep the names are that matter.
    fn key_depth(&self) -> u32 {
        if self.in_chunks { 2 } else { 1 }
    }

    /// Takes some of what is here, which is not empty: how much, and what is ready.
    fn take(&mut self, here: &[u8]) -> (usize, Option<Ready>) {
        let plain = match self.at {
            At::TooLarge => here.len(),
            At::List(_) => 0,
            At::Rest | At::Element(_) | At::Unneeded if self.escaped => 0,
            At::Rest | At::Element(_) | At::Unneeded => {
                let special = if self.in_string {
                    here.iter().position(|byte| matches!(byte, b'"' | b'\\'))
                } else {
                    here.iter()
                        .position(|byte| matches!(byte, b'"' | b'{' | b'}' | b'[' | b']' | b',' | b':'))
                };
                special.unwrap_or(here.len())
            }
        };
        if plain == 0 {
            return (1, here.first().and_then(|byte| self.byte(*byte)));
        }
        let here = &here[..plain];
        self.keep(here);
        if self.at == At::Rest && self.depth == self.key_depth() {
            if self.in_string {
                let room = MAX_KEY - self.key.len().min(MAX_KEY);
                self.key.extend_from_slice(&here[..room.min(plain)]);
            } else if here.iter().any(|byte| !byte.is_ascii_whitespace()) {
                self.key_stands = false;
            }
        }
        (plain, None)
    }

    /// Sets bytes aside for the decoder of what they are part of.
    fn keep(&mut self, bytes: &[u8]) {
        match self.at {
            At::Rest if self.rest.len() + bytes.len() > MAX_REST_BYTES => self.at = At::TooLarge,
            At::Rest => self.rest.extend_from_slice(bytes),
            At::Element(list) if self.element.len() + bytes.len() > list.max_bytes() => {
                self.element_too_large = true;
            }
            At::Element(_) => self.element.extend_from_slice(bytes),
            At::List(_) | At::Unneeded | At::TooLarge => {}
        }
    }

    /// Takes one byte that may matter; what is ready, if so.
    fn byte(&mut self, byte: u8) -> Option<Ready> {
        match self.at {
            At::Rest => {
                self.keep(&[byte]);
                self.rest_byte(byte);
                None
            }
            At::List(list) => {
                match byte {
                    b' ' | b'\t' | b'\r' | b'\n' | b',' => {}
                    b']' => return self.end_list(list),
                    _ => {
                        self.at = At::Element(list);
                        self.keep(&[byte]);
                        self.step(byte);
                    }
                }
                None
            }
            At::Element(list)
                if !self.in_string && self.depth == self.list_depth && matches!(byte, b',' | b']') =>
            {
                self.end_element(list);
                self.at = At::List(list);
                if byte == b']' {
                    return self.end_list(list);
                }
                let ready = match list {
                    List::Peers(_) => self.nodes.len() >= PORTION || self.nodes_bytes >= PORTION_BYTES,
                    List::Rules => self.rules_bytes >= RULES_PORTION_BYTES,
                };
                ready.then(|| list.ready())
            }
            At::Element(_) => {
                self.keep(&[byte]);
                self.step(byte);
                None
            }
            At::Unneeded => {
                self.step(byte);
                if self.depth == 1 {
                    self.at = At::Rest;
                    self.keep(b"]");
                }
                None
            }
            At::TooLarge => None,
        }
    }

    fn rest_byte(&mut self, byte: u8) {
        let at_top = self.depth == self.key_depth();
        if self.in_string {
            if at_top && self.key.len() < MAX_KEY && (byte != b'"' || self.escaped) {
                self.key.push(byte);
            }
        } else if at_top {
            match byte {
                // A text for a value is no name.
                b'"' => {
                    self.key.clear();
                    self.key_stands = false;
                }
                b':' => self.key_stands = true,
                b'[' if self.key_stands && self.at == At::Rest => {
                    self.key_stands = false;
                    if let Some(at) = self.list() {
                        // For the rest, the list is empty.
                        self.at = at;
                        self.list_depth = self.depth + 1;
                    }
                }
                b'{' if self.key_stands && !self.in_chunks && self.key == b"PacketFilters" => {
                    self.in_chunks = true;
                    self.key_stands = false;
                }
                _ => self.key_stands = false,
            }
        }
        self.step(byte);
        if self.depth < 2 {
            self.in_chunks = false;
        }
    }

    /// What the name that stands says of the list that begins.
    fn list(&mut self) -> Option<At> {
        if self.in_chunks {
            if self.key.len() == MAX_KEY || self.lists.len() >= MAX_CHUNKS {
                return None;
            }
            let name = [b"\"", self.key.as_slice(), b"\""].concat();
            self.chunk = Some(serde_json::from_slice(&name).ok()?);
            return Some(At::List(List::Rules));
        }
        match self.key.as_slice() {
            b"Peers" => Some(At::List(List::Peers(PeerList::All))),
            b"PeersChanged" => Some(At::List(List::Peers(PeerList::Changed))),
            b"PacketFilter" => {
                self.chunk = None;
                Some(At::List(List::Rules))
            }
            b"UserProfiles" => Some(At::Unneeded),
            _ => None,
        }
    }

    /// Keeps track of strings and nesting.
    fn step(&mut self, byte: u8) {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
        } else {
            match byte {
                b'"' => self.in_string = true,
                b'{' | b'[' => self.depth = self.depth.saturating_add(1),
                b'}' | b']' => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
        }
    }

    fn end_element(&mut self, list: List) {
        if self.element_too_large {
            self.skipped += 1;
        } else if list == List::Rules {
            self.end_rule();
        } else {
            self.nodes_bytes += self.element.len();
            match counting(|| serde_json::from_slice(&self.element)) {
                (Ok(node), skipped) => {
                    self.nodes.push(node);
                    self.skipped += skipped;
                }
                (Err(_), _) => self.skipped += 1,
            }
        }
        self.element.clear();
        self.element_too_large = false;
    }

    /// Rules over the bound open nothing.
    fn end_rule(&mut self) {
        self.rules_bytes += self.element.len();
        if self.rules_footprint > MAX_FILTER_BYTES {
            self.skipped += 1;
            return;
        }
        match counting(|| self.book.rule(self.element.trim_ascii_end())) {
            (Ok(rule), skipped) => {
                self.rules_footprint += rule.footprint();
                self.rules.push(rule);
                self.skipped += skipped;
            }
            (Err(_), _) => self.skipped += 1,
        }
    }

    /// The closing bracket.
    fn end_list(&mut self, list: List) -> Option<Ready> {
        self.at = At::Rest;
        self.depth = self.list_depth - 1;
        self.keep(b"]");
        match list {
            List::Peers(list) => (!self.nodes.is_empty()).then_some(Ready::Peers(list)),
            List::Rules => {
                self.lists.push((self.chunk.take(), std::mem::take(&mut self.rules)));
                (self.rules_bytes >= RULES_PORTION_BYTES).then_some(Ready::Pause)
            }
        }
    }

    fn end_message(&mut self) -> Piece {
        let piece = if self.at == At::TooLarge {
            Piece::Bad(BadMessage::TooLarge)
        } else {
            match MapResponse::from_json(&self.rest) {
                Ok((mut message, skipped)) => {
                    put_rules(&mut message, std::mem::take(&mut self.lists));
                    Piece::Rest(Box::new(message), skipped + self.skipped)
                }
                Err(error) => Piece::Bad(error.into()),
            }
        };
        self.left = None;
        self.at = At::Rest;
        self.depth = 0;
        self.in_string = false;
        self.escaped = false;
        self.key.clear();
        self.key_stands = false;
        self.rest.clear();
        self.rest.shrink_to(KEEP_BYTES);
        self.element.clear();
        self.element.shrink_to(KEEP_BYTES);
        self.element_too_large = false;
        self.nodes = Vec::new();
        self.nodes_bytes = 0;
        self.in_chunks = false;
        if self.rules_footprint > 0 {
            self.book.sweep();
        }
        self.chunk = None;
        self.rules = Vec::new();
        self.rules_bytes = 0;
        self.rules_footprint = 0;
        self.lists = Vec::new();
        self.skipped = 0;
        piece
    }
}

impl List {
    fn max_bytes(self) -> usize {
        match self {
            Self::Peers(_) => MAX_PEER_BYTES,
            Self::Rules => MAX_RULE_BYTES,
        }
    }

    fn ready(self) -> Ready {
        match self {
            Self::Peers(list) => Ready::Peers(list),
            Self::Rules => Ready::Pause,
        }
    }
}

/// Puts the rules where the message has empty lists; what it names several times is what it says last.
fn put_rules(message: &mut MapResponse, lists: Vec<(Option<String>, Vec<Rule>)>) {
    for (chunk, rules) in lists {
        let place = match chunk {
            None => message.packet_filter.as_mut(),
            Some(name) => message.packet_filters.as_mut().and_then(|chunks| chunks.get_mut(&name)?.as_mut()),
        };
        if let Some(place) = place {
            *place = rules;
        }
    }
}

/// Puts the prefix before `message`: what a server sends.
///
/// # Errors
/// When the message is over [`MAX_MESSAGE_BYTES`].
pub fn encode(message: &[u8], out: &mut Vec<u8>) -> Result<(), TooLarge> {
    let len = u32::try_from(message.len()).map_err(|_| TooLarge(message.len()))?;
    if message.len() > MAX_MESSAGE_BYTES {
        return Err(TooLarge(message.len()));
    }
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(message);
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn frame(json: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        encode(json, &mut out).unwrap();
        out
    }

    #[test]
    fn length_is_little_endian() {
        assert_eq!(frame(b"{}"), [2, 0, 0, 0, b'{', b'}']);
    }

    fn node(id: u64) -> Value {
        json!({"ID": id, "Key": format!("nodekey:{id:064x}"), "Name": "a]},{[\"\\", "Addresses": ["100.64.0.1/32"]})
    }

    /// The messages as they would have been decoded in one go, and what was skipped.
    fn gather(wire: &[u8], cut: usize) -> Vec<Result<(MapResponse, u64), BadMessage>> {
        let mut stream = MapStream::new();
        let (mut messages, mut peers, mut changed) = (Vec::new(), Vec::new(), Vec::new());
        for part in wire.chunks(cut) {
            stream.push(part);
            while let Some(piece) = stream.next_piece().unwrap() {
                match piece {
                    Piece::Peers(PeerList::All, nodes) => peers.extend(nodes),
                    Piece::Peers(PeerList::Changed, nodes) => changed.extend(nodes),
                    Piece::Pause => {}
                    Piece::Rest(mut message, skipped) => {
                        assert!(message.peers.is_empty() && message.peers_changed.is_empty());
                        message.peers = std::mem::take(&mut peers);
                        message.peers_changed = std::mem::take(&mut changed);
                        messages.push(Ok((*message, skipped)));
                    }
                    Piece::Bad(bad) => {
                        peers.clear();
                        changed.clear();
                        messages.push(Err(bad));
                    }
                }
            }
        }
        messages
    }

    fn one(json: &Value) -> (MapResponse, u64) {
        gather(&frame(json.to_string().as_bytes()), 7).pop().unwrap().unwrap()
    }

    #[test]
    fn peers_come_in_portions_before_the_rest() {
        let nodes: Vec<Value> = (1..=100).map(node).collect();
        let json = json!({"Domain": "d", "Peers": nodes, "Node": node(1), "Health": ["x"]});
        let mut stream = MapStream::new();
        stream.push(&frame(json.to_string().as_bytes()));
        let mut sizes = Vec::new();
        while let Some(Piece::Peers(list, nodes)) = stream.next_piece().unwrap() {
            assert_eq!(list, PeerList::All);
            sizes.push(nodes.len());
        }
        assert_eq!(sizes, [32, 32, 32, 4]);
    }

    #[test]
    fn memory_stays_bounded_while_a_large_map_comes_in() {
        let element = format!("{},", node(7));
        let mut stream = MapStream::new();
        let total = 20_000 * element.len();
        stream.push(&u32::try_from(total + 100).unwrap().to_le_bytes());
        stream.push(b"{\"Peers\":[");
        let mut seen = 0;
        for _ in 0..20_000 {
            stream.push(element.as_bytes());
            while let Some(Piece::Peers(_, nodes)) = stream.next_piece().unwrap() {
                seen += nodes.len();
            }
            assert!(stream.input.capacity() + stream.rest.capacity() + stream.element.capacity() < 64 << 10);
        }
        assert!(seen > 19_900);
    }

    #[test]
    fn odd_elements_are_skipped_and_counted() {
        let (message, skipped) =
            one(&json!({"Peers": [node(1), 5, null, "x]", {"ID": 2}, [[]], {}, node(3)]}));
        assert_eq!((message.peers.len(), skipped), (2, 6));
        // Even where JSON itself is broken, as long as its brackets are right.
        let wire = frame(br#"{"PeersChanged": [{"ID": }, nonsense], "Domain": "d"}"#);
        let (message, skipped) = gather(&wire, 1).pop().unwrap().unwrap();
        assert_eq!((message.domain.as_str(), skipped), ("d", 2));
    }

    #[test]
    fn a_peer_that_is_too_large_is_skipped() {
        let large =
            json!({"ID": 9, "Key": format!("nodekey:{:064x}", 9), "Name": "x".repeat(MAX_PEER_BYTES)});
        let (message, skipped) = one(&json!({"Peers": [large, node(1)]}));
        assert_eq!((message.peers.len(), skipped), (1, 1));
    }

    #[test]
    fn only_the_messages_own_lists_are_taken_apart() {
        let odd =
            json!({"A": {"Peers": [1]}, "B": ["Peers", [2]], "Peers": {"Peers": [3]}, "Domain": "Peers"});
        let (message, skipped) = one(&odd);
        assert_eq!((message.domain.as_str(), message.peers.len(), skipped), ("Peers", 0, 1));
    }

    fn rule(n: u64) -> Value {
        let ports = json!({"First": n, "Last": n});
        json!({"DstPorts": [{"IP": "*", "Ports": ports}], "SrcIPs": ["a]},{[\"\\", "100.64.0.1"]})
    }

    #[test]
    fn rules_are_taken_one_by_one_and_those_in_use_are_not_decoded_again() {
        let odd = json!({"SrcIPs": [1]});
        let chunks = json!({"a": [rule(1), odd, rule(2)], "b\"\\": [rule(3)], "c": null, "d": [], "e": 5});
        let json = json!({"PacketFilters": chunks, "PacketFilter": [rule(1)]});
        let (message, skipped) = one(&json);
        assert_eq!((serde_json::from_value(json.clone()).ok(), skipped), (Some(message), 2));
        let mut stream = MapStream::new();
        let mut messages = Vec::new();
        for _ in 0..3 {
            stream.push(&frame(json.to_string().as_bytes()));
            let Ok(Some(Piece::Rest(message, 2))) = stream.next_piece() else { panic!("no message") };
            messages.push(message);
            stream.restart();
        }
        // The odd one is tried each time.
        assert_eq!(stream.rules_decoded(), 3 + 3);
        assert_eq!(messages[0], messages[2]);
    }

    #[test]
    fn of_a_chunk_that_is_named_twice_the_last_counts() {
        for (json, rules) in [
            (r#"{"PacketFilters":{"a":[{}],"\u0061":[{},{}]}}"#, Some(2)),
            (r#"{"PacketFilters":{"a":[{}],"a":null}}"#, None),
            (r#"{"PacketFilters":{"a":null,"a" : [ {} ] }}"#, Some(1)),
            (r#"{"PacketFilters":{"b":{"a":[{}]},"a":[{},{},{}]}, "a":[{}]}"#, Some(3)),
        ] {
            let decoded: MapResponse = serde_json::from_str(json).unwrap();
            for cut in [1, 1000] {
                let got = gather(&frame(json.as_bytes()), cut).pop().unwrap().unwrap().0;
                assert_eq!(got, decoded, "{json}");
                assert_eq!(got.packet_filters.unwrap()["a"].as_ref().map(Vec::len), rules, "{json}");
            }
        }
    }

    #[test]
    fn many_rules_are_decoded_with_pauses_and_too_many_are_left_out() {
        let sources = vec!["100.64.0.1"; 1000];
        let large = json!({"SrcIPs": sources}).to_string();
        let mut stream = MapStream::new();
        let count = MAX_FILTER_BYTES / large.len() + 10;
        let list = vec![large.as_str(); count].join(",");
        stream.push(&frame(format!("{{\"PacketFilter\":[{list}]}}").as_bytes()));
        let mut pauses = 0;
        loop {
            match stream.next_piece().unwrap() {
                Some(Piece::Pause) => pauses += 1,
                Some(Piece::Rest(message, skipped)) => {
                    let kept = message.packet_filter.unwrap().len();
                    assert_eq!(kept + usize::try_from(skipped).unwrap(), count);
                    assert!((10..100).contains(&skipped), "{skipped} of {count}");
                    break;
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(pauses >= count * large.len() / (RULES_PORTION_BYTES + large.len()), "{pauses}");
        let huge = json!({"PacketFilter": [{"SrcIPs": ["x".repeat(MAX_RULE_BYTES)]}, {}]});
        let (message, skipped) = one(&huge);
        assert_eq!((message.packet_filter.unwrap().len(), skipped), (1, 1));
    }

    #[test]
    fn what_is_no_message_is_passed_over_and_the_next_one_taken() {
        let good = json!({"Peers": [node(1)], "Domain": "d"}).to_string();
        let cut_off = format!("{}", json!({"Peers": [node(5), node(6)]})).replace("]}", "");
        let bad = [
            "",
            "{",
            "{\"Peers\":[",
            "{\"Peers\":[{]",
            "{\"Peers\":[]",
            "{\"PacketFilter\":[",
            "{\"PacketFilters\":{\"a\":[{}",
            "{\"PacketFilters\":{\"a\":[{}]}",
            "{\"PacketFilters\":{\"a\":[}]}",
            "\"",
            "\"\\",
            "{}}",
            "[1]",
            &cut_off,
        ];
        for bad in bad {
            for cut in [1, 3, 1000] {
                let wire = [frame(bad.as_bytes()), frame(good.as_bytes())].concat();
                let got = gather(&wire, cut);
                assert!(matches!(&got[0], Err(BadMessage::Json(_))), "{bad}");
                let (message, skipped) = got[1].as_ref().unwrap();
                assert_eq!((message.peers.len(), message.domain.as_str(), *skipped), (1, "d", 0), "{bad}");
            }
        }
    }

    #[test]
    fn a_huge_announcement_is_refused_before_anything_is_set_aside() {
        let mut stream = MapStream::new();
        stream.push(&u32::MAX.to_le_bytes());
        assert!(matches!(stream.next_piece(), Err(TooLarge(_))));
        assert!(stream.rest.capacity() < 64);
    }

    #[test]
    fn a_message_that_is_too_large_without_its_peers_is_passed_over() {
        let mut wire = frame(json!({"Domain": "x".repeat(MAX_REST_BYTES)}).to_string().as_bytes());
        wire.extend(frame(b"{\"Domain\":\"d\"}"));
        let got = gather(&wire, 16 << 10);
        assert!(matches!(got[0], Err(BadMessage::TooLarge)));
        assert_eq!(got[1].as_ref().unwrap().0.domain, "d");
        // What nobody needs does not count.
        let profiles: Vec<Value> =
            (0..9).map(|n| json!({"ID": n, "LoginName": "x".repeat(2 << 20)})).collect();
        let wire = frame(json!({"Domain": "d", "UserProfiles": profiles}).to_string().as_bytes());
        assert_eq!(gather(&wire, 16 << 10)[0].as_ref().unwrap().0.domain, "d");
    }

    #[test]
    fn large_peers_make_small_portions() {
        let large =
            |id: u64| json!({"ID": id, "Key": format!("nodekey:{id:064x}"), "Name": "x".repeat(60_000)});
        let json = json!({"PeersChanged": (1..=6).map(large).collect::<Vec<_>>()});
        let mut stream = MapStream::new();
        stream.push(&frame(json.to_string().as_bytes()));
        let mut sizes = Vec::new();
        while let Some(Piece::Peers(_, nodes)) = stream.next_piece().unwrap() {
            sizes.push(nodes.len());
        }
        assert_eq!(sizes, [2, 2, 2]);
    }

    proptest! {
        #[test]
        fn fuzz_any_cut_gives_what_decoding_in_one_go_gives(
            messages in proptest::collection::vec(
                (
                    proptest::collection::vec(1_u64..9, 0..80),
                    proptest::collection::vec(1_u64..9, 0..3),
                    any::<String>(),
                    proptest::collection::btree_map(
                        any::<String>(),
                        proptest::option::of(proptest::collection::vec(1_u64..9, 0..5)),
                        0..4,
                    ),
                ),
                1..4,
            ),
            cut in 1_usize..97,
        ) {
            let (mut wire, mut expected) = (Vec::new(), Vec::new());
            for (peers, changed, domain, chunks) in messages {
                let nodes = |ids: Vec<u64>| ids.into_iter().map(node).collect::<Vec<_>>();
                let json = json!({"Peers": nodes(peers), "Domain": domain, "PeersChanged": nodes(changed),
                    "PacketFilters": chunks.iter().map(|(name, chunk)| {
                        let rules = |rules: &Vec<u64>| rules.iter().copied().map(rule).collect::<Vec<_>>();
                        (name.clone(), json!(chunk.as_ref().map(rules)))
                    }).collect::<serde_json::Map<_, _>>()}).to_string();
                wire.extend(frame(json.as_bytes()));
                expected.push((serde_json::from_str::<MapResponse>(&json).unwrap(), 0));
            }
            let got: Result<Vec<_>, _> = gather(&wire, cut).into_iter().collect();
            prop_assert_eq!(got.unwrap(), expected);
        }

        #[test]
        fn fuzz_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut in 1_usize..20) {
            let [peers, chunks] = [&b"{\"Peers\":["[..], b"{\"PacketFilters\":{\"a\":["]
                .map(|start| [start, &bytes].concat());
            let end = frame(b"{\"Domain\":\"d\"}");
            for bytes in [bytes, peers, chunks] {
                let got = gather(&[frame(&bytes), end.clone()].concat(), cut);
                prop_assert_eq!(got.len(), 2);
                prop_assert_eq!(&got[1].as_ref().unwrap().0.domain, "d");
            }
        }
    }
}
