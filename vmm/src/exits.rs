//! Why vCPUs left the guest: counts, and the last few of them for when one stops for good. Cheap
//! enough to be always on.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// Why a vCPU left the guest and came to this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum ExitKind {
    /// Read of an I/O port.
    IoIn,
    /// Write of an I/O port other than the trap ports.
    IoOut,
    /// Read of memory that is not RAM.
    MmioRead,
    /// Write of memory that is not RAM.
    MmioWrite,
    /// Write of a trap port with a handler attached.
    Trap,
    /// A signal of ours or another.
    Interrupted,
    /// Triple fault.
    Shutdown,
    /// KVM's dirty ring was full.
    DirtyRing,
    /// Anything else.
    Other,
}

impl ExitKind {
    const ALL: [Self; KINDS] = [
        Self::IoIn,
        Self::IoOut,
        Self::MmioRead,
        Self::MmioWrite,
        Self::Trap,
        Self::Interrupted,
        Self::Shutdown,
        Self::DirtyRing,
        Self::Other,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::IoIn => "in",
            Self::IoOut => "out",
            Self::MmioRead => "load",
            Self::MmioWrite => "store",
            Self::Trap => "trap",
            Self::Interrupted => "signal",
            Self::Shutdown => "shutdown",
            Self::DirtyRing => "dirty ring",
            Self::Other => "other",
        }
    }
}

const KINDS: usize = ExitKind::Other as usize + 1;
/// Exits that are remembered.
const REMEMBERED: usize = 8;
/// A remembered exit is its kind in the upper byte, and its place below.
const PLACE_BITS: u32 = 56;

/// Exits of one vCPU, written by its thread only.
#[derive(Debug, Default)]
pub struct ExitCounters {
    counts: [AtomicU64; KINDS],
    last: [AtomicU64; REMEMBERED],
    total: AtomicU64,
}

/// Values of [`ExitCounters`] at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ExitCounts {
    /// See [`ExitKind::IoIn`].
    pub io_in: u64,
    /// See [`ExitKind::IoOut`].
    pub io_out: u64,
    /// See [`ExitKind::MmioRead`].
    pub mmio_read: u64,
    /// See [`ExitKind::MmioWrite`].
    pub mmio_write: u64,
    /// See [`ExitKind::Trap`].
    pub trap: u64,
    /// See [`ExitKind::Interrupted`].
    pub interrupted: u64,
    /// See [`ExitKind::Shutdown`].
    pub shutdown: u64,
    /// See [`ExitKind::DirtyRing`].
    pub dirty_ring: u64,
    /// See [`ExitKind::Other`].
    pub other: u64,
}

impl ExitCounters {
    /// Counts one exit at `place`: a port, or a guest physical address.
    pub fn count(&self, kind: ExitKind, place: u64) {
        self.counts[kind as usize].fetch_add(1, Ordering::Relaxed);
        let at = self.total.fetch_add(1, Ordering::Relaxed) as usize % REMEMBERED;
        let place = place & ((1 << PLACE_BITS) - 1);
        self.last[at].store((kind as u64) << PLACE_BITS | place, Ordering::Relaxed);
    }

    /// The last exits in words, oldest first.
    pub fn last(&self) -> String {
        let total = self.total.load(Ordering::Relaxed);
        let mut words = String::new();
        for number in total.saturating_sub(REMEMBERED as u64)..total {
            let exit = self.last[number as usize % REMEMBERED].load(Ordering::Relaxed);
            let kind = ExitKind::ALL.get((exit >> PLACE_BITS) as usize);
            let name = kind.map_or("?", |kind| kind.name());
            let separator = if words.is_empty() { "" } else { ", " };
            let place = exit & ((1 << PLACE_BITS) - 1);
            // Writing to a string does not fail.
            let _ = match place {
                0 => write!(words, "{separator}{name}"),
                place => write!(words, "{separator}{name} {place:#x}"),
            };
        }
        words
    }

    /// The values now.
    pub fn read(&self) -> ExitCounts {
        let value = |kind: ExitKind| self.counts[kind as usize].load(Ordering::Relaxed);
        ExitCounts {
            io_in: value(ExitKind::IoIn),
            io_out: value(ExitKind::IoOut),
            mmio_read: value(ExitKind::MmioRead),
            mmio_write: value(ExitKind::MmioWrite),
            trap: value(ExitKind::Trap),
            interrupted: value(ExitKind::Interrupted),
            shutdown: value(ExitKind::Shutdown),
            dirty_ring: value(ExitKind::DirtyRing),
            other: value(ExitKind::Other),
        }
    }
}

impl ExitCounts {
    /// All exits together.
    pub fn total(&self) -> u64 {
        self.io_in
            + self.io_out
            + self.mmio_read
            + self.mmio_write
            + self.trap
            + self.interrupted
            + self.shutdown
            + self.dirty_ring
            + self.other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_exits_are_told_in_order() {
        let exits = ExitCounters::default();
        assert_eq!(exits.last(), "");
        exits.count(ExitKind::IoOut, 0x3f8);
        exits.count(ExitKind::Interrupted, 0);
        assert_eq!(exits.last(), "out 0x3f8, signal");
        for port in 1..=7 {
            exits.count(ExitKind::Trap, port);
        }
        assert!(exits.last().starts_with("signal, trap 0x1, "));
        assert!(exits.last().ends_with("trap 0x7"));
        assert_eq!(exits.read().total(), 9);
    }
}
