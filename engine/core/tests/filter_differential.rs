//! Random policies and packets through the filter and through a second reading of the rules that shares
//! nothing with it: own packet parser, no tables, every rule and every source in turn.
//!
//! The seed is printed; `PODTETHER_SEED` repeats a run. With `PODTETHER_FILTER_DUMP=<file>` every case is
//! written there, one policy a line, for a comparison with other implementations.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::IpAddr;

use podtether_core::filter::{DropReason, Filter, FilterState, Pass, Verdict};
use podtether_core::packet::{ParseError, Parsed};
use podtether_core::tailcfg::{FilterRule, NetPortRange, PortRange};

const POLICIES: usize = 500;
const PACKETS: usize = 100;
/// Everything that can become of a packet. Each must occur in every run.
const OUTCOMES: [&str; 15] = [
    "malformed",
    "hidden header",
    "extension header",
    "multicast",
    "link-local",
    "not own",
    "no rule",
    "jailed",
    "rule",
    "capability rule",
    "flow",
    "tcp segment",
    "icmp answer",
    "later fragment",
    "tsmp",
];
/// From here come packets of a peer that may only answer.
const JAILED: [&str; 2] = ["100.64.0.7", "fd7a::7"];

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }

    fn small(&mut self, n: u64) -> u16 {
        u16::try_from(self.below(n)).expect("small")
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn one_of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[usize::try_from(self.below(all.len() as u64)).expect("fits")]
    }
}

// ---- the second reading ----

/// An address as the bytes on the wire.
type Bytes = Vec<u8>;

struct Reading<'a> {
    chunks: &'a [(String, Vec<FilterRule>)],
    own: &'a [String],
    /// Protocol, source, source port, destination, destination port of answers; last used last.
    flows: Vec<(u8, Bytes, u16, Bytes, u16)>,
}

fn bytes_of(text: &str) -> Option<Bytes> {
    match text.parse().ok()? {
        IpAddr::V4(ip) => Some(ip.octets().to_vec()),
        IpAddr::V6(ip) => Some(ip.octets().to_vec()),
    }
}

/// Bit by bit.
fn in_net(net: &str, ip: &Bytes) -> Option<bool> {
    let (base, length) = net.split_once('/')?;
    let (base, length) = (bytes_of(base)?, length.parse::<usize>().ok()?);
    if length > base.len() * 8 {
        return None;
    }
    let bit = |bytes: &Bytes, at: usize| bytes[at / 8] >> (7 - at % 8) & 1;
    if (length..base.len() * 8).any(|at| bit(&base, at) == 1) {
        return None;
    }
    Some(base.len() == ip.len() && (0..length).all(|at| bit(&base, at) == bit(ip, at)))
}

fn in_set(text: &str, ip: &Bytes) -> bool {
    if text == "*" {
        return true;
    }
    if text.starts_with("cap:") {
        return false;
    }
    if text.contains('/') {
        return in_net(text, ip) == Some(true);
    }
    if let Some((first, last)) = text.split_once('-') {
        let (Some(first), Some(last)) = (bytes_of(first), bytes_of(last)) else { return false };
        return first.len() == ip.len() && last.len() == ip.len() && first <= *ip && *ip <= last;
    }
    bytes_of(text).as_ref() == Some(ip)
}

struct Seen {
    src: Bytes,
    dst: Bytes,
    protocol: u8,
    /// `None` for a later fragment.
    header: Option<Bytes>,
}

fn word(bytes: &[u8], at: usize) -> usize {
    usize::from(bytes[at]) * 256 + usize::from(bytes[at + 1])
}

