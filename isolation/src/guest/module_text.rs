//! The instructions of a module that leave straight-line code, as they are in memory right now.
//!
//! Text in memory differs from the file: relocations are applied, alternatives and return thunks
//! are patched for the processor, `call`s of the tracer are NOPs. So it is the memory that is
//! decoded, function by function, so that data or damage in one does not lead the decoder astray
//! in the next. The bytes are hostile: what cannot be decoded is listed and stepped over.
//!
//! The result tells which `call`s can be redirected to trampolines. What it misses (code reached by
//! a jump into the middle of an instruction, code written later) is caught at run time, because
//! text outside the domain is not executable there.

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind};
use serde::Serialize;

use super::addr::{Gva, GvaRange};
use super::symbols::SymbolTable;

/// Most text that is decoded at once, in bytes. Debian's largest driver modules have about 4 MiB.
pub const MAX_TEXT: usize = 32 << 20;

/// A piece of a module's text.
#[derive(Debug, Clone, Copy)]
pub struct TextPart<'a> {
    /// Where it lies.
    pub at: Gva,
    /// What is there now.
    pub bytes: &'a [u8],
}

impl TextPart<'_> {
    fn range(&self) -> Option<GvaRange> {
        GvaRange::new(self.at, self.bytes.len() as u64)
    }
}

/// How a direct branch is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Flow {
    /// `call`.
    Call,
    /// `jmp`: where it leaves the text, a tail call.
    Jump,
    /// `jcc` and the like.
    ConditionalJump,
}

/// What a direct branch reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reach {
    /// The module's own text.
    Inside,
    /// `__x86_indirect_thunk_*` and its kin: an indirect call or jump through a register.
    IndirectThunk,
    /// `__x86_return_thunk` and what it is replaced by: a return.
    ReturnThunk,
    /// ftrace: the function is being traced or live-patched.
    Tracer,
    /// Any other code: a function of the kernel or of another module.
    Outside,
}

/// What is at a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SiteKind {
    /// A branch whose target is in the instruction.
    Direct {
        /// How it is taken.
        flow: Flow,
        /// Where it goes.
        target: Gva,
        /// What is there.
        reach: Reach,
    },
    /// A branch through a register or memory.
    Indirect {
        /// `call`, not `jmp`.
        call: bool,
        /// The pointer's address, if the instruction says it.
        pointer: Option<Gva>,
    },
    /// `ret`.
    Return,
    /// Privileged, or of the interrupt flag or of I/O ports: `cli`, `out`, `wrmsr`, `popf`, ...
    Sensitive,
    /// `ud2`, `int3`, `int n`.
    Trap,
    /// No instruction.
    Undecodable,
}

/// An instruction that leaves straight-line code or needs attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Site {
    /// Its first byte.
    pub at: Gva,
    /// Its length in bytes (1 for what cannot be decoded).
    pub len: u8,
    /// What it is.
    pub kind: SiteKind,
}

impl Site {
    /// Whether this is a direct `call` or tail `jmp` out of the text to an ordinary function: what
    /// a trampoline serves. Its target is the 32-bit displacement in the last four bytes.
    pub fn is_import(&self) -> bool {
        matches!(
            self.kind,
            SiteKind::Direct {
                reach: Reach::Outside,
                ..
            }
        )
    }
}

/// What a module's text does.
#[derive(Debug, Clone, Default)]
pub struct TextScan {
    /// All sites but branches within the text, by address.
    sites: Vec<Site>,
    /// Targets of direct branches within the text, sorted, each once. Calls of a function's first
    /// byte included.
    inner_targets: Vec<u64>,
    /// Instructions decoded.
    instructions: usize,
}

/// The text is larger than [`MAX_TEXT`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("module text of {bytes} bytes is larger than any driver's")]
pub struct TextTooLarge {
    /// Its size.
    pub bytes: usize,
}

