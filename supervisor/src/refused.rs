//! What callers sent and files held that cannot be used: counted by reason, and told in the log at most once
//! a minute each.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use podtether_proto::node::code;
use prometheus::IntCounterVec;

/// The least time between two lines about one reason.
const LINE_EVERY: Duration = Duration::from_secs(60);

/// Why something was refused. A bounded set: these become metric labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// A caller on the socket who is neither root nor this process's user.
    RpcPeer,
    /// A caller on the socket sent what is no call.
    RpcFrame,
    /// The plugin was called in a CNI version that it does not speak.
    CniVersion,
    /// A network configuration with a field that the plugin does not know.
    CniField,
    /// CNI environment variables that are missing or wrong.
    CniEnvironment,
    /// What the plugin read is not JSON.
    CniJson,
    /// A network configuration that makes no sense, or a pod's annotation that does not.
    CniConfig,
    /// A record that is cut off or damaged.
    RecordTorn,
    /// A record that a newer build wrote.
    RecordNewer,
    /// A record under another one's name.
    RecordForeign,
    /// A record that cannot be read.
    RecordUnreadable,
}

impl Reason {
    /// Its name in metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::RpcPeer => "rpc_peer",
            Self::RpcFrame => "rpc_frame",
            Self::CniVersion => "cni_version",
            Self::CniField => "cni_field",
            Self::CniEnvironment => "cni_environment",
            Self::CniJson => "cni_json",
            Self::CniConfig => "cni_config",
            Self::RecordTorn => "record_torn",
            Self::RecordNewer => "record_newer",
            Self::RecordForeign => "record_foreign",
            Self::RecordUnreadable => "record_unreadable",
        }
    }

    /// Of a CNI error code; none where the caller did nothing wrong.
    #[must_use]
    pub fn of_cni(error: u32) -> Option<Self> {
        match error {
            code::INCOMPATIBLE_VERSION => Some(Self::CniVersion),
            code::UNSUPPORTED_FIELD => Some(Self::CniField),
            code::BAD_ENV => Some(Self::CniEnvironment),
            code::UNDECODABLE => Some(Self::CniJson),
            code::BAD_CONFIG => Some(Self::CniConfig),
            _ => None,
        }
    }

    /// Of the word for a record that was put aside.
    #[must_use]
    pub fn of_record(kind: &str) -> Self {
        match kind {
            "newer" => Self::RecordNewer,
            "foreign" => Self::RecordForeign,
            "unreadable" => Self::RecordUnreadable,
            _ => Self::RecordTorn,
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Told {
    at: Instant,
    untold: u64,
}

/// Counts, and says how often a line may be written. Clones share both.
#[derive(Debug, Clone)]
pub struct Refused {
    counts: IntCounterVec,
    told: Arc<Mutex<HashMap<Reason, Told>>>,
}

impl Refused {
    /// `counts` has one label, the reason.
    #[must_use]
    pub fn new(counts: IntCounterVec) -> Self {
        Self { counts, told: Arc::default() }
    }

    /// Counts one of them; `what` is told unless the reason was told of within the last minute.
    pub fn count(&self, why: Reason, what: &str) {
        self.add(why, 1, what);
    }

    /// As [`Self::count`], for several.
    pub fn add(&self, why: Reason, count: u64, what: &str) {
        if let Some(count) = self.due(why, count, Instant::now()) {
            tracing::warn!(reason = why.name(), count, "refused bad input: {what}");
        }
    }

    /// Counts; how many there were since the last line when there is to be another.
    fn due(&self, why: Reason, count: u64, now: Instant) -> Option<u64> {
        self.counts.with_label_values(&[why.name()]).inc_by(count);
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        match told.get_mut(&why) {
            Some(told) if now.saturating_duration_since(told.at) < LINE_EVERY => {
                told.untold = told.untold.saturating_add(count);
                None
            }
            last => {
                let since = last.map_or(0, |told| told.untold).saturating_add(count);
                told.insert(why, Told { at: now, untold: 0 });
                Some(since)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use prometheus::Opts;

    use super::*;

    #[test]
    fn many_are_counted_and_one_line_a_minute_tells_of_all() {
        let refused = Refused::new(IntCounterVec::new(Opts::new("x", "x"), &["reason"]).unwrap());
        let start = Instant::now();
        let mut lines = Vec::new();
        for second in 0..150 {
            for _ in 0..10 {
                lines.extend(refused.due(Reason::RpcFrame, 1, start + Duration::from_secs(second)));
            }
        }
        assert_eq!(lines, [1, 600, 600]);
        assert_eq!(refused.counts.with_label_values(&["rpc_frame"]).get(), 1500);
        assert_eq!(refused.due(Reason::CniJson, 3, start), Some(3), "another reason has its own line");
    }
}
