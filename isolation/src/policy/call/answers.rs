//! What kernel functions have answered the call that is under way with: objects that nothing which
//! the driver has leads to by type.
//!
//! ```text
//!   bh = __bread_gfp(bdev, block, size, gfp)      the block's bytes, and the state of its struct buffer_head
//!   kern_path(name, flags, &path)                 the state of the inode that path.dentry is of
//! ```
//!
//! Which functions and what of it is data (`models/types.toml`, `answered`).

use std::collections::HashMap;

use super::{CallMemory, DriverPolicy};
use crate::domain::effects::KernelCall;
use crate::domain::supervisor::Answer;
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::phys::GuestPhys;
use crate::guest::symbols::SymbolTable;
use crate::policy::reach::{Answered, Rules};

/// Most answers that are kept until somebody looks behind them: the oldest half of them is forgotten
/// then.
const MAX_FRESH: usize = 2048;

/// What is known of answers.
#[derive(Debug, Default)]
pub(super) struct Answers {
    /// By the function's address.
    rules: HashMap<u64, &'static Answered>,
    /// Those that the call has been given and that nobody has looked behind yet.
    fresh: Vec<Answer>,
}

impl Answers {
    /// Of the functions that there are.
    pub fn new(symbols: &SymbolTable, rules: &'static Rules) -> Self {
        let names = rules.answered.iter();
        let names = names.flat_map(|rule| rule.by.iter().map(move |name| (*name, rule)));
        // One may be another module's.
        let found = names.flat_map(|(name, rule)| {
            let all = symbols.named(name).filter(|symbol| symbol.is_code());
            all.map(move |symbol| (symbol.at.0, rule))
        });
        Self {
            rules: found.collect(),
            fresh: Vec::new(),
        }
    }

    /// How many are kept.
    #[cfg(test)]
    pub fn kept(&self) -> usize {
        self.fresh.len()
    }

    /// The call is over.
    pub fn forget(&mut self) {
        self.fresh.clear();
    }
}

impl DriverPolicy {
    /// Kernel functions, by address, whose answers say what a call may write.
    pub fn answering(&self) -> impl Iterator<Item = u64> + '_ {
        self.answers.rules.keys().copied()
    }

    /// A kernel function of these has returned `result` to the call: the object that it has
    /// answered with.
    pub fn answered<M: GuestPhys>(
        &mut self,
        memory: &CallMemory<'_, M>,
        call: &KernelCall,
        result: u64,
    ) -> Option<Answer> {
        let rule = *self.answers.rules.get(&call.function)?;
        let at = self.reach(memory.private, memory, |reach| {
            reach.answer(rule, &call.arguments, result)
        })?;
        let answer = Answer {
            function: call.function,
            at: at.0,
        };
        self.was_answered(&[answer]);
        Some(answer)
    }

    /// The call was answered with these objects.
    pub fn was_answered(&mut self, answers: &[Answer]) {
        let fresh = &mut self.answers.fresh;
        fresh.extend_from_slice(answers);
        if fresh.len() > MAX_FRESH {
            fresh.drain(..fresh.len() - MAX_FRESH / 2);
        }
    }

    /// Opens what may be written of the objects that the call was answered with.
    pub(super) fn open_answered<M: GuestPhys>(
        &mut self,
        memory: &CallMemory<'_, M>,
        one: GvaRange,
    ) -> bool {
        for answer in std::mem::take(&mut self.answers.fresh) {
            let Some(rule) = self.answers.rules.get(&answer.function).copied() else {
                continue;
            };
            let found = self.reach(memory.private, memory, |reach| {
                reach.answered(rule, Gva(answer.at))
            });
            self.open_all(found);
        }
        self.table.may_write(one)
    }
}
