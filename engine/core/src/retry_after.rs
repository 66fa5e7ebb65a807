//! `Retry-After`: how long a busy server wants to be left alone (RFC 9110, 10.2.3), as seconds or as a
//! date.

use std::time::Duration;

use crate::tailcfg::UnixTime;

const MONTHS: [&str; 12] =
    ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// How long to wait; none when the header says nothing that makes sense. A date that has passed is no
/// wait at all. `wall` is this machine's time.
#[must_use]
pub fn parse(value: &str, wall: UnixTime) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    Some(http_date(value)?.saturating_since(wall))
}

/// A date in the one form that servers may send, `Wed, 21 Oct 2026 07:28:00 GMT`.
#[must_use]
pub fn http_date(text: &str) -> Option<UnixTime> {
    let (_, rest) = text.split_once(", ")?;
    let mut parts = rest.split(' ');
    let (day, month, year, time) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    if parts.next()? != "GMT" || parts.next().is_some() || day.len() != 2 || year.len() != 4 {
        return None;
    }
    let month = 1 + MONTHS.iter().position(|name| name.eq_ignore_ascii_case(month))?;
    format!("{year}-{month:02}-{day}T{time}Z").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_and_dates() {
        let wall: UnixTime = "2026-10-21T07:27:30Z".parse().unwrap();
        let table = [
            ("0", Some(0)),
            (" 30 ", Some(30)),
            ("Wed, 21 Oct 2026 07:28:00 GMT", Some(30)),
            ("Wed, 21 Oct 2026 08:27:30 GMT", Some(3600)),
            // Passed.
            ("Wed, 21 Oct 2026 07:00:00 GMT", Some(0)),
            ("", None),
            ("soon", None),
            ("-1", None),
            ("1.5", None),
            ("Wed, 21 Oct 2026 07:28:00", None),
            ("Wed, 21 Oct 2026 07:28:00 CET", None),
            ("Wed, 1 Oct 2026 07:28:00 GMT", None),
            ("Wed, 21 Okt 2026 07:28:00 GMT", None),
            ("Wed, 32 Oct 2026 07:28:00 GMT", None),
            ("99999999999999999999999", None),
        ];
        for (value, seconds) in table {
            assert_eq!(parse(value, wall), seconds.map(Duration::from_secs), "{value:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn fuzz_headers_never_panic(text in ".{0,40}") {
            let _ = parse(&text, UnixTime::default());
        }
    }
}
