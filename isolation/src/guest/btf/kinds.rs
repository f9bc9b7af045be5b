//! One type record (`struct btf_type` and what follows it, `include/uapi/linux/btf.h`).

use super::u32_at;

/// Number of a type; 0 is `void`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TypeId(pub u32);

impl TypeId {
    /// `void`.
    pub const VOID: Self = Self(0);
}

/// Bytes of `struct btf_type`.
const TYPE_BYTES: usize = 12;

/// What a type is.
#[derive(Debug, Clone, Copy)]
pub enum Kind<'a> {
    /// `void`.
    Void,
    /// An integer.
    Int {
        /// Size in bytes.
        bytes: u32,
        /// It has a sign.
        signed: bool,
        /// It is `bool`.
        boolean: bool,
    },
    /// A pointer.
    Pointer(TypeId),
    /// An array.
    Array {
        /// Type of an element.
        element: TypeId,
        /// How many.
        count: u32,
    },
    /// A structure.
    Struct {
        /// Size in bytes.
        bytes: u32,
        /// Its members.
        members: Members<'a>,
    },
    /// A union.
    Union {
        /// Size in bytes.
        bytes: u32,
        /// Its members.
        members: Members<'a>,
    },
    /// An enumeration, of 32 or 64 bits.
    Enum {
        /// Size in bytes.
        bytes: u32,
        /// Its values.
        values: EnumValues<'a>,
    },
    /// A structure or union that is only declared.
    Forward {
        /// A union.
        union: bool,
    },
    /// A name for another type.
    Typedef(TypeId),
    /// `const`.
    Const(TypeId),
    /// `volatile`.
    Volatile(TypeId),
    /// `restrict`.
    Restrict(TypeId),
    /// An attribute of another type, such as `__user` or `__rcu`.
    TypeTag(TypeId),
    /// A function; its type is a `FunctionType`.
    Function(TypeId),
    /// Parameters and result of a function.
    FunctionType {
        /// What it returns.
        returns: TypeId,
        /// What it takes.
        params: Params<'a>,
    },
    /// A variable.
    Variable(TypeId),
    /// A section of variables.
    DataSection {
        /// Size in bytes.
        bytes: u32,
    },
    /// A floating-point number.
    Float {
        /// Size in bytes.
        bytes: u32,
    },
    /// An attribute of a declaration.
    DeclTag(TypeId),
}

/// A member of a structure or union.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// Where its name is; see `Btf::string`.
    pub name_at: u32,
    /// Its type.
    pub type_id: TypeId,
    /// Offset from the start of the structure, in bits.
    pub bit_offset: u32,
    /// Size in bits if it is a bit field, else 0.
    pub bit_size: u32,
}

/// A parameter of a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Param {
    /// Where its name is; see `Btf::string`.
    pub name_at: u32,
    /// Its type. `void` as the last one stands for `...`.
    pub type_id: TypeId,
}

/// Members of a structure or union.
#[derive(Debug, Clone, Copy)]
pub struct Members<'a> {
    records: &'a [[u8; 12]],
    has_bit_fields: bool,
}

impl Members<'_> {
    /// The members, in order.
    pub fn iter(&self) -> impl Iterator<Item = Member> {
        self.records.iter().map(|record| {
            let offset = u32_at(record, 8).unwrap_or(0);
            let (bit_offset, bit_size) = if self.has_bit_fields {
                (offset & 0x00ff_ffff, offset >> 24)
            } else {
                (offset, 0)
            };
            Member {
                name_at: u32_at(record, 0).unwrap_or(0),
                type_id: TypeId(u32_at(record, 4).unwrap_or(0)),
                bit_offset,
                bit_size,
            }
        })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }
}

/// Parameters of a function.
#[derive(Debug, Clone, Copy)]
pub struct Params<'a> {
    records: &'a [[u8; 8]],
}

