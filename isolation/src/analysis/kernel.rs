//! What is known of the kernel that modules are for: its types, a model of its functions, and which
//! of its functions may have to wait, worked out from its text.
//!
//! A function of Linux that may have to wait says so at its start where the kernel was built with
//! voluntary preemption, as distributions do: `might_sleep()` is a call of `__SCT__might_resched`.
//! So a function *sleeps* if every way from its start to its end has such a call, its callees'
//! included, and *may* sleep if some way has. Calls through pointers are not followed.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use iced_x86::{Decoder, DecoderOptions, FlowControl, OpKind};
use object::read::elf::ElfFile64;
use object::{LittleEndian, Object, ObjectSection};
use serde::Serialize;

use super::facts;
use super::operations::{Layouts, OperationLayouts};
use crate::guest::btf::{Btf, BtfError};

/// Most instructions of one function of the kernel.
const MAX_INSTRUCTIONS: usize = 20_000;
/// Most functions of the kernel that are looked at.
const MAX_FUNCTIONS: usize = 200_000;
/// Bytes of a `struct kernel_symbol` with relative references
/// (`CONFIG_HAVE_ARCH_PREL32_RELOCATIONS`, include/linux/export.h).
const KSYMTAB_ENTRY: usize = 12;

/// What a function of the kernel is to a driver that calls it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// A variable.
    Variable,
    /// Leaves nothing behind but bytes in memory.
    Pure,
    /// Hands out or takes back memory.
    Memory,
    /// Is about the device: interrupts, mappings, DMA, registers, power.
    Hardware,
    /// Does something else that lasts and has an opposite, or can wait for the call's end.
    Revocable,
    /// Does something that nothing takes back.
    Irrevocable,
    /// The model does not know it.
    Unknown,
}

/// Whether a function waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Sleeps {
    /// No way through it is known to.
    No,
    /// Some ways through it do.
    May,
    /// It may have to wait whichever way is taken: it must not be called where one cannot.
    Yes,
}

/// What a model says of a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Modelled {
    /// What it is.
    pub class: Class,
    /// Whether it may wait.
    pub sleeps: bool,
}

/// The kernel.
#[derive(Debug)]
pub struct Kernel {
    /// Its types.
    pub types: Arc<Btf>,
    /// Its structures of operations.
    pub operations: OperationLayouts,
    model: HashMap<String, Modelled>,
    sleeps: HashMap<String, Sleeps>,
}

impl Kernel {
    /// From the kernel's ELF file and a model of its functions.
    pub fn new(vmlinux: &[u8], model: HashMap<String, Modelled>) -> Result<Self, BtfError> {
        let types = Arc::new(Btf::from_elf(vmlinux, None)?);
        let sleeps = Text::of(vmlinux).map_or_else(HashMap::new, |text| text.sleeps());
        Ok(Self::from_parts(types, model, sleeps))
    }

    /// From what is known already.
    pub fn from_parts(
        types: Arc<Btf>,
        model: HashMap<String, Modelled>,
        sleeps: HashMap<String, Sleeps>,
    ) -> Self {
        let operations = OperationLayouts::new(Layouts::of(&types, types.ids()));
        Self {
            types,
            operations,
            model,
            sleeps,
        }
    }

    /// What the function of this name is.
    pub fn class(&self, name: &str) -> Class {
        self.model
            .get(name)
            .map_or(Class::Unknown, |known| known.class)
    }

    /// Whether the function of this name waits; `None` if it is not the kernel's, or is not known.
    /// The model is believed where it says that it does not.
    pub fn sleeps(&self, name: &str) -> Option<Sleeps> {
        if facts::LINUX.sleeps.contains(&name) {
            return Some(Sleeps::Yes);
        }
        if is_processor_helper(name) {
            return Some(Sleeps::No);
        }
        let found = self.sleeps.get(name).copied();
        match self.model.get(name) {
            Some(known) if known.sleeps => Some(Sleeps::Yes),
            Some(_) => Some(Sleeps::No),
            None => found,
        }
    }
}

/// Thunks and stubs that compilers and the kernel's build put in.
fn is_processor_helper(name: &str) -> bool {
    name.starts_with("__x86_")
        || name.starts_with("__tracepoint")
        || name.starts_with("__SCT__preempt")
        || name == "__fentry__"
}

