use std::sync::Mutex;

use super::*;
use crate::pci::config::PciIdentity;

/// Vectors that record what a function does with them.
pub(crate) struct RecordedVectors {
    pub(crate) routes: Mutex<Vec<Option<MsiMessage>>>,
    pub(crate) triggered: Mutex<Vec<u16>>,
}

impl RecordedVectors {
    pub(crate) fn new(count: usize) -> Arc<Self> {
        Arc::new(Self {
            routes: Mutex::new(vec![None; count]),
            triggered: Mutex::default(),
        })
    }

    pub(crate) fn take_triggered(&self) -> Vec<u16> {
        std::mem::take(&mut self.triggered.lock().unwrap())
    }
}

impl MsiVectors for RecordedVectors {
    fn count(&self) -> u16 {
        self.routes.lock().unwrap().len() as u16
    }

    fn route(&self, vector: u16, message: Option<MsiMessage>) {
        self.routes.lock().unwrap()[usize::from(vector)] = message;
    }

    fn trigger(&self, vector: u16) {
        self.triggered.lock().unwrap().push(vector);
    }
}

const LAYOUT: MsixLayout = MsixLayout {
    bar: 1,
    table_offset: 0x1000,
    pba_bar: 1,
    pba_offset: 0x1800,
};

struct Function {
    config: ConfigSpace,
    msix: Msix,
    vectors: Arc<RecordedVectors>,
}

impl Function {
    fn new(count: usize) -> Self {
        let mut config = ConfigSpace::new(PciIdentity {
            vendor_id: 1,
            device_id: 2,
            revision_id: 0,
            class_code: 0,
            subsystem_vendor_id: 0,
            subsystem_id: 0,
        });
        let vectors = RecordedVectors::new(count);
        let msix = Msix::new(vectors.clone(), LAYOUT, &mut config).unwrap();
        Self {
            config,
            msix,
            vectors,
        }
    }

    fn control(&mut self, value: u16) {
        self.config.write(0x42, &value.to_le_bytes());
        self.msix.config_written(&self.config);
    }

    fn write(&mut self, vector: u64, dword: u64, value: u32) {
        let offset = 0x1000 + vector * 16 + dword * 4;
        assert!(self.msix.bar_write(1, offset, &value.to_le_bytes()));
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        assert!(self.msix.bar_read(1, offset, &mut data));
        u32::from_le_bytes(data)
    }

    fn route(&self, vector: usize) -> Option<MsiMessage> {
        self.vectors.routes.lock().unwrap()[vector]
    }
}

#[test]
fn capability_tells_size_and_places() {
    let mut function = Function::new(5);
    assert_eq!(function.config.u32_at(0x40), 0x0004_0011);
    assert_eq!(function.config.u32_at(0x44), 0x1001);
    assert_eq!(function.config.u32_at(0x48), 0x1801);
    function.config.write(0x40, &[0xff; 12]);
    assert_eq!(function.config.u32_at(0x40), 0xc004_0011);
    assert_eq!(function.config.u32_at(0x44), 0x1001);
}

#[test]
fn a_vector_is_routed_only_while_enabled_and_unmasked() {
    let mut function = Function::new(2);
    let message = MsiMessage {
        address: 0x1_fee0_1000,
        data: 0x4041,
    };
    function.write(1, 0, 0xfee0_1003);
    function.write(1, 1, 1);
    function.write(1, 2, 0x4041);
    function.write(1, 3, 0);
    assert_eq!(function.route(1), None);
    function.control(0x8000);
    assert_eq!(function.route(1), Some(message));
    assert_eq!(function.route(0), None, "vectors are masked after reset");
    function.control(0xc000);
    assert_eq!(function.route(1), None);
    function.control(0x8000);
    function.write(1, 3, 1);
    assert_eq!(function.route(1), None);
    assert_eq!(function.read(0x1010), 0xfee0_1000);
}

#[test]
fn a_masked_trigger_is_pending_and_delivered_once() {
    let mut function = Function::new(40);
    function.control(0x8000);
    function.msix.trigger(33);
    function.msix.trigger(33);
    assert!(function.vectors.take_triggered().is_empty());
    assert_eq!(function.read(0x1804), 0b10);
    function.write(33, 3, 0);
    assert_eq!(function.vectors.take_triggered(), [33]);
    assert_eq!(function.read(0x1804), 0);
    function.msix.trigger(33);
    assert_eq!(function.vectors.take_triggered(), [33]);
}

#[test]
fn nothing_is_triggered_or_pending_while_disabled() {
    let mut function = Function::new(1);
    function.write(0, 3, 0);
    function.msix.trigger(0);
    function.msix.trigger(7);
    function.control(0x8000);
    assert!(function.vectors.take_triggered().is_empty());
}

#[test]
fn odd_accesses_and_pending_writes_change_nothing() {
    let mut function = Function::new(3);
    for (offset, length) in [
        (0x1000, 1),
        (0x1002, 4),
        (0x1004, 8),
        (0x1000, 3),
        (0x1028, 7),
    ] {
        assert!(function.msix.bar_write(1, offset, &[0xff; 8][..length]));
        let mut data = [0xaa; 8];
        assert!(function.msix.bar_read(1, offset, &mut data[..length]));
        assert!(data[..length].iter().all(|byte| *byte == 0));
    }
    assert!(function.msix.bar_write(1, 0x1800, &[0xff; 8]));
    assert_eq!(function.read(0x1800), 0);
    assert_eq!(function.read(0x1000), 0);
    assert!(
        !function.msix.bar_write(1, 0x1030, &[0xff; 4]),
        "behind the table"
    );
    assert!(
        !function.msix.bar_write(0, 0x1000, &[0xff; 4]),
        "another register"
    );
    // An access of eight bytes at the end of the table stays in it.
    assert!(function.msix.bar_write(1, 0x1028, &[0xff; 8]));
    assert_eq!(function.read(0x102c), 1);
}

#[test]
fn a_restored_function_is_routed_as_the_saved_one() {
    let mut function = Function::new(2);
    function.control(0x8000);
    function.write(0, 0, 0xfee0_0000);
    function.write(0, 3, 0);
    function.msix.trigger(1);
    let mut other = Function::new(2);
    other.config.restore(&function.config.save()).unwrap();
    other
        .msix
        .restore(&function.msix.save(), &other.config)
        .unwrap();
    assert_eq!(other.route(0), function.route(0));
    assert_eq!(other.read(0x1800), 0b10);
    let refused = Function::new(3)
        .msix
        .restore(&function.msix.save(), &other.config);
    assert_eq!(refused, Err(ConfigError::ForeignState));
}
