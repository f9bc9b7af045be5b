//! What is known of a value in a register, and what a module's functions tell each other about
//! values.

use std::collections::{BTreeMap, HashMap};

use crate::guest::btf::TypeId;

/// Load sites of a function that are told apart.
pub const MAX_SITES: usize = 64;
/// Most slots of a stack frame that are followed.
const MAX_SLOTS: usize = 128;

/// Bits of a value that is too small for there to be much doubt where it is not known how large an
/// object is.
pub const SMALL: u8 = 8;

/// What is known of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value {
    /// Nothing.
    Unknown,
    /// It is this.
    Number(i64),
    /// An address in an object of this type, or null.
    Struct {
        /// The structure.
        id: TypeId,
        /// Offset in it; beyond its ends it is in what it is embedded in, or in what lies behind
        /// it.
        offset: i32,
    },
    /// An address in the stack frame, from the stack pointer at the function's start.
    Stack(i32),
    /// An address of a device's registers, or null.
    Registers,
    /// An address of an array of such addresses.
    RegisterTable,
    /// An address of memory that a device writes, or null.
    Shared,
    /// What a device delivered.
    Device {
        /// Where it was loaded: a bit for each site.
        sites: u64,
        /// Bits that it may have.
        bits: u8,
    },
    /// An address that was worked out from an object's and from what a device delivered.
    Element {
        /// Where that was loaded.
        sites: u64,
    },
    /// The address of a function of the module.
    Function(usize),
    /// An address in the module's data: section and offset.
    Data(usize, u64),
}

impl Value {
    /// What is known of a value that is one of two.
    pub fn join(self, other: Self) -> Self {
        match (self, other) {
            (a, b) if a == b => a,
            (
                Self::Device { sites, bits },
                Self::Device {
                    sites: more,
                    bits: wide,
                },
            ) => Self::Device {
                sites: sites | more,
                bits: bits.max(wide),
            },
            // What is returned where the device has gone, or a first value.
            (Self::Device { sites, bits }, Self::Number(number))
            | (Self::Number(number), Self::Device { sites, bits }) => Self::Device {
                sites,
                bits: bits.max(width(number).min(32)),
            },
            (pointer, Self::Number(0)) | (Self::Number(0), pointer) if pointer.is_pointer() => {
                pointer
            }
            _ => Self::Unknown,
        }
    }

    /// Whether it is an address that other functions are told of.
    pub fn is_pointer(self) -> bool {
        matches!(
            self,
            Self::Struct { .. } | Self::Registers | Self::RegisterTable | Self::Shared
        )
    }
}

/// Bits of a number, all for a negative one.
pub fn width(number: i64) -> u8 {
    (64 - number.leading_zeros()) as u8
}

/// What is known at one point of a function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// Registers, by their number.
    pub registers: [Value; 16],
    /// The stack frame, by offset.
    pub slots: BTreeMap<i32, Value>,
    /// Sites whose values were compared with something on every way here.
    pub checked: u64,
}

impl State {
    /// Nothing known but the stack pointer.
    pub fn at_start() -> Self {
        let mut registers = [Value::Unknown; 16];
        registers[4] = Value::Stack(0);
        Self {
            registers,
            slots: BTreeMap::new(),
            checked: 0,
        }
    }

    /// Takes in what is known on another way here; whether that changed anything.
    pub fn join(&mut self, other: &Self) -> bool {
        let before = self.clone();
        for (mine, others) in self.registers.iter_mut().zip(&other.registers) {
            *mine = mine.join(*others);
        }
        self.slots.retain(|at, _| other.slots.contains_key(at));
        for (at, mine) in &mut self.slots {
            *mine = mine.join(other.slots.get(at).copied().unwrap_or(Value::Unknown));
        }
        self.checked &= other.checked;
        *self != before
    }

    /// Puts a value into the frame.
    pub fn store(&mut self, at: i32, bytes: usize, value: Value) {
        let around = at.saturating_sub(7)..at.saturating_add(i32::try_from(bytes).unwrap_or(8));
        let overlapped: Vec<i32> = self.slots.range(around).map(|(at, _)| *at).collect();
        for slot in overlapped {
            self.slots.remove(&slot);
        }
        if value != Value::Unknown && self.slots.len() < MAX_SLOTS {
            self.slots.insert(at, value);
        }
    }

    /// Whether all that a value comes from was compared with something.
    pub fn is_checked(&self, sites: u64) -> bool {
        sites & !self.checked == 0
    }
}

/// What was learnt of a place: one value, or several that contradict each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Learnt {
    Is(Value),
    Differs,
}

/// What a module's functions tell each other.
#[derive(Debug, Default)]
pub struct Shared {
    fields: HashMap<(TypeId, u32), Learnt>,
    globals: HashMap<(usize, u64), Learnt>,
    parameters: HashMap<(usize, usize), Learnt>,
    privates: HashMap<TypeId, Learnt>,
    /// What functions return, and whether that was loaded from memory.
    pub returns: HashMap<usize, (Value, bool)>,
}

fn learn<K: std::hash::Hash + Eq>(map: &mut HashMap<K, Learnt>, key: K, value: Value) {
    if value.is_pointer() {
        let known = map.entry(key).or_insert(Learnt::Is(value));
        if *known != Learnt::Is(value) {
            *known = Learnt::Differs;
        }
    }
}

fn known<K: std::hash::Hash + Eq>(map: &HashMap<K, Learnt>, key: &K) -> Option<Value> {
    match map.get(key) {
        Some(Learnt::Is(value)) => Some(*value),
        _ => None,
    }
}

impl Shared {
    /// A pointer was stored to a member.
    pub fn learn_field(&mut self, field: (TypeId, u32), value: Value) {
        learn(&mut self.fields, field, value);
    }

    /// What a member holds.
    pub fn field(&self, field: (TypeId, u32)) -> Option<Value> {
        known(&self.fields, &field)
    }

    /// A pointer was stored to a variable.
    pub fn learn_global(&mut self, at: (usize, u64), value: Value) {
        learn(&mut self.globals, at, value);
    }

    /// What a variable holds.
    pub fn global(&self, at: (usize, u64)) -> Option<Value> {
        known(&self.globals, &at)
    }

    /// A function was called with this as an argument.
    pub fn learn_parameter(&mut self, function: usize, index: usize, value: Value) {
        learn(&mut self.parameters, (function, index), value);
    }

    /// What a function is called with.
    pub fn parameter(&self, function: usize, index: usize) -> Option<Value> {
        known(&self.parameters, &(function, index))
    }

    /// Behind this structure is private data of that one.
    pub fn learn_private(&mut self, behind: TypeId, is: TypeId) {
        learn(
            &mut self.privates,
            behind,
            Value::Struct { id: is, offset: 0 },
        );
    }

    /// What is behind a structure.
    pub fn private(&self, behind: TypeId) -> Option<TypeId> {
        match known(&self.privates, &behind) {
            Some(Value::Struct { id, .. }) => Some(id),
            _ => None,
        }
    }
}
