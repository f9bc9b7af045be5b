//! Faults put into calls on purpose: other code in the domain's copy of the driver for single
//! calls.
//!
//! ```text
//!   call 1   call 2   call 3 (every third)                    call 4 ...
//!   as is    as is    patched ─► runs ─► original bytes     as is
//! ```
//!
//! The guest's own text is never touched, and between two calls the domain's copy is as it was: a
//! fault stays in the call that it was meant for.

use std::collections::HashMap;

use iced_x86::{Decoder, DecoderOptions, FlowControl};
use serde::{Deserialize, Serialize};

use crate::dispatch::due::Due;
use crate::dispatch::supervisor::Knowledge;
use crate::domain::error::DomainError;
use crate::domain::{Domain, MAX_INSTRUCTION};
use crate::guest::addr::Gva;

pub use crate::dispatch::due::WhichCalls;

/// Longest function that is listed, in bytes.
const MAX_FUNCTION: u64 = 64 << 10;
/// Most orders of one module that are not used up.
const MAX_ORDERS: usize = 16;

/// A fault in a function of an isolated module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FaultOrder {
    /// The function. Calls of it get the fault if it is isolated itself, otherwise those of all
    /// isolated functions: they may call it.
    pub function: String,
    /// Where the fault goes, in bytes from the function's start.
    pub offset: u64,
    /// The code that is put there.
    pub code: Vec<u8>,
    /// Which calls.
    pub which: WhichCalls,
    /// Calls before the fault is used up.
    pub times: u64,
    /// Which calls those are.
    pub used_up_by: UsedUpBy,
}

/// Which calls use a [`FaultOrder`] up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UsedUpBy {
    /// Those that failed.
    #[default]
    Failing,
    /// Those that came to the fault, whatever became of them. One of a single byte does not tell;
    /// there calls that failed count.
    Reaching,
}

/// What became of a [`FaultOrder`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultCount {
    /// Calls that ran with the fault in them.
    pub tried: u64,
    /// Those of them that came to it, as far as it tells: one of a single byte does not.
    #[serde(default)]
    pub reached: u64,
    /// Those of them that failed.
    pub failed: u64,
    /// Calls that have yet to use it up.
    pub left: u64,
    /// When a call came to it first, in nanoseconds of the host's `CLOCK_MONOTONIC`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reached_ns: Option<u64>,
}

/// An instruction of a function of the driver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstructionAt {
    /// Bytes from the function's start.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u8,
    /// What it is.
    pub kind: InstructionKind,
}

/// What matters of an instruction to who puts faults in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InstructionKind {
    /// Goes on behind itself.
    Plain,
    /// A branch inside the driver.
    Branch,
    /// Calls the function of the kernel of that name.
    Calls(String),
    /// Ends the function.
    Return,
    /// Traps if it is reached, or is no instruction.
    Dead,
}

/// The fault orders of a module, oldest first: each is kept until it is used up. Of several for one
/// function the oldest that is due gets a call.
#[derive(Debug, Clone, Default)]
pub(crate) struct Faults(Vec<Fault>);

impl Faults {
    /// Takes one more order, for the function at `start`, which is isolated itself or not; `false`
    /// if there are too many that are not used up. An order of no faults withdraws those that are
    /// left for the same function.
    pub fn add(&mut self, order: FaultOrder, start: u64, is_entry: bool) -> bool {
        let withdraws = |fault: &Fault| order.times == 0 && fault.order.function == order.function;
        self.0
            .retain(|fault| fault.count.left > 0 && !withdraws(fault));
        let has_room = self.0.len() < MAX_ORDERS;
        if has_room {
            self.0.push(Fault::new(order, start, is_entry));
        }
        has_room
    }

    /// Withdraws all that is not used up.
    pub fn withdraw(&mut self) {
        self.0.iter_mut().for_each(|fault| fault.count.left = 0);
    }

    /// See [`Fault::begin`].
    pub fn begin(
        &mut self,
        entry: &str,
        again: bool,
        cr3: u64,
        domain: &mut Domain,
    ) -> Result<(), DomainError> {
        for fault in &mut self.0 {
            fault.begin(entry, again, cr3, domain)?;
            if fault.in_place {
                break;
            }
        }
        Ok(())
    }

    /// See [`Fault::end`].
    pub fn end(
        &mut self,
        entry: &str,
        failed: bool,
        domain: &mut Domain,
    ) -> Result<(), DomainError> {
        let mut all = self.0.iter_mut();
        all.try_for_each(|fault| fault.end(entry, failed, domain))
    }

    /// What became of the one that was ordered last.
    pub fn count(&self) -> FaultCount {
        self.0.last().map(|fault| fault.count).unwrap_or_default()
    }
}

