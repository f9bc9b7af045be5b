//! Names of the guest's code and data, from its `/proc/kallsyms` or from the tables in its memory
//! that this is made of.
//!
//! The list comes from the guest: a line may be absurd, an address may be a lie. What is found
//! here is a hint about names; before anything is patched, `modules` and `gate` check addresses and
//! bytes against the guest's memory.

pub mod image;
mod of_modules;
mod table;

#[cfg(test)]
mod tests;

use std::io::{self, BufRead, Read};

pub use of_modules::symbols_of_modules;
pub use table::{Symbol, SymbolTable, SymbolTableBuilder, TooManySymbols};

/// Longest line of `/proc/kallsyms` that is looked at, in bytes (`KSYM_NAME_LEN` is 512).
const MAX_LINE: u64 = 1024;

/// Start of the kernel image's mapping (`__START_KERNEL_map`).
pub(crate) const KERNEL_IMAGE: u64 = 0xffff_ffff_8000_0000;
/// End of the area that holds the image and all modules (`MODULES_END`).
pub(crate) const MODULES_END: u64 = 0xffff_ffff_ff00_0000;

/// A line of `/proc/kallsyms`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line<'a> {
    /// Guest virtual address.
    pub address: u64,
    /// Type letter as `nm` prints it.
    pub kind: char,
    /// The name.
    pub name: &'a str,
    /// The module; `None` for the kernel itself.
    pub module: Option<&'a str>,
}

impl<'a> Line<'a> {
    /// Reads `ADDRESS TYPE NAME [MODULE]`. `None` if the line is something else.
    pub fn parse(line: &'a str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let address = u64::from_str_radix(words.next()?, 16).ok()?;
        let mut kind = words.next()?.chars();
        let line = Self {
            address,
            kind: kind.next()?,
            name: words.next()?,
            module: match words.next() {
                None => None,
                Some(word) => Some(word.strip_prefix('[')?.strip_suffix(']')?),
            },
        };
        (kind.next().is_none() && words.next().is_none()).then_some(line)
    }
}

/// Why a symbol list could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SymbolsError {
    /// The stream broke.
    #[error("reading the guest's symbols: {0}")]
    Io(#[from] io::Error),
    /// More than is sane.
    #[error(transparent)]
    TooMany(#[from] TooManySymbols),
    /// `kptr_restrict`.
    #[error(
        "the guest hides its symbol addresses; read /proc/kallsyms as root with kernel.kptr_restrict at most 1"
    )]
    Hidden,
}

/// Reads the text of `/proc/kallsyms` and keeps the symbols that `keep` wants. Lines that are none
/// are skipped. Memory is bounded by what is kept, and that by the table's limits.
pub fn read_kallsyms(
    mut text: impl BufRead,
    mut keep: impl FnMut(&Line<'_>) -> bool,
) -> Result<SymbolTable, SymbolsError> {
    let mut table = SymbolTableBuilder::default();
    let mut bytes = Vec::new();
    let (mut seen, mut addressed) = (false, false);
    loop {
        bytes.clear();
        let taken = text.by_ref().take(MAX_LINE).read_until(b'\n', &mut bytes)?;
        if taken == 0 {
            break;
        }
        if bytes.last() != Some(&b'\n') && taken as u64 == MAX_LINE {
            text.skip_until(b'\n')?;
            continue;
        }
        let Some(line) = std::str::from_utf8(&bytes).ok().and_then(Line::parse) else {
            continue;
        };
        seen = true;
        addressed |= line.address != 0;
        if keep(&line) {
            table.add(&line)?;
        }
    }
    if seen && !addressed {
        return Err(SymbolsError::Hidden);
    }
    Ok(table.finish())
}