fn look(p: &[u8]) -> Result<Seen, &'static str> {
    let version = p.first().map_or(0, |b| b / 16);
    let (src, dst, protocol, start, end, offset, more);
    if version == 4 {
        if p.len() < 20 {
            return Err("malformed");
        }
        start = usize::from(p[0] % 16) * 4;
        end = word(p, 2);
        if start < 20 || end < start || end > p.len() {
            return Err("malformed");
        }
        (src, dst, protocol) = (p[12..16].to_vec(), p[16..20].to_vec(), p[9]);
        offset = word(p, 6) % 0x2000;
        more = p[6] & 0x20 != 0;
    } else if version == 6 {
        if p.len() < 40 || 40 + word(p, 4) > p.len() {
            return Err("malformed");
        }
        end = 40 + word(p, 4);
        (src, dst) = (p[8..24].to_vec(), p[24..40].to_vec());
        if p[6] == 44 {
            if end < 48 {
                return Err("hidden header");
            }
            (protocol, start) = (p[40], 48);
            offset = word(p, 42) / 8;
            more = p[43] % 2 == 1;
        } else {
            (protocol, start, offset, more) = (p[6], 40, 0, false);
        }
    } else {
        return Err("malformed");
    }
    if offset > 0 && offset < 10 {
        return Err("hidden header");
    }
    if version == 6 && [0, 43, 44, 51, 60, 135, 139, 140].contains(&protocol) {
        return Err("extension header");
    }
    if protocol == 0 || protocol == 255 {
        return Err("malformed");
    }
    if offset > 0 {
        return Ok(Seen { src, dst, protocol, header: None });
    }
    let header = p[start..end].to_vec();
    let least = match protocol {
        6 => 20,
        17 => 8,
        132 => 12,
        1 | 58 => 4,
        99 if more => return Err("hidden header"),
        99 => 7,
        _ => 0,
    };
    if header.len() < least {
        return Err(if more { "hidden header" } else { "malformed" });
    }
    Ok(Seen { src, dst, protocol, header: Some(header) })
}

impl Reading<'_> {
    fn flow(seen: &Seen) -> Option<(u8, Bytes, u16, Bytes, u16)> {
        let header = seen.header.as_ref().filter(|_| seen.protocol == 17 || seen.protocol == 132)?;
        let port = |at| u16::from_be_bytes([header[at], header[at + 1]]);
        Some((seen.protocol, seen.src.clone(), port(0), seen.dst.clone(), port(2)))
    }

    fn sent(&mut self, p: &[u8]) {
        let Ok(seen) = look(p) else { return };
        let Some((protocol, src, src_port, dst, dst_port)) = Self::flow(&seen) else { return };
        let answer = (protocol, dst, dst_port, src, src_port);
        self.flows.retain(|known| *known != answer);
        self.flows.push(answer);
        if self.flows.len() > 512 {
            self.flows.remove(0);
        }
    }

    /// What becomes of a packet, and the rule that says so.
    fn judge(&mut self, p: &[u8], jailed: bool, caps: &[&str]) -> (&'static str, Option<(String, usize)>) {
        let seen = match look(p) {
            Ok(seen) => seen,
            Err(reason) => return (reason, None),
        };
        let v4 = seen.dst.len() == 4;
        if if v4 { (224..240).contains(&seen.dst[0]) } else { seen.dst[0] == 0xff } {
            return ("multicast", None);
        }
        if if v4 { seen.dst[..2] == [169, 254] } else { seen.dst[0] == 0xfe && seen.dst[1] & 0xc0 == 0x80 } {
            return ("link-local", None);
        }
        if !self.own.iter().any(|net| in_net(net, &seen.dst) == Some(true)) {
            return ("not own", None);
        }
        let Some(header) = &seen.header else { return ("later fragment", None) };
        let is_icmp = seen.protocol == if v4 { 1 } else { 58 };
        match seen.protocol {
            6 if header[13] & 0x12 != 0x02 => return ("tcp segment", None),
            99 => return ("tsmp", None),
            _ if is_icmp && header.len() >= 8 => {
                let echo_reply = header[0] == if v4 { 0 } else { 129 } && header[1] == 0;
                let errors: &[u8] = if v4 { &[3, 11, 12] } else { &[1, 2, 3, 4] };
                if echo_reply || errors.contains(&header[0]) {
                    return ("icmp answer", None);
                }
            }
            _ => {}
        }
        if let Some(flow) = Self::flow(&seen)
            && let Some(at) = self.flows.iter().position(|known| *known == flow)
        {
            let used = self.flows.remove(at);
            self.flows.push(used);
            return ("flow", None);
        }
        if jailed {
            return ("jailed", None);
        }
        let has_port = [6, 17, 132].contains(&seen.protocol);
        for (name, rules) in self.chunks {
            for (index, rule) in rules.iter().enumerate() {
                let listed = if rule.ip_proto.is_empty() {
                    [6, 17, 1, 58].contains(&seen.protocol)
                } else {
                    rule.ip_proto.contains(&i32::from(seen.protocol))
                };
                let to = rule.dst_ports.iter().any(|to| {
                    in_set(&to.ip, &seen.dst)
                        && if is_icmp {
                            true
                        } else if has_port {
                            let port = u16::from_be_bytes([header[2], header[3]]);
                            listed && to.ports.first <= port && port <= to.ports.last
                        } else {
                            listed && to.ports.first == 0 && to.ports.last == 65535
                        }
                });
                let by_address = rule.src_ips.iter().any(|from| in_set(from, &seen.src));
                let by_cap = (is_icmp || has_port)
                    && rule
                        .src_ips
                        .iter()
                        .any(|from| from.strip_prefix("cap:").is_some_and(|cap| caps.contains(&cap)));
                if to && (by_address || by_cap) {
                    let outcome = if by_address { "rule" } else { "capability rule" };
                    return (outcome, Some((name.clone(), index)));
                }
            }
        }
        ("no rule", None)
    }
}

