//! Which accesses a fault is for, how often it strikes, and what it does: a description, built step
//! by step.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::kind::{At, EdgeKind};
use crate::pci::BarIndex;
use crate::pci::config::BAR_COUNT;

/// Longest access, in bytes.
const MAX_WIDTH: u8 = 8;
/// Most accesses that a fault goes over.
pub const MAX_SPAN: u32 = 10_000_000;
/// Parts of a whole that [`When::Chance`] counts in.
pub const MILLION: u32 = 1_000_000;

/// Loads or stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Loads only.
    Load,
    /// Stores only.
    Store,
}

/// At which of the events that match a fault strikes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum When {
    /// At the first.
    Once,
    /// At each.
    #[default]
    Always,
    /// At every n-th, the n-th first.
    Nth(u64),
    /// At each with this probability in millionths, by the seed.
    Chance(u32),
}

/// A fault to be armed. All that is left out matches everything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EdgeOrder {
    /// What goes wrong.
    pub kind: EdgeKind,
    /// Only loads, or only stores.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direction: Option<Direction>,
    /// Only accesses by this base address register.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bar: Option<BarIndex>,
    /// Only accesses that touch a byte of this range of offsets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offsets: Option<Range<u64>>,
    /// Only accesses of so many bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub width: Option<u8>,
    /// Not at the first so many of the events that match.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub after: u64,
    /// How often it strikes.
    #[serde(default)]
    pub when: When,
    /// What chance and bits that nobody chose come from.
    #[serde(default)]
    pub seed: u64,
    /// Which bits, by the value's own numbering; otherwise one that the seed chooses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask: Option<u64>,
    /// The value of [`EdgeKind::LoadValue`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<u64>,
    /// Over how many later accesses; otherwise [`EdgeKind::default_span`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub span: Option<u32>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde wants a reference")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Why a fault cannot be armed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// There is no such register.
    #[error("there is no base address register {0}: they are 0 to 5")]
    Bar(BarIndex),
    /// No access is in there.
    #[error("no access touches the offsets {0:#x}..{1:#x}: give them from low to high")]
    Offsets(u64, u64),
    /// No access is so wide.
    #[error("no access has {0} bytes: they have 1 to 8")]
    Width(u8),
    /// It would never strike.
    #[error(
        "it would never strike: every n-th begins at 1, a probability is above 0 and at most 1"
    )]
    Never,
    /// No bit would change.
    #[error("with the mask 0 it would change nothing")]
    Mask,
    /// A number of accesses.
    #[error("a fault goes over 1 to {MAX_SPAN} accesses")]
    Span,
    /// A value is missing.
    #[error("load_value needs a value")]
    NoValue,
    /// What does not belong to the kind.
    #[error("{} takes no {what}", .kind.name())]
    Foreign {
        /// Which kind.
        kind: EdgeKind,
        /// What it does not take.
        what: &'static str,
    },
    /// There are too many.
    #[error("{0} faults are armed at this edge already: undo some first")]
    TooMany(usize),
    /// Interrupts go past.
    #[error(
        "interrupts of this function go to the guest without this process, so {} cannot be",
        .0.name()
    )]
    InterruptsUnseen(EdgeKind),
    /// There is no link to lose.
    #[error("this function has no link that can be taken down from here")]
    NoLink,
}

impl EdgeOrder {
    /// A fault of this kind, at every event that it can strike at.
    pub fn new(kind: EdgeKind) -> Self {
        Self {
            kind,
            direction: None,
            bar: None,
            offsets: None,
            width: None,
            after: 0,
            when: When::Always,
            seed: 0,
            mask: None,
            value: None,
            span: None,
        }
    }

    /// Only loads, or only stores.
    pub fn direction(self, direction: Direction) -> Self {
        let direction = Some(direction);
        Self { direction, ..self }
    }

    /// Only accesses by this base address register.
    pub fn bar(self, bar: BarIndex) -> Self {
        let bar = Some(bar);
        Self { bar, ..self }
    }

    /// Only accesses that touch a byte of this range of offsets.
    pub fn offsets(self, offsets: Range<u64>) -> Self {
        let offsets = Some(offsets);
        Self { offsets, ..self }
    }

    /// Only accesses of so many bytes.
    pub fn width(self, bytes: u8) -> Self {
        let width = Some(bytes);
        Self { width, ..self }
    }

