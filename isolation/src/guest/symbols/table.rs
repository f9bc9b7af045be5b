//! Symbols by address and by name.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Write};

use super::Line;
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::cold::{ColdBytes, ColdRows};

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

/// Bytes of a record in a table.
const RECORD_BYTES: usize = 20;

#[derive(Debug, Clone, Copy)]
struct Record {
    address: u64,
    name_at: u32,
    name_len: u16,
    /// 0 for the kernel, else one more than the index of the module.
    module: u16,
    kind: char,
}

impl Record {
    fn row(self) -> [u8; RECORD_BYTES] {
        let mut row = [0; RECORD_BYTES];
        row[..8].copy_from_slice(&self.address.to_le_bytes());
        row[8..12].copy_from_slice(&self.name_at.to_le_bytes());
        row[12..14].copy_from_slice(&self.name_len.to_le_bytes());
        row[14..16].copy_from_slice(&self.module.to_le_bytes());
        row[16..].copy_from_slice(&u32::from(self.kind).to_le_bytes());
        row
    }

    fn of(row: &[u8; RECORD_BYTES]) -> Self {
        let [a0, a1, a2, a3, a4, a5, a6, a7, rest @ ..] = *row;
        let [n0, n1, n2, n3, l0, l1, m0, m1, k0, k1, k2, k3] = rest;
        Self {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            name_at: u32::from_le_bytes([n0, n1, n2, n3]),
            name_len: u16::from_le_bytes([l0, l1]),
            module: u16::from_le_bytes([m0, m1]),
            kind: char::from_u32(u32::from_le_bytes([k0, k1, k2, k3])).unwrap_or('?'),
        }
    }
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
    records: Vec<Record>,
    names: String,
    modules: Vec<String>,
}

impl SymbolTableBuilder {
    /// Takes one symbol.
    pub fn add(&mut self, line: &Line<'_>) -> Result<(), TooManySymbols> {
        let Self {
            records,
            names,
            modules,
        } = self;
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
        let Self {
            mut records,
            names,
            modules,
        } = self;
        // Stable: of symbols with one address the guest's first one names it.
        records.sort_by_key(|record| record.address);
        let name_of = |index: u32| {
            let record = &records[index as usize];
            let from = record.name_at as usize;
            &names[from..from + usize::from(record.name_len)]
        };
        let indices = 0..records.len() as u32;
        let mut by_name: Vec<_> = indices.map(|i| (hash_of(name_of(i)), i)).collect();
        by_name.sort_unstable();
        let by_name = by_name.into_iter().map(|(_, index)| index);
        SymbolTable {
            by_name: ColdRows::new(by_name.map(u32::to_le_bytes)),
            records: ColdRows::new(records.into_iter().map(Record::row)),
            names: ColdBytes::new(names.into_bytes()),
            modules,
        }
    }
}

/// The guest's symbols.
#[derive(Debug, Default)]
pub struct SymbolTable {
    /// By address.
    records: ColdRows<RECORD_BYTES>,
    /// Indices into `records`, by what their names hash to and then by address.
    by_name: ColdRows<4>,
    names: ColdBytes,
    modules: Vec<String>,
}

impl SymbolTable {
    /// Gives up the memory of what was looked at until now.
    pub fn cool(&self) {
        self.records.cool();
        self.by_name.cool();
        self.names.cool();
    }

    /// How many symbols there are.
    pub fn len(&self) -> usize {
        self.records.rows().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.records.rows().is_empty()
    }

