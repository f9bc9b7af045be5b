//! What happens in one call, with times, for who asks for it.
//!
//! Nothing is recorded unless somebody has asked: then each event costs a branch on a pointer that
//! is null, and neither memory nor a look at the clock.
//!
//! An event is the beginning of what it names, or a point in it. The phases of a call lie between
//! those that begin one ([`Happened::begins_phase`]), so that together they are the whole call.

use devices::clock::monotonic_ns;
use devices::hold::DeviceAddress;
use serde::{Deserialize, Serialize};

use super::private_vm::Exit;
use super::transaction::PassThroughReason;

/// Most events of one call that are kept; the others are counted. What a call ends with is kept
/// beyond them, of which there is little.
pub const MAX_EVENTS: usize = 4096;

/// Most of the events that a call ends with.
const MAX_LAST_EVENTS: usize = 16;

/// Why the private VM stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// An `out`: of a stub or a trap of the domain, or to a port of a device.
    Out,
    /// A load from an I/O port.
    In,
    /// A load from an address that is no memory.
    MmioLoad,
    /// A store to an address that is no memory.
    MmioStore,
    /// A model-specific register.
    Msr,
    /// A signal of the host: the guest's vCPU is wanted, or the watchdog looks.
    Interrupt,
    /// The dirty ring is full.
    DirtyRing,
    /// An exception could not be delivered.
    Shutdown,
    /// Anything else.
    Other,
}

impl From<&Exit> for ExitReason {
    fn from(exit: &Exit) -> Self {
        match exit {
            Exit::Out { .. } => Self::Out,
            Exit::In { .. } => Self::In,
            Exit::MmioRead { .. } => Self::MmioLoad,
            Exit::MmioWrite { .. } => Self::MmioStore,
            Exit::MsrRead { .. } | Exit::MsrWrite { .. } => Self::Msr,
            Exit::Interrupted => Self::Interrupt,
            Exit::DirtyRingFull => Self::DirtyRing,
            Exit::Shutdown => Self::Shutdown,
            Exit::Other(_) => Self::Other,
        }
    }
}

/// Where a device was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// Guest physical address.
    Memory(u64),
    /// I/O port.
    Port(u16),
}

impl From<DeviceAddress> for Place {
    fn from(at: DeviceAddress) -> Self {
        match at {
            DeviceAddress::Memory(gpa) => Self::Memory(gpa),
            DeviceAddress::Port(port) => Self::Port(port),
        }
    }
}

/// How a call, or the part of one that came back from the guest, ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ended {
    /// It is in the guest.
    Committed,
    /// It broke a rule and was taken back.
    TakenBack,
    /// The guest runs it, for this reason.
    PassedThrough(PassThroughReason),
    /// It goes on in the guest, for this reason.
    GoesOnInGuest(PassThroughReason),
    /// Something of the domain's own failed.
    DomainFailed,
}

/// What happened in a call. Addresses are the guest's virtual ones where nothing else is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Happened {
    /// The guest's vCPU came to the gate: the others and the devices are being held.
    Gate,
    /// They are held: the call is being prepared.
    Held,
    /// The private VM is ready for it.
    Prepared,
    /// The private VM was entered.
    Entered,
    /// It stopped: the host looks at why.
    Exit(ExitReason),
    /// A page was filled into the page tables.
    Filled(u64),
    /// A page was opened for the driver to write, copied before its first store.
    Opened(u64),
    /// The kernel function at this address is called, at an exit.
    Calls(u64),
    /// A kernel function has returned, at an exit.
    CallReturned,
    /// The kernel calls the driver's function at this address back.
    CallsBack(u64),
    /// That has returned.
    CallBackReturned,
    /// The call has waited for as many microseconds, with the guest standing still.
    Waited(u64),
    /// A register of the device was loaded.
    DeviceLoad {
        /// Where.
        at: Place,
        /// How many bytes: 1 to 8.
        bytes: u8,
        /// What it was answered.
        value: u64,
    },
    /// A register of the device is stored to; the store waits.
    DeviceStore {
        /// Where.
        at: Place,
        /// How many bytes: 1 to 8.
        bytes: u8,
        /// What is stored.
        value: u64,
    },
    /// As many stores that waited reach the device.
    DevicePerforms(u32),
    /// Something was written to the console's port.
    Console(u16),
    /// As many kernel functions have waited for the end of the call and were looked at.
    HandsOver(u32),
    /// The function has returned: the way it returned is checked.
    Returned,
    /// That was good: the pages that it may have written are compared with the guest's.
    Commits,
    /// What has changed, in as many pages, may change: it is written to the guest.
    Writes(u32),
    /// The call is being taken back.
    TakesBack,
    /// It begins again: it goes on in the guest and needs a journal, or what waited has to be
    /// called at once.
    BeginsAgain,
    /// It has ended.
    Ended(Ended),
    /// The device is let go.
    DeviceReleased,
    /// The guest's vCPU goes on.
    BackInGuest,
}

