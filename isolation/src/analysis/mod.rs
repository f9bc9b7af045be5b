//! What a driver does, read from its module's file before it runs anywhere.
//!
//! ```text
//!   FILE.ko ─► image ─► code ───────────┬─► reached ──► entries ─► what could be isolated
//!              sections  instructions,   │   calls, what waits
//!              symbols   blocks          ├─► flow ─────► findings: loops, indices, lengths, errors
//!                 └────► operations ─────┘   values of registers
//!                        structures by BTF ► power: suspend, resume
//! ```
//!
//! Nothing is run and nothing is written. What is in the file is hostile: numbers and sizes are
//! bounded, and what does not fit is left out. What is not known is said to be unknown rather than
//! guessed.

pub mod arithmetic;
pub mod code;
pub mod coverage;
pub mod device;
pub mod entries;
pub mod errors;
pub mod facts;
pub mod findings;
pub mod flow;
pub mod image;
pub mod kernel;
pub mod loops;
pub mod objects;
pub mod operations;
pub mod power;
pub mod reached;
pub mod search;
pub mod values;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

use crate::guest::btf::Btf;
use code::Code;
use entries::{Entry, Isolation};
use findings::Finding;
use image::{Ko, KoError};
use kernel::{Class, Kernel, Sleeps};
use power::Driver;
use reached::Calls;

/// Most entries that a proposed command names.
const MAX_PROPOSED: usize = 8;

/// What is taken from the kernel or another module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Import {
    /// Its name.
    pub name: String,
    /// What it is.
    pub class: Class,
    /// Whether it waits, if that is known.
    pub sleeps: Option<Sleeps>,
}

/// What there is to say of a module.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Its name.
    pub name: String,
    /// Functions that it has.
    pub functions: usize,
    /// Instructions in them.
    pub instructions: usize,
    /// Whether it has types that fit the kernel's.
    pub types: bool,
    /// Buses of the devices that it is for, by its aliases: `pci`, `usb`.
    pub buses: Vec<String>,
    /// Devices that it is for, as its aliases have them.
    pub aliases: Vec<String>,
    /// Whether it maps or reads registers of a device itself.
    pub registers: bool,
    /// Where the kernel enters it, by risk: the most doubtful first.
    pub entries: Vec<Entry>,
    /// What it takes.
    pub imports: Vec<Import>,
    /// The drivers that it registers.
    pub drivers: Vec<Driver>,
    /// What was found.
    pub findings: Vec<Finding>,
    /// A command that isolates its most doubtful entries, if there are any that could be.
    pub isolate: Option<String>,
}

impl Report {
    /// Whether each of its drivers has a suspend and a resume function; `None` if it has no driver.
    pub fn suspends_and_resumes(&self) -> Option<bool> {
        let all = self
            .drivers
            .iter()
            .all(|driver| driver.suspend.is_some() && driver.resume.is_some());
        (!self.drivers.is_empty()).then_some(all)
    }
}

/// Reads a module and says what it does.
pub fn analyze(file: &[u8], kernel: &Kernel) -> Result<Report, KoError> {
    let ko = Ko::parse(file)?;
    let types = ko
        .types
        .and_then(|types| Btf::parse(types, Some(Arc::clone(&kernel.types))).ok());
    let codes: Vec<Code> = ko
        .functions
        .iter()
        .map(|function| Code::of(&ko, function))
        .collect();
    // Without types of its own the kernel's still say what its structures are.
    let operations = operations::find(
        &ko,
        types.as_ref().unwrap_or(&kernel.types),
        &kernel.operations,
    );
    let calls = Calls::of(&ko, &codes, kernel);
    let mut entries = entries::find(&ko, &codes, types.as_ref(), &operations, &calls);
    let findings = search::find(&ko, &codes, types.as_ref());
    let doubts = doubts(&ko, &calls, &findings);
    entries.sort_by_key(|entry| {
        std::cmp::Reverse(
            doubts
                .get(&entry.function)
                .copied()
                .unwrap_or((0, entry.reaches)),
        )
    });
    let name = ko.name().unwrap_or("?").to_owned();
    Ok(Report {
        isolate: proposed(&name, &entries),
        functions: ko.functions.len(),
        instructions: codes.iter().map(|code| code.insns.len()).sum(),
        types: types.is_some(),
        buses: buses(&ko),
        aliases: ko.info_values("alias").map(str::to_owned).collect(),
        registers: reaches_registers(&ko, &codes),
        imports: imports(&ko, kernel),
        drivers: power::drivers(&ko, &operations),
        name,
        entries,
        findings,
    })
}

/// For each function the findings in what it reaches, and how many functions those are.
fn doubts(
    ko: &Ko<'_>,
    calls: &Calls<'_>,
    findings: &[Finding],
) -> BTreeMap<String, (usize, usize)> {
    let mut found: BTreeMap<&str, usize> = BTreeMap::new();
    for finding in findings {
        *found.entry(&finding.function).or_default() += 1;
    }
    let of = |index: usize| {
        let reached = calls.from(index);
        let names = reached
            .functions
            .keys()
            .filter_map(|index| ko.functions.get(*index));
        let findings = names
            .map(|function| found.get(function.name).copied().unwrap_or(0))
            .sum();
        (findings, reached.functions.len())
    };
    let all = ko.functions.iter().enumerate();
    all.map(|(index, function)| (function.name.to_owned(), of(index)))
        .collect()
}

/// The command for the entries that could be isolated, the most doubtful first.
fn proposed(module: &str, entries: &[Entry]) -> Option<String> {
    let could =
        |entry: &&Entry| matches!(entry.isolation, Isolation::Whole | Isolation::Compensated);
    let names: Vec<&str> = entries
        .iter()
        .filter(could)
        .map(|entry| entry.function.as_str())
        .take(MAX_PROPOSED)
        .collect();
    let list: String = names
        .iter()
        .map(|name| format!(" --entry {name}"))
        .collect();
    (!names.is_empty()).then(|| format!("cofferdam isolate VM {module}{list}"))
}

fn buses(ko: &Ko<'_>) -> Vec<String> {
    let aliases = ko
        .info_values("alias")
        .filter_map(|alias| Some(alias.split_once(':')?.0.to_owned()));
    let mut buses: Vec<String> = aliases.collect();
    buses.sort();
    buses.dedup();
    buses
}

/// Whether it maps registers, reads them by a function, or uses I/O ports.
fn reaches_registers(ko: &Ko<'_>, codes: &[Code]) -> bool {
    use iced_x86::Mnemonic::{In, Insb, Insd, Insw, Out, Outsb, Outsd, Outsw};
    let known = |name: &&str| {
        facts::LINUX.maps_registers.contains(name)
            || facts::LINUX.maps_arrays.contains(name)
            || facts::LINUX.reads_register.contains_key(name)
    };
    let ports = |mnemonic| {
        matches!(
            mnemonic,
            In | Insb | Insd | Insw | Out | Outsb | Outsd | Outsw
        )
    };
    ko.imports.iter().any(known)
        || codes
            .iter()
            .flat_map(|code| &code.insns)
            .any(|insn| ports(insn.i.mnemonic()))
}

fn imports(ko: &Ko<'_>, kernel: &Kernel) -> Vec<Import> {
    let mut imports: Vec<Import> = ko
        .imports
        .iter()
        .map(|name| Import {
            name: (*name).to_owned(),
            class: kernel.class(name),
            sleeps: kernel.sleeps(name),
        })
        .collect();
    imports.sort_by(|a, b| (a.class, &a.name).cmp(&(b.class, &b.name)));
    imports
}

#[cfg(test)]
mod findings_tests;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
