//! Field deserializers for a peer that writes Go's JSON: null for anything empty, and now and then a
//! value this build does not know.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;

use serde::de::{DeserializeOwned, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

thread_local! {
    static SKIPPED: Cell<u64> = const { Cell::new(0) };
}

/// What `decode` gives, and how many fields, elements and entries it passed over because they did not fit.
pub(crate) fn counting<T>(decode: impl FnOnce() -> T) -> (T, u64) {
    SKIPPED.set(0);
    let decoded = decode();
    (decoded, SKIPPED.get())
}

fn skipped() {
    SKIPPED.set(SKIPPED.get() + 1);
}

/// Null is the default; anything else must fit.
pub(crate) fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
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
    let value = Value::deserialize(deserializer)?;
    let null = value.is_null();
    Ok(T::deserialize(value).unwrap_or_else(|_| {
        if !null {
            skipped();
        }
        T::default()
    }))
}

/// Null is empty, elements that do not fit are skipped.
pub(crate) fn list<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
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

/// As [`list`], and a value of another kind is passed over: for a message's own fields, none of which
/// may cost the others.
pub(super) fn field_list<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned,
{
    Ok(field_opt_list(deserializer)?.unwrap_or_default())
}

/// As [`opt_list`], and a value of another kind is none.
pub(super) fn field_opt_list<'de, D, T>(deserializer: D) -> Result<Option<Vec<T>>, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned,
{
    Ok(Field::<Elements<T>>::deserialize(deserializer)?.0.map(|e| e.0))
}

/// As [`map`], and a value of another kind is passed over.
pub(super) fn field_map<'de, D, K, V>(deserializer: D) -> Result<BTreeMap<K, V>, D::Error>
where
    D: Deserializer<'de>,
    K: FromStr + Ord,
    V: DeserializeOwned,
{
    Ok(field_opt_map(deserializer)?.unwrap_or_default())
}

/// As [`opt_map`], and a value of another kind is none.
pub(super) fn field_opt_map<'de, D, K, V>(deserializer: D) -> Result<Option<BTreeMap<K, V>>, D::Error>
where
    D: Deserializer<'de>,
    K: FromStr + Ord,
    V: DeserializeOwned,
{
    Ok(Field::<Entries<K, V>>::deserialize(deserializer)?.0.map(|e| e.0))
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

/// A list or an object; none for null, and for anything of another kind, which is passed over.
struct Field<T>(Option<T>);

impl<'de, T: Container> Deserialize<'de> for Field<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any<T>(PhantomData<T>);
        impl<'de, T: Container> Visitor<'de> for Any<T> {
            type Value = Option<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any value")
            }

            fn visit_unit<E>(self) -> Result<Option<T>, E> {
                Ok(None)
            }

            fn visit_bool<E>(self, _: bool) -> Result<Option<T>, E> {
                skipped();
                Ok(None)
            }

            fn visit_i64<E>(self, _: i64) -> Result<Option<T>, E> {
                skipped();
                Ok(None)
            }

            fn visit_u64<E>(self, _: u64) -> Result<Option<T>, E> {
                skipped();
                Ok(None)
            }

            fn visit_f64<E>(self, _: f64) -> Result<Option<T>, E> {
                skipped();
                Ok(None)
            }

            fn visit_str<E>(self, _: &str) -> Result<Option<T>, E> {
                skipped();
                Ok(None)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Option<T>, A::Error> {
                T::list(seq)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Option<T>, A::Error> {
                T::object(map)
            }
        }
        deserializer.deserialize_any(Any(PhantomData)).map(Self)
    }
}

/// What a [`Field`] may hold.
trait Container: Sized {
    fn list<'de, A: SeqAccess<'de>>(seq: A) -> Result<Option<Self>, A::Error> {
        IgnoredAny.visit_seq(seq)?;
        skipped();
        Ok(None)
    }

    fn object<'de, A: MapAccess<'de>>(map: A) -> Result<Option<Self>, A::Error> {
        IgnoredAny.visit_map(map)?;
        skipped();
        Ok(None)
    }
}

impl<T: DeserializeOwned> Container for Elements<T> {
    fn list<'de, A: SeqAccess<'de>>(mut seq: A) -> Result<Option<Self>, A::Error> {
        let mut kept = Vec::new();
        while let Some(value) = seq.next_element::<Value>()? {
            match T::deserialize(value) {
                Ok(element) => kept.push(element),
                Err(error) => {
                    skipped();
                    tracing::debug!(%error, "skipped a list element");
                }
            }
        }
        Ok(Some(Self(kept)))
    }
}

impl<K: FromStr + Ord, V: DeserializeOwned> Container for Entries<K, V> {
    fn object<'de, A: MapAccess<'de>>(mut map: A) -> Result<Option<Self>, A::Error> {
        let mut kept = BTreeMap::new();
        while let Some((key, value)) = map.next_entry::<String, Value>()? {
            match (key.parse::<K>(), V::deserialize(value)) {
                (Ok(key), Ok(value)) => {
                    kept.insert(key, value);
                }
                (Err(_), _) => {
                    skipped();
                    tracing::debug!("skipped a map entry with an odd key");
                }
                (_, Err(error)) => {
                    skipped();
                    tracing::debug!(%error, "skipped a map entry");
                }
            }
        }
        Ok(Some(Self(kept)))
    }
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

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Vec<T>, A::Error> {
                Ok(Elements::list(seq)?.map_or_else(Vec::new, |elements| elements.0))
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

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                Ok(Entries::object(map)?.map_or_else(BTreeMap::new, |entries| entries.0))
            }
        }
        deserializer.deserialize_map(Pairs(PhantomData)).map(Self)
    }
}
