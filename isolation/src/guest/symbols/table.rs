//! Symbols by address and by name.

use super::Line;
use crate::guest::addr::{Gva, GvaRange};

/// Most symbols a table holds; a Debian kernel with all its modules has about 300,000.
const MAX_SYMBOLS: usize = 4 << 20;

/// Most bytes of names a table holds.
const MAX_NAME_BYTES: usize = 256 << 20;

/// Most modules a table knows.
const MAX_MODULES: usize = 1 << 16;

/// A table is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the guest names an absurd number of symbols; is this /proc/kallsyms?")]
pub struct TooManySymbols;

#[derive(Debug, Clone, Copy)]
struct Record {
    address: u64,
    name_at: u32,
    name_len: u16,
    /// 0 for the kernel, else one more than the index of the module.
    module: u16,
    kind: char,
}

/// A symbol in a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Symbol<'a> {
    /// Where it is.
    pub at: Gva,
    /// Type letter as `nm` prints it: `t` and `T` are code, small letters are local.
    pub kind: char,
    /// The name.
    pub name: &'a str,
    /// The module; `None` for the kernel itself.
    pub module: Option<&'a str>,
}

impl Symbol<'_> {
    /// Whether it names code.
    pub fn is_code(&self) -> bool {
        matches!(self.kind, 't' | 'T' | 'w' | 'W')
    }
}

impl std::fmt::Display for Symbol<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)?;
        self.module
            .map_or(Ok(()), |module| write!(f, " [{module}]"))
    }
}

/// Collects symbols for a table.
#[derive(Debug, Default)]
pub struct SymbolTableBuilder {
    table: SymbolTable,
}

impl SymbolTableBuilder {
    /// Takes one symbol.
    pub fn add(&mut self, line: &Line<'_>) -> Result<(), TooManySymbols> {
        let SymbolTable {
            records,
            names,
            modules,
            ..
        } = &mut self.table;
        if records.len() >= MAX_SYMBOLS || names.len() + line.name.len() > MAX_NAME_BYTES {
            return Err(TooManySymbols);
        }
        let module = match line.module {
            None => 0,
            // The list is grouped by module: look at the latest first.
            Some(name) => match modules.iter().rposition(|known| known == name) {
                Some(index) => index + 1,
                None if modules.len() >= MAX_MODULES - 1 => return Err(TooManySymbols),
                None => {
                    modules.push(name.to_owned());
                    modules.len()
                }
            },
        };
        let record = Record {
            address: line.address,
            name_at: names.len() as u32,
            name_len: u16::try_from(line.name.len()).map_err(|_| TooManySymbols)?,
            module: module as u16,
            kind: line.kind,
        };
        names.push_str(line.name);
        records.push(record);
        Ok(())
    }

    /// Sorts what was collected.
    pub fn finish(self) -> SymbolTable {
        let mut table = self.table;
        // Stable: of symbols with one address the guest's first one names it.
        table.records.sort_by_key(|record| record.address);
        let mut by_name: Vec<u32> = (0..table.records.len() as u32).collect();
        by_name.sort_by(|a, b| table.name_of(*a as usize).cmp(table.name_of(*b as usize)));
        table.by_name = by_name;
        table
    }
}

/// The guest's symbols.
#[derive(Debug, Default, Clone)]
pub struct SymbolTable {
    /// By address.
    records: Vec<Record>,
    /// Indices into `records`, by name and then by address.
    by_name: Vec<u32>,
    names: String,
    modules: Vec<String>,
}

impl SymbolTable {
    /// How many symbols there are.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// All symbols, by address.
    pub fn iter(&self) -> impl Iterator<Item = Symbol<'_>> {
        self.records.iter().map(|record| self.symbol(record))
    }

    /// The symbol that `at` lies in or right behind, and how far behind its start. Of several at
    /// one address the first that the guest listed. Symbols of address 0 (absolute) never match.
    ///
    /// A symbol has no length: what lies behind the last symbol of a module counts as its. Where
    /// that matters use [`SymbolTable::extent`].
    pub fn lookup(&self, at: Gva) -> Option<(Symbol<'_>, u64)> {
        let behind = self
            .records
            .partition_point(|record| record.address <= at.0);
        let address = self.records.get(behind.checked_sub(1)?)?.address;
        let first = self
            .records
            .partition_point(|record| record.address < address);
        let record = self
            .records
            .get(first)
            .filter(|record| record.address != 0)?;
        Some((self.symbol(record), at.0 - record.address))
    }

    /// The symbols exactly at `at`, in the guest's order.
    pub fn at(&self, at: Gva) -> impl Iterator<Item = Symbol<'_>> {
        let first = self.records.partition_point(|record| record.address < at.0);
        let behind = self
            .records
            .partition_point(|record| record.address <= at.0);
        self.records[first..behind]
            .iter()
            .map(|record| self.symbol(record))
    }

    /// All symbols of this name: static functions of several files or modules may share one.
    pub fn named<'a>(&'a self, name: &str) -> impl Iterator<Item = Symbol<'a>> + use<'a> {
        let name_of = |index: &u32| self.name_of(*index as usize);
        let first = self.by_name.partition_point(|index| name_of(index) < name);
        let behind = self.by_name.partition_point(|index| name_of(index) <= name);
        self.by_name[first..behind]
            .iter()
            .map(|index| self.symbol(&self.records[*index as usize]))
    }

    /// The one symbol of this name that the kernel itself has.
    pub fn kernel_symbol(&self, name: &str) -> Option<Symbol<'_>> {
        let mut found = self.named(name).filter(|symbol| symbol.module.is_none());
        found.next().filter(|_| found.next().is_none())
    }

    /// All symbols of one module, by address.
    pub fn in_module<'a>(&'a self, module: &str) -> impl Iterator<Item = Symbol<'a>> + use<'a> {
        let index = self
            .modules
            .iter()
            .position(|known| known == module)
            .map(|i| i as u16 + 1);
        self.records
            .iter()
            .filter(move |record| Some(record.module) == index)
            .map(|record| self.symbol(record))
    }

    /// The bytes from `at` to the next symbol, but not past the end of `within` (the section).
    /// Padding behind a function counts as its. `None` if `at` is not in `within`.
    pub fn extent(&self, at: Gva, within: GvaRange) -> Option<GvaRange> {
        if !within.contains(at) {
            return None;
        }
        let next = self
            .records
            .partition_point(|record| record.address <= at.0);
        let last = match self.records.get(next) {
            Some(record) => within.last().min(Gva(record.address - 1)),
            None => within.last(),
        };
        GvaRange::inclusive(at, last)
    }

    fn name_of(&self, index: usize) -> &str {
        let record = &self.records[index];
        let from = record.name_at as usize;
        &self.names[from..from + usize::from(record.name_len)]
    }

    fn symbol(&self, record: &Record) -> Symbol<'_> {
        let from = record.name_at as usize;
        Symbol {
            at: Gva(record.address),
            kind: record.kind,
            name: &self.names[from..from + usize::from(record.name_len)],
            module: usize::from(record.module)
                .checked_sub(1)
                .map(|i| self.modules[i].as_str()),
        }
    }
}
