//! Sets of node capabilities. Tailnets give the same few sets to thousands of nodes.

use std::collections::HashSet;
use std::sync::Arc;

use crate::tailcfg::CapMap;

/// Most capabilities of one peer, and longest name of one, bytes.
const MAX_CAPS: usize = 256;
const MAX_CAP_NAME: usize = 255;
/// Most different sets, all peers together.
const MAX_SETS: usize = 4096;

/// Names of capabilities, sorted; none for the empty set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Caps(Option<Arc<[Box<str>]>>);

impl Caps {
    pub(crate) fn has(&self, name: &str) -> bool {
        self.iter().len() > 0
            && self.0.as_ref().is_some_and(|names| names.binary_search_by(|n| (**n).cmp(name)).is_ok())
    }

    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = &str> {
        self.0.as_deref().unwrap_or_default().iter().map(AsRef::as_ref)
    }
}

/// Every set that some peer has, once.
#[derive(Default)]
pub(crate) struct CapSets {
    sets: HashSet<Arc<[Box<str>]>>,
    /// How many there may be before those that nobody has any more are looked for.
    tidy_at: usize,
}

impl CapSets {
    /// The set of `caps`' names, and how many of them were over a bound.
    pub(crate) fn of(&mut self, caps: &CapMap) -> (Caps, u32) {
        let names = caps.keys().filter(|name| name.len() <= MAX_CAP_NAME).take(MAX_CAPS);
        let names: Vec<Box<str>> = names.map(|name| name.as_str().into()).collect();
        let cut = u32::try_from(caps.len() - names.len()).unwrap_or(u32::MAX);
        match self.share(names) {
            Ok(caps) => (caps, cut),
            // Without capabilities rules let the peer do less, never more.
            Err(dropped) => (Caps::default(), cut.saturating_add(dropped)),
        }
    }

    /// The set of sorted `names`.
    pub(crate) fn share(&mut self, names: Vec<Box<str>>) -> Result<Caps, u32> {
        if names.is_empty() {
            return Ok(Caps::default());
        }
        if let Some(known) = self.sets.get(names.as_slice()) {
            return Ok(Caps(Some(known.clone())));
        }
        if self.sets.len() >= self.tidy_at.clamp(16, MAX_SETS) {
            self.sets.retain(|set| Arc::strong_count(set) > 1);
            self.tidy_at = 2 * self.sets.len();
        }
        if self.sets.len() >= MAX_SETS {
            return Err(u32::try_from(names.len()).unwrap_or(u32::MAX));
        }
        let set: Arc<[Box<str>]> = names.into();
        self.sets.insert(set.clone());
        Ok(Caps(Some(set)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(names: &[&str]) -> CapMap {
        names.iter().map(|name| ((*name).to_owned(), Vec::new())).collect()
    }

    #[test]
    fn equal_sets_are_one_and_unused_ones_go() {
        let mut sets = CapSets::default();
        let (a, cut) = sets.of(&map(&["x", "b"]));
        assert_eq!((cut, sets.of(&map(&["b", "x"])).0 == a, sets.sets.len()), (0, true, 1));
        assert!(a.has("x") && a.has("b") && !a.has("a") && !Caps::default().has(""));
        assert_eq!(sets.of(&map(&[])).0, Caps::default());
        for n in 0..10_000 {
            assert_eq!(sets.of(&map(&[&n.to_string()])).1, 0, "each is gone before the next comes");
        }
        assert!(sets.sets.len() < 64, "{}", sets.sets.len());
        assert_eq!(sets.of(&map(&["b", "x"])).0, a, "still the one");
    }

    #[test]
    fn what_is_too_much_is_counted_and_not_kept() {
        let mut sets = CapSets::default();
        let many: Vec<String> = (0..300).map(|n| n.to_string()).chain(["z".repeat(256)]).collect();
        let (caps, cut) = sets.of(&many.iter().map(|name| (name.clone(), Vec::new())).collect());
        assert_eq!((caps.iter().len(), cut), (256, 45));
        let held: Vec<_> = (0..5000).map(|n| sets.of(&map(&[&format!("c{n}")]))).collect();
        assert_eq!(held.iter().filter(|(_, cut)| *cut == 1).count(), 5000 - (MAX_SETS - 1));
    }
}
