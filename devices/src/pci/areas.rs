//! Parts of base address registers that are memory: what a guest loads and stores there reaches it
//! without an exit.
//!
//! ```text
//!   function ── BarArea: which part, its memory ──► PciBus: is it decoded, is no fault armed?
//!                                                     └► GuestSlots: a memory slot of the guest's VM
//! ```
//!
//! A function lists its areas ([`super::PciFunction::areas`]); the bus has each of them where the
//! guest has placed its register, and takes it out when the register moves or is not decoded any
//! more, at a reset, and while faults are armed at the function's edge. Where an area is not, the
//! guest's accesses exit and go to the function as any other. So do those of another VM over the
//! same guest memory, which has no such slot: an isolated call's.
//!
//! When [`BarArea::take_out`], [`BarArea::withdraw`] or a drop returns, no vCPU reaches the memory
//! by the area any more.
//!
//! Lock order: the function, then an area, then whoever has the slots.

use std::fs::File;
use std::io::{Error, ErrorKind};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::BarIndex;
use crate::dma::ForeignMapping;

/// Bytes of a page: areas consist of whole ones.
pub const PAGE_BYTES: u64 = 4096;

/// Why something is no area.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AreaError {
    /// It does not consist of whole pages.
    #[error(
        "a part of {len:#x} bytes at {offset:#x} of a base address register is not of whole pages"
    )]
    NotPages {
        /// From the register's beginning.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

/// Why an area has no slot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SlotRefused {
    /// At this place, or because of what else there is now.
    #[error("{0}")]
    Here(&'static str),
    /// The host does not give any.
    #[error("{0}")]
    ByHost(String),
}

/// Whoever has the memory slots of a guest.
pub trait GuestSlots: Send + Sync {
    /// Puts `area` at guest physical `address`, until what this gives is dropped: then no vCPU
    /// reaches it any more.
    ///
    /// # Errors
    /// It cannot be there: nothing of the guest is replaced.
    fn put(&self, area: &Arc<BarArea>, address: u64) -> Result<Box<dyn Send>, SlotRefused>;
}

/// A mapping in this process that a guest may be given. This process itself does not touch it: it
/// may be registers, where a load does something.
#[derive(Debug)]
pub struct BarMemory(Backing);

#[derive(Debug)]
enum Backing {
    /// Of a file that another process has given, and may make shorter.
    Foreign {
        mapping: ForeignMapping,
        file: Arc<File>,
        /// Bytes that the file has to have.
        end: u64,
        len: usize,
    },
    /// Of a device's file.
    Device { start: usize, len: usize },
}

impl BarMemory {
    /// `len` bytes from `offset` of a file that another process has given: one in memory (tmpfs,
    /// hugetlbfs), in whole pages of it.
    ///
    /// # Errors
    /// The file has not so much, or is none that can be used.
    pub fn of_file(file: Arc<File>, offset: u64, len: usize) -> std::io::Result<Self> {
        let end = offset.checked_add(len as u64);
        let end = end.ok_or(ErrorKind::InvalidInput)?;
        let mapping = ForeignMapping::new(&file, offset, len)?;
        Ok(Self(Backing::Foreign {
            mapping,
            file,
            end,
            len,
        }))
    }

    /// `len` bytes from `offset` of a device's file, as the kernel maps it.
    ///
    /// # Errors
    /// The kernel does not.
    pub fn of_device(file: &File, offset: u64, len: usize) -> std::io::Result<Self> {
        let offset = libc::off_t::try_from(offset).map_err(|_| ErrorKind::InvalidInput)?;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let (flags, fd) = (libc::MAP_SHARED, file.as_raw_fd());
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that is there.
        let at = unsafe { libc::mmap(ptr::null_mut(), len, prot, flags, fd, offset) };
        if at == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        let start = at as usize;
        Ok(Self(Backing::Device { start, len }))
    }

    /// Where it is in this process.
    pub fn host_address(&self) -> u64 {
        match &self.0 {
            Backing::Foreign { mapping, .. } => mapping.as_ptr() as u64,
            Backing::Device { start, .. } => *start as u64,
        }
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        match &self.0 {
            Backing::Foreign { len, .. } | Backing::Device { len, .. } => *len as u64,
        }
    }

    /// Whether there is nothing of it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether another process has given it, and may take away what is behind it.
    pub fn is_of_file(&self) -> bool {
        matches!(self.0, Backing::Foreign { .. })
    }

    /// Whether its file is found to be shorter than it was.
    pub fn is_cut(&self) -> bool {
        match &self.0 {
            Backing::Foreign { file, end, .. } => {
                file.metadata().map_or(true, |file| file.len() < *end)
            }
            Backing::Device { .. } => false,
        }
    }
}

impl Drop for BarMemory {
    fn drop(&mut self) {
        if let Backing::Device { start, len } = self.0 {
            // SAFETY: the mapping is this value's own. Whoever gives it to a guest keeps the value
            // until the guest has it no more.
            unsafe { libc::munmap(start as *mut libc::c_void, len) };
        }
    }
}

/// Where an area is.
enum Place {
    Out,
    /// The slot goes when this is dropped.
    In {
        address: u64,
        _slot: Box<dyn Send>,
    },
    /// For good.
    Withdrawn,
}

/// A part of a base address register that is memory. See the module.
pub struct BarArea {
    bar: BarIndex,
    offset: u64,
    memory: Arc<BarMemory>,
    place: Mutex<Place>,
}

impl std::fmt::Debug for BarArea {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BarArea")
            .field("bar", &self.bar)
            .field("offset", &self.offset)
            .field("len", &self.memory.len())
            .finish_non_exhaustive()
    }
}