/// A fault order under way.
#[derive(Debug, Clone)]
struct Fault {
    order: FaultOrder,
    at: u64,
    /// Calls of the function alone, which is isolated itself.
    is_entry: bool,
    /// Which calls get it.
    due: Due,
    in_place: bool,
    /// The call that ran last came to it, and has not failed so far.
    reached: bool,
    count: FaultCount,
}

impl Fault {
    /// In the function at `start`.
    fn new(order: FaultOrder, start: u64, is_entry: bool) -> Self {
        Self {
            at: start.wrapping_add(order.offset),
            is_entry,
            due: Due::new(order.which),
            count: FaultCount {
                left: order.times,
                ..FaultCount::default()
            },
            in_place: false,
            reached: false,
            order,
        }
    }

    fn is_for(&self, entry: &str) -> bool {
        !self.is_entry || entry == self.order.function
    }

    /// A call of `entry` begins or, having gone on in the guest, comes back (`again`), with the
    /// page tables at `cr3`.
    fn begin(
        &mut self,
        entry: &str,
        again: bool,
        cr3: u64,
        domain: &mut Domain,
    ) -> Result<(), DomainError> {
        if !self.is_for(entry) {
            return Ok(());
        }
        self.reached &= again;
        if self.count.left == 0 {
            return Ok(());
        }
        let is_due = match again {
            true => self.due.goes_on(),
            false => self.due.begins(),
        };
        if !is_due {
            return Ok(());
        }
        domain.follow_tables(cr3)?;
        domain.set_strike(self.at, &self.order.code)?;
        self.in_place = true;
        self.count.tried += u64::from(!again);
        Ok(())
    }

    /// A call of `entry` has ended, or goes on elsewhere. The domain's code is as it was.
    fn end(&mut self, entry: &str, failed: bool, domain: &mut Domain) -> Result<(), DomainError> {
        if !self.is_for(entry) {
            return Ok(());
        }
        let was_in_place = std::mem::take(&mut self.in_place);
        let reached_ns = match was_in_place {
            true => domain.clear_strike()?,
            false => None,
        };
        self.count.reached_ns = self.count.reached_ns.or(reached_ns);
        let reached_first = reached_ns.is_some() && !self.reached;
        self.reached |= reached_ns.is_some();
        self.count.reached += u64::from(reached_first);
        let failed = failed && (was_in_place || self.reached);
        self.count.failed += u64::from(failed);
        let used = match self.order.used_up_by {
            UsedUpBy::Failing => failed,
            UsedUpBy::Reaching => reached_first || failed && !self.reached,
        };
        if used {
            self.count.left = self.count.left.saturating_sub(1);
            self.due.used();
        }
        self.reached &= !failed;
        Ok(())
    }
}

/// The instructions of the function of the module at `start`. `calls` has the targets of calls out
/// of the module, which the domain's copy leads elsewhere.
pub(crate) fn instructions(
    start: u64,
    knowledge: &Knowledge,
    calls: &HashMap<u64, Gva>,
    domain: &Domain,
) -> Result<Vec<InstructionAt>, DomainError> {
    let bytes = knowledge.extent(start).min(MAX_FUNCTION);
    let mut code = vec![0; usize::try_from(bytes).unwrap_or_default()];
    domain.code(start, &mut code)?;
    let mut decoder = Decoder::with_ip(64, &code, start, DecoderOptions::NONE);
    let mut all = Vec::new();
    while decoder.can_decode() {
        let instruction = decoder.decode();
        let at = instruction.ip();
        let len = instruction.len().clamp(1, MAX_INSTRUCTION);
        // A jcc has one byte more in front of its displacement.
        let site = at.wrapping_add(len as u64).wrapping_sub(5);
        let called = calls
            .get(&site)
            .map(|target| knowledge.function_name(target.0));
        let kind = if instruction.is_invalid() {
            InstructionKind::Dead
        } else {
            match (instruction.flow_control(), called) {
                (FlowControl::Call, Some(name)) => InstructionKind::Calls(name),
                (FlowControl::Next, _) => InstructionKind::Plain,
                (FlowControl::Interrupt | FlowControl::Exception, _) => InstructionKind::Dead,
                (FlowControl::Return, _) => InstructionKind::Return,
                // A tail call, or a return through a thunk.
                (FlowControl::UnconditionalBranch, _)
                    if instruction.near_branch_target().wrapping_sub(start) >= bytes =>
                {
                    InstructionKind::Return
                }
                _ => InstructionKind::Branch,
            }
        };
        all.push(InstructionAt {
            offset: at.wrapping_sub(start),
            len: len as u8,
            kind,
        });
    }
    Ok(all)
}
