//! Pages of a template that its file has no more, or that cannot be read.
//!
//! An access of this process raises SIGBUS, one of the guest ends `KVM_RUN` with an error. The
//! guest cannot go on: the page was its memory, and any other content would go to its disks and
//! wires. So the thread that came there stays where it is for ever, and another one, which needs
//! nothing that the first may have locked, says what is wrong and ends the process.
//!
//! ```text
//!  access ─► SIGBUS ─► handler: a template's? ─► eventfd ─► thread: clears away, one line, exit
//!                               │ no
//!                               └─► whoever had the signal before
//! ```

use std::fs::File;
use std::io::{Error, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use devices::dma::bus_error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::RamRegion;

/// Ranges that there can be at a time: each machine has two at most.
const SLOTS: usize = 64;

/// What the handler knows of a mapping. A slot is free while `end` is 0.
struct Slot {
    start: AtomicUsize,
    end: AtomicUsize,
    /// Of the eventfd.
    tell: AtomicI32,
}

static REGISTERED: [Slot; SLOTS] = [const {
    Slot {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        tell: AtomicI32::new(-1),
    }
}; SLOTS];
/// Held while slots are taken.
static TAKING: Mutex<()> = Mutex::new(());
/// What SIGBUS did before; `None` if the handler cannot be installed.
static BEFORE: OnceLock<Option<libc::sigaction>> = OnceLock::new();
/// What is done before the process ends.
static AT_END: OnceLock<Box<dyn Fn() + Send + Sync>> = OnceLock::new();

/// Has `clear` done before a template that was lost ends this process, on a thread of its own and
/// whatever others hold. The first one counts.
pub fn when_memory_is_lost(clear: impl Fn() + Send + Sync + 'static) {
    let _ = AT_END.set(Box::new(clear));
}

/// Watches over the mappings of a template until it is dropped.
#[derive(Debug)]
pub(super) struct Watched {
    slots: Vec<usize>,
    told: Arc<EventFd>,
    file: Arc<File>,
    wanted: u64,
    /// Why the memory is lost, if it is not by the file.
    why: Arc<OnceLock<String>>,
}

impl Watched {
    /// Of `file`, which is mapped at `regions` and has `wanted` bytes.
    pub fn new(file: Arc<File>, regions: &[RamRegion], wanted: u64) -> std::io::Result<Self> {
        if BEFORE
            // SAFETY: it only reads atomics and makes system calls.
            .get_or_init(|| unsafe { bus_error::handle(on_sigbus) })
            .is_none()
        {
            return Err(Error::other("the handler of SIGBUS cannot be installed"));
        }
        let told = Arc::new(EventFd::new(EFD_CLOEXEC)?);
        let why = Arc::<OnceLock<String>>::default();
        let mut watched = Self {
            slots: Vec::new(),
            told: told.clone(),
            file: file.clone(),
            wanted,
            why: why.clone(),
        };
        for region in regions {
            let start = region.host_address as usize;
            let slot = take_slot(start, start + region.len as usize, told.as_raw_fd());
            let slot = slot.ok_or_else(|| Error::other("too many templates are mapped"))?;
            watched.slots.push(slot);
        }
        // The name that it has now: after a jail was entered there is none.
        let name = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        std::thread::Builder::new()
            .name("template".to_owned())
            .spawn(move || {
                // What was written is added up: anything but the word of the end is a page.
                if !matches!(told.read(), Ok(DROPPED)) {
                    end(&name, &file, wanted, why.get());
                }
            })?;
        Ok(watched)
    }

    /// If the file is shorter than it has to be, ends the process and does not return: to be asked
    /// where the guest could not go on.
    pub fn end_if_cut(&self) {
        let is_cut = |file: &File| file.metadata().is_ok_and(|now| now.len() < self.wanted);
        if is_cut(&self.file) {
            self.end();
        }
    }

    /// Ends the process and does not return: pages cannot be had, as `error` says.
    pub fn end_because(&self, error: &dyn std::fmt::Display) -> ! {
        // Who comes second has nothing to say that is not of the first.
        let _ = self.why.set(error.to_string());
        self.end()
    }

    fn end(&self) -> ! {
        tell(self.told.as_raw_fd())
    }
}

/// What is written when nobody watches any more, and when a page is missing.
const DROPPED: u64 = 1;
const MISSING: u64 = 1 << 32;

impl Drop for Watched {
    fn drop(&mut self) {
        for &slot in &self.slots {
            REGISTERED[slot].end.store(0, Ordering::Release);
        }
        if let Err(error) = self.told.write(DROPPED) {
            tracing::debug!(%error, "a thread that watches over a template stays");
        }
    }
}

/// Says what is wrong and ends the process.
fn end(name: &Path, file: &File, wanted: u64, why: Option<&String>) -> ! {
    let now = file.metadata().map(|now| now.len());
    let what = lost(name, now.ok().filter(|now| *now < wanted), wanted, why);
    if let Some(clear) = AT_END.get() {
        clear();
    }
    // As all that is said at the end: not by the log, which may be off. Where nobody listens any
    // more it is said to nobody.
    let _ = writeln!(
        std::io::stderr(),
        "cofferdam: the guest's memory is lost: {what} (without --lazy it needs the file no more once it runs)"
    );
    // SAFETY: nothing is to be done in this process any more, and others may hold what exit()
    // would wait for.
    unsafe { libc::_exit(1) }
}

/// What is wrong and what to do: of the file `name`, which was `cut` to so many of the bytes
/// `wanted`, cannot be read, or is well, and pages cannot be had for another reason, `why`.
fn lost(name: &Path, cut: Option<u64>, wanted: u64, why: Option<&String>) -> String {
    let name = name.display();
    match (cut, why) {
        (Some(now), _) => format!(
            "{name} was cut to {now} of {wanted} bytes while the guest ran from it; \
             put the file back and run it from the snapshot again"
        ),
        (None, Some(why)) => {
            format!("{why}; mend that and run it from the snapshot again, whose memory is {name}")
        }
        (None, None) => format!(
            "{name} cannot be read while the guest runs from it; \
             put the file back and run it from the snapshot again"
        ),
    }
}

fn take_slot(start: usize, end: usize, tell: i32) -> Option<usize> {
    let _taking = TAKING.lock().unwrap_or_else(PoisonError::into_inner);
    let free = |slot: &Slot| slot.end.load(Ordering::Acquire) == 0;
    let index = REGISTERED.iter().position(free)?;
    let slot = &REGISTERED[index];
    slot.start.store(start, Ordering::Release);
    slot.tell.store(tell, Ordering::Release);
    slot.end.store(end, Ordering::Release);
    Some(index)
}

/// Only reads atomics and makes system calls.
extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel has passed it.
    let fault = unsafe { bus_error::missing(info) };
    if let Some(fd) = fault.and_then(whose) {
        tell(fd);
    }
    // SAFETY: `before` is what the kernel gave for this signal. The access is made again, or the
    // signal that somebody sent is delivered, when this handler returns.
    unsafe {
        if let Some(Some(before)) = BEFORE.get() {
            libc::sigaction(libc::SIGBUS, before, ptr::null_mut());
        }
        if fault.is_none() {
            libc::raise(libc::SIGBUS);
        }
    }
}

