//! Which bytes of a page changed.

use super::view::{PAGE_SIZE, Page};

/// Calls `run` with offset and length of each run of bytes in which the pages differ, in order. Runs
/// are exact: a byte that is equal ends one.
pub fn changed_runs(old: &Page, new: &Page, mut run: impl FnMut(usize, usize)) {
    const WORD: usize = size_of::<u64>();
    let mut start: Option<usize> = None;
    let pairs = old.chunks_exact(WORD).zip(new.chunks_exact(WORD));
    for (index, (before, after)) in pairs.enumerate() {
        if before == after {
            if let Some(from) = start.take() {
                run(from, index * WORD - from);
            }
            continue;
        }
        for byte in 0..WORD {
            let at = index * WORD + byte;
            match (before[byte] == after[byte], start) {
                (true, Some(from)) => {
                    run(from, at - from);
                    start = None;
                }
                (false, None) => start = Some(at),
                _ => {}
            }
        }
    }
    if let Some(from) = start {
        run(from, PAGE_SIZE as usize - from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_are_exactly_the_bytes_that_differ(
            writes in proptest::collection::vec((0usize..4096, any::<u8>()), 0..200),
        ) {
            let old = [0x5a; 4096];
            let mut new = old;
            for (at, value) in writes {
                new[at] = value;
            }
            let mut patched = old;
            let mut last_end = 0;
            changed_runs(&old, &new, |at, length| {
                assert!(length > 0 && (at > last_end || at == 0), "sorted and separated");
                assert!((at..at + length).all(|byte| old[byte] != new[byte]));
                patched[at..at + length].copy_from_slice(&new[at..at + length]);
                last_end = at + length;
            });
            prop_assert_eq!(patched, new);
        }
    }
}
