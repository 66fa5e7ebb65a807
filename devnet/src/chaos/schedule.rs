//! Which events happen, in which order: a pure function of the seed.

use std::time::Duration;

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// `kill -9` of the engine of home pod number `victim`.
    EngineKill {
        /// Counted from 0.
        victim: usize,
    },
    /// SIGSTOP of that engine.
    EngineStop {
        /// Counted from 0.
        victim: usize,
    },
    /// That engine is replaced on request, by another that is ready before it lets go.
    Handover {
        /// Counted from 0.
        victim: usize,
    },
    /// A process in that engine's cgroup takes more memory than the cgroup may have.
    MemoryBomb {
        /// Counted from 0.
        victim: usize,
    },
    /// `kill -9` of home's supervisor, which is started again after `down`.
    SupervisorKill {
        /// Without a supervisor.
        down: Duration,
    },
    /// `kill -9` of home's supervisor and all its engines; the supervisor is started again after `down`.
    KillEverything {
        /// Without any process.
        down: Duration,
    },
    /// Control and admin API refuse, with all connections cut.
    ControlAway {
        /// How long.
        away: Duration,
    },
    /// All relays refuse, with all connections cut.
    DerpAway {
        /// How long.
        away: Duration,
    },
    /// Control, admin API and relays at once, as when their machine restarts.
    DevnetAway {
        /// How long.
        away: Duration,
    },
    /// Home's uplink has no carrier.
    LinkDown {
        /// How long.
        away: Duration,
    },
}

/// [`Event`] without its particulars.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "as in Event")]
pub enum Kind {
    EngineKill,
    EngineStop,
    MemoryBomb,
    Handover,
    SupervisorKill,
    KillEverything,
    ControlAway,
    DerpAway,
    DevnetAway,
    LinkDown,
}

impl Kind {
    /// In the order of the table.
    pub const ALL: [Self; 10] = [
        Self::EngineKill,
        Self::EngineStop,
        Self::MemoryBomb,
        Self::Handover,
        Self::SupervisorKill,
        Self::KillEverything,
        Self::ControlAway,
        Self::DerpAway,
        Self::DevnetAway,
        Self::LinkDown,
    ];
}

impl Event {
    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::EngineKill { .. } => Kind::EngineKill,
            Self::EngineStop { .. } => Kind::EngineStop,
            Self::MemoryBomb { .. } => Kind::MemoryBomb,
            Self::Handover { .. } => Kind::Handover,
            Self::SupervisorKill { .. } => Kind::SupervisorKill,
            Self::KillEverything { .. } => Kind::KillEverything,
            Self::ControlAway { .. } => Kind::ControlAway,
            Self::DerpAway { .. } => Kind::DerpAway,
            Self::DevnetAway { .. } => Kind::DevnetAway,
            Self::LinkDown { .. } => Kind::LinkDown,
        }
    }
}

/// How many of each kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// [`Event::EngineKill`].
    pub kills: usize,
    /// [`Event::EngineStop`].
    pub stops: usize,
    /// [`Event::MemoryBomb`].
    pub bombs: usize,
    /// [`Event::Handover`].
    pub handovers: usize,
    /// [`Event::SupervisorKill`].
    pub supervisor_kills: usize,
    /// [`Event::KillEverything`].
    pub everything: usize,
    /// Each of the events in which something is away.
    pub outages: usize,
}

impl Counts {
    /// The proportions of a run that is bounded by time alone.
    pub const ROUND: Self =
        Self { kills: 40, stops: 1, bombs: 1, handovers: 4, supervisor_kills: 8, everything: 2, outages: 1 };

    fn kinds(&self) -> Vec<Kind> {
        let each = |kind| match kind {
            Kind::EngineKill => self.kills,
            Kind::EngineStop => self.stops,
            Kind::MemoryBomb => self.bombs,
            Kind::Handover => self.handovers,
            Kind::SupervisorKill => self.supervisor_kills,
            Kind::KillEverything => self.everything,
            Kind::ControlAway | Kind::DerpAway | Kind::DevnetAway | Kind::LinkDown => self.outages,
        };
        Kind::ALL.into_iter().flat_map(|kind| std::iter::repeat_n(kind, each(kind))).collect()
    }
}

/// splitmix64: the whole run follows from the seed.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`; 0 for 0.
    pub fn below(&mut self, n: usize) -> usize {
        let n = u64::try_from(n).unwrap_or(u64::MAX).max(1);
        usize::try_from(self.next() % n).unwrap_or(0)
    }

    /// From `from` to `to`, in whole milliseconds.
    pub fn between(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.next() % (to - from + 1))
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

/// The events, dealt from a shuffled deck of the given counts; when it is used up, from another one if it
/// is to go on.
#[derive(Debug, Clone)]
pub struct Schedule {
    random: Random,
    pods: usize,
    counts: Counts,
    repeats: bool,
    deck: Vec<Kind>,
    victims: Vec<usize>,
    last_victim: Option<usize>,
}

