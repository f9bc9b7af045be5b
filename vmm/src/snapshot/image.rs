//! Pages of an image: read, checked, put into guest memory.

use std::fs::File;
use std::io::{Error, ErrorKind};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{PageRun, PageSums, SnapshotError};

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
pub(super) fn verify_run(
    image: &File,
    run: &PageRun,
    sums: PageSums,
    buffer: &mut [u8],
) -> std::io::Result<()> {
    let Some(expected) = run.sum else {
        buffer.fill(0);
        return Ok(());
    };
    image.read_exact_at(buffer, run.offset())?;
    if sums.run(buffer) == expected {
        return Ok(());
    }
    let pages = format!(
        "pages {:#x} to {:#x} are not those that were written",
        run.first,
        run.end() - 1
    );
    Err(Error::new(ErrorKind::InvalidData, pages))
}

/// Items between two words about how far it is: 64 MiB at most, if they are whole runs.
const ITEMS_BETWEEN_WORDS: usize = 64;

/// Does `work` for each of `items`, on as many threads as help. The first error ends it. `tell`
/// hears now and then how many of them are taken, and says whether it is still wanted.
pub(super) fn in_parallel<T: Sync>(
    items: &[T],
    tell: &mut dyn FnMut(usize) -> bool,
    work: impl Fn(&T, &mut Vec<u8>) -> Result<(), SnapshotError> + Sync,
) -> Result<(), SnapshotError> {
    // How many processors there are takes twenty system calls to find out.
    let threads = match items.len() {
        0 | 1 => 1,
        more => {
            let processors = std::thread::available_parallelism().map_or(1, usize::from);
            processors.min(MAX_THREADS).min(more)
        }
    };
    let next = AtomicUsize::new(0);
    let body = |tell: &mut dyn FnMut(usize) -> bool| {
        let mut buffer = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else {
                return Ok(());
            };
            let done = match tell(index) {
                true => work(item, &mut buffer),
                false => Err(SnapshotError::GivenUp),
            };
            if let Err(error) = done {
                // The others find nothing more to do.
                next.store(items.len(), Ordering::Relaxed);
                return Err(error);
            }
        }
    };
    let mut word_at = ITEMS_BETWEEN_WORDS;
    let mut now_and_then = |index: usize| {
        if index < word_at {
            return true;
        }
        word_at = index + ITEMS_BETWEEN_WORDS;
        tell(index)
    };
    let done = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads)
            .filter_map(|_| {
                std::thread::Builder::new()
                    .spawn_scoped(scope, || body(&mut |_| true))
                    .ok()
            })
            .collect();
        let mut result = body(&mut now_and_then);
        for other in others {
            // A panic is a fault of this program, and no page may be missing because of it.
            let ended = other
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            result = result.and(ended);
        }
        result
    });
    done?;
    // However fast the others were: long work is heard of.
    match items.len() < ITEMS_BETWEEN_WORDS || tell(items.len()) {
        true => Ok(()),
        false => Err(SnapshotError::GivenUp),
    }
}
