//! Memory that another process has given: mapped from its file, which it may shrink at any time.
//!
//! An access to a page that the file has no more raises SIGBUS. A handler, installed with the first
//! mapping, puts zeros in the place of that page and of all behind it in the mapping, and the
//! access goes on; whoever owns the mapping can ask whether that has happened. Every other SIGBUS
//! goes to whoever had the signal before.
//!
//! Only files in memory are mapped (tmpfs, which is behind memfds too, and hugetlbfs): a page of
//! another file system can take as long as its owner likes.

use super::bus_error;
use std::fs::File;
use std::io::{Error, ErrorKind};
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Mappings that there can be at a time.
const SLOTS: usize = 4096;
/// Kinds of file systems (`<linux/magic.h>`).
const TMPFS_MAGIC: i64 = 0x0102_1994;
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// What the handler knows of a mapping. A slot is free while `end` is 0.
struct Slot {
    start: AtomicUsize,
    end: AtomicUsize,
    page: AtomicUsize,
    shrunk: AtomicBool,
}

static REGISTERED: [Slot; SLOTS] = [const {
    Slot {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        shrunk: AtomicBool::new(false),
    }
}; SLOTS];
/// Held while a slot is taken.
static TAKING: Mutex<()> = Mutex::new(());
/// What SIGBUS did before; `None` if the handler cannot be installed.
static BEFORE: OnceLock<Option<libc::sigaction>> = OnceLock::new();

/// A shared mapping of another process's file. See the module.
#[derive(Debug)]
pub struct ForeignMapping {
    start: usize,
    len: usize,
    slot: usize,
}

impl ForeignMapping {
    /// Maps `len` bytes from `offset` of `file` for reading and writing. Both are multiples of the
    /// file's page size.
    ///
    /// # Errors
    /// The file has not so much, is none that can be used, or there are too many mappings.
    pub fn new(file: &File, offset: u64, len: usize) -> std::io::Result<Self> {
        let page = page_bytes(file)?;
        let end = offset.checked_add(len as u64);
        let fits = end.is_some_and(|end| file.metadata().is_ok_and(|file| end <= file.len()));
        let aligned = offset.is_multiple_of(page as u64) && len.is_multiple_of(page);
        let offset = libc::off_t::try_from(offset);
        let (true, true, true, Ok(offset)) = (fits, aligned, len > 0, offset) else {
            return Err(ErrorKind::InvalidInput.into());
        };
        if BEFORE
            // SAFETY: it only reads atomics and makes system calls.
            .get_or_init(|| unsafe { bus_error::handle(on_sigbus) })
            .is_none()
        {
            return Err(Error::other("the handler of SIGBUS cannot be installed"));
        }
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that is there.
        let at = unsafe { libc::mmap(ptr::null_mut(), len, prot, flags, file.as_raw_fd(), offset) };
        if at == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        let start = at as usize;
        let Some(slot) = take_slot(start, start + len, page) else {
            // SAFETY: nobody knows of the mapping yet.
            unsafe { libc::munmap(at, len) };
            return Err(ErrorKind::OutOfMemory.into());
        };
        Ok(Self { start, len, slot })
    }

    /// Where it is.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start as *mut u8
    }

    /// Whether a page was found missing. What is behind it is not the file's any more.
    pub fn has_shrunk(&self) -> bool {
        REGISTERED[self.slot].shrunk.load(Ordering::Relaxed)
    }
}

impl Drop for ForeignMapping {
    fn drop(&mut self) {
        REGISTERED[self.slot].end.store(0, Ordering::Release);
        // SAFETY: the mapping is this value's own, and whoever had its address has dropped it.
        unsafe { libc::munmap(self.start as *mut libc::c_void, self.len) };
    }
}

/// Size of the pages that the file's memory consists of.
fn page_bytes(file: &File) -> std::io::Result<usize> {
    let system = rustix::fs::fstatfs(file)?;
    let status = rustix::fs::fstat(file)?;
    let regular = rustix::fs::FileType::from_raw_mode(status.st_mode).is_file();
    match (regular, system.f_type as i64) {
        (true, TMPFS_MAGIC) => Ok(4096),
        (true, HUGETLBFS_MAGIC) => {
            let page = usize::try_from(system.f_bsize).ok();
            page.filter(|page| page.is_power_of_two() && *page >= 4096)
                .ok_or_else(|| ErrorKind::InvalidInput.into())
        }
        _ => Err(Error::new(
            ErrorKind::InvalidInput,
            "a file that is not in memory",
        )),
    }
}

fn take_slot(start: usize, end: usize, page: usize) -> Option<usize> {
    let _taking = TAKING.lock().unwrap_or_else(PoisonError::into_inner);
    let free = |slot: &Slot| slot.end.load(Ordering::Acquire) == 0;
    let index = REGISTERED.iter().position(free)?;
    let slot = &REGISTERED[index];
    // Released, so that a handler that reads one of these finds that the end before is gone.
    slot.start.store(start, Ordering::Release);
    slot.page.store(page, Ordering::Release);
    slot.shrunk.store(false, Ordering::Relaxed);
    slot.end.store(end, Ordering::Release);
    Some(index)
}

/// Only reads atomics and makes system calls.
extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel has passed it.
    let fault = unsafe { bus_error::missing(info) };
    // SAFETY: errno is this thread's own.
    let errno = unsafe { *libc::__errno_location() };
    if !fault.is_some_and(put_zeros)
        && let Some(Some(before)) = BEFORE.get()
    {
        // SAFETY: `before` is what the kernel gave for this signal. It is delivered when this
        // handler returns.
        unsafe {
            libc::sigaction(libc::SIGBUS, before, ptr::null_mut());
            libc::raise(libc::SIGBUS);
        }
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Replaces the page of `address` and those behind it in its mapping. Returns whether there is a
/// mapping.
fn put_zeros(address: usize) -> bool {
    for slot in &REGISTERED {
        let end = slot.end.load(Ordering::Acquire);
        let start = slot.start.load(Ordering::Acquire);
        // A power of two, and `start` is a multiple of it.
        let page = slot.page.load(Ordering::Acquire).max(1);
        // A slot that another mapping takes just now is not this one's: its ends may be of two
        // mappings.
        let is_whole = slot.end.load(Ordering::Acquire) == end;
        if !is_whole || address < start || address >= end {
            continue;
        }
        let from = address & !(page - 1);
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: the range lies in a registered mapping, whose owner expects its content to change
        // at any time; it stays mapped, so that no access to it becomes invalid.
        let at = unsafe { libc::mmap(from as *mut libc::c_void, end - from, prot, flags, -1, 0) };
        slot.shrunk.store(true, Ordering::Relaxed);
        return at != libc::MAP_FAILED;
    }
    false
}

#[cfg(test)]
#[path = "foreign_tests.rs"]
mod tests;
