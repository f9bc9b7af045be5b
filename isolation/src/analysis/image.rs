//! A reader of kernel modules as files: relocatable ELF objects for x86-64 (System V ABI, ELF-64
//! object file format).
//!
//! The file may be anybody's. Every offset is checked by the ELF reader, numbers of things are
//! bounded here, and what does not fit together (a symbol outside its section, a relocation of a
//! symbol that is not there) is left out or is an error.

use std::collections::HashMap;

use object::elf::{SHF_EXECINSTR, SHF_WRITE};
use object::read::elf::{ElfFile64, ElfSection64};
use object::{
    Architecture, LittleEndian, Object, ObjectKind, ObjectSection, ObjectSymbol, RelocationFlags,
    RelocationTarget, SectionFlags, SectionIndex, SymbolKind, SymbolSection,
};

/// Largest file that is read, in bytes. The largest module of Debian's kernel has 8 MiB.
pub const MAX_FILE: usize = 128 << 20;
/// Most sections.
const MAX_SECTIONS: usize = 1 << 16;
/// Most symbols.
const MAX_SYMBOLS: usize = 1 << 20;
/// Most relocations of sections that are looked at.
const MAX_RELOCATIONS: usize = 4 << 20;
/// Most text that is decoded, in bytes.
const MAX_TEXT: u64 = 16 << 20;
/// Longest name (`KSYM_NAME_LEN`).
const MAX_NAME: usize = 512;

/// Why a file is not read as a module.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KoError {
    /// Too large.
    #[error("the file has {0} bytes, a module has at most {MAX_FILE}")]
    TooLarge(usize),
    /// Not ELF, or damaged.
    #[error("the file cannot be read as ELF: {0}")]
    Elf(String),
    /// Another kind of ELF file.
    #[error(
        "this is no kernel module for x86-64: it is no relocatable ELF object of that processor"
    )]
    NotModule,
    /// Too many of something.
    #[error("the file has more {0} than any module")]
    TooMany(&'static str),
    /// No code.
    #[error("the file has no functions: is its symbol table stripped?")]
    NoFunctions,
}

/// What a section holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holds {
    /// Code.
    Text,
    /// Constants or variables.
    Data,
    /// Anything else: debugging information, notes, tables for the loader.
    Other,
}

/// A section.
#[derive(Debug)]
pub struct Section<'a> {
    /// Its name.
    pub name: &'a str,
    /// What it holds.
    pub holds: Holds,
    /// Its bytes; none for `.bss`.
    pub bytes: &'a [u8],
    /// Its relocations by offset, if it holds text or data.
    pub relocations: Vec<Relocation>,
}

/// How a relocation is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// Relative to the place (`R_X86_64_PC32`, `R_X86_64_PLT32`).
    Relative,
    /// As an address (`R_X86_64_64`, `_32`, `_32S`).
    Absolute,
}

/// A relocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Relocation {
    /// Offset in its section.
    pub at: u64,
    /// How it is applied.
    pub applied: Applied,
    /// What it refers to, without what the instruction adds.
    pub to: Place,
    /// What is added.
    pub addend: i64,
}

/// What a relocation refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    /// An offset in a section, by its index in [`Ko::sections`].
    Here {
        /// The section.
        section: usize,
        /// The offset.
        offset: u64,
    },
    /// A symbol of the kernel or of another module, by its index in [`Ko::imports`].
    Import(usize),
}

/// A function of the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function<'a> {
    /// Its name.
    pub name: &'a str,
    /// Index of its section.
    pub section: usize,
    /// Offset of its first byte.
    pub start: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// A named object in a section of data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataObject<'a> {
    /// Its name.
    pub name: &'a str,
    /// Index of its section.
    pub section: usize,
    /// Offset of its first byte.
    pub start: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// A module's file.
#[derive(Debug)]
pub struct Ko<'a> {
    /// Its sections.
    pub sections: Vec<Section<'a>>,
    /// Its functions, by section and offset. Of several at one place one.
    pub functions: Vec<Function<'a>>,
    /// Its named data, by section and offset.
    pub objects: Vec<DataObject<'a>>,
    /// Names of what it takes from the kernel and from other modules.
    pub imports: Vec<&'a str>,
    /// Names of what it offers to other modules (`EXPORT_SYMBOL`).
    pub exports: Vec<&'a str>,
    /// `name=value` pairs of `.modinfo`, in their order.
    pub info: Vec<(&'a str, &'a str)>,
    /// Raw `.BTF`, if it has types.
    pub types: Option<&'a [u8]>,
}

type Elf<'a> = ElfFile64<'a, LittleEndian>;

