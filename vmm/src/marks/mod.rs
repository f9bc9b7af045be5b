//! Marks: moments of a machine to which it can be rewound, in the same process.
//!
//! ```text
//!  mark    guest runs: copy all of memory (the first mark alone) ─► at rest: copy pages that changed, states of
//!          machine and devices, what participants keep
//!  rewind  at rest: pages that changed since, and those on the way through the tree ─► machine ─► devices ─► participants
//! ```
//!
//! A rewind makes nothing anew: no VM, vCPU, mapping or device. Its cost is that of the pages that
//! changed and of the states. Everything goes back to the mark, the guest's clocks with it: TSC and
//! KVM's clock are those of the mark and go on from there, so that the guest does not see that time
//! went by, and the host's wall clock is ahead of the guest's by as much. A KVM that cannot offset
//! TSCs leaves them the host's.
//!
//! Of what others write, who have guest memory too ([`crate::Outside`]), nobody tells: they stand still
//! meanwhile, and all of memory is compared.
//!
//! Marks are valid across resets of the guest: what a reset empties and loads has changed. They end
//! with the machine.

use std::ops::Range;
use std::time::{Duration, Instant};

use crate::dirty::{PageSet, User};
use crate::handle::VmHandle;
use crate::memory::{GuestRam, PAGE_BYTES};
use crate::quiesce::Quiesced;
use crate::refused::QuiesceError;

mod error;
pub(crate) mod kept;
mod pages;
mod rewind;
mod since;
mod tree;

pub use self::error::{MAX_MARKS, MarkError};
pub use self::kept::MarkInfo;
use self::kept::{MarkState, Marks};
use self::pages::{Base, Delta, Pages, Places};
pub use self::rewind::{RewindError, RewindPhases, Rewound};
pub use self::since::SinceMark;
use self::tree::Tree;

/// Longest name, in bytes.
const MAX_NAME: usize = 64;

impl VmHandle {
    /// Sets a mark with this name where the guest is now. `limit` is how long to wait for it to
    /// come to rest; it goes on afterwards if it was running. Not to be called with a device
    /// locked.
    pub fn mark(&self, name: &str, limit: Duration) -> Result<MarkInfo, MarkError> {
        check_name(name)?;
        let machine = self.machine();
        let marks = &mut *self.kept_marks();
        if marks.tree.find(name).is_some() {
            return Err(MarkError::Exists(name.to_owned()));
        }
        if marks.tree.iter().count() >= MAX_MARKS {
            return Err(MarkError::TooMany);
        }
        let id = match marks.tree.is_empty() {
            false => self.quiesce(limit, |quiesced| quiesced.mark(marks, name))??,
            true => {
                let first = self.first_mark(marks, name, limit);
                if first.is_err() {
                    let mut tracker = machine.dirty.lock();
                    tracker.stop(User::Marks, &machine.vm, &machine.ram)?;
                }
                first?
            }
        };
        marks.info(id).ok_or(MarkError::NoMark)
    }

    /// Copies memory while the guest runs, and again what changed meanwhile when it is at rest.
    fn first_mark(
        &self,
        marks: &mut Marks,
        name: &str,
        limit: Duration,
    ) -> Result<tree::Id, MarkError> {
        // Whoever changes what memory is mapped from would have pages read that are missing.
        let _one = self.one_copying();
        let machine = self.machine();
        let ram = &machine.ram;
        let deadline = Instant::now() + limit;
        self.quiesce(limit, |quiesced| {
            quiesced.is_started().map_err(QuiesceError::from)?;
            let mut tracker = machine.dirty.lock();
            Ok::<_, MarkError>(tracker.start(User::Marks, &machine.vm, ram)?)
        })??;
        let mut base = Base::new(ram.size_bytes())?;
        // Where others write, all of it is copied at rest.
        let ahead = match self.others_write() {
            true => Vec::new(),
            false => ram.populated(),
        };
        // From here on it is followed what changes: nobody has to touch what nobody has touched.
        let untouched = ram.untouched();
        for range in &ahead {
            for page in pages_of(range) {
                let page = u32::try_from(page).map_err(|_| MarkError::NoMemory)?;
                base.take_quietly(ram, page, untouched.as_ref())?;
                marks.check(base.count())?;
            }
        }
        let left = deadline.saturating_duration_since(Instant::now());
        self.quiesce(left, |quiesced| {
            let others = quiesced.others_rest().map_err(MarkError::Others)?;
            let state = quiesced.mark_state()?;
            let mut tracker = machine.dirty.lock();
            tracker.collect(ram)?;
            marks.others_wrote = others.is_some();
            if marks.others_wrote {
                for range in ram.populated() {
                    for page in pages_of(&range) {
                        let page = u32::try_from(page).map_err(|_| MarkError::NoMemory)?;
                        base.take(ram, page)?;
                    }
                    marks.check(base.count())?;
                }
            }
            if let Some(changed) = tracker.set(User::Marks) {
                for &page in changed.pages() {
                    base.take(ram, page)?;
                }
                changed.clear();
            }
            marks.check(base.count())?;
            Ok(marks.tree.add(name.to_owned(), Pages::Base(base), state))
        })?
    }

