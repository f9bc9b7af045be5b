//! Making a machine go on from a snapshot.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::{Chain, IMAGE_FILE, Loaded, SnapshotError};
use crate::error::{Error, StateError};
use crate::memory::{GuestRam, MemorySource};
use crate::state::MachineState;
use crate::state::devices::DeviceStates;
use crate::vm::Vm;

/// Why a machine does not go on from a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The snapshot cannot be used.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The machine cannot be in that state.
    #[error(transparent)]
    Machine(#[from] Error),
}

impl From<StateError> for RestoreError {
    fn from(error: StateError) -> Self {
        Self::Machine(error.into())
    }
}

impl Chain {
    /// Memory that is mapped from the image of the full snapshot, for [`crate::VmConfig::memory`]: pages are read when
    /// they are touched, without a look at their checksums, and all machines that map it share those that they have not written.
    ///
    /// # Errors
    /// The process has no more descriptors.
    pub fn template(&self) -> Result<MemorySource, SnapshotError> {
        let base = self.base();
        let file = base.image().try_clone();
        let file = file.map_err(SnapshotError::read(base.dir().join(IMAGE_FILE)))?;
        Ok(MemorySource::Template {
            file: Arc::new(file),
        })
    }
}

impl Vm {
    /// Has the machine go on from a snapshot when it is run: memory, its own state, then its devices, which are all
    /// there already. Where the machine's memory is the snapshot's image ([`Chain::template`]), only what differs is read
    /// now. After an error the machine cannot be used.
    ///
    /// # Errors
    /// The snapshot is damaged, or is of a machine that this one is not like.
    pub fn go_on_from(&mut self, chain: &Chain) -> Result<Loaded, RestoreError> {
        // What can be refused without reading the memory comes first.
        let machine = MachineState::from_bytes(&chain.top().machine_state()?)?;
        let devices = DeviceStates::from_bytes(&chain.top().device_states()?)?;
        self.can_be(&machine)?;
        let ram = &self.machine.ram;
        let mapped = ram.is_template();
        let loaded = chain.load(mapped, |offset, content| fill(ram, offset, content))?;
        // The clock goes on from here.
        self.restore(&machine)?;
        self.restore_devices(&devices)?;
        Ok(loaded)
    }
}

/// Puts `content` to where `offset` of the memory's file is in guest memory. It is within one region: so was the
/// memory that it comes from.
fn fill(ram: &GuestRam, offset: u64, content: &[u8]) -> Result<(), SnapshotError> {
    let beyond = || SnapshotError::GuestMemory(offset);
    let region = ram.region_of(offset).ok_or_else(beyond)?;
    let address = region.guest_address.0 + (offset - region.file_offset);
    let written = ram.memory().write_slice(content, GuestAddress(address));
    written.map_err(|_| beyond())
}