/// Whom to tell of a page at `address`.
fn whose(address: usize) -> Option<i32> {
    REGISTERED.iter().find_map(|slot| {
        let end = slot.end.load(Ordering::Acquire);
        let within = address < end && address >= slot.start.load(Ordering::Acquire);
        within.then(|| slot.tell.load(Ordering::Acquire))
    })
}

/// Has the process ended. Does not return.
fn tell(fd: i32) -> ! {
    let missing = MISSING;
    // SAFETY: eight bytes of this function; where they cannot be written, nothing else is left.
    let written = unsafe { libc::write(fd, (&raw const missing).cast(), size_of::<u64>()) };
    if written < 0 {
        // SAFETY: no pointers are involved.
        unsafe { libc::_exit(1) }
    }
    loop {
        // SAFETY: no pointers are involved.
        unsafe { libc::pause() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::missing::BringError;

    #[test]
    fn a_host_without_memory_is_told_apart_from_a_snapshot_that_is_damaged() {
        let name = Path::new("/s/memory");
        let why = |error: BringError| error.to_string();
        let full = why(BringError::Page(Error::from_raw_os_error(libc::ENOMEM)));
        let told = lost(name, None, 4096, Some(&full));
        assert!(told.contains("the host has no memory"), "{told}");
        assert!(
            !told.contains("put the file back") && !told.contains("was cut"),
            "{told}"
        );
        let unreadable = why(BringError::Read(Error::from_raw_os_error(libc::EIO)));
        let told = lost(name, None, 4096, Some(&unreadable));
        assert!(
            told.contains("cannot be read") && told.contains("/s/memory"),
            "{told}"
        );
        // A file that was cut is that, whoever came there first.
        for why in [None, Some(&unreadable)] {
            let told = lost(name, Some(12), 4096, why);
            assert!(
                told.starts_with("/s/memory was cut to 12 of 4096 bytes"),
                "{told}"
            );
        }
        let told = lost(name, None, 4096, None);
        assert!(told.contains("/s/memory cannot be read"), "{told}");
    }
}
