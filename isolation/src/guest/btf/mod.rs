//! The guest's types: a reader of BTF (Linux `Documentation/bpf/btf.rst`).
//!
//! A module's BTF is *split*: its type numbers and strings go on where those of the kernel's end.
//! The data comes from the guest (`/sys/kernel/btf/*`) or from the kernel's file; either way it is
//! hostile. Reading checks that every record lies in the data; every reference is looked up when
//! it is followed, and every walk along references is bounded, because they may form circles.

mod kinds;
mod query;

#[cfg(test)]
pub(crate) mod encode;
#[cfg(test)]
mod tests;

use std::io::{self, Write};
use std::sync::Arc;

use object::{Object, ObjectSection};

use super::cold::{ColdBytes, ColdRows};
use super::names::{NameIndex, NameIndexBuilder};
pub use kinds::{EnumValues, Kind, Member, Members, Param, Params, TypeId};
pub use query::{Function, MAX_HOPS};

const MAGIC: u16 = 0xeb9f;
const VERSION: u8 = 1;
const HEADER_BYTES: usize = 24;

/// Longest string that is a name, in bytes (`KSYM_NAME_LEN`).
const MAX_STRING: usize = 512;

/// Largest BTF that is read, in bytes. Debian's kernel has 4.3 million.
const MAX_BYTES: usize = 64 << 20;

/// Why data is no BTF.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BtfError {
    /// Not even the start of it.
    #[error("this is no BTF of version 1 in little-endian order")]
    NotBtf,
    /// Sections outside the data, or absurdly large.
    #[error("the BTF is cut short or larger than {MAX_BYTES} bytes")]
    Size,
    /// A type record that runs out of the data.
    #[error("BTF type {id} is cut short")]
    TypeCutShort {
        /// Its number.
        id: u32,
    },
    /// A kind that this reader does not know, so that it cannot know the record's length either.
    #[error("BTF type {id} has unknown kind {kind}; the guest's kernel is newer than this program")]
    UnknownKind {
        /// Its number.
        id: u32,
        /// `BTF_KIND_*`.
        kind: u8,
    },
    /// No such section in the file.
    #[error(
        "the file has no .BTF section: is it a kernel or module built with CONFIG_DEBUG_INFO_BTF?"
    )]
    NoSection,
    /// Not an ELF file.
    #[error("the file cannot be read as ELF: {0}")]
    Elf(String),
}

/// Types of the kernel, or of the kernel and one module.
#[derive(Debug)]
pub struct Btf {
    base: Option<Arc<Btf>>,
    /// Type records.
    types: ColdBytes,
    /// Zero-terminated strings.
    strings: ColdBytes,
    /// Where the record of type `first_id + i` begins.
    offsets: ColdRows<4>,
    /// This part's types by their names: calls ask by name.
    by_name: NameIndex,
    /// This part's enumerations, of which all are looked through for a value's name.
    enumerations: ColdRows<4>,
    /// First type number of this part: 1, or what follows the base's last.
    first_id: u32,
    /// Offset of this part's first string: 0, or the length of the base's strings.
    first_string: u32,
}

impl Btf {
    /// Reads raw BTF as in `/sys/kernel/btf/*`. With a `base`, `data` is the split part.
    pub fn parse(data: &[u8], base: Option<Arc<Btf>>) -> Result<Self, BtfError> {
        let header: &[u8; HEADER_BYTES] = data.first_chunk().ok_or(BtfError::NotBtf)?;
        if header[..2] != MAGIC.to_le_bytes() || header[2] != VERSION {
            return Err(BtfError::NotBtf);
        }
        if data.len() > MAX_BYTES {
            return Err(BtfError::Size);
        }
        let field = |at: usize| u32_at(header, at).map(|v| v as usize);
        let part = |offset: Option<usize>, len: Option<usize>| {
            let start = field(4)?.checked_add(offset?)?;
            data.get(start..start.checked_add(len?)?)
        };
        let types = part(field(8), field(12)).ok_or(BtfError::Size)?;
        let strings = part(field(16), field(20)).ok_or(BtfError::Size)?;
        let (first_id, first_string) = match &base {
            Some(base) => (base.end_id(), base.end_string()),
            None => (1, 0),
        };
        let offsets = record_offsets(types, first_id)?;
        let mut btf = Self {
            base,
            types: ColdBytes::new(types.to_vec()),
            strings: ColdBytes::new(strings.to_vec()),
            offsets: ColdRows::new(offsets),
            by_name: NameIndex::default(),
            enumerations: ColdRows::default(),
            first_id,
            first_string,
        };
        let mut by_name = NameIndexBuilder::default();
        let mut enumerations = Vec::new();
        for id in btf.own_ids() {
            let record = btf.record(id).unwrap_or_default();
            let name = u32_at(record, 0).map_or(&[][..], |at| btf.string_bytes(at));
            if !name.is_empty() {
                by_name.add(name, id.0);
            }
            if u32_at(record, 4).is_some_and(kinds::is_enumeration) {
                enumerations.push(id.0.to_le_bytes());
            }
        }
        btf.by_name = by_name.finish();
        btf.enumerations = ColdRows::new(enumerations);
        Ok(btf)
    }

    /// Gives up the memory of what was looked at until now, the base's too.
    pub fn cool(&self) {
        self.types.cool();
        self.strings.cool();
        self.offsets.cool();
        self.by_name.cool();
        self.enumerations.cool();
        if let Some(base) = &self.base {
            base.cool();
        }
    }

