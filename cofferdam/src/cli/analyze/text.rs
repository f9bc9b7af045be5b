//! What there is to say of a module, for a person.

use std::fmt::Write as _;

use isolation::analysis::Report;
use isolation::analysis::entries::{Entry, Isolation};
use isolation::analysis::findings::FindingKind;
use isolation::analysis::kernel::{Class, Sleeps};
use isolation::analysis::reached::Atomic;

use crate::words::counted;

/// Most names of one class that are shown.
const MAX_SHOWN: usize = 10;

/// All of it.
pub fn of(report: &Report) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write_all(report, &mut text);
    text
}

fn write_all(report: &Report, text: &mut String) -> std::fmt::Result {
    write_module(report, text)?;
    write_entries(report, text)?;
    write_imports(report, text)?;
    write_findings(report, text)?;
    match &report.isolate {
        Some(command) => writeln!(
            text,
            "\nTo isolate the most doubtful entries that could be:\n  {command}"
        ),
        None => writeln!(
            text,
            "\nNo entry could be isolated so that its failed calls are taken back."
        ),
    }
}

/// What the module is and what it drives.
fn write_module(report: &Report, text: &mut String) -> std::fmt::Result {
    let types = if report.types {
        "with types"
    } else {
        "without types that fit the kernel's"
    };
    let (functions, instructions) = (report.functions, report.instructions);
    writeln!(
        text,
        "{}: {functions} functions, {instructions} instructions, {types}",
        report.name
    )?;
    if !report.buses.is_empty() {
        writeln!(text, "for devices on: {}", report.buses.join(", "))?;
    }
    for driver in &report.drivers {
        let said =
            |function: &Option<String>| function.clone().unwrap_or_else(|| "none".to_owned());
        let (suspend, resume) = (said(&driver.suspend), said(&driver.resume));
        writeln!(
            text,
            "{} {}: suspend {suspend}, resume {resume}",
            driver.structure, driver.object
        )?;
    }
    if report.drivers.is_empty() {
        writeln!(
            text,
            "registers no driver of devices: nothing to suspend or resume"
        )?;
    }
    Ok(())
}

fn write_entries(report: &Report, text: &mut String) -> std::fmt::Result {
    writeln!(text, "\nEntries, the most doubtful first:")?;
    for entry in report.entries.iter().filter(|entry| !entry.runs_once()) {
        writeln!(text, "  {} ({})", entry.function, origins(entry))?;
        writeln!(text, "      atomic: {}", atomic(&entry.atomic))?;
        writeln!(text, "      isolation: {}", isolation(&entry.isolation))?;
    }
    Ok(())
}

fn write_imports(report: &Report, text: &mut String) -> std::fmt::Result {
    writeln!(text, "\nTaken from the kernel and other modules:")?;
    for (class, name) in CLASSES {
        let of_class = report
            .imports
            .iter()
            .filter(|import| import.class == *class);
        let names: Vec<String> = of_class
            .map(|import| match import.sleeps {
                Some(Sleeps::Yes) => format!("{}*", import.name),
                _ => import.name.clone(),
            })
            .collect();
        if !names.is_empty() {
            let more = names.len().saturating_sub(MAX_SHOWN);
            let mut list = names
                .into_iter()
                .take(MAX_SHOWN)
                .collect::<Vec<_>>()
                .join(", ");
            if more > 0 {
                let _ = write!(list, " and {more} more");
            }
            writeln!(text, "  {name}: {list}")?;
        }
    }
    writeln!(text, "  (* may have to wait)")
}

fn write_findings(report: &Report, text: &mut String) -> std::fmt::Result {
    writeln!(
        text,
        "\n{}",
        counted(report.findings.len() as u64, "finding", "findings")
    )?;
    for kind in FindingKind::ALL {
        for finding in report
            .findings
            .iter()
            .filter(|finding| finding.kind == kind)
        {
            writeln!(
                text,
                "  {}+{:#x}: {}: {}",
                finding.function,
                finding.offset,
                kind.words(),
                finding.what
            )?;
        }
    }
    Ok(())
}

/// What the classes are called.
const CLASSES: &[(Class, &str)] = &[
    (Class::Pure, "pure"),
    (Class::Memory, "memory"),
    (Class::Hardware, "hardware"),
    (Class::Revocable, "has an opposite, or can be deferred"),
    (Class::Irrevocable, "irrevocable"),
    (Class::Unknown, "not in the model"),
    (Class::Variable, "variables"),
];

/// Where an entry is known from.
pub fn origins(entry: &Entry) -> String {
    let from = entry
        .from
        .iter()
        .map(|from| format!("{} in {}", from.as_what, from.place));
    from.take(MAX_SHOWN).collect::<Vec<_>>().join(", ")
}

/// Whether an entry waits.
pub fn atomic(atomic: &Atomic) -> String {
    match atomic {
        Atomic::Yes => "yes".to_owned(),
        Atomic::No { way, calls } => format!("no: {} calls {calls}", way.join(" > ")),
        Atomic::Unclear {
            indirect,
            may,
            unknown,
        } => {
            let mut reasons = Vec::new();
            if *indirect > 0 {
                reasons.push(counted(
                    *indirect as u64,
                    "call through a pointer",
                    "calls through pointers",
                ));
            }
            let mut list = |what: &str, names: &[String]| {
                if !names.is_empty() {
                    let shown = names
                        .iter()
                        .take(MAX_SHOWN)
                        .cloned()
                        .collect::<Vec<_>>()
                        .join(", ");
                    reasons.push(format!("{what} {shown}"));
                }
            };
            list("waiting on some ways:", may);
            list("not known:", unknown);
            format!("unclear: {}", reasons.join("; "))
        }
    }
}

/// What isolation would do with it.
pub fn isolation(isolation: &Isolation) -> String {
    match isolation {
        Isolation::Refused { reason } => format!("no: {reason}"),
        Isolation::Whole => "a failed call is taken back as a whole".to_owned(),
        Isolation::Compensated => {
            "a failed call is taken back, by opposites once it has waited".to_owned()
        }
        Isolation::Irrevocable { calls, count } => {
            let shown = calls.iter().take(4).cloned().collect::<Vec<_>>().join(", ");
            let more = count.saturating_sub(4);
            let more = if more > 0 {
                format!(" and {more} more")
            } else {
                String::new()
            };
            format!(
                "yes, but the driver is restarted if it fails behind a wait in which it called {shown}{more}"
            )
        }
    }
}
