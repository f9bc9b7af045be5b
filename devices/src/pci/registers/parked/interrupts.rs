//! Causes of interrupts of an image.

use std::collections::BTreeMap;

use super::super::description::answers;
use crate::pci::registers::{Access, Description, RegisterAccess};

/// Causes that are set. Which of them interrupt is part of the state.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Interrupts {
    causes: u32,
    /// Those of them that a message was sent for.
    told: u32,
}

impl Interrupts {
    pub fn raise(&mut self, causes: u32) {
        self.causes |= causes;
        self.told &= !causes;
    }

    pub fn clear(&mut self, causes: u32) {
        self.causes &= !causes;
        self.told &= !causes;
    }

    /// The causes, which are cleared by that.
    pub fn take(&mut self, places: &answers::Interrupts, state: &BTreeMap<u32, u32>) -> u32 {
        let asserted = match self.are_due(places, state) {
            true => places.asserted,
            false => 0,
        };
        let causes = self.causes & !places.asserted | asserted;
        *self = Self::default();
        causes
    }

    pub fn are_due(&self, places: &answers::Interrupts, state: &BTreeMap<u32, u32>) -> bool {
        self.due(places, state) != 0
    }

    /// The vectors that a message is due for, a bit for each.
    pub fn take_messages(
        &mut self,
        places: &answers::Interrupts,
        state: &BTreeMap<u32, u32>,
    ) -> u32 {
        let due = self.due(places, state) & !self.told;
        let vectors = places.vectors.and_then(|at| state.get(&at)).copied();
        let sent = places.vectors_of(due, vectors.unwrap_or(0));
        self.told |= due;
        let auto_clear = places.auto_clear.and_then(|at| state.get(&at)).copied();
        self.clear(due & auto_clear.unwrap_or(0));
        sent
    }

    fn due(&self, places: &answers::Interrupts, state: &BTreeMap<u32, u32>) -> u32 {
        let mask = state.get(&places.mask).copied().unwrap_or(0);
        self.causes & mask & !places.asserted
    }
}

impl answers::Interrupts {
    /// Where the messages for these causes go, a bit for each vector; `vectors` is the register of
    /// that name.
    fn vectors_of(&self, causes: u32, vectors: u32) -> u32 {
        let mut all = 0;
        for message in &self.message {
            let field = vectors >> message.shift;
            if causes & message.causes != 0 && field & message.valid == message.valid {
                all |= 1u32.checked_shl(field & message.vector).unwrap_or(0);
            }
        }
        all
    }
}

impl Description {
    /// The vectors whose causes have masked themselves as their message went, a bit for each: the
    /// driver was interrupted, or is to be, and lets them through again when it is done. A driver
    /// that wants no interrupt has none of these.
    pub fn told(&self, registers: &mut dyn RegisterAccess) -> u32 {
        let places = self.parked.as_ref().map(|parked| &parked.interrupts);
        let Some((places, at)) = places.and_then(|places| Some((places, places.vectors?))) else {
            return 0;
        };
        let mut access = Access(registers);
        let masks_itself = places.auto_clear.map_or(0, |at| access.read(at));
        let causes = masks_itself & !access.read(places.mask);
        places.vectors_of(causes, access.read(at))
    }
}
