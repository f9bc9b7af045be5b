//! Counters of isolated modules and their entries.

pub mod histogram;
pub mod report;

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::domain::journal::Published;
use crate::domain::transaction::{AbortPhases, CallEnd, CallResult};
use crate::domain::violation::Violation;
use crate::status::histogram::Histogram;

/// How strong the isolation of a module is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Strength {
    /// Stores are checked against what the call may write.
    pub contained: bool,
    /// Each of them is, not the first to a page alone.
    #[serde(default)]
    pub each_store: bool,
    /// Series of the kernel by whose model calls are taken back that had gone on in the guest;
    /// `None` if they are not.
    pub model: Option<String>,
    /// Isolated functions of which no type is known: a call that fails returns `-EIO`, whatever
    /// they return otherwise.
    pub untyped: Vec<String>,
    /// What is not known of the guest, in words.
    pub missing: Vec<String>,
}

/// One isolated function since it was isolated.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryStatus {
    /// Its name.
    pub name: String,
    /// Calls that came through the gate.
    pub calls: u64,
    /// Calls whose effects are in the guest.
    pub commits: u64,
    /// Calls that were taken back because of a violation.
    pub aborts: u64,
    /// How long it took from each such fault until nothing of its call was left. Calls of which
    /// something stays are not among them.
    #[serde(default, skip_serializing_if = "Histogram::is_empty")]
    pub taken_back: Histogram,
    /// Calls that were run once more after they had been taken back.
    #[serde(default)]
    pub retries: u64,
    /// Calls that returned their error without being run, because the driver is stopped.
    #[serde(default)]
    pub refused: u64,
    /// Packets that the kernel was told to keep (`NETDEV_TX_BUSY`) without the function being run,
    /// because a call that had changed the device's transmitter was in the guest.
    #[serde(default)]
    pub kept_out: u64,
    /// Failed calls that had gone on in the guest and were taken back to their beginning.
    #[serde(default)]
    pub undone: u64,
    /// Failed calls that had gone on in the guest and of which something stays there.
    #[serde(default)]
    pub left_over: u64,
    /// Kernel functions that were called to take calls back.
    #[serde(default)]
    pub compensations: u64,
    /// Bytes that were put back for calls that had gone on in the guest.
    #[serde(default)]
    pub restored_bytes: u64,
    /// Times that calls went on in the guest in the middle of a kernel function, by reason.
    #[serde(default)]
    pub spills: BTreeMap<String, u64>,
    /// Calls that were given back to the guest, by reason.
    pub pass_throughs: BTreeMap<String, u64>,
    /// Kernel functions called without an exit.
    pub crossings: u64,
    /// Kernel functions that waited for calls to end, and that the guest called then.
    #[serde(default)]
    pub handed_over: u64,
    /// Kernel functions called through pointers, at one exit each.
    pub indirect_calls: u64,
    /// Call-backs of the kernel into the driver.
    pub callbacks: u64,
    /// Entries into the private VM, each of which ended in an exit.
    pub private_exits: u64,
    /// Exits for page-table entries that were filled on demand.
    pub fills: u64,
    /// Page-table roots that had to be built.
    pub rebuilds: u64,
    /// Pages that calls may have written, of those with a private copy at their end.
    pub dirty_pages: u64,
    /// Bytes committed.
    pub committed_bytes: u64,
    /// Device stores that waited for commit.
    pub posted_writes: u64,
    /// Device loads.
    pub device_reads: u64,
    /// System calls of calls, `KVM_RUN` left out.
    pub other_syscalls: u64,
    /// Waits inside atomic calls.
    pub sleeps: u64,
    /// Time of these waits in microseconds.
    pub slept_us: u64,
    /// Time from the gate until the guest's other processors and its devices were held, in
    /// nanoseconds.
    #[serde(default)]
    pub holding_ns: u64,
    /// Time in the private VM, in nanoseconds.
    #[serde(default)]
    pub private_ns: u64,
    /// Time in all calls, from the trap to the registers, in nanoseconds.
    pub total_ns: u64,
    /// The longest, in nanoseconds.
    pub longest_ns: u64,
    /// The first one after the function was isolated, which finds nothing prepared, in nanoseconds.
    #[serde(default)]
    pub first_ns: u64,
}

