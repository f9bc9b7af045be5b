//! What the edge holds while faults are armed: the faults, and what is on its way.

use std::collections::VecDeque;

use super::fault::{Bend, Fault};
use super::interrupts::{Interrupts, Source};
use super::kind::EdgeKind;
use super::order::{Direction, Event};
use crate::pci::BarIndex;

/// Most stores that are late at a time; one more makes the oldest arrive.
const MAX_LATE: usize = 64;
/// Longest store.
const MAX_STORE: usize = 8;

/// A store that is late.
#[derive(Debug)]
pub(super) struct LateStore {
    pub bar: BarIndex,
    pub offset: u64,
    pub data: Vec<u8>,
    /// Accesses that come first.
    left: u32,
}

/// What an access comes to.
#[derive(Debug)]
pub(super) struct Plan {
    /// Stores that arrive before it.
    pub first: Vec<LateStore>,
    /// What becomes of it.
    pub fate: Fate,
}

/// What becomes of an access.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It reaches the function; its value is changed on the way.
    Passes(Bend),
    /// It never reaches the function.
    Lost,
    /// It reaches the function behind so many accesses.
    Late(Bend, u32),
}

/// How far the function is there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Presence {
    /// It answers.
    #[default]
    There,
    /// It does not answer, its configuration space does.
    Silent,
    /// Nothing answers.
    Removed,
}

/// The link as the edge wants it, and as the function was told last.
#[derive(Debug, Default)]
pub(super) struct Cable {
    /// It is out for so many accesses.
    out_for: u32,
    /// The function was told that it is out.
    told_out: bool,
}

impl Cable {
    /// What the function has to be told, if it was told something else.
    pub fn news(&mut self) -> Option<bool> {
        let is_out = self.out_for > 0;
        let changed = std::mem::replace(&mut self.told_out, is_out) != is_out;
        changed.then_some(!is_out)
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct State {
    pub faults: Vec<Fault>,
    /// Number of the fault that was armed last.
    pub last_number: u64,
    pub presence: Presence,
    pub interrupts: Interrupts,
    pub cable: Cable,
    late: VecDeque<LateStore>,
}

impl State {
    /// An access has come.
    pub fn access(
        &mut self,
        direction: Direction,
        (bar, offset): (BarIndex, u64),
        width: usize,
    ) -> Plan {
        self.interrupts.access();
        self.cable.out_for = self.cable.out_for.saturating_sub(1);
        let mut first = Vec::new();
        self.late.retain_mut(|store| {
            store.left = store.left.saturating_sub(1);
            let is_due = store.left == 0;
            if is_due {
                first.push(LateStore {
                    data: std::mem::take(&mut store.data),
                    ..*store
                });
            }
            !is_due
        });
        let event = Event::Access {
            direction,
            bar,
            offset,
            width,
        };
        let (mut bend, mut lost, mut late) = (Bend::NONE, false, None);
        for fault in &mut self.faults {
            if !fault.strikes(event) {
                continue;
            }
            let order = fault.order();
            let span = order.span_or_default();
            match order.kind {
                EdgeKind::StoreLost => lost = true,
                EdgeKind::StoreLate => late = Some(span),
                EdgeKind::InterruptStray => self.interrupts.stray(),
                // This access is not one of them.
                EdgeKind::LinkFlap => self.cable.out_for = span,
                _ => bend = bend.then(fault.bend(width)),
            }
        }
        self.look_who_is_there();
        let fate = match late {
            _ if lost || self.presence > Presence::There => Fate::Lost,
            Some(after) => Fate::Late(bend, after),
            None => Fate::Passes(bend),
        };
        if self.presence > Presence::There {
            self.late.clear();
            first.clear();
        }
        Plan { first, fate }
    }

    /// Keeps a store until `after` accesses have come. What there is no room for any more arrives
    /// now.
    pub fn keep(
        &mut self,
        (bar, offset): (BarIndex, u64),
        data: &[u8],
        after: u32,
    ) -> Option<LateStore> {
        let oldest = match self.late.len() {
            0..MAX_LATE => None,
            _ => self.late.pop_front(),
        };
        self.late.push_back(LateStore {
            bar,
            offset,
            data: data.iter().take(MAX_STORE).copied().collect(),
            left: after,
        });
        oldest
    }

    /// The function raises an interrupt.
    pub fn interrupt(&mut self, source: Source) {
        self.interrupts.note(&source);
        self.interrupts.event();
        let (mut lost, mut late, mut storm) = (false, None, None);
        for fault in &mut self.faults {
            if !fault.strikes(Event::Interrupt) {
                continue;
            }
            let span = fault.order().span_or_default();
            match fault.order().kind {
                EdgeKind::InterruptLost => lost = true,
                EdgeKind::InterruptLate => late = Some(span),
                EdgeKind::InterruptStorm => storm = Some(span),
                _ => {}
            }
        }
        match (late, storm) {
            _ if lost || self.presence > Presence::There => {}
            (Some(events), _) => self.interrupts.delay(source, events),
            (None, Some(accesses)) => self.interrupts.storm(source, accesses),
            (None, None) => source.raise(),
        }
    }

    /// Brings presence in line with the faults. A function that has gone has no interrupts.
    pub fn look_who_is_there(&mut self) {
        let presence = self.faults.iter().map(|fault| match fault.order().kind {
            EdgeKind::Removed if fault.has_lasting_effect() => Presence::Removed,
            EdgeKind::Silent if fault.has_lasting_effect() => Presence::Silent,
            _ => Presence::There,
        });
        let presence = presence.max().unwrap_or_default();
        match (self.presence, presence) {
            (Presence::There, Presence::There) => {}
            (Presence::There, _) => self.interrupts.silence(),
            (_, Presence::There) => self.interrupts.settle(),
            _ => {}
        }
        self.presence = presence;
    }

    /// What is on its way never arrives.
    pub fn forget_on_the_way(&mut self) {
        self.late.clear();
        self.interrupts.forget();
    }

    /// Faults other than those of `faults` have ended: what they held up arrives.
    pub fn settle(&mut self) -> Vec<LateStore> {
        let has = |kind| self.faults.iter().any(|fault| fault.order().kind == kind);
        if !has(EdgeKind::LinkFlap) {
            self.cable.out_for = 0;
        }
        let late = match has(EdgeKind::StoreLate) {
            true => Vec::new(),
            false => self.late.drain(..).collect(),
        };
        self.look_who_is_there();
        if self.presence == Presence::There {
            self.interrupts.settle();
        }
        late
    }
}
