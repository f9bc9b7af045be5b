//! Kernel functions that wait until the call has ended: which there are, whether they may be run by
//! the guest, and which stores to the device wait for them in their turn.
//!
//! ```text
//!   in the domain      napi_gro_receive*  napi_complete_done*  store IMS*  ret ─► commit
//!   then the guest     napi_gro_receive   napi_complete_done ─► return gate: store IMS ─► caller
//! ```
//!
//! So the device does not interrupt before what its driver did first is done, as without isolation.

use super::Call;
use crate::domain::effects::KernelCall;
use crate::domain::recorder::Happened;
use crate::domain::supervisor::HandOver;

/// Calls of a function in a row of which nothing could wait before it is left off for a while.
const REFUSED_IN_A_ROW: u32 = 4;
/// For how many calls, the first time; each time twice as many until something waits.
const REST: u32 = 64;
/// How often they become twice as many.
const MOST_DOUBLINGS: u32 = 6;

/// How it went with the calls of one function.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Refusals {
    in_a_row: u32,
    rest: u32,
    doublings: u32,
}

impl Refusals {
    /// Whether the call that begins is to be tried.
    pub(crate) fn begins(&mut self) -> bool {
        let rests = self.rest > 0;
        self.rest = self.rest.saturating_sub(1);
        !rests
    }

    /// The call that was tried has ended, and it was worth it, or not.
    pub(crate) fn ended(&mut self, accepted: bool) {
        if accepted {
            *self = Self::default();
            return;
        }
        self.in_a_row += 1;
        if self.in_a_row >= REFUSED_IN_A_ROW {
            *self = Self {
                in_a_row: 0,
                rest: REST << self.doublings,
                doublings: (self.doublings + 1).min(MOST_DOUBLINGS),
            };
        }
    }
}

impl Call<'_> {
    /// Decides whether kernel functions wait for the end of the call, which is about to begin.
    pub(super) fn begin_handing_over(&mut self) {
        // What goes on in the guest has them in its journal.
        let may = self.hands_over
            && self.domain.monitor.can_hand_over()
            // A device that goes on by itself cannot be put back as it was to begin again.
            && !self.domain.view.keeps_bases()
            && self.supervisor.may_hand_over()
            && self
                .domain
                .refusals
                .entry(self.request.function)
                .or_default()
                .begins();
        self.hands_over = may;
        self.domain.monitor.hand_over(may);
    }

    /// Takes what has waited for the call, which has returned; `false` if it may not be run by the
    /// guest.
    pub(super) fn take_handed_over(&mut self) -> bool {
        if !self.hands_over || self.domain.monitor.handed_over_count() == 0 {
            return true;
        }
        let accepted = self.handed_over_calls();
        if let Some(refusals) = self.domain.refusals.get_mut(&self.request.function) {
            refusals.ended(accepted.is_some());
        }
        let Some((calls, stores_wait_for)) = accepted else {
            return false;
        };
        if let Some(waited_for) = stores_wait_for {
            let waits = |handed_over: u64| handed_over > waited_for as u64;
            let first = self.posted.partition_point(|post| !waits(post.handed_over));
            let later = self.posted.split_off(first);
            self.later = later.into_iter().map(|post| post.store).collect();
        }
        self.stats.handed_over = calls.len() as u32;
        self.note(|| Happened::HandsOver(calls.len() as u32));
        self.handed_over = calls;
        true
    }

    fn handed_over_calls(&mut self) -> Option<(Vec<KernelCall>, Option<usize>)> {
        let calls = self.domain.monitor.handed_over()?;
        // The kernel called the driver back, and went on with what it was told.
        if self.stats.callbacks > 0 {
            return None;
        }
        let bytes = size_of_val(calls.as_slice()) + size_of_val(self.posted.as_slice());
        let mut kept = self.domain.host_memory.nothing();
        if !kept.grow(bytes as u64) {
            return None;
        }
        self.calls_kept = kept;
        match self.supervisor.hands_over(&calls) {
            HandOver::Accepted { stores_wait_for } => Some((calls, stores_wait_for)),
            HandOver::Refused => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_of_which_nothing_may_wait_are_left_off_for_a_while() {
        let mut refusals = Refusals::default();
        for doublings in (0..=MOST_DOUBLINGS).chain([MOST_DOUBLINGS]) {
            for round in 0..REFUSED_IN_A_ROW {
                assert!(refusals.begins(), "{round}");
                refusals.ended(false);
            }
            for call in 0..REST << doublings {
                assert!(!refusals.begins(), "{call}");
            }
        }
        assert!(refusals.begins());
        refusals.ended(false);
        refusals.ended(true);
        for _ in 1..REFUSED_IN_A_ROW {
            refusals.ended(false);
            assert!(refusals.begins());
        }
    }
}
