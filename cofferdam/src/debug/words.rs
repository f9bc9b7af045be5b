//! What an image says, in words: the summary of `cofferdam debug`, and the answers to `monitor`
//! commands of `gdb`.

use std::fmt::Write;

use isolation::domain::roots::Root;
use isolation::fault_image::{FaultImage, FrameKind};
use isolation::guest::phys::GuestPhys;
use serde_json::{Value, json};
use vm_memory::GuestAddress;

use super::types::{called, declaration};
use crate::top::clean;
use crate::words::counted;

/// Most symbols of one name that are listed.
const MAX_SYMBOLS: usize = 64;
/// Most private pages that are listed.
const MAX_PAGES: usize = 1024;
/// Bytes of a page.
const PAGE_BYTES: usize = 4096;
/// Where the kernel's text begins unless it is moved (`CONFIG_PHYSICAL_START`), as its file with
/// symbols has it.
const LINKED_AT: u64 = 0xffff_ffff_8100_0000;

/// What there is to ask for.
const HELP: &str = "\
monitor why               what failed, and how the call had been made
monitor bt                who had called whom, across the crossings
monitor sym ADDRESS|NAME  the symbol at an address, or the addresses of a symbol
monitor type NAME         a structure, union, enumeration, typedef or function of the guest (BTF)
monitor show              what the image holds, and what the call had written
";

/// The answer to a `monitor` command.
pub fn answer(image: &FaultImage, command: &str) -> String {
    let (verb, rest) = command
        .trim()
        .split_once(' ')
        .unwrap_or((command.trim(), ""));
    let rest = rest.trim();
    let text = match (verb, rest) {
        ("why", "") => why(image),
        ("bt", "") => trace(image),
        ("show", "") => show(image),
        ("sym", what) if !what.is_empty() => symbols(image, what),
        ("type", name) if !name.is_empty() => type_of(image, name),
        ("help" | "", _) => HELP.to_owned(),
        _ => format!("There is no such command, or it lacks a word:\n{HELP}"),
    };
    cleaned(&text)
}

/// All there is to say without being asked.
pub fn summary(image: &FaultImage) -> String {
    let text = format!(
        "{}\n{}\nback trace (? is found on the stack, and may be old):\n{}\n{}",
        why(image),
        registers(image),
        trace(image),
        symbol_files(image),
    );
    cleaned(&text)
}

/// The same for programs.
pub fn json(image: &FaultImage) -> Value {
    json!({
        "dir": image.dir(),
        "fault": image.manifest(),
        "trace": image.trace(),
        "private_pages": image.private_pages().collect::<Vec<u64>>(),
        "stored_pages": image.stored_pages(),
    })
}

/// Names in it come from the guest, and must not reach a terminal as something that it obeys.
fn cleaned(text: &str) -> String {
    let mut clean_text = String::with_capacity(text.len());
    for line in text.lines() {
        clean_text.push_str(&clean(line));
        clean_text.push('\n');
    }
    clean_text
}

fn place(image: &FaultImage, address: u64) -> String {
    image.name(address).unwrap_or_else(|| "?".to_owned())
}

/// What failed.
fn why(image: &FaultImage) -> String {
    let manifest = image.manifest();
    let who = match manifest.root {
        Root::Driver => "the driver",
        Root::Kernel => "a kernel function that the driver had called",
    };
    let state = match manifest.returned {
        true => "; the function had returned, and registers are those of its caller",
        false => "",
    };
    let arguments = manifest.called_with.arguments();
    format!(
        "{}\nat {:#x} {}, in {who}{state}\ncall   {}\nguest  Linux {}, module {}; written by {}\n",
        manifest.text,
        manifest.at,
        place(image, manifest.at),
        called(image.types(), &manifest.entry, arguments),
        manifest.kernel,
        manifest.module,
        manifest.program,
    )
}

fn registers(image: &FaultImage) -> String {
    let manifest = image.manifest();
    let mut text = String::new();
    let named = manifest.registers.named();
    for row in named.chunks(3) {
        for (name, value) in row {
            let _ = write!(text, "{name:<6} {value:016x}  ");
        }
        text.push('\n');
    }
    let control = &manifest.control;
    let _ = writeln!(
        text,
        "cr2    {:016x}  cr3    {:016x}  gs     {:016x}",
        control.cr2, control.cr3, control.gs_base
    );
    text
}

