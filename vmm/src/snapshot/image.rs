//! Pages of an image: read, checked, put into guest memory.

use std::fs::File;
use std::io::{Error, ErrorKind};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{PageRun, SnapshotError};

/// Most threads that read an image.
const MAX_THREADS: usize = 4;

/// What came into memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Loaded {
    /// Pages that were read.
    pub pages: u64,
}

/// Reads the pages of `run` and checks them. [`ErrorKind::InvalidData`]: they are not those that
/// were written.
pub(super) fn verify_run(image: &File, run: &PageRun, buffer: &mut [u8]) -> std::io::Result<()> {
    let Some(expected) = run.crc32 else {
        buffer.fill(0);
        return Ok(());
    };
    image.read_exact_at(buffer, run.offset())?;
    if crc32fast::hash(buffer) == expected {
        return Ok(());
    }
    let pages = format!(
        "pages {:#x} to {:#x} are not those that were written",
        run.first,
        run.end() - 1
    );
    Err(Error::new(ErrorKind::InvalidData, pages))
}

/// Does `work` for each of `items`, on as many threads as help. The first error ends it.
pub(super) fn in_parallel<T: Sync>(
    items: &[T],
    work: impl Fn(&T, &mut Vec<u8>) -> Result<(), SnapshotError> + Sync,
) -> Result<(), SnapshotError> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.min(MAX_THREADS).min(items.len().max(1));
    let next = AtomicUsize::new(0);
    let body = || {
        let mut buffer = Vec::new();
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = work(item, &mut buffer) {
                // The others find nothing more to do.
                next.store(items.len(), Ordering::Relaxed);
                return Err(error);
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads)
            .filter_map(|_| std::thread::Builder::new().spawn_scoped(scope, body).ok())
            .collect();
        let mut result = body();
        for other in others {
            // A panic is a fault of this program, and no page may be missing because of it.
            let ended = other
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            result = result.and(ended);
        }
        result
    })
}
