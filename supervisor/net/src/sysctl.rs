//! Network sysctls of the calling thread's namespace.

use std::fs;
use std::io;

use crate::error::{Error, Result, Step};

/// Reads `key`, slashes between its parts (`net/ipv4/ip_forward`); `None` when this kernel or namespace
/// has no such setting.
///
/// # Errors
/// When it is there and cannot be read.
pub fn read(key: &str) -> Result<Option<String>> {
    match fs::read_to_string(path(key)?) {
        Ok(value) => Ok(Some(value.trim().to_owned())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).step(|| format!("read sysctl {key}")),
    }
}

/// Writes `key`; returns false when this kernel or namespace has no such setting.
///
/// # Errors
/// When it is there and cannot be written.
pub fn write(key: &str, value: &str) -> Result<bool> {
    match fs::write(path(key)?, value) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e).step(|| format!("set sysctl {key} to {value}")),
    }
}

/// Interface names are input and part of a key.
fn path(key: &str) -> Result<String> {
    if !key.starts_with("net/") || key.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(Error::Invalid { what: "sysctl", reason: format!("{key} is not a network setting") });
    }
    Ok(format!("/proc/sys/{key}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::in_namespaces;

    #[test]
    fn settings_are_those_of_the_namespace() {
        in_namespaces("sysctl::tests::settings_are_those_of_the_namespace", |_| {
            assert!(write("net/ipv4/ip_forward", "1").unwrap());
            assert_eq!(read("net/ipv4/ip_forward").unwrap().as_deref(), Some("1"));
            assert!(!write("net/ipv4/conf/nosuch/forwarding", "1").unwrap());
            assert_eq!(read("net/ipv4/conf/nosuch/forwarding").unwrap(), None);
            for bad in ["kernel/hostname", "net/../kernel/hostname", "net//x", "/net/x"] {
                assert!(matches!(read(bad), Err(Error::Invalid { .. })), "{bad}");
            }
        });
    }
}