// ---- random policies and packets ----

fn address(rng: &mut Rng, v4: bool) -> String {
    if v4 { format!("100.64.0.{}", rng.below(9)) } else { format!("fd7a::{}", rng.below(9)) }
}

fn set(rng: &mut Rng, v4: bool) -> String {
    match rng.below(12) {
        0 | 1 => "*".to_owned(),
        2 if v4 => format!("100.64.0.{}/30", rng.below(3) * 4),
        2 => format!("fd7a::{}/126", rng.below(3) * 4),
        3 if v4 => rng.one_of(&["100.64.0.0/10", "0.0.0.0/0", "100.64.0.4/31", "10.1.0.0/16"]).to_string(),
        3 => rng.one_of(&["fd7a::/16", "::/0", "fd7a::4/127"]).to_string(),
        4 => format!("{}-{}", address(rng, v4), address(rng, v4)),
        5 => rng.one_of(&["cap:web", "cap:mail", "cap:"]).to_string(),
        6 => rng
            .one_of(&[
                "nonsense",
                "",
                "100.64.0.1/24",
                "100.64.0.1-fd7a::1",
                "1.2.3.4/33",
                "-",
                "fd7a::1-",
                "**",
            ])
            .to_string(),
        _ => address(rng, v4),
    }
}

fn rule(rng: &mut Rng) -> FilterRule {
    let v4 = rng.chance(50);
    let sources = rng.below(4);
    let destinations = rng.below(4);
    let src_ips = (0..sources).map(|_| set(rng, v4)).collect();
    let dst_ports = (0..destinations).map(|_| {
        let ports = match rng.below(4) {
            0 | 1 => PortRange::ANY,
            2 => PortRange { first: rng.small(6), last: rng.small(8) },
            _ => *rng.one_of(&[
                PortRange { first: 1, last: 65535 },
                PortRange { first: 0, last: 65534 },
                PortRange { first: 53, last: 53 },
            ]),
        };
        NetPortRange { ip: set(rng, v4), ports }
    });
    let dst_ports = dst_ports.collect();
    let listed = if rng.chance(60) { 0 } else { 1 + rng.below(3) };
    let ip_proto = (0..listed).map(|_| *rng.one_of(&[1, 6, 17, 58, 132, 47, 99, 0, -1, 256, 300])).collect();
    FilterRule { src_ips, dst_ports, ip_proto, ..FilterRule::default() }
}

/// From one port of ours to one server, or back.
fn datagram(rng: &mut Rng, outbound: bool) -> Vec<u8> {
    let (ours, server) = ([100, 64, 0, 5], [100, 64, 0, 4]);
    let (port, well_known) = ((4000 + rng.small(700)).to_be_bytes(), 53u16.to_be_bytes());
    let (src, dst, from, to) =
        if outbound { (ours, server, port, well_known) } else { (server, ours, well_known, port) };
    let mut p = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0];
    p.extend([src, dst].concat());
    p.extend([from, to, [0, 8], [0, 0]].concat());
    p
}

