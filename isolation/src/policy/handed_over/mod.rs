//! Calls of kernel functions that wait until the driver's call has ended: what they were given is
//! looked at before the call is committed, since the guest runs them outside of the domain then.
//!
//! A driver that hands a packet over has no further business with it. But a packet that is not one
//! would hurt the kernel, which a function that is called in the domain would show: so whatever is
//! not as it should be is no fault by itself, it only does not wait.

mod packets;
mod polls;

use std::collections::HashMap;
use std::sync::LazyLock;

use serde::Deserialize;

use crate::domain::effects::KernelCall;
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::allocations::Allocations;
use crate::guest::btf::Btf;
use crate::guest::memory_model::MemoryModel;
use crate::guest::modules::ModuleLayout;
use crate::guest::phys::GuestPhys;
use crate::guest::symbols::SymbolTable;
use crate::models;
use crate::policy::call::CallMemory;

use packets::Packets;
use polls::Polls;

/// Where a processor counts who does not want to be interrupted: the variable, or the variable and
/// its member since Linux 6.2.
const PREEMPT_COUNTS: &[(&str, Option<&str>)] = &[
    ("pcpu_hot", Some("preempt_count")),
    ("__preempt_count", None),
];

/// Bits of that count that say that softirqs are off, or that one or an interrupt's handler runs
/// (`SOFTIRQ_MASK`, `HARDIRQ_MASK` and `NMI_MASK`, include/linux/preempt.h).
const NO_SOFTIRQS: u32 = 0x00ff_ff00;

/// What is known of such functions.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, bound(deserialize = "'de: 'static"))]
pub(crate) struct HandOverModel {
    #[serde(deserialize_with = "models::kept")]
    function: &'static [FunctionModel],
    packet: packets::PacketModel,
    poll: polls::PollModel,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, bound(deserialize = "'de: 'static"))]
struct FunctionModel {
    #[serde(deserialize_with = "models::kept")]
    names: &'static [&'static str],
    takes: Takes,
    answer: Option<Answer>,
}

/// What a function takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Takes {
    Received,
    Freed,
    Polled,
    Scheduled,
}

/// What its caller is told meanwhile.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged)]
enum Answer {
    Number(u32),
    /// The kernel's name for it.
    Name(&'static str),
}

/// Those of Linux.
pub(crate) static LINUX: LazyLock<HandOverModel> =
    LazyLock::new(|| models::built_in(include_str!("../../../models/handed_over.toml")));

/// Functions of a kernel that can wait, with what they take and what their callers are told.
fn functions(types: &Btf, symbols: &SymbolTable) -> HashMap<u64, (Takes, u32)> {
    let mut functions = HashMap::new();
    for function in LINUX.function {
        let answer = match function.answer {
            None => Some(0),
            Some(Answer::Number(number)) => Some(number),
            Some(Answer::Name(name)) => {
                let value = types.enum_value(name);
                value.and_then(|value| u32::try_from(value).ok())
            }
        };
        let Some(answer) = answer else { continue };
        let found = function.names.iter();
        let found = found.filter_map(|name| symbols.kernel_symbol(name));
        for symbol in found.filter(|symbol| symbol.is_code()) {
            functions.insert(symbol.at.0, (function.takes, answer));
        }
    }
    functions
}

/// What the callers of functions that can wait are told, by where these begin.
pub fn answers(types: &Btf, symbols: &SymbolTable) -> HashMap<u64, u32> {
    let functions = functions(types, symbols).into_iter();
    functions.map(|(at, (_, answer))| (at, answer)).collect()
}

/// Looks at what a driver hands over, in a guest with certain types and symbols.
#[derive(Debug)]
pub struct HandOvers {
    functions: HashMap<u64, (Takes, u32)>,
    packets: Packets,
    polls: Polls,
    /// Offset of the count in the per-CPU area.
    preempt_count: u64,
}

impl HandOvers {
    /// For the module with this layout; `None` where something is not known that has to be looked
    /// at.
    pub fn new(types: &Btf, symbols: &SymbolTable, layout: &ModuleLayout) -> Option<Self> {
        let mut counts = PREEMPT_COUNTS.iter();
        let preempt_count = counts.find_map(|(variable, member)| {
            let symbol = symbols.kernel_symbol(variable)?;
            let Some(member) = member else {
                return Some(symbol.at.0);
            };
            let member = types.find_member(types.find_struct(variable)?, member)?;
            symbol.at.0.checked_add(u64::from(member.bit_offset / 8))
        })?;
        Some(Self {
            functions: functions(types, symbols),
            packets: Packets::new(&LINUX.packet, types)?,
            polls: Polls::new(&LINUX.poll, types, layout)?,
            preempt_count,
        })
    }