impl Schedule {
    /// Over `pods` home pods; with `repeats` it never ends, unless there are no events at all.
    #[must_use]
    pub fn new(seed: u64, pods: usize, counts: Counts, repeats: bool) -> Self {
        let mut random = Random::new(seed);
        let mut deck = counts.kinds();
        random.shuffle(&mut deck);
        Self { random, pods, counts, repeats, deck, victims: Vec::new(), last_victim: None }
    }

    /// Every pod once, then every pod once more: an engine killed before it was healthy is another matter.
    fn victim(&mut self) -> usize {
        if self.victims.is_empty() {
            self.victims = (0..self.pods).collect();
            self.random.shuffle(&mut self.victims);
            if self.pods > 1 && self.victims.last().copied() == self.last_victim {
                self.victims.reverse();
            }
        }
        let victim = self.victims.pop().unwrap_or(0);
        self.last_victim = Some(victim);
        victim
    }
}

impl Iterator for Schedule {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        if self.deck.is_empty() && self.repeats {
            self.deck = self.counts.kinds();
            self.random.shuffle(&mut self.deck);
        }
        let kind = self.deck.pop()?;
        Some(match kind {
            Kind::EngineKill => Event::EngineKill { victim: self.victim() },
            Kind::EngineStop => Event::EngineStop { victim: self.victim() },
            Kind::MemoryBomb => Event::MemoryBomb { victim: self.victim() },
            Kind::Handover => Event::Handover { victim: self.victim() },
            Kind::SupervisorKill => Event::SupervisorKill { down: self.random.between(0, 400) },
            Kind::KillEverything => Event::KillEverything { down: self.random.between(0, 400) },
            Kind::ControlAway => Event::ControlAway { away: self.random.between(300, 3000) },
            Kind::DerpAway => Event::DerpAway { away: self.random.between(300, 3000) },
            Kind::DevnetAway => Event::DevnetAway { away: self.random.between(300, 3000) },
            Kind::LinkDown => Event::LinkDown { away: self.random.between(100, 2000) },
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn victim(event: &Event) -> Option<usize> {
        match event {
            Event::EngineKill { victim }
            | Event::EngineStop { victim }
            | Event::MemoryBomb { victim }
            | Event::Handover { victim } => Some(*victim),
            Event::SupervisorKill { .. }
            | Event::KillEverything { .. }
            | Event::ControlAway { .. }
            | Event::DerpAway { .. }
            | Event::DevnetAway { .. }
            | Event::LinkDown { .. } => None,
        }
    }

    proptest! {
        #[test]
        fn a_seed_is_a_schedule(
            seed: u64, pods in 1..120_usize, kills in 0..60_usize, stops in 0..4_usize,
            bombs in 0..4_usize, handovers in 0..4_usize, supervisor_kills in 0..20_usize, everything in 0..9_usize, outages in 0..4_usize,
        ) {
            let counts = Counts { kills, stops, bombs, handovers, supervisor_kills, everything, outages };
            let events: Vec<Event> = Schedule::new(seed, pods, counts, false).collect();
            let again: Vec<Event> = Schedule::new(seed, pods, counts, false).collect();
            prop_assert_eq!(&events, &again);
            let mut by_kind: BTreeMap<Kind, usize> = BTreeMap::new();
            for event in &events {
                *by_kind.entry(event.kind()).or_default() += 1;
            }
            let of = |kind| by_kind.get(&kind).copied().unwrap_or(0);
            prop_assert_eq!(
                [of(Kind::EngineKill), of(Kind::EngineStop), of(Kind::SupervisorKill), of(Kind::KillEverything)],
                [kills, stops, supervisor_kills, everything]
            );
            prop_assert_eq!([of(Kind::MemoryBomb), of(Kind::Handover)], [bombs, handovers]);
            for kind in [Kind::ControlAway, Kind::DerpAway, Kind::DevnetAway, Kind::LinkDown] {
                prop_assert_eq!(of(kind), outages);
            }
            let victims: Vec<usize> = events.iter().filter_map(victim).collect();
            prop_assert!(victims.iter().all(|v| *v < pods));
            for round in victims.chunks_exact(pods) {
                let mut round = round.to_vec();
                round.sort_unstable();
                prop_assert!(round.into_iter().eq(0..pods), "every pod has its turn");
            }
            if pods > 1 {
                prop_assert!(victims.windows(2).all(|two| two[0] != two[1]));
            }
            // One that repeats begins with the same events.
            let endless: Vec<Event> = Schedule::new(seed, pods, counts, true).take(events.len()).collect();
            prop_assert_eq!(endless, events);
        }
    }

    #[test]
    fn seeds_differ_and_a_repeating_schedule_goes_on() {
        let of = |seed| Schedule::new(seed, 4, Counts::ROUND, true).take(500).collect::<Vec<_>>();
        assert_eq!(of(1).len(), 500);
        assert_ne!(of(1), of(2));
        let none = Counts {
            kills: 0,
            stops: 0,
            bombs: 0,
            handovers: 0,
            supervisor_kills: 0,
            everything: 0,
            outages: 0,
        };
        assert_eq!(Schedule::new(1, 4, none, true).next(), None);
    }
}
