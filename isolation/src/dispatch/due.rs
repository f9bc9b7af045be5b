//! Which calls a fault is put into.

use devices::edge::{MILLION, Sequence};
use serde::{Deserialize, Serialize};

/// Which calls have a fault in them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WhichCalls {
    /// The last of every so many, and then each until one has used the fault up. None if it is 0.
    Every(u64),
    /// Each with this probability, which a seed decides.
    Chance {
        /// In millionths.
        millionths: u32,
        /// The seed.
        seed: u64,
    },
}

impl WhichCalls {
    /// Every call.
    pub const ALL: Self = Self::Every(1);

    /// Whether no call is meant.
    pub fn is_none(self) -> bool {
        matches!(self, Self::Every(0) | Self::Chance { millionths: 0, .. })
    }
}

/// Decides for one call after the other.
#[derive(Debug, Clone)]
pub(super) struct Due {
    which: WhichCalls,
    /// Calls until the next one that has the fault.
    wait: u64,
    chance: Sequence,
    /// The call that began last has it.
    now: bool,
}

impl Due {
    pub fn new(which: WhichCalls) -> Self {
        let (wait, seed) = match which {
            WhichCalls::Every(every) => (every.saturating_sub(1), 0),
            WhichCalls::Chance { seed, .. } => (0, seed),
        };
        Self {
            which,
            wait,
            chance: Sequence::new(seed),
            now: false,
        }
    }

    /// Whether the call that begins has the fault.
    pub fn begins(&mut self) -> bool {
        self.now = match self.which {
            WhichCalls::Every(0) => false,
            WhichCalls::Every(_) if self.wait > 0 => {
                self.wait -= 1;
                false
            }
            WhichCalls::Every(_) => true,
            WhichCalls::Chance { millionths, .. } => {
                self.chance.below(MILLION.into()) < millionths.into()
            }
        };
        self.now
    }

    /// Whether the call that comes back from the guest has it: what was decided when it began, as
    /// long as it is the one that began last.
    pub fn goes_on(&self) -> bool {
        self.now
    }

    /// A call has used it up.
    pub fn used(&mut self) {
        if let WhichCalls::Every(every) = self.which {
            self.wait = every.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decided(due: &mut Due, calls: usize) -> Vec<bool> {
        (0..calls).map(|_| due.begins()).collect()
    }

    #[test]
    fn every_third_call_has_it_and_the_next_ones_until_it_is_used_up() {
        let mut due = Due::new(WhichCalls::Every(3));
        assert_eq!(decided(&mut due, 4), [false, false, true, true]);
        due.used();
        assert!(due.goes_on(), "in all parts of the call");
        assert_eq!(decided(&mut due, 3), [false, false, true]);
        assert_eq!(decided(&mut Due::new(WhichCalls::ALL), 2), [true; 2]);
        assert_eq!(decided(&mut Due::new(WhichCalls::Every(0)), 2), [false; 2]);
    }

    #[test]
    fn a_call_without_it_has_none_when_it_comes_back() {
        let mut due = Due::new(WhichCalls::Every(2));
        assert!(!due.begins());
        assert!(!due.goes_on());
        assert!(due.begins() && due.goes_on());
    }

    #[test]
    fn chance_is_as_often_as_it_says_and_the_seeds() {
        let chance = |seed| {
            Due::new(WhichCalls::Chance {
                millionths: 250_000,
                seed,
            })
        };
        let drawn = decided(&mut chance(1), 10_000);
        let often = drawn.iter().filter(|due| **due).count();
        assert!((2300..2700).contains(&often), "{often}");
        assert_eq!(drawn, decided(&mut chance(1), 10_000));
        assert_ne!(drawn, decided(&mut chance(2), 10_000));
    }
}
