//! Giving a guest that began as a template memory of its own while it runs.
//!
//! ```text
//!  at rest: follow changes ─► guest runs: copy all that is not zero ─► copy what changed, again while that is much
//!     ─► at rest: copy the rest, map the file of its own at the same addresses
//! ```
//!
//! Where it is only to be seen by others in this process ([`VmHandle::share_memory`]), what the
//! guest has written is all that is copied; the rest comes when it is touched ([`super::missing`]).

use std::ops::Range;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress};

use super::copying::{Copying, CopyingError, FEW_PAGES, ROUNDS};
use super::template::Template;
use super::{GuestRam, MemoryError, PAGE_BYTES};
use crate::error::Error;
use crate::handle::VmHandle;
use crate::refused::Refused;

/// Bytes that are copied at once.
const CHUNK: usize = 256 << 10;
/// Why a guest keeps the memory of its template.
#[derive(Debug, thiserror::Error)]
pub enum OwnError {
    /// It cannot be paused.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// Its memory cannot be copied: most likely the host has no more.
    #[error("cannot give the guest memory of its own: {0}")]
    Memory(#[from] MemoryError),
    /// Changes cannot be followed.
    #[error(transparent)]
    Kvm(#[from] Error),
}

impl From<CopyingError> for OwnError {
    fn from(error: CopyingError) -> Self {
        match error {
            CopyingError::Refused(refused) => Self::Refused(refused),
            CopyingError::Kvm(error) => Self::Kvm(error),
        }
    }
}

impl VmHandle {
    /// If memory began as a template, copies it into the file of its own, which others can map
    /// then. The guest runs meanwhile, apart from two short pauses. Not to be called with a device
    /// locked. After an error it goes on with the template.
    pub fn own_memory(&self) -> Result<(), OwnError> {
        let one = self.one_copying();
        let ram = &self.machine().ram;
        if !ram.is_template() {
            return Ok(());
        }
        if ram.comes_on_demand() {
            return self.bring_all();
        }
        let copying = self.follow_copying(one)?;
        self.copy_to_own(&copying, ram.populated(), false)
    }

    /// If memory began as a template, has further mappings of the file of its own, in this process,
    /// see the same bytes: those that say so to [`devices::dma::MissingPages`]. What the guest has
    /// written is copied there, and the rest when it is touched; where the host has no
    /// userfaultfd(2) for this process all is copied, as by [`VmHandle::own_memory`].
    pub fn share_memory(&self) -> Result<(), OwnError> {
        let one = self.one_copying();
        let ram = &self.machine().ram;
        if !ram.is_template() || ram.comes_on_demand() {
            return Ok(());
        }
        let copying = self.follow_copying(one)?;
        let written = match ram.can_come_on_demand() {
            // Also what is zero by now: the template has something else there.
            true => ram.written().ok(),
            false => None,
        };
        match written {
            Some(written) => self.copy_to_own(&copying, written, true),
            None => self.copy_to_own(&copying, ram.populated(), false),
        }
    }

    /// Brings what is a template's into the file of its own.
    fn bring_all(&self) -> Result<(), OwnError> {
        let ram = &self.machine().ram;
        ram.bring_all()?;
        self.with_devices_at_rest(|| Ok(ram.use_own()?))?
    }

    /// Copies what is in `ranges` of the memory's file, and maps it then. `on_demand`: the rest
    /// comes from the template.
    fn copy_to_own(
        &self,
        copying: &Copying<'_>,
        ranges: Vec<Range<u64>>,
        on_demand: bool,
    ) -> Result<(), OwnError> {
        let ram = &self.machine().ram;
        ram.empty_own()?;
        for range in ranges {
            let mut at = range.start;
            while at < range.end {
                let bytes = (range.end - at).min(CHUNK as u64);
                ram.copy_to_own(at, bytes as usize, on_demand)?;
                at += bytes;
            }
        }
        for _ in 0..ROUNDS {
            let changed = self.with_devices_at_rest(|| copying.changed())??;
            for &page in &changed {
                let at = u64::from(page) * PAGE_BYTES;
                ram.copy_to_own(at, PAGE_BYTES as usize, true)?;
            }
            if changed.len() <= FEW_PAGES {
                break;
            }
        }
        self.with_devices_at_rest(|| {
            // A reset in between did all that is needed.
            if !ram.is_template() {
                return Ok(());
            }
            for page in copying.changed()? {
                let at = u64::from(page) * PAGE_BYTES;
                ram.copy_to_own(at, PAGE_BYTES as usize, true)?;
            }
            match on_demand {
                true => Ok(ram.use_own_on_demand()?),
                false => Ok(ram.use_own()?),
            }
        })?
    }
}

impl GuestRam {
    /// Copies `bytes`, whole pages, from `offset` on to the same place in the memory's own file,
    /// with or without pages of zeros. Does nothing if that file is in use by now.
    fn copy_to_own(&self, offset: u64, bytes: usize, zeros: bool) -> Result<(), MemoryError> {
        // A reset, which takes the file into use, waits.
        let mapped = self.mapped.lock();
        if mapped.is_none() {
            return Ok(());
        }
        let mut buffer = vec![0; bytes];
        let (page, mut at) = (PAGE_BYTES as usize, offset);
        for piece in buffer.chunks_mut(page) {
            // A write by the guest meanwhile has the page copied again.
            let read = self.region_of(at).and_then(|region| {
                let gpa = region.guest_address.0 + (at - region.file_offset);
                self.memory().read_slice(piece, GuestAddress(gpa)).ok()
            });
            read.ok_or(MemoryError::NoPage(at))?;
            at += PAGE_BYTES;
        }
        let mut from = 0;
        while from < bytes {
            let is_kept = |piece: &[u8]| zeros || piece.iter().any(|&byte| byte != 0);
            let pieces = buffer[from..].chunks(page);
            let kept = pieces.take_while(|piece| is_kept(piece)).count() * page;
            if kept > 0 {
                let kept = kept.min(bytes - from);
                self.memfd()
                    .write_all_at(&buffer[from..from + kept], offset + from as u64)
                    .map_err(MemoryError::Allocate)?;
            }
            from += kept.max(page);
        }
        Ok(())
    }

    fn can_come_on_demand(&self) -> bool {
        let mapped = self.mapped.lock();
        mapped.as_ref().is_some_and(Template::can_be_shared)
    }

    fn bring_all(&self) -> Result<(), MemoryError> {
        let mapped = self.mapped.lock();
        let brought = mapped.as_ref().map_or(Ok(()), Template::bring_all);
        brought.map_err(MemoryError::Allocate)
    }

    /// Empties the memory's own file of what an earlier attempt left there.
    fn empty_own(&self) -> Result<(), MemoryError> {
        let mapped = self.mapped.lock();
        match mapped.is_some() {
            true => self.punch(),
            false => Ok(()),
        }
    }
}
