//! A fault that is armed: how often it matched, when it strikes, and what it does to a value.

use serde::{Deserialize, Serialize};

use super::kind::EdgeKind;
use super::order::{EdgeOrder, Event, MILLION, When};
use super::sequence::Sequence;

/// Bits of a register, as far as a bit that the seed chooses once for all accesses is concerned.
const REGISTER_BITS: u64 = 32;

/// A fault that is armed, with its counters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EdgeStatus {
    /// Its number at this edge, from 1.
    pub number: u64,
    /// What was ordered.
    pub order: EdgeOrder,
    /// Events that it was for.
    pub matched: u64,
    /// Events that it struck at.
    pub struck: u64,
}

/// What becomes of the bits of a value: those of `and` stay, the others become zero; then those of
/// `xor` flip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bend {
    and: u64,
    xor: u64,
}

impl Bend {
    /// The value as it is.
    pub const NONE: Self = Self {
        and: u64::MAX,
        xor: 0,
    };

    /// This value, whatever it was.
    fn to(value: u64) -> Self {
        Self { and: 0, xor: value }
    }

    /// This, and then `other`.
    pub fn then(self, other: Self) -> Self {
        Self {
            and: self.and & other.and,
            xor: self.xor & other.and ^ other.xor,
        }
    }

    /// Changes `data`, the bytes of a little-endian value; bytes behind the eighth stay.
    pub fn apply(self, data: &mut [u8]) {
        let masks = self.and.to_le_bytes().into_iter();
        let masks = masks.zip(self.xor.to_le_bytes());
        for (byte, (and, xor)) in data.iter_mut().zip(masks) {
            *byte = *byte & and ^ xor;
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Fault {
    status: EdgeStatus,
    sequence: Sequence,
    /// The bits of a kind that is stuck.
    stuck: u64,
}

impl Fault {
    /// Fault number `number`, which has seen nothing yet.
    pub fn new(number: u64, order: EdgeOrder) -> Self {
        let mut sequence = Sequence::new(order.seed);
        let stuck = order
            .mask
            .unwrap_or_else(|| 1 << sequence.below(REGISTER_BITS));
        Self {
            status: EdgeStatus {
                number,
                order,
                matched: 0,
                struck: 0,
            },
            sequence,
            stuck,
        }
    }

    /// How it is.
    pub fn status(&self) -> &EdgeStatus {
        &self.status
    }

    /// What it is.
    pub fn order(&self) -> &EdgeOrder {
        &self.status.order
    }

    /// Whether the device is as [`EdgeKind::lasts`] says: since a strike, or from the beginning,
    /// where it need not wait for an access to match.
    pub fn has_lasting_effect(&self) -> bool {
        let order = self.order();
        let waits = order.when != When::Always || order.after > 0 || order.has_place();
        order.kind.lasts() && (self.status.struck > 0 || !waits)
    }

    /// Whether it strikes at `event`.
    pub fn strikes(&mut self, event: Event) -> bool {
        if !self.status.order.matches(event) {
            return false;
        }
        self.status.matched = self.status.matched.saturating_add(1);
        let Some(which @ 1..) = self.status.matched.checked_sub(self.status.order.after) else {
            return false;
        };
        let strikes = match self.status.order.when {
            When::Once => which == 1,
            When::Always => true,
            When::Nth(n) => n != 0 && which.is_multiple_of(n),
            When::Chance(parts) => self.sequence.below(MILLION.into()) < parts.into(),
        };
        self.status.struck = self.status.struck.saturating_add(strikes.into());
        strikes
    }

    /// What a strike does to the value of an access of `width` bytes.
    pub fn bend(&mut self, width: usize) -> Bend {
        let order = &self.status.order;
        match order.kind {
            EdgeKind::LoadOnes => Bend::to(u64::MAX),
            EdgeKind::LoadZeroes => Bend::to(0),
            EdgeKind::LoadValue => Bend::to(order.value.unwrap_or(0)),
            EdgeKind::StuckOnes => Bend {
                and: !self.stuck,
                xor: self.stuck,
            },
            EdgeKind::StuckZeroes => Bend {
                and: !self.stuck,
                xor: 0,
            },
            EdgeKind::LoadFlipped | EdgeKind::StoreFlipped => {
                let bits = 8 * width.clamp(1, 8) as u64;
                let chosen = order.mask;
                let xor = chosen.unwrap_or_else(|| 1 << self.sequence.below(bits));
                Bend { xor, ..Bend::NONE }
            }
            _ => Bend::NONE,
        }
    }
}
