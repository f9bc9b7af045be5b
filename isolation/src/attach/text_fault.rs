//! A fault in the guest's own text: what becomes of a driver that is not isolated.
//!
//! ```text
//!   put in              somebody comes there                 taken out
//!   out GATE ─────────► exit: noted, fault's code ─► guest   the driver's own code
//! ```
//!
//! One instruction is replaced by as many bytes. The `out` that waits tells whether, and when, the
//! guest came there; an instruction of one byte has no room for it, and has the fault at once. From
//! then on the fault stays until it is taken out or the guest is rewound.

use std::collections::BTreeMap;
use std::sync::{MutexGuard, PoisonError};
use std::time::Instant;

use devices::clock::monotonic_ns;
use devices::dma::GuestMemory;
use iced_x86::{Decoder, DecoderOptions};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};
use vmm::PausedVcpus;

use super::arm::text_of;
use super::clean::CleanBytes;
use super::{AttachError, Isolator, RELEASE_POLL, RELEASE_WAIT, live, physical_bits};
use crate::domain::MAX_INSTRUCTION;
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::gate::{ENDBR64, FTRACE_NOP};
use crate::guest::gate::{GATE, OUT_BYTES};
use crate::guest::modules::ModuleLayout;
use crate::guest::paging::VirtMemory;
use crate::guest::symbols::SymbolTable;

/// Longest function that is looked at, in bytes.
const MAX_FUNCTION: u64 = 64 << 10;

/// A loaded module as the guest tells of it.
#[derive(Debug, Clone, Copy)]
pub struct LoadedModule<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its sections with their addresses.
    pub sections: &'a [(String, u64)],
    /// The guest's symbols.
    pub symbols: &'a SymbolTable,
}

/// A function of a module as it is in the guest's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FunctionText {
    /// Its address.
    pub start: u64,
    /// Its bytes, with the padding behind it. Where it is isolated, those of the gate are not among
    /// them: the kernel's own NOP is.
    pub code: Vec<u8>,
    /// Names of the functions that it calls or jumps to outside of itself, by address.
    pub callees: BTreeMap<u64, String>,
}

/// An instruction of a module in the guest's own text, and what is to be there instead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextChange {
    /// Address of the instruction.
    pub at: u64,
    /// Its bytes.
    pub old: Vec<u8>,
    /// As many others.
    pub new: Vec<u8>,
}

/// What became of a [`TextChange`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextFaultStatus {
    /// Name of the module.
    pub module: String,
    /// Address of the instruction.
    pub at: u64,
    /// When the guest came there for the first time, in nanoseconds of the host's monotonic clock.
    pub reached_ns: Option<u64>,
    /// Whether that would be noticed.
    pub tells: bool,
}

/// A fault that is in the guest's text.
#[derive(Debug, Clone)]
pub(crate) struct TextFault {
    module: String,
    change: TextChange,
    /// Guest physical address of each byte.
    places: Vec<u64>,
    waits: bool,
    reached_ns: Option<u64>,
}

impl TextFault {
    /// What is in the guest's text now.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.change.new.clone();
        if self.waits {
            let out = GATE.bytes();
            bytes.clone_from(&self.change.old);
            for (byte, trap) in bytes.iter_mut().zip(&out[..OUT_BYTES as usize]) {
                *byte = *trap;
            }
        }
        bytes
    }

    fn write(&self, bytes: &[u8], memory: &GuestMemory) -> bool {
        let mut all = self.places.iter().zip(bytes);
        all.all(|(at, byte)| memory.write_slice(&[*byte], GuestAddress(*at)).is_ok())
    }

    /// Whether it is still there: the module may have been removed, and its memory be somebody
    /// else's.
    fn is_there(&self, memory: &GuestMemory) -> bool {
        let mut all = self.places.iter().zip(self.bytes());
        all.all(|(at, byte)| {
            let mut now = [0];
            memory.read_slice(&mut now, GuestAddress(*at)).is_ok() && now == [byte]
        })
    }

    /// What takes it out of a copy of the guest's memory.
    pub(super) fn clean(&self, memory: &GuestMemory) -> Vec<CleanBytes> {
        if !self.is_there(memory) {
            return Vec::new();
        }
        let all = self.places.iter().zip(&self.change.old);
        all.map(|(at, byte)| CleanBytes {
            at: GuestAddress(*at),
            bytes: vec![*byte],
        })
        .collect()
    }
}

