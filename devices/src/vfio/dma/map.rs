//! What is in the IOMMU's map, in pieces that go in and out by themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{DmaMemory, LARGE_PAGE};
use crate::vfio::error::VfioError;
use crate::vfio::sys;

/// Whose functions reach the memory: a container of VFIO.
pub(in crate::vfio) trait Container: Debug + Send + Sync {
    /// Lets them reach `bytes` bytes from `host` on of this process at `guest`.
    ///
    /// # Safety
    /// As [`sys::map_dma`].
    unsafe fn map_dma(&self, guest: u64, host: u64, bytes: u64) -> io::Result<()>;
    /// Takes that away again.
    fn unmap_dma(&self, guest: u64, bytes: u64) -> io::Result<()>;
}

impl Container for File {
    unsafe fn map_dma(&self, guest: u64, host: u64, bytes: u64) -> io::Result<()> {
        // SAFETY: the caller knows the memory.
        unsafe { sys::map_dma(self, guest, host, bytes) }
    }

    fn unmap_dma(&self, guest: u64, bytes: u64) -> io::Result<()> {
        sys::unmap_dma(self, guest, bytes).map(drop)
    }
}

/// Memory that the functions of a container reach, at guest physical addresses. Dropped, they reach
/// it no more. The kernel has found and locked its pages: the mapping in this process is needed for
/// the next time only.
#[derive(Debug)]
pub struct DmaMap {
    container: Arc<dyn Container>,
    /// Bytes of the pieces that are put in and taken out by themselves; each begins at a multiple
    /// of it, or where memory does.
    piece: u64,
    /// Guest physical address and length of each piece that is in the map.
    pieces: BTreeMap<u64, u64>,
    took: Duration,
}

impl DmaMap {
    /// One in which there is nothing yet, for memory each part of which is a piece.
    pub(in crate::vfio) fn for_parts(container: Arc<dyn Container>) -> Self {
        Self::empty(container, u64::MAX)
    }

    /// One in which there is nothing yet, for `memory` in pieces.
    pub(in crate::vfio) fn for_pieces(container: Arc<dyn Container>, memory: &DmaMemory) -> Self {
        Self::empty(container, memory.piece_bytes())
    }

    fn empty(container: Arc<dyn Container>, piece: u64) -> Self {
        Self {
            container,
            piece,
            pieces: BTreeMap::new(),
            took: Duration::ZERO,
        }
    }

    /// Lets the functions reach all of `memory`, of which they may reach some.
    ///
    /// # Errors
    /// The limit of locked memory is in the way, or the host has not enough. A part of it may be
    /// there then, which is known.
    pub fn add_all(&mut self, memory: &DmaMemory) -> Result<(), VfioError> {
        self.add(memory, &Wanted::All, Batch::ALL).map(drop)
    }

    /// Lets the functions reach more of `memory`: those of its pieces that are wanted, or some of
    /// them, and gives where the next ones are. It is the memory of which there are pieces already.
    ///
    /// # Errors
    /// As those of [`Self::add_all`]; a part of it may be there then.
    pub(in crate::vfio) fn add(
        &mut self,
        memory: &DmaMemory,
        wanted: &Wanted<'_>,
        batch: Batch,
    ) -> Result<Option<u64>, VfioError> {
        let mut left = batch.most;
        let start = Instant::now();
        let wanted = wanted.pieces(self.piece);
        for part in &memory.parts {
            for (guest, bytes) in pieces_of(part.guest, part.bytes as u64, self.piece) {
                let is_wanted = wanted.as_ref().is_none_or(|all| all.contains(&guest));
                if guest < batch.from || !is_wanted || self.pieces.contains_key(&guest) {
                    continue;
                }
                if left == 0 {
                    return Ok(Some(guest));
                }
                left -= 1;
                let host = part.host as u64 + (guest - part.guest);
                // SAFETY: guest memory is changed by others at any time and read as such. It is
                // mapped during the call: the piece is within its part.
                let result = unsafe { self.container.map_dma(guest, host, bytes) };
                result.map_err(|error| refused(error, memory.bytes()))?;
                self.pieces.insert(guest, bytes);
            }
        }
        self.took += start.elapsed();
        Ok(None)
    }

