//! Field deserializers for a peer that writes Go's JSON: null for anything empty, and now and then a
//! value this build does not know.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;

use serde::de::{DeserializeOwned, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Null is the default; anything else must fit.
pub(super) fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// Whatever does not fit is the default. Only for fields whose loss cannot widen access.
pub(super) fn soft<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned + Default,
{
    Ok(T::deserialize(Value::deserialize(deserializer)?).unwrap_or_default())
}

/// Null is empty, elements that do not fit are skipped.
pub(super) fn list<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned,
{
    Ok(opt_list(deserializer)?.unwrap_or_default())
}

/// As [`list`], telling null from empty.
pub(super) fn opt_list<'de, D, T>(deserializer: D) -> Result<Option<Vec<T>>, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned,
{
    Ok(Option::<Elements<T>>::deserialize(deserializer)?.map(|e| e.0))
}

/// A map without the entries whose key or value does not fit. Null is empty.
pub(super) fn map<'de, D, K, V>(deserializer: D) -> Result<BTreeMap<K, V>, D::Error>
where
    D: Deserializer<'de>,
    K: FromStr + Ord,
    V: DeserializeOwned,
{
    Ok(opt_map(deserializer)?.unwrap_or_default())
}

/// As [`map`], telling null from empty.
pub(super) fn opt_map<'de, D, K, V>(deserializer: D) -> Result<Option<BTreeMap<K, V>>, D::Error>
where
    D: Deserializer<'de>,
    K: FromStr + Ord,
    V: DeserializeOwned,
{
    Ok(Option::<Entries<K, V>>::deserialize(deserializer)?.map(|e| e.0))
}

/// A list whose odd elements are gone; null is empty. For lists inside other containers.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(transparent)]
pub(super) struct Elements<T>(pub(super) Vec<T>);

impl<'de, T: DeserializeOwned> Deserialize<'de> for Elements<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Seq<T>(PhantomData<T>);
        impl<'de, T: DeserializeOwned> Visitor<'de> for Seq<T> {
            type Value = Vec<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list or null")
            }

            fn visit_unit<E>(self) -> Result<Vec<T>, E> {
                Ok(Vec::new())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
                let mut kept = Vec::new();
                while let Some(value) = seq.next_element::<Value>()? {
                    match T::deserialize(value) {
                        Ok(element) => kept.push(element),
                        Err(error) => tracing::debug!(%error, "skipped a list element"),
                    }
                }
                Ok(kept)
            }
        }
        deserializer.deserialize_any(Seq(PhantomData)).map(Self)
    }
}

struct Entries<K, V>(BTreeMap<K, V>);

impl<'de, K: FromStr + Ord, V: DeserializeOwned> Deserialize<'de> for Entries<K, V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs<K, V>(PhantomData<(K, V)>);
        impl<'de, K: FromStr + Ord, V: DeserializeOwned> Visitor<'de> for Pairs<K, V> {
            type Value = BTreeMap<K, V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object or null")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut kept = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, Value>()? {
                    match (key.parse::<K>(), V::deserialize(value)) {
                        (Ok(key), Ok(value)) => {
                            kept.insert(key, value);
                        }
                        (Err(_), _) => tracing::debug!("skipped a map entry with an odd key"),
                        (_, Err(error)) => tracing::debug!(%error, "skipped a map entry"),
                    }
                }
                Ok(kept)
            }
        }
        deserializer.deserialize_map(Pairs(PhantomData)).map(Self)
    }
}
