//! A stub resolver's question, asked from a namespace.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use podtether_net::Netns;

use super::{ProbeError, udp};

/// What a server said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// NOERROR, NXDOMAIN, REFUSED and so on, as text.
    pub code: String,
    /// True for NOERROR.
    pub ok: bool,
    /// Addresses in the answer section.
    pub addresses: Vec<IpAddr>,
}

/// Asks `server` for `name`'s A records, or AAAA with `v6`.
///
/// # Errors
/// When the name is none, nobody answers within `limit`, or the answer is not DNS.
pub fn lookup(
    ns: &Netns,
    server: SocketAddr,
    name: &str,
    v6: bool,
    limit: Duration,
) -> Result<Answer, ProbeError> {
    let bad = |what: &str| ProbeError::Answer(format!("DNS {name} at {server}: {what}"));
    let qname = Name::from_str(name).map_err(|e| bad(&e.to_string()))?;
    let kind = if v6 { RecordType::AAAA } else { RecordType::A };
    let mut message = Message::new(0x7064, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(qname, kind));
    let bytes = message.to_vec().map_err(|e| bad(&e.to_string()))?;
    let Some((reply, _)) = udp::ask(ns, server, &bytes, limit)? else {
        return Err(bad(&format!("no answer within {limit:?}")));
    };
    let reply = Message::from_vec(&reply).map_err(|e| bad(&e.to_string()))?;
    if reply.metadata.id != message.metadata.id || reply.metadata.message_type != MessageType::Response {
        return Err(bad("the answer is to another question"));
    }
    let addresses = reply.answers.iter().filter_map(|record| {
        if let RData::A(a) = &record.data {
            Some(IpAddr::V4(a.0))
        } else if let RData::AAAA(aaaa) = &record.data {
            Some(IpAddr::V6(aaaa.0))
        } else {
            None
        }
    });
    Ok(Answer {
        code: reply.metadata.response_code.to_string(),
        ok: reply.metadata.response_code == ResponseCode::NoError,
        addresses: addresses.collect(),
    })
}
