//! What a driver can do wrong, by name.

use serde::Serialize;

use super::journal::Published;
use super::roots::Root;

/// How an isolated call broke the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum ViolationKind {
    /// A processor exception in the driver (Intel SDM volume 3, table 6-1).
    Exception {
        /// Vector.
        vector: u8,
        /// Error code, 0 where there is none.
        error_code: u64,
        /// CR2 for a page fault, otherwise 0.
        address: u64,
    },
    /// An exception in a kernel function that the driver called: a bad argument.
    KernelException {
        /// Vector.
        vector: u8,
        /// Error code, 0 where there is none.
        error_code: u64,
        /// CR2 for a page fault, otherwise 0.
        address: u64,
    },
    /// A kernel function was given something to keep that is not what it has to be: it would have
    /// been used later, in nobody's call.
    KeptArgument {
        /// Guest virtual address of the function.
        function: u64,
        /// Which of its arguments it is, or is reached by, from 0.
        argument: u8,
        /// What it was given.
        value: u64,
    },
    /// The driver made the kernel give up: `panic`, an oops, a smashed stack that the compiler's
    /// check found.
    FatalFunction {
        /// Guest virtual address of the function that was reached.
        function: u64,
    },
    /// A store to memory that the call may not write; it did not happen.
    StrayWrite {
        /// Guest virtual address.
        address: u64,
    },
    /// Bytes that the call may not change were changed on a page that holds others that it may.
    StrayBytes {
        /// Guest virtual address of the first.
        address: u64,
        /// Their number.
        bytes: u64,
    },
    /// A jump, call or return to code that is neither the driver's nor an imported function.
    IllegalControlTransfer {
        /// Where it went.
        target: u64,
    },
    /// The caller's stack frame was changed.
    StackSmash {
        /// Guest virtual address of the first changed byte.
        address: u64,
    },
    /// The function returned with another stack pointer than it was called with.
    UnbalancedStack {
        /// RSP at the return.
        rsp: u64,
    },
    /// A register that the callee must preserve was changed (System V ABI, section 3.2.1).
    CalleeSavedRegister,
    /// An access to device memory that is not the isolated device's.
    ForeignMmio {
        /// Guest physical address.
        gpa: u64,
        /// A store, not a load.
        write: bool,
    },
    /// An access to an I/O port.
    ForeignPort {
        /// Port.
        port: u16,
        /// An `out`, not an `in`.
        write: bool,
    },
    /// An access to a model-specific register by the driver.
    ForeignMsr {
        /// Register number.
        index: u32,
    },
    /// `hlt`, an instruction that KVM could not carry out, or one that changed a control register,
    /// in the driver.
    PrivilegedInstruction,
    /// The interrupt flag was not what it was at entry.
    InterruptFlag,
    /// Another flag that functions leave alone was not what it was at entry: direction, alignment
    /// check, nested task, I/O privilege level (Intel SDM volume 1, section 3.4.3; System V ABI,
    /// section 3.2.1).
    SystemFlags {
        /// The bits of RFLAGS that differ.
        changed: u64,
    },
    /// The call took longer than its budget.
    TimeBudget,
    /// The call had gone on in the guest, came back, and can neither go on nor be given back.
    LostSpill,
    /// The guest was to run the function in the call's place, and the device could not be put back
    /// for it.
    DeviceLost,
    /// An exception could not be delivered: page tables or stack are destroyed.
    Shutdown,
    /// The call would have the host keep more than there is room for.
    HostMemory,
    /// Not the driver's fault: something of the domain's own failed, and it is not used any more.
    /// The guest runs the function itself.
    DomainFailed,
}

/// A violation and where it happened.
#[derive(Debug, Clone, Serialize)]
pub struct Violation {
    /// What.
    #[serde(flatten)]
    pub kind: ViolationKind,
    /// Which root was running: `driver`, or `kernel` for a kernel function called by the driver.
    pub root: Root,
    /// Instruction that did it, or that was to be executed next.
    pub rip: u64,
    /// Stack pointer there.
    pub rsp: u64,
    /// Return addresses in the driver of the kernel functions open at that moment, outermost first;
    /// those that run with the driver's rights among them.
    pub crossings: Vec<u64>,
    /// Whether the device had already been reached, so that memory alone does not undo the call.
    pub reached_device: bool,
    /// Times that the call had gone on in the guest.
    pub spills: u32,
    /// What became of what it did until then; `None` if it had not gone on there.
    pub published: Option<Published>,
}

impl Violation {
    /// Whether something of the failed call is left in the guest.
    pub fn stays(&self) -> bool {
        self.published.as_ref().is_some_and(Published::stays)
    }

    /// The address that was touched and should not have been, where the violation is about one.
    pub fn touched(&self) -> Option<u64> {
        match self.kind {
            ViolationKind::StrayWrite { address }
            | ViolationKind::StrayBytes { address, .. }
            | ViolationKind::StackSmash { address } => Some(address),
            ViolationKind::IllegalControlTransfer { target } => Some(target),
            ViolationKind::FatalFunction { function }
            | ViolationKind::KeptArgument { function, .. } => Some(function),
            _ => None,
        }
    }
}