    /// Reads the `.BTF` section of a kernel's or module's ELF file.
    pub fn from_elf(file: &[u8], base: Option<Arc<Btf>>) -> Result<Self, BtfError> {
        let elf_error = |error: object::Error| BtfError::Elf(error.to_string());
        let file = object::File::parse(file).map_err(elf_error)?;
        let section = file.section_by_name(".BTF").ok_or(BtfError::NoSection)?;
        Self::parse(section.data().map_err(elf_error)?, base)
    }

    /// This part, without the base's, as [`Btf::parse`] reads it: other than in its header it is
    /// what was read.
    pub fn write(&self, into: &mut impl Write) -> io::Result<()> {
        let too_long = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let types = u32::try_from(self.types.len()).map_err(too_long)?;
        let strings = u32::try_from(self.strings.len()).map_err(too_long)?;
        into.write_all(&MAGIC.to_le_bytes())?;
        // No flags.
        into.write_all(&[VERSION, 0])?;
        for word in [HEADER_BYTES as u32, 0, types, types, strings] {
            into.write_all(&word.to_le_bytes())?;
        }
        into.write_all(&self.types)?;
        into.write_all(&self.strings)
    }

    /// The kernel's part, if this is a module's.
    pub fn base(&self) -> Option<&Arc<Btf>> {
        self.base.as_ref()
    }

    /// Whether the type is of the module itself and not of the kernel. True for all types of a BTF
    /// without base.
    pub fn is_own(&self, id: TypeId) -> bool {
        id.0 >= self.first_id && id.0 < self.end_id()
    }

    /// The numbers of this part's types, without the base's.
    pub fn own_ids(&self) -> impl Iterator<Item = TypeId> + use<> {
        (self.first_id..self.end_id()).map(TypeId)
    }

    /// This part's enumerations, in order.
    fn own_enumerations(&self) -> impl Iterator<Item = TypeId> + '_ {
        let rows = self.enumerations.rows().iter();
        rows.map(|row| TypeId(u32::from_le_bytes(*row)))
    }

    /// All type numbers but 0 (`void`): the base's first.
    pub fn ids(&self) -> impl Iterator<Item = TypeId> + use<> {
        (1..self.end_id()).map(TypeId)
    }

    /// The name of a type; empty if it has none.
    pub fn name(&self, id: TypeId) -> &str {
        self.record(id)
            .and_then(|record| u32_at(record, 0))
            .map_or("", |at| self.string(at))
    }

    /// The string at `offset`; empty if there is none, or it is no text, or absurdly long.
    pub fn string(&self, offset: u32) -> &str {
        std::str::from_utf8(self.string_bytes(offset)).unwrap_or_default()
    }

    /// The same, text or not.
    fn string_bytes(&self, offset: u32) -> &[u8] {
        if offset < self.first_string {
            let base = self.base.as_ref();
            return base.map_or(&[], |base| base.string_bytes(offset));
        }
        let rest = self.strings.get((offset - self.first_string) as usize..);
        let rest = rest.unwrap_or_default();
        let longest = rest.get(..MAX_STRING).unwrap_or(rest);
        let len = memchr::memchr(0, longest);
        &rest[..len.unwrap_or(0)]
    }

    /// Whether the string at `offset` is `name`, which is quicker to say than what it is.
    pub fn is_string(&self, offset: u32, name: &str) -> bool {
        if offset < self.first_string {
            return self
                .base
                .as_ref()
                .is_some_and(|base| base.is_string(offset, name));
        }
        let rest = self.strings.get((offset - self.first_string) as usize..);
        let behind = rest.and_then(|rest| rest.strip_prefix(name.as_bytes()));
        name.len() < MAX_STRING && behind.is_some_and(|behind| behind.first() == Some(&0))
    }

    /// What a type is. `None` if there is no type of this number.
    pub fn kind(&self, id: TypeId) -> Option<Kind<'_>> {
        if id == TypeId::VOID {
            return Some(Kind::Void);
        }
        kinds::decode(self.record(id)?)
    }

    /// This part's types of this name, in order.
    pub fn own_named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = TypeId> + 'a {
        let like = self.by_name.like(name.as_bytes()).map(TypeId);
        like.filter(move |id| self.name(*id) == name)
    }

    fn end_id(&self) -> u32 {
        self.first_id
            .saturating_add(self.offsets.rows().len() as u32)
    }

    fn end_string(&self) -> u32 {
        self.first_string.saturating_add(self.strings.len() as u32)
    }

    /// The record of a type and what lies behind it.
    fn record(&self, id: TypeId) -> Option<&[u8]> {
        if id.0 < self.first_id {
            return self.base.as_ref()?.record(id);
        }
        let offset = self.offsets.get((id.0 - self.first_id) as usize)?;
        let offset = u32::from_le_bytes(*offset);
        self.types.get(offset as usize..)
    }
}

/// Where each record of `types` begins, the first of which has this number.
fn record_offsets(types: &[u8], first_id: u32) -> Result<Vec<[u8; 4]>, BtfError> {
    let mut offsets = Vec::new();
    let mut at = 0;
    while at < types.len() {
        let id = first_id.saturating_add(offsets.len() as u32);
        let rest = &types[at..];
        let cut_short = BtfError::TypeCutShort { id };
        let info = u32_at(rest, 4).ok_or(cut_short.clone())?;
        let len = kinds::record_bytes(info).ok_or(BtfError::UnknownKind {
            id,
            kind: kinds::kind_number(info),
        })?;
        if rest.len() < len {
            return Err(cut_short);
        }
        offsets.push((at as u32).to_le_bytes());
        at += len;
    }
    Ok(offsets)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|word| u32::from_le_bytes(*word))
}
