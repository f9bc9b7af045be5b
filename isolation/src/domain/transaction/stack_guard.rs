//! The frames of the callers, which lie above that of the call on its stack.
//!
//! ```text
//!   ... │ frames of the call │ return address │ frames of the callers ... │ end of the stack
//!                            ▲ RSP at the entry ▲ what this is about
//! ```
//!
//! What of them differs at a commit, or at a publication before it, and is not an object that the
//! call was given, was written by the driver if no kernel function ran with its own rights. If one
//! did, it may have been that one: a block request that is completed wakes its submitter by
//! something on that one's stack. Then the call is taken back and run once more with an exit at both
//! ends of each crossing, between which what changes is the driver's doing:
//!
//! ```text
//!   driver ─► exit: as it was seen? ─► kernel function ─► exit: seen anew ─► driver ─► return: as it was seen?
//! ```
//!
//! Places that turn out to be the kernel's are remembered, and the call is not run again for them
//! each time.

use std::collections::HashMap;

use super::Call;
use super::handing_over::Refusals;
use crate::domain::error::DomainError;
use crate::domain::view::{PAGE_SIZE, Page, Pfn};
use crate::domain::violation::ViolationKind;
use crate::guest::addr::Gva;
use crate::guest::stack::THREAD_SIZE;
use crate::policy::diff::PageMask;

/// Pages of a stack.
const STACK_PAGES: usize = (THREAD_SIZE / PAGE_SIZE) as usize;
/// Most places on callers' stacks that are remembered; all are forgotten when there are more.
const MAX_PLACES: usize = 1024;
/// Bytes of a link, of a saved register, of a return address.
const WORD: u64 = 8;
/// Most crossings of a call that is run once more, each of which exits twice then.
const MAX_WATCHED: u64 = 4096;

/// Places on the stacks of functions' callers that kernel functions have written, by the function
/// and the offset from its stack pointer at the entry.
#[derive(Debug, Default)]
pub(in crate::domain) struct WrittenByKernel(HashMap<(u64, u64), Refusals>);

impl WrittenByKernel {
    /// Whether a change at `place` is a reason to run the call once more.
    fn is_a_reason(&mut self, place: (u64, u64)) -> bool {
        self.0.get_mut(&place).is_none_or(Refusals::begins)
    }

    /// It was the driver that wrote at `place`.
    fn forget(&mut self, place: (u64, u64)) {
        self.0.remove(&place);
    }

    /// It was a kernel function that wrote at `place`, or may have been.
    fn note(&mut self, place: (u64, u64)) {
        if self.0.len() >= MAX_PLACES && !self.0.contains_key(&place) {
            self.0.clear();
        }
        self.0.entry(place).or_default().ended(false);
    }
}

/// A page with callers' frames, as it was seen when the driver began to run.
struct Seen {
    pfn: Pfn,
    /// Guest virtual address.
    va: u64,
    bytes: Box<Page>,
}

/// A call whose crossings exit, so that it is known who writes the callers' frames.
#[derive(Default)]
pub(super) struct Watch(Vec<Seen>);