    /// All marks, parents before those that follow them.
    pub fn marks(&self) -> Vec<MarkInfo> {
        let marks = self.kept_marks();
        let ids = marks.tree.iter().map(|(id, _)| id);
        ids.filter_map(|id| marks.info(id)).collect()
    }

    /// Pages that are kept for all marks; `None` while one is being set or gone back to.
    pub fn mark_pages(&self) -> Option<u64> {
        let marks = self.kept_marks_if_free()?;
        Some(marks.tree.iter().map(|(_, node)| node.pages.count()).sum())
    }

    /// Forgets the mark with this name. What others need of it is kept.
    pub fn forget_mark(&self, name: &str) -> Result<(), MarkError> {
        let machine = self.machine();
        let mut marks = self.kept_marks();
        let found = marks.tree.find(name);
        let id = found.ok_or_else(|| MarkError::NoSuchMark(name.to_owned()))?;
        let mut tracker = machine.dirty.lock();
        if let Some(changed) = tracker.set(User::Marks) {
            marks.tree.forget(id, changed)?;
        }
        if marks.tree.is_empty() {
            tracker.stop(User::Marks, &machine.vm, &machine.ram)?;
        }
        Ok(())
    }

    /// Lets marks keep at most `bytes` of memory; twice the guest's memory otherwise. Those that
    /// there are stay.
    pub fn limit_marks(&self, bytes: u64) {
        self.kept_marks().limit = bytes;
    }
}

impl Quiesced<'_, '_> {
    fn mark(&mut self, marks: &mut Marks, name: &str) -> Result<tree::Id, MarkError> {
        let others = self.others_rest().map_err(MarkError::Others)?;
        let state = self.mark_state()?;
        let ram = &self.machine.ram;
        let mut tracker = self.machine.dirty.lock();
        tracker.collect(ram)?;
        let changed = tracker.set(User::Marks).ok_or(MarkError::NoMark)?;
        marks.others_wrote |= others.is_some();
        if let (true, Some(current)) = (marks.others_wrote, marks.tree.current()) {
            add_differing(ram, &marks.tree, current, changed);
        }
        marks.check(changed.pages().len() as u64)?;
        let delta = Delta::take(ram, changed.pages().to_vec())?;
        changed.clear();
        Ok(marks.tree.add(name.to_owned(), Pages::Delta(delta), state))
    }

    fn mark_state(&mut self) -> Result<MarkState, MarkError> {
        self.is_started().map_err(QuiesceError::from)?;
        let participants = self.machine.participants().clone();
        let keep = participants.iter().map(|participant| {
            let refused = |unsettled: crate::Unsettled| MarkError::Participant {
                who: participant.name(),
                reason: unsettled.reason,
            };
            Ok((participant.name(), participant.keep().map_err(refused)?))
        });
        let kept = keep.collect::<Result<_, MarkError>>()?;
        Ok(MarkState {
            devices: self.save_devices()?,
            functions: self.machine.pci.serials(),
            machine: self.save()?,
            kept,
        })
    }
}

/// Pages of `range`, which is in bytes.
fn pages_of(range: &Range<u64>) -> Range<u64> {
    range.start / PAGE_BYTES..range.end.div_ceil(PAGE_BYTES)
}

/// Adds the pages to `set` that are other than at mark `id`. What is not populated is as nobody has
/// ever touched it.
fn add_differing(ram: &GuestRam, tree: &Tree<MarkState>, id: tree::Id, set: &mut PageSet) {
    let places = Places::of(ram);
    for range in ram.populated() {
        let pages = pages_of(&range).filter_map(|page| u32::try_from(page).ok());
        for page in pages.filter(|page| !places.is(*page, tree.content(id, *page))) {
            set.insert(page);
        }
    }
}

fn check_name(name: &str) -> Result<(), MarkError> {
    let is_good = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let starts_well = name
        .bytes()
        .next()
        .is_some_and(|byte| byte.is_ascii_alphanumeric());
    match starts_well && name.len() <= MAX_NAME && name.bytes().all(is_good) {
        true => Ok(()),
        false => Err(MarkError::Name(name.chars().take(MAX_NAME).collect())),
    }
}
