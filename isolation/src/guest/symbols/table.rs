//! Symbols by address and by name.

use std::io::{self, Write};
use std::sync::Arc;

use super::image::TableSymbols;
use super::{KERNEL_IMAGE, Line, MODULES_END};
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::cold::{ColdBytes, ColdRows};
use crate::guest::names::{NameIndex, NameIndexBuilder};

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
        is_code(self.kind)
    }
}

fn is_code(kind: char) -> bool {
    matches!(kind, 't' | 'T' | 'w' | 'W')
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
    base: Option<Arc<SymbolTable>>,
    records: Vec<Record>,
    names: String,
    modules: Vec<String>,
}

impl SymbolTableBuilder {
    /// Collects symbols that come to those of `base`: what modules have, beside the kernel's.
    pub fn above(base: Arc<SymbolTable>) -> Self {
        Self {
            base: Some(base),
            ..Self::default()
        }
    }

    /// Takes one symbol.
    pub fn add(&mut self, line: &Line<'_>) -> Result<(), TooManySymbols> {
        let Self {
            base,
            records,
            names,
            modules,
        } = self;
        let below = base.as_ref().map_or(0, |base| base.len());
        if below + records.len() >= MAX_SYMBOLS || names.len() + line.name.len() > MAX_NAME_BYTES {
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
            base,
            mut records,
            names,
            modules,
        } = self;
        // Stable: of symbols with one address the guest's first one names it.
        records.sort_by_key(|record| record.address);
        let last = Gva(records.last().map_or(0, |record| record.address));
        let names = names.into_bytes();
        let mut by_name = NameIndexBuilder::default();
        let mut rows = Vec::with_capacity(records.len());
        for record in records {
            let from = record.name_at as usize;
            let name = &names[from..from + usize::from(record.name_len)];
            by_name.add(name, rows.len() as u32);
            rows.push(record.row());
        }
        SymbolTable {
            base,
            last,
            by_name: by_name.finish(),
            records: ColdRows::new(rows),
            names: ColdBytes::new(names),
            modules,
        }
    }
}

impl From<TableSymbols> for SymbolTable {
    /// A kernel's symbols as its own tables have them.
    fn from(symbols: TableSymbols) -> Self {
        let (names, rows) = symbols.into_parts();
        let mut records = Vec::with_capacity(rows.len());
        // A plain loop over what is known to be there: builds for tests take a tenth of the time.
        for row in rows {
            records.push(Record {
                address: row.address,
                name_at: row.name_at,
                name_len: row.name_len,
                module: 0,
                kind: row.kind,
            });
        }
        let kernel = SymbolTableBuilder {
            records,
            names,
            ..SymbolTableBuilder::default()
        };
        kernel.finish()
    }
}

/// The guest's symbols.
#[derive(Debug, Default)]
pub struct SymbolTable {
    /// Those that were known before: the kernel's, where the others are of modules.
    base: Option<Arc<SymbolTable>>,
    /// The highest address of a symbol, without those of the base.
    last: Gva,
    /// By address.
    records: ColdRows<RECORD_BYTES>,
    /// Indices into `records`, which are in the order of addresses.
    by_name: NameIndex,
    names: ColdBytes,
    modules: Vec<String>,
}

impl SymbolTable {
    /// `symbol+offset [module]` for addresses of the kernel image and of modules.
    pub fn name_of(&self, va: u64) -> Option<String> {
        if !(KERNEL_IMAGE..MODULES_END).contains(&va) {
            return None;
        }
        let (symbol, offset) = self.lookup(Gva(va))?;
        let module = symbol
            .module
            .map(|module| format!(" [{module}]"))
            .unwrap_or_default();
        Some(format!("{}+{offset:#x}{module}", symbol.name))
    }

    /// The same; a number for any other address.
    pub fn place_of(&self, va: u64) -> String {
        self.name_of(va).unwrap_or_else(|| format!("{va:#x}"))
    }

    /// Gives up the memory of what was looked at until now.
    pub fn cool(&self) {
        self.records.cool();
        self.by_name.cool();
        self.names.cool();
        if let Some(base) = &self.base {
            base.cool();
        }
    }

    /// How many symbols there are.
    pub fn len(&self) -> usize {
        self.layers().map(|layer| layer.records.rows().len()).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All symbols: first those of the base, and of these as of the others those with lower
    /// addresses first.
    pub fn iter(&self) -> impl Iterator<Item = Symbol<'_>> {
        self.layers()
            .flat_map(|layer| layer.records().map(move |record| layer.symbol(&record)))
    }

