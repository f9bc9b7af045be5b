//! Traces of calls of an isolated module: what is to be recorded, and what was.
//!
//! ```text
//!   asked for ─► next call of the function: gate, held ─► Recorder of the domain ─► back in the guest ─► done
//!                  └── one at a time, so many of them, until a time ─────────────────── taken in pieces ◄──┘
//! ```
//!
//! While nothing is asked for a call looks at two pointers here, and at no clock.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use devices::clock::monotonic_ns;
use serde::{Deserialize, Serialize};

use crate::dispatch::armed::{Armed, AtGate};
use crate::dispatch::failed::Failed;
use crate::domain::attempt::Attempt;
use crate::domain::error::DomainError;
use crate::domain::recorder::{Ended, Event, Happened, Recording};
use crate::domain::transaction::{CallEnd, CallResult};

/// Most calls that are recorded at once.
pub const MAX_CALLS: u32 = 64;

/// Most events that are taken at once.
const EVENTS_AT_ONCE: usize = 1024;

/// Longest name of a function that is told, in bytes: the kernel's own limit is 511
/// (`KSYM_NAME_LEN`, include/linux/kallsyms.h).
const MAX_NAME: usize = 128;

/// Which calls of a module are to be recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceOrder {
    /// Those of this isolated function; of any otherwise.
    pub function: Option<String>,
    /// How many: 1 to [`MAX_CALLS`]. A part of a call that comes back from the guest counts as one,
    /// and so does each time that a call is run again.
    pub calls: u32,
    /// None that begins later.
    pub limit: Duration,
}

/// What was recorded of a call, or some of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallTrace {
    /// Name of the function.
    pub function: String,
    /// Number of the guest's vCPU that called it.
    pub vcpu: u8,
    /// It is the part of a call that had gone on in the guest.
    pub comes_back: bool,
    /// Which run of the call it is, from 1.
    pub attempt: u32,
    /// What happened, in this order.
    pub events: Vec<Event>,
    /// Events that were left out, because there were too many.
    pub left_out: u64,
    /// Kernel functions that the driver called through trampolines. Most do so without an exit,
    /// which nobody sees: they have no events and no times.
    pub crossings: u64,
    /// Kernel functions that waited for its end, and that the guest called then.
    pub handed_over: u32,
    /// What it did wrong, if it was taken back.
    pub violation: Option<String>,
}

/// What can be taken of a trace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceTaken {
    /// The oldest call that was recorded, or some more of it; `None` if there is none (yet).
    pub call: Option<CallTrace>,
    /// The rest of it comes next, as a call with only the events that are left.
    pub continues: bool,
    /// More calls are recorded, or can be taken.
    pub more: bool,
    /// Names of the functions in the events, by address.
    pub functions: Vec<(u64, String)>,
    /// Where the module's device is.
    pub bars: Vec<BarPlace>,
}

/// Where the guest has placed a base address register of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BarPlace {
    /// Number of the device's slot.
    pub slot: u8,
    /// Number of the register, 0 to 5.
    pub bar: u8,
    /// It decodes I/O ports.
    pub is_io: bool,
    /// Its first guest physical address or port.
    pub start: u64,
    /// How many bytes.
    pub bytes: u64,
}

/// Records calls of a module.
pub(crate) struct Tracer {
    /// Tells this one from those asked for before and after.
    pub id: u64,
    function: Option<String>,
    left: u32,
    until: Instant,
    /// The one whose events the domain records.
    current: Option<CallTrace>,
    done: VecDeque<CallTrace>,
}

impl Tracer {
    /// One that has recorded nothing.
    pub fn new(order: TraceOrder) -> Self {
        let now = Instant::now();
        Self {
            id: monotonic_ns(),
            function: order.function,
            left: order.calls.min(MAX_CALLS),
            // No limit that overflows was meant to end.
            until: now.checked_add(order.limit).unwrap_or(now),
            current: None,
            done: VecDeque::new(),
        }
    }

    /// The call that was recorded has ended.
    fn end(&mut self, recording: Option<Recording>) {
        if let (Some(mut call), Some(recording)) = (self.current.take(), recording) {
            call.events = recording.events;
            call.left_out = recording.left_out;
            self.done.push_back(call);
        }
    }

    /// Whether calls may come that are to be recorded.
    fn goes_on(&self) -> bool {
        self.current.is_some() || self.left > 0 && Instant::now() < self.until
    }

    /// Takes some of what there is, with the names that `name` gives functions.
    pub fn take(&mut self, name: impl Fn(u64) -> String) -> TraceTaken {
        let mut taken = TraceTaken {
            call: None,
            continues: false,
            more: true,
            functions: Vec::new(),
            bars: Vec::new(),
        };
        if let Some(first) = self.done.front_mut() {
            let rest = first
                .events
                .split_off(first.events.len().min(EVENTS_AT_ONCE));
            let events = std::mem::replace(&mut first.events, rest);
            taken.continues = !first.events.is_empty();
            taken.functions = names(&events, name);
            let head = CallTrace {
                events: Vec::new(),
                ..match taken.continues {
                    true => first.head(),
                    false => self.done.pop_front().unwrap_or_default(),
                }
            };
            taken.call = Some(CallTrace { events, ..head });
        }
        taken.more = !self.done.is_empty() || self.goes_on();
        taken
    }
}

impl Default for CallTrace {
    fn default() -> Self {
        Self {
            function: String::new(),
            vcpu: 0,
            comes_back: false,
            attempt: 1,
            events: Vec::new(),
            left_out: 0,
            crossings: 0,
            handed_over: 0,
            violation: None,
        }
    }
}

