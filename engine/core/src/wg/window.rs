//! Which counters of a session were seen (RFC 6479): a ring of bits behind the highest one.

/// Counters so far behind the highest one are taken for old, however few of them were seen: several receive calls,
/// and what two paths of unlike length put between packets.
const BITS: u64 = 2048;
const WORD: u64 = u64::BITS as u64;
/// One word more than the window is wide, so that a word can be cleared while none of the window is lost.
const WORDS: usize = 33;
const _: () = assert!(BITS == 32 * WORD, "all but one of the words");

/// The counters seen lately.
#[derive(Debug)]
pub(super) struct Window {
    words: [u64; WORDS],
    /// One more than the highest counter seen.
    next: u64,
}

impl Default for Window {
    fn default() -> Self {
        Self { words: [0; WORDS], next: 0 }
    }
}

impl Window {
    fn place(counter: u64) -> (usize, u64) {
        let word = usize::try_from(counter / WORD).map_or(0, |word| word % WORDS);
        (word, 1 << (counter % WORD))
    }

    /// Whether `counter` was not seen and is not too old to tell.
    pub(super) fn may_be_new(&self, counter: u64) -> bool {
        if counter >= self.next {
            return true;
        }
        let (word, bit) = Self::place(counter);
        counter.saturating_add(BITS) >= self.next && self.words[word] & bit == 0
    }

    /// Notes a counter that may be new, of a message that is authentic.
    pub(super) fn note(&mut self, counter: u64) {
        if counter >= self.next {
            let newest = counter / WORD;
            let seen = self.next.checked_sub(1).map(|highest| highest / WORD);
            let fresh = seen.map_or(u64::MAX, |seen| newest - seen);
            for word in (0..=newest).rev().take(usize::try_from(fresh).map_or(WORDS, |n| n.min(WORDS))) {
                self.words[Self::place(word * WORD).0] = 0;
            }
            self.next = counter + 1;
        }
        let (word, bit) = Self::place(counter);
        self.words[word] |= bit;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    /// What the window says of counters in this order, and what a set that forgets nothing says.
    fn agrees(counters: &[u64]) {
        let (mut window, mut seen, mut highest) = (Window::default(), HashSet::new(), None);
        for counter in counters {
            let old = highest.is_some_and(|highest: u64| counter + BITS < highest + 1);
            let new = !old && !seen.contains(counter);
            assert_eq!(window.may_be_new(*counter), new, "{counter} after {highest:?}");
            if new {
                window.note(*counter);
                seen.insert(*counter);
                highest = highest.max(Some(*counter));
            }
        }
    }

    #[test]
    fn a_jump_of_any_length_forgets_just_what_is_behind_it() {
        for jump in [1, 63, 64, 65, BITS - 1, BITS, BITS + 1, BITS + 64, BITS + 65, 3 * BITS, 1 << 40] {
            for start in [0, 1, 63, 64, 5 * BITS + 7] {
                let mut counters: Vec<u64> = (start.saturating_sub(3 * WORD)..=start).collect();
                let top = start + jump;
                counters.push(top);
                counters.extend((top.saturating_sub(BITS + 70)..=top).rev());
                agrees(&counters);
            }
        }
    }

    proptest! {
        #[test]
        fn any_order_of_counters_is_judged_as_by_a_set(
            steps in proptest::collection::vec((0_u64..3000, any::<bool>()), 1..600)
        ) {
            let mut at = 4000_u64;
            let counters: Vec<u64> = steps
                .into_iter()
                .map(|(step, back)| if back { at.saturating_sub(step) } else { at += step; at })
                .collect();
            agrees(&counters);
        }
    }
}