impl Isolator {
    /// The function of that name.
    ///
    /// # Errors
    /// The module has no such function, or its text cannot be read.
    pub fn function_text(
        &self,
        module: LoadedModule<'_>,
        function: &str,
    ) -> Result<FunctionText, AttachError> {
        self.with_text(module, |virt| {
            let layout = ModuleLayout::new(module.name, module.sections, None, virt)?;
            let missing = || AttachError::NoDriverFunction(function.to_owned());
            let mut named = module
                .symbols
                .named(function)
                .filter(|symbol| symbol.is_code() && symbol.module == Some(module.name));
            let start = named.next().ok_or_else(missing)?.at;
            let within = layout.text().find(|text| text.range.contains(start));
            let range = within.ok_or_else(missing)?.range;
            let extent = module.symbols.extent(start, range).ok_or_else(missing)?;
            let bytes = extent.len_bytes().min(MAX_FUNCTION);
            let mut code = virt.read_vec(start, usize::try_from(bytes).unwrap_or_default())?;
            hide_gate(&mut code);
            let callees = callees(start.0, &code, module.symbols);
            Ok(FunctionText {
                start: start.0,
                code,
                callees,
            })
        })
    }

    /// Puts a fault into the guest's own text.
    ///
    /// # Errors
    /// The module is isolated, where a fault belongs into the domain's copy; there is one already;
    /// the instruction is not (any more) what `change` says.
    pub fn set_text_fault(
        &self,
        module: LoadedModule<'_>,
        change: TextChange,
    ) -> Result<(), AttachError> {
        if change.old.len() != change.new.len()
            || !(1..=MAX_INSTRUCTION).contains(&change.old.len())
        {
            return Err(AttachError::OtherCode(change.at));
        }
        let memory = self.vm.ram().memory().clone();
        self.with_text(module, |virt| {
            if self.modules().contains_key(module.name) {
                return Err(AttachError::AlreadyIsolated(module.name.to_owned()));
            }
            let mut fault = self.text_fault();
            if fault.is_some() {
                return Err(AttachError::TextFault);
            }
            let other = || AttachError::OtherCode(change.at);
            let range = GvaRange::new(Gva(change.at), change.old.len() as u64);
            let range = range.ok_or_else(other)?;
            let layout = ModuleLayout::new(module.name, module.sections, None, virt)?;
            if !layout.text().any(|text| text.range.covers(&range))
                || virt.read_vec(Gva(change.at), change.old.len())? != change.old
            {
                return Err(other());
            }
            let mut places = Vec::with_capacity(change.old.len());
            for at in (change.at..).take(change.old.len()) {
                let found = virt.space.walk(virt.memory, Gva(at));
                places.push(found.map_err(|_| other())?.gpa.0);
            }
            let new = TextFault {
                module: module.name.to_owned(),
                waits: change.old.len() as u64 >= OUT_BYTES,
                reached_ns: None,
                places,
                change,
            };
            if !new.write(&new.bytes(), &memory) {
                return Err(AttachError::OtherCode(new.change.at));
            }
            *fault = Some(new);
            Ok(())
        })
    }

    /// Takes the fault out of the guest's text; what became of it. A thread of the guest that was
    /// interrupted in the middle of the fault's code, which can be several instructions, and does
    /// not run now goes on in the middle of the driver's own.
    ///
    /// # Errors
    /// There is none, or it is not there any more; a vCPU stays in the middle of it.
    pub fn clear_text_fault(&self) -> Result<TextFaultStatus, AttachError> {
        let memory = self.vm.ram().memory().clone();
        let begun = Instant::now();
        loop {
            let cleared = self.vm.with_paused(|vcpus| {
                let mut fault = self.text_fault();
                let Some(there) = fault.as_ref() else {
                    return Err(AttachError::NoTextFault);
                };
                if is_in_the_middle(vcpus, &there.change)? {
                    return Ok(None);
                }
                let is_there = there.is_there(&memory);
                if is_there {
                    there.write(&there.change.old, &memory);
                }
                let status = status(there);
                *fault = None;
                match is_there {
                    true => Ok(Some(status)),
                    false => Err(AttachError::OtherCode(status.at)),
                }
            })??;
            match cleared {
                Some(status) => return Ok(status),
                None if begun.elapsed() > RELEASE_WAIT => return Err(AttachError::InTheMiddle),
                None => std::thread::sleep(RELEASE_POLL),
            }
        }
    }

