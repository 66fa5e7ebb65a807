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
