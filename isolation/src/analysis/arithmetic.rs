//! What instructions make of values.

use iced_x86::{Instruction, Mnemonic};

use super::values::{SMALL, Value, width};

/// Whether an instruction does something if the flags say so.
pub fn reads_condition(i: &Instruction) -> bool {
    i.condition_code() != iced_x86::ConditionCode::None
}

/// Whether it is a conditional move.
pub fn is_conditional_move(mnemonic: Mnemonic) -> bool {
    use Mnemonic::{
        Cmova, Cmovae, Cmovb, Cmovbe, Cmove, Cmovg, Cmovge, Cmovl, Cmovle, Cmovne, Cmovns, Cmovs,
    };
    matches!(
        mnemonic,
        Cmova
            | Cmovae
            | Cmovb
            | Cmovbe
            | Cmove
            | Cmovg
            | Cmovge
            | Cmovl
            | Cmovle
            | Cmovne
            | Cmovns
            | Cmovs
    )
}

/// Whether [`computed`] knows it.
pub fn arithmetic(mnemonic: Mnemonic) -> bool {
    use Mnemonic::{Add, And, Imul, Or, Rol, Ror, Sar, Shl, Shr, Sub, Xor};
    matches!(
        mnemonic,
        Add | And | Imul | Or | Rol | Ror | Sar | Shl | Shr | Sub | Xor
    )
}

/// What of a value is in its lowest bytes.
pub fn narrowed(value: Value, bytes: usize) -> Value {
    match (value, bytes) {
        (value, 8..) => value,
        (Value::Device { sites, bits }, bytes) => Value::Device {
            sites,
            bits: bits.min((bytes * 8) as u8),
        },
        (Value::Number(number), 4) => Value::Number(number & 0xffff_ffff),
        (Value::Number(number), bytes) => Value::Number(number & ((1 << (bytes * 8)) - 1)),
        _ => Value::Unknown,
    }
}

/// What an instruction makes of two values. It is one table, a row for each pair of kinds that
/// makes something known, and its order counts.
#[expect(clippy::too_many_lines, reason = "one table, whose order counts")]
pub fn computed(mnemonic: Mnemonic, a: Value, b: Value) -> Value {
    use Mnemonic::{Add, And, Imul, Or, Sar, Shl, Shr, Sub, Xor};
    use Value::{
        Data, Device, Element, Number, RegisterTable, Registers, Shared, Stack, Struct, Unknown,
    };
    let by = |number: i64| {
        if mnemonic == Sub {
            number.checked_neg()
        } else {
            Some(number)
        }
    };
    match (mnemonic, a, b) {
        (Add, pointer, Number(0)) | (Add, Number(0), pointer) => pointer,
        (Add | Sub, Registers, _) | (Add, _, Registers) => Registers,
        (Add | Sub, Shared, _) | (Add, _, Shared) => Shared,
        (Add | Sub, RegisterTable, Number(_)) => RegisterTable,
        (Add | Sub, Stack(at), Number(number)) | (Add, Number(number), Stack(at)) => {
            let by = by(number).and_then(|by| i32::try_from(by).ok());
            by.and_then(|by| at.checked_add(by)).map_or(Unknown, Stack)
        }
        (Add | Sub, Struct { id, offset }, Number(number))
        | (Add, Number(number), Struct { id, offset }) => {
            let by = by(number).and_then(|by| i32::try_from(by).ok());
            by.and_then(|by| offset.checked_add(by))
                .map_or(Unknown, |offset| Struct { id, offset })
        }
        (Add | Sub, Data(section, offset), Number(number))
        | (Add, Number(number), Data(section, offset)) => by(number)
            .and_then(|by| offset.checked_add_signed(by))
            .map_or(Unknown, |offset| Data(section, offset)),
        (Add, Struct { .. } | Data(..), Device { sites, bits })
        | (Add, Device { sites, bits }, Struct { .. } | Data(..)) => {
            if bits > SMALL {
                Element { sites }
            } else {
                Unknown
            }
        }
        (_, Number(a), Number(b)) => match mnemonic {
            Add => Number(a.wrapping_add(b)),
            Sub => Number(a.wrapping_sub(b)),
            And => Number(a & b),
            Or => Number(a | b),
            Xor => Number(a ^ b),
            Imul => Number(a.wrapping_mul(b)),
            _ => Unknown,
        },
        (And, Device { sites, bits }, Number(mask))
        | (And, Number(mask), Device { sites, bits }) => Device {
            sites,
            bits: bits.min(width(mask)),
        },
        (Shr | Sar, Device { sites, bits }, Number(by)) => Device {
            sites,
            bits: bits.saturating_sub(u8::try_from(by & 63).unwrap_or(0)),
        },
        (Shl, Device { sites, bits }, Number(by)) => Device {
            sites,
            bits: bits
                .saturating_add(u8::try_from(by & 63).unwrap_or(0))
                .min(64),
        },
        (Imul, Device { sites, bits }, Number(by)) | (Imul, Number(by), Device { sites, bits }) => {
            let more = if by > 1 { width(by - 1) } else { 0 };
            Device {
                sites,
                bits: bits.saturating_add(more).min(64),
            }
        }
        (Add | Sub | Or | Xor, Device { sites, bits }, Number(number))
        | (Add | Or | Xor, Number(number), Device { sites, bits }) => Device {
            sites,
            bits: bits.max(width(number).min(32)),
        },
        (
            Add | Or | Xor,
            Device { sites, bits },
            Device {
                sites: more,
                bits: wide,
            },
        ) => Device {
            sites: sites | more,
            bits: bits.max(wide),
        },
        _ => Unknown,
    }
}
