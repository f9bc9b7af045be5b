//! Reading all of memory without a page for what nobody has touched.
//!
//! A page of the memory's own file that is read through a mapping and was never there is allocated
//! by the kernel, and comes from the template where there is one ([`super::missing`]): whoever
//! looks at all of memory once would leave all of it there. Such pages are known by the holes of
//! the file, and have the bytes of the template, or zeros.
//!
//! ```text
//!  page is in the own file, or written ─► by guest memory
//!  page is not                         ─► by read(2) of the file that it would come from
//! ```

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::{GuestRam, data_of};

/// Pages that nobody had touched when this was asked for. One that was written since has changed:
/// whoever reads them while the guest runs follows changes from before that moment on, and takes
/// those from guest memory.
#[derive(Debug)]
pub(crate) struct Untouched {
    file: Arc<File>,
    /// In bytes and whole pages, in rising order.
    ranges: Vec<Range<u64>>,
}

impl GuestRam {
    /// What nobody has touched yet. Nothing where the host does not say, and of memory in large
    /// pages, which are all there.
    pub(crate) fn untouched(&self) -> Option<Untouched> {
        let found = self.find_untouched();
        found.unwrap_or_else(|error| {
            tracing::debug!(%error, "all of guest memory is read where it is");
            None
        })
    }

    fn find_untouched(&self) -> io::Result<Option<Untouched>> {
        if self.has_large_pages() {
            return Ok(None);
        }
        // A guest that gets memory of its own meanwhile has the same bytes; one that is reset has
        // changed.
        let template = {
            let mapped = self.mapped.lock();
            let template = mapped.as_ref();
            template.map(|template| (template.shared_file(), template.is_shared()))
        };
        let (file, touched) = match template {
            Some((file, false)) => (file, self.written()?),
            Some((file, true)) => (file, data_of(self.memfd(), self.size_bytes())?),
            None => (
                self.memfd.clone(),
                data_of(self.memfd(), self.size_bytes())?,
            ),
        };
        Ok(Some(Untouched {
            file,
            ranges: between(&touched, self.size_bytes()),
        }))
    }
}

impl Untouched {
    /// How far what is at `offset` of the memory's file is of one kind, at most to `end`: whether
    /// nobody has touched it, and where that ends.
    pub fn kind(&self, offset: u64, end: u64) -> (bool, u64) {
        let next = self.ranges.partition_point(|range| range.end <= offset);
        match self.ranges.get(next) {
            Some(range) if range.start <= offset => (true, range.end.min(end)),
            Some(range) => (false, range.start.min(end)),
            None => (false, end),
        }
    }

    /// Reads what nobody has touched from `offset` of the memory's file on.
    ///
    /// # Errors
    /// The file cannot be read, or has no such bytes any more.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }
}

/// What of the first `size` bytes is between `ranges`, which are in rising order.
fn between(ranges: &[Range<u64>], size: u64) -> Vec<Range<u64>> {
    let mut found = Vec::new();
    let mut at = 0;
    for range in ranges {
        if at < range.start.min(size) {
            found.push(at..range.start.min(size));
        }
        at = at.max(range.end);
    }
    if at < size {
        found.push(at..size);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_byte_is_of_one_kind() {
        const SIZE: u64 = 10 * 4096;
        let page = |number: u64| number * 4096;
        let cases: [&[[u64; 2]]; 5] = [
            &[],
            &[[0, 10]],
            &[[0, 1], [1, 3], [9, 10]],
            &[[2, 3], [5, 8]],
            &[[9, 12]],
        ];
        for touched in cases {
            let ranges = touched.iter().map(|&[from, to]| page(from)..page(to));
            let touched: Vec<_> = ranges.collect();
            let untouched = Untouched {
                file: Arc::new(tempfile::tempfile().unwrap()),
                ranges: between(&touched, SIZE),
            };
            let mut at = 0;
            while at < SIZE {
                let (is_untouched, end) = untouched.kind(at, SIZE);
                assert!(at < end && end <= SIZE, "{touched:?} at {at}");
                for byte in (at..end).step_by(4096) {
                    let is_touched = touched.iter().any(|range| range.contains(&byte));
                    assert_ne!(is_touched, is_untouched, "{touched:?} at {byte}");
                }
                at = end;
            }
        }
    }
}
