//! PCI functions, without regard to whether they are emulated in this process or live elsewhere.

pub mod areas;
pub mod bus;
pub mod config;
pub mod msix;
pub mod registers;
pub mod shared;

use std::sync::Arc;

use self::areas::BarArea;
use self::shared::SharesRegisters;
use crate::state::{Part, StateError};

/// Index of a base address register of a type 0 header, 0 to 5.
pub type BarIndex = u8;

/// Address space that a base address register decodes (PCI Local Bus 3.0, section 6.2.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarSpace {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; uses this register and the next one.
    Memory64,
}

/// A range that a function decodes at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarRange {
    /// Which base address register.
    pub bar: BarIndex,
    /// Space it is in.
    pub space: BarSpace,
    /// First address (port number or guest physical address), as the guest placed it.
    pub address: u64,
    /// Size in bytes, a power of two.
    pub size_bytes: u64,
}

/// A base address register of a function, wherever the guest has placed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarSize {
    /// Which base address register.
    pub bar: BarIndex,
    /// Space it is in.
    pub space: BarSpace,
    /// Size in bytes, a power of two.
    pub size_bytes: u64,
}

/// One PCI function.
///
/// Offsets and lengths come from the guest and may be anything: unaligned, over an end, of any
/// length from 1 to 8. What real hardware would ignore is ignored; reads of nothing give all ones.
pub trait PciFunction: Send {
    /// Reads `data.len()` bytes of configuration space at `offset` (0 to 4095).
    fn config_read(&mut self, offset: u16, data: &mut [u8]);

    /// Writes configuration space. The bus asks for [`PciFunction::decoded`] again afterwards.
    fn config_write(&mut self, offset: u16, data: &[u8]);

    /// Ranges decoded now, by the base address registers and the command register's enable bits.
    fn decoded(&self) -> Vec<BarRange>;

    /// The base address registers that there are, decoded or not. One that shows none can only be
    /// used where the guest's own accesses find them.
    fn bars(&self) -> Vec<BarSize> {
        Vec::new()
    }

    /// The parts of base address registers that are memory at this moment: the bus may let the guest
    /// reach them without asking the function. Where it does not, [`PciFunction::bar_read`] and
    /// [`PciFunction::bar_write`] reach the same bytes.
    fn areas(&self) -> &[Arc<BarArea>] {
        &[]
    }

    /// Whoever puts registers of it into memory that another process has as well, if that can be.
    fn shares_registers(&mut self) -> Option<&mut dyn SharesRegisters> {
        None
    }

    /// Reads from `bar` at byte `offset` of it.
    fn bar_read(&mut self, bar: BarIndex, offset: u64, data: &mut [u8]);

    /// Writes to `bar` at byte `offset` of it.
    fn bar_write(&mut self, bar: BarIndex, offset: u64, data: &[u8]);

    /// Power-on reset, as the bus's RST# does.
    fn reset(&mut self);

    /// The function's state between two accesses. One that does not give it away says so.
    fn save(&self) -> Result<Part, StateError> {
        Err(StateError::Kept)
    }

    /// Goes on as the function that `state` was taken of: drives its interrupts, and looks for work
    /// in its rings. On an error it has to be reset. The bus asks for [`PciFunction::decoded`]
    /// again afterwards.
    fn restore(&mut self, _state: &Part) -> Result<(), StateError> {
        Err(StateError::Kept)
    }

    /// Whether [`PciFunction::save`] gives a state of it, once it stands still.
    fn gives_state(&self) -> bool {
        self.save().is_ok()
    }

    /// Has a function that does something by itself do nothing until [`PciFunction::end_still`], so
    /// that its state can be taken. Others have nothing to do here.
    ///
    /// # Errors
    /// It does not stand still, or gives no state away. It is to be told to go on all the same.
    fn begin_still(&mut self) -> Result<(), StateError> {
        Ok(())
    }

    /// Has it go on with the state that it has.
    fn end_still(&mut self) {}
}