impl CallTrace {
    /// The same without its events.
    fn head(&self) -> Self {
        Self {
            function: self.function.clone(),
            events: Vec::new(),
            violation: self.violation.clone(),
            ..*self
        }
    }
}

/// Names of the functions in `events`.
fn names(events: &[Event], name: impl Fn(u64) -> String) -> Vec<(u64, String)> {
    let addresses: BTreeSet<u64> = events
        .iter()
        .filter_map(|event| match event.what {
            Happened::Calls(function) | Happened::CallsBack(function) => Some(function),
            _ => None,
        })
        .collect();
    let short = |at: u64| {
        let name = name(at);
        name.chars()
            .filter(char::is_ascii_graphic)
            .take(MAX_NAME)
            .collect()
    };
    addresses.into_iter().map(|at| (at, short(at))).collect()
}

/// How it ended.
pub(super) fn ended(result: &Result<CallResult, DomainError>) -> Happened {
    Happened::Ended(match result.as_ref().map(|result| &result.end) {
        Ok(CallEnd::Committed) => Ended::Committed,
        Ok(CallEnd::Aborted(_)) => Ended::TakenBack,
        Ok(CallEnd::PassThrough(reason)) => Ended::PassedThrough(*reason),
        Ok(CallEnd::Spilled(reason, _)) => Ended::GoesOnInGuest(*reason),
        Err(_) => Ended::DomainFailed,
    })
}

impl Armed {
    /// A call, or a part of one, is about to be run: it is recorded if that is asked for.
    pub(super) fn begin_trace(
        &mut self,
        gate: u64,
        (attempt, comes_back): (Attempt, bool),
        at: &AtGate<'_>,
    ) {
        // The run before this one, of a call that is run again.
        self.end_trace();
        let (Some(tracer), Some(gate)) = (&mut self.tracer, self.gates.get(&gate)) else {
            return;
        };
        let function = &gate.entry.name;
        let is_meant = tracer.function.as_ref().is_none_or(|one| one == function);
        if !is_meant || tracer.left == 0 || Instant::now() >= tracer.until {
            return;
        }
        tracer.left -= 1;
        tracer.current = Some(CallTrace {
            function: function.clone(),
            vcpu: at.index,
            comes_back,
            attempt: attempt.number,
            ..CallTrace::default()
        });
        // Times of one clock, and the later ones not before the earlier ones.
        let since = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let now_ns = monotonic_ns();
        let gate_ns = now_ns.saturating_sub(since(at.reached.elapsed()));
        let held_ns = gate_ns.saturating_add(since(at.holding)).min(now_ns);
        let event = |at_ns, what| Event { at_ns, what };
        let before = [
            event(gate_ns, Happened::Gate),
            event(held_ns, Happened::Held),
        ];
        match attempt.number {
            ..=1 => self.domain.recorder.begin(&before),
            _ => self.domain.recorder.begin(&[event(now_ns, Happened::Held)]),
        }
    }

    /// What the call that is recorded has cost.
    pub(super) fn trace_result(&mut self, result: &Result<CallResult, DomainError>) {
        let call = self
            .tracer
            .as_mut()
            .and_then(|tracer| tracer.current.as_mut());
        if let (Some(call), Ok(result)) = (call, result) {
            call.crossings = result.stats.crossings;
            call.handed_over = result.stats.handed_over;
        }
    }

    /// What the call that is recorded has done wrong.
    pub(super) fn trace_violation(&mut self, failed: &Failed) {
        let call = self
            .tracer
            .as_mut()
            .and_then(|tracer| tracer.current.as_mut());
        if let Some(call) = call {
            let report = failed.clone().named(&self.guest.knowledge.symbols);
            call.violation = Some(report.to_string());
        }
    }

    /// The guest's vCPU goes on.
    pub(crate) fn back_in_guest(&mut self) {
        self.domain.recorder.note(|| Happened::BackInGuest);
        self.end_trace();
    }

    /// What is recorded has ended.
    fn end_trace(&mut self) {
        if let Some(tracer) = &mut self.tracer {
            tracer.end(self.domain.recorder.end());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_of_many_events_is_taken_in_pieces_with_short_names() {
        let order = TraceOrder {
            function: None,
            calls: u32::MAX,
            limit: Duration::from_secs(3600),
        };
        let mut tracer = Tracer::new(order);
        assert_eq!(tracer.left, MAX_CALLS);
        let event = |at_ns| Event {
            at_ns,
            what: Happened::Calls(at_ns),
        };
        let all: Vec<Event> = (0..2 * EVENTS_AT_ONCE as u64 + 5).map(event).collect();
        for function in ["first", "second"] {
            tracer.current = Some(CallTrace {
                function: function.to_owned(),
                violation: Some("what it did".to_owned()),
                ..CallTrace::default()
            });
            tracer.end(Some(Recording {
                events: all.clone(),
                left_out: 3,
            }));
        }
        for function in ["first", "second"] {
            let mut events = Vec::new();
            for continues in [true, true, false] {
                let taken = tracer.take(|at| format!("{at}\n{}", "x".repeat(1000)));
                assert_eq!((taken.continues, taken.more), (continues, true));
                let names = taken.functions.iter().map(|(_, name)| name);
                assert!(names.clone().all(|name| name.len() == MAX_NAME));
                let call = taken.call.unwrap();
                assert_eq!((call.function.as_str(), call.left_out), (function, 3));
                assert_eq!(call.violation.as_deref(), Some("what it did"));
                assert_eq!(names.count(), call.events.len());
                events.extend(call.events);
            }
            assert_eq!(events, all);
        }
        assert_eq!(tracer.take(|_| String::new()).call, None);
        tracer.left = 0;
        assert!(!tracer.take(|_| String::new()).more);
    }
}
