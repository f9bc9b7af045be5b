//! A violation as a person reads it.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::domain::journal::Published;
use crate::domain::roots::Root;
use crate::domain::transaction::AbortPhases;
use crate::domain::violation::{Violation, ViolationKind};

/// What the caller of a failed call was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Told {
    /// Nothing yet: the call is run once more.
    RunAgain,
    /// What the function returns in the guest, which runs it: the domain failed.
    GuestRuns,
    /// An error.
    Error,
    /// Nothing: the function returns nothing, and has not been run.
    Nothing,
}

/// What became of the image of a fault.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kept {
    /// It is in this directory.
    In(PathBuf),
    /// There were as many as there may be, and none was written.
    Enough(u32),
    /// It could not be written, and nothing of it is left.
    Failed(String),
}

impl Kept {
    /// Where it is.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::In(path) => Some(path),
            Self::Enough(_) | Self::Failed(_) => None,
        }
    }
}

/// A violation with names.
#[derive(Debug, Clone, Serialize)]
pub struct ViolationReport {
    /// The isolated function whose call it was.
    pub entry: String,
    /// What happened.
    pub violation: Violation,
    /// Where, as `function+offset [module]`.
    pub at: String,
    /// The instruction there, as it is in the domain.
    pub instruction: String,
    /// What was touched, as `symbol+offset [module]`, if anything is known by that address.
    pub touched: Option<String>,
    /// Calls of kernel functions open at that moment: places in the driver, outermost first.
    pub call_chain: Vec<String>,
    /// Why a part of the call stays in the guest, if one does.
    pub stays: Option<String>,
    /// When it failed, in nanoseconds of the host's `CLOCK_MONOTONIC`.
    pub at_ns: u64,
    /// Where the time of the rollback went.
    pub phases: AbortPhases,
    /// Why the device is not as before the call, if it is not.
    pub device_lost: Option<String>,
    /// What became of the image of the guest at this fault, if faults are kept.
    pub image: Option<Kept>,
    /// What its caller was told.
    pub told: Told,
}

impl fmt::Display for ViolationReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            entry,
            violation,
            at,
            instruction,
            touched,
            call_chain,
            stays,
            at_ns: _,
            phases: _,
            device_lost,
            image,
            told,
        } = self;
        write!(f, "{entry}: {} at {at}", What(violation))?;
        if !instruction.is_empty() {
            write!(f, ": `{instruction}`")?;
        }
        if let Some(touched) = touched {
            write!(f, ", touching {touched}")?;
        }
        if violation.root == Root::Kernel {
            write!(f, ", in a kernel function called by the driver")?;
        }
        for place in call_chain.iter().rev() {
            write!(f, ", called from {place}")?;
        }
        match device_lost {
            Some(why) => write!(f, "; the device could not be put back: {why}")?,
            None if violation.reached_device => write!(
                f,
                "; the device had been reached and was put back from its checkpoint"
            )?,
            None => {}
        }
        if violation.spills > 0 {
            let times = violation.spills;
            write!(f, "; the call had gone on in the guest {times} times, and")?;
            match (&violation.published, stays) {
                (
                    Some(Published::Undone {
                        bytes,
                        kernel_calls,
                    }),
                    _,
                ) => write!(
                    f,
                    " was taken back to its beginning: {bytes} bytes put back, {kernel_calls} kernel functions called"
                )?,
                (_, stays) => {
                    write!(f, " what it did until then stays")?;
                    if let Some(why) = stays {
                        write!(f, ": {why}")?;
                    }
                }
            }
        }
        match told {
            Told::RunAgain => write!(f, "; it is run again"),
            Told::Error | Told::GuestRuns => Ok(()),
            Told::Nothing => write!(
                f,
                "; it was NOT run, which its caller cannot know: it returns nothing"
            ),
        }?;
        match image {
            None => Ok(()),
            Some(Kept::In(path)) => write!(f, "; the guest at the fault is in {}", path.display()),
            Some(Kept::Enough(count)) => {
                write!(f, "; no image of the guest was kept: there are {count}")
            }
            Some(Kept::Failed(why)) => write!(f, "; no image of the guest was kept: {why}"),
        }
    }
}