    /// Not at the first so many of the events that match.
    pub fn after(self, events: u64) -> Self {
        Self {
            after: events,
            ..self
        }
    }

    /// How often it strikes.
    pub fn when(self, when: When) -> Self {
        Self { when, ..self }
    }

    /// What chance and bits come from.
    pub fn seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// Which bits.
    pub fn mask(self, mask: u64) -> Self {
        let mask = Some(mask);
        Self { mask, ..self }
    }

    /// Which value.
    pub fn value(self, value: u64) -> Self {
        let value = Some(value);
        Self { value, ..self }
    }

    /// Over how many later accesses.
    pub fn span(self, accesses: u32) -> Self {
        let span = Some(accesses);
        Self { span, ..self }
    }

    /// That it can strike, and says nothing that its kind does not know.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), OrderError> {
        let foreign = |what| {
            Err(OrderError::Foreign {
                kind: self.kind,
                what,
            })
        };
        match self.bar {
            Some(bar) if usize::from(bar) >= BAR_COUNT => return Err(OrderError::Bar(bar)),
            _ => {}
        }
        match &self.offsets {
            Some(range) if range.is_empty() => {
                return Err(OrderError::Offsets(range.start, range.end));
            }
            _ => {}
        }
        match self.width {
            Some(width) if !(1..=MAX_WIDTH).contains(&width) => {
                return Err(OrderError::Width(width));
            }
            _ => {}
        }
        match self.when {
            When::Nth(0) | When::Chance(0) => return Err(OrderError::Never),
            When::Chance(parts) if parts > MILLION => return Err(OrderError::Never),
            _ => {}
        }
        match self.mask {
            Some(_) if !self.kind.takes_mask() => return foreign("mask"),
            Some(0) => return Err(OrderError::Mask),
            _ => {}
        }
        match (self.kind, self.value) {
            (EdgeKind::LoadValue, None) => return Err(OrderError::NoValue),
            (EdgeKind::LoadValue, Some(_)) | (_, None) => {}
            (_, Some(_)) => return foreign("value"),
        }
        match (self.span, self.kind.default_span()) {
            (Some(_), None) => return foreign("number of accesses"),
            (Some(span), Some(_)) if !(1..=MAX_SPAN).contains(&span) => {
                return Err(OrderError::Span);
            }
            _ => {}
        }
        match (self.kind.strikes_at(), self.direction) {
            (At::Interrupts, _)
                if self.bar.is_some() || self.offsets.is_some() || self.width.is_some() =>
            {
                foreign("place: it strikes at interrupts")
            }
            (At::Interrupts, Some(_))
            | (At::Loads, Some(Direction::Store))
            | (At::Stores, Some(Direction::Load)) => foreign("such direction"),
            _ => Ok(()),
        }
    }

    /// Whether it is for some accesses only.
    pub(super) fn has_place(&self) -> bool {
        self.direction.is_some()
            || self.bar.is_some()
            || self.offsets.is_some()
            || self.width.is_some()
    }

    /// Over how many later accesses it goes.
    pub(super) fn span_or_default(&self) -> u32 {
        self.span.or(self.kind.default_span()).unwrap_or(1)
    }

    /// Whether it is for this event.
    pub(super) fn matches(&self, event: Event) -> bool {
        let Event::Access {
            direction,
            bar,
            offset,
            width,
        } = event
        else {
            return self.kind.strikes_at() == At::Interrupts;
        };
        let is_its = match self.kind.strikes_at() {
            At::Loads => direction == Direction::Load,
            At::Stores => direction == Direction::Store,
            At::Accesses => true,
            At::Interrupts => false,
        };
        // An access over the end of all offsets touches the last of them.
        let end = offset.saturating_add(width.max(1) as u64);
        let touches =
            |range: &Range<u64>| offset < range.end && (end > range.start || offset == range.start);
        is_its
            && self.direction.is_none_or(|wanted| wanted == direction)
            && self.bar.is_none_or(|wanted| wanted == bar)
            && self.width.is_none_or(|wanted| usize::from(wanted) == width)
            && self.offsets.as_ref().is_none_or(touches)
    }
}

/// What comes by at the edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// An access of the guest's.
    Access {
        /// Which way.
        direction: Direction,
        /// By which base address register.
        bar: BarIndex,
        /// Offset of its first byte.
        offset: u64,
        /// Bytes.
        width: usize,
    },
    /// An interrupt of the function's.
    Interrupt,
}