/// The answer to a packet that has ports, as far as its headers go.
fn answer(p: &[u8]) -> Vec<u8> {
    let mut p = p.to_vec();
    let (addresses, start) = match p.first().map(|b| b / 16) {
        Some(4) if p.len() >= 20 => (12..20, usize::from(p[0] % 16) * 4),
        Some(6) if p.len() >= 40 => (8..40, if p[6] == 44 { 48 } else { 40 }),
        _ => return p,
    };
    let half = addresses.len() / 2;
    p[addresses].rotate_left(half);
    if let Some(ports) = p.get_mut(start..start + 4) {
        ports.rotate_left(2);
    }
    p
}

fn packet(rng: &mut Rng, own: &[String], outbound: bool) -> Vec<u8> {
    let v4 = rng.chance(50);
    let peer = address(rng, v4);
    let ours = own.iter().find(|net| net.contains('.') == v4).expect("one of each family");
    let ours = if rng.chance(85) {
        ours.split('/').next().expect("an address").to_owned()
    } else if v4 {
        rng.one_of(&["10.1.2.3", "224.0.0.1", "239.1.2.3", "169.254.169.254", "8.8.8.8", "100.64.0.200"])
            .to_string()
    } else {
        rng.one_of(&["ff02::1", "fe80::1", "2001:db8::1", "fd7a::200", "febf::1", "fec0::1"]).to_string()
    };
    let (src, dst) = if outbound { (ours, peer) } else { (peer, ours) };
    let protocol = *rng.one_of(&[6, 6, 6, 17, 17, 17, 1, 1, 58, 58, 132, 99, 47, 50, 0, 255, 43, 60, 44]);
    let ports = 8;
    let mut body: Vec<u8> =
        vec![0; *rng.one_of(&[20, 20, 20, 20, 20, 20, 20, 20, 24, 24, 8, 12, 7, 4, 3, 0])];
    let (src_port, dst_port) = (rng.small(ports), rng.small(ports));
    let fields = [src_port.to_be_bytes(), dst_port.to_be_bytes()].concat();
    let n = fields.len().min(body.len());
    body[..n].copy_from_slice(&fields[..n]);
    if matches!(protocol, 1 | 58) && body.len() > 1 {
        body[0] = *rng.one_of(&[0, 3, 8, 11, 12, 13, 1, 2, 4, 128, 129, 135]);
        body[1] = u8::try_from(rng.below(10) / 8).expect("small");
    }
    if protocol == 6 && body.len() > 13 {
        body[12] = 0x50;
        body[13] = *rng.one_of(&[0x02, 0x02, 0x02, 0x12, 0x10, 0x18, 0x04, 0xc2, 0x03, 0]);
    }
    let fragment = rng.chance(15);
    let offset = if fragment { *rng.one_of(&[0u16, 1, 5, 9, 10, 11, 185, 8000]) } else { 0 };
    let more = fragment && rng.chance(60);
    let mut p = Vec::new();
    if v4 {
        let options = if rng.chance(8) { 4u8 } else { 0 };
        p.extend([0x45 + options / 4, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0]);
        p.extend(bytes_of(&src).expect("an address"));
        p.extend(bytes_of(&dst).expect("an address"));
        p.extend(vec![1; usize::from(options)]);
        p.extend(&body);
        p[6..8].copy_from_slice(&(offset | if more { 0x2000 } else { 0 }).to_be_bytes());
        let length = u16::try_from(p.len()).expect("short");
        p[2..4].copy_from_slice(&length.to_be_bytes());
    } else {
        if fragment {
            body = [&[protocol, 0, 0, 0, 0, 0, 0, 7][..], &body].concat();
            body[2..4].copy_from_slice(&(offset << 3 | u16::from(more)).to_be_bytes());
        }
        p.extend([0x60, 0, 0, 0, 0, 0, if fragment { 44 } else { protocol }, 64]);
        p.extend(bytes_of(&src).expect("an address"));
        p.extend(bytes_of(&dst).expect("an address"));
        p[4..6].copy_from_slice(&u16::try_from(body.len()).expect("short").to_be_bytes());
        p.extend(&body);
    }
    match rng.below(40) {
        0 => p.truncate(usize::try_from(rng.below(p.len() as u64 + 1)).expect("fits")),
        1 => p[0] = 0x50,
        2 => p[3] = p[3].wrapping_sub(u8::try_from(rng.below(30)).expect("small")),
        _ => {}
    }
    p
}

