//! What kernel functions that a driver calls do that outlasts a call, by address: what a call that
//! went on in the guest before it failed is compensated by.
//!
//! The model that this comes from has names ([`crate::compensation::effects`]). They are looked up
//! once, when a module is isolated: in the middle of a call nothing may be missing.

use std::collections::{HashMap, HashSet};

use serde::Serialize;

/// A call of a kernel function, with the arguments in registers (System V ABI, section 3.2.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct KernelCall {
    /// Guest virtual address of the function.
    pub function: u64,
    /// `rdi`, `rsi`, `rdx`, `rcx`, `r8`, `r9`.
    pub arguments: [u64; 6],
}

/// A number behind an argument that is a pointer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Which argument, from 0 to 5.
    pub argument: u8,
    /// Offset in bytes from where it points.
    pub offset: u64,
    /// Size of the number in bytes: 1, 2, 4 or 8.
    pub bytes: u8,
}

/// What an opposite is called with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OppositeArgument {
    /// What the function returned.
    Result,
    /// An argument of the function, from 0 to 5.
    Own(u8),
    /// What stood there when the function had returned.
    At(Place),
    /// A number.
    Constant(u64),
}

/// The function that takes back what another one did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opposite {
    /// Guest virtual address.
    pub function: u64,
    /// At most six.
    pub arguments: Vec<OppositeArgument>,
}

/// Which results mean that a function did something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Success {
    /// All.
    Always,
    /// `true`, in the low byte.
    True,
    /// A 32-bit number that is not negative.
    NotNegative,
    /// A pointer that is neither `NULL` nor an error.
    Pointer,
    /// A 64-bit number that is not negative.
    NotNegativeLong,
    /// Any but all ones (`DMA_MAPPING_ERROR`).
    NotAllOnes,
}

impl Success {
    /// Whether a function that returned `result` did something.
    pub fn is(self, result: u64) -> bool {
        // `IS_ERR_VALUE`, include/linux/err.h.
        const ERRORS: u64 = 4095;
        match self {
            Self::Always => true,
            Self::True => result as u8 != 0,
            Self::NotNegative => (result as u32).cast_signed() >= 0,
            Self::NotNegativeLong => result.cast_signed() >= 0,
            Self::Pointer => result != 0 && result < 0u64.wrapping_sub(ERRORS),
            Self::NotAllOnes => result != u64::MAX,
        }
    }
}

/// A function that begins or ends what is over before the call is: a lock that is held, a wait in a
/// queue. What has begun so is ended also where something else of a failed call stays, since nobody
/// else ends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Pair {
    /// It begins it.
    Begins,
    /// It begins it, or goes on with it: with the same arguments it is not begun a second time. If it
    /// fails, it has ended it.
    GoesOn,
    /// It ends it, and does nothing else.
    Ends,
}

/// What a kernel function does that outlasts a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effect {
    /// What takes it back; `None` if nothing does.
    pub undo: Option<Opposite>,
    /// Whether it is done only when the call has ended well.
    pub deferred: bool,
    /// When it did something.
    pub success: Success,
    /// A number that is another one afterwards if it did something.
    pub changes: Option<Place>,
    /// What it begins, or ends, that is over before the call is.
    pub pair: Option<Pair>,
}

/// What an argument has to be that a function keeps: it is used when the call is over, and what it
/// leads to then is not laid at the driver's door any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeptArgument {
    /// Which argument, from 0 to 5.
    pub argument: u8,
    /// Offset in bytes of the word that is meant from where the argument points; `None` for the
    /// argument itself.
    pub offset: Option<u64>,
    /// What it has to be.
    pub is: Required,
}

/// See [`KeptArgument`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Required {
    /// The address of a function.
    Function,
    /// An object in a list of the kernel's (`struct list_head`).
    Listed {
        /// Guest virtual address of the list's head.
        head: u64,
        /// Offset in bytes of the links in an object.
        links: u64,
    },
}

/// The kernel functions that are known.
#[derive(Debug, Clone, Default)]
pub struct KernelEffects {
    /// Functions that do something that lasts.
    pub lasting: HashMap<u64, Effect>,
    /// Functions that leave nothing behind but bytes in memory.
    pub harmless: HashSet<u64>,
    /// Functions that may be called with interrupts off.
    pub interrupts_off: HashSet<u64>,
    /// What functions keep of what they are given.
    pub keeps: HashMap<u64, Vec<KeptArgument>>,
}

impl KernelEffects {
    /// Whether calls of the function at `va` have to be seen.
    pub fn matters(&self, va: u64) -> bool {
        !self.harmless.contains(&va)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_say_whether_a_function_did_something() {
        let enomem = (-12i64).cast_unsigned();
        assert!(Success::Pointer.is(0xffff_8880_0000_1000));
        assert!(!Success::Pointer.is(0) && !Success::Pointer.is(enomem));
        assert!(Success::NotNegative.is(0) && Success::NotNegative.is(7));
        assert!(!Success::NotNegative.is(enomem) && !Success::NotNegative.is(0xffff_fff4));
        // The upper bytes of a `bool` are anything.
        assert!(Success::True.is(0xff01) && !Success::True.is(0xff00));
        assert!(Success::NotNegativeLong.is(0) && !Success::NotNegativeLong.is(enomem));
        assert!(Success::NotNegativeLong.is(0xffff_fff4));
        assert!(Success::NotAllOnes.is(0x1000) && !Success::NotAllOnes.is(u64::MAX));
        assert!(Success::Always.is(0));
    }
}
