//! Faults that the guest's kernel expects: its exception table and its bug table.
//!
//! An exception in the kernel root at an instruction that is in one of them is no failure of the
//! driver: the kernel has to take it at that same instruction (a user page that is not there under
//! `copy_from_user`, a `WARN`). The tables are read from guest memory once, between the bounds
//! that the kernel's symbols (`__start___ex_table`, ...) or a module's sections give. Their order
//! is not trusted. Layouts: Linux 5.16 and later on x86-64 with `CONFIG_DEBUG_BUGVERBOSE`
//! (`arch/x86/include/asm/extable.h`, `include/asm-generic/bug.h`).

use serde::Serialize;

use super::addr::{Gva, GvaRange};
use super::paging::{VirtError, VirtMemory};
use super::phys::GuestPhys;

/// Bytes of an entry of either table.
const ENTRY_BYTES: usize = 12;

/// Largest table that is read, in bytes. Debian's kernel has 7,000 and 92,000.
const MAX_BYTES: u64 = 16 << 20;

/// Longest file name in a bug table, in bytes.
const MAX_FILE_NAME: usize = 256;

/// Why a table could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// Bounds that make no table.
    #[error(
        "the guest's table of {bytes} bytes is no multiple of {ENTRY_BYTES} or absurdly large: other kernel version?"
    )]
    Size {
        /// How large it would be.
        bytes: u64,
    },
    /// Not there.
    #[error(transparent)]
    Memory(#[from] VirtError),
}

/// An instruction that may fault, and where the kernel goes on then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ExceptionEntry {
    /// The instruction.
    pub instruction: Gva,
    /// Where the handler goes on.
    pub fixup: Gva,
    /// `EX_TYPE_*` in the low byte, then register, flags and an immediate.
    pub data: u32,
}

impl ExceptionEntry {
    /// `EX_TYPE_*`: what the handler does.
    pub fn kind(&self) -> u8 {
        self.data as u8
    }
}

/// A `BUG` or `WARN`: a `ud2` that the kernel knows of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct BugEntry {
    /// The `ud2`.
    pub instruction: Gva,
    /// Where the name of the source file is.
    pub file: Gva,
    /// Line in it.
    pub line: u16,
    /// `BUGFLAG_*`.
    pub flags: u16,
}

impl BugEntry {
    /// `WARN`: the kernel goes on. Otherwise `BUG`: it does not.
    pub fn is_warning(&self) -> bool {
        self.flags & 1 != 0
    }

    /// The name of the source file, if it can be read.
    pub fn file_name<M: GuestPhys>(&self, virt: &VirtMemory<'_, M>) -> Option<String> {
        let mut name = Vec::new();
        while name.len() < MAX_FILE_NAME {
            let mut byte = [0];
            virt.read(self.file.checked_add(name.len() as u64)?, &mut byte)
                .ok()?;
            match byte {
                [0] => return Some(String::from_utf8_lossy(&name).into_owned()),
                [byte] => name.push(byte),
            }
        }
        None
    }
}

/// The exception and bug tables of the kernel and of modules.
#[derive(Debug, Clone, Default)]
pub struct FaultTables {
    exceptions: Vec<ExceptionEntry>,
    bugs: Vec<BugEntry>,
}

impl FaultTables {
    /// Adds the exception table in `range`.
    pub fn add_exceptions<M: GuestPhys>(
        &mut self,
        virt: &VirtMemory<'_, M>,
        range: GvaRange,
    ) -> Result<(), TableError> {
        let bytes = read_table(virt, range)?;
        self.exceptions.extend(
            entries(range.first(), &bytes).map(|(at, entry)| ExceptionEntry {
                instruction: relative(at, 0, entry),
                fixup: relative(at, 4, entry),
                data: word(entry, 8),
            }),
        );
        self.exceptions.sort_by_key(|entry| entry.instruction);
        Ok(())
    }

    /// Adds the bug table in `range`.
    pub fn add_bugs<M: GuestPhys>(
        &mut self,
        virt: &VirtMemory<'_, M>,
        range: GvaRange,
    ) -> Result<(), TableError> {
        let bytes = read_table(virt, range)?;
        self.bugs
            .extend(entries(range.first(), &bytes).map(|(at, entry)| BugEntry {
                instruction: relative(at, 0, entry),
                file: relative(at, 4, entry),
                line: word(entry, 8) as u16,
                flags: (word(entry, 8) >> 16) as u16,
            }));
        self.bugs.sort_by_key(|entry| entry.instruction);
        Ok(())
    }

    /// The entry for a fault of the instruction at `instruction`.
    pub fn exception_at(&self, instruction: Gva) -> Option<&ExceptionEntry> {
        let found = self
            .exceptions
            .binary_search_by_key(&instruction, |e| e.instruction)
            .ok()?;
        self.exceptions.get(found)
    }

    /// The entry for a `ud2` at `instruction`.
    pub fn bug_at(&self, instruction: Gva) -> Option<&BugEntry> {
        let found = self
            .bugs
            .binary_search_by_key(&instruction, |e| e.instruction)
            .ok()?;
        self.bugs.get(found)
    }

    /// How many exception and bug entries there are.
    pub fn len(&self) -> (usize, usize) {
        (self.exceptions.len(), self.bugs.len())
    }

    /// Whether there is no entry at all.
    pub fn is_empty(&self) -> bool {
        self.len() == (0, 0)
    }

    /// All bug entries, by instruction.
    pub fn bugs(&self) -> &[BugEntry] {
        &self.bugs
    }

    /// All exception entries, by instruction.
    pub fn exceptions(&self) -> &[ExceptionEntry] {
        &self.exceptions
    }
}

