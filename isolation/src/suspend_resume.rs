//! A driver's own suspend and resume functions, called in the guest as ordinary functions from
//! process context.
//!
//! ```text
//!   guest's agent: write(.../broken_parity_status, word)
//!     └► kernel: broken_parity_status_store(device, attribute, word, length)
//!          └► gate ─► exit: the word is ours ─► device->driver->pm ─► suspend(device)
//!                                                 return gate ◄─ ret ──┘
//!                                                      └─► resume(device)
//!                                                 return gate ◄─ ret ──┘
//!                                                      └─► the store function returns: all of it was written
//! ```
//!
//! A write to an attribute of the device in sysfs brings all that is needed: a thread of the guest
//! that may sleep, and the device's address as the first argument. Whoever else writes there
//! meanwhile is not disturbed: the word tells. The functions run in the guest, not in a domain.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use devices::dma::GuestMemory;
use kvm_bindings::kvm_regs;
use vm_memory::{Bytes, GuestAddress};

use crate::guest::addr::Gva;
use crate::guest::btf::Btf;
use crate::guest::gate::{self, GATE, GATE_BYTES, OUT_BYTES, clear_gate};
use crate::guest::paging::VirtMemory;
use crate::guest::symbols::SymbolTable;

/// File in a PCI device's folder in sysfs whose write function is gated (drivers/pci/pci-sysfs.c).
/// The function itself does not run.
pub const ATTRIBUTE: &str = "broken_parity_status";
const STORE: &str = "broken_parity_status_store";
/// Longest word, in bytes.
const MAX_WORD: usize = 64;
/// Bytes below the stack pointer at the function's start where the called functions find their
/// return address: as much as keeps the stack aligned as at any call (System V ABI for x86-64,
/// 3.2.2).
const FRAME: u64 = 16;

/// Why a driver's functions were not called, or with what they failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SuspendError {
    /// One at a time.
    #[error("an earlier call of a driver's suspend or resume function has not come back yet")]
    Busy,
    /// The guest's kernel is not as expected.
    #[error("the guest's kernel has no function {STORE} that can be gated, or no types")]
    NoGate,
    /// Nobody wrote the word.
    #[error("the guest did not write to {ATTRIBUTE}")]
    NotReached,
    /// The driver has no such functions.
    #[error("the driver has no suspend and resume functions of its own")]
    NoFunctions,
    /// The guest's memory is not as expected.
    #[error("the guest's stack cannot be written")]
    Stack,
    /// A function returned an error.
    #[error("the driver's {0} function returned {1}")]
    Failed(&'static str, i32),
    /// A function has not returned.
    #[error("the driver's {0} function has not returned")]
    NotBack(&'static str),
}

/// Where in the guest's structures the functions are found.
#[derive(Debug, Clone, Copy)]
struct Offsets {
    driver: u64,
    pm: u64,
    suspend: u64,
    resume: u64,
}

impl Offsets {
    fn new(types: &Btf) -> Option<Self> {
        let offset = |of: &str, member: &str| {
            let member = types.find_member(types.find_struct(of)?, member)?;
            Some(u64::from(member.bit_offset / 8))
        };
        Some(Self {
            driver: offset("device", "driver")?,
            pm: offset("device_driver", "pm")?,
            suspend: offset("dev_pm_ops", "suspend")?,
            resume: offset("dev_pm_ops", "resume")?,
        })
    }
}

/// Which functions of a driver are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DriverCalls {
    /// The suspend function, and when it has returned the resume function: the device begins anew.
    SuspendAndResume,
    /// The suspend function: the device rests until the other is called.
    Suspend,
    /// The resume function.
    Resume,
}

/// How far it got.
#[derive(Debug)]
enum State {
    /// Nobody has come by.
    Armed,
    /// The suspend function runs, and the resume function is to follow if there is one here.
    Suspending {
        entry: Box<kvm_regs>,
        resume: Option<u64>,
    },
    /// The resume function runs.
    Resuming { entry: Box<kvm_regs> },
    /// It is over; how long it took.
    Over(Result<Duration, SuspendError>),
}

