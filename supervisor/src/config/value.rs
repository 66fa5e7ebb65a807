//! Values of single keys: durations, port ranges, secrets.

use std::fmt;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use podtether_proto::secret::SecretString;
use zeroize::Zeroizing;

/// Largest secret file that is read.
const MAX_SECRET_BYTES: usize = 8192;

/// Where a secret comes from. Read late, so that a rotated file is noticed.
#[derive(Clone, PartialEq, Eq)]
pub enum SecretSource {
    /// A file, read each time; surrounding white space does not count.
    File(PathBuf),
    /// From the environment.
    Value(SecretString),
}

impl SecretSource {
    /// The secret now.
    ///
    /// # Errors
    /// One sentence that names the file.
    pub fn read(&self) -> Result<SecretString, String> {
        match self {
            SecretSource::Value(value) => Ok(value.clone()),
            SecretSource::File(path) => {
                let bytes = Zeroizing::new(
                    std::fs::read(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?,
                );
                if bytes.len() > MAX_SECRET_BYTES {
                    return Err(format!("{} is too long for a secret", path.display()));
                }
                let text = std::str::from_utf8(&bytes)
                    .map_err(|_| format!("{} holds no text", path.display()))?
                    .trim();
                if text.is_empty() {
                    return Err(format!("{} is empty", path.display()));
                }
                Ok(SecretString::new(text.to_owned()))
            }
        }
    }
}

impl fmt::Debug for SecretSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SecretSource::File(path) => write!(f, "{}", path.display()),
            SecretSource::Value(_) => f.write_str("(from the environment)"),
        }
    }
}

/// `90`, `90s`, `5m`, `2h`, `1h30m`, `250ms`.
///
/// # Errors
/// One sentence.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("`{text}` is no duration (write 30s, 5m, 2h)");
    let mut rest = text.trim();
    if rest.is_empty() {
        return Err(bad());
    }
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let number: u64 = rest[..digits].parse().map_err(|_| bad())?;
        rest = &rest[digits..];
        let unit = rest.bytes().take_while(u8::is_ascii_alphabetic).count();
        let millis: u64 = match &rest[..unit] {
            "ms" => 1,
            "s" | "" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(bad()),
        };
        if unit == 0 && rest.len() != unit {
            return Err(bad());
        }
        rest = &rest[unit..];
        total = total.saturating_add(Duration::from_millis(number.checked_mul(millis).ok_or_else(bad)?));
    }
    Ok(total)
}

/// `FIRST-LAST`; empty for any port.
///
/// # Errors
/// One sentence.
pub(super) fn parse_port_range(text: &str) -> Result<Option<RangeInclusive<u16>>, String> {
    let text = text.trim();
    if text.is_empty() {
        return Ok(None);
    }
    let bad = || format!("`{text}` is no port range (write 41641-41740)");
    let (first, last) = text.split_once('-').ok_or_else(bad)?;
    let first: u16 = first.trim().parse().map_err(|_| bad())?;
    let last: u16 = last.trim().parse().map_err(|_| bad())?;
    if first == 0 || first > last {
        return Err(bad());
    }
    Ok(Some(first..=last))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        let ms = |text| parse_duration(text).map(|d| d.as_millis());
        assert_eq!(ms("5m"), Ok(300_000));
        assert_eq!(ms("0s"), Ok(0));
        assert_eq!(ms("90"), Ok(90_000));
        assert_eq!(ms("1h30m"), Ok(5_400_000));
        assert_eq!(ms("250ms"), Ok(250));
        for bad in ["", "m", "5x", "5 m", "-1s", "99999999999999999999s", "18446744073709551615h"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn port_ranges() {
        assert_eq!(parse_port_range(""), Ok(None));
        assert_eq!(parse_port_range("41641-41740"), Ok(Some(41641..=41740)));
        for bad in ["41641", "0-5", "9-5", "1-70000", "a-b"] {
            assert!(parse_port_range(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_secret_never_prints_and_is_trimmed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(&path, "  tskey-auth-1\n").unwrap();
        let source = SecretSource::File(path.clone());
        assert_eq!(source.read().unwrap().expose(), "tskey-auth-1");
        std::fs::write(&path, "\n").unwrap();
        assert!(source.read().unwrap_err().contains("is empty"));
        let value = SecretSource::Value(SecretString::new("hush".into()));
        assert!(!format!("{value:?}").contains("hush"));
    }
}