    /// What became of the fault in the guest's text, if there is one.
    pub fn text_fault_status(&self) -> Option<TextFaultStatus> {
        self.text_fault().as_ref().map(status)
    }

    /// A vCPU left the guest at the `out` at `at`. The registers that it goes on with, if that is
    /// the fault's. The others are held.
    pub(crate) fn text_fault_reached(&self, at: u64, regs: &kvm_regs) -> Option<kvm_regs> {
        let mut fault = self.text_fault();
        let waiting = fault.as_mut().filter(|fault| fault.change.at == at)?;
        if waiting.waits {
            waiting.waits = false;
            waiting.reached_ns = Some(monotonic_ns());
            if !waiting.write(&waiting.change.new, self.vm.ram().memory()) {
                tracing::error!("the fault at {at:#x} cannot be put into the guest's text");
            }
        }
        // Another vCPU may have left at it before the fault was there.
        Some(kvm_regs { rip: at, ..*regs })
    }

    pub(crate) fn text_fault(&self) -> MutexGuard<'_, Option<TextFault>> {
        self.text_fault
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the module's text through tables that the guest uses now, with the guest stopped.
    fn with_text<T>(
        &self,
        module: LoadedModule<'_>,
        look: impl FnOnce(&VirtMemory<'_, GuestMemory>) -> Result<T, AttachError>,
    ) -> Result<T, AttachError> {
        let memory = self.vm.ram().memory().clone();
        self.vm.with_paused(|vcpus| {
            let vcpu = vcpus.get(0).ok_or(AttachError::NoKernelTables)?;
            let cpuid = vcpu
                .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
                .map_err(|error| AttachError::Kvm("KVM_GET_CPUID2", error))?;
            let bits = physical_bits(&cpuid);
            let text = text_of(module.name, module.sections)?;
            let (_, space) = live::kernel_tables(vcpus, bits, text, &memory)?;
            let virt = VirtMemory {
                space,
                memory: &*memory,
            };
            look(&virt)
        })?
    }
}

/// Puts what was there before a gate at the function's beginning, with or without `endbr64` in
/// front of it.
fn hide_gate(code: &mut [u8]) {
    let gates = GATE.bytes();
    for at in [0, ENDBR64.len()] {
        let there = code.get_mut(at..at + gates.len());
        if let Some(bytes) = there.filter(|bytes| **bytes == gates) {
            bytes.copy_from_slice(&FTRACE_NOP);
        }
    }
}

fn status(fault: &TextFault) -> TextFaultStatus {
    TextFaultStatus {
        module: fault.module.clone(),
        at: fault.change.at,
        reached_ns: fault.reached_ns,
        tells: fault.waits || fault.reached_ns.is_some(),
    }
}

/// Whether a vCPU stands behind the first byte of what was changed and not behind all of it.
fn is_in_the_middle(vcpus: &mut PausedVcpus<'_>, change: &TextChange) -> Result<bool, AttachError> {
    for vcpu in vcpus.iter_mut() {
        let regs = vcpu
            .get_regs()
            .map_err(|error| AttachError::Kvm("KVM_GET_REGS", error))?;
        let offset = regs.rip.wrapping_sub(change.at);
        if (1..change.new.len() as u64).contains(&offset) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Names of the functions that code at `start` calls or jumps to outside of itself.
fn callees(start: u64, code: &[u8], symbols: &SymbolTable) -> BTreeMap<u64, String> {
    let decoder = Decoder::with_ip(64, code, start, DecoderOptions::NONE);
    let targets = decoder.into_iter().filter(|instruction| {
        instruction.is_call_near()
            || instruction.is_jmp_short_or_near()
            || instruction.is_jcc_short_or_near()
    });
    let targets = targets.map(|instruction| instruction.near_branch_target());
    let outside = targets.filter(|target| target.wrapping_sub(start) >= code.len() as u64);
    outside
        .filter_map(|target| {
            let mut there = symbols.at(Gva(target)).filter(|symbol| symbol.is_code());
            Some((target, there.next()?.name.to_owned()))
        })
        .collect()
}
