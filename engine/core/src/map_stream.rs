//! Decodes a map stream while it arrives.
//!
//! The stream is messages, each a u32 little-endian length and that many bytes of JSON. A full map of ten
//! thousand peers is ten megabytes of it. So the elements of `Peers` and `PeersChanged` are decoded and
//! handed on one portion at a time as they come in, and only what is left of the message is gathered
//! until its end. What is odd is skipped and counted; only a message that is no JSON object, or one that
//! is too large without its peers, ends the stream.

use crate::peer::PeerList;
use crate::tailcfg::{MapResponse, Node, counting};

/// Largest message taken, bytes.
const MAX_MESSAGE_BYTES: usize = 128 << 20;
/// Largest part of a message beside its peers, bytes.
const MAX_REST_BYTES: usize = 16 << 20;
/// Largest description of one peer, bytes; a larger one is skipped.
const MAX_PEER_BYTES: usize = 256 << 10;
/// Peers handed on at a time: some tenths of a millisecond to decode and to take in.
const PORTION: usize = 32;
/// Longest name of a field that is told apart.
const MAX_KEY: usize = 16;
/// What idle buffers keep allocated, bytes.
const KEEP_BYTES: usize = 16 << 10;

/// Why a stream cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum MapStreamError {
    /// More than is taken.
    #[error("a map message of {0} bytes is over the limit")]
    TooLarge(usize),
    /// Not the JSON of a message.
    #[error("a map message that is not JSON: {0}")]
    Json(#[from] serde_json::Error),
}

/// A part of a message. All of its peers come before the rest.
#[derive(Debug)]
pub enum Piece {
    /// Some peers.
    Peers(PeerList, Vec<Node>),
    /// Everything else, which ends the message, and how much of all of it was passed over.
    Rest(Box<MapResponse>, u64),
}

/// Where in a message the scanner is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// Anywhere but in a list of peers.
    Rest,
    /// Between the elements of a list of peers.
    List(PeerList),
    /// In an element of it.
    Element(PeerList),
}

