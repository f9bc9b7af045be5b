//! The panic device: how a guest's kernel says that it has panicked.
//!
//! One I/O port, as QEMU's `pvpanic` (docs/specs/pvpanic): reading tells which events are
//! understood, a write tells which happened. ACPI names it `QEMU0001`; Linux' driver is
//! `pvpanic-mmio`.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use devices::bus::BusDevice;

/// The guest's kernel has panicked.
const PANICKED: u8 = 1 << 0;
/// It has panicked and starts another one to look at it.
const CRASH_LOADED: u8 = 1 << 1;

/// The port, and what was told.
#[derive(Default)]
pub(crate) struct PanicDevice {
    panicked: AtomicBool,
    panics: AtomicU64,
}

impl PanicDevice {
    /// Whether the guest has panicked since it was started.
    pub fn panicked(&self) -> bool {
        self.panicked.load(Ordering::Acquire)
    }

    /// How often it has panicked since the machine was made.
    pub fn panics(&self) -> u64 {
        self.panics.load(Ordering::Acquire)
    }

    /// The guest starts anew.
    pub fn reset(&self) {
        self.set_panicked(false);
    }

    /// The guest is one that has panicked, or one that has not. What was counted stays.
    pub fn set_panicked(&self, panicked: bool) {
        self.panicked.store(panicked, Ordering::Release);
    }
}

impl BusDevice for PanicDevice {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(PANICKED | CRASH_LOADED);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let told = data.first().copied().unwrap_or_default();
        // A guest may tell it as often as it likes; it has panicked once.
        if told & (PANICKED | CRASH_LOADED) != 0 && !self.panicked.swap(true, Ordering::AcqRel) {
            self.panics.fetch_add(1, Ordering::AcqRel);
            tracing::warn!("the guest's kernel has panicked");
        }
    }
}