impl TextScan {
    /// Decodes `parts`, which together are a module's text. Functions begin where `symbols` says.
    pub fn of(parts: &[TextPart<'_>], symbols: &SymbolTable) -> Result<Self, TextTooLarge> {
        let bytes = parts
            .iter()
            .fold(0, |sum: usize, part| sum.saturating_add(part.bytes.len()));
        if bytes > MAX_TEXT {
            return Err(TextTooLarge { bytes });
        }
        let inside: Vec<GvaRange> = parts.iter().filter_map(TextPart::range).collect();
        let mut scan = Self::default();
        for part in parts {
            let Some(whole) = part.range() else { continue };
            let mut at = whole.first();
            while let Some(function) = symbols.extent(at, whole) {
                let from = (at.0 - whole.first().0) as usize;
                let code = &part.bytes[from..from + function.len_bytes() as usize];
                scan.function(at, code, &inside, symbols);
                match function.last().checked_add(1) {
                    Some(next) => at = next,
                    None => break,
                }
            }
        }
        scan.sites.sort_by_key(|site| site.at);
        scan.inner_targets.sort_unstable();
        scan.inner_targets.dedup();
        Ok(scan)
    }

    /// All sites but branches within the text, by address.
    pub fn sites(&self) -> &[Site] {
        &self.sites
    }

    /// Direct branches out of the text to ordinary functions.
    pub fn imports(&self) -> impl Iterator<Item = &Site> {
        self.sites.iter().filter(|site| site.is_import())
    }

    /// The addresses in `range` that a direct branch within the text goes to.
    pub fn targets_in(&self, range: GvaRange) -> impl Iterator<Item = Gva> {
        let first = self
            .inner_targets
            .partition_point(|target| *target < range.first().0);
        let rest = self.inner_targets[first..].iter().copied().map(Gva);
        rest.take_while(move |target| *target <= range.last())
    }

    /// Instructions decoded.
    pub fn instructions(&self) -> usize {
        self.instructions
    }

    fn function(&mut self, at: Gva, code: &[u8], inside: &[GvaRange], symbols: &SymbolTable) {
        let mut decoder = Decoder::with_ip(64, code, at.0, DecoderOptions::NONE);
        let mut instruction = Instruction::default();
        while decoder.can_decode() {
            let from = decoder.position();
            decoder.decode_out(&mut instruction);
            let here = Gva(at.0.wrapping_add(from as u64));
            if instruction.is_invalid() {
                self.sites.push(Site {
                    at: here,
                    len: 1,
                    kind: SiteKind::Undecodable,
                });
                if decoder.set_position(from + 1).is_err() {
                    return;
                }
                decoder.set_ip(here.0.wrapping_add(1));
                continue;
            }
            self.instructions += 1;
            let Some(kind) = kind_of(&instruction, inside, symbols) else {
                continue;
            };
            if let SiteKind::Direct {
                target,
                reach: Reach::Inside,
                ..
            } = kind
            {
                self.inner_targets.push(target.0);
                continue;
            }
            self.sites.push(Site {
                at: here,
                len: instruction.len() as u8,
                kind,
            });
        }
    }
}

/// What kind of site an instruction is; `None` if execution goes on behind it and no harm is done.
fn kind_of(
    instruction: &Instruction,
    inside: &[GvaRange],
    symbols: &SymbolTable,
) -> Option<SiteKind> {
    if is_sensitive(instruction) {
        return Some(SiteKind::Sensitive);
    }
    let direct = |flow| {
        let target = Gva(instruction.near_branch_target());
        let reach = match inside.iter().any(|range| range.contains(target)) {
            true => Reach::Inside,
            false => reach_of(target, symbols),
        };
        SiteKind::Direct {
            flow,
            target,
            reach,
        }
    };
    let near = matches!(
        instruction.op0_kind(),
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
    );
    let indirect = |call| {
        let pointer = instruction
            .is_ip_rel_memory_operand()
            .then(|| Gva(instruction.ip_rel_memory_address()));
        SiteKind::Indirect { call, pointer }
    };
    match instruction.flow_control() {
        FlowControl::Next => None,
        FlowControl::Call if near => Some(direct(Flow::Call)),
        FlowControl::UnconditionalBranch if near => Some(direct(Flow::Jump)),
        FlowControl::ConditionalBranch if near => Some(direct(Flow::ConditionalJump)),
        FlowControl::IndirectCall => Some(indirect(true)),
        FlowControl::IndirectBranch => Some(indirect(false)),
        FlowControl::Return if matches!(instruction.mnemonic(), Mnemonic::Ret) => {
            Some(SiteKind::Return)
        }
        FlowControl::Interrupt | FlowControl::Exception => Some(SiteKind::Trap),
        // Far branches, system calls, transactions: no driver has any.
        _ => Some(SiteKind::Sensitive),
    }
}

/// Instructions that a driver's code should leave to the kernel: they fault outside ring 0, or
/// change the interrupt flag, or reach I/O ports.
fn is_sensitive(instruction: &Instruction) -> bool {
    use Mnemonic::{Cli, In, Insb, Insd, Insw, Out, Outsb, Outsd, Outsw, Popf, Popfd, Popfq, Sti};
    instruction.is_privileged()
        || matches!(instruction.code(), Code::Xsetbv)
        || matches!(
            instruction.mnemonic(),
            Cli | Sti
                | Popf
                | Popfd
                | Popfq
                | In
                | Out
                | Insb
                | Insw
                | Insd
                | Outsb
                | Outsw
                | Outsd
        )
}

/// What a target outside the text is, by the names it has.
fn reach_of(target: Gva, symbols: &SymbolTable) -> Reach {
    symbols
        .at(target)
        .map(|symbol| reach_by_name(symbol.name))
        .find(|reach| *reach != Reach::Outside)
        .unwrap_or(Reach::Outside)
}

/// Names of Linux 5.15 to 6.12 (`arch/x86/lib/retpoline.S`, `arch/x86/kernel/ftrace_64.S`).
fn reach_by_name(name: &str) -> Reach {
    let return_thunk = name.ends_with("_return_thunk")
        || matches!(
            name,
            "retbleed_untrain_ret" | "srso_safe_ret" | "srso_alias_safe_ret"
        );
    let tracer = [
        "ftrace_caller",
        "ftrace_regs_caller",
        "ftrace_trampoline",
        "__fentry__",
    ];
    if return_thunk {
        Reach::ReturnThunk
    } else if name.starts_with("__x86_indirect_") {
        Reach::IndirectThunk
    } else if tracer.contains(&name) {
        Reach::Tracer
    } else {
        Reach::Outside
    }
}

#[cfg(test)]
#[path = "module_text_tests.rs"]
mod tests;
