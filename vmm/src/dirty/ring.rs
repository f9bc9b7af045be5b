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
    /// Where we were when KVM said last that it is full.
    full_at: Option<u32>,
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
            full_at: None,
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
        let skipped = match self.overran {
            true => self.skip_lost(),
            false => Ok(()),
        };
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
        skipped
    }

    /// After an overrun KVM's place is ahead of ours by what was lost. Goes there, if there is an
    /// entry, over ones that are given back to KVM as they are: it protects pages again that it
    /// protected before.
    ///
    /// Entries that KVM filled since lie one behind the other, perhaps around the end of the ring
    /// and over our place: the first is the one with none before it. Those over our place are then
    /// given back with what was lost, and are lost themselves. Where all are filled, it cannot be
    /// told which is the first, and all are seen.
    ///
    /// # Errors
    /// Some were given back that were not seen.
    fn skip_lost(&mut self) -> Result<(), Overrun> {
        let is_filled = |ahead: u32| {
            let flags = self.flags(self.next.wrapping_add(ahead));
            flags.load(Ordering::Acquire) & (GFN_F_DIRTY | GFN_F_RESET) == GFN_F_DIRTY
        };
        let (mut first, mut before) = (None, is_filled(ENTRIES - 1));
        let mut filled = 0;
        for ahead in 0..ENTRIES {
            let here = is_filled(ahead);
            filled += u32::from(here);
            // KVM may have filled both meanwhile.
            if here && !before && first.is_none() && !is_filled(ahead.wrapping_sub(1)) {
                first = Some(ahead);
            }
            before = here;
        }
        let first = first.or_else(|| (filled == ENTRIES).then_some(0));
        let is_over = first.is_some_and(|ahead| ahead > 0 && is_filled(0));
        self.give_back(first.unwrap_or(0));
        self.overran = first.is_none() || is_over;
        match is_over {
            true => Err(Overrun),
            false => Ok(()),
        }
    }

    /// Gives so many entries back as they are.
    fn give_back(&mut self, entries: u32) {
        for _ in 0..entries {
            self.flags(self.next).store(GFN_F_RESET, Ordering::Release);
            self.next = self.next.wrapping_add(1);
            self.unreset += 1;
        }
    }

    /// KVM has said that the ring is full, and what was in it was seen. Whether all that was lost
    /// has to be given back unseen.
    ///
    /// A vCPU that emulates many instructions in a row may overrun the ring by more than all of it.
    /// Then there is nothing in it to be found, KVM's place is ahead of ours by more than a ring
    /// holds before KVM calls it full, and the vCPU writes nothing any more by which its place could
    /// be told. That is so if KVM says so twice with nothing found in between, and has taken back all
    /// that was seen. Where our places in
    /// the ring are known to be the same, they are whole rings apart; otherwise half of one is less
    /// than what was lost.
    pub fn is_full(&mut self) -> bool {
        let again = self.full_at.replace(self.next) == Some(self.next);
        if !again || self.has_seen() {
            return false;
        }
        self.give_back(if self.overran { ENTRIES / 2 } else { ENTRIES });
        true
    }

    /// Whether entries that were seen fill half of the ring: it is time to reset them.
    pub fn is_half_seen(&self) -> bool {
        self.unreset >= ENTRIES / 2
    }

    /// Whether there are entries that were seen and not reset.
    pub fn has_seen(&self) -> bool {
        self.unreset > 0
    }

    /// Rings of the VM were reset: looks which entries KVM has taken back. Since Linux 6.16 that are
    /// fewer than were seen if a signal is pending for the thread that asked, such as that which
    /// stops a vCPU.
    pub fn was_reset(&mut self) {
        let is_waiting = |unreset: u32| {
            let flags = self.flags(self.next.wrapping_sub(unreset));
            flags.load(Ordering::Acquire) & GFN_F_RESET != 0
        };
        // It takes them in their order: mostly all, down to the last one.
        let left = match is_waiting(1) {
            true => (1..=self.unreset).rev().find(|left| is_waiting(*left)),
            false => None,
        };
        self.unreset = left.unwrap_or(0);
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
        self.was_reset();
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

#[cfg(test)]
mod tests {
    use super::*;

    /// KVM's side of a ring, as virt/kvm/dirty_ring.c has it.
    struct Kvm {
        dirty: u32,
        reset: u32,
    }

    impl Kvm {
        /// Entries that KVM sets aside (`KVM_DIRTY_RING_RSVD_ENTRIES` and what a processor may log).
        const LIMIT: u32 = ENTRIES - 64 - 512;

        fn push(&mut self, ring: &DirtyRing, page: u64) {
            let entry = ring.entry(self.dirty).as_ptr();
            // SAFETY: an entry of the test's own mapping, to which nobody has a reference.
            unsafe { ((*entry).slot, (*entry).offset) = (0, page) };
            ring.flags(self.dirty).store(GFN_F_DIRTY, Ordering::Release);
            self.dirty += 1;
        }

        fn is_full(&self) -> bool {
            self.dirty.wrapping_sub(self.reset) >= Self::LIMIT
        }

        /// `KVM_RESET_DIRTY_RINGS`.
        fn take_back(&mut self, ring: &mut DirtyRing) {
            self.take_back_some(ring, u32::MAX);
            assert!(!ring.has_seen(), "all was taken back");
        }

        /// The same where a signal comes behind so many entries.
        fn take_back_some(&mut self, ring: &mut DirtyRing, most: u32) {
            let is_given = |reset| ring.flags(reset).load(Ordering::Acquire) & GFN_F_RESET != 0;
            for _ in 0..most {
                if !is_given(self.reset) {
                    break;
                }
                ring.flags(self.reset).store(0, Ordering::Release);
                self.reset += 1;
            }
            ring.was_reset();
            assert!(
                self.reset <= self.dirty,
                "more was given back than there was"
            );
        }
    }

    fn ring() -> DirtyRing {
        let bytes = ENTRIES as usize * size_of::<kvm_dirty_gfn>();
        // SAFETY: a new mapping at a place that the kernel chooses.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(address, libc::MAP_FAILED);
        DirtyRing {
            entries: NonNull::new(address.cast()).unwrap(),
            bytes,
            vm: -1,
            next: 0,
            unreset: 0,
            overran: false,
            full_at: None,
        }
    }

    #[test]
    fn what_kvm_takes_back_in_parts_is_given_back_until_all_is() {
        let (mut ring, mut kvm) = (ring(), Kvm { dirty: 0, reset: 0 });
        for round in 0..5 {
            let mut page = u64::from(kvm.dirty);
            while !kvm.is_full() {
                kvm.push(&ring, page);
                page += 1;
            }
            let mut seen = 0;
            ring.harvest(|_, _| seen += 1).unwrap();
            let all = kvm.dirty - kvm.reset;
            assert_eq!(seen, if round == 0 { all } else { 7000 });
            // The vCPU comes back each time, until a signal lets it be.
            for part in [0, 0, 1, 6999] {
                assert!(ring.has_seen() && !ring.is_full());
                kvm.take_back_some(&mut ring, part);
            }
            assert_eq!(kvm.dirty - kvm.reset, all - 7000);
        }
        kvm.take_back(&mut ring);
        assert_eq!(kvm.dirty, kvm.reset);
    }

    #[test]
    fn a_ring_that_was_overrun_by_however_much_is_used_again() {
        let sizes = [ENTRIES, 2 * ENTRIES, 3 * ENTRIES];
        let around = [0, 1, 63, 600, ENTRIES / 2, ENTRIES - 577, ENTRIES - 5];
        let all = || {
            sizes
                .into_iter()
                .flat_map(|size| around.map(|more| size + more))
        };
        // What is pushed before anybody looks, and behind that in the same run of the vCPU.
        let pushed =
            all().flat_map(|before| around.into_iter().chain(all()).map(move |x| (before, x)));
        for pushed in pushed {
            let (mut ring, mut kvm) = (ring(), Kvm { dirty: 0, reset: 0 });
            (0..pushed.0).for_each(|page| kvm.push(&ring, page.into()));
            assert_eq!(ring.harvest(|_, _| {}), Err(Overrun));
            kvm.take_back(&mut ring);
            (0..pushed.1).for_each(|page| kvm.push(&ring, page.into()));
            // The vCPU comes back each time without having run, until there is room.
            let mut exits = 0;
            while kvm.is_full() {
                let _overrun = ring.harvest(|_, _| {});
                kvm.take_back(&mut ring);
                ring.is_full();
                kvm.take_back(&mut ring);
                exits += 1;
                assert!(exits < 40, "{pushed:?}: the vCPU never runs again");
            }
            let _rest = ring.harvest(|_, _| {});
            kvm.take_back(&mut ring);
            // What is written from now on is told.
            for round in 0..3u64 {
                let pages = 1 << 20 | round << 10;
                (0..100).for_each(|page| kvm.push(&ring, pages + page));
                let mut seen = Vec::new();
                ring.harvest(|_, page| seen.push(page)).unwrap();
                kvm.take_back(&mut ring);
                assert!(
                    seen.iter().copied().eq(pages..pages + 100),
                    "{pushed:?}, {round}"
                );
            }
        }
    }
}
