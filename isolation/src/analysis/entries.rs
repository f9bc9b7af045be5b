//! Where the kernel enters a module, and what of it could be isolated.

use std::collections::BTreeMap;

use serde::Serialize;

use super::code::Code;
use super::image::{Ko, Place};
use super::kernel::Class;
use super::operations::{Operations, PointsAt};
use super::reached::{Atomic, Calls, MAX_NAMES};
use crate::guest::btf::{Btf, Kind, TypeId};
use crate::policy::abort_value::abort_return_named;
use crate::policy::completion::{no_answer, serves_blocks};

/// Where a function's address was found.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct From {
    /// Structure and member: `net_device_ops.ndo_start_xmit`, `module.init`; or what the function's
    /// type says that it is: `interrupt handler`, `work`. `unknown structure` where none fits.
    pub as_what: String,
    /// Name of the object, or of the function that hands the address on.
    pub place: String,
}

/// What isolation could do with an entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Isolation {
    /// No gate fits, or a failed call has no answer.
    Refused {
        /// Why.
        reason: &'static str,
    },
    /// Whatever fails is taken back as a whole: nothing waits.
    Whole,
    /// A call that waits goes on in the guest; what it had done by then has opposites.
    Compensated,
    /// As that, but something that it may have done has no opposite: the driver is restarted then.
    Irrevocable {
        /// Functions without opposites, or that the model does not know.
        calls: Vec<String>,
        /// How many there are in all.
        count: usize,
    },
}

/// A function that the kernel calls.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// Its name.
    pub function: String,
    /// Where it is known from.
    pub from: Vec<From>,
    /// Whether it can stay atomic.
    pub atomic: Atomic,
    /// Whether it could be isolated.
    pub isolation: Isolation,
    /// Functions of the module that it reaches, itself included.
    pub reaches: usize,
}

impl Entry {
    /// Whether it runs only when the module is loaded or removed.
    pub fn runs_once(&self) -> bool {
        self.isolation == Isolation::Refused { reason: ONCE }
            || self.from.iter().all(|from| from.as_what == "module")
    }
}

/// `.init` and `.exit` functions, which run once.
const ONCE: &str = "it runs once, when the module is loaded or removed";
const NO_GATE: &str = "no gate fits: it does not begin with the tracer's call";
const NO_TYPES: &str =
    "the module has no types that fit the kernel's, so that no answer for a failed call is known";
const NO_ANSWER: &str = "a failed call has no answer: the function's type is not known, or no value of what it returns can be made";

/// The entries of a module, by name.
pub fn find(
    ko: &Ko<'_>,
    codes: &[Code],
    types: Option<&Btf>,
    operations: &[Operations],
    calls: &Calls<'_>,
) -> Vec<Entry> {
    let mut from = from_operations(ko, operations);
    for (function, of_code) in from_code(ko, codes, types) {
        from.entry(function).or_default().extend(of_code);
    }
    let of_blocks = types.filter(|types| serves_blocks(types));
    let answers = Answers { types, of_blocks };
    let entries = from.into_iter();
    let entries =
        entries.filter_map(|(index, from)| entry(ko, codes, &answers, calls, index, from));
    let mut entries: Vec<Entry> = entries.collect();
    entries.sort_by(|a, b| a.function.cmp(&b.function));
    entries
}

/// Where functions of the module are called from, by their number.
type Origins = BTreeMap<usize, Vec<From>>;

/// Functions that tables of operations point at.
fn from_operations(ko: &Ko<'_>, operations: &[Operations]) -> Origins {
    let mut from = Origins::new();
    for operations in operations {
        let object = ko
            .objects
            .get(operations.object)
            .map_or("", |object| object.name);
        for (offset, to) in &operations.pointers {
            let PointsAt::Function(function) = to else {
                continue;
            };
            let as_what = match (operations.slot(*offset), &operations.layout) {
                (Some(slot), Some(layout)) => format!("{}.{}", layout.name, slot.path),
                _ if object == "__this_module" => "module".to_owned(),
                _ => "unknown structure".to_owned(),
            };
            from.entry(*function).or_default().push(From {
                as_what,
                place: object.to_owned(),
            });
        }
    }
    from
}

