//! Pages that a device writes while they are read, word by word.
//!
//! Words are read from the last to the first. Devices that tell of what they have written do so in
//! its last bytes (the status of a descriptor, the phase of an entry of a completion queue), which
//! they write last: whoever reads those first and finds them set finds the rest, too.

use std::sync::atomic::{AtomicU64, Ordering};

use super::page::{PAGE_SIZE, Page};

const WORD: usize = size_of::<u64>();
const WORDS: usize = PAGE_SIZE as usize / WORD;

/// Word `at` of a page that others may be writing.
///
/// # Safety
/// `page` is a whole mapped page, aligned to 8 bytes, and `at` is below [`WORDS`].
unsafe fn word(page: *mut Page, at: usize) -> [u8; WORD] {
    // SAFETY: the caller vouches for the page; aligned atomic loads may race with whoever writes
    // it.
    let word = unsafe { AtomicU64::from_ptr(page.cast::<u64>().add(at)) };
    word.load(Ordering::Relaxed).to_ne_bytes()
}

/// Copies a page that others may be writing.
///
/// # Safety
/// `from` is a whole mapped page, aligned to 8 bytes, to which no reference exists.
pub unsafe fn copy_down(from: *mut Page, to: &mut Page) {
    for (at, to) in to.as_chunks_mut::<WORD>().0.iter_mut().enumerate().rev() {
        // SAFETY: the caller vouches for `from`; a page has as many words.
        *to = unsafe { word(from, at) };
    }
}

/// Takes what others have written to `shared` since `base` was copied from it over into `private`,
/// where that is as in `base`; `base` is as `shared` then.
///
/// # Safety
/// As for [`copy_down`].
pub unsafe fn take_over(shared: *mut Page, base: &mut Page, private: &mut Page) {
    let bases = base.as_chunks_mut::<WORD>().0;
    let privates = private.as_chunks_mut::<WORD>().0;
    for at in (0..WORDS).rev() {
        // SAFETY: the caller vouches for `shared`.
        let now = unsafe { word(shared, at) };
        let (base, private) = (&mut bases[at], &mut privates[at]);
        if now == *base {
            continue;
        }
        for ((now, base), private) in now.into_iter().zip(base).zip(private) {
            if *private == *base {
                *private = now;
            }
            *base = now;
        }
    }
}