// ---- the comparison ----

/// The filter's word for what becomes of a packet, and the rule.
fn asked(
    state: &mut FilterState,
    p: &[u8],
    jailed: bool,
    caps: &[&str],
) -> (String, Option<(String, usize)>) {
    let parsed = match Parsed::parse(p) {
        Ok(parsed) => parsed,
        Err(error) => {
            let word = match error {
                ParseError::NotIp | ParseError::Truncated | ParseError::Protocol => "malformed",
                ParseError::Fragment => "hidden header",
                ParseError::ExtensionHeader => "extension header",
            };
            return (word.to_owned(), None);
        }
    };
    let has_cap = |cap: &str| caps.contains(&cap);
    let before = state.ask(&parsed, jailed, has_cap);
    let verdict = if jailed { state.check_in_jailed(&parsed) } else { state.check_in(&parsed, has_cap) };
    assert_eq!(before, verdict, "asking and judging say the same");
    let word = match verdict {
        Verdict::Accept(Pass::Rule(rule)) => {
            let name = state.filter().rule_name(rule).expect("a rule that exists");
            return ("rule".to_owned(), Some((name.chunk, usize::try_from(name.index).expect("fits"))));
        }
        Verdict::Accept(Pass::Flow) => "flow",
        Verdict::Accept(Pass::TcpSegment) => "tcp segment",
        Verdict::Accept(Pass::IcmpAnswer) => "icmp answer",
        Verdict::Accept(Pass::Fragment) => "later fragment",
        Verdict::Accept(Pass::Tsmp) => "tsmp",
        Verdict::Drop(DropReason::Multicast) => "multicast",
        Verdict::Drop(DropReason::LinkLocal) => "link-local",
        Verdict::Drop(DropReason::NotOwn) => "not own",
        Verdict::Drop(DropReason::NoRule) => "no rule",
        Verdict::Drop(DropReason::Jailed) => "jailed",
    };
    (word.to_owned(), None)
}

fn caps_of(src: &str) -> &'static [&'static str] {
    match src.rsplit(['.', ':']).next() {
        Some("1") => &["web"],
        Some("2") => &["web", "mail"],
        Some("3") => &["other"],
        _ => &[],
    }
}

fn source(p: &[u8]) -> Option<String> {
    let ip: IpAddr = match p.first()? / 16 {
        4 => <[u8; 4]>::try_from(p.get(12..16)?).ok()?.into(),
        6 => <[u8; 16]>::try_from(p.get(8..24)?).ok()?.into(),
        _ => return None,
    };
    Some(ip.to_string())
}

