//! Slot 0: the host bridge, which the guest finds and has nothing to do with.

use crate::pci::config::{ConfigSpace, PciIdentity};
use crate::pci::{BarIndex, BarRange, PciFunction};
use crate::state::{Form, Part, StateError};

/// The host bridge's own function: an identity, nothing else.
pub(super) struct HostBridge(ConfigSpace);

impl HostBridge {
    const FORM: Form = Form {
        kind: "host bridge",
        version: 1,
    };

    pub(super) fn new() -> Self {
        // Red Hat's generic PCI Express host bridge: known to guests, with no quirks attached.
        Self(ConfigSpace::new(PciIdentity {
            vendor_id: 0x1b36,
            device_id: 0x0008,
            revision_id: 0,
            class_code: 0x06_0000,
            subsystem_vendor_id: 0,
            subsystem_id: 0,
        }))
    }
}

impl PciFunction for HostBridge {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.0.write(offset, data);
    }

    fn decoded(&self) -> Vec<BarRange> {
        Vec::new()
    }

    fn bar_read(&mut self, _bar: BarIndex, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&mut self, _bar: BarIndex, _offset: u64, _data: &[u8]) {}

    fn reset(&mut self) {
        self.0.reset();
    }

    fn save(&self) -> Result<Part, StateError> {
        Part::new(Self::FORM, &self.0.save())
    }

    fn restore(&mut self, state: &Part) -> Result<(), StateError> {
        let state = state.open(Self::FORM)?;
        let result = self.0.restore(&state);
        result.map_err(|error| Self::FORM.does_not_fit(error))
    }
}
