//! A function with its edge around it.

use std::sync::Arc;

use super::Edge;
use super::order::Direction;
use super::state::{Fate, LateStore, Presence};
use crate::pci::areas::BarArea;
use crate::pci::{BarIndex, BarRange, BarSize, PciFunction};
use crate::state::{Part, StateError};

/// Where accesses go that pass the edge.
pub(super) trait Registers {
    /// Loads.
    fn load(&mut self, bar: BarIndex, offset: u64, data: &mut [u8]);
    /// Stores.
    fn store(&mut self, bar: BarIndex, offset: u64, data: &[u8]);

    /// Stores what was late.
    fn store_all(&mut self, stores: impl IntoIterator<Item = LateStore>) {
        for store in stores {
            self.store(store.bar, store.offset, &store.data);
        }
    }
}

impl Registers for &mut dyn PciFunction {
    fn load(&mut self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        self.bar_read(bar, offset, data);
    }

    fn store(&mut self, bar: BarIndex, offset: u64, data: &[u8]) {
        self.bar_write(bar, offset, data);
    }
}

impl Edge {
    /// A load while a fault is armed.
    pub(super) fn load(
        &self,
        registers: &mut impl Registers,
        (bar, offset): (BarIndex, u64),
        data: &mut [u8],
    ) {
        let plan = self
            .state()
            .access(Direction::Load, (bar, offset), data.len());
        registers.store_all(plan.first);
        match plan.fate {
            Fate::Passes(bend) => {
                registers.load(bar, offset, data);
                bend.apply(data);
            }
            Fate::Lost | Fate::Late(..) => data.fill(0xff),
        }
    }

    /// A store while a fault is armed.
    pub(super) fn store(
        &self,
        registers: &mut impl Registers,
        (bar, offset): (BarIndex, u64),
        data: &[u8],
    ) {
        let plan = self
            .state()
            .access(Direction::Store, (bar, offset), data.len());
        registers.store_all(plan.first);
        let mut data = data.to_vec();
        match plan.fate {
            Fate::Passes(bend) => {
                bend.apply(&mut data);
                registers.store(bar, offset, &data);
            }
            Fate::Late(bend, after) => {
                bend.apply(&mut data);
                let oldest = self.state().keep((bar, offset), &data, after);
                registers.store_all(oldest);
            }
            Fate::Lost => {}
        }
    }
}

/// See [`Edge::around`].
pub struct AtEdge<'a> {
    pub(super) edge: &'a Edge,
    pub(super) function: &'a mut dyn PciFunction,
}

impl AtEdge<'_> {
    fn is_removed(&self) -> bool {
        self.edge.is_armed() && self.edge.state().presence == Presence::Removed
    }
}

impl PciFunction for AtEdge<'_> {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        match self.is_removed() {
            true => data.fill(0xff),
            false => self.function.config_read(offset, data),
        }
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        if !self.is_removed() {
            self.function.config_write(offset, data);
        }
    }

    fn decoded(&self) -> Vec<BarRange> {
        self.function.decoded()
    }

    fn bars(&self) -> Vec<BarSize> {
        self.function.bars()
    }

    fn areas(&self) -> &[Arc<BarArea>] {
        match self.edge.is_armed() {
            true => &[],
            false => self.function.areas(),
        }
    }

    fn bar_read(&mut self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        if !self.edge.is_armed() {
            self.function.bar_read(bar, offset, data);
            return;
        }
        self.edge.load(&mut self.function, (bar, offset), data);
    }

    fn bar_write(&mut self, bar: BarIndex, offset: u64, data: &[u8]) {
        if !self.edge.is_armed() {
            self.function.bar_write(bar, offset, data);
            return;
        }
        self.edge.store(&mut self.function, (bar, offset), data);
    }

    fn reset(&mut self) {
        self.edge.state().forget_on_the_way();
        self.function.reset();
    }

    fn save(&self) -> Result<Part, StateError> {
        self.function.save()
    }

    fn restore(&mut self, state: &Part) -> Result<(), StateError> {
        self.edge.state().forget_on_the_way();
        self.function.restore(state)
    }
}
