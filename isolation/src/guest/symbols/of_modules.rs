//! Symbols of the modules that are loaded, as the kernel keeps them for `/proc/kallsyms`: a list of
//! `struct module`s, each with a table of ELF symbols (`struct mod_kallsyms`,
//! include/linux/module.h). Where their members are, the kernel's types say.

use std::sync::Arc;

use super::{Line, SymbolTable, SymbolTableBuilder};
use crate::guest::addr::Gva;
use crate::guest::btf::Btf;
use crate::guest::field::Field;
use crate::guest::paging::VirtMemory;
use crate::guest::phys::GuestPhys;

/// The list's head (kernel/module/main.c).
const LIST: &str = "modules";
/// State of one that is not yet in order (`MODULE_STATE_UNFORMED`).
const UNFORMED: u64 = 3;
/// Most modules that are looked at.
const MAX_MODULES: usize = 4096;
/// Most symbols of a module.
const MAX_SYMBOLS: u64 = 1 << 18;
/// Most bytes that are read of all modules.
const MAX_BYTES: usize = 64 << 20;
/// Longest name of a symbol, in bytes (`KSYM_NAME_LEN`).
const LONGEST_NAME: usize = 512;
/// Longest name of a module that is read, in bytes (`MODULE_NAME_LEN` is 56).
const MODULE_NAME: u64 = 64;
/// Bytes of an `Elf64_Sym`.
const SYMBOL_BYTES: usize = 24;

const UNREADABLE: &str = "its modules are not in its memory";

/// The symbols of all modules that are loaded, above the kernel's.
///
/// # Errors
/// What the kernel lacks, or what of its memory is not as it should be.
pub fn symbols_of_modules<M: GuestPhys>(
    virt: &VirtMemory<'_, M>,
    types: &Btf,
    kernel: &Arc<SymbolTable>,
) -> Result<SymbolTable, &'static str> {
    let layout = Layout::of(types).ok_or("its types do not say what a module is")?;
    let head = kernel.kernel_symbol(LIST);
    let head = head.ok_or("it has not one list of modules")?.at;
    let mut table = SymbolTableBuilder::above(kernel.clone());
    let mut left = MAX_BYTES;
    let mut link = virt.read_u64(head).map_err(|_| UNREADABLE)?;
    for _ in 0..MAX_MODULES {
        if link == head.0 {
            return Ok(table.finish());
        }
        let module = link.checked_sub(layout.list).ok_or(UNREADABLE)?;
        let symbols = Symbols::of(virt, &layout, Gva(module), &mut left).ok_or(UNREADABLE)?;
        symbols
            .add_to(&mut table)
            .ok_or("its modules name too much")?;
        link = virt.read_u64(Gva(link)).map_err(|_| UNREADABLE)?;
    }
    Err("its list of modules has no end")
}

/// Where members are.
struct Layout {
    /// In a `struct module`.
    list: u64,
    state: Field,
    name: u64,
    kallsyms: Field,
    /// In a `struct mod_kallsyms`.
    symbols: Field,
    count: Field,
    strings: Field,
    kinds: Field,
}

impl Layout {
    fn of(types: &Btf) -> Option<Self> {
        let module = types.find_struct("module")?;
        let tables = types.find_struct("mod_kallsyms")?;
        let begin = |name| Some(u64::from(types.find_member(module, name)?.bit_offset / 8));
        let field = |of, name| Field::find(types, of, name);
        Some(Self {
            list: begin("list")?,
            state: field(module, "state")?,
            name: begin("name")?,
            kallsyms: field(module, "kallsyms")?,
            symbols: field(tables, "symtab")?,
            count: field(tables, "num_symtab")?,
            strings: field(tables, "strtab")?,
            kinds: field(tables, "typetab")?,
        })
    }
}

/// What one module has.
#[derive(Default)]
struct Symbols {
    module: String,
    /// `Elf64_Sym`s.
    symbols: Vec<u8>,
    /// The kind of each, a letter.
    kinds: Vec<u8>,
    /// Their names, each up to a zero.
    strings: Vec<u8>,
}

impl Symbols {
    /// Reads no more than `left` bytes, from which those are taken that were read.
    fn of<M: GuestPhys>(
        virt: &VirtMemory<'_, M>,
        layout: &Layout,
        module: Gva,
        left: &mut usize,
    ) -> Option<Self> {
        if layout.state.read(virt, module)? == UNFORMED {
            return Some(Self::default());
        }
        let mut bytes = |at: u64, len: usize| {
            *left = left.checked_sub(len)?;
            virt.read_vec(Gva(at), len).ok()
        };
        let name = bytes(module.0.checked_add(layout.name)?, MODULE_NAME as usize)?;
        let tables = Gva(layout.kallsyms.read(virt, module)?);
        let count = layout.count.read(virt, tables)?;
        let count = usize::try_from(count.min(MAX_SYMBOLS)).ok()?;
        let symbols = bytes(layout.symbols.read(virt, tables)?, count * SYMBOL_BYTES)?;
        let kinds = bytes(layout.kinds.read(virt, tables)?, count)?;
        let last = symbols.as_chunks::<SYMBOL_BYTES>().0.iter();
        let last = last.map(name_at).max().unwrap_or(0);
        // How long the strings are nobody says, and behind the page of the last name there may be
        // nothing.
        let strings_at = layout.strings.read(virt, tables)?;
        let page_end = strings_at.checked_add(last as u64)? | 0xfff;
        let to_page_end = usize::try_from(page_end - strings_at + 1).ok()?;
        let strings = bytes(strings_at, last + LONGEST_NAME);
        let strings = strings.or_else(|| bytes(strings_at, to_page_end))?;
        Some(Self {
            module: text(&name, 0)?.to_owned(),
            symbols,
            kinds,
            strings,
        })
    }

    /// Names that are no text are left out. `None` if there are too many.
    fn add_to(&self, table: &mut SymbolTableBuilder) -> Option<()> {
        let symbols = self.symbols.as_chunks::<SYMBOL_BYTES>().0;
        for (symbol, kind) in symbols.iter().zip(&self.kinds) {
            let name = text(&self.strings, name_at(symbol)).unwrap_or_default();
            if name.is_empty() {
                continue;
            }
            let [_, _, _, _, _, _, _, _, rest @ ..] = symbol;
            let line = Line {
                address: u64::from_le_bytes(*rest.first_chunk()?),
                kind: char::from(*kind),
                name,
                module: Some(&self.module),
            };
            table.add(&line).ok()?;
        }
        Some(())
    }
}

/// Where the name of an `Elf64_Sym` is in the strings (`st_name`).
fn name_at(symbol: &[u8; SYMBOL_BYTES]) -> usize {
    let [a, b, c, d, ..] = *symbol;
    u32::from_le_bytes([a, b, c, d]) as usize
}

/// The text at `at`, up to a zero.
fn text(strings: &[u8], at: usize) -> Option<&str> {
    let rest = strings.get(at..)?;
    let rest = rest.get(..LONGEST_NAME).unwrap_or(rest);
    let len = memchr::memchr(0, rest)?;
    std::str::from_utf8(rest.get(..len)?).ok()
}

#[cfg(test)]
#[path = "of_modules_tests.rs"]
mod tests;
