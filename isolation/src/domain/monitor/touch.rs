//! The stub that reads of pages before there is a call.

use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, al, byte_ptr, rcx, rsi};

use super::{Monitor, PAGE_SIZE};

impl Monitor {
    /// Reads a byte of each of the RCX pages from RSI on, in the root that is loaded, and exits as an
    /// isolated function that returns.
    pub fn touch_stub(&self) -> u64 {
        self.va + 0x90
    }

    pub(super) fn touch_code(&self) -> Result<Vec<u8>, IcedError> {
        let mut a = CodeAssembler::new(64)?;
        let mut next = a.create_label();
        a.set_label(&mut next)?;
        a.mov(al, byte_ptr(rsi))?;
        a.add(rsi, PAGE_SIZE as i32)?;
        a.dec(rcx)?;
        a.jnz(next)?;
        a.jmp(self.exit_stub())?;
        a.assemble(self.touch_stub())
    }
}
