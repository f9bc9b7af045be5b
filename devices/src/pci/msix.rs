//! MSI-X of one function: capability, vector table and pending bits (PCI Local Bus 3.0, section
//! 6.8.2).
//!
//! A vector is routed to its message only while it can be delivered: MSI-X enabled, function mask
//! and vector mask clear. A trigger that finds it masked sets its pending bit, and it is delivered
//! once when the mask goes.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::BarIndex;
use super::config::{ConfigError, ConfigSpace};
use crate::irq::{MsiMessage, MsiVectors};

/// Capability ID of MSI-X.
pub const CAPABILITY_ID: u8 = 0x11;
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
    /// Register that the table is in.
    pub bar: BarIndex,
    /// Byte offset of the vector table; it takes 16 bytes a vector.
    pub table_offset: u32,
    /// Register that the pending bits are in.
    pub pba_bar: BarIndex,
    /// Byte offset of the pending bits; they take 8 bytes for each 64 vectors.
    pub pba_offset: u32,
}

impl MsixLayout {
    /// Where table and pending bits of so many vectors are in `bar`.
    pub fn ranges_in(&self, bar: BarIndex, vectors: u16) -> Vec<Range<u64>> {
        let vectors = u64::from(vectors);
        let table = (self.bar, self.table_offset, vectors * ENTRY_BYTES);
        let pending = (self.pba_bar, self.pba_offset, vectors.div_ceil(64) * 8);
        let both = [table, pending].into_iter();
        let here = both.filter(|(of, _, _)| *of == bar);
        here.map(|(_, start, bytes)| u64::from(start)..u64::from(start) + bytes)
            .collect()
    }
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
        let (body, writable) = Self::capability(vectors.count(), layout);
        let capability = config.add_capability(CAPABILITY_ID, &body, &writable)?;
        Ok(Self::at(vectors, layout, capability))
    }

    /// What follows the two header bytes of the capability, and which bits of that a guest may
    /// write.
    pub fn capability(vectors: u16, layout: MsixLayout) -> ([u8; 10], [u8; 2]) {
        let count = vectors.clamp(1, MAX_VECTORS);
        let mut body = [0; 10];
        body[0..2].copy_from_slice(&(count - 1).to_le_bytes());
        let place = |offset: u32, bar: BarIndex| (offset | u32::from(bar)).to_le_bytes();
        body[2..6].copy_from_slice(&place(layout.table_offset, layout.bar));
        body[6..10].copy_from_slice(&place(layout.pba_offset, layout.pba_bar));
        let writable = (CONTROL_ENABLE | CONTROL_FUNCTION_MASK).to_le_bytes();
        (body, writable)
    }

    /// MSI-X whose capability is at `capability` of configuration space already.
    pub fn at(vectors: Arc<dyn MsiVectors>, layout: MsixLayout, capability: u16) -> Self {
        let count = vectors.count().clamp(1, MAX_VECTORS);
        let entries = vec![Entry::RESET; usize::from(count)];
        let routed = vec![false; entries.len()];
        Self {
            vectors,
            state: MsixState { entries },
            layout,
            capability,
            control: 0,
            routed,
        }
    }

    /// Whether the function's register `bar` has the vector table at `offset`.
    pub fn is_table(&self, bar: BarIndex, offset: u64) -> bool {
        matches!(self.locate(bar, offset), Some(Place::Table(_)))
    }

    /// Whether a write that was routed would leave the vector masked, or write nothing.
    pub fn masks(&self, offset: u64, data: &[u8]) -> bool {
        let relative = offset.wrapping_sub(u64::from(self.layout.table_offset));
        let at = (ENTRY_BYTES - 4).checked_sub(relative % ENTRY_BYTES);
        let control = at.and_then(|at| data.get(at as usize));
        control.is_some_and(|control| u32::from(*control) & VECTOR_MASK != 0)
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
        self.control_written(config.u16_at(self.capability + 2));
    }

    /// To be called after the guest changed Message Control, which is elsewhere.
    pub fn control_written(&mut self, control: u16) {
        if control != self.control {
            self.control = control;
            self.update_all();
        }
    }

    /// Message Control as the guest wrote it last.
    pub fn control(&self) -> u16 {
        self.control
    }

    /// Offset of the capability in configuration space.
    pub fn capability_offset(&self) -> u16 {
        self.capability
    }

    /// The table's content, in the order of its bytes.
    pub fn table(&self) -> Vec<u8> {
        let entries = self.state.entries.iter().flat_map(Entry::dwords);
        entries.flat_map(u32::to_le_bytes).collect()
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
        self.reset_with(config.u16_at(self.capability + 2));
    }

    /// As [`Msix::reset`] with Message Control, which is elsewhere.
    pub fn reset_with(&mut self, control: u16) {
        self.state.entries.fill(Entry::RESET);
        self.control = control;
        self.update_all();
    }

    /// The state to store; Message Control is in configuration space.
    pub fn save(&self) -> MsixState {
        self.state.clone()
    }

    /// Takes over a stored state; `config` must have been restored. A state with another number of
    /// vectors is refused.
    pub fn restore(&mut self, state: &MsixState, config: &ConfigSpace) -> Result<(), ConfigError> {
        self.restore_with(state, config.u16_at(self.capability + 2))
    }

    /// As [`Msix::restore`] with Message Control, which is elsewhere.
    pub fn restore_with(&mut self, state: &MsixState, control: u16) -> Result<(), ConfigError> {
        self.check(state)?;
        self.state = state.clone();
        self.control = control;
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
        let count = self.state.entries.len() as u64;
        let within = |its: BarIndex, start: u32, length: u64| {
            let relative = offset.checked_sub(start.into())?;
            (bar == its && relative < length).then_some(relative)
        };
        let layout = &self.layout;
        within(layout.bar, layout.table_offset, count * ENTRY_BYTES)
            .map(Place::Table)
            .or_else(|| {
                let bytes = count.div_ceil(64) * 8;
                within(layout.pba_bar, layout.pba_offset, bytes).map(Place::Pending)
            })
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
pub(crate) mod tests;
