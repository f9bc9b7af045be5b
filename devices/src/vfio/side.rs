//! What a user of a function has of its own: configuration space, table of MSI-X, power state. They
//! say what the function may do for that user.

use super::interrupts::Mode;
use crate::pci::config::{Command, ConfigSpace};
use crate::pci::msix::Msix;
use crate::pci::{BarIndex, BarRange};

/// Power state, of PMCSR (PCI Power Management 1.2, 3.2.4): D0 is 0.
const POWER_STATE: u16 = 0x3;

/// See the module.
pub struct UserSide {
    /// As the user sees and writes it.
    pub config: ConfigSpace,
    /// Its vectors, if the function has MSI-X.
    pub msix: Option<Msix>,
    pmcsr: Option<u16>,
    has_pin: bool,
}

impl UserSide {
    /// As at power-on. `pmcsr` is where that register is, if there is power management; `has_pin`
    /// is whether the function has an interrupt pin that the host can watch.
    pub fn new(config: ConfigSpace, msix: Option<Msix>, pmcsr: Option<u16>, has_pin: bool) -> Self {
        Self {
            config,
            msix,
            pmcsr,
            has_pin,
        }
    }

    fn is_awake(&self) -> bool {
        let state = self.pmcsr.map_or(0, |at| self.config.u16_at(at));
        state & POWER_STATE == 0
    }

    /// Whether the function may master the bus.
    pub fn masters(&self) -> bool {
        self.config.command().contains(Command::BUS_MASTER) && self.is_awake()
    }

    /// What of its interrupts the function may use.
    pub fn mode(&self) -> Mode {
        let command = self.config.command();
        let decodes = command.intersects(Command::IO_SPACE | Command::MEMORY_SPACE);
        match &self.msix {
            _ if !decodes || !self.is_awake() => Mode::Off,
            Some(msix) if msix.enabled() => Mode::Msix,
            _ if self.has_pin && !command.contains(Command::INTERRUPT_DISABLE) => Mode::Intx,
            _ => Mode::Off,
        }
    }

    /// Ranges that it decodes now.
    pub fn decoded(&self) -> Vec<BarRange> {
        match self.is_awake() {
            true => self.config.decoded(),
            false => Vec::new(),
        }
    }

    /// Writes its configuration space.
    pub fn config_write(&mut self, at: u16, data: &[u8]) {
        self.config.write(at, data);
        if let Some(msix) = &mut self.msix {
            msix.config_written(&self.config);
        }
    }

    /// Reads the table of MSI-X or the pending bits, if those are there. `waiting` gives the
    /// vectors for which something came while they were masked.
    pub fn msix_read(
        &mut self,
        bar: BarIndex,
        offset: u64,
        data: &mut [u8],
        waiting: impl FnOnce() -> Vec<u16>,
    ) -> bool {
        if !self
            .msix
            .as_ref()
            .is_some_and(|msix| msix.bar_read(bar, offset, data))
        {
            return false;
        }
        // Pending bits are among it.
        self.trigger(waiting());
        if let Some(msix) = &self.msix {
            msix.bar_read(bar, offset, data);
        }
        true
    }

    /// Writes the table of MSI-X, if that is there.
    pub fn msix_write(&mut self, bar: BarIndex, offset: u64, data: &[u8]) -> bool {
        let msix = self.msix.as_mut();
        msix.is_some_and(|msix| msix.bar_write(bar, offset, data))
    }

    /// Delivers what came for these vectors, or shows it as pending.
    pub fn trigger(&mut self, vectors: Vec<u16>) {
        if let Some(msix) = &mut self.msix {
            for vector in vectors {
                msix.trigger(vector);
            }
        }
    }

    /// As at power-on.
    pub fn reset(&mut self) {
        self.config.reset();
        if let Some(msix) = &mut self.msix {
            msix.reset(&self.config);
        }
    }
}

/// Whether an access of `bytes` bytes at `at` reaches the 16-bit register at `register`.
pub fn reaches(at: u16, bytes: usize, register: u16) -> bool {
    let (at, register) = (usize::from(at), usize::from(register));
    at < register + 2 && at + bytes > register
}