/// Functions that code refers to: those that are handed over as call-backs.
fn from_code(ko: &Ko<'_>, codes: &[Code], types: Option<&Btf>) -> Origins {
    let mut from = Origins::new();
    for (caller, code) in codes.iter().enumerate() {
        let referred = code.insns.iter().filter_map(|insn| insn.refers);
        for refers in referred {
            let Place::Here { section, offset } = refers.to else {
                continue;
            };
            let Some(function) = ko.function_at(section, offset) else {
                continue;
            };
            let name = ko
                .functions
                .get(function)
                .map_or("", |function| function.name);
            let calls_it = code
                .calls()
                .any(|(_, callee)| callee == super::code::Callee::Function(function));
            if calls_it && types.is_none_or(|types| types.find_function(name).is_none()) {
                continue;
            }
            if is_branch_target(code, section, offset) {
                continue;
            }
            let as_what = types
                .and_then(|types| callback(types, name))
                .unwrap_or("callback");
            let place = ko
                .functions
                .get(caller)
                .map_or("", |function| function.name);
            from.entry(function).or_default().push(From {
                as_what: as_what.to_owned(),
                place: place.to_owned(),
            });
        }
    }
    from
}

/// What answers for failed calls are known by.
struct Answers<'a> {
    types: Option<&'a Btf>,
    /// The same, of a module that serves block requests.
    of_blocks: Option<&'a Btf>,
}

/// What is known of the function of this number, which is called from elsewhere.
fn entry(
    ko: &Ko<'_>,
    codes: &[Code],
    answers: &Answers<'_>,
    calls: &Calls<'_>,
    index: usize,
    mut from: Vec<From>,
) -> Option<Entry> {
    from.sort();
    from.dedup();
    let function = ko.functions.get(index)?;
    let reached = calls.from(index);
    let atomic = calls.atomic(&reached);
    let no_answer = |types| no_answer(types, function.name);
    let isolation = if ko.is_init_or_exit(function) {
        Isolation::Refused { reason: ONCE }
    } else if !codes.get(index).is_some_and(|code| code.traced) {
        Isolation::Refused { reason: NO_GATE }
    } else if let Some(reason) = answers.of_blocks.and_then(no_answer) {
        Isolation::Refused { reason }
    } else {
        let answer = answers
            .types
            .map(|types| abort_return_named(types, function.name));
        match answer {
            None => Isolation::Refused { reason: NO_TYPES },
            Some(None) => Isolation::Refused { reason: NO_ANSWER },
            Some(Some(_)) => contained(&atomic, calls, &reached),
        }
    };
    Some(Entry {
        function: function.name.to_owned(),
        from,
        atomic,
        isolation,
        reaches: reached.functions.len(),
    })
}

fn contained(atomic: &Atomic, calls: &Calls<'_>, reached: &super::reached::Reached) -> Isolation {
    if *atomic == Atomic::Yes {
        return Isolation::Whole;
    }
    let mut without = calls.of_class(reached, Class::Irrevocable);
    without.extend(calls.of_class(reached, Class::Unknown));
    if without.is_empty() {
        return Isolation::Compensated;
    }
    let count = without.len();
    without.truncate(MAX_NAMES);
    Isolation::Irrevocable {
        calls: without,
        count,
    }
}

/// Whether an instruction that refers to the place branches there.
fn is_branch_target(code: &Code, section: usize, offset: u64) -> bool {
    let wanted = Place::Here { section, offset };
    code.insns.iter().any(|insn| {
        insn.refers.is_some_and(|refers| refers.to == wanted)
            && !matches!(insn.goes, super::code::Goes::Next)
    })
}

/// What a function is called for, by its type.
fn callback(types: &Btf, name: &str) -> Option<&'static str> {
    let function = types.find_function(name)?;
    if types.names_of(function.returns).contains(&"irqreturn_t") {
        return Some("interrupt handler");
    }
    let params: Vec<TypeId> = function.params.iter().map(|param| param.type_id).collect();
    let first = types
        .pointee(*params.first()?)
        .and_then(|to| types.resolve(to))?;
    let Kind::Struct { .. } = first.1 else {
        return None;
    };
    match (types.name(first.0), params.len()) {
        ("work_struct", 1) => Some("work"),
        ("timer_list", 1) => Some("timer"),
        ("tasklet_struct", 1) => Some("tasklet"),
        ("hrtimer", 1) => Some("timer"),
        ("napi_struct", 2) => Some("poll"),
        ("urb", 1) => Some("transfer completed"),
        _ => None,
    }
}
