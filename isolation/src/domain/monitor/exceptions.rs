//! Exceptions of P: what the processor pushed when a vector's stub ran.

use super::{EXCEPTION_STACK, Monitor, PAGE_SIZE, VECTOR_STUB_BYTES, VECTORS};

/// What an exception pushed, with the vector whose stub ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExceptionFrame {
    /// Vector (Intel SDM volume 3, table 6-1).
    pub vector: u8,
    /// Error code; 0 for vectors without one.
    pub error_code: u64,
    /// Interrupted RIP.
    pub rip: u64,
    /// Interrupted RFLAGS.
    pub rflags: u64,
    /// Interrupted RSP.
    pub rsp: u64,
}

impl Monitor {
    /// The frame of the exception whose stub exited with RSP `rsp` at RIP `rip`; `None` where the
    /// two cannot come from a stub.
    pub fn exception_frame(&self, rip: u64, rsp_at_exit: u64) -> Option<ExceptionFrame> {
        let offset = rip.checked_sub(self.va + VECTORS * PAGE_SIZE)?;
        let vector = u8::try_from(offset / VECTOR_STUB_BYTES).ok()?;
        let stack = self.va + EXCEPTION_STACK * PAGE_SIZE;
        let mut at = rsp_at_exit.checked_sub(stack)?;
        let with_code = has_error_code(vector);
        if at % 8 != 0 || at.checked_add(if with_code { 48 } else { 40 })? > PAGE_SIZE {
            return None;
        }
        let mut next = || {
            let value = self.get(EXCEPTION_STACK, at);
            at += 8;
            value
        };
        let error_code = if with_code { next() } else { 0 };
        // RIP, CS, RFLAGS, RSP, SS as pushed in 64-bit mode (Intel SDM volume 3, figure 6-9).
        let [rip, _cs, rflags, stack_pointer] = [next(), next(), next(), next()];
        Some(ExceptionFrame {
            vector,
            error_code,
            rip,
            rflags,
            rsp: stack_pointer,
        })
    }
}

/// Vectors that push an error code (Intel SDM volume 3, table 6-1; 29 and 30 are AMD's #VC and
/// #SX).
fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VA: u64 = 0xffff_ffff_fee0_0000;

    fn monitor() -> Monitor {
        Monitor::new(1 << 38, VA, 0x1000, 0x2000).unwrap()
    }

    #[test]
    fn frames_outside_the_exception_stack_are_refused() {
        let monitor = monitor();
        let stub = VA + PAGE_SIZE + 14 * VECTOR_STUB_BYTES + 2;
        let stack_end = VA + (EXCEPTION_STACK + 1) * PAGE_SIZE;
        assert!(monitor.exception_frame(stub, stack_end - 48).is_some());
        assert!(monitor.exception_frame(stub, stack_end - 40).is_none());
        assert!(monitor.exception_frame(stub, 0x1000).is_none());
        assert!(monitor.exception_frame(0x1000, stack_end - 48).is_none());
    }
}
