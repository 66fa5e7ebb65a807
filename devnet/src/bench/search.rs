//! The highest offered rate that arrives, by bisection.

/// Halves what is left between a rate that arrived and one that did not.
#[derive(Debug, Clone, PartialEq)]
pub struct Search {
    /// Everything up to here is taken to arrive.
    low: f64,
    /// This does not.
    high: f64,
    steps: usize,
}

impl Search {
    /// Below a rate that did not arrive, in so many steps.
    #[must_use]
    pub fn below(high: f64, steps: usize) -> Self {
        Self { low: 0.0, high, steps }
    }

    /// The rate to try now; `None` at the end.
    #[must_use]
    pub fn rate(&self) -> Option<f64> {
        (self.steps > 0).then(|| f64::midpoint(self.low, self.high))
    }

    /// What became of [`Search::rate`].
    pub fn tried(&mut self, arrived: bool) {
        let Some(rate) = self.rate() else { return };
        self.steps -= 1;
        if arrived {
            self.low = rate;
        } else {
            self.high = rate;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_found_from_both_sides() {
        for limit in [0.0, 0.1, 3.3, 7.99, 8.0] {
            let mut search = Search::below(8.0, 10);
            let mut best = 0.0;
            let mut tries = 0;
            while let Some(rate) = search.rate() {
                let arrived = rate <= limit;
                if arrived {
                    best = rate;
                }
                search.tried(arrived);
                tries += 1;
            }
            assert_eq!(tries, 10);
            assert!(best <= limit && limit - best <= 8.0 / 512.0, "{best} for {limit}");
        }
        let mut over = Search::below(8.0, 0);
        over.tried(true);
        assert_eq!(over, Search::below(8.0, 0), "at its end it stays as it is");
    }
}