    /// Writes all symbols, in that order, as [`super::read_kallsyms`] reads them.
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
        let own = self.own_before(at);
        let base = self.base.as_deref().filter(|base| {
            // Modules lie behind the kernel: what is theirs is found without a look at the pages of
            // the kernel's symbols, which are not in memory.
            own.is_none_or(|own| base.last >= own.at)
        });
        let below = base.and_then(|base| base.own_before(at));
        let nearest = match (below, own) {
            (Some(below), Some(own)) if own.at > below.at => own,
            (below, own) => below.or(own)?,
        };
        Some((nearest, at.0 - nearest.at.0))
    }

    /// Where the code is whose name `fits`, of which all are asked about: by the bytes of the name,
    /// which is quicker than by its text.
    pub fn code_where(&self, fits: impl Fn(&[u8]) -> bool) -> Vec<Gva> {
        let mut found = Vec::new();
        for layer in self.layers() {
            for row in layer.records.rows() {
                let record = Record::of(row);
                if is_code(record.kind) && fits(layer.name_bytes(&record)) {
                    found.push(Gva(record.address));
                }
            }
        }
        found
    }

    /// The symbols exactly at `at`, in the guest's order.
    pub fn at(&self, at: Gva) -> impl Iterator<Item = Symbol<'_>> {
        let reaching = self.layers().filter(move |layer| layer.last >= at);
        reaching.flat_map(move |layer| {
            let first = layer.first_where(|address| address >= at.0);
            let behind = layer.first_where(|address| address > at.0);
            let rows = layer.records.rows().get(first..behind);
            let rows = rows.unwrap_or_default().iter();
            rows.map(|row| layer.symbol(&Record::of(row)))
        })
    }

    /// All symbols of this name: static functions of several files or modules may share one.
    pub fn named<'a>(&'a self, name: &str) -> impl Iterator<Item = Symbol<'a>> + use<'a> {
        let name = name.to_owned();
        self.layers().flat_map(move |layer| {
            let name = name.clone();
            let like = layer.by_name.like(name.as_bytes());
            like.filter_map(move |index| {
                let record = layer.record(index as usize)?;
                Some(layer.symbol(&record)).filter(|symbol| symbol.name == name)
            })
        })
    }

    /// The one symbol of this name that the kernel itself has.
    pub fn kernel_symbol(&self, name: &str) -> Option<Symbol<'_>> {
        let mut found = self.named(name).filter(|symbol| symbol.module.is_none());
        found.next().filter(|_| found.next().is_none())
    }

    /// All symbols of one module, by address.
    pub fn in_module<'a>(&'a self, module: &str) -> impl Iterator<Item = Symbol<'a>> + use<'a> {
        let name = module.to_owned();
        self.layers().flat_map(move |layer| {
            let index = layer.modules.iter().position(|known| *known == name);
            // Where it has none, none is looked at.
            index.into_iter().flat_map(move |index| {
                let of_module = move |record: &Record| usize::from(record.module) == index + 1;
                let records = layer.records().filter(of_module);
                records.map(|record| layer.symbol(&record))
            })
        })
    }

    /// The bytes from `at` to the next symbol, but not past the end of `within` (the section).
    /// Padding behind a function counts as its. `None` if `at` is not in `within`.
    pub fn extent(&self, at: Gva, within: GvaRange) -> Option<GvaRange> {
        if !within.contains(at) {
            return None;
        }
        let behind = |layer: &Self| {
            let next = layer.first_where(|address| address > at.0);
            layer.record(next).map(|record| Gva(record.address - 1))
        };
        let reaching = self.layers().filter(|layer| layer.last > at);
        let last = reaching.filter_map(behind).fold(within.last(), Gva::min);
        GvaRange::inclusive(at, last)
    }

    /// The symbol that `at` lies in or right behind, without those of the base.
    fn own_before(&self, at: Gva) -> Option<Symbol<'_>> {
        let behind = self.first_where(|address| address > at.0);
        let address = self.record(behind.checked_sub(1)?)?.address;
        let first = self.first_where(|other| other >= address);
        let record = self.record(first).filter(|record| record.address != 0)?;
        Some(self.symbol(&record))
    }

    /// The base and these.
    fn layers(&self) -> impl Iterator<Item = &Self> {
        // The base of a base is nobody's.
        self.base.as_deref().into_iter().chain([self])
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

    fn name(&self, record: &Record) -> &str {
        // Names were text when they were put away.
        std::str::from_utf8(self.name_bytes(record)).unwrap_or_default()
    }

    fn name_bytes(&self, record: &Record) -> &[u8] {
        let from = record.name_at as usize;
        let bytes = self.names.get(from..from + usize::from(record.name_len));
        bytes.unwrap_or_default()
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