#[test]
fn fuzz_the_filter_decides_as_a_second_reading_of_the_rules() {
    let seed = match std::env::var("PODTETHER_SEED") {
        Ok(seed) => seed.parse().expect("PODTETHER_SEED is a number"),
        Err(_) => std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(1, |t| u64::from(t.subsec_nanos()) | 1 << 40),
    };
    println!("PODTETHER_SEED={seed}");
    let mut rng = Rng(seed | 1);
    let mut dump =
        std::env::var_os("PODTETHER_FILTER_DUMP").map(|path| std::fs::File::create(path).expect("a file"));
    let mut occurred: BTreeMap<&str, u64> = BTreeMap::new();
    for number in 0..POLICIES {
        let mut own = vec!["100.64.0.5/32".to_owned(), "fd7a::5/128".to_owned()];
        if rng.chance(30) {
            own.push("10.1.0.0/16".to_owned());
        }
        let names = *rng.one_of(&[&["base"][..], &["base", "extra"], &["a", "b", "z"]]);
        let new_chunks = |rng: &mut Rng| -> Vec<(String, Vec<FilterRule>)> {
            names
                .iter()
                .map(|name| ((*name).to_owned(), (0..rng.below(5)).map(|_| rule(rng)).collect()))
                .collect()
        };
        let chunks = new_chunks(&mut rng);
        let nets: Vec<_> = own.iter().map(|net| net.parse().expect("a net")).collect();
        let compiled = |chunks: &[(String, Vec<FilterRule>)]| {
            Filter::of_chunks(chunks.iter().map(|(name, rules)| (name.as_str(), rules.as_slice())), &nets)
        };
        let mut state = FilterState::new(compiled(&chunks));
        let mut reading = Reading { chunks: &chunks, own: &own, flows: Vec::new() };
        // Now and then so many flows that the oldest must go.
        let many = number % 100 == 99;
        // Half of the others get new rules in between, which flows outlive.
        let later = new_chunks(&mut rng);
        let change = (!many && rng.chance(50)).then_some(PACKETS / 2);
        let mut steps = String::new();
        let mut last_sent: Option<Vec<u8>> = None;
        for n in 0..if many { 3000 } else { PACKETS } {
            if change == Some(n) {
                state.set_filter(compiled(&later));
                reading.chunks = &later;
            }
            let outbound = rng.chance(if many { 60 } else { 20 });
            let p = match &last_sent {
                _ if many => datagram(&mut rng, outbound),
                Some(sent) if !outbound && rng.chance(20) => answer(sent),
                _ => packet(&mut rng, &own, outbound),
            };
            let src = source(&p).unwrap_or_default();
            if outbound {
                last_sent = Some(p.clone());
                reading.sent(&p);
                if let Ok(parsed) = Parsed::parse(&p) {
                    state.note_out(&parsed);
                }
            }
            let jailed = !many && JAILED.contains(&src.as_str());
            let mut accepted = false;
            if !outbound {
                let expected = reading.judge(&p, jailed, caps_of(&src));
                let found = asked(&mut state, &p, jailed, caps_of(&src));
                let word = if expected.0 == "capability rule" { "rule" } else { expected.0 };
                assert_eq!(
                    (found.0.as_str(), &found.1),
                    (word, &expected.1),
                    "PODTETHER_SEED={seed}, policy {number}, packet {n}: {p:02x?}\n{:#?}",
                    reading.chunks
                );
                *occurred.entry(expected.0).or_default() += 1;
                accepted =
                    ["rule", "flow", "tcp segment", "icmp answer", "later fragment", "tsmp"].contains(&word);
            }
            if dump.is_some() {
                let hex = p.iter().fold(String::new(), |mut hex, b| {
                    let _ = write!(hex, "{b:02x}");
                    hex
                });
                let comma = if steps.is_empty() { "" } else { "," };
                let fresh = change == Some(n);
                let _ = write!(
                    steps,
                    r#"{comma}{{"new":{fresh},"out":{outbound},"jailed":{jailed},"hex":"{hex}","accepted":{accepted}}}"#
                );
            }
        }
        if let Some(file) = &mut dump {
            let rules = |chunks: &[(String, Vec<FilterRule>)]| {
                let all: Vec<_> = chunks.iter().flat_map(|(_, rules)| rules).collect();
                serde_json::to_string(&all).expect("JSON")
            };
            let own = serde_json::to_string(&own).expect("JSON");
            writeln!(
                file,
                r#"{{"own":{own},"rules":{},"later":{},"steps":[{steps}]}}"#,
                rules(&chunks),
                rules(&later)
            )
            .expect("written");
        }
    }
    println!("{} packets: {occurred:?}", occurred.values().sum::<u64>());
    let missing: BTreeSet<_> = OUTCOMES.iter().filter(|outcome| !occurred.contains_key(*outcome)).collect();
    assert!(missing.is_empty(), "PODTETHER_SEED={seed} never saw {missing:?}");
    assert!(occurred.values().all(|count| *count >= 5), "PODTETHER_SEED={seed} saw too little of something");
    assert!(occurred.values().sum::<u64>() > 30_000);
}
