//! Which pages of guest memory changed, for whoever asked beforehand.
//!
//! ```text
//!  vCPUs, KVM itself ─► dirty rings of KVM ─┐               ┌─► set of the marks
//!                                           ├─► collect ────┼─► set of the next snapshot
//!  devices, host     ─► DirtyLog of memory ─┘   (at rest)   └─► set of a memory that is being copied
//! ```
//!
//! Each user has a set of its own and sees every change. Without a user, memory slots have no
//! `KVM_MEM_LOG_DIRTY_PAGES` and the logs are off: nothing is paid for.
//!
//! The rings belong to the VM from its making on, since KVM does not let them be had later. A host
//! whose KVM has none runs guests as well, but nobody can ask for changes.

use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
use kvm_ioctls::{VcpuFd, VmFd};

use crate::error::Error;
use crate::memory::{GuestRam, PAGE_BYTES};
use crate::memory_slots::set_slots;

mod pages;
pub mod ring;
mod told;

pub(crate) use self::pages::PageSet;
use self::ring::{DirtyRing, Overrun};
pub use self::told::ChangedPages;
use self::told::Told;
pub(crate) use self::told::ranges;

/// Who asks for changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum User {
    /// Marks to be rewound to.
    Marks,
    /// Snapshots of what changed since the last one.
    Snapshots,
    /// Memory that is copied while the guest runs.
    Copying,
}

const USERS: usize = User::Copying as usize + 1;

/// See the module's text.
pub(crate) struct DirtyTracking(Mutex<Tracker>);

impl DirtyTracking {
    /// Turns on the rings of `vm`, which has no vCPUs yet. Whether it has them.
    pub fn prepare(vm: &VmFd) -> bool {
        match DirtyRing::enable(vm) {
            Ok(()) => true,
            Err(error) => {
                tracing::debug!(%error, "KVM has no dirty ring");
                false
            }
        }
    }

    /// For `vcpus` of `vm`, which was prepared and has `ram`; without them nobody can ask for
    /// changes.
    pub fn new(vm: &VmFd, vcpus: &[VcpuFd], ram: &GuestRam) -> Result<Self, Error> {
        let rings = vcpus
            .iter()
            .map(|vcpu| DirtyRing::map(vm, vcpu))
            .collect::<Result<_, _>>()
            .map_err(|source| Error::Host {
                what: "map a dirty ring",
                source,
            })?;
        Ok(Self(Mutex::new(Tracker {
            rings,
            first_pages: ram
                .regions()
                .iter()
                .map(|region| page_of(region.file_offset))
                .collect(),
            page_count: page_of(ram.size_bytes()),
            sets: [const { None }; USERS],
            in_rings: PageSet::new(page_of(ram.size_bytes())),
            lost: false,
            told: Told::default(),
        })))
    }

    /// Its state. vCPUs and devices are locked before it.
    pub fn lock(&self) -> MutexGuard<'_, Tracker> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Number of the page at `offset` in the file of guest memory.
fn page_of(offset: u64) -> u32 {
    // No host has 16 TiB.
    u32::try_from(offset / PAGE_BYTES).unwrap_or(u32::MAX)
}

pub(crate) struct Tracker {
    rings: Vec<DirtyRing>,
    /// First page of each memory slot.
    first_pages: Vec<u32>,
    page_count: u32,
    sets: [Option<PageSet>; USERS],
    /// What came out of rings and is in no user's set yet.
    in_rings: PageSet,
    /// A ring was overrun: every page may have changed.
    lost: bool,
    /// Of the snapshots' pages.
    told: Told,
}

impl Tracker {
    /// Follows changes for `user` from now on; those before are not in its set. The machine is at
    /// rest.
    pub fn start(&mut self, user: User, vm: &VmFd, ram: &GuestRam) -> Result<(), Error> {
        if self.rings.is_empty() {
            return Err(Error::KvmLacks("a dirty ring (Linux 5.11)"));
        }
        if self.sets.iter().all(Option::is_none) {
            // What the guest wrote while it was ceased to be followed: KVM may have told of it
            // since.
            self.empty_rings()?;
            (self.lost, _) = (false, self.in_rings.clear());
            ram.for_each_log(|log| log.start());
            if let Err(error) = log_slots(vm, ram, KVM_MEM_LOG_DIRTY_PAGES) {
                ram.for_each_log(|log| log.stop());
                return Err(error);
            }
        } else {
            self.collect(ram)?;
        }
        self.sets[user as usize] = Some(PageSet::new(self.page_count));
        Ok(())
    }

