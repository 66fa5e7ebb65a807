//! DNS messages as bytes: what forwarding has to know of them, and the few changes it makes. RFC 1035, 6891.

use super::names::plain;

/// Bytes of the header.
pub(super) const HEADER: usize = 12;
/// The largest UDP answer that needs no fragment on any path, RFC 9715.
pub(super) const MAX_UDP_ANSWER: u16 = 1232;
/// What an asker without EDNS takes.
const PLAIN_UDP_ANSWER: u16 = 512;
const OPT: u16 = 41;
const SOA: u16 = 6;
const MAX_NAME: usize = 255;
const QR: u8 = 0x80;
const TC: u8 = 0x02;

/// Response codes that are told apart here.
pub(super) mod code {
    pub(crate) const OK: u8 = 0;
    pub(crate) const FORM_ERR: u8 = 1;
    pub(crate) const SERV_FAIL: u8 = 2;
    pub(crate) const NX_DOMAIN: u8 = 3;
    pub(crate) const NOT_IMP: u8 = 4;
}

/// What makes bytes no question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Odd {
    /// Shorter than a header.
    Short,
    /// A response; answering it could start a loop.
    Response,
    /// Another operation than a query.
    Operation,
    /// Not one question, or one that does not parse.
    Question,
}

/// The question of a query, and how large an answer the asker takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Question {
    /// Name in lower case without a dot at its end; a byte that no host name has is `?`.
    pub(super) name: String,
    pub(super) kind: u16,
    pub(super) class: u16,
    /// Where the question ends in the message; it begins behind the header.
    pub(super) end: usize,
    pub(super) edns: Option<Edns>,
    /// The header's RD and the second flag byte's AD and CD.
    pub(super) flags: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Edns {
    pub(super) payload: u16,
    pub(super) dnssec_ok: bool,
}

impl Question {
    pub(super) fn parse(message: &[u8]) -> Result<Self, Odd> {
        let header = message.first_chunk::<HEADER>().ok_or(Odd::Short)?;
        if header[2] & QR != 0 {
            return Err(Odd::Response);
        }
        if header[2] & 0x78 != 0 {
            return Err(Odd::Operation);
        }
        // Only these two counts are known to be small.
        if header[4..6] != [0, 1] || header[6..10] != [0; 4] {
            return Err(Odd::Question);
        }
        let (name, at) = question_name(message).ok_or(Odd::Question)?;
        let kind = number(message, at).ok_or(Odd::Question)?;
        let class = number(message, at + 2).ok_or(Odd::Question)?;
        let mut records =
            Records { message, at: at + 4, left: u32::from(u16::from_be_bytes([header[10], header[11]])) };
        let mut edns = None;
        while let Some(record) = records.next().ok_or(Odd::Question)? {
            if record.kind == OPT {
                let dnssec_ok = message.get(record.ttl_at + 2).is_some_and(|flags| flags & 0x80 != 0);
                edns = Some(Edns { payload: record.class, dnssec_ok });
            }
        }
        let flags = header[2] & 0x01 | header[3] & 0x30;
        Ok(Self { name, kind, class, end: at + 4, edns, flags })
    }

    /// How long a UDP answer may be.
    pub(super) fn limit(&self) -> usize {
        let payload = self.edns.map_or(PLAIN_UDP_ANSWER, |edns| edns.payload);
        usize::from(payload.clamp(PLAIN_UDP_ANSWER, MAX_UDP_ANSWER))
    }
}

/// The question's name for an index, and the offset behind it. A pointer has nothing before it to point to.
fn question_name(message: &[u8]) -> Option<(String, usize)> {
    let mut name = String::new();
    let mut at = HEADER;
    loop {
        let length = usize::from(*message.get(at)?);
        at += 1;
        if length == 0 {
            return Some((name, at));
        }
        if length > 63 || at + length - HEADER > MAX_NAME - 1 {
            return None;
        }
        let label = message.get(at..at + length)?;
        at += length;
        if !name.is_empty() {
            name.push('.');
        }
        name.extend(label.iter().map(|b| if plain(*b) { char::from(b.to_ascii_lowercase()) } else { '?' }));
    }
}

fn number(message: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*message.get(at..)?.first_chunk()?))
}

struct Record {
    kind: u16,
    class: u16,
    ttl_at: usize,
    data_at: usize,
    data_length: usize,
}

struct Records<'a> {
    message: &'a [u8],
    at: usize,
    left: u32,
}

impl Records<'_> {
    /// The next record; the outer `None` for a message that is cut off or odd.
    fn next(&mut self) -> Option<Option<Record>> {
        if self.left == 0 {
            return Some(None);
        }
        self.left -= 1;
        let at = skip_name(self.message, self.at)?;
        let record = Record {
            kind: number(self.message, at)?,
            class: number(self.message, at + 2)?,
            ttl_at: at + 4,
            data_at: at + 10,
            data_length: usize::from(number(self.message, at + 8)?),
        };
        self.at = record.data_at + record.data_length;
        (self.at <= self.message.len()).then_some(Some(record))
    }
}

/// Behind the name at `at`, which may end in a pointer. Its length bounds the loop.
fn skip_name(message: &[u8], mut at: usize) -> Option<usize> {
    let start = at;
    while at - start <= MAX_NAME {
        match *message.get(at)? {
            0 => return Some(at + 1),
            length @ 1..=63 => at += 1 + usize::from(length),
            0xc0.. => return message.get(at + 1).map(|_| at + 2),
            64..=0xbf => return None,
        }
    }
    None
}