impl EntryStatus {
    /// Counters at zero.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            ..Self::default()
        }
    }

    /// Counts what became of a call that failed.
    pub fn count_failure(&mut self, violation: &Violation, phases: &AbortPhases) {
        if !violation.stays() {
            self.taken_back.add_ns(phases.taken_back_ns());
        }
        match &violation.published {
            None => {}
            Some(Published::Stays(_)) => self.left_over += 1,
            Some(Published::Undone {
                bytes,
                kernel_calls,
            }) => {
                self.undone += 1;
                self.restored_bytes += bytes;
                self.compensations += u64::from(*kernel_calls);
            }
        }
    }

    /// Counts a call that the guest runs itself because those of its timer leave it no time.
    pub fn count_overdue(&mut self) {
        self.calls += 1;
        let reason = "overdue".to_owned();
        *self.pass_throughs.entry(reason).or_default() += 1;
    }

    /// Counts a call that took `time`, or the part of one that had gone on in the guest and came
    /// back (`again`).
    pub fn count(&mut self, result: &CallResult, again: bool, time: Duration) {
        let stats = &result.stats;
        let ns = time.as_nanos() as u64;
        self.calls += u64::from(!again);
        match &result.end {
            CallEnd::Committed => self.commits += 1,
            CallEnd::Aborted(_) => self.aborts += 1,
            CallEnd::Spilled(reason, _) => {
                *self.spills.entry(reason.name().to_owned()).or_default() += 1;
            }
            CallEnd::PassThrough(reason) => {
                *self
                    .pass_throughs
                    .entry(reason.name().to_owned())
                    .or_default() += 1;
            }
        }
        self.crossings += stats.crossings;
        self.handed_over += u64::from(stats.handed_over);
        self.indirect_calls += u64::from(stats.indirect_calls);
        self.callbacks += u64::from(stats.callbacks);
        self.private_exits += stats.runs;
        self.fills += u64::from(stats.fills);
        self.rebuilds += u64::from(stats.rebuilds);
        self.dirty_pages += u64::from(stats.dirty_pages);
        self.committed_bytes += stats.committed_bytes;
        self.posted_writes += u64::from(stats.posted_writes);
        self.device_reads += u64::from(stats.device_reads);
        self.other_syscalls += u64::from(stats.other_syscalls);
        self.sleeps += u64::from(stats.sleeps);
        self.slept_us += stats.slept_us;
        self.private_ns += stats.private_ns;
        if self.first_ns == 0 {
            self.first_ns = ns;
            tracing::debug!(
                "the first call of {}: {} us, in the private VM {} us, {} exits, {} of them to fill page tables, \
                 {} pages copied, {} crossings, {} other system calls",
                self.name,
                ns / 1000,
                stats.private_ns / 1000,
                stats.runs,
                stats.fills,
                stats.dirty_pages,
                stats.crossings,
                stats.other_syscalls
            );
        }
        self.total_ns += ns;
        self.longest_ns = self.longest_ns.max(ns);
    }
}

/// One isolated module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleStatus {
    /// Its name.
    pub module: String,
    /// Its isolated functions, by name.
    pub entries: Vec<EntryStatus>,
    /// Violations since it was isolated.
    pub violations: u64,
    /// Whether its calls return their errors without being run.
    #[serde(default)]
    pub stopped: bool,
    /// Private pages kept from call to call.
    pub warm_pages: usize,
    /// Why calls are not isolated any more although the gates are there.
    pub broken: Option<String>,
    /// How strong the isolation is.
    #[serde(default)]
    pub strength: Strength,
}