struct What<'a>(&'a Violation);

impl fmt::Display for What<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.kind {
            ViolationKind::Exception {
                vector,
                error_code,
                address,
            }
            | ViolationKind::KernelException {
                vector,
                error_code,
                address,
            } => {
                write!(f, "exception {vector} ({})", exception_name(vector))?;
                if vector == 14 {
                    write!(f, ", error code {error_code:#x}, address {address:#x}")?;
                }
                Ok(())
            }
            ViolationKind::FatalFunction { function } => {
                write!(f, "the kernel gave up in {function:#x}")
            }
            ViolationKind::KeptArgument {
                function,
                argument,
                value,
            } => write!(
                f,
                "{value:#x} given to {function:#x} to keep, with argument {argument}, and not what that has to be"
            ),
            ViolationKind::StrayWrite { address } => write!(f, "stray write to {address:#x}"),
            ViolationKind::StrayBytes { address, bytes } => {
                write!(
                    f,
                    "{bytes} bytes changed at {address:#x} that are not the driver's"
                )
            }
            ViolationKind::IllegalControlTransfer { target } => {
                write!(f, "illegal control transfer to {target:#x}")
            }
            ViolationKind::StackSmash { address } => {
                write!(f, "the caller's stack frame was changed at {address:#x}")
            }
            ViolationKind::UnbalancedStack { rsp } => {
                write!(f, "return with a wrong stack pointer ({rsp:#x})")
            }
            ViolationKind::CalleeSavedRegister => {
                write!(f, "return with a callee-saved register changed")
            }
            ViolationKind::ForeignMmio { gpa, write } => {
                let what = if write { "store to" } else { "load from" };
                write!(f, "{what} another device's memory at {gpa:#x}")
            }
            ViolationKind::ForeignPort { port, write } => {
                write!(
                    f,
                    "{} I/O port {port:#x}",
                    if write { "out to" } else { "in from" }
                )
            }
            ViolationKind::ForeignMsr { index } => write!(f, "access to MSR {index:#x}"),
            ViolationKind::PrivilegedInstruction => write!(f, "privileged instruction"),
            ViolationKind::InterruptFlag => write!(f, "return with the interrupt flag changed"),
            ViolationKind::SystemFlags { changed } => {
                write!(f, "return with flags changed that stay ({changed:#x})")
            }
            ViolationKind::TimeBudget => write!(f, "its time is used up: it hangs"),
            ViolationKind::LostSpill => write!(f, "a call that cannot go on, stopped"),
            ViolationKind::DeviceLost => {
                write!(f, "a call that the guest cannot run, its device being lost")
            }
            ViolationKind::Shutdown => write!(f, "an exception could not be delivered"),
            ViolationKind::HostMemory => {
                write!(f, "more memory used than the host keeps for calls")
            }
            ViolationKind::DomainFailed => {
                write!(f, "the domain failed, and the guest runs the function")
            }
        }
    }
}

/// Names of exceptions (Intel SDM volume 3, table 6-1).
fn exception_name(vector: u8) -> &'static str {
    match vector {
        0 => "divide error",
        1 => "debug",
        3 => "breakpoint",
        4 => "overflow",
        5 => "BOUND range exceeded",
        6 => "invalid opcode",
        7 => "device not available",
        8 => "double fault",
        10 => "invalid TSS",
        11 => "segment not present",
        12 => "stack-segment fault",
        13 => "general protection",
        14 => "page fault",
        16 => "x87 floating-point error",
        17 => "alignment check",
        19 => "SIMD floating-point exception",
        21 => "control protection",
        _ => "reserved",
    }
}
