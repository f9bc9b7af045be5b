//! What is asked of a domain, and what comes of it.

use std::time::Duration;

use devices::hold::DeviceAddress;
use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::spilled_call::SpilledCall;
use super::time::CallTime;
use crate::domain::effects::{KernelCall, KernelEffects};
use crate::domain::host_memory::Kept;
use crate::domain::list_links::ChangedLinks;
use crate::domain::violation::Violation;
use crate::guest::addr::GvaRange;

/// A call to be isolated, as the guest's vCPU stood at the entry gate.
#[derive(Debug)]
pub struct CallRequest<'a> {
    /// General registers; RIP is not used.
    pub regs: kvm_regs,
    /// Control registers and segments.
    pub sregs: &'a kvm_sregs,
    /// The stack that the function is entered on ([`crate::guest::stack`]): the call's own to
    /// write.
    pub stack: GvaRange,
    /// The vCPU itself, whose clock P follows; `None` where the guest has no use for one.
    pub clock: Option<&'a VcpuFd>,
    /// Number of that vCPU, from 0.
    pub vcpu: u8,
    /// Guest virtual address at which the function's own code begins.
    pub function: u64,
    /// Guest virtual address of the return gate: an instruction in the guest that gives control
    /// back when a kernel function that went on there returns to it. Without one calls are never
    /// spilled.
    pub return_gate: Option<u64>,
    /// What is known of the kernel's functions: with it a call that goes on in the guest keeps a
    /// journal, and is taken back to its beginning if it fails later.
    pub effects: Option<&'a KernelEffects>,
    /// Processor time in the private VM, over all parts of the call, after which it is taken to
    /// hang and is aborted. One that exits gets a little more for each exit.
    pub budget: Duration,
    /// Time that the call may wait for in all, over all parts of it, with the guest standing still,
    /// before it is given up as one that sleeps.
    pub sleep_limit: Duration,
}

/// Why a call was given back to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PassThroughReason {
    /// A kernel function uses the FPU.
    Fpu,
    /// A kernel function takes an exception that the kernel handles itself.
    KernelException,
    /// A kernel function uses the interrupt controller or another processor register of K.
    ProcessorRegister,
    /// A kernel function reaches a device that is not the isolated one.
    OtherDevice,
    /// A kernel function halts or does something that KVM cannot carry out.
    Halt,
    /// A kernel function waits, for longer than the guest may stand still or for somebody else.
    Sleeps,
    /// A kernel function that was marked to be run by the guest only, such as the scheduler.
    TrappedFunction,
    /// The guest's page tables are too large or changed too often.
    PageTables,
    /// The stack or its return address cannot be used.
    Stack,
    /// The host has worked for it for too long.
    Slow,
}

impl PassThroughReason {
    /// Its name in counters and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fpu => "fpu",
            Self::KernelException => "kernel_exception",
            Self::ProcessorRegister => "processor_register",
            Self::OtherDevice => "other_device",
            Self::Halt => "halt",
            Self::Sleeps => "sleeps",
            Self::TrappedFunction => "trapped_function",
            Self::PageTables => "page_tables",
            Self::Stack => "stack",
            Self::Slow => "slow",
        }
    }
}

/// How a call ended.
#[derive(Debug, Clone)]
pub enum CallEnd {
    /// Its effects are in the guest.
    Committed,
    /// It broke a rule; nothing of it is left.
    Aborted(Box<Violation>),
    /// The guest must run the function itself; nothing of the attempt is left.
    PassThrough(PassThroughReason),
    /// What it did so far is in the guest, which goes on in the middle of a kernel function. The
    /// call comes back with [`crate::domain::Domain::go_on`] when that function reaches the return
    /// gate.
    Spilled(PassThroughReason, Box<SpilledCall>),
}

/// A store to the isolated device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceStore {
    /// Where.
    pub at: DeviceAddress,
    /// What.
    pub value: u64,
    /// How many bytes of it: 1 to 8, to ports 1 to 4.
    pub bytes: usize,
}

