//! Registers that the server has in memory: accesses that need no message.
//!
//! Order is kept: while a store is under way that nobody has waited for, all loads go behind it, by
//! messages, but for stores of which the device takes notice in its own time in any case
//! ([`SharedLayout::late`]).

use crate::pci::BarIndex;
use crate::pci::shared::{SharedLayout, SharedPage};
use crate::vfio_user::client::{Client, ClientError};

/// See the module.
pub struct Shared {
    layout: SharedLayout,
    page: SharedPage,
    /// Something was stored that may be under way still.
    under_way: bool,
}

/// What becomes of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// It is done.
    Done,
    /// It is to be sent.
    Send,
}

impl Shared {
    /// What the server of `client` has in memory, if it has anything.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn of(client: &mut Client) -> Result<Option<Self>, ClientError> {
        let shared = client.shared_registers()?;
        Ok(shared.map(|(layout, page)| Self {
            layout,
            page,
            under_way: true,
        }))
    }

    /// The register at `offset` of `bar`, if an access of `bytes` bytes is one of a register.
    fn register(&self, bar: BarIndex, offset: u64, bytes: usize) -> Option<u32> {
        let is_one = bar == self.layout.bar && bytes == 4;
        u32::try_from(offset).ok().filter(|_| is_one)
    }

    /// Whether an access has to go to the server: behind what is under way, or because the memory
    /// is not used any more.
    fn is_behind(&self) -> bool {
        self.under_way || self.page.has_ended()
    }

    /// Carries a load out, if that needs no message.
    pub fn load(&self, bar: BarIndex, offset: u64, bytes: usize) -> Option<u32> {
        let register = self.register(bar, offset, bytes)?;
        if self.is_behind() {
            return None;
        }
        let (layout, page) = (&self.layout, &self.page);
        if register == layout.causes {
            return Some(page.clear(u32::MAX) & layout.bits);
        }
        if register == layout.set_mask {
            return Some(page.causes_and_mask().1 & layout.bits);
        }
        let index = layout.values.iter().position(|at| *at == register)?;
        Some(page.get(index))
    }

    /// Carries a store out, if that needs no message.
    pub fn store(&mut self, bar: BarIndex, offset: u64, data: &[u8]) -> Store {
        let register = self.register(bar, offset, data.len());
        let value = data.first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
        let behind = self.is_behind();
        let (layout, page) = (&self.layout, &self.page);
        let (Some(register), Some(value)) = (register, value) else {
            self.under_way = true;
            return Store::Send;
        };
        if layout.late.contains(&register) {
            return Store::Send;
        }
        if !behind && register == layout.clear_mask {
            page.mask(value & layout.bits);
            return Store::Done;
        }
        if !behind && register == layout.set_mask {
            // The device interrupts for what was set before; that it is told of it need not be
            // waited for.
            return match page.unmask(value & layout.bits) {
                true => Store::Send,
                false => Store::Done,
            };
        }
        self.under_way = true;
        Store::Send
    }

    /// The server has answered: everything that was stored before is done.
    pub fn answered(&mut self) {
        self.under_way = false;
    }
}
