//! Where an entry gate fits into a function, and why it does not.
//!
//! ```text
//!   f:    f3 0f 1e fa       endbr64        only with indirect branch tracking
//!   +0    0f 1f 44 00 00    nop            ftrace's, 5 bytes
//!   becomes
//!   +0    e6 EE             out EE, al     entry gate
//!   +2    e6 RR             out RR, al     return gate
//!   +4    90                nop            where the call goes on if nobody answers
//! ```
//!
//! `out` changes no register and exits to user space at once. Only a function that begins with
//! ftrace's NOP can be gated: the kernel itself promises that those five bytes are one instruction
//! that may be replaced while other vCPUs run.

use devices::dma::GuestMemory;
use iced_x86::{Decoder, DecoderOptions, Mnemonic};
use serde::Serialize;
use vm_memory::{Bytes, GuestAddress};

use super::addr::{Gva, GvaRange};
use super::module_text::TextScan;
use super::paging::VirtMemory;
use super::symbols::SymbolTable;

/// Bytes that a gate replaces.
pub const GATE_BYTES: usize = 5;

/// What those bytes are in a function that is not traced: `nopl 0(%rax,%rax,1)`.
pub const FTRACE_NOP: [u8; GATE_BYTES] = [0x0f, 0x1f, 0x44, 0x00, 0x00];

/// What functions begin with whose address is taken, in kernels with indirect branch tracking.
pub const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
const CALL: u8 = 0xe8;
const INT3: u8 = 0xcc;
const OUT_IMM8_AL: u8 = 0xe6;
const NOP: u8 = 0x90;

/// The I/O ports of a pair of gates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GatePorts {
    /// Written when the function is called.
    pub entry: u8,
    /// Written when a kernel function returns to the driver.
    pub returning: u8,
}

impl GatePorts {
    /// The gate's bytes.
    pub fn bytes(self) -> [u8; GATE_BYTES] {
        [OUT_IMM8_AL, self.entry, OUT_IMM8_AL, self.returning, NOP]
    }
}

/// Ports of the gates; the first two of [`vmm::trap::TRAP_PORTS`].
pub(crate) const GATE: GatePorts = GatePorts {
    entry: 0xe0,
    returning: 0xe1,
};

/// Length of `out imm8, al`.
pub(crate) const OUT_BYTES: u64 = 2;

/// Where a gate goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct GateSite {
    /// First byte of the function.
    pub function: Gva,
    /// First byte of the gate: where the NOP is.
    pub gate: Gva,
    /// The function begins with `endbr64`.
    pub endbr: bool,
}

impl GateSite {
    /// Address of the return gate's instruction.
    pub fn return_gate(&self) -> Gva {
        Gva(self.gate.0.wrapping_add(2))
    }

    /// Where the function goes on behind the gate.
    pub fn body(&self) -> Gva {
        Gva(self.gate.0.wrapping_add(GATE_BYTES as u64))
    }
}

/// Why a function cannot be gated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NoGate {
    /// It could be, but what it does not do nobody would make up for.
    #[error("{why}; it is isolated if it is named")]
    NoAnswer {
        /// Why no answer to its caller would do.
        why: &'static str,
    },
    /// There is no code symbol of that name in the module.
    #[error(
        "no such function in the module: it is misspelt, inlined into its callers, or optimised away"
    )]
    NotFound,
    /// There are several.
    #[error("the module has {count} functions of that name; give the address of one")]
    Ambiguous {
        /// How many.
        count: usize,
    },
    /// It was in `.init.text`.
    #[error("the function ran once when the module was loaded and is gone since (.init.text)")]
    InitText,
    /// It does not lie in the module's text.
    #[error("the symbol's address {at} is not in the module's text")]
    OutsideText {
        /// Where it is said to be.
        at: Gva,
    },
    /// Too few bytes to the next function.
    #[error("the function has only {bytes} bytes, a gate needs {GATE_BYTES}")]
    TooShort {
        /// How many.
        bytes: usize,
    },
    /// No NOP at its start.
    #[error(
        "the function has no ftrace NOP (it is notrace, or a cold part of another): it begins with `{begins}`"
    )]
    NoNop {
        /// Its first instruction.
        begins: String,
    },
    /// The NOP is a call now.
    #[error("the function is being traced or live-patched (it calls {tracer}); stop that first")]
    Traced {
        /// What it calls.
        tracer: String,
    },
    /// A probe sits on it.
    #[error(
        "a breakpoint is set on the function (kprobe, or text patching under way); remove it first"
    )]
    Breakpoint,
    /// A gate is there already.
    #[error("the function is gated already")]
    Gated,
    /// Something jumps between the gate's bytes.
    #[error("an instruction of the module jumps to {target}, into the gate's bytes")]
    BranchIntoGate {
        /// Where to.
        target: Gva,
    },
}

