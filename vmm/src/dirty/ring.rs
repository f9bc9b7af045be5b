//! KVM's dirty ring: which pages a vCPU wrote, in time that grows with the pages written and not
//! with the guest's memory (KVM API, sections 8.29 `KVM_CAP_DIRTY_LOG_RING` and 4.146
//! `KVM_RESET_DIRTY_RINGS`).
//!
//! An entry appears when KVM maps a page of a slot with `KVM_MEM_LOG_DIRTY_PAGES` writable, or
//! writes it itself. The page appears again at its next write once its entry was reset.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_DIRTY_LOG_PAGE_OFFSET, KVMIO, kvm_dirty_gfn, kvm_enable_cap,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

/// Size of the ring in entries of 16 bytes; KVM wants a power of two and sets some aside.
const ENTRIES: u32 = 16 * 1024;

const PAGE_SIZE: i64 = 4096;

/// `KVM_DIRTY_GFN_F_DIRTY`: KVM filled the entry.
const GFN_F_DIRTY: u32 = 1;
/// `KVM_DIRTY_GFN_F_RESET`: user space has read the entry.
const GFN_F_RESET: u32 = 2;

mod ioctls {
    #![allow(missing_docs, reason = "the macro makes an undocumented function")]
    use super::{KVMIO, ioctl_io_nr};
    ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);
}

/// The ring of one vCPU, mapped.
#[derive(Debug)]
pub struct DirtyRing {
    entries: NonNull<kvm_dirty_gfn>,
    bytes: usize,
    vm: RawFd,
    next: u32,
    unreset: u32,
    overran: bool,
}

/// Entries were written over before they were seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("KVM's dirty ring was overrun")]
pub struct Overrun;

// SAFETY: the mapping belongs to this value alone and every entry is accessed through `&mut self`;
// the kernel synchronises through the entries' flags.
unsafe impl Send for DirtyRing {}

impl DirtyRing {
    /// Turns the ring on for `vm`; must come before its vCPUs are created.
    pub fn enable(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_DIRTY_LOG_RING,
            ..Default::default()
        };
        cap.args[0] = u64::from(ENTRIES) * size_of::<kvm_dirty_gfn>() as u64;
        vm.enable_cap(&cap)
    }

    /// Maps the ring of `vcpu`.
    pub fn map(vm: &VmFd, vcpu: &VcpuFd) -> io::Result<Self> {
        let bytes = ENTRIES as usize * size_of::<kvm_dirty_gfn>();
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE;
        // SAFETY: a new shared mapping of the vCPU's descriptor at the offset the API names; the
        // kernel checks size and offset.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                offset,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let entries = NonNull::new(address.cast()).ok_or_else(io::Error::last_os_error)?;
        Ok(Self {
            entries,
            bytes,
            vm: vm.as_raw_fd(),
            next: 0,
            unreset: 0,
            overran: false,
        })
    }

    /// Whether there are entries in half of the ring.
    pub fn is_half_full(&self) -> bool {
        let middle = self.next.wrapping_add(ENTRIES / 2 - 1);
        self.flags(middle).load(Ordering::Acquire) & (GFN_F_DIRTY | GFN_F_RESET) == GFN_F_DIRTY
    }

    /// Entry `number`, counted from the first there ever was.
    fn entry(&self, number: u32) -> NonNull<kvm_dirty_gfn> {
        // SAFETY: the remainder is below the number of entries mapped.
        unsafe { self.entries.add((number % ENTRIES) as usize) }
    }

    fn flags(&self, number: u32) -> &AtomicU32 {
        // SAFETY: the flags word is shared with the kernel, which accesses it atomically; it is the
        // entry's first, aligned field, and mapped as long as `self`.
        unsafe { AtomicU32::from_ptr(self.entry(number).as_ptr().cast::<u32>()) }
    }

    /// Calls `seen` with slot and page number (relative to the slot's first page) of every page
    /// that is in the ring and was not seen yet.
    ///
    /// # Errors
    /// The ring was overrun: pages are missing in what was seen, but not in what will be.
    pub fn harvest(&mut self, mut seen: impl FnMut(u32, u64)) -> Result<(), Overrun> {
        if self.overran {
            self.skip_lost();
        }
        for number in 0.. {
            // KVM stops the vCPU before the ring is full. One that emulates many instructions in a
            // row looks too late, and has written over entries by now.
            if number == ENTRIES {
                self.overran = true;
                return Err(Overrun);
            }
            let entry = self.entry(self.next);
            let flags = self.flags(self.next);
            if flags.load(Ordering::Acquire) & (GFN_F_DIRTY | GFN_F_RESET) != GFN_F_DIRTY {
                break;
            }
            // SAFETY: the acquire load above saw the entry filled; the kernel leaves it alone until
            // it is reset.
            let (slot, offset) = unsafe { ((*entry.as_ptr()).slot, (*entry.as_ptr()).offset) };
            seen(slot, offset);
            flags.store(GFN_F_RESET, Ordering::Release);
            self.next = self.next.wrapping_add(1);
            self.unreset += 1;
        }
        Ok(())
    }

    /// After an overrun KVM's place is ahead of ours by what was lost. Goes there, if there is an
    /// entry, over ones that are given back to KVM as they are: it protects pages again that it
    /// protected before.
    fn skip_lost(&mut self) {
        let flags = |number: u32| self.flags(number).load(Ordering::Acquire);
        let found = (0..ENTRIES).find(|&ahead| {
            let number = self.next.wrapping_add(ahead);
            flags(number) & (GFN_F_DIRTY | GFN_F_RESET) == GFN_F_DIRTY
        });
        for _ in 0..found.unwrap_or(0) {
            self.flags(self.next).store(GFN_F_RESET, Ordering::Release);
            self.next = self.next.wrapping_add(1);
            self.unreset += 1;
        }
        self.overran = found.is_none();
    }

    /// Whether entries that were seen fill half of the ring: it is time to reset them.
    pub fn is_half_seen(&self) -> bool {
        self.unreset >= ENTRIES / 2
    }

    /// Whether there are entries that were seen and not reset.
    pub fn has_seen(&self) -> bool {
        self.unreset > 0
    }

    /// They were reset by [`DirtyRing::reset`] of another ring of the same VM.
    pub fn was_reset(&mut self) {
        self.unreset = 0;
    }

    /// Gives the entries that were seen, in all rings of the VM, back to KVM. Their pages are
    /// write-protected again, so they appear anew at their next writes.
    pub fn reset(&mut self) -> io::Result<()> {
        // SAFETY: the descriptor outlives the ring (whoever has a ring has its VM), the call takes
        // no argument and touches no memory of ours but the ring.
        let result = unsafe {
            ioctl(
                &BorrowedFd::borrow_raw(self.vm),
                ioctls::KVM_RESET_DIRTY_RINGS(),
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        self.unreset = 0;
        Ok(())
    }
}

impl Drop for DirtyRing {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `map`; no reference to it is left. A failure could
        // only mean that the range is not mapped, and nothing could be done about it.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), self.bytes) };
    }
}
