//! Making a machine go on from a snapshot.

use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::chain::Place;
use super::{Chain, IMAGE_FILE, Loaded, SnapshotError, Tell};
use crate::error::{Error, StateError};
use crate::memory::{GuestRam, MemorySource, Userfault};
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
    /// Memory that is mapped from the image of the full snapshot, for [`crate::VmConfig::memory`]:
    /// pages are read when they are touched, without a look at their checksums, and all machines
    /// that map it share those that they have not written. With `userfault` it can be isolated
    /// without a copy of all of it.
    ///
    /// # Errors
    /// The process has no more descriptors.
    pub fn template(
        &self,
        userfault: Option<Arc<Userfault>>,
    ) -> Result<MemorySource, SnapshotError> {
        let base = self.base();
        let file = base.image().try_clone();
        let file = file.map_err(SnapshotError::read(base.dir().join(IMAGE_FILE)))?;
        Ok(MemorySource::Template {
            file: Arc::new(file),
            userfault,
        })
    }
}

impl Vm {
    /// Has the machine go on from a snapshot when it is run: memory, its own state, then its
    /// devices, which are all there already. Where the machine's memory is the snapshot's image
    /// ([`Chain::template`]), only what differs is read now. `tell` hears how much of the memory
    /// was read, and says whether it is still wanted. After an error the machine cannot be used.
    ///
    /// # Errors
    /// The snapshot is damaged, is of a machine that this one is not like, or is not wanted any
    /// more.
    pub fn go_on_from(&mut self, chain: &Chain, tell: Tell<'_>) -> Result<Loaded, RestoreError> {
        // What can be refused without reading the memory comes first.
        let machine = MachineState::from_bytes(&chain.top().machine_state()?)?;
        let devices = DeviceStates::from_bytes(&chain.top().device_states()?)?;
        self.can_be(&machine)?;
        let ram = &self.machine.ram;
        let mapped = ram.is_template();
        if mapped {
            // Nobody will look at its checksums.
            chain.base().image_is_as_opened()?;
        }
        let loaded = chain.load_to(mapped, tell, &NotRunning(ram))?;
        // The clock goes on from here.
        self.restore(&machine)?;
        self.restore_devices(&devices)?;
        Ok(loaded)
    }
}

/// The memory of a machine that is made and does not run: nobody else touches it.
struct NotRunning<'a>(&'a GuestRam);

impl Place for NotRunning<'_> {
    fn put(&self, offset: u64, content: &[u8]) -> Result<(), SnapshotError> {
        fill(self.0, offset, content)
    }

    fn in_place(
        &self,
        offset: u64,
        bytes: usize,
        read: &mut dyn FnMut(&mut [u8]) -> Result<(), SnapshotError>,
    ) -> Option<Result<(), SnapshotError>> {
        let region = self.0.region_of(offset)?;
        let address = GuestAddress(region.guest_address.0 + (offset - region.file_offset));
        let mut slices = self.0.memory().get_slices(address, bytes);
        // One that reaches over the gap, or beyond the end, is none.
        let slice = slices.next()?.ok().filter(|slice| slice.len() == bytes)?;
        let guard = slice.ptr_guard_mut();
        // SAFETY: these are mapped bytes of guest memory, which live as long as `self`. No vCPU and
        // no event loop runs before the machine does, runs of an image do not overlap, and so
        // nobody else reads or writes them meanwhile.
        let target = unsafe { std::slice::from_raw_parts_mut(guard.as_ptr(), bytes) };
        let done = read(target);
        slice.bitmap().mark_dirty(0, bytes);
        Some(done)
    }
}

/// Puts `content` to where `offset` of the memory's file is in guest memory, which may be in two
/// regions: the file has no gap where guest memory has one.
pub(super) fn fill(
    ram: &GuestRam,
    mut offset: u64,
    mut content: &[u8],
) -> Result<(), SnapshotError> {
    while !content.is_empty() {
        let beyond = || SnapshotError::GuestMemory(offset);
        let region = ram.region_of(offset).ok_or_else(beyond)?;
        let in_region = offset - region.file_offset;
        let left = usize::try_from(region.len - in_region).unwrap_or(usize::MAX);
        let (here, rest) = content.split_at(left.min(content.len()));
        let address = GuestAddress(region.guest_address.0 + in_region);
        let written = ram.memory().write_slice(here, address);
        written.map_err(|_| beyond())?;
        offset += here.len() as u64;
        content = rest;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;
    use crate::layout::LOW_MEMORY_END;
    use crate::snapshot::PAGE_BYTES;

    fn above_address(ram: &GuestRam) -> GuestAddress {
        ram.region_of(LOW_MEMORY_END).unwrap().guest_address
    }

    #[test]
    fn pages_on_both_sides_of_the_gap_in_guest_memory_go_to_their_own_places() {
        let ram = GuestRam::new(LOW_MEMORY_END + (4 << 20)).unwrap();
        let page = PAGE_BYTES as usize;
        let content: Vec<u8> = (0..4 * page).map(|at| (at / page + 1) as u8).collect();
        fill(&ram, LOW_MEMORY_END - 2 * PAGE_BYTES, &content).unwrap();
        let above = ram.region_of(LOW_MEMORY_END).unwrap().guest_address;
        let at = [
            LOW_MEMORY_END - 2 * PAGE_BYTES,
            LOW_MEMORY_END - PAGE_BYTES,
            above.0,
            above.0 + PAGE_BYTES,
        ];
        for (address, value) in at.into_iter().zip(1u8..) {
            let mut there = vec![0; page];
            let read = ram.memory().read_slice(&mut there, GuestAddress(address));
            read.unwrap();
            assert!(there.iter().all(|byte| *byte == value), "{address:#x}");
        }
        let place = NotRunning(&ram);
        let mut read = |target: &mut [u8]| {
            target.fill(9);
            Ok(())
        };
        let over_the_gap = place.in_place(LOW_MEMORY_END - PAGE_BYTES, 2 * page, &mut read);
        assert!(
            over_the_gap.is_none(),
            "no bytes there are one behind the other"
        );
        let done = place.in_place(LOW_MEMORY_END, page, &mut read);
        done.unwrap().unwrap();
        let mut there = vec![0; page];
        let read_back = ram.memory().read_slice(&mut there, above_address(&ram));
        read_back.unwrap();
        assert!(there.iter().all(|byte| *byte == 9));
        let end = ram.size_bytes();
        assert!(
            place
                .in_place(end - PAGE_BYTES, 2 * page, &mut read)
                .is_none()
        );
        assert!(place.in_place(end, page, &mut read).is_none());
        let beyond = fill(&ram, end - PAGE_BYTES, &content).unwrap_err();
        assert!(matches!(beyond, SnapshotError::GuestMemory(at) if at == end));
    }
}