    /// Does not follow them for `user` any more.
    pub fn stop(&mut self, user: User, vm: &VmFd, ram: &GuestRam) -> Result<(), Error> {
        if self.sets[user as usize].take().is_none() || self.sets.iter().any(Option::is_some) {
            return Ok(());
        }
        ram.for_each_log(|log| log.stop());
        self.empty_rings()?;
        (self.lost, _) = (false, self.in_rings.clear());
        log_slots(vm, ram, 0)
    }

    /// Puts what changed by now into the users' sets. The machine is at rest.
    pub fn collect(&mut self, ram: &GuestRam) -> Result<(), Error> {
        self.empty_rings()?;
        let Self {
            sets,
            in_rings,
            first_pages,
            ..
        } = self;
        for set in sets.iter_mut().flatten() {
            for &page in in_rings.pages() {
                set.insert(page);
            }
        }
        in_rings.clear();
        let mut regions = first_pages.iter();
        ram.for_each_log(|log| {
            let first = regions.next().copied().unwrap_or_default();
            log.take(|page| {
                for set in sets.iter_mut().flatten() {
                    set.insert(first.saturating_add(page as u32));
                }
            });
        });
        if std::mem::take(&mut self.lost) {
            for set in self.sets.iter_mut().flatten() {
                (0..self.page_count).for_each(|page| set.insert(page));
            }
        }
        Ok(())
    }

    /// What changed for `user`, as far as it was collected.
    pub fn set(&mut self, user: User) -> Option<&mut PageSet> {
        self.sets[user as usize].as_mut()
    }

    /// The pages in the set of `user` were changed once more, to what they were when it was empty.
    pub fn rewound(&mut self, user: User) {
        let Some(mut set) = self.sets[user as usize].take() else {
            return;
        };
        for other in self.sets.iter_mut().flatten() {
            set.pages().iter().for_each(|&page| other.insert(page));
        }
        set.clear();
        self.sets[user as usize] = Some(set);
    }

    /// Makes room in the rings. Guest code may run.
    pub fn empty_rings(&mut self) -> Result<(), Error> {
        let Self {
            rings,
            in_rings,
            first_pages,
            lost,
            ..
        } = self;
        for ring in rings.iter_mut() {
            let result = ring.harvest(|slot, offset| {
                if let Some(&first) = first_pages.get(slot as usize) {
                    let page = u64::from(first).saturating_add(offset);
                    in_rings.insert(u32::try_from(page).unwrap_or(u32::MAX));
                }
            });
            if let Err(Overrun) = result {
                tracing::warn!("KVM's dirty ring was overrun: all of memory counts as changed");
                *lost = true;
            }
        }
        self.reset_rings()
    }

    /// The same, where KVM has said that the ring of vCPU `index` is full.
    pub fn empty_full_ring(&mut self, index: u8) -> Result<(), Error> {
        self.empty_rings()?;
        if let Some(ring) = self.rings.get_mut(usize::from(index)) {
            // Pages are among that which were written since it was said that any may have changed.
            self.lost |= ring.is_full();
        }
        self.reset_rings()
    }

    /// Gives what was seen in the rings back to KVM.
    fn reset_rings(&mut self) -> Result<(), Error> {
        let mut seen = self.rings.iter_mut().filter(|ring| ring.has_seen());
        let Some(first) = seen.next() else {
            return Ok(());
        };
        first.reset().map_err(|source| Error::Host {
            what: "reset KVM's dirty rings",
            source,
        })?;
        seen.for_each(DirtyRing::was_reset);
        Ok(())
    }
}

fn log_slots(vm: &VmFd, ram: &GuestRam, flags: u32) -> Result<(), Error> {
    set_slots(vm, ram, flags).map_err(Error::kvm("change what it logs of guest memory"))
}