impl Params<'_> {
    /// The parameters, in order.
    pub fn iter(&self) -> impl Iterator<Item = Param> {
        self.records.iter().map(|record| Param {
            name_at: u32_at(record, 0).unwrap_or(0),
            type_id: TypeId(u32_at(record, 4).unwrap_or(0)),
        })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }
}

/// Values of an enumeration.
#[derive(Debug, Clone, Copy)]
pub struct EnumValues<'a> {
    narrow: &'a [[u8; 8]],
    wide: &'a [[u8; 12]],
}

impl EnumValues<'_> {
    /// Where each value's name is (see `Btf::string`), and its number.
    pub fn iter(&self) -> impl Iterator<Item = (u32, i64)> {
        let word = |record: &[u8], at| u32_at(record, at).unwrap_or(0);
        let narrow = self.narrow.iter();
        let narrow = narrow.map(move |r| (word(r, 0), i64::from(word(r, 4) as i32)));
        let wide = self.wide.iter();
        let number = move |r: &[u8]| u64::from(word(r, 4)) | u64::from(word(r, 8)) << 32;
        narrow.chain(wide.map(move |r| (word(r, 0), number(r) as i64)))
    }
}

/// `BTF_KIND_*` of an info word.
pub(super) fn kind_number(info: u32) -> u8 {
    (info >> 24 & 0x1f) as u8
}

/// Whether a record with this info word is an enumeration, of 32 or of 64 bits.
pub(super) fn is_enumeration(info: u32) -> bool {
    matches!(kind_number(info), 6 | 19)
}

/// Bytes of a record with this info word; `None` for a kind that is not known.
pub(super) fn record_bytes(info: u32) -> Option<usize> {
    let entries = (info & 0xffff) as usize;
    let behind = match kind_number(info) {
        2 | 7..=12 | 16 | 18 => 0,
        1 | 14 | 17 => 4,
        3 => 12,
        4 | 5 | 15 | 19 => entries * 12,
        6 | 13 => entries * 8,
        _ => return None,
    };
    Some(TYPE_BYTES + behind)
}

/// Decodes the record at the start of `record`.
pub(super) fn decode(record: &[u8]) -> Option<Kind<'_>> {
    let info = u32_at(record, 4)?;
    let size_or_type = u32_at(record, 8)?;
    let behind = record.get(TYPE_BYTES..record_bytes(info)?)?;
    let (bytes, target) = (size_or_type, TypeId(size_or_type));
    let flag = info >> 31 != 0;
    let members = || Members {
        records: behind.as_chunks().0,
        has_bit_fields: flag,
    };
    Some(match kind_number(info) {
        1 => {
            let encoding = u32_at(behind, 0)? >> 24;
            Kind::Int {
                bytes,
                signed: encoding & 1 != 0,
                boolean: encoding & 4 != 0,
            }
        }
        2 => Kind::Pointer(target),
        3 => Kind::Array {
            element: TypeId(u32_at(behind, 0)?),
            count: u32_at(behind, 8)?,
        },
        4 => Kind::Struct {
            bytes,
            members: members(),
        },
        5 => Kind::Union {
            bytes,
            members: members(),
        },
        6 => Kind::Enum {
            bytes,
            values: EnumValues {
                narrow: behind.as_chunks().0,
                wide: &[],
            },
        },
        19 => Kind::Enum {
            bytes,
            values: EnumValues {
                narrow: &[],
                wide: behind.as_chunks().0,
            },
        },
        7 => Kind::Forward { union: flag },
        8 => Kind::Typedef(target),
        9 => Kind::Volatile(target),
        10 => Kind::Const(target),
        11 => Kind::Restrict(target),
        12 => Kind::Function(target),
        13 => Kind::FunctionType {
            returns: target,
            params: Params {
                records: behind.as_chunks().0,
            },
        },
        14 => Kind::Variable(target),
        15 => Kind::DataSection { bytes },
        16 => Kind::Float { bytes },
        17 => Kind::DeclTag(target),
        18 => Kind::TypeTag(target),
        _ => return None,
    })
}
