//! Who had called whom, from the fault outwards, across the crossings between driver and kernel.
//!
//! ```text
//!   stack, upwards                            frame
//!   rsp at the fault                          the fault
//!     words that may be return addresses      found ("?")
//!   return into the driver                    a crossing: known
//!     words that may be return addresses      found
//!   return to the caller of the call          known
//!     words that may be return addresses      found, to the end of the stack
//! ```
//!
//! What the domain has kept of the call is known for sure. In between return addresses are found by
//! what they look like: a kernel has no frame pointers, and an old one may lie on the stack that
//! nobody returns to any more.

use super::manifest::ReturnPoint;
use super::reader::FaultImage;
use crate::guest::addr::Gva;
use crate::guest::stack::THREAD_SIZE;

/// Most frames.
const MAX_FRAMES: usize = 128;
/// Where kernel and modules are (Documentation/x86/x86_64/mm.rst).
const KERNEL_IMAGE: u64 = 0xffff_ffff_8000_0000;
/// Bytes before a return address that a call may have.
const CALL_BYTES: u64 = 7;

/// How a frame is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FrameKind {
    /// It is where the processor was.
    Fault,
    /// The driver had called a kernel function from there.
    Crossing,
    /// A kernel function had called the driver back from there.
    Callback,
    /// The call would have returned there.
    Caller,
    /// A word on the stack that looks like it.
    Found,
}

/// A frame of the back trace.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Frame {
    /// The instruction that is next there.
    pub address: u64,
    /// Stack pointer there.
    pub rsp: u64,
    /// How it is known.
    pub kind: FrameKind,
    /// `function+0x12 [module]`, or the address.
    pub place: String,
}

impl FaultImage {
    /// The back trace, innermost frame first.
    pub fn trace(&self) -> Vec<Frame> {
        let manifest = self.manifest();
        let registers = &manifest.registers;
        let mut frames = Vec::new();
        let first = ReturnPoint {
            address: registers.rip,
            rsp: registers.rsp,
        };
        frames.push(self.frame(first, FrameKind::Fault));
        let mut from = registers.rsp;
        for (point, kind) in self.known_points() {
            let slot = point.rsp.wrapping_sub(8);
            if is_above(slot, from) {
                self.look_through(from, slot, &mut frames);
            }
            frames.push(self.frame(point, kind));
            from = point.rsp;
        }
        let end = from.saturating_add(THREAD_SIZE);
        self.look_through(from, end, &mut frames);
        frames.truncate(MAX_FRAMES);
        frames
    }

    /// What is known for sure, innermost first.
    fn known_points(&self) -> Vec<(ReturnPoint, FrameKind)> {
        let manifest = self.manifest();
        let rsp = manifest.registers.rsp;
        let crossings = manifest.crossings.iter();
        let callbacks = manifest.callbacks.iter();
        let mut points: Vec<(ReturnPoint, FrameKind)> = crossings
            .map(|point| (*point, FrameKind::Crossing))
            .chain(callbacks.map(|point| (*point, FrameKind::Callback)))
            .collect();
        points.push((manifest.returns_to, FrameKind::Caller));
        // What is below on the same stack has returned.
        let is_same_stack = |point: &ReturnPoint| point.rsp.abs_diff(rsp) < 2 * THREAD_SIZE;
        points.retain(|(point, _)| !is_same_stack(point) || point.rsp > rsp);
        // The kernel may have changed to a stack for interrupts: what is on this one comes first.
        points.sort_by_key(|(point, kind)| {
            let is_last = *kind == FrameKind::Caller;
            (is_last, !is_same_stack(point), point.rsp)
        });
        // Functions called in the place of others return together.
        points.dedup_by_key(|(point, _)| *point);
        points
    }

    /// Adds what looks like a return address among the words from `from` to below `end`.
    fn look_through(&self, from: u64, end: u64, frames: &mut Vec<Frame>) {
        let Some(first) = from.checked_next_multiple_of(8) else {
            return;
        };
        let words = (end.saturating_sub(first) / 8).min(2 * THREAD_SIZE / 8);
        for word in 0..words {
            let at = first.wrapping_add(word * 8);
            // Behind the end of a stack there is nothing.
            let Ok(address) = self.virt().read_u64(Gva(at)) else {
                return;
            };
            if frames.len() >= MAX_FRAMES {
                return;
            }
            if self.is_return_address(address) {
                let rsp = at.wrapping_add(8);
                let point = ReturnPoint { address, rsp };
                frames.push(self.frame(point, FrameKind::Found));
            }
        }
    }