    /// Takes all out of the map but the pieces in which some of `near` is, or some of that, and
    /// gives where the next ones are.
    ///
    /// # Errors
    /// The host does not take it out.
    pub(in crate::vfio) fn keep(
        &mut self,
        near: &[Range<u64>],
        batch: Batch,
    ) -> Result<Option<u64>, VfioError> {
        let kept = Wanted::Near(near).pieces(self.piece).unwrap_or_default();
        self.take_out(&kept, batch)
            .map_err(VfioError::host("take guest memory out of the IOMMU's map"))
    }

    /// How long it took to put the memory into the map.
    pub fn took(&self) -> Duration {
        self.took
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> u64 {
        self.pieces.values().sum()
    }

    /// Takes all memory out of the map; gives how long that took.
    ///
    /// # Errors
    /// The host does not take it out. What it has not is in the map still, and known to be.
    pub fn unmap(&mut self) -> Result<Duration, VfioError> {
        let start = Instant::now();
        self.keep(&[], Batch::ALL)?;
        Ok(start.elapsed())
    }

    fn take_out(&mut self, kept: &BTreeSet<u64>, batch: Batch) -> io::Result<Option<u64>> {
        let (some, next) = batch.of(&self.pieces, kept);
        // One piece that stays keeps none of the others reachable.
        let mut failed = None;
        for (guest, bytes) in some {
            match self.container.unmap_dma(guest, bytes) {
                Ok(()) => drop(self.pieces.remove(&guest)),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        match failed {
            Some(error) => Err(error),
            None => Ok(next),
        }
    }
}

/// How many pieces at a time, and from which guest physical address on.
#[derive(Debug, Clone, Copy)]
pub struct Batch {
    /// From here on.
    pub from: u64,
    /// At most so many.
    pub most: usize,
}

impl Batch {
    /// All at once.
    pub const ALL: Self = Self {
        from: 0,
        most: usize::MAX,
    };

    /// Its pieces among `all` but those that are kept, and where the next batch begins.
    fn of(self, all: &BTreeMap<u64, u64>, kept: &BTreeSet<u64>) -> (Vec<(u64, u64)>, Option<u64>) {
        let mut far = all
            .range(self.from..)
            .map(|(guest, bytes)| (*guest, *bytes))
            .filter(|(guest, _)| !kept.contains(guest));
        let some = far.by_ref().take(self.most).collect();
        (some, far.next().map(|(guest, _)| guest))
    }
}

/// Which pieces of memory.
pub(in crate::vfio) enum Wanted<'a> {
    /// All.
    All,
    /// Those in which some of these ranges of guest physical addresses is.
    Near(&'a [Range<u64>]),
}

impl Wanted<'_> {
    /// Where they begin, were memory everywhere; `None` for all. Beginnings of memory that are no
    /// multiples of a piece are not found: their pieces are left to [`Wanted::All`].
    fn pieces(&self, piece: u64) -> Option<BTreeSet<u64>> {
        let Self::Near(ranges) = self else {
            return None;
        };
        let mut pieces = BTreeSet::new();
        for range in ranges.iter().filter(|range| !range.is_empty()) {
            let (first, last) = (range.start / piece, (range.end - 1) / piece);
            // Nothing that a device is told of is so long: of an address that is none it is enough.
            let last = last.min(first.saturating_add(MOST_PIECES_OF_ONE));
            pieces.extend((first..=last).map(|number| number * piece));
        }
        Some(pieces)
    }
}

/// Most pieces that one range is looked at for.
const MOST_PIECES_OF_ONE: u64 = 8;
/// Most pieces that memory has: the host keeps some 65,000 entries for all maps of a container
/// (`dma_entry_limit` of vfio_iommu_type1).
const MOST_PIECES: u64 = 4096;

/// How long pieces of so much memory are: large pages where that is not too many.
pub(super) fn piece_bytes(memory: u64) -> u64 {
    let pages = LARGE_PAGE as u64;
    let needed = memory / MOST_PIECES;
    needed
        .max(pages)
        .checked_next_power_of_two()
        .unwrap_or(u64::MAX)
}

/// The pieces of a part of memory: guest physical address and length.
fn pieces_of(start: u64, bytes: u64, piece: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = start.saturating_add(bytes);
    let mut at = start;
    std::iter::from_fn(move || {
        let left = end - at;
        let to_next = piece - at % piece;
        let length = left.min(to_next);
        let here = at;
        at += length;
        (length > 0).then_some((here, length))
    })
}

impl Drop for DmaMap {
    fn drop(&mut self) {
        if let Err(error) = self.take_out(&BTreeSet::new(), Batch::ALL) {
            // Closing the container does it at last; its pages stay allocated until then.
            tracing::error!(%error, "guest memory stays in the IOMMU's map");
        }
    }
}

/// Why memory is not taken into the map.
fn refused(source: io::Error, needed: u64) -> VfioError {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    match (source.raw_os_error(), limit) {
        (Some(libc::ENOMEM), Some(limit)) if limit < needed => {
            VfioError::LockedMemory { needed, limit }
        }
        _ => VfioError::Host {
            what: "put guest memory into the IOMMU's map",
            source,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_cut_into_pieces_that_begin_at_multiples_of_one() {
        let piece = LARGE_PAGE as u64;
        assert_eq!(piece_bytes(256 << 20), piece);
        assert_eq!(piece_bytes(8 << 30), piece);
        assert_eq!(piece_bytes((8 << 30) + 1), piece);
        assert_eq!(piece_bytes(33 << 30), 16 << 20);
        let of = |start, bytes| pieces_of(start, bytes, piece).collect::<Vec<_>>();
        assert_eq!(
            of(0, 5 << 20),
            [(0, piece), (piece, piece), (2 * piece, 1 << 20)]
        );
        assert_eq!(
            of(0x1000, piece),
            [(0x1000, piece - 0x1000), (piece, 0x1000)]
        );
        assert_eq!(of(0, 0), []);
        let whole: Vec<_> = pieces_of(1 << 32, 8 << 30, u64::MAX).collect();
        assert_eq!(whole, [(1 << 32, 8 << 30)]);
        let near = [
            piece - 1..piece + 1,
            7 * piece..7 * piece,
            u64::MAX - 1..u64::MAX,
        ];
        let wanted = Wanted::Near(&near).pieces(piece).unwrap();
        assert_eq!(wanted.len(), 3);
        assert!(wanted.contains(&0) && wanted.contains(&piece));
        let long = 0..u64::MAX;
        let long = Wanted::Near(std::slice::from_ref(&long));
        let long = long.pieces(piece).unwrap();
        assert_eq!(long.len() as u64, MOST_PIECES_OF_ONE + 1);
        assert!(Wanted::All.pieces(piece).is_none());
    }

    #[test]
    fn pieces_are_taken_out_in_batches_and_some_are_kept() {
        let all = (0..6).map(|number| (number * 10, 10)).collect();
        let kept = [20, 50].into();
        let mut batch = Batch { from: 0, most: 2 };
        assert_eq!(batch.of(&all, &kept), (vec![(0, 10), (10, 10)], Some(30)));
        batch.from = 30;
        assert_eq!(batch.of(&all, &kept), (vec![(30, 10), (40, 10)], None));
        let (some, next) = Batch::ALL.of(&all, &kept);
        assert_eq!((some.len(), next), (4, None));
    }

    #[test]
    fn the_limit_of_locked_memory_is_said_only_where_it_is_the_reason() {
        let enomem = || io::Error::from_raw_os_error(libc::ENOMEM);
        let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
        if let Some(limit) = limit {
            let text = refused(enomem(), limit + 1).to_string();
            assert!(text.contains(&format!("{} KiB", limit / 1024)), "{text}");
        }
        assert!(refused(enomem(), 0).to_string().contains("cannot put"));
        let other = refused(io::Error::from_raw_os_error(libc::EINVAL), u64::MAX);
        assert!(other.to_string().contains("cannot put"));
    }
}