impl<'a> Ko<'a> {
    /// Reads a module.
    pub fn parse(file: &'a [u8]) -> Result<Self, KoError> {
        if file.len() > MAX_FILE {
            return Err(KoError::TooLarge(file.len()));
        }
        let elf = Elf::parse(file).map_err(|error| KoError::Elf(error.to_string()))?;
        if elf.architecture() != Architecture::X86_64 || elf.kind() != ObjectKind::Relocatable {
            return Err(KoError::NotModule);
        }
        let mut ko = Self {
            sections: Vec::new(),
            functions: Vec::new(),
            objects: Vec::new(),
            imports: Vec::new(),
            exports: Vec::new(),
            info: Vec::new(),
            types: None,
        };
        let index_of = ko.read_sections(&elf)?;
        let places = ko.read_symbols(&elf, &index_of)?;
        ko.read_relocations(&elf, &index_of, &places)?;
        if ko.functions.is_empty() {
            return Err(KoError::NoFunctions);
        }
        Ok(ko)
    }

    /// Indices of sections as the file numbers them, to those in `sections`.
    fn read_sections(&mut self, elf: &Elf<'a>) -> Result<HashMap<SectionIndex, usize>, KoError> {
        let mut index_of = HashMap::new();
        for section in elf.sections() {
            if self.sections.len() >= MAX_SECTIONS {
                return Err(KoError::TooMany("sections"));
            }
            let name = section.name().unwrap_or_default();
            // Zero-filled sections have none; what lies outside the file is taken for empty.
            let bytes = section.data().unwrap_or_default();
            match name {
                ".modinfo" => self.info = pairs(bytes),
                ".BTF" => self.types = Some(bytes),
                _ => {}
            }
            index_of.insert(section.index(), self.sections.len());
            self.sections.push(Section {
                name,
                holds: holds(name, &section),
                bytes,
                relocations: Vec::new(),
            });
        }
        Ok(index_of)
    }

    /// Where each symbol is, by its number in the file.
    fn read_symbols(
        &mut self,
        elf: &Elf<'a>,
        index_of: &HashMap<SectionIndex, usize>,
    ) -> Result<HashMap<usize, Place>, KoError> {
        let mut places = HashMap::new();
        for symbol in elf.symbols() {
            if places.len() >= MAX_SYMBOLS {
                return Err(KoError::TooMany("symbols"));
            }
            let name = symbol.name().unwrap_or_default();
            if name.len() > MAX_NAME {
                continue;
            }
            let section = match symbol.section() {
                SymbolSection::Undefined if !name.is_empty() => {
                    places.insert(symbol.index().0, Place::Import(self.imports.len()));
                    self.imports.push(name);
                    continue;
                }
                SymbolSection::Section(index) => index_of.get(&index).copied(),
                _ => None,
            };
            let Some(section) = section else { continue };
            let start = symbol.address();
            places.insert(
                symbol.index().0,
                Place::Here {
                    section,
                    offset: start,
                },
            );
            self.add_symbol(name, symbol.kind(), section, start, symbol.size());
        }
        self.functions
            .sort_by_key(|f| (f.section, f.start, u64::MAX - f.len));
        self.functions.dedup_by_key(|f| (f.section, f.start));
        self.objects
            .sort_by_key(|o| (o.section, o.start, u64::MAX - o.len));
        let text = self
            .functions
            .iter()
            .fold(0u64, |sum, f| sum.saturating_add(f.len));
        if text > MAX_TEXT {
            return Err(KoError::TooMany("bytes of text"));
        }
        Ok(places)
    }

    fn add_symbol(
        &mut self,
        name: &'a str,
        kind: SymbolKind,
        section: usize,
        start: u64,
        len: u64,
    ) {
        if let Some(exported) = name.strip_prefix("__ksymtab_") {
            self.exports.push(exported);
            return;
        }
        let Some(holder) = self.sections.get(section) else {
            return;
        };
        let inside = start
            .checked_add(len)
            .is_some_and(|end| end <= holder.bytes.len() as u64);
        match (kind, holder.holds) {
            (SymbolKind::Text, Holds::Text) if inside && len > 0 => {
                self.functions.push(Function {
                    name,
                    section,
                    start,
                    len,
                });
            }
            (SymbolKind::Data, Holds::Data) if len > 0 => {
                self.objects.push(DataObject {
                    name,
                    section,
                    start,
                    len,
                });
            }
            _ => {}
        }
    }

