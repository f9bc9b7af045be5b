//! Where a loaded module lies in the guest's memory, and which of its functions can be gated.
//!
//! Section addresses come from `/sys/module/NAME/sections` through the agent, sizes from the
//! module's file if the host has it. Neither is believed: text has to be mapped executable and not
//! writable, data the other way round, and the file has to carry the build id that is in memory.

use object::{Object, ObjectSection, ObjectSymbol, SymbolKind};
use serde::Serialize;

use super::addr::{Gva, GvaRange};
use super::gate::{self, GateSite, NoGate};
use super::module_text::{TextPart, TextScan, TextTooLarge};
use super::paging::{VirtError, VirtMemory, WalkError};
use super::phys::GuestPhys;
use super::symbols::SymbolTable;

/// Most sections a module may have.
const MAX_SECTIONS: usize = 4096;

/// Most pages a section may have: 64 MiB.
const MAX_SECTION_PAGES: u64 = 1 << 14;

/// Section that holds the build id (an ELF note).
const BUILD_ID: &str = ".note.gnu.build-id";

/// A section of a loaded module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Section {
    /// Its name, as in the module's file.
    pub name: String,
    /// Where it lies. Without the module's file the end is that of the last page with the same
    /// rights, or the byte before the next section.
    pub range: GvaRange,
    /// Instructions can be fetched from it.
    pub executable: bool,
    /// It can be written.
    pub writable: bool,
}