/// Incremental decoder: `push` what arrived, then take pieces with `next_piece` until there is none.
///
/// INVARIANT: nothing is set aside for a length that was merely announced; memory grows with what arrived,
/// and by no more than one peer and the rest of one message.
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
    /// The last string directly in the message's object, as far as it may be a list's name.
    key: Vec<u8>,
    /// It was followed by a colon, and the value has not begun.
    key_stands: bool,
    rest: Vec<u8>,
    element: Vec<u8>,
    element_too_large: bool,
    nodes: Vec<Node>,
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
            rest: Vec::new(),
            element: Vec::new(),
            element_too_large: false,
            nodes: Vec::new(),
            skipped: 0,
        }
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
    pub fn next_piece(&mut self) -> Result<Option<Piece>, MapStreamError> {
        let input = std::mem::take(&mut self.input);
        let piece = self.scan(&input);
        self.input = input;
        piece
    }

    fn scan(&mut self, input: &[u8]) -> Result<Option<Piece>, MapStreamError> {
        loop {
            let Some(left) = self.left else {
                let Some(byte) = input.get(self.start) else { return Ok(None) };
                self.start += 1;
                self.prefix.push(*byte);
                if let Some(prefix) = self.prefix.first_chunk::<4>() {
                    let length = usize::try_from(u32::from_le_bytes(*prefix)).unwrap_or(usize::MAX);
                    if length > MAX_MESSAGE_BYTES {
                        return Err(MapStreamError::TooLarge(length));
                    }
                    self.prefix.clear();
                    self.left = Some(length);
                }
                continue;
            };
            if left == 0 {
                return self.end_message().map(Some);
            }
            let Some(byte) = input.get(self.start) else { return Ok(None) };
            self.start += 1;
            self.left = Some(left - 1);
            if let Some(list) = self.byte(*byte)? {
                return Ok(Some(Piece::Peers(list, std::mem::take(&mut self.nodes))));
            }
        }
    }

    /// Takes one byte of JSON; the list of which a portion is ready, if so.
    fn byte(&mut self, byte: u8) -> Result<Option<PeerList>, MapStreamError> {
        match self.at {
            At::Rest => {
                if self.rest.len() >= MAX_REST_BYTES {
                    return Err(MapStreamError::TooLarge(self.rest.len()));
                }
                self.rest.push(byte);
                self.rest_byte(byte);
                Ok(None)
            }
            At::List(list) => {
                match byte {
                    b' ' | b'\t' | b'\r' | b'\n' | b',' => {}
                    b']' => return Ok(self.end_list(list)),
                    _ => {
                        self.at = At::Element(list);
                        self.element_byte(byte);
                    }
                }
                Ok(None)
            }
            At::Element(list) if !self.in_string && self.depth == 2 && matches!(byte, b',' | b']') => {
                self.end_element();
                self.at = At::List(list);
                if byte == b']' {
                    return Ok(self.end_list(list));
                }
                Ok((self.nodes.len() >= PORTION).then_some(list))
            }
            At::Element(_) => {
                self.element_byte(byte);
                Ok(None)
            }
        }
    }

    fn rest_byte(&mut self, byte: u8) {
        let at_top = self.depth == 1;
        if self.in_string {
            if at_top && self.key.len() < MAX_KEY && (byte != b'"' || self.escaped) {
                self.key.push(byte);
            }
        } else if at_top {
            let list = match self.key.as_slice() {
                b"Peers" => Some(PeerList::All),
                b"PeersChanged" => Some(PeerList::Changed),
                _ => None,
            };
            match byte {
                b'"' => self.key.clear(),
                b':' => self.key_stands = true,
                b' ' | b'\t' | b'\r' | b'\n' => {}
                b'[' if self.key_stands && list.is_some() => {
                    // For the rest, the list is empty.
                    self.at = list.map_or(At::Rest, At::List);
                    self.key_stands = false;
                }
                _ => self.key_stands = false,
            }
            if byte == b'"' && self.key_stands {
                // A text for a value is no name.
                self.key_stands = false;
            }
        }
        self.step(byte);
    }

    fn element_byte(&mut self, byte: u8) {
        if self.element.len() < MAX_PEER_BYTES {
            self.element.push(byte);
        } else {
            self.element_too_large = true;
        }
        self.step(byte);
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

    fn end_element(&mut self) {
        match counting(|| serde_json::from_slice(&self.element)) {
            (Ok(node), skipped) if !self.element_too_large => {
                self.nodes.push(node);
                self.skipped += skipped;
            }
            (Ok(_) | Err(_), _) => self.skipped += 1,
        }
        self.element.clear();
        self.element_too_large = false;
    }

    /// The closing bracket.
    fn end_list(&mut self, list: PeerList) -> Option<PeerList> {
        self.at = At::Rest;
        self.depth = 1;
        self.rest.push(b']');
        (!self.nodes.is_empty()).then_some(list)
    }

    fn end_message(&mut self) -> Result<Piece, MapStreamError> {
        let (message, skipped) = MapResponse::from_json(&self.rest)?;
        let skipped = skipped + std::mem::take(&mut self.skipped);
        self.left = None;
        self.depth = 0;
        self.key.clear();
        self.key_stands = false;
        self.rest.clear();
        self.rest.shrink_to(KEEP_BYTES);
        self.element.shrink_to(KEEP_BYTES);
        Ok(Piece::Rest(Box::new(message), skipped))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn frame(json: &[u8]) -> Vec<u8> {
        let mut out = u32::try_from(json.len()).unwrap().to_le_bytes().to_vec();
        out.extend_from_slice(json);
        out
    }

    fn node(id: u64) -> Value {
        json!({"ID": id, "Key": format!("nodekey:{id:064x}"), "Name": "a]},{[\"\\", "Addresses": ["100.64.0.1/32"]})
    }

    /// The messages as they would have been decoded in one go, and what was skipped.
    fn gather(wire: &[u8], cut: usize) -> Result<Vec<(MapResponse, u64)>, MapStreamError> {
        let mut stream = MapStream::new();
        let (mut messages, mut peers, mut changed) = (Vec::new(), Vec::new(), Vec::new());
        for part in wire.chunks(cut) {
            stream.push(part);
            while let Some(piece) = stream.next_piece()? {
                match piece {
                    Piece::Peers(PeerList::All, nodes) => peers.extend(nodes),
                    Piece::Peers(PeerList::Changed, nodes) => changed.extend(nodes),
                    Piece::Rest(mut message, skipped) => {
                        assert!(message.peers.is_empty() && message.peers_changed.is_empty());
                        message.peers = std::mem::take(&mut peers);
                        message.peers_changed = std::mem::take(&mut changed);
                        messages.push((*message, skipped));
                    }
                }
            }
        }
        Ok(messages)
    }

    fn one(json: &Value) -> (MapResponse, u64) {
        gather(&frame(json.to_string().as_bytes()), 7).unwrap().pop().unwrap()
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
        let (message, skipped) = gather(&wire, 1).unwrap().pop().unwrap();
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

    #[test]
    fn what_is_no_message_ends_the_stream() {
        for bad in ["", "{", "{\"Peers\":[", "{\"Peers\":[{]", "{\"Peers\":[]", "\"", "{}}"] {
            assert!(gather(&frame(bad.as_bytes()), 3).is_err(), "{bad}");
        }
        let mut stream = MapStream::new();
        stream.push(&u32::MAX.to_le_bytes());
        assert!(matches!(stream.next_piece(), Err(MapStreamError::TooLarge(_))));
        assert!(stream.rest.capacity() < 64);
    }

    proptest! {
        #[test]
        fn fuzz_any_cut_gives_what_decoding_in_one_go_gives(
            messages in proptest::collection::vec(
                (proptest::collection::vec(1_u64..9, 0..80), proptest::collection::vec(1_u64..9, 0..3), any::<String>()),
                1..4,
            ),
            cut in 1_usize..97,
        ) {
            let (mut wire, mut expected) = (Vec::new(), Vec::new());
            for (peers, changed, domain) in messages {
                let nodes = |ids: Vec<u64>| ids.into_iter().map(node).collect::<Vec<_>>();
                let json = json!({"Peers": nodes(peers), "Domain": domain, "PeersChanged": nodes(changed)}).to_string();
                wire.extend(frame(json.as_bytes()));
                expected.push((serde_json::from_str::<MapResponse>(&json).unwrap(), 0));
            }
            prop_assert_eq!(gather(&wire, cut).unwrap(), expected);
        }

        #[test]
        fn fuzz_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut in 1_usize..20) {
            let _ = gather(&frame(&bytes), cut);
            let mut json = b"{\"Peers\":[".to_vec();
            json.extend_from_slice(&bytes);
            let _ = gather(&frame(&json), cut);
        }
    }
}