impl Call<'_> {
    /// First byte above the call's own frames.
    fn callers(&self) -> u64 {
        self.entry.rsp.wrapping_add(WORD)
    }

    /// Pages with frames of callers, with their addresses.
    fn callers_pages(&self) -> [Option<(Pfn, u64)>; STACK_PAGES] {
        let stack = self.request.stack;
        let first = self.callers() & !(PAGE_SIZE - 1);
        std::array::from_fn(|index| {
            let va = first.checked_add(index as u64 * PAGE_SIZE)?;
            if !stack.contains(Gva(va)) {
                return None;
            }
            if va == self.entry.rsp & !(PAGE_SIZE - 1) {
                return Some((self.return_slot.0, va));
            }
            let at = self.domain.roots.translate(va, &self.domain.view).ok()??;
            let pfn = Pfn::of(at.gpa);
            self.domain.view.contains(pfn).then_some((pfn, va))
        })
    }

    /// What is wrong with the callers' frames, if these are the changes since the call began, or
    /// since the last publication. Where it takes another run to tell, that is noted
    /// ([`Call::suspects`]).
    pub(super) fn changed_callers(&mut self, changes: &[(Pfn, PageMask)]) -> Option<ViolationKind> {
        let by_driver = !self.was_in_kernel();
        let callers = self.callers();
        for (pfn, va) in self.callers_pages().into_iter().flatten() {
            let Ok(index) = changes.binary_search_by_key(&pfn, |change| change.0) else {
                continue;
            };
            for run in changes[index].1.runs() {
                let mut from = va.saturating_add(run.start as u64).max(callers);
                let end = va.saturating_add(run.end as u64);
                // Word by word: what is known of one says nothing of the next.
                while let Some(address) = self.first_of_callers(from, end) {
                    if by_driver || self.suspects(address) {
                        return Some(ViolationKind::StackSmash { address });
                    }
                    from = next_word(address);
                }
            }
        }
        None
    }

    /// Whether a kernel function ran with its own rights in the call, or the kernel called it back.
    fn was_in_kernel(&self) -> bool {
        self.crossed() != 0 || self.went_elsewhere()
    }

    /// Kernel functions that ran with their own rights in the call.
    pub(super) fn crossed(&self) -> u64 {
        let now = self.domain.monitor.crossings();
        now.wrapping_sub(self.domain.crossings_at_entry.0)
    }

    /// Whether the kernel called the driver back, or a part of the call ran in the guest.
    pub(super) fn went_elsewhere(&self) -> bool {
        self.stats.callbacks > 0 || self.spills > 0
    }

    /// The word with `address`, by the function and the offset from its stack pointer at the entry.
    fn place(&self, address: u64) -> (u64, u64) {
        let offset = (address & !(WORD - 1)).wrapping_sub(self.entry.rsp);
        (self.request.function, offset)
    }

    /// The word with `address` was changed, by the driver or by a kernel function: `true`, if the
    /// call has to be run once more to see by whom. If that is what has been done, it was a kernel
    /// function, or the driver would have been stopped.
    fn suspects(&mut self, address: u64) -> bool {
        let place = self.place(address);
        if self.watch.is_some() {
            self.domain.written_by_kernel.note(place);
            return false;
        }
        // What is in the guest already cannot be run again, nor can a call whose device goes on by
        // itself. One of very many crossings would take too long.
        let can_begin_again = self.spills == 0
            && self.journal.is_none()
            && !self.domain.view.keeps_bases()
            && self.crossed() <= MAX_WATCHED;
        if !can_begin_again || !self.domain.written_by_kernel.is_a_reason(place) {
            return false;
        }
        // However the next run ends: it is forgotten if it was the driver.
        self.domain.written_by_kernel.note(place);
        self.is_suspected = true;
        true
    }

    /// First address in the callers' frames from `from` to before `end`, if there is anything, that
    /// the driver may not change.
    fn first_of_callers(&mut self, from: u64, end: u64) -> Option<u64> {
        let bytes = end.checked_sub(from).filter(|bytes| *bytes > 0)?;
        if self.supervisor.may_change(from, bytes) {
            return None;
        }
        let mut at = from;
        while at < end {
            let word = at & !(WORD - 1);
            let next = next_word(at).min(end);
            if !self.is_link(word) && !self.supervisor.may_change(at, next - at) {
                return Some(at);
            }
            at = next;
        }
        None
    }

    /// Whether the word at `at` was a link of a list when the call began: what it pointed at pointed
    /// back. Whoever takes its neighbour out of the list changes it.
    fn is_link(&self, at: u64) -> bool {
        let Some(other) = self.word_before(at) else {
            return false;
        };
        // A link to the next one, to the previous one (include/linux/list.h).
        other.is_multiple_of(WORD)
            && (self.word_before(other.wrapping_add(WORD)) == Some(at)
                || self.word_before(other) == Some(at.wrapping_sub(WORD)))
    }

    /// The guest's word at `va` as it was when the call began.
    fn word_before(&self, va: u64) -> Option<u64> {
        let (pfn, offset) = self.stack_slot(va).ok()??;
        let page = self.domain.view.before(pfn).ok()?;
        let word = page.get(offset..offset.checked_add(WORD as usize)?)?;
        Some(u64::from_le_bytes(word.try_into().ok()?))
    }

    /// The call is about to begin: if it is watched, all crossings exit, and the callers' frames are
    /// seen.
    pub(super) fn begin_watching(&mut self) -> Result<(), DomainError> {
        if self.watch.is_none() {
            return Ok(());
        }
        self.domain.monitor.watch_crossings();
        let mut all = Vec::new();
        for (pfn, va) in self.callers_pages().into_iter().flatten() {
            let bytes = Box::new(*self.domain.view.private_page(pfn)?);
            all.push(Seen { pfn, va, bytes });
        }
        self.watch = Some(Watch(all));
        Ok(())
    }

    /// The driver goes on: what the callers' frames are now is not its doing.
    pub(super) fn see_callers(&mut self) -> Result<(), DomainError> {
        for seen in self.watch.iter_mut().flat_map(|watch| &mut watch.0) {
            seen.bytes
                .copy_from_slice(self.domain.view.private_page(seen.pfn)?);
        }
        Ok(())
    }

    /// The driver stops running: what of the callers' frames it has changed, and may not.
    pub(super) fn check_callers(&mut self) -> Result<Option<ViolationKind>, DomainError> {
        let Some(watch) = self.watch.take() else {
            return Ok(None);
        };
        let callers = self.callers();
        let mut found = None;
        for seen in &watch.0 {
            let mask = PageMask::changed(&seen.bytes, self.domain.view.private_page(seen.pfn)?);
            for run in mask.runs() {
                let from = seen.va.saturating_add(run.start as u64).max(callers);
                let end = seen.va.saturating_add(run.end as u64);
                if found.is_none() {
                    found = self.first_of_callers(from, end);
                }
            }
        }
        self.watch = Some(watch);
        if let Some(address) = found {
            let place = self.place(address);
            self.domain.written_by_kernel.forget(place);
        }
        Ok(found.map(|address| ViolationKind::StackSmash { address }))
    }
}

/// First byte behind the word with `address`.
fn next_word(address: u64) -> u64 {
    (address & !(WORD - 1)).saturating_add(WORD)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_that_the_kernel_writes_are_no_reason_for_long_and_others_are() {
        let mut places = WrittenByKernel::default();
        let (place, other) = ((0x1000, 0x40), (0x1000, 0x48));
        let mut runs = 0;
        for _ in 0..1000 {
            if places.is_a_reason(place) {
                places.note(place);
                runs += 1;
            }
            assert!(places.is_a_reason(other));
        }
        assert!((4..=20).contains(&runs), "{runs}");
    }

    #[test]
    fn only_so_many_places_are_remembered() {
        let mut places = WrittenByKernel::default();
        (0..3 * MAX_PLACES as u64).for_each(|at| places.note((at, 8)));
        assert!(places.0.len() <= MAX_PLACES);
    }
}
