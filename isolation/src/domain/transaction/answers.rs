//! What kernel functions answer the driver with: told when they return, with what they were called
//! with, and remembered for as long as the call lasts.

use super::Call;
use crate::domain::effects::KernelCall;
use crate::domain::supervisor::Answer;

/// Most calls of kernel functions within one another whose answers are told.
const MAX_UNDER_WAY: usize = 64;
/// Most answers of a call that are remembered: the oldest half of them is forgotten then.
const MAX_ANSWERS: usize = 2048;

/// A call of a kernel function that has not returned yet.
#[derive(Debug, Clone, Copy)]
struct UnderWay {
    call: KernelCall,
    /// Stack pointer behind its return.
    rsp: u64,
    /// Call-backs that it was called in: the driver chooses where on the stack it calls from, but
    /// cannot return to what a call-back is within.
    depth: usize,
}

/// Answers of a call.
#[derive(Debug, Clone, Default)]
pub(super) struct Answers {
    under_way: Vec<UnderWay>,
    told: Vec<Answer>,
}

impl Answers {
    /// What they take of the host's memory.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.under_way.as_slice()) + size_of_val(self.told.as_slice())
    }
}

impl Call<'_> {
    /// A kernel function is about to be called that returns with stack pointer `rsp`.
    pub(super) fn answer_enter(&mut self, call: KernelCall, rsp: u64) {
        let depth = self.callbacks.len();
        let under_way = &mut self.answers.under_way;
        // What was called in a call-back that is over never returned.
        under_way.retain(|one| one.depth <= depth);
        if self.domain.monitor.answers(call.function) && under_way.len() < MAX_UNDER_WAY {
            under_way.push(UnderWay { call, rsp, depth });
        }
    }

    /// One has returned with stack pointer `rsp`, in P or in the guest.
    pub(super) fn answer_leave(&mut self, rsp: u64, result: u64) {
        let depth = self.callbacks.len();
        let under_way = &mut self.answers.under_way;
        let is_it = |one: &UnderWay| one.rsp == rsp && one.depth == depth;
        let Some(call) = under_way.iter().rfind(|one| is_it(one)).map(|one| one.call) else {
            return;
        };
        under_way.retain(|one| !is_it(one));
        let Some(answer) = self.supervisor.answered(&call, result) else {
            return;
        };
        let told = &mut self.answers.told;
        if told.len() >= MAX_ANSWERS {
            told.drain(..MAX_ANSWERS / 2);
        }
        told.push(answer);
    }

    /// The call comes back from the guest: what it was answered with before.
    pub(super) fn tell_answers(&mut self) {
        if !self.answers.told.is_empty() {
            self.supervisor.was_answered(&self.answers.told);
        }
    }
}