fn read_table<M: GuestPhys>(
    virt: &VirtMemory<'_, M>,
    range: GvaRange,
) -> Result<Vec<u8>, TableError> {
    let bytes = range.len_bytes();
    if bytes > MAX_BYTES || !bytes.is_multiple_of(ENTRY_BYTES as u64) {
        return Err(TableError::Size { bytes });
    }
    Ok(virt.read_vec(range.first(), bytes as usize)?)
}

fn entries(first: Gva, bytes: &[u8]) -> impl Iterator<Item = (Gva, &[u8; ENTRY_BYTES])> {
    let at = move |index| Gva(first.0.wrapping_add((index * ENTRY_BYTES) as u64));
    bytes
        .as_chunks()
        .0
        .iter()
        .enumerate()
        .map(move |(index, entry)| (at(index), entry))
}

fn word(entry: &[u8; ENTRY_BYTES], at: usize) -> u32 {
    entry[at..]
        .first_chunk()
        .map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

/// The address that the signed word at `field` of the entry at `entry_at` gives relative to itself.
fn relative(entry_at: Gva, field: usize, entry: &[u8; ENTRY_BYTES]) -> Gva {
    let displacement = i64::from(word(entry, field) as i32) as u64;
    Gva(entry_at
        .0
        .wrapping_add(field as u64)
        .wrapping_add(displacement))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::guest::paging::Levels;
    use crate::guest::paging::testing::TestGuest;

    const TABLE: Gva = Gva(0xffff_ffff_824b_d8c0);

    /// An entry at index `index` whose two addresses are `a` and `b`.
    fn entry(index: u64, a: u64, b: u64, last: u32) -> Vec<u8> {
        let at = TABLE.0 + index * 12;
        let mut bytes = Vec::new();
        bytes.extend((a.wrapping_sub(at) as i32).to_le_bytes());
        bytes.extend((b.wrapping_sub(at + 4) as i32).to_le_bytes());
        bytes.extend(last.to_le_bytes());
        bytes
    }

    fn range(entries: u64) -> GvaRange {
        GvaRange::new(TABLE, entries * 12).unwrap()
    }

    #[test]
    fn entries_are_found_by_instruction_even_out_of_order() {
        let mut guest = TestGuest::new(Levels::Four);
        let text = 0xffff_ffff_8100_0000;
        let table = [
            entry(0, text + 0x300, text + 0x400, 3 | 1 << 16),
            entry(1, text + 0x100, text + 0x200, 1),
        ];
        guest.put(TABLE, &table.concat(), 0);
        let mut tables = FaultTables::default();
        tables.add_exceptions(&guest.virt(), range(2)).unwrap();
        let found = tables.exception_at(Gva(text + 0x300)).unwrap();
        assert_eq!((found.fixup, found.kind()), (Gva(text + 0x400), 3));
        let found = tables.exception_at(Gva(text + 0x100)).unwrap();
        assert_eq!((found.fixup, found.kind()), (Gva(text + 0x200), 1));
        assert_eq!(tables.exception_at(Gva(text + 0x101)), None);
    }

    #[test]
    fn bugs_and_warnings_are_told_apart_and_named() {
        let mut guest = TestGuest::new(Levels::Four);
        let (text, names) = (0xffff_ffff_8100_0000, 0xffff_ffff_8220_0000);
        let table = [
            entry(0, text + 8, names, 123 | 1 << 16),
            entry(1, text + 16, names + 0x1000, 7),
        ];
        guest.put(TABLE, &table.concat(), 0);
        guest.put(Gva(names), b"net/core/dev.c\0", 0);
        let mut tables = FaultTables::default();
        tables.add_bugs(&guest.virt(), range(2)).unwrap();
        let warning = tables.bug_at(Gva(text + 8)).unwrap();
        assert!(warning.is_warning());
        assert_eq!(warning.line, 123);
        assert_eq!(
            warning.file_name(&guest.virt()).as_deref(),
            Some("net/core/dev.c")
        );
        let bug = tables.bug_at(Gva(text + 16)).unwrap();
        assert!(!bug.is_warning());
        assert_eq!(bug.file_name(&guest.virt()), None);
    }

    #[test]
    fn bounds_that_make_no_table_are_refused() {
        let guest = TestGuest::new(Levels::Four);
        let mut tables = FaultTables::default();
        for bytes in [13, 12 << 22] {
            let range = GvaRange::new(TABLE, bytes).unwrap();
            let error = tables.add_exceptions(&guest.virt(), range).unwrap_err();
            assert_eq!(error, TableError::Size { bytes });
        }
        let error = tables.add_bugs(&guest.virt(), range(1)).unwrap_err();
        assert!(matches!(error, TableError::Memory(_)));
        assert!(tables.is_empty());
    }

    proptest! {
        #[test]
        fn random_tables_are_read_without_harm(bytes in prop::collection::vec(any::<u8>(), 12..240)) {
            let mut guest = TestGuest::new(Levels::Four);
            guest.put(TABLE, &bytes, 0);
            let whole = range(bytes.len() as u64 / 12);
            let mut tables = FaultTables::default();
            tables.add_exceptions(&guest.virt(), whole).unwrap();
            tables.add_bugs(&guest.virt(), whole).unwrap();
            prop_assert_eq!(tables.len(), (bytes.len() / 12, bytes.len() / 12));
            for bug in tables.bugs() {
                prop_assert!(tables.bug_at(bug.instruction).is_some());
            }
            for exception in tables.exceptions() {
                prop_assert!(tables.exception_at(exception.instruction).is_some());
            }
        }
    }
}
