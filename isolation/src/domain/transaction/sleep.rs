//! Kernel functions that only wait for time to pass: the call waits in them and stays atomic.
//!
//! The guest stands still meanwhile, so the time is limited, over all waits of a call. A call that
//! waits at one place over and over is waiting for somebody else, who stands still too: it is given
//! up.

use std::collections::HashMap;
use std::time::Instant;

use kvm_bindings::kvm_regs;

use super::call::PassThroughReason;
use super::{Call, OUT_BYTES, Step};
use crate::domain::error::DomainError;
use crate::domain::recorder::Happened;

/// Waits in a row from one place after which somebody else is waited for.
const MAX_REPEATED: u32 = 16;

impl Call<'_> {
    /// P is at the beginning of a function that waits.
    pub(super) fn sleep(&mut self, regs: &kvm_regs) -> Result<Step, DomainError> {
        let Some((function, unit)) = self.trapped_at(regs.rip, &self.domain.sleeps) else {
            return Ok(Step::GuestOnly(PassThroughReason::Sleeps, None));
        };
        let at = kvm_regs {
            rip: function,
            ..*regs
        };
        let given_up = || {
            Ok(Step::GuestOnly(
                PassThroughReason::Sleeps,
                Some(Box::new(at)),
            ))
        };
        let Some(return_address) = self.read_guest(regs.rsp)? else {
            return given_up();
        };
        // The argument is an unsigned int or a number that fits one.
        let count = u32::try_from(regs.rdi).unwrap_or(u32::MAX);
        let time = unit.saturating_mul(count);
        let repeated = match self.last_sleep {
            (at, times) if at == return_address => times + 1,
            _ => 1,
        };
        self.last_sleep = (return_address, repeated);
        // With a journal it goes on in the guest anyhow.
        let limit = self.request.sleep_limit;
        if self.journal.is_some() || !self.time.may_wait(time, limit) || repeated > MAX_REPEATED {
            return given_up();
        }
        if let Some(kind) = self.before_wait()? {
            return Ok(Step::Violation(kind, regs.rip));
        }
        self.note(|| Happened::Calls(function));
        let since = Instant::now();
        std::thread::sleep(time);
        self.take_over()?;
        self.time.asked += time;
        self.time.waited += since.elapsed();
        self.stats.sleeps += 1;
        let slept_us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.stats.slept_us += slept_us;
        self.note(|| Happened::Waited(slept_us));
        let next = kvm_regs {
            rip: return_address,
            rsp: regs.rsp.wrapping_add(8),
            rax: 0,
            ..*regs
        };
        self.domain.vm.set_regs(&next);
        Ok(Step::Continue)
    }

    /// The function of `functions` at whose patched beginning P stopped, and what is known of it.
    /// KVM leaves RIP at an `out` or, in some builds, behind it.
    pub(super) fn trapped_at<T: Copy>(
        &self,
        rip: u64,
        functions: &HashMap<u64, T>,
    ) -> Option<(u64, T)> {
        [rip, rip.wrapping_sub(OUT_BYTES)]
            .into_iter()
            .find_map(|at| functions.get(&at).map(|known| (at, *known)))
    }
}