    /// All symbols, by address.
    pub fn iter(&self) -> impl Iterator<Item = Symbol<'_>> {
        self.records().map(|record| self.symbol(&record))
    }

    /// Writes all symbols, by address, as [`super::read_kallsyms`] reads them.
    pub fn write(&self, into: &mut impl Write) -> io::Result<()> {
        for symbol in self.iter() {
            let Symbol {
                at,
                kind,
                name,
                module,
            } = symbol;
            match module {
                Some(module) => writeln!(into, "{:x} {kind} {name}\t[{module}]", at.0)?,
                None => writeln!(into, "{:x} {kind} {name}", at.0)?,
            }
        }
        Ok(())
    }

    /// The symbol that `at` lies in or right behind, and how far behind its start. Of several at
    /// one address the first that the guest listed. Symbols of address 0 (absolute) never match.
    ///
    /// A symbol has no length: what lies behind the last symbol of a module counts as its. Where
    /// that matters use [`SymbolTable::extent`].
    pub fn lookup(&self, at: Gva) -> Option<(Symbol<'_>, u64)> {
        let behind = self.first_where(|address| address > at.0);
        let address = self.record(behind.checked_sub(1)?)?.address;
        let first = self.first_where(|other| other >= address);
        let record = self.record(first).filter(|record| record.address != 0)?;
        Some((self.symbol(&record), at.0 - record.address))
    }

    /// The symbols exactly at `at`, in the guest's order.
    pub fn at(&self, at: Gva) -> impl Iterator<Item = Symbol<'_>> {
        let first = self.first_where(|address| address >= at.0);
        let behind = self.first_where(|address| address > at.0);
        let rows = self.records.rows().get(first..behind);
        let rows = rows.unwrap_or_default().iter();
        rows.map(|row| self.symbol(&Record::of(row)))
    }

    /// All symbols of this name: static functions of several files or modules may share one.
    pub fn named<'a>(&'a self, name: &str) -> impl Iterator<Item = Symbol<'a>> + use<'a> {
        let name_of = |row: &[u8; 4]| self.name_of(u32::from_le_bytes(*row) as usize);
        let rows = self.by_name.rows();
        let hash = hash_of(name);
        let first = rows.partition_point(|row| hash_of(name_of(row)) < hash);
        let alike = rows.get(first..).unwrap_or_default().iter();
        // Others may hash to the same.
        let alike = alike.take_while(move |row| hash_of(name_of(row)) == hash);
        let name = name.to_owned();
        alike.filter_map(move |row| {
            let record = self.record(u32::from_le_bytes(*row) as usize)?;
            Some(self.symbol(&record)).filter(|symbol| symbol.name == name)
        })
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
        self.records()
            .filter(move |record| Some(record.module) == index)
            .map(|record| self.symbol(&record))
    }

    /// The bytes from `at` to the next symbol, but not past the end of `within` (the section).
    /// Padding behind a function counts as its. `None` if `at` is not in `within`.
    pub fn extent(&self, at: Gva, within: GvaRange) -> Option<GvaRange> {
        if !within.contains(at) {
            return None;
        }
        let next = self.first_where(|address| address > at.0);
        let last = match self.record(next) {
            Some(record) => within.last().min(Gva(record.address - 1)),
            None => within.last(),
        };
        GvaRange::inclusive(at, last)
    }

    /// Index of the first record whose address fulfils `is_behind`, as all later ones do.
    fn first_where(&self, is_behind: impl Fn(u64) -> bool) -> usize {
        let rows = self.records.rows();
        rows.partition_point(|row| !is_behind(Record::of(row).address))
    }

    fn record(&self, index: usize) -> Option<Record> {
        self.records.get(index).map(Record::of)
    }

    fn records(&self) -> impl Iterator<Item = Record> {
        self.records.rows().iter().map(Record::of)
    }

    fn name_of(&self, index: usize) -> &str {
        self.record(index).map_or("", |record| self.name(&record))
    }

    fn name(&self, record: &Record) -> &str {
        let from = record.name_at as usize;
        let bytes = self.names.get(from..from + usize::from(record.name_len));
        // Names were text when they were put away.
        std::str::from_utf8(bytes.unwrap_or_default()).unwrap_or_default()
    }

    fn symbol(&self, record: &Record) -> Symbol<'_> {
        Symbol {
            at: Gva(record.address),
            kind: record.kind,
            name: self.name(record),
            module: usize::from(record.module)
                .checked_sub(1)
                .and_then(|index| self.modules.get(index))
                .map(String::as_str),
        }
    }
}

fn hash_of(name: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    hasher.finish()
}