    fn read_relocations(
        &mut self,
        elf: &Elf<'a>,
        index_of: &HashMap<SectionIndex, usize>,
        places: &HashMap<usize, Place>,
    ) -> Result<(), KoError> {
        let mut left = MAX_RELOCATIONS;
        for section in elf.sections() {
            let Some(holder) = index_of
                .get(&section.index())
                .and_then(|i| self.sections.get_mut(*i))
            else {
                continue;
            };
            if holder.holds == Holds::Other {
                continue;
            }
            for (at, relocation) in section.relocations() {
                left = left.checked_sub(1).ok_or(KoError::TooMany("relocations"))?;
                let RelocationTarget::Symbol(symbol) = relocation.target() else {
                    continue;
                };
                let applied = match relocation.flags() {
                    RelocationFlags::Elf { r_type } if matches!(r_type.0, 2 | 4) => {
                        Applied::Relative
                    }
                    RelocationFlags::Elf { r_type } if matches!(r_type.0, 1 | 10 | 11) => {
                        Applied::Absolute
                    }
                    _ => continue,
                };
                let Some(to) = places.get(&symbol.0).copied() else {
                    continue;
                };
                let addend = relocation.addend();
                holder.relocations.push(Relocation {
                    at,
                    applied,
                    to,
                    addend,
                });
            }
            holder.relocations.sort_by_key(|relocation| relocation.at);
        }
        Ok(())
    }

    /// The module's name, as `lsmod` shows it.
    pub fn name(&self) -> Option<&'a str> {
        self.info_values("name").next()
    }

    /// All values of a name in `.modinfo`.
    pub fn info_values(&self, wanted: &str) -> impl Iterator<Item = &'a str> {
        self.info
            .iter()
            .filter(move |(name, _)| *name == wanted)
            .map(|(_, value)| *value)
    }

    /// The function that begins at this place.
    pub fn function_at(&self, section: usize, start: u64) -> Option<usize> {
        self.functions
            .binary_search_by_key(&(section, start), |f| (f.section, f.start))
            .ok()
    }

    /// The function that this place lies in.
    pub fn function_around(&self, section: usize, offset: u64) -> Option<usize> {
        let behind = self
            .functions
            .partition_point(|f| (f.section, f.start) <= (section, offset));
        let index = behind.checked_sub(1)?;
        let function = self.functions.get(index)?;
        let inside = function.section == section && offset - function.start < function.len;
        inside.then_some(index)
    }

    /// The named data that this place lies in.
    pub fn object_around(&self, section: usize, offset: u64) -> Option<usize> {
        let behind = self
            .objects
            .partition_point(|o| (o.section, o.start) <= (section, offset));
        let index = behind.checked_sub(1)?;
        let object = self.objects.get(index)?;
        let inside = object.section == section && offset - object.start < object.len;
        inside.then_some(index)
    }

    /// The relocations of a section that begin in `len` bytes from `start`.
    pub fn relocations_in(&self, section: usize, start: u64, len: u64) -> &[Relocation] {
        let all = self
            .sections
            .get(section)
            .map_or(&[][..], |section| &section.relocations);
        let first = all.partition_point(|relocation| relocation.at < start);
        let behind = all.partition_point(|relocation| relocation.at < start.saturating_add(len));
        all.get(first..behind).unwrap_or_default()
    }

    /// The bytes of a function.
    pub fn code(&self, function: &Function<'_>) -> &'a [u8] {
        let bytes = self
            .sections
            .get(function.section)
            .map_or(&[][..], |section| section.bytes);
        let range = usize::try_from(function.start)
            .ok()
            .zip(usize::try_from(function.len).ok());
        range
            .and_then(|(start, len)| bytes.get(start..start.checked_add(len)?))
            .unwrap_or_default()
    }

    /// Whether the function goes away when the module has been loaded, or is there for its end
    /// only.
    pub fn is_init_or_exit(&self, function: &Function<'_>) -> bool {
        let name = self
            .sections
            .get(function.section)
            .map_or("", |section| section.name);
        name.starts_with(".init") || name.starts_with(".exit")
    }
}

fn holds(name: &str, section: &ElfSection64<'_, '_, LittleEndian>) -> Holds {
    let SectionFlags::Elf { sh_flags, .. } = section.flags() else {
        return Holds::Other;
    };
    let is_data = [".data", ".rodata", ".bss", ".init.data", ".exit.data"];
    // Patched in by the kernel where a processor asks for it: no functions.
    if name == ".altinstr_replacement" || name == ".altinstr_aux" {
        Holds::Other
    } else if sh_flags.0 & SHF_EXECINSTR.0 != 0 {
        Holds::Text
    } else if is_data.iter().any(|data| name.starts_with(data))
        || (sh_flags.0 & SHF_WRITE.0 != 0 && name.starts_with(".gnu.linkonce"))
    {
        Holds::Data
    } else {
        Holds::Other
    }
}

/// Zero-terminated `name=value` texts.
fn pairs(bytes: &[u8]) -> Vec<(&str, &str)> {
    let texts = bytes
        .split(|byte| *byte == 0)
        .filter_map(|text| std::str::from_utf8(text).ok());
    texts.filter_map(|text| text.split_once('=')).collect()
}
