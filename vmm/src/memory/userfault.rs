//! userfaultfd(2), as far as pages of a shared file are concerned that are not there when they are
//! touched.

use std::io;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fd::AsFd;
use rustix::mm::{UserfaultfdFlags, userfaultfd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iowr_nr};

/// `UFFD_API`, `UFFDIO` and what follows: linux/userfaultfd.h.
const API: u64 = 0xaa;
const TYPE: u32 = 0xaa;
const MODE_MISSING: u64 = 1;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const EVENT_PAGEFAULT: u8 = 0x12;
/// Where a message has the address.
const ADDRESS_AT: usize = 16;
const MESSAGE_BYTES: usize = 32;

#[repr(C)]
#[derive(Debug, Default)]
struct Hello {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Debug, Default)]
struct Place {
    start: u64,
    len: u64,
}

#[repr(C)]
#[derive(Debug, Default)]
struct Register {
    place: Place,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Debug, Default)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

ioctl_iowr_nr!(UFFDIO_API, TYPE, 0x3f, Hello);
ioctl_iowr_nr!(UFFDIO_REGISTER, TYPE, 0x00, Register);
ioctl_ior_nr!(UFFDIO_UNREGISTER, TYPE, 0x01, Place);
ioctl_ior_nr!(UFFDIO_WAKE, TYPE, 0x02, Place);
ioctl_iowr_nr!(UFFDIO_COPY, TYPE, 0x03, Copy);

/// The descriptor by which this process hears of pages that it, or KVM on its behalf, touches and
/// that are not there.
#[derive(Debug)]
pub struct Userfault(OwnedFd);

impl Userfault {
    /// One that tells of the kernel's accesses too, which takes `CAP_SYS_PTRACE` or
    /// `vm.unprivileged_userfaultfd`.
    ///
    /// # Errors
    /// The kernel has none that tells of files in shared memory, or this process may not have one.
    pub fn open() -> io::Result<Self> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: it has no effect on memory until ranges are registered.
        let userfault = Self(unsafe { userfaultfd(flags) }?);
        let mut hello = Hello {
            api: API,
            features: FEATURE_MISSING_SHMEM,
            ioctls: 0,
        };
        // SAFETY: the request reads and writes that structure.
        check(unsafe { ioctl_with_mut_ref(&userfault.0, UFFDIO_API(), &mut hello) })?;
        Ok(userfault)
    }

    /// Tells of pages that are missing in `at`, which are whole pages of a mapping of a file in
    /// shared memory, until the mapping is gone or this is dropped. Whoever touches one waits.
    pub(super) fn register(&self, at: &Range<u64>) -> io::Result<()> {
        let mut register = Register {
            place: place(at),
            mode: MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: the request reads and writes that structure; a range that is no such mapping is
        // refused.
        check(unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_REGISTER(), &mut register) })
    }

    /// Tells of `at` no more: whoever waits there looks again.
    pub(super) fn unregister(&self, at: &Range<u64>) -> io::Result<()> {
        // SAFETY: the request reads that structure.
        check(unsafe { ioctl_with_ref(&self.0, UFFDIO_UNREGISTER(), &place(at)) })
    }

    /// Puts `content`, whole pages, to `to`, which is in a shared mapping that is registered, and
    /// lets who waits there go on. [`io::ErrorKind::AlreadyExists`]: something is there.
    pub(super) fn copy(&self, to: u64, content: &[u8]) -> io::Result<()> {
        let mut copy = Copy {
            to,
            from: content.as_ptr() as u64,
            len: content.len() as u64,
            ..Copy::default()
        };
        // SAFETY: the request reads and writes that structure and reads `content`. Only pages that
        // are not there yet are made at `to`, of which nobody has seen anything.
        check(unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_COPY(), &mut copy) })
    }

    /// Lets who waits for pages in `at` look again.
    pub(super) fn wake(&self, at: &Range<u64>) -> io::Result<()> {
        // SAFETY: the request reads that structure.
        check(unsafe { ioctl_with_ref(&self.0, UFFDIO_WAKE(), &place(at)) })
    }

    /// The address of a page that somebody waits for; `None` if nobody does now.
    pub(super) fn next(&self) -> io::Result<Option<u64>> {
        let mut message = [0; MESSAGE_BYTES];
        loop {
            match rustix::io::read(&self.0, &mut message) {
                Ok(MESSAGE_BYTES) if message[0] == EVENT_PAGEFAULT => {
                    let [address, _] = *message[ADDRESS_AT..].as_chunks().0 else {
                        return Ok(None);
                    };
                    return Ok(Some(u64::from_ne_bytes(address)));
                }
                // No other event was asked for.
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn place(at: &Range<u64>) -> Place {
    Place {
        start: at.start,
        len: at.end - at.start,
    }
}

fn check(result: i32) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
