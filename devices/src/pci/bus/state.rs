//! The states of all functions on the bus.

use serde::{Deserialize, Serialize};

use super::{PciBus, SLOT_COUNT};
use crate::pci::PciFunction;
use crate::state::{Part, StateError};

/// Why the functions cannot be saved or restored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BusStateError {
    /// One of them.
    #[error("PCI slot {slot}: {error}")]
    Function {
        /// Its slot.
        slot: u8,
        /// What is wrong.
        error: StateError,
    },
    /// The bus has other slots in use.
    #[error("the saved machine has PCI functions in slots {found:?}, this one in {here:?}")]
    Slots {
        /// Slots of the state.
        found: Vec<u8>,
        /// Slots here.
        here: Vec<u8>,
    },
    /// Another function is in a slot.
    #[error("PCI slot {slot}: the saved machine has a {found} there, this one a {here}")]
    Kinds {
        /// The slot.
        slot: u8,
        /// Kind of the state's function.
        found: String,
        /// Kind of the one here.
        here: String,
    },
}

/// The states of all functions, each with its slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionStates(Vec<(u8, Part)>);

impl FunctionStates {
    /// Slot and kind of each function.
    pub fn kinds(&self) -> impl Iterator<Item = (u8, &str)> {
        self.0.iter().map(|(slot, part)| (*slot, part.kind()))
    }

    /// That `others` are of the same kinds of functions in the same slots.
    ///
    /// # Errors
    /// Which are not.
    pub fn are_like(&self, others: &Self) -> Result<(), BusStateError> {
        let slots = |states: &Self| states.0.iter().map(|(slot, _)| *slot).collect::<Vec<_>>();
        let (found, here) = (slots(others), slots(self));
        if found != here {
            return Err(BusStateError::Slots { found, here });
        }
        let mut pairs = self.0.iter().zip(&others.0);
        match pairs.find(|((_, here), (_, found))| here.kind() != found.kind()) {
            Some(((slot, here), (_, found))) => Err(BusStateError::Kinds {
                slot: *slot,
                found: found.kind().to_owned(),
                here: here.kind().to_owned(),
            }),
            None => Ok(()),
        }
    }
}

impl PciBus {
    /// Takes the state of every function. To be called while nobody uses them.
    ///
    /// # Errors
    /// One does not give its state away.
    pub fn save_functions(&self) -> Result<FunctionStates, BusStateError> {
        let mut states = Vec::new();
        for number in 0..SLOT_COUNT {
            let Some(slot) = self.slot(number) else {
                continue;
            };
            let part = slot.lock().save();
            let part = part.map_err(|error| BusStateError::Function {
                slot: number,
                error,
            })?;
            states.push((number, part));
        }
        Ok(FunctionStates(states))
    }

    /// Puts back the state of every function, in the order of slots, and what it decodes. Functions
    /// drive their interrupts anew. After an error the bus must be reset.
    ///
    /// # Errors
    /// The states are of other functions.
    pub fn restore_functions(&self, states: &FunctionStates) -> Result<(), BusStateError> {
        let found: Vec<u8> = states.0.iter().map(|(slot, _)| *slot).collect();
        let here = self.occupied();
        if found != here {
            return Err(BusStateError::Slots { found, here });
        }
        for (number, part) in &states.0 {
            let Some(slot) = self.slot(*number) else {
                continue;
            };
            let mut function = slot.lock();
            slot.edge
                .around(&mut *function)
                .restore(part)
                .map_err(|error| BusStateError::Function {
                    slot: *number,
                    error,
                })?;
            self.remap(&slot, &*function);
        }
        Ok(())
    }
}