/// Text of the kernel, and the functions that it exports.
struct Text<'a> {
    at: u64,
    bytes: &'a [u8],
    exports: BTreeMap<u64, Vec<&'a str>>,
}

/// A function of the kernel, as far as waiting is concerned.
#[derive(Debug, Default)]
struct Shape {
    /// Pieces of it between calls: those that follow, and what is called at the end.
    steps: Vec<Step>,
}

#[derive(Debug, Default)]
struct Step {
    calls: Option<u64>,
    next: Vec<usize>,
    returns: bool,
}

impl<'a> Text<'a> {
    fn of(vmlinux: &'a [u8]) -> Option<Self> {
        let elf = ElfFile64::<LittleEndian>::parse(vmlinux).ok()?;
        let text = elf.section_by_name(".text")?;
        let strings = elf.section_by_name("__ksymtab_strings")?;
        let mut exports: BTreeMap<u64, Vec<&'a str>> = BTreeMap::new();
        for name in ["__ksymtab", "__ksymtab_gpl"] {
            let Some(table) = elf.section_by_name(name) else {
                continue;
            };
            for (index, entry) in table
                .data()
                .ok()?
                .as_chunks::<KSYMTAB_ENTRY>()
                .0
                .iter()
                .enumerate()
            {
                let field = |offset: usize| {
                    let word = entry.get(offset..offset + 4)?.try_into().ok()?;
                    let place = table
                        .address()
                        .checked_add((index * KSYMTAB_ENTRY + offset) as u64)?;
                    place.checked_add_signed(i64::from(i32::from_le_bytes(word)))
                };
                let found = field(0)
                    .zip(field(4))
                    .and_then(|(at, name)| Some((at, text_at(&strings, name)?)));
                if let Some((at, name)) = found {
                    exports.entry(at).or_default().push(name);
                }
            }
        }
        Some(Self {
            at: text.address(),
            bytes: text.data().ok()?,
            exports,
        })
    }

    fn sleeps(&self) -> HashMap<String, Sleeps> {
        let mut shapes: HashMap<u64, Shape> = HashMap::new();
        let mut todo: VecDeque<u64> = self.exports.keys().copied().collect();
        let mut seen: HashSet<u64> = todo.iter().copied().collect();
        while let Some(at) = todo.pop_front() {
            let Some(shape) = self.shape(at) else {
                continue;
            };
            for called in shape.steps.iter().filter_map(|step| step.calls) {
                if seen.len() < MAX_FUNCTIONS && seen.insert(called) {
                    todo.push_back(called);
                }
            }
            shapes.insert(at, shape);
        }
        let seeds = || {
            let named = self
                .exports
                .iter()
                .filter(|(_, names)| names.iter().any(|name| facts::LINUX.sleeps.contains(name)));
            named.map(|(at, _)| *at)
        };
        let always = spread(&shapes, seeds().collect(), |shape, sleeping| {
            shape.always(sleeping)
        });
        let some = spread(&shapes, seeds().collect(), |shape, sleeping| {
            shape
                .steps
                .iter()
                .any(|step| step.calls.is_some_and(|at| sleeping.contains(&at)))
        });
        let mut all = HashMap::new();
        for (at, names) in self
            .exports
            .range(self.at..self.at.saturating_add(self.bytes.len() as u64))
        {
            let sleeps = match (always.contains(at), some.contains(at)) {
                (true, _) => Sleeps::Yes,
                (_, true) => Sleeps::May,
                _ => Sleeps::No,
            };
            all.extend(names.iter().map(|name| ((*name).to_owned(), sleeps)));
        }
        all
    }