    fn is_return_address(&self, address: u64) -> bool {
        if address < KERNEL_IMAGE {
            return false;
        }
        let before = address.wrapping_sub(1);
        let symbol = self.symbols().lookup(Gva(before));
        if !symbol.is_some_and(|(symbol, _)| symbol.is_code()) {
            return false;
        }
        let mut code = [0; CALL_BYTES as usize];
        let at = Gva(address.wrapping_sub(CALL_BYTES));
        self.virt().read(at, &mut code).is_ok() && ends_in_call(&code)
    }

    fn frame(&self, point: ReturnPoint, kind: FrameKind) -> Frame {
        let ReturnPoint { address, rsp } = point;
        // A call at the very end of a function returns to the next one.
        let called_from = address.wrapping_sub(1);
        let place = match kind {
            FrameKind::Fault => self.name(address),
            _ => self.name(called_from).map(|name| one_more(&name)),
        };
        Frame {
            address,
            rsp,
            kind,
            place: place.unwrap_or_else(|| format!("{address:#x}")),
        }
    }
}

/// Whether `other` is on the same stack, not below.
fn is_above(other: u64, rsp: u64) -> bool {
    other
        .checked_sub(rsp)
        .is_some_and(|bytes| bytes < 2 * THREAD_SIZE)
}

/// `symbol+0x12 [module]` with an offset that is one more.
fn one_more(name: &str) -> String {
    let increased = || {
        let (symbol, rest) = name.split_once("+0x")?;
        let (digits, module) = rest.split_once(' ').map_or((rest, ""), |(d, m)| (d, m));
        let offset = u64::from_str_radix(digits, 16).ok()?.checked_add(1)?;
        let space = if module.is_empty() { "" } else { " " };
        Some(format!("{symbol}+{offset:#x}{space}{module}"))
    };
    increased().unwrap_or_else(|| name.to_owned())
}

/// Whether the last instruction of `code` may be a call (Intel SDM volume 2, `CALL`): `e8` with a
/// displacement, or `ff /2` with its operand in each form that it has in 64-bit code.
fn ends_in_call(code: &[u8; CALL_BYTES as usize]) -> bool {
    let back = |bytes: usize| {
        let at = code.len().checked_sub(bytes)?;
        code.get(at).copied()
    };
    let indirect = |bytes: usize| {
        let operand = back(bytes - 1).map(|modrm| modrm & 0x38);
        back(bytes) == Some(0xff) && operand == Some(0x10)
    };
    back(5) == Some(0xe8) || [2, 3, 4, 6, 7].into_iter().any(indirect)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_told_by_their_last_bytes() {
        // call rel32; call *%rax; call *0x10(%rax); call *0x10(%rsp); call *0x100(%rax); call
        // *disp32(,%rax,8)
        for call in [
            &[0xe8, 1, 2, 3, 4][..],
            &[0xff, 0xd0],
            &[0xff, 0x50, 0x10],
            &[0xff, 0x54, 0x24, 0x10],
            &[0xff, 0x90, 0, 1, 0, 0],
            &[0xff, 0x14, 0xc5, 0, 0, 0, 0],
        ] {
            let mut code = [0x90; CALL_BYTES as usize];
            code[CALL_BYTES as usize - call.len()..].copy_from_slice(call);
            assert!(ends_in_call(&code), "{call:x?}");
        }
        // jmp *%rax is none, nor is a row of nops.
        assert!(!ends_in_call(&[0x90, 0x90, 0x90, 0x90, 0x90, 0xff, 0xe0]));
        assert!(!ends_in_call(&[0x90; 7]));
    }

    #[test]
    fn a_return_address_is_named_by_the_call_before_it() {
        assert_eq!(one_more("f+0xf [m]"), "f+0x10 [m]");
        assert_eq!(one_more("f+0x1"), "f+0x2");
        assert_eq!(one_more("odd"), "odd");
    }
}
