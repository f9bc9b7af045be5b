//! A card whose register is memory in part, and tells which accesses it has seen.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use devices::pci::areas::{BarArea, BarMemory};
use devices::pci::config::{ConfigSpace, PciIdentity};
use devices::pci::{BarIndex, BarRange, BarSpace, PciFunction};

/// A card of one register, in a file; a part of it is memory.
pub struct Card {
    config: ConfigSpace,
    pub file: Arc<File>,
    pub areas: Vec<Arc<BarArea>>,
    /// Accesses that it has seen.
    pub seen: u64,
}

impl Card {
    pub fn new(size_bytes: u64, area: (u64, u64)) -> Self {
        let mut config = ConfigSpace::new(PciIdentity {
            vendor_id: 0x1234,
            device_id: 0x5678,
            revision_id: 0,
            class_code: 0xff_0000,
            subsystem_vendor_id: 0,
            subsystem_id: 0,
        });
        config.add_bar(0, BarSpace::Memory64, size_bytes).unwrap();
        let fd = rustix::fs::memfd_create("bar", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = Arc::new(File::from(fd));
        file.set_len(size_bytes).unwrap();
        let memory = BarMemory::of_file(file.clone(), area.0, area.1 as usize).unwrap();
        Self {
            config,
            file,
            areas: vec![BarArea::new(0, area.0, memory).unwrap()],
            seen: 0,
        }
    }
}

impl PciFunction for Card {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
    }
    fn decoded(&self) -> Vec<BarRange> {
        self.config.decoded()
    }
    fn areas(&self) -> &[Arc<BarArea>] {
        &self.areas
    }
    fn bar_read(&mut self, _bar: BarIndex, offset: u64, data: &mut [u8]) {
        self.seen += 1;
        if self.file.read_exact_at(data, offset).is_err() {
            data.fill(0);
        }
    }
    fn bar_write(&mut self, _bar: BarIndex, offset: u64, data: &[u8]) {
        self.seen += 1;
        // A file that was cut stays so.
        if offset < self.file.metadata().unwrap().len() {
            self.file.write_all_at(data, offset).unwrap();
        }
    }
    fn reset(&mut self) {
        self.config.reset();
    }
}