    /// Whether a call that begins now may have functions wait for it: where no softirq can come
    /// between, so that they run where the driver would have called them, whatever it has switched
    /// off itself meanwhile.
    pub fn may_wait<M: GuestPhys>(&self, memory: &CallMemory<'_, M>) -> bool {
        let at = memory.per_cpu_base.wrapping_add(self.preempt_count);
        let mut count = [0; 4];
        let read = memory.earlier().read(Gva(at), &mut count);
        read.is_ok() && u32::from_le_bytes(count) & NO_SOFTIRQS != 0
    }

    /// Looks at what `calls` take, in this order, of a call that is about to be committed; `None`
    /// if something of it is not as it should be. Otherwise the first one that stores to the device
    /// have to wait for which come after it, if any is.
    pub fn look<M: GuestPhys>(
        &mut self,
        memory: &CallMemory<'_, M>,
        model: &MemoryModel,
        calls: &[KernelCall],
    ) -> Option<Option<usize>> {
        each_once(calls.iter().filter_map(|call| self.packet_of(call)))?;
        self.packets.begin();
        let allocations = Allocations::new(model, memory.private);
        let allocations = allocations.on_processor(memory.per_cpu_base);
        let mut polled = None;
        let mut polling: Option<(Gva, u64)> = None;
        let (mut scheduled, mut buffers) = (Vec::new(), Vec::new());
        for (index, call) in calls.iter().enumerate() {
            let (takes, _) = *self.functions.get(&call.function)?;
            let [first, second, ..] = call.arguments;
            let napi = Gva(first);
            match takes {
                Takes::Freed => {
                    buffers.extend(self.packets.may_be_freed(memory, &allocations, napi)?);
                }
                Takes::Scheduled => {
                    self.polls.device_of(memory, napi)?;
                    // By nobody else before, who has it in a list.
                    let anew = !self.polls.was_scheduled(memory, napi)?;
                    scheduled.push(anew.then_some(first)?);
                }
                // What is polled is not polled any more behind the end of its poll.
                Takes::Received | Takes::Polled if polled.is_some() => return None,
                Takes::Received => {
                    let device = match polling {
                        Some((known, device)) if known == napi => device,
                        _ => self.device_polled(memory, napi)?,
                    };
                    polling = Some((napi, device));
                    let (virt, packet) = (memory.private, Gva(second));
                    buffers.push(self.packets.received(virt, &allocations, packet, device)?);
                }
                Takes::Polled => {
                    self.device_polled(memory, napi)?;
                    self.polls.ends(memory.private, napi)?;
                    polled = Some(index);
                }
            }
        }
        each_once(buffers.into_iter())?;
        each_once(scheduled.into_iter())?;
        Some(polled)
    }

    /// The interface of what is being polled since before the call.
    fn device_polled<M: GuestPhys>(&self, memory: &CallMemory<'_, M>, napi: Gva) -> Option<u64> {
        let device = self.polls.device_of(memory, napi)?;
        self.polls.was_scheduled(memory, napi)?.then_some(device)
    }

    /// The packet that a call takes.
    fn packet_of(&self, call: &KernelCall) -> Option<u64> {
        match self.functions.get(&call.function)?.0 {
            Takes::Freed => Some(call.arguments[0]),
            Takes::Received => Some(call.arguments[1]),
            Takes::Polled | Takes::Scheduled => None,
        }
    }
}

/// Whether none of these is there twice.
fn each_once(all: impl Iterator<Item = u64>) -> Option<()> {
    let mut all: Vec<u64> = all.collect();
    all.sort_unstable();
    all.windows(2).all(|two| two[0] != two[1]).then_some(())
}

/// Whether `at` lies in one of `sections`.
fn lies_in(sections: &[GvaRange], at: u64) -> bool {
    sections.iter().any(|section| section.contains(Gva(at)))
}

#[cfg(test)]
mod tests;