/// Why a module's layout cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// Nothing to go by.
    #[error("the guest reports no sections for module {0}; is it loaded, and is the agent root?")]
    NoSections(String),
    /// More than is sane.
    #[error("the guest reports {0} sections for one module")]
    TooManySections(usize),
    /// Text that is not mapped as text.
    #[error("section {section} of the module is not mapped as executable, read-only text")]
    NotText {
        /// Its name.
        section: String,
    },
    /// The file is no ELF file.
    #[error("the module's file cannot be read: {0}")]
    File(#[from] object::Error),
    /// The file belongs to another build.
    #[error("the module's file is not the one that is loaded (build ids differ)")]
    OtherBuild,
    /// Memory that should be there is not.
    #[error(transparent)]
    Memory(#[from] VirtError),
    /// More text than is sane.
    #[error(transparent)]
    TooLarge(#[from] TextTooLarge),
}

/// A loaded module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ModuleLayout {
    /// Its name, as in `/proc/modules`.
    pub name: String,
    /// Its sections, by address. Those of initialisation are not among them: they are gone.
    pub sections: Vec<Section>,
    /// Functions in the file's sections of initialisation; unknown without the file.
    gone: Vec<String>,
}

impl ModuleLayout {
    /// From section names and addresses as the guest reports them, and the page tables in `virt`.
    /// With the module's `file` (`.ko`) the sections' exact sizes are known.
    pub fn new<M: GuestPhys>(
        name: &str,
        reported: &[(String, u64)],
        file: Option<&[u8]>,
        virt: &VirtMemory<'_, M>,
    ) -> Result<Self, ModuleError> {
        if reported.len() > MAX_SECTIONS {
            return Err(ModuleError::TooManySections(reported.len()));
        }
        let file = file.map(object::File::parse).transpose()?;
        let mut starts: Vec<(Gva, &str)> = reported
            .iter()
            .map(|(name, at)| (Gva(*at), name.as_str()))
            .filter(|(_, name)| stays(name))
            .collect();
        starts.sort_unstable();
        let mut layout = Self {
            name: name.to_owned(),
            sections: Vec::new(),
            gone: Vec::new(),
        };
        for (index, (at, section)) in starts.iter().enumerate() {
            let next = starts[index + 1..]
                .iter()
                .map(|(next, _)| *next)
                .find(|next| next > at);
            let size = file.as_ref().map(|file| size_in(file, section));
            if let Some(section) = place(section, *at, next, size, virt) {
                layout.sections.push(section);
            }
        }
        if layout.sections.is_empty() {
            return Err(ModuleError::NoSections(name.to_owned()));
        }
        if let Some(section) = layout
            .sections
            .iter()
            .find(|s| is_text(&s.name) && !s.is_text())
        {
            return Err(ModuleError::NotText {
                section: section.name.clone(),
            });
        }
        if let Some(file) = file {
            layout.check_build(&file, virt)?;
            layout.gone = init_functions(&file);
        }
        Ok(layout)
    }

    /// The sections that hold code.
    pub fn text(&self) -> impl Iterator<Item = &Section> {
        self.sections.iter().filter(|section| section.is_text())
    }

    /// The sections that hold the module's variables. What the kernel keeps in a module for itself
    /// (`.gnu.linkonce.this_module`, `__bug_table`, ...) is writable too, but not among them.
    pub fn data(&self) -> impl Iterator<Item = &Section> {
        let is_data = |section: &&Section| {
            let name = section.name.as_str();
            let variables = [".data", ".bss", ".ref.data", ".exit.data"];
            section.writable && !section.executable && variables.iter().any(|v| name.starts_with(v))
        };
        self.sections.iter().filter(is_data)
    }

    /// The section that `at` lies in.
    pub fn section_at(&self, at: Gva) -> Option<&Section> {
        self.sections
            .iter()
            .find(|section| section.range.contains(at))
    }

    /// The module's text as it is in memory now.
    pub fn read_text<M: GuestPhys>(
        &self,
        virt: &VirtMemory<'_, M>,
    ) -> Result<ModuleText, ModuleError> {
        let read = |section: &Section| {
            let len = usize::try_from(section.range.len_bytes()).unwrap_or(usize::MAX);
            let bytes = virt.read_vec(section.range.first(), len)?;
            Ok((section.range.first(), bytes))
        };
        let parts: Result<Vec<_>, VirtError> = self.text().map(read).collect();
        Ok(ModuleText { parts: parts? })
    }

    /// Where a gate for the function `name` goes, or why there can be none.
    pub fn find_gate(
        &self,
        name: &str,
        text: &ModuleText,
        scan: &TextScan,
        symbols: &SymbolTable,
    ) -> Result<GateSite, NoGate> {
        let of_module =
            |s: &super::symbols::Symbol<'_>| s.is_code() && s.module == Some(self.name.as_str());
        let found: Vec<_> = symbols.named(name).filter(of_module).collect();
        match found.as_slice() {
            [] if self.gone.iter().any(|gone| gone == name) => Err(NoGate::InitText),
            [] => Err(NoGate::NotFound),
            [symbol] => self.gate_at(symbol.at, text, scan, symbols),
            many => Err(NoGate::Ambiguous { count: many.len() }),
        }
    }

    /// Where a gate for the function at `function` goes, or why there can be none.
    pub fn gate_at(
        &self,
        function: Gva,
        text: &ModuleText,
        scan: &TextScan,
        symbols: &SymbolTable,
    ) -> Result<GateSite, NoGate> {
        let Some(section) = self
            .section_at(function)
            .filter(|section| section.is_text())
        else {
            return Err(NoGate::OutsideText { at: function });
        };
        let code = symbols
            .extent(function, section.range)
            .and_then(|extent| text.bytes(extent))
            .ok_or(NoGate::OutsideText { at: function })?;
        gate::classify(function, code, scan, symbols)
    }

    /// Compares the file's build id with the one in memory, if both are there.
    fn check_build<M: GuestPhys>(
        &self,
        file: &object::File<'_>,
        virt: &VirtMemory<'_, M>,
    ) -> Result<(), ModuleError> {
        let Some(note) = file.section_by_name(BUILD_ID) else {
            return Ok(());
        };
        let Some(loaded) = self
            .sections
            .iter()
            .find(|section| section.name == BUILD_ID)
        else {
            return Ok(());
        };
        let note = note.data()?;
        match virt.read_vec(loaded.range.first(), note.len().min(4096))? == note {
            true => Ok(()),
            false => Err(ModuleError::OtherBuild),
        }
    }
}

impl Section {
    /// Whether it is mapped as code is.
    pub fn is_text(&self) -> bool {
        self.executable && !self.writable
    }
}

/// Whether a section is where the guest says after the module was loaded. What initialised is
/// gone, and with it the full symbol table; per-CPU data has its address in another space.
fn stays(name: &str) -> bool {
    let gone = [".init", ".symtab", ".strtab", ".data..percpu"];
    !gone.iter().any(|prefix| name.starts_with(prefix))
}

/// Whether a section of this name should hold code.
fn is_text(name: &str) -> bool {
    let text = [
        ".text",
        ".exit.text",
        ".noinstr.text",
        ".static_call.text",
        ".sched.text",
    ];
    text.iter().any(|prefix| name.starts_with(prefix))
}

/// The bytes of a module's text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleText {
    parts: Vec<(Gva, Vec<u8>)>,
}

