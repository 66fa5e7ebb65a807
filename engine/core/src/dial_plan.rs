//! Which addresses of the control server to try, and when: `ControlDialPlan` made into attempts.

use std::net::IpAddr;
use std::time::Duration;

use crate::tailcfg::ControlDialPlan;

/// Attempts taken from one plan.
const MAX_ATTEMPTS: usize = 16;
/// Longest delay before an attempt.
const MAX_DELAY: Duration = Duration::from_secs(10);
/// Bounds of one attempt's time.
const MIN_TIMEOUT: Duration = Duration::from_millis(500);
const MAX_TIMEOUT: Duration = Duration::from_secs(10);

/// One try to reach the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attempt {
    /// Where.
    pub ip: IpAddr,
    /// Counted from the first attempt's begin; sooner when all attempts before have failed.
    pub delay: Duration,
    /// Given up after this.
    pub timeout: Duration,
}

/// The attempts of a plan in the order of their begin, the higher priority first among equals. The
/// first that succeeds is used.
///
/// Candidates without an address are left out: they name a proxy (`ACEHost`), which an engine does not
/// use. Addresses that no server can have (multicast, unspecified) are left out too.
#[must_use]
pub fn attempts(plan: &ControlDialPlan) -> Vec<Attempt> {
    let mut candidates: Vec<_> = plan
        .candidates
        .iter()
        .filter(|candidate| candidate.ace_host.is_empty())
        .filter_map(|candidate| {
            let ip = candidate.ip.filter(|ip| !ip.is_unspecified() && !ip.is_multicast())?;
            let delay = seconds(candidate.dial_start_delay_sec).min(MAX_DELAY);
            let timeout = match seconds(candidate.dial_timeout_sec) {
                Duration::ZERO => MAX_TIMEOUT,
                asked => asked.clamp(MIN_TIMEOUT, MAX_TIMEOUT),
            };
            Some((candidate.priority, Attempt { ip, delay, timeout }))
        })
        .collect();
    candidates.sort_by_key(|(priority, attempt)| (attempt.delay, std::cmp::Reverse(*priority)));
    candidates.into_iter().map(|(_, attempt)| attempt).take(MAX_ATTEMPTS).collect()
}

fn seconds(number: f64) -> Duration {
    Duration::try_from_secs_f64(number).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tailcfg::ControlIpCandidate;

    fn candidate(ip: &str, delay: f64, timeout: f64, priority: i32) -> ControlIpCandidate {
        ControlIpCandidate {
            ip: ip.parse().ok(),
            dial_start_delay_sec: delay,
            dial_timeout_sec: timeout,
            priority,
            ..ControlIpCandidate::default()
        }
    }

    #[test]
    fn by_begin_then_by_priority_and_within_bounds() {
        let plan = ControlDialPlan {
            candidates: vec![
                candidate("192.0.2.1", 0.5, 3.0, 9),
                candidate("192.0.2.2", 0.0, 1.0, 1),
                candidate("2001:db8::3", 0.0, 1e9, 2),
                candidate("192.0.2.4", 1e30, f64::NAN, 0),
                candidate("192.0.2.5", -1.0, 0.001, 0),
                candidate("not an address", 0.0, 1.0, 99),
                candidate("0.0.0.0", 0.0, 1.0, 99),
                candidate("224.0.0.1", 0.0, 1.0, 99),
                ControlIpCandidate { ace_host: "ace.example".into(), ..candidate("192.0.2.9", 0.0, 1.0, 99) },
            ],
        };
        let ms = Duration::from_millis;
        let expected = [
            ("2001:db8::3", 0, 10_000),
            ("192.0.2.2", 0, 1000),
            ("192.0.2.5", 0, 500),
            // A delay that is no number of seconds is none.
            ("192.0.2.4", 0, 10_000),
            ("192.0.2.1", 500, 3000),
        ];
        let mut got = attempts(&plan);
        got.sort_by_key(|a| (a.delay, a.ip.to_string()));
        let mut want: Vec<_> = expected
            .map(|(ip, delay, timeout)| Attempt {
                ip: ip.parse().unwrap(),
                delay: ms(delay),
                timeout: ms(timeout),
            })
            .into();
        want.sort_by_key(|a| (a.delay, a.ip.to_string()));
        assert_eq!(got, want);
        assert_eq!(attempts(&plan)[0].ip, "2001:db8::3".parse::<IpAddr>().unwrap());
        assert_eq!(attempts(&plan)[4].ip, "192.0.2.1".parse::<IpAddr>().unwrap());
        let many = ControlDialPlan { candidates: vec![candidate("192.0.2.1", 0.0, 1.0, 0); 100] };
        assert_eq!(attempts(&many).len(), MAX_ATTEMPTS);
    }
}
