//! Interrupts at the edge: what the function raises, and what of it the guest gets.
//!
//! ```text
//!   function ─► LineAtEdge: what it wants ─┬─► the line          nothing armed
//!            ─► VectorsAtEdge ─────────────┴─► Interrupts: lost, late, raised again
//! ```

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use super::Edge;
use crate::irq::{IrqLine, LineEvents, MsiMessage, MsiVectors};

/// Most interrupts that are late at a time; one more is late no longer than the oldest.
const MAX_LATE: usize = 64;

/// A line, and the level that its function wants.
pub(super) struct Wanted {
    line: Arc<dyn IrqLine>,
    asserted: AtomicBool,
}

impl Wanted {
    fn is_asserted(&self) -> bool {
        self.asserted.load(Ordering::Relaxed)
    }
}

/// A line of a function as the function has it.
pub(super) struct LineAtEdge {
    edge: Arc<Edge>,
    wanted: Arc<Wanted>,
}

impl IrqLine for LineAtEdge {
    fn set_level(&self, asserted: bool) {
        let rises = !self.wanted.asserted.swap(asserted, Ordering::Relaxed) && asserted;
        if !self.edge.is_armed() {
            self.wanted.line.set_level(asserted);
            return;
        }
        let source = Source::Line(Arc::downgrade(&self.wanted));
        let mut state = self.edge.state();
        match (asserted, rises) {
            (true, true) => state.interrupt(source),
            (true, false) => {}
            (false, _) => state.interrupts.lowered(&source, &self.wanted),
        }
    }

    fn events(&self) -> Option<LineEvents> {
        let events = self.wanted.line.events();
        if events.is_some() {
            self.edge.set_interrupts_unseen();
        }
        events
    }
}

/// The vectors of a function as the function has them.
pub(super) struct VectorsAtEdge {
    edge: Arc<Edge>,
    vectors: Arc<dyn MsiVectors>,
}

impl MsiVectors for VectorsAtEdge {
    fn count(&self) -> u16 {
        self.vectors.count()
    }

    fn route(&self, vector: u16, message: Option<MsiMessage>) {
        self.vectors.route(vector, message);
    }

    fn trigger(&self, vector: u16) {
        if !self.edge.is_armed() {
            self.vectors.trigger(vector);
            return;
        }
        let source = Source::Vector(Arc::downgrade(&self.vectors), vector);
        self.edge.state().interrupt(source);
    }

    fn event(&self, vector: u16) -> Option<vmm_sys_util::eventfd::EventFd> {
        let event = self.vectors.event(vector);
        if event.is_some() {
            self.edge.set_interrupts_unseen();
        }
        event
    }
}

/// Where an interrupt comes from. A function that is gone raises none.
#[derive(Clone)]
pub(super) enum Source {
    /// A line.
    Line(Weak<Wanted>),
    /// A vector.
    Vector(Weak<dyn MsiVectors>, u16),
}

impl Source {
    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Line(one), Self::Line(other)) => one.ptr_eq(other),
            (Self::Vector(one, vector), Self::Vector(other, of_other)) => {
                vector == of_other && std::ptr::addr_eq(one.as_ptr(), other.as_ptr())
            }
            _ => false,
        }
    }

    /// Raises it, if its function still wants that.
    pub fn raise(&self) {
        match self {
            Self::Line(line) => {
                if let Some(line) = line.upgrade().filter(|line| line.is_asserted()) {
                    line.line.set_level(true);
                }
            }
            Self::Vector(vectors, vector) => {
                if let Some(vectors) = vectors.upgrade() {
                    vectors.trigger(*vector);
                }
            }
        }
    }

    /// Raises it, whatever its function wants.
    fn force(&self) {
        match self {
            Self::Line(line) => {
                if let Some(line) = line.upgrade() {
                    line.line.set_level(true);
                }
            }
            Self::Vector(..) => self.raise(),
        }
    }
}

/// An interrupt that arrives, or is raised again, over a number of events.
struct Counted {
    source: Source,
    left: u32,
}