impl BarArea {
    /// The part of `bar` from `offset` on whose bytes are `memory`.
    ///
    /// # Errors
    /// It does not consist of whole pages.
    pub fn new(bar: BarIndex, offset: u64, memory: BarMemory) -> Result<Arc<Self>, AreaError> {
        let len = memory.len();
        let is_whole = [offset, len].iter().all(|at| at.is_multiple_of(PAGE_BYTES));
        if !is_whole || len == 0 || offset.checked_add(len).is_none() {
            return Err(AreaError::NotPages { offset, len });
        }
        Ok(Arc::new(Self {
            bar,
            offset,
            memory: Arc::new(memory),
            place: Mutex::new(Place::Out),
        }))
    }

    /// Which base address register it is a part of.
    pub fn bar(&self) -> BarIndex {
        self.bar
    }

    /// Which bytes of that.
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.memory.len()
    }

    /// Its memory.
    pub fn memory(&self) -> &Arc<BarMemory> {
        &self.memory
    }

    /// The guest physical address where the guest has it now, if it has.
    pub fn address(&self) -> Option<u64> {
        match &*self.place() {
            Place::In { address, .. } => Some(*address),
            _ => None,
        }
    }

    /// Takes it from the guest for good: every access exits from now on.
    pub fn withdraw(&self) {
        *self.place() = Place::Withdrawn;
    }

    /// Takes it from the guest, until the bus puts it in again.
    pub(crate) fn take_out(&self) {
        let mut place = self.place();
        if let Place::In { .. } = &*place {
            *place = Place::Out;
        }
    }

    /// Has it at guest physical `address`, as far as `slots` can: the bus does so for the functions
    /// on it.
    pub fn put(self: &Arc<Self>, address: u64, slots: &dyn GuestSlots) {
        let mut place = self.place();
        match &*place {
            Place::Withdrawn => return,
            Place::In { address: at, .. } if *at == address => return,
            // The old slot goes before there is a new one.
            _ => *place = Place::Out,
        }
        match slots.put(self, address) {
            Ok(slot) => {
                *place = Place::In {
                    address,
                    _slot: slot,
                }
            }
            Err(SlotRefused::Here(why)) => {
                tracing::debug!(area = ?self, address, why, "not mapped")
            }
            Err(SlotRefused::ByHost(why)) => {
                tracing::warn!(area = ?self, address, why, "registers are not mapped");
                *place = Place::Withdrawn;
            }
        }
    }

    fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The whole pages of `areas` that have nothing of `holes` in them. The areas do not overlap.
pub fn whole_pages(areas: &[Range<u64>], holes: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut left: Vec<Range<u64>> = areas
        .iter()
        .filter_map(|area| {
            let start = area.start.checked_next_multiple_of(PAGE_BYTES)?;
            Some(start..area.end & !(PAGE_BYTES - 1))
        })
        .collect();
    for hole in holes.iter().filter(|hole| !hole.is_empty()) {
        let start = hole.start & !(PAGE_BYTES - 1);
        let end = hole.end.checked_next_multiple_of(PAGE_BYTES);
        let end = end.unwrap_or(u64::MAX);
        let around = |area: &Range<u64>| {
            [
                area.start..area.end.min(start),
                area.start.max(end)..area.end,
            ]
        };
        left = left.iter().flat_map(around).collect();
    }
    left.retain(|area| !area.is_empty());
    left
}

#[cfg(test)]
mod tests;
