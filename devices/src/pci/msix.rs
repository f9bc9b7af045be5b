//! MSI-X of one function: capability, vector table and pending bits (PCI Local Bus 3.0, section
//! 6.8.2).
//!
//! A vector is routed to its message only while it can be delivered: MSI-X enabled, function mask
//! and vector mask clear. A trigger that finds it masked sets its pending bit, and it is delivered
//! once when the mask goes.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::BarIndex;
use super::config::{ConfigError, ConfigSpace};
use crate::irq::{MsiMessage, MsiVectors};

/// Capability ID of MSI-X.
const CAPABILITY_ID: u8 = 0x11;
/// Message Control: MSI-X Enable.
const CONTROL_ENABLE: u16 = 1 << 15;
/// Message Control: Function Mask.
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
/// Vector Control: Mask Bit.
const VECTOR_MASK: u32 = 1;
const ENTRY_BYTES: u64 = 16;
/// Most vectors that a function can have.
const MAX_VECTORS: u16 = 2048;

/// Where table and pending bits lie. Offsets are multiples of 8.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsixLayout {
    /// Register that both are in.
    pub bar: BarIndex,
    /// Byte offset of the vector table; it takes 16 bytes a vector.
    pub table_offset: u32,
    /// Byte offset of the pending bits; they take 8 bytes for each 64 vectors.
    pub pba_offset: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
}

impl Entry {
    /// State after reset: masked, the rest undefined.
    const RESET: Self = Self {
        address: 0,
        data: 0,
        control: VECTOR_MASK,
        pending: false,
    };

    fn dwords(&self) -> [u32; 4] {
        [
            self.address as u32,
            (self.address >> 32) as u32,
            self.data,
            self.control,
        ]
    }
}

/// All of a function's MSI-X state but what is in configuration space.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    entries: Vec<Entry>,
}

/// MSI-X of one function.
pub struct Msix {
    vectors: Arc<dyn MsiVectors>,
    state: MsixState,
    layout: MsixLayout,
    /// Offset of the capability in configuration space.
    capability: u16,
    /// Message Control as the function last saw it.
    control: u16,
    /// Vectors that are routed to their message at this moment.
    routed: Vec<bool>,
}

impl Msix {
    /// Adds the capability to `config`. The function has as many vectors as `vectors`, 1 to 2048.
    pub fn new(
        vectors: Arc<dyn MsiVectors>,
        layout: MsixLayout,
        config: &mut ConfigSpace,
    ) -> Result<Self, ConfigError> {
        let count = vectors.count().clamp(1, MAX_VECTORS);
        let mut body = [0; 10];
        body[0..2].copy_from_slice(&(count - 1).to_le_bytes());
        let bir = u32::from(layout.bar);
        body[2..6].copy_from_slice(&(layout.table_offset | bir).to_le_bytes());
        body[6..10].copy_from_slice(&(layout.pba_offset | bir).to_le_bytes());
        let writable = (CONTROL_ENABLE | CONTROL_FUNCTION_MASK).to_le_bytes();
        let capability = config.add_capability(CAPABILITY_ID, &body, &writable)?;
        let entries = vec![Entry::RESET; usize::from(count)];
        let routed = vec![false; entries.len()];
        Ok(Self {
            vectors,
            state: MsixState { entries },
            layout,
            capability,
            control: 0,
            routed,
        })
    }

    /// Number of vectors.
    pub fn count(&self) -> u16 {
        // At most MAX_VECTORS, by construction.
        self.state.entries.len() as u16
    }

    /// Whether the guest uses MSI-X and not INTx.
    pub fn enabled(&self) -> bool {
        self.control & CONTROL_ENABLE != 0
    }

    /// To be called after the guest wrote to `config`.
    pub fn config_written(&mut self, config: &ConfigSpace) {
        let control = config.u16_at(self.capability + 2);
        if control != self.control {
            self.control = control;
            self.update_all();
        }
    }

