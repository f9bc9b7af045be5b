//! The kernel's console in a call: what it prints is in the log at once, and written out after it.
//!
//! A kernel that prints takes its console and writes to whatever device that is: the call would
//! reach a device that is not its own, and go on in the guest for it, where a kernel that prints
//! because it is about to give up (`BUG()`) takes the guest with it.

use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, eax, qword_ptr};

use super::monitor::{PORT_TRAPPED, out};

/// How the private VM takes the kernel's console.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Console {
    /// Guest virtual address of the kernel's function that takes it.
    pub(super) take: u64,
    /// What the private VM has there.
    pub(super) code: Vec<u8>,
}

impl Console {
    /// How long the code is that the private VM has in the place of the kernel's.
    pub const CODE_BYTES: u64 = 21;

    /// Of guest virtual addresses: the function that takes the console if nobody has it, and says
    /// whether it has; the word that says who writes to it at this moment and can be waited for, 0
    /// for none; the function without arguments that has it written to soon. `None` where they are
    /// too far from each other for what is put there.
    pub fn new(take: u64, writer: u64, defer: u64) -> Option<Self> {
        let code = assemble(take, writer, defer).ok()?;
        // A call that does not reach gets longer.
        let fits = code.len() as u64 == Self::CODE_BYTES;
        fits.then_some(Self { take, code })
    }

    /// Where P stops if it would have to wait for who writes.
    pub(super) fn waits_at(&self) -> u64 {
        let before = Self::CODE_BYTES - out(PORT_TRAPPED).len() as u64;
        self.take.wrapping_add(before)
    }
}

fn assemble(take: u64, writer: u64, defer: u64) -> Result<Vec<u8>, IcedError> {
    let mut code = CodeAssembler::new(64)?;
    let mut waits = code.create_label();
    code.cmp(qword_ptr(writer), 0)?;
    code.jne(waits)?;
    code.call(defer)?;
    code.xor(eax, eax)?;
    code.ret()?;
    code.set_label(&mut waits)?;
    code.db(&out(PORT_TRAPPED))?;
    code.assemble(take)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAKE: u64 = 0xffff_ffff_8111_b500;
    const WRITER: u64 = 0xffff_ffff_82a0_1238;
    const DEFER: u64 = 0xffff_ffff_8111_e3e0;

    #[test]
    fn the_code_ends_where_the_guest_is_to_go_on() {
        let console = Console::new(TAKE, WRITER, DEFER).unwrap();
        assert_eq!(console.waits_at(), TAKE + 19);
        assert_eq!(console.code[19..], out(PORT_TRAPPED));
    }

    #[test]
    fn what_code_does_not_reach_is_refused() {
        assert_eq!(Console::new(TAKE, 0xffff_8880_0000_1000, DEFER), None);
        assert_eq!(Console::new(TAKE, WRITER, 0x9000_0000), None);
    }
}
