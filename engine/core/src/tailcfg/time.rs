//! Wall-clock time as the control server writes it.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A wall-clock time: milliseconds since 1970, as RFC 3339 text on the wire.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnixTime(i64);

const DAY_MS: i64 = 86_400_000;

/// Go's zero time, which stands for "no time".
const GO_ZERO: &str = "0001-01-01T00:00:00Z";

/// Text that is not an RFC 3339 time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an RFC 3339 time")]
pub struct ParseTimeError;

impl UnixTime {
    /// This many milliseconds after 1970.
    #[must_use]
    pub const fn from_millis(millis: i64) -> Self {
        Self(millis)
    }

    /// This many seconds after 1970.
    #[must_use]
    pub const fn from_secs(secs: i64) -> Self {
        Self(secs.saturating_mul(1000))
    }

    /// Milliseconds since 1970.
    #[must_use]
    pub const fn as_millis(self) -> i64 {
        self.0
    }

    /// This time moved by a signed number of milliseconds.
    #[must_use]
    pub const fn offset_millis(self, millis: i64) -> Self {
        Self(self.0.saturating_add(millis))
    }

    /// This time and a while.
    #[must_use]
    pub fn saturating_add(self, duration: Duration) -> Self {
        self.offset_millis(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX))
    }

    /// How long after `earlier` this is; zero when it is not.
    #[must_use]
    pub fn saturating_since(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }

    /// Milliseconds from `other` to this time, negative when it is earlier.
    #[must_use]
    pub const fn millis_from(self, other: Self) -> i64 {
        self.0.saturating_sub(other.0)
    }
}

/// Days since 1970 of a date in the proleptic Gregorian calendar.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

impl FromStr for UnixTime {
    type Err = ParseTimeError;

    fn from_str(text: &str) -> Result<Self, ParseTimeError> {
        fn number(text: &[u8]) -> Result<i64, ParseTimeError> {
            if text.is_empty() || text.len() > 9 {
                return Err(ParseTimeError);
            }
            text.iter().try_fold(0i64, |sum, c| {
                if c.is_ascii_digit() { Ok(sum * 10 + i64::from(c - b'0')) } else { Err(ParseTimeError) }
            })
        }
        let text = text.as_bytes();
        let (head, rest) = text.split_at_checked(19).ok_or(ParseTimeError)?;
        for (at, wanted) in [(4, b"-"), (7, b"-"), (13, b":"), (16, b":")] {
            if head[at] != wanted[0] {
                return Err(ParseTimeError);
            }
        }
        if !matches!(head[10], b'T' | b't' | b' ') {
            return Err(ParseTimeError);
        }
        let (year, month, day) = (number(&head[..4])?, number(&head[5..7])?, number(&head[8..10])?);
        let (hour, minute, second) = (number(&head[11..13])?, number(&head[14..16])?, number(&head[17..19])?);
        // A leap second is accepted and lands on the next minute.
        if !(1..=12).contains(&month) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
            return Err(ParseTimeError);
        }
        let (millis, zone) = match rest.split_first() {
            Some((b'.', fraction)) => {
                let digits = fraction.iter().take_while(|c| c.is_ascii_digit()).count();
                let (fraction, zone) = fraction.split_at_checked(digits).ok_or(ParseTimeError)?;
                let mut padded = [b'0'; 3];
                for (to, from) in padded.iter_mut().zip(fraction) {
                    *to = *from;
                }
                if fraction.is_empty() {
                    return Err(ParseTimeError);
                }
                (number(&padded)?, zone)
            }
            _ => (0, rest),
        };
        let offset_minutes = match zone {
            b"Z" | b"z" => 0,
            [sign @ (b'+' | b'-'), h1, h2, b':', m1, m2] => {
                let minutes = number(&[*h1, *h2])? * 60 + number(&[*m1, *m2])?;
                if *sign == b'-' { -minutes } else { minutes }
            }
            _ => return Err(ParseTimeError),
        };
        let seconds = (hour * 60 + minute - offset_minutes) * 60 + second;
        Ok(Self(days_from_civil(year, month, day) * DAY_MS + seconds * 1000 + millis))
    }
}

impl fmt::Display for UnixTime {
    /// RFC 3339 in UTC. Years outside 0 to 9999 have no such form and are clamped.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let clamped =
            self.0.clamp(days_from_civil(0, 1, 1) * DAY_MS, days_from_civil(10_000, 1, 1) * DAY_MS - 1);
        let (year, month, day) = civil_from_days(clamped.div_euclid(DAY_MS));
        let of_day = clamped.rem_euclid(DAY_MS);
        let (seconds, millis) = (of_day / 1000, of_day % 1000);
        write!(
            f,
            "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60
        )?;
        if millis != 0 {
            write!(f, ".{millis:03}")?;
        }
        f.write_str("Z")
    }
}

impl Serialize for UnixTime {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for UnixTime {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// An optional time where null, "" and Go's zero time all mean none, which is written as the latter.
pub(super) mod optional {
    use super::*;

    pub(in super::super) fn deserialize<'de, D>(deserializer: D) -> Result<Option<UnixTime>, D::Error>
    where
        D: Deserializer<'de>,
    {
        match Option::<std::borrow::Cow<'de, str>>::deserialize(deserializer)?.as_deref() {
            None | Some("" | GO_ZERO) => Ok(None),
            Some(text) => text.parse().map(Some).map_err(serde::de::Error::custom),
        }
    }

    // The reference is serde's calling convention.
    #[allow(clippy::ref_option)]
    pub(in super::super) fn serialize<S: Serializer>(
        time: &Option<UnixTime>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match time {
            Some(time) => time.serialize(serializer),
            None => serializer.serialize_str(GO_ZERO),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_what_servers_write() {
        for (text, millis) in [
            ("1970-01-01T00:00:00Z", 0),
            ("1970-01-01T00:02:03Z", 123_000),
            ("2024-02-29T12:30:45.123456789Z", 1_709_209_845_123),
            ("2024-02-29T14:30:45.1+02:00", 1_709_209_845_100),
            ("2024-02-29T07:00:45-05:30", 1_709_209_845_000),
            ("1969-12-31T23:59:59.999Z", -1),
            ("0001-01-01T00:00:00Z", -62_135_596_800_000),
        ] {
            assert_eq!(text.parse::<UnixTime>().unwrap().as_millis(), millis, "{text}");
        }
        for bad in ["", "2024-02-29", "2024-02-29T12:30:45", "2024-13-29T12:30:45Z", "2024-02-29T12:30:45.Z"]
        {
            assert!(bad.parse::<UnixTime>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn text_round_trips(millis in -62_167_219_200_000i64..253_402_300_800_000) {
            let time = UnixTime::from_millis(millis);
            prop_assert_eq!(time.to_string().parse::<UnixTime>().unwrap(), time);
        }

        #[test]
        fn fuzz_time(text in "\\PC{0,40}") {
            let _ = text.parse::<UnixTime>();
        }

        #[test]
        fn fuzz_time_near_valid(text in "[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}[.0-9Z+:-]{0,12}") {
            let _ = text.parse::<UnixTime>();
        }
    }
}