/// Says where the gate of `function` goes, from its bytes (`code`, all of it or at least its first
/// 16 bytes) and what else is known of the module's text.
pub fn classify(
    function: Gva,
    code: &[u8],
    scan: &TextScan,
    symbols: &SymbolTable,
) -> Result<GateSite, NoGate> {
    let skip = before_gate(code);
    let begins = &code[skip..];
    let gate = function
        .checked_add(skip as u64)
        .ok_or(NoGate::OutsideText { at: function })?;
    if begins.first() == Some(&INT3) {
        return Err(NoGate::Breakpoint);
    }
    let Some(head) = begins.first_chunk::<GATE_BYTES>() else {
        return Err(NoGate::TooShort { bytes: code.len() });
    };
    match *head {
        FTRACE_NOP => {}
        [OUT_IMM8_AL, _, OUT_IMM8_AL, _, NOP] => return Err(NoGate::Gated),
        [CALL, a, b, c, d] => return Err(call_at_start(gate, [a, b, c, d], code, symbols)),
        _ => {
            return Err(NoGate::NoNop {
                begins: first_instruction(function, code),
            });
        }
    }
    let range = GvaRange::new(gate, GATE_BYTES as u64);
    let range = range.ok_or(NoGate::OutsideText { at: function })?;
    if let Some(target) = scan.targets_in(range).find(|target| *target != gate) {
        return Err(NoGate::BranchIntoGate { target });
    }
    Ok(GateSite {
        function,
        gate,
        endbr: skip > 0,
    })
}

/// Bytes of a function before its gate.
fn before_gate(code: &[u8]) -> usize {
    match code.starts_with(&ENDBR64) {
        true => ENDBR64.len(),
        false => 0,
    }
}

/// Where the gate of a kernel's own function goes, which nobody traces: its address and its guest
/// physical address. `None` if it begins otherwise.
pub fn of_kernel_function(function: Gva, virt: &VirtMemory<'_, GuestMemory>) -> Option<(Gva, u64)> {
    let mut code = [0; ENDBR64.len() + GATE_BYTES];
    virt.read(function, &mut code).ok()?;
    let skip = before_gate(&code);
    let gate = function.checked_add(skip as u64)?;
    let gpa = virt.space.walk(virt.memory, gate).ok()?.gpa.0;
    // One that crosses a page would need two translations.
    let in_page = gpa & 0xfff <= 0x1000 - GATE_BYTES as u64;
    (code[skip..].starts_with(&FTRACE_NOP) && in_page).then_some((gate, gpa))
}

/// A function that begins with a call: of a tracer, or just of something.
fn call_at_start(gate: Gva, displacement: [u8; 4], code: &[u8], symbols: &SymbolTable) -> NoGate {
    let displacement = i64::from(i32::from_le_bytes(displacement)) as u64;
    let target = Gva(gate
        .0
        .wrapping_add(GATE_BYTES as u64)
        .wrapping_add(displacement));
    let is_tracer = |name: &str| name.starts_with("ftrace_") || name == "__fentry__";
    // Trampolines of single tracers have no name, or that of the tracer's "module".
    let traced = symbols
        .at(target)
        .any(|symbol| is_tracer(symbol.name) || symbol.module == Some("__builtin__ftrace"));
    let unnamed = symbols.at(target).next().is_none();
    if traced || unnamed {
        let name = symbols
            .at(target)
            .next()
            .map(|symbol| symbol.name.to_owned());
        NoGate::Traced {
            tracer: name.unwrap_or_else(|| target.to_string()),
        }
    } else {
        NoGate::NoNop {
            begins: first_instruction(gate, code),
        }
    }
}

/// The first instruction behind `endbr64`, as text for a person.
fn first_instruction(at: Gva, code: &[u8]) -> String {
    use iced_x86::Formatter;
    let mut text = String::new();
    let mut formatter = iced_x86::GasFormatter::new();
    let mut decoder = Decoder::with_ip(64, code, at.0, DecoderOptions::NONE);
    let first = decoder.iter().find(|i| i.mnemonic() != Mnemonic::Endbr64);
    match first {
        Some(instruction) => formatter.format(&instruction, &mut text),
        None => text.push_str("(nothing)"),
    }
    text
}

/// Writes a gate; `false` if there is no memory.
pub(crate) fn set_gate(memory: &GuestMemory, gpa: u64) -> bool {
    memory.write_slice(&GATE.bytes(), GuestAddress(gpa)).is_ok()
}

/// Puts the NOP back, if the gate is still there: the module may be gone and its memory another's.
pub(crate) fn clear_gate(memory: &GuestMemory, gpa: u64) {
    let mut now = [0; GATE_BYTES];
    let there = memory.read_slice(&mut now, GuestAddress(gpa)).is_ok() && now == GATE.bytes();
    if there && memory.write_slice(&FTRACE_NOP, GuestAddress(gpa)).is_err() {
        tracing::error!("cannot take a gate out of guest memory at {gpa:#x}");
    }
}

#[cfg(test)]
#[path = "gate_tests.rs"]
mod tests;