impl ModuleText {
    /// The pieces, by address.
    pub fn parts(&self) -> Vec<TextPart<'_>> {
        self.parts
            .iter()
            .map(|(at, bytes)| TextPart { at: *at, bytes })
            .collect()
    }

    /// The bytes of `range`, if they lie in one piece.
    pub fn bytes(&self, range: GvaRange) -> Option<&[u8]> {
        self.parts.iter().find_map(|(at, bytes)| {
            let from = usize::try_from(range.first().0.checked_sub(at.0)?).ok()?;
            let len = usize::try_from(range.len_bytes()).ok()?;
            bytes.get(from..from.checked_add(len)?)
        })
    }

    /// Decodes it.
    pub fn scan(&self, symbols: &SymbolTable) -> Result<TextScan, TextTooLarge> {
        TextScan::of(&self.parts(), symbols)
    }
}

/// The size that the module's file gives the section; 0 if it has none of that name.
fn size_in(file: &object::File<'_>, name: &str) -> u64 {
    file.section_by_name(name)
        .map_or(0, |section| section.size())
}

/// Names of the functions that ran when the module was loaded and are gone since.
fn init_functions(file: &object::File<'_>) -> Vec<String> {
    let in_init = |symbol: &object::Symbol<'_, '_>| {
        let section = symbol
            .section_index()
            .and_then(|index| file.section_by_index(index).ok());
        section.is_some_and(|s| s.name().is_ok_and(|name| name.starts_with(".init")))
    };
    file.symbols()
        .filter(|symbol| symbol.kind() == SymbolKind::Text && in_init(symbol))
        .filter_map(|symbol| symbol.name().ok().map(str::to_owned))
        .collect()
}

/// The section that begins at `at`; `None` if it is empty or nothing is mapped there.
fn place<M: GuestPhys>(
    name: &str,
    at: Gva,
    next: Option<Gva>,
    size: Option<u64>,
    virt: &VirtMemory<'_, M>,
) -> Option<Section> {
    let walk = |at| -> Result<_, WalkError> { virt.space.walk(virt.memory, at) };
    let rights = walk(at).ok()?.rights;
    // The end of what is mapped with the same rights.
    let mut last = Gva(at.0 | 0xfff);
    let limit = match (size, next) {
        (Some(size), _) => at.checked_add(size.checked_sub(1)?)?,
        (None, Some(next)) => next.checked_sub(1)?,
        (None, None) => at.checked_add((MAX_SECTION_PAGES << 12) - 1)?,
    };
    for _ in 0..MAX_SECTION_PAGES {
        let Some(page) = last.checked_add(1).filter(|page| *page <= limit) else {
            break;
        };
        match walk(page) {
            Ok(found) if found.rights == rights => last = Gva(page.0 | 0xfff),
            _ => break,
        }
    }
    Some(Section {
        name: name.to_owned(),
        range: GvaRange::inclusive(at, last.min(limit))?,
        executable: rights.execute,
        writable: rights.write,
    })
}

#[cfg(test)]
#[path = "modules_tests.rs"]
mod tests;
