//! Counts of why vCPUs left the guest, cheap enough to be always on.

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
    /// Anything else.
    Other,
}

const KINDS: usize = ExitKind::Other as usize + 1;

/// Counters of one vCPU.
#[derive(Debug, Default)]
pub struct ExitCounters([AtomicU64; KINDS]);

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
    /// See [`ExitKind::Other`].
    pub other: u64,
}

impl ExitCounters {
    /// Counts one exit.
    pub fn count(&self, kind: ExitKind) {
        self.0[kind as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// The values now.
    pub fn read(&self) -> ExitCounts {
        let value = |kind: ExitKind| self.0[kind as usize].load(Ordering::Relaxed);
        ExitCounts {
            io_in: value(ExitKind::IoIn),
            io_out: value(ExitKind::IoOut),
            mmio_read: value(ExitKind::MmioRead),
            mmio_write: value(ExitKind::MmioWrite),
            trap: value(ExitKind::Trap),
            interrupted: value(ExitKind::Interrupted),
            shutdown: value(ExitKind::Shutdown),
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
            + self.other
    }
}
