//! Where the descriptors of a ring are (3.2.6 and 3.4.1).

use super::regs::RegisterFile;

/// Bytes of a descriptor, of each kind.
pub const DESCRIPTOR_BYTES: u32 = 16;

/// One descriptor ring as its registers give it at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ring {
    base: u64,
    /// Number of descriptors, at most 65,528.
    pub count: u32,
    /// First descriptor that belongs to the controller.
    pub head: u32,
    /// One behind the last descriptor that belongs to the controller.
    pub tail: u32,
}

impl Ring {
    /// The ring whose base address register (low half) is at `base`; the others have fixed places
    /// after it.
    pub fn at(regs: &RegisterFile, base: u32) -> Self {
        Self {
            base: u64::from(regs.get(base + 4)) << 32 | u64::from(regs.get(base)),
            count: regs.get(base + 8) / DESCRIPTOR_BYTES,
            head: regs.get(base + 0x10),
            tail: regs.get(base + 0x18),
        }
    }

    /// Guest physical address and length in bytes of all descriptors.
    pub fn memory(&self) -> (u64, usize) {
        (self.base, (self.count * DESCRIPTOR_BYTES) as usize)
    }

    /// Whether head and tail are in the ring. Outside of it the controller would run over whatever
    /// lies behind; here it stands still.
    pub fn is_sane(&self) -> bool {
        self.head < self.count && self.tail < self.count
    }

    /// Descriptors that belong to the controller. Only for a sane ring.
    pub fn available(&self) -> u32 {
        match self.tail.checked_sub(self.head) {
            Some(distance) => distance,
            None => (self.count + self.tail).saturating_sub(self.head),
        }
    }

    /// Descriptors from the head on that are available and lie one after the other in memory.
    pub fn contiguous(&self) -> u32 {
        self.available().min(self.count.saturating_sub(self.head))
    }

    /// Guest physical address of the descriptor at the head. Wraps at 2^64 as the bus would.
    pub fn head_address(&self) -> u64 {
        self.base
            .wrapping_add(u64::from(self.head) * u64::from(DESCRIPTOR_BYTES))
    }

    /// Moves the head on by one.
    pub fn advance(&mut self) {
        self.head += 1;
        if self.head >= self.count {
            self.head = 0;
        }
    }
}
