//! Which run of a call it is: one that fails may be run once more.

use std::time::Duration;

/// How often a call is being run with this run, and what it has had before.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attempt {
    /// 1 for the first.
    pub number: u32,
    /// Time of its own in the runs before this one.
    pub spent: Duration,
}

impl Attempt {
    /// Of a call that enters.
    pub const FIRST: Self = Self {
        number: 1,
        spent: Duration::ZERO,
    };

    /// Whether the call has not failed yet.
    pub fn is_first(self) -> bool {
        self.number == Self::FIRST.number
    }

    /// The one after this.
    pub fn next(self) -> Self {
        Self {
            number: self.number.saturating_add(1),
            ..self
        }
    }

    /// This one, which has ended after a time of its own.
    pub fn after(self, own: Duration) -> Self {
        Self {
            spent: self.spent.saturating_add(own),
            ..self
        }
    }
}