    /// Reads from the function's register if `offset` is in table or pending bits; tells whether it
    /// was.
    pub fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]) -> bool {
        let Some(at) = self.locate(bar, offset) else {
            return false;
        };
        data.fill(0);
        if !is_dword_access(offset, data.len()) {
            return true;
        }
        for (n, dword) in data.chunks_exact_mut(4).enumerate() {
            let value = match at {
                Place::Table(at) => self.table_dword(at + 4 * n as u64),
                Place::Pending(at) => self.pending_dword(at + 4 * n as u64),
            };
            dword.copy_from_slice(&value.to_le_bytes());
        }
        true
    }

    /// Writes to the function's register if `offset` is in table or pending bits; tells whether it
    /// was. Accesses that are not of aligned 32 or 64 bits do nothing, as writes of pending bits.
    pub fn bar_write(&mut self, bar: BarIndex, offset: u64, data: &[u8]) -> bool {
        let Some(at) = self.locate(bar, offset) else {
            return false;
        };
        let Place::Table(at) = at else { return true };
        if !is_dword_access(offset, data.len()) {
            return true;
        }
        for (n, dword) in data.chunks_exact(4).enumerate() {
            if let Ok(dword) = dword.try_into() {
                self.write_table_dword(at + 4 * n as u64, u32::from_le_bytes(dword));
            }
        }
        self.update((at / ENTRY_BYTES) as usize);
        true
    }

    /// Interrupts the guest by `vector`, or remembers to.
    pub fn trigger(&mut self, vector: u16) {
        let index = usize::from(vector);
        match self.routed.get(index) {
            Some(true) => self.vectors.trigger(vector),
            Some(false) if self.enabled() => self.state.entries[index].pending = true,
            _ => {}
        }
    }

    /// State after power-on; `config` must have been reset.
    pub fn reset(&mut self, config: &ConfigSpace) {
        self.state.entries.fill(Entry::RESET);
        self.control = config.u16_at(self.capability + 2);
        self.update_all();
    }

    /// The state to store; Message Control is in configuration space.
    pub fn save(&self) -> MsixState {
        self.state.clone()
    }

    /// Takes over a stored state; `config` must have been restored. A state with another number of
    /// vectors is refused.
    pub fn restore(&mut self, state: &MsixState, config: &ConfigSpace) -> Result<(), ConfigError> {
        self.check(state)?;
        self.state = state.clone();
        self.control = config.u16_at(self.capability + 2);
        self.update_all();
        Ok(())
    }

    /// Whether the state is one that the guest can have made.
    pub fn check(&self, state: &MsixState) -> Result<(), ConfigError> {
        let possible = |entry: &Entry| entry.address & 3 == 0 && entry.control & !VECTOR_MASK == 0;
        if state.entries.len() != self.state.entries.len() || !state.entries.iter().all(possible) {
            return Err(ConfigError::ForeignState);
        }
        Ok(())
    }

    fn locate(&self, bar: BarIndex, offset: u64) -> Option<Place> {
        if bar != self.layout.bar {
            return None;
        }
        let count = self.state.entries.len() as u64;
        let within = |start: u32, length: u64| {
            offset
                .checked_sub(start.into())
                .filter(|relative| *relative < length)
        };
        within(self.layout.table_offset, count * ENTRY_BYTES)
            .map(Place::Table)
            .or_else(|| within(self.layout.pba_offset, count.div_ceil(64) * 8).map(Place::Pending))
    }

    fn table_dword(&self, at: u64) -> u32 {
        let entry = self.state.entries.get((at / ENTRY_BYTES) as usize);
        entry.map_or(0, |entry| entry.dwords()[(at % ENTRY_BYTES / 4) as usize])
    }

    fn pending_dword(&self, at: u64) -> u32 {
        let first = at as usize * 8;
        let entries = self.state.entries.iter().skip(first).take(32);
        entries
            .enumerate()
            .fold(0, |bits, (n, entry)| bits | u32::from(entry.pending) << n)
    }

    fn write_table_dword(&mut self, at: u64, value: u32) {
        let Some(entry) = self.state.entries.get_mut((at / ENTRY_BYTES) as usize) else {
            return;
        };
        match at % ENTRY_BYTES / 4 {
            // The two lowest bits of an address are always zero (section 6.8.2.6).
            0 => entry.address = entry.address & !0xffff_ffff | u64::from(value & !3),
            1 => entry.address = entry.address & 0xffff_ffff | u64::from(value) << 32,
            2 => entry.data = value,
            _ => entry.control = value & VECTOR_MASK,
        }
    }

    fn update_all(&mut self) {
        for index in 0..self.state.entries.len() {
            self.update(index);
        }
    }

    /// Routes a vector as its masks say, and delivers what was pending.
    fn update(&mut self, index: usize) {
        let deliverable = self.enabled() && self.control & CONTROL_FUNCTION_MASK == 0;
        let Some(entry) = self.state.entries.get_mut(index) else {
            return;
        };
        let vector = index as u16;
        let unmasked = deliverable && entry.control & VECTOR_MASK == 0;
        if unmasked {
            let message = MsiMessage {
                address: entry.address,
                data: entry.data,
            };
            self.vectors.route(vector, Some(message));
            if std::mem::take(&mut entry.pending) {
                self.vectors.trigger(vector);
            }
        } else if self.routed[index] {
            self.vectors.route(vector, None);
        }
        self.routed[index] = unmasked;
    }
}

#[derive(Clone, Copy)]
enum Place {
    Table(u64),
    Pending(u64),
}

fn is_dword_access(offset: u64, length: usize) -> bool {
    matches!(length, 4 | 8) && offset.is_multiple_of(length as u64)
}

#[cfg(test)]
pub(crate) mod tests {
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
}
