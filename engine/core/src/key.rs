//! One type per key role, so that no key can be used in another's place.
//!
//! Public keys are plain values with the text form of the wire (`nodekey:<64 hex digits>` and so on; all
//! zeros means "none"). Private keys are wiped on drop, redact themselves in debug output and have no
//! text form here: whoever stores one asks for its bytes with `expose`.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Length of every key here.
pub const KEY_LEN: usize = 32;

/// Text that is not a public key of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a {prefix} key followed by 64 hex digits")]
pub struct ParseKeyError {
    prefix: &'static str,
}

/// The operating system gave no random bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the system's random source failed")]
pub struct RandomError;

impl NodePublic {
    /// The beginning of the key as people know it from logs of other implementations: five characters of base64.
    #[must_use]
    pub fn short(&self) -> String {
        let mut text = base64::engine::general_purpose::STANDARD.encode(&self.0[..6]);
        text.truncate(5);
        format!("[{text}]")
    }
}

fn parse_hex(text: &str, prefix: &'static str) -> Result<[u8; KEY_LEN], ParseKeyError> {
    let digits = text.strip_prefix(prefix).ok_or(ParseKeyError { prefix })?;
    let mut bytes = [0; KEY_LEN];
    hex::decode_to_slice(digits, &mut bytes).map_err(|_| ParseKeyError { prefix })?;
    Ok(bytes)
}

macro_rules! public_key {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; KEY_LEN]);

        impl $name {
            /// What precedes the hex digits in the text form.
            pub const PREFIX: &'static str = $prefix;

            /// The key with these bytes.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; KEY_LEN]) -> Self {
                Self(bytes)
            }

            /// The key's bytes.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; KEY_LEN] {
                &self.0
            }

            /// True for the zero key, which the protocol uses for "none".
            #[must_use]
            pub fn is_zero(&self) -> bool {
                self.0 == [0; KEY_LEN]
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let mut digits = [0; 2 * KEY_LEN];
                hex::encode_to_slice(self.0, &mut digits).map_err(|_| fmt::Error)?;
                f.write_str($prefix)?;
                f.write_str(std::str::from_utf8(&digits).map_err(|_| fmt::Error)?)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseKeyError;

            fn from_str(text: &str) -> Result<Self, ParseKeyError> {
                parse_hex(text, $prefix).map(Self)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                match Option::<std::borrow::Cow<'de, str>>::deserialize(deserializer)? {
                    None => Ok(Self::default()),
                    Some(text) if text.is_empty() => Ok(Self::default()),
                    Some(text) => text.parse().map_err(serde::de::Error::custom),
                }
            }
        }
    };
}

macro_rules! private_key {
    ($(#[$doc:meta])* $name:ident, $public:ident) => {
        $(#[$doc])*
        #[derive(Clone, Zeroize, ZeroizeOnDrop)]
        pub struct $name([u8; KEY_LEN]);

        impl $name {
            /// A new key from the system's random source, clamped as Curve25519 wants it.
            ///
            /// # Errors
            /// When the system gives no random bytes.
            pub fn generate() -> Result<Self, RandomError> {
                let mut bytes = [0; KEY_LEN];
                getrandom::fill(&mut bytes).map_err(|_| RandomError)?;
                let key = Self::from_bytes(bytes);
                bytes.zeroize();
                Ok(key)
            }

            /// The key with these bytes, clamped.
            #[must_use]
            pub fn from_bytes(mut bytes: [u8; KEY_LEN]) -> Self {
                bytes[0] &= 0xf8;
                bytes[KEY_LEN - 1] = (bytes[KEY_LEN - 1] & 0x7f) | 0x40;
                let key = Self(bytes);
                bytes.zeroize();
                key
            }

            /// The secret bytes, for storing the key or handing it to a cipher.
            #[must_use]
            pub fn expose(&self) -> &[u8; KEY_LEN] {
                &self.0
            }

            /// The matching public key.
            #[must_use]
            pub fn public(&self) -> $public {
                let secret = x25519_dalek::StaticSecret::from(self.0);
                $public::from_bytes(*x25519_dalek::PublicKey::from(&secret).as_bytes())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($name), "(redacted)"))
            }
        }

        impl PartialEq for $name {
            /// Compares the public halves, so that the time taken says nothing about the secret.
            fn eq(&self, other: &Self) -> bool {
                self.public() == other.public()
            }
        }

        impl Eq for $name {}
    };
}

public_key!(
    /// Names a machine to the control server: the static key of the Noise session.
    MachinePublic,
    "mkey:"
);
public_key!(
    /// Names a node to its peers and to DERP: the WireGuard static key.
    NodePublic,
    "nodekey:"
);
public_key!(
    /// Seals path discovery messages.
    DiscoPublic,
    "discokey:"
);
public_key!(
    /// Sent by the control server in its early payload.
    ChallengePublic,
    "chalpub:"
);
private_key!(
    /// Private half of [`MachinePublic`].
    MachinePrivate,
    MachinePublic
);
private_key!(
    /// Private half of [`NodePublic`].
    NodePrivate,
    NodePublic
);
private_key!(
    /// Private half of [`DiscoPublic`].
    DiscoPrivate,
    DiscoPublic
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_half_matches_the_nacl_test_vector() {
        let mut secret = [0; KEY_LEN];
        hex::decode_to_slice("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a", &mut secret)
            .unwrap();
        let public = NodePrivate::from_bytes(secret).public();
        assert_eq!(
            public.to_string(),
            "nodekey:8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
        );
    }

    #[test]
    fn text_form_round_trips_and_refuses_other_roles() {
        let key = DiscoPrivate::generate().unwrap().public();
        assert_eq!(key.to_string().parse::<DiscoPublic>().unwrap(), key);
        for bad in ["", "discokey:", "discokey:00", "nodekey:", &key.to_string()[1..], &format!("{key}0")] {
            assert!(bad.parse::<DiscoPublic>().is_err(), "{bad}");
        }
        assert!(key.to_string().parse::<NodePublic>().is_err());
    }

    #[test]
    fn a_short_key_is_the_beginning_of_the_long_one() {
        let mut bytes = [0; KEY_LEN];
        bytes[..4].copy_from_slice(&[0x00, 0x10, 0x83, 0x10]);
        assert_eq!(NodePublic::from_bytes(bytes).short(), "[ABCDE]");
    }

    #[test]
    fn json_of_nothing_is_the_zero_key() {
        for json in ["null", "\"\"", &format!("\"mkey:{}\"", "0".repeat(64))] {
            assert!(serde_json::from_str::<MachinePublic>(json).unwrap().is_zero(), "{json}");
        }
        assert!(serde_json::from_str::<MachinePublic>("\"mkey:12\"").is_err());
        let key = MachinePublic::from_bytes([7; KEY_LEN]);
        let json = serde_json::to_string(&key).unwrap();
        assert_eq!(serde_json::from_str::<MachinePublic>(&json).unwrap(), key);
    }

    #[test]
    fn private_keys_are_clamped_and_do_not_print() {
        let key = MachinePrivate::from_bytes([0xff; KEY_LEN]);
        assert_eq!(key.expose()[0], 0xf8);
        assert_eq!(key.expose()[31], 0x7f);
        assert_eq!(format!("{key:?}"), "MachinePrivate(redacted)");
        assert_ne!(NodePrivate::generate().unwrap(), NodePrivate::generate().unwrap());
    }
}
