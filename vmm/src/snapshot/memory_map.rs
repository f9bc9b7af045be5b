//! Which pages an image holds, with their checksums.

use serde::{Deserialize, Serialize};

use super::PAGE_BYTES;

/// Most pages of one run: as much is read, checked and put into memory at once.
pub(super) const MAX_RUN_PAGES: u32 = 256;
/// Longest map that is looked at, in bytes: each page of 64 GiB on its own.
pub(super) const MAX_MAP_BYTES: u64 = 256 << 20;

/// Consecutive pages of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRun {
    /// First page: its offset in memory and in the image, in pages of 4 KiB.
    pub first: u64,
    /// Their number, 1 to 256.
    pub pages: u32,
    /// Checksum of their content ([`super::PageSums`]); `None`: all of them are zero, and the image
    /// holds nothing for them.
    pub sum: Option<u64>,
}

impl PageRun {
    /// Offset of its first byte.
    pub fn offset(&self) -> u64 {
        self.first * PAGE_BYTES
    }

    /// Bytes of all its pages.
    pub fn bytes(&self) -> usize {
        self.pages as usize * PAGE_BYTES as usize
    }

    /// First page behind it.
    pub fn end(&self) -> u64 {
        self.first + u64::from(self.pages)
    }
}

/// The runs of an image in rising order; none overlap.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryMap(Vec<PageRun>);

impl MemoryMap {
    /// A map of these runs, for memory of `memory_bytes`.
    ///
    /// # Errors
    /// They overlap, are out of order, or reach beyond the memory.
    pub fn new(runs: Vec<PageRun>, memory_bytes: u64) -> Result<Self, String> {
        let mut end = 0;
        for run in &runs {
            if run.pages == 0 || run.pages > MAX_RUN_PAGES {
                return Err(format!("a run has {} pages", run.pages));
            }
            let behind = run.first.checked_add(u64::from(run.pages));
            let inside = behind.filter(|&behind| behind <= memory_bytes / PAGE_BYTES);
            match inside {
                Some(behind) if run.first >= end => end = behind,
                Some(_) => return Err(format!("page {:#x} is there twice", run.first)),
                None => return Err(format!("page {:#x} is beyond its memory", run.first)),
            }
        }
        Ok(Self(runs))
    }

    /// The runs.
    pub fn runs(&self) -> &[PageRun] {
        &self.0
    }

    /// Number of pages in the image.
    pub fn stored_pages(&self) -> u64 {
        let stored = self.0.iter().filter(|run| run.sum.is_some());
        stored.map(|run| u64::from(run.pages)).sum()
    }

    /// The map as bytes (`postcard`).
    ///
    /// # Errors
    /// It cannot be encoded.
    pub fn to_bytes(&self) -> Result<Vec<u8>, String> {
        postcard::to_stdvec(&self.0).map_err(|error| error.to_string())
    }

    /// The map that [`MemoryMap::to_bytes`] gave, for memory of `memory_bytes`.
    ///
    /// # Errors
    /// It is none.
    pub fn from_bytes(bytes: &[u8], memory_bytes: u64) -> Result<Self, String> {
        let (runs, rest) = postcard::take_from_bytes::<Vec<PageRun>>(bytes)
            .map_err(|_| "it cannot be decoded".to_owned())?;
        if !rest.is_empty() {
            return Err("something is behind it".to_owned());
        }
        Self::new(runs, memory_bytes)
    }
}