/// What of the function's interrupts is on its way.
#[derive(Default)]
pub(super) struct Interrupts {
    lines: Vec<Weak<Wanted>>,
    /// The vector that was triggered last while a fault was armed.
    last_vector: Option<Source>,
    late: Vec<Counted>,
    storms: Vec<Counted>,
}

impl Interrupts {
    /// An interrupt arrives behind `events` later ones.
    pub fn delay(&mut self, source: Source, events: u32) {
        if self.late.len() >= MAX_LATE {
            self.late.remove(0).source.raise();
        }
        self.late.push(Counted {
            source,
            left: events,
        });
    }

    /// An interrupt is raised, and again at each of the next `accesses`.
    pub fn storm(&mut self, source: Source, accesses: u32) {
        source.force();
        self.storms.retain(|storm| !storm.source.is(&source));
        self.storms.push(Counted {
            source,
            left: accesses,
        });
    }

    /// Raises an interrupt that nobody wants: by the vector that was used last, or by the line.
    pub fn stray(&self) {
        if let Some(vector) = &self.last_vector {
            vector.raise();
            return;
        }
        if let Some(line) = self.lines.iter().find_map(Weak::upgrade) {
            line.line.set_level(true);
            line.line.set_level(line.is_asserted());
        }
    }

    /// Notes what the function triggers.
    pub fn note(&mut self, source: &Source) {
        if matches!(source, Source::Vector(..)) {
            self.last_vector = Some(source.clone());
        }
    }

    /// An event has come: what is late arrives if it is its turn.
    pub fn event(&mut self) {
        self.late.retain_mut(|late| {
            late.left = late.left.saturating_sub(1);
            if late.left == 0 {
                late.source.raise();
            }
            late.left > 0
        });
    }

    /// The guest has accessed the function: storms go on.
    pub fn access(&mut self) {
        self.event();
        let mut ended = false;
        self.storms.retain_mut(|storm| {
            storm.source.force();
            storm.left = storm.left.saturating_sub(1);
            ended |= storm.left == 0;
            storm.left > 0
        });
        if ended {
            self.settle_lines();
        }
    }

    /// The function has lowered its line.
    fn lowered(&mut self, source: &Source, wanted: &Wanted) {
        self.late.retain(|late| !late.source.is(source));
        if !self.storms.iter().any(|storm| storm.source.is(source)) {
            wanted.line.set_level(false);
        }
    }

    /// What is on its way never arrives; lines that a storm held are let go.
    pub fn forget(&mut self) {
        self.late.clear();
        if !std::mem::take(&mut self.storms).is_empty() {
            self.settle_lines();
        }
    }

    /// Lowers all lines; nothing is on its way any more.
    pub fn silence(&mut self) {
        self.forget();
        for line in self.lines.iter().filter_map(Weak::upgrade) {
            line.line.set_level(false);
        }
    }

    /// What is late arrives now, and storms end.
    pub fn settle(&mut self) {
        self.storms.clear();
        for late in self.late.drain(..) {
            late.source.raise();
        }
        self.settle_lines();
    }

    /// Drives all lines to what the function wants.
    fn settle_lines(&mut self) {
        self.lines.retain(|line| line.strong_count() > 0);
        for line in self.lines.iter().filter_map(Weak::upgrade) {
            line.line.set_level(line.is_asserted());
        }
    }
}

impl Edge {
    /// The line that the function is to be made with in place of `line`. Whoever takes its
    /// descriptors raises interrupts that the edge does not see.
    pub fn line(self: &Arc<Self>, line: Arc<dyn IrqLine>) -> Arc<dyn IrqLine> {
        let wanted = Arc::new(Wanted {
            line,
            asserted: AtomicBool::new(false),
        });
        self.state().interrupts.lines.push(Arc::downgrade(&wanted));
        let edge = self.clone();
        Arc::new(LineAtEdge { edge, wanted })
    }

    /// The vectors that the function is to be made with in place of `vectors`, likewise.
    pub fn vectors(self: &Arc<Self>, vectors: Arc<dyn MsiVectors>) -> Arc<dyn MsiVectors> {
        let edge = self.clone();
        Arc::new(VectorsAtEdge { edge, vectors })
    }
}