impl Happened {
    /// Whether a phase of the call begins with it, and the one before ends.
    pub fn begins_phase(&self) -> bool {
        matches!(
            self,
            Self::Gate
                | Self::Held
                | Self::Prepared
                | Self::Entered
                | Self::Exit(_)
                | Self::Returned
                | Self::Commits
                | Self::Writes(_)
                | Self::TakesBack
                | Self::BeginsAgain
                | Self::Ended(_)
                | Self::DeviceReleased
                | Self::BackInGuest
        )
    }

    /// Whether it belongs to the end of a call, which is kept whatever else is left out.
    fn is_last(&self) -> bool {
        matches!(
            self,
            Self::Returned
                | Self::Commits
                | Self::Writes(_)
                | Self::TakesBack
                | Self::Ended(_)
                | Self::DeviceReleased
                | Self::BackInGuest
        )
    }
}

/// One event of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When, in nanoseconds of the host's `CLOCK_MONOTONIC`.
    pub at_ns: u64,
    /// What.
    pub what: Happened,
}

/// What was recorded of one call, or of the part of one that came back from the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recording {
    /// In the order in which they happened.
    pub events: Vec<Event>,
    /// Events that are not among these, because there were more than [`MAX_EVENTS`].
    pub left_out: u64,
}

impl Recording {
    fn add(&mut self, at_ns: u64, what: Happened) {
        let room = match what.is_last() {
            true => MAX_EVENTS + MAX_LAST_EVENTS,
            false => MAX_EVENTS,
        };
        match self.events.len() < room {
            true => self.events.push(Event { at_ns, what }),
            false => self.left_out += 1,
        }
    }
}

/// Records a call while one is to be recorded.
#[derive(Debug, Default)]
pub struct Recorder(Option<Box<Recording>>);

impl Recorder {
    /// From now on what happens is recorded, after `before`.
    pub fn begin(&mut self, before: &[Event]) {
        let mut recording = Box::<Recording>::default();
        recording.events.extend(before);
        self.0 = Some(recording);
    }

    /// Whether something is recorded.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// This happens now. Where nothing is recorded it is not even made.
    #[inline]
    pub fn note(&mut self, what: impl FnOnce() -> Happened) {
        if let Some(recording) = &mut self.0 {
            recording.add(monotonic_ns(), what());
        }
    }

    /// What was recorded; nothing is any more.
    pub fn end(&mut self) -> Option<Recording> {
        self.0.take().map(|recording| *recording)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_keeps_as_many_events_as_it_may_and_its_end_beyond_them() {
        let mut recorder = Recorder::default();
        recorder.note(|| unreachable!("nothing is recorded"));
        recorder.begin(&[]);
        let more = 100;
        for page in 0..(MAX_EVENTS + more) as u64 {
            recorder.note(|| Happened::Filled(page));
        }
        recorder.note(|| Happened::Ended(Ended::Committed));
        recorder.note(|| Happened::BackInGuest);
        let recording = recorder.end().unwrap();
        assert_eq!(recording.events.len(), MAX_EVENTS + 2);
        assert_eq!(recording.left_out, more as u64);
        let last = recording.events.last().map(|event| event.what);
        assert_eq!(last, Some(Happened::BackInGuest));
        assert!(recorder.end().is_none() && !recorder.is_on());
        // No call can go on for ever by its ends either.
        recorder.begin(&[]);
        for _ in 0..MAX_EVENTS + 2 * MAX_LAST_EVENTS {
            recorder.note(|| Happened::Returned);
        }
        let recording = recorder.end().unwrap();
        assert_eq!(recording.events.len(), MAX_EVENTS + MAX_LAST_EVENTS);
        assert_eq!(recording.left_out, MAX_LAST_EVENTS as u64);
    }
}