/// The back trace.
fn trace(image: &FaultImage) -> String {
    let mut text = String::new();
    for (number, frame) in image.trace().iter().enumerate() {
        let what = match frame.kind {
            FrameKind::Fault => "",
            FrameKind::Found => " ?",
            FrameKind::Crossing => "   <- the driver had called the kernel",
            FrameKind::Callback => "   <- the kernel had called the driver back",
            FrameKind::Caller => "   <- the guest had called the isolated function",
        };
        let _ = writeln!(
            text,
            "#{number:<3} {:#018x} {}{what}",
            frame.address, frame.place
        );
    }
    text
}

/// How `gdb` gets symbols and lines of files, where somebody has them.
fn symbol_files(image: &FaultImage) -> String {
    let manifest = image.manifest();
    let mut text = String::new();
    if let Some(start) = image.symbols().kernel_symbol("_text") {
        let moved = start.at.0.wrapping_sub(LINKED_AT);
        let _ = writeln!(
            text,
            "in gdb, with files that have symbols:\n  symbol-file -o {moved:#x} vmlinux"
        );
    }
    let sections = || manifest.sections.iter();
    if let Some(start) = sections().find(|section| section.name == ".text") {
        let _ = write!(
            text,
            "  add-symbol-file {}.ko {:#x}",
            manifest.module, start.address
        );
        for section in sections().filter(|one| matches!(one.name.as_str(), ".data" | ".bss")) {
            let _ = write!(text, " -s {} {:#x}", section.name, section.address);
        }
        text.push('\n');
    }
    text
}

/// The symbol at an address, or the addresses of a symbol.
fn symbols(image: &FaultImage, what: &str) -> String {
    let digits = what.strip_prefix("0x").unwrap_or(what);
    let mut text = String::new();
    let mut named = image.symbols().named(what).take(MAX_SYMBOLS).peekable();
    if named.peek().is_some() {
        for symbol in named {
            let _ = writeln!(text, "{:#x} {} {symbol}", symbol.at.0, symbol.kind);
        }
        return text;
    }
    match u64::from_str_radix(digits, 16) {
        Ok(address) => match image.name(address) {
            Some(name) => format!("{address:#x} is {name}\n"),
            None => format!("there is no symbol at {address:#x}\n"),
        },
        Err(_) => format!("there is no symbol {what}\n"),
    }
}

fn type_of(image: &FaultImage, name: &str) -> String {
    let Some(types) = image.types() else {
        return "the guest's types are not known\n".to_owned();
    };
    let found = declaration(types, name);
    found.unwrap_or_else(|| format!("there is no type {name}\n"))
}

/// What the image holds.
fn show(image: &FaultImage) -> String {
    let manifest = image.manifest();
    let mut text = format!(
        "{}\nguest memory: {} MiB, {} not zero; {}, {}\n",
        image.dir().display(),
        manifest.memory_bytes() >> 20,
        counted(image.stored_pages(), "page", "pages"),
        counted(image.symbols().len() as u64, "symbol", "symbols"),
        match image.types() {
            Some(_) => "types known",
            None => "types not known",
        },
    );
    for section in &manifest.sections {
        let _ = writeln!(text, "section {:<24} {:#x}", section.name, section.address);
    }
    let pages = image.private_pages();
    let count = pages.len();
    let _ = writeln!(
        text,
        "{} other than the guest's, by physical address:",
        counted(count as u64, "page", "pages")
    );
    for gpa in pages.take(MAX_PAGES) {
        let _ = writeln!(text, "{gpa:#012x} {}", difference(image, gpa));
    }
    if count > MAX_PAGES {
        let _ = writeln!(text, "and {} more", count - MAX_PAGES);
    }
    text
}

/// How a page of the call differs from the guest's.
fn difference(image: &FaultImage, gpa: u64) -> String {
    let read = |memory: &dyn GuestPhys| {
        let mut page = [0; PAGE_BYTES];
        memory
            .read(GuestAddress(gpa), &mut page)
            .map(|()| page)
            .ok()
    };
    let (Some(call), Some(guest)) = (read(image), read(&image.guests())) else {
        return "the guest's cannot be read".to_owned();
    };
    let mut differing = (0..PAGE_BYTES).filter(|at| call.get(*at) != guest.get(*at));
    match differing.next() {
        None => "no bytes differ".to_owned(),
        Some(first) => {
            let count = 1 + differing.count() as u64;
            let bytes = counted(count, "byte differs", "bytes differ");
            format!("{bytes}, the first at {first:#05x}")
        }
    }
}