/// A suspend, a resume or both to be carried out.
#[derive(Debug)]
pub(crate) struct SuspendResume {
    calls: DriverCalls,
    gate: u64,
    gpa: u64,
    /// What the write of ours says.
    word: Vec<u8>,
    offsets: Offsets,
    /// First bytes of the driver's functions: nothing else is called.
    functions: HashSet<u64>,
    pub(crate) physical_bits: u8,
    state: State,
    /// When the first function was called.
    begin: Instant,
}

impl SuspendResume {
    /// Puts the gate there. The guest stands still.
    pub fn arm(
        calls: DriverCalls,
        (module, word): (&str, &[u8]),
        types: &Btf,
        symbols: &SymbolTable,
        virt: &VirtMemory<'_, GuestMemory>,
        physical_bits: u8,
    ) -> Result<Self, SuspendError> {
        let place = || gate::of_kernel_function(symbols.kernel_symbol(STORE)?.at, virt);
        let (gate, gpa) = place().ok_or(SuspendError::NoGate)?;
        let offsets = Offsets::new(types).ok_or(SuspendError::NoGate)?;
        let functions = symbols.in_module(module);
        let functions = functions.filter(|symbol| symbol.is_code());
        let this = Self {
            calls,
            gate: gate.0,
            gpa,
            word: word[..word.len().min(MAX_WORD)].to_vec(),
            offsets,
            functions: functions.map(|symbol| symbol.at.0).collect(),
            physical_bits,
            state: State::Armed,
            begin: Instant::now(),
        };
        let gates = GATE.bytes();
        virt.memory
            .write_slice(&gates, GuestAddress(gpa))
            .map_err(|_| SuspendError::NoGate)?;
        Ok(this)
    }

    /// Takes the gate out, unless a function that was called has yet to return to it. The guest
    /// stands still.
    pub fn disarm(self, memory: &GuestMemory) -> Result<Result<Duration, SuspendError>, Box<Self>> {
        match self.state {
            State::Suspending { .. } | State::Resuming { .. } => Err(Box::new(self)),
            State::Armed => {
                clear_gate(memory, self.gpa);
                Ok(Err(SuspendError::NotReached))
            }
            State::Over(result) => {
                clear_gate(memory, self.gpa);
                Ok(result)
            }
        }
    }

    /// Takes the gate of an earlier one out, which was given up on before it was over.
    ///
    /// # Errors
    /// A function that it called has yet to return to it.
    pub fn end_earlier(
        earlier: &mut Option<Self>,
        memory: &GuestMemory,
    ) -> Result<(), SuspendError> {
        match earlier.take().map(|one| one.disarm(memory)) {
            Some(Err(out)) => {
                *earlier = Some(*out);
                Err(SuspendError::Busy)
            }
            Some(Ok(_)) | None => Ok(()),
        }
    }

    /// Which function has not returned.
    pub fn out(&self) -> SuspendError {
        match self.state {
            State::Suspending { .. } => SuspendError::NotBack("suspend"),
            _ => SuspendError::NotBack("resume"),
        }
    }

    /// A vCPU left the guest at the `out` at `at`. The registers that it goes on with, if that is
    /// one of this gate's.
    pub fn step(
        &mut self,
        at: u64,
        regs: &kvm_regs,
        virt: &VirtMemory<'_, GuestMemory>,
    ) -> Option<kvm_regs> {
        if at == self.gate {
            return Some(self.entered(regs, virt).unwrap_or(kvm_regs {
                rip: self.gate + GATE_BYTES as u64,
                ..*regs
            }));
        }
        (at == self.gate + OUT_BYTES)
            .then(|| self.returned(regs, virt))
            .flatten()
    }

