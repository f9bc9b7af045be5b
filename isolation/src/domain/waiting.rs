//! Kernel functions that wait until others have done something: in a call the others stand still.
//!
//! Where nothing is under way there is nothing to wait for, and the private VM's copy of such a
//! function returns at once. Otherwise the call goes on in the guest, where the others go on, too.

use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, dword_ptr, rdi};

use super::monitor::{PORT_TRAPPED, out};

/// A kernel function that waits while bits are set in a word of what its first argument points at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// Guest virtual address of the function.
    pub(super) function: u64,
    /// What the private VM has there.
    pub(super) code: Vec<u8>,
}

impl Waiting {
    /// How long the code is at most that the private VM has in the place of the kernel's.
    pub const MAX_CODE_BYTES: u64 = 15;

    /// The function at guest virtual address `function`, which waits while any of `bits` is set in
    /// the 32-bit word `offset` bytes behind what RDI points at. `None` where the offset is none
    /// that an instruction has.
    pub fn new(function: u64, offset: u64, bits: u32) -> Option<Self> {
        let offset = i32::try_from(offset).ok()?;
        let code = assemble(function, offset, bits).ok()?;
        Some(Self { function, code })
    }

    /// Where P stops if there is something to wait for.
    pub(super) fn waits_at(&self) -> u64 {
        let before = self.code.len() - out(PORT_TRAPPED).len();
        self.function.wrapping_add(before as u64)
    }
}

fn assemble(function: u64, offset: i32, bits: u32) -> Result<Vec<u8>, IcedError> {
    let mut code = CodeAssembler::new(64)?;
    let mut waits = code.create_label();
    code.test(dword_ptr(rdi + offset), bits)?;
    code.jne(waits)?;
    code.ret()?;
    code.set_label(&mut waits)?;
    code.db(&out(PORT_TRAPPED))?;
    code.assemble(function)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_ends_where_the_guest_is_to_go_on() {
        for offset in [0, 0x38, 0x1234] {
            let waiting = Waiting::new(0xffff_ffff_8111_0000, offset, 1 << 18).unwrap();
            assert!(waiting.code.len() as u64 <= Waiting::MAX_CODE_BYTES);
            let at = (waiting.waits_at() - waiting.function) as usize;
            assert_eq!(waiting.code[at..], out(PORT_TRAPPED));
        }
        assert_eq!(Waiting::new(0, 1 << 31, 1), None);
    }
}