/// Whether `answer` may be one to `query`, whose question ends at `end`. Names compare without case; servers
/// may answer errors without the question.
pub(super) fn belongs(answer: &[u8], query: &[u8], end: usize) -> bool {
    let Some(header) = answer.first_chunk::<HEADER>() else { return false };
    if header[..2] != query[..2] || header[2] & QR == 0 || header[2] & 0x78 != query[2] & 0x78 {
        return false;
    }
    match header[4..6] {
        [0, 1] => match (answer.get(HEADER..end), query.get(HEADER..end)) {
            (Some(theirs), Some(ours)) => theirs.eq_ignore_ascii_case(ours),
            (None | Some(_), _) => false,
        },
        [0, 0] => !matches!(response_code(answer), code::OK | code::NX_DOMAIN),
        _ => false,
    }
}

/// The four bits of the header.
pub(super) fn response_code(answer: &[u8]) -> u8 {
    answer.get(3).map_or(code::SERV_FAIL, |flags| flags & 0x0f)
}

pub(super) fn is_truncated(answer: &[u8]) -> bool {
    answer.get(2).is_some_and(|flags| flags & TC != 0)
}

/// Makes an answer from elsewhere one to `query`: its id, and its question in the asker's own letters.
pub(super) fn readdress(answer: &mut [u8], query: &[u8], end: usize) {
    if let (Some(id), Some(own)) = (answer.get_mut(..2), query.get(..2)) {
        id.copy_from_slice(own);
    }
    if answer.get(4..6) == Some(&[0, 1])
        && let (Some(question), Some(own)) = (answer.get_mut(HEADER..end), query.get(HEADER..end))
    {
        question.copy_from_slice(own);
    }
}

/// What an asker gets whose answer does not fit: the same without records, so that it asks over TCP.
pub(super) fn truncate(answer: &mut Vec<u8>, question: &Question) {
    answer.truncate(question.end);
    if let Some(header) = answer.first_chunk_mut::<HEADER>() {
        header[2] |= TC;
        header[6..12].fill(0);
    }
    if let Some(edns) = question.edns {
        let [high, low] = MAX_UDP_ANSWER.to_be_bytes();
        let dnssec_ok = if edns.dnssec_ok { 0x80 } else { 0 };
        answer.extend([0, 0, 41, high, low, 0, 0, dnssec_ok, 0, 0, 0]);
        if let Some(header) = answer.first_chunk_mut::<HEADER>() {
            header[11] = 1;
        }
    }
}

/// A reply without records. The question goes along where it parsed.
pub(super) fn fail(query: &[u8], question: Option<&Question>, code: u8, reply: &mut Vec<u8>) {
    const OPCODE_AND_RD: u8 = 0x79;
    const RECURSION_AVAILABLE: u8 = 0x80;
    reply.clear();
    let end = question.map_or(HEADER, |question| question.end);
    reply.extend_from_slice(query.get(..end).unwrap_or_default());
    if let Some(header) = reply.first_chunk_mut::<HEADER>() {
        header[2] = QR | header[2] & OPCODE_AND_RD;
        header[3] = if question.is_some() { RECURSION_AVAILABLE | code } else { code };
        header[4..].fill(0);
        header[5] = u8::from(question.is_some());
    }
}

/// Until when an answer may be kept, and where its times to live are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Lifetime {
    pub(super) seconds: u32,
    pub(super) ttls: Vec<u16>,
}

/// Reads an answer's times to live. `None` for what is not to be kept: an odd one, or an absence that no SOA
/// limits (RFC 2308).
pub(super) fn lifetime(answer: &[u8]) -> Option<Lifetime> {
    let header = answer.first_chunk::<HEADER>()?;
    let (_, at) = question_name(answer)?;
    let count = |n: usize| u16::from_be_bytes([header[n], header[n + 1]]);
    let (answers, authorities) = (count(6), count(8));
    let left = u32::from(answers) + u32::from(authorities) + u32::from(count(10));
    let mut records = Records { message: answer, at: at + 4, left };
    let mut seconds = u32::MAX;
    let mut ttls = Vec::new();
    let mut has_soa = false;
    while let Some(record) = records.next()? {
        if record.kind == OPT {
            continue;
        }
        ttls.push(u16::try_from(record.ttl_at).ok()?);
        let ttl = u32::from_be_bytes(*answer.get(record.ttl_at..)?.first_chunk()?);
        // A set sign bit means zero, RFC 2181.
        seconds = seconds.min(if ttl > u32::MAX / 2 { 0 } else { ttl });
        if record.kind == SOA && record.data_length >= 20 {
            let minimum = answer.get(record.data_at + record.data_length - 4..)?.first_chunk()?;
            seconds = seconds.min(u32::from_be_bytes(*minimum));
            has_soa = true;
        }
    }
    (answers > 0 || has_soa).then_some(Lifetime { seconds, ttls })
}

/// Takes `age_s` off every time to live.
pub(super) fn age(answer: &mut [u8], ttls: &[u16], age_s: u32) {
    for at in ttls {
        if let Some(ttl) = answer.get_mut(usize::from(*at)..).and_then(|rest| rest.first_chunk_mut::<4>()) {
            *ttl = u32::from_be_bytes(*ttl).saturating_sub(age_s).to_be_bytes();
        }
    }
}