    /// The store function was called. `None` if it is to run as ever.
    fn entered(&mut self, regs: &kvm_regs, virt: &VirtMemory<'_, GuestMemory>) -> Option<kvm_regs> {
        if !matches!(self.state, State::Armed) || regs.rcx != self.word.len() as u64 {
            return None;
        }
        let written = virt.read_vec(Gva(regs.rdx), self.word.len()).ok()?;
        if written != self.word {
            return None;
        }
        let Some((suspend, resume)) = self.find(regs.rdi, virt) else {
            return self.end(Err(SuspendError::NoFunctions), regs, regs, virt);
        };
        let entry = Box::new(*regs);
        let (first, state) = match self.calls {
            DriverCalls::SuspendAndResume => {
                let resume = Some(resume);
                (suspend, State::Suspending { entry, resume })
            }
            DriverCalls::Suspend => {
                let resume = None;
                (suspend, State::Suspending { entry, resume })
            }
            DriverCalls::Resume => (resume, State::Resuming { entry }),
        };
        match self.call(first, regs, regs, virt) {
            Some(next) => {
                self.begin = Instant::now();
                self.state = state;
                Some(next)
            }
            None => self.end(Err(SuspendError::Stack), regs, regs, virt),
        }
    }

    /// A function that was called returned.
    fn returned(
        &mut self,
        regs: &kvm_regs,
        virt: &VirtMemory<'_, GuestMemory>,
    ) -> Option<kvm_regs> {
        let (name, entry, resume) = match &self.state {
            State::Suspending { entry, resume } => ("suspend", **entry, *resume),
            State::Resuming { entry } => ("resume", **entry, None),
            State::Armed | State::Over(_) => return None,
        };
        if regs.rsp != entry.rsp.wrapping_sub(FRAME).wrapping_add(8) {
            // Another thread jumped here.
            return None;
        }
        let result = regs.rax as i32;
        if result != 0 {
            return self.end(Err(SuspendError::Failed(name, result)), &entry, regs, virt);
        }
        let Some(resume) = resume else {
            let took = self.begin.elapsed();
            return self.end(Ok(took), &entry, regs, virt);
        };
        match self.call(resume, &entry, regs, virt) {
            Some(next) => {
                self.state = State::Resuming {
                    entry: Box::new(entry),
                };
                Some(next)
            }
            None => self.end(Err(SuspendError::Stack), &entry, regs, virt),
        }
    }

    /// The suspend and resume functions of the driver of the `struct device` at `device`.
    fn find(&self, device: u64, virt: &VirtMemory<'_, GuestMemory>) -> Option<(u64, u64)> {
        let follow = |from: u64, offset: u64| {
            let value = virt.read_u64(Gva(from).checked_add(offset)?).ok()?;
            (value != 0).then_some(value)
        };
        let driver = follow(device, self.offsets.driver)?;
        let operations = follow(driver, self.offsets.pm)?;
        let suspend = follow(operations, self.offsets.suspend)?;
        let resume = follow(operations, self.offsets.resume)?;
        let own = |function: &u64| self.functions.contains(function);
        (own(&suspend) && own(&resume)).then_some((suspend, resume))
    }

    /// Registers and stack as if the store function, called with `entry`, had called `function`
    /// with its own first argument.
    fn call(
        &self,
        function: u64,
        entry: &kvm_regs,
        now: &kvm_regs,
        virt: &VirtMemory<'_, GuestMemory>,
    ) -> Option<kvm_regs> {
        let rsp = entry.rsp.checked_sub(FRAME)?;
        if !rsp.is_multiple_of(8) {
            return None;
        }
        let gpa = virt.space.walk(virt.memory, Gva(rsp)).ok()?.gpa.0;
        let back = (self.gate + OUT_BYTES).to_le_bytes();
        virt.memory.write_slice(&back, GuestAddress(gpa)).ok()?;
        Some(kvm_regs {
            rip: function,
            rsp,
            rdi: entry.rdi,
            ..*now
        })
    }

    /// The store function returns that all of the word was written.
    fn end(
        &mut self,
        result: Result<Duration, SuspendError>,
        entry: &kvm_regs,
        now: &kvm_regs,
        virt: &VirtMemory<'_, GuestMemory>,
    ) -> Option<kvm_regs> {
        self.state = State::Over(result);
        let address = virt.read_u64(Gva(entry.rsp)).ok()?;
        Some(kvm_regs {
            rax: entry.rcx,
            rip: address,
            rsp: entry.rsp.wrapping_add(8),
            ..*now
        })
    }
}

#[cfg(test)]
#[path = "suspend_resume_tests.rs"]
mod tests;
