//! Which pages of a template were touched, and having them before they are.

use std::io;
use std::ops::Range;

use rustix::fs::{Advice as FileAdvice, fadvise};
use rustix::mm::{Advice, madvise};

use super::template::{PageKind, look_at_pages};
use super::{GuestRam, PAGE_BYTES, data_of};

/// Bytes that are fetched at once. Meanwhile a thread handles no signal (`MADV_POPULATE_READ` heeds
/// only those that end it), and others may wait until it has handled one.
const PIECE_BYTES: u64 = 1 << 20;

impl GuestRam {
    /// Parts of a template, in bytes and whole pages, that somebody has touched: the guest, a
    /// device or this process. The kernel maps a few neighbours with each page that is only read.
    /// `None` of memory that is not a template's, or not any more.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn touched(&self) -> io::Result<Option<Vec<Range<u64>>>> {
        let mapped = self.mapped.lock();
        let Some(template) = mapped.as_ref().filter(|template| !template.is_shared()) else {
            return Ok(None);
        };
        let data = data_of(template.file(), self.size_bytes())?;
        let mut found: Vec<Range<u64>> = Vec::new();
        for region in self.regions() {
            look_at_pages(region, |offset, kind| {
                let next = data.partition_point(|range| range.end <= offset);
                let is_hole = data.get(next).is_none_or(|range| offset < range.start);
                if kind == PageKind::Absent || is_hole {
                    return;
                }
                match found.last_mut() {
                    Some(last) if last.end == offset => last.end += PAGE_BYTES,
                    _ => found.push(offset..offset + PAGE_BYTES),
                }
            })?;
        }
        Ok(Some(found))
    }

    /// Has `pages` of the template, in bytes and whole pages, in the page cache and mapped, so that
    /// who touches them does not wait for them. What is not the template's any more, or not in
    /// memory, is left out. Costs as much as touching them would, and changes nothing.
    pub fn fetch_ahead(&self, pages: &[Range<u64>]) {
        for (is_last, pages) in [(false, pages), (true, pages)] {
            for range in pages.iter().flat_map(pieces) {
                // Not for long: who gives the guest memory of its own waits.
                let mapped = self.mapped.lock();
                let Some(template) = mapped.as_ref().filter(|template| !template.is_shared())
                else {
                    return;
                };
                let done = match is_last {
                    // All of them are asked for before the first one is waited for.
                    false => ask_for(template.file(), &range),
                    true => self.map_ahead(&range),
                };
                if let Err(error) = done {
                    tracing::debug!(%error, "pages are not fetched ahead");
                    return;
                }
            }
        }
    }

    fn map_ahead(&self, pages: &Range<u64>) -> io::Result<()> {
        for region in self.regions() {
            let end = region.file_offset + region.len;
            let (start, end) = (pages.start.max(region.file_offset), pages.end.min(end));
            let Some(bytes) = end.checked_sub(start).filter(|bytes| *bytes > 0) else {
                continue;
            };
            let at = region.host_address + (start - region.file_offset);
            // SAFETY: the range is within the mapping of this region, which is locked; reading its
            // pages changes none.
            unsafe { madvise(at as *mut _, bytes as usize, Advice::LinuxPopulateRead) }?;
        }
        Ok(())
    }
}

/// `pages` in parts of [`PIECE_BYTES`] at most.
fn pieces(pages: &Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut rest = pages.clone();
    std::iter::from_fn(move || {
        let end = rest.start.saturating_add(PIECE_BYTES).min(rest.end);
        let piece = rest.start..end;
        rest.start = end;
        (!piece.is_empty()).then_some(piece)
    })
}

fn ask_for(file: &std::fs::File, pages: &Range<u64>) -> io::Result<()> {
    let length = std::num::NonZeroU64::new(pages.end - pages.start);
    Ok(fadvise(file, pages.start, length, FileAdvice::WillNeed)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_ranges_are_fetched_in_pieces() {
        for pages in [
            0..4096,
            4096..PIECE_BYTES,
            8192..5 * PIECE_BYTES + 4096,
            0..0,
        ] {
            let pieces: Vec<_> = pieces(&pages).collect();
            assert!(pieces.iter().all(|piece| {
                let bytes = piece.end - piece.start;
                bytes > 0 && bytes <= PIECE_BYTES && bytes.is_multiple_of(PAGE_BYTES)
            }));
            let mut at = pages.start;
            for piece in &pieces {
                assert_eq!(piece.start, at);
                at = piece.end;
            }
            assert_eq!(at, pages.end);
        }
    }
}