/// What a call did and cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct CallStats {
    /// `KVM_RUN` calls on P.
    pub runs: u64,
    /// Kernel functions called through trampolines.
    pub crossings: u64,
    /// Kernel functions that waited for the call's end.
    pub handed_over: u32,
    /// Exits to fill in page-table entries.
    pub fills: u32,
    /// Pages opened for writing by the driver.
    pub opened: u32,
    /// Exits for indirect calls of kernel functions.
    pub indirect_calls: u32,
    /// Call-backs of the kernel into the driver.
    pub callbacks: u32,
    /// Device stores queued.
    pub posted_writes: u32,
    /// Device loads.
    pub device_reads: u32,
    /// Pages that it may have written, of those with a private copy at the end; all of these if it
    /// was taken back.
    pub dirty_pages: u32,
    /// Bytes that differed from the guest's and were committed.
    pub committed_bytes: u64,
    /// System calls other than `KVM_RUN`.
    pub other_syscalls: u32,
    /// Times the roots had to be built.
    pub rebuilds: u32,
    /// Times they were loaded again because that was in the middle of the call.
    pub root_loads: u32,
    /// Time in `KVM_RUN` on P, in nanoseconds.
    pub private_ns: u64,
    /// Times the call waited, with the guest standing still.
    pub sleeps: u32,
    /// Time that it waited for, in microseconds.
    pub slept_us: u64,
}

/// Where the time of a failed call's rollback went, in nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct AbortPhases {
    /// From the exit of P that told of the fault to its being judged a violation.
    pub detect_ns: u64,
    /// Having somebody look at the call at its fault; 0 if nobody does.
    #[serde(default)]
    pub keep_ns: u64,
    /// Dropping private pages and putting published bytes back.
    pub memory_ns: u64,
    /// Putting the device's checkpoint back; 0 if the call had not reached the device.
    pub device_ns: u64,
    /// Until the guest has called all kernel functions that take the call back; 0 if there were
    /// none.
    #[serde(default)]
    pub compensate_ns: u64,
    /// From then until the guest's vCPU has its registers for the return to the caller.
    pub returned_ns: u64,
}

impl AbortPhases {
    /// All of them.
    pub fn total_ns(&self) -> u64 {
        self.taken_back_ns().saturating_add(self.returned_ns)
    }

    /// Those until nothing of the call is left.
    pub fn taken_back_ns(&self) -> u64 {
        let phases = [
            self.detect_ns,
            self.keep_ns,
            self.memory_ns,
            self.device_ns,
            self.compensate_ns,
        ];
        phases.into_iter().fold(0, u64::saturating_add)
    }
}

/// The end of a call with the registers that the guest's vCPU goes on with.
#[derive(Debug, Clone)]
pub struct CallResult {
    /// How it ended.
    pub end: CallEnd,
    /// For a committed or spilled call: all general registers. For an aborted one: those of the
    /// entry, after a return; the caller sets RAX. For a pass-through: those of the entry.
    pub regs: kvm_regs,
    /// What it did and cost.
    pub stats: CallStats,
    /// Time that it has had by now, its earlier parts among it.
    pub time: CallTime,
    /// Where the rollback's time went, for an aborted call; `returned_ns` is the caller's to fill
    /// in.
    pub phases: AbortPhases,
    /// Kernel functions that the guest has to call, in this order, before it goes on: what waited
    /// for the end of the call, or what takes it back.
    pub kernel_calls: Vec<KernelCall>,
    /// Kernel functions that waited for the end of a committed call and that the guest calls in
    /// its place, in this order, before it goes on.
    pub handed_over: Vec<KernelCall>,
    /// Stores to the device that wait for these.
    pub later: Vec<DeviceStore>,
    /// What is charged of the host's memory for these.
    pub kept: Kept,
    /// Lists that an aborted call had changed in the guest, to be looked at when these functions
    /// have returned ([`list_links`](crate::domain::list_links)).
    pub lists: Vec<ChangedLinks>,
}

impl CallResult {
    /// Whether the call failed and the guest has to call kernel functions that take it back.
    pub fn is_to_be_taken_back(&self) -> bool {
        matches!(self.end, CallEnd::Aborted(_)) && !self.kernel_calls.is_empty()
    }

    /// Whether the call has not ended, and may yet be taken back.
    pub fn is_open(&self) -> bool {
        matches!(&self.end, CallEnd::Spilled(_, call) if call.is_journalled())
    }

    /// Whether memory and device are as before the call.
    pub fn leaves_nothing(&self) -> bool {
        match &self.end {
            CallEnd::Aborted(violation) => !violation.stays(),
            CallEnd::PassThrough(_) => true,
            CallEnd::Committed | CallEnd::Spilled(..) => false,
        }
    }
}
