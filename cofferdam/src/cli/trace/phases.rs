//! The phases of a recorded call: what lies between its events.

use isolation::dispatch::call_trace::CallTrace;
use isolation::domain::recorder::{Event, Happened, MAX_EVENTS};

/// What is done in a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// The other vCPUs and the devices are brought to a halt.
    Hold,
    /// The private VM is made ready.
    Prepare,
    /// The driver runs in its domain, and the kernel functions that it calls there.
    Domain,
    /// The host does what an exit asks for.
    Serve,
    /// The way the function returned is checked.
    Check,
    /// What the call has written is compared with the guest's memory, and that is checked.
    Compare,
    /// It is written to the guest.
    Commit,
    /// It is taken back.
    TakeBack,
    /// It is taken back to be run once more.
    BeginAgain,
    /// The device is let go.
    Release,
    /// The guest's vCPU gets its registers.
    GoBack,
    /// There were more events than are kept.
    NotRecorded,
}

impl Phase {
    /// The one that begins with this; `None` if none does.
    fn after(what: &Happened) -> Option<Self> {
        Some(match what {
            Happened::Gate => Self::Hold,
            Happened::Held | Happened::Prepared => Self::Prepare,
            Happened::Entered => Self::Domain,
            Happened::Exit(_) => Self::Serve,
            Happened::Returned => Self::Check,
            Happened::Commits => Self::Compare,
            Happened::Writes(_) => Self::Commit,
            Happened::TakesBack => Self::TakeBack,
            Happened::BeginsAgain => Self::BeginAgain,
            Happened::Ended(_) => Self::Release,
            Happened::DeviceReleased | Happened::BackInGuest => Self::GoBack,
            _ => return None,
        })
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hold => "hold vCPUs and devices",
            Self::Prepare => "prepare",
            Self::Domain => "in the domain",
            Self::Serve => "serve exits",
            Self::Check => "check the return",
            Self::Compare => "compare pages",
            Self::Commit => "commit",
            Self::TakeBack => "take back",
            Self::BeginAgain => "begin again",
            Self::Release => "let the device go",
            Self::GoBack => "back to the guest",
            Self::NotRecorded => "not recorded",
        }
    }
}

/// A phase of a call.
#[derive(Debug, Clone, Copy)]
pub struct Span<'a> {
    /// What is done.
    pub phase: Phase,
    /// When it begins, in nanoseconds of the host's `CLOCK_MONOTONIC`.
    pub begin_ns: u64,
    /// When it ends.
    pub end_ns: u64,
    /// The event that it begins with, and those in it.
    pub events: &'a [Event],
}

/// The phases of a call, one after the other from its first event to its last.
pub fn spans(call: &CallTrace) -> Vec<Span<'_>> {
    let events = &call.events;
    let begins = events.iter().enumerate();
    let begins: Vec<(usize, Phase)> = begins
        .filter_map(|(index, event)| Some((index, Phase::after(&event.what)?)))
        .collect();
    let mut spans = Vec::with_capacity(begins.len());
    for (number, (index, phase)) in begins.iter().enumerate() {
        let next = begins.get(number + 1).map(|(next, _)| *next);
        let within = &events[*index..next.unwrap_or(events.len())];
        let last = next.unwrap_or(events.len() - 1);
        // What was left out lies behind the last of those that there is room for.
        let has_gap = call.left_out > 0 && (*index..last).contains(&(MAX_EVENTS - 1));
        spans.push(Span {
            phase: match has_gap {
                true => Phase::NotRecorded,
                false => *phase,
            },
            begin_ns: events[*index].at_ns,
            end_ns: events[last].at_ns,
            events: within,
        });
    }
    spans
}