    /// Follows the function at `at` from its start.
    fn shape(&self, at: u64) -> Option<Shape> {
        let from = usize::try_from(at.checked_sub(self.at)?).ok()?;
        self.bytes.get(from)?;
        let mut shape = Shape::default();
        let mut step_at: HashMap<u64, usize> = HashMap::new();
        let mut todo = vec![(at, shape.step_for(at, &mut step_at).0)];
        let mut left = MAX_INSTRUCTIONS;
        while let Some((begin, step)) = todo.pop() {
            let offset = begin
                .checked_sub(self.at)
                .and_then(|offset| usize::try_from(offset).ok());
            let Some(bytes) = offset.and_then(|offset| self.bytes.get(offset..)) else {
                continue;
            };
            let mut decoder = Decoder::with_ip(64, bytes, begin, DecoderOptions::NONE);
            let mut on: Vec<u64> = Vec::new();
            let (mut calls, mut returns) = (None, false);
            while decoder.can_decode() && left > 0 {
                left -= 1;
                let i = decoder.decode();
                let near = matches!(i.op0_kind(), OpKind::NearBranch64);
                match i.flow_control() {
                    FlowControl::Next | FlowControl::IndirectCall => continue,
                    FlowControl::Call if near => {
                        calls = Some(i.near_branch_target());
                        on.push(i.next_ip());
                    }
                    FlowControl::ConditionalBranch if near => {
                        on.extend([i.next_ip(), i.near_branch_target()])
                    }
                    FlowControl::UnconditionalBranch
                        if near && self.is_return_thunk(i.near_branch_target()) =>
                    {
                        returns = true
                    }
                    // A tail call is followed as a part of the function.
                    FlowControl::UnconditionalBranch if near => on.push(i.near_branch_target()),
                    FlowControl::Return | FlowControl::IndirectBranch => returns = true,
                    _ => {}
                }
                break;
            }
            for next in on {
                let (next_step, new) = shape.step_for(next, &mut step_at);
                if new {
                    todo.push((next, next_step));
                }
                if let Some(step) = shape.steps.get_mut(step) {
                    step.next.push(next_step);
                }
            }
            if let Some(step) = shape.steps.get_mut(step) {
                (step.calls, step.returns) = (calls, returns);
            }
        }
        Some(shape)
    }

    fn is_return_thunk(&self, at: u64) -> bool {
        let names = self.exports.get(&at);
        names.is_some_and(|names| names.iter().any(|name| name.ends_with("_return_thunk")))
    }
}

impl Shape {
    /// The step that begins at an address, and whether it is a new one.
    fn step_for(&mut self, at: u64, step_at: &mut HashMap<u64, usize>) -> (usize, bool) {
        if let Some(step) = step_at.get(&at) {
            return (*step, false);
        }
        step_at.insert(at, self.steps.len());
        self.steps.push(Step::default());
        (self.steps.len() - 1, true)
    }

    /// Whether no way leads from the start to an end without a call of one of these.
    fn always(&self, sleeping: &HashSet<u64>) -> bool {
        let mut seen = HashSet::from([0]);
        let mut todo = vec![0];
        let mut met = false;
        while let Some(step) = todo.pop().and_then(|index: usize| self.steps.get(index)) {
            if step.returns {
                return false;
            }
            if step.calls.is_some_and(|at| sleeping.contains(&at)) {
                met = true;
                continue;
            }
            todo.extend(step.next.iter().copied().filter(|next| seen.insert(*next)));
        }
        met
    }
}

/// Adds functions to `found` for which `is` holds, until there are no more.
fn spread(
    shapes: &HashMap<u64, Shape>,
    mut found: HashSet<u64>,
    is: impl Fn(&Shape, &HashSet<u64>) -> bool,
) -> HashSet<u64> {
    let mut callers: HashMap<u64, Vec<u64>> = HashMap::new();
    for (at, shape) in shapes {
        for called in shape.steps.iter().filter_map(|step| step.calls) {
            callers.entry(called).or_default().push(*at);
        }
    }
    let mut todo: Vec<u64> = found.iter().copied().collect();
    while let Some(at) = todo.pop() {
        for caller in callers.get(&at).into_iter().flatten() {
            if !found.contains(caller) && shapes.get(caller).is_some_and(|shape| is(shape, &found))
            {
                found.insert(*caller);
                todo.push(*caller);
            }
        }
    }
    found
}

/// The zero-terminated text at an address in a section.
fn text_at<'a>(
    section: &object::read::elf::ElfSection64<'a, '_, LittleEndian>,
    at: u64,
) -> Option<&'a str> {
    let from = usize::try_from(at.checked_sub(section.address())?).ok()?;
    let rest = section.data().ok()?.get(from..)?;
    let len = rest.iter().take(512).position(|byte| *byte == 0)?;
    std::str::from_utf8(rest.get(..len)?).ok()
}
