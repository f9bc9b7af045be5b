//! Values of registers through one function, as far as types, mappings of registers and what a
//! device delivers are concerned.
//!
//! Blocks are gone through until nothing changes. Where ways meet, what is not the same on both is
//! forgotten. A function is called with what BTF says of its parameters, or with what its callers
//! were seen to pass, and returns what it was seen to return.

mod calls;
mod memory;

use iced_x86::{
    Instruction, InstructionInfoFactory, MemorySize, Mnemonic, OpAccess, OpKind, Register,
};

use super::arithmetic::{arithmetic, computed, is_conditional_move, narrowed, reads_condition};
use super::code::{Code, Goes};
use super::image::{Ko, Place};
use super::objects::Objects;
use super::reached::ARGUMENTS;
use super::values::{Shared, State, Value};

/// Times that a block is gone through, on average, before a function is given up.
const MAX_VISITS: usize = 24;
/// Registers that a call does not keep (System V ABI, figure 3.4): `rax`, `rcx`, `rdx`, `rsi`,
/// `rdi`, `r8` to `r11`.
const LOST: [usize; 9] = [0, 1, 2, 6, 7, 8, 9, 10, 11];

/// Bytes of the frame behind an address that is handed on, of which nothing is known then.
const HANDED_ON: usize = 64;

/// Where a value was loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Site {
    /// The instruction.
    pub insn: usize,
    /// From memory that the device writes, not from a register.
    pub memory: bool,
}

/// Where an instruction's memory operand is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Address {
    /// Not known.
    Unknown,
    /// In the stack frame.
    Stack(i32),
    /// In an object.
    Struct {
        /// Its type.
        id: crate::guest::btf::TypeId,
        /// Offset.
        offset: i64,
        /// A register is added to it.
        indexed: bool,
    },
    /// In the module's data.
    Data {
        /// Section and offset.
        at: (usize, u64),
        /// A register is added to it.
        indexed: bool,
    },
    /// Of a device's register.
    Registers,
    /// Of such an address.
    RegisterTable,
    /// Of memory that a device writes.
    Shared,
}

/// One function, gone through.
pub struct Flow<'a> {
    ko: &'a Ko<'a>,
    code: &'a Code,
    function: usize,
    objects: Option<&'a Objects<'a>>,
    shared: &'a mut Shared,
    factory: InstructionInfoFactory,
    /// Loads of what a device delivers.
    pub sites: Vec<Site>,
    /// What is known at the start of each block; nothing of one that is not reached.
    pub starts: Vec<Option<State>>,
}

impl<'a> Flow<'a> {
    /// Goes through a function. `None` if it is too tangled.
    pub fn of(
        ko: &'a Ko<'a>,
        code: &'a Code,
        function: usize,
        objects: Option<&'a Objects<'a>>,
        shared: &'a mut Shared,
    ) -> Option<Self> {
        let starts = vec![None; code.blocks.len()];
        let factory = InstructionInfoFactory::new();
        let mut flow = Self {
            ko,
            code,
            function,
            objects,
            shared,
            factory,
            sites: Vec::new(),
            starts,
        };
        *flow.starts.first_mut()? = Some(flow.entry());
        let mut todo = vec![0];
        let mut left = code.blocks.len().saturating_mul(MAX_VISITS);
        let mut returned: Option<(Value, bool)> = None;
        while let Some(index) = todo.pop() {
            left = left.checked_sub(1)?;
            let block = code.blocks.get(index)?;
            let mut state = flow.starts.get(index)?.clone()?;
            for at in block.first..block.behind {
                flow.step(&mut state, at);
            }
            for next in &block.next {
                let start = flow.starts.get_mut(*next)?;
                let changed = match start {
                    Some(known) => known.join(&state),
                    None => {
                        *start = Some(state.clone());
                        true
                    }
                };
                if changed && !todo.contains(next) {
                    todo.push(*next);
                }
            }
        }
        for (block, start) in code.blocks.iter().zip(flow.starts.clone()) {
            let Some(mut state) = start else { continue };
            let last = block.behind.checked_sub(1)?;
            let goes = code.insns.get(last)?.goes;
            if !matches!(goes, Goes::Return | Goes::TailCall(_)) {
                continue;
            }
            for at in block.first..block.behind {
                flow.step(&mut state, at);
            }
            let value = state.registers.first().copied().unwrap_or(Value::Unknown);
            let memory = matches!(value, Value::Device { sites, .. } if flow.all_memory(sites));
            returned = Some(match returned {
                Some((known, from_memory)) => (known.join(value), from_memory && memory),
                None => (value, memory),
            });
        }
        if let Some((value, memory)) = returned
            && (value.is_pointer() || matches!(value, Value::Device { .. }))
        {
            flow.shared.returns.insert(function, (value, memory));
        }
        Some(flow)
    }

    /// What is known of the module as a whole.
    pub fn shared(&self) -> &Shared {
        self.shared
    }

    /// Whether these sites load from memory alone.
    pub fn all_memory(&self, sites: u64) -> bool {
        let all = self
            .sites
            .iter()
            .enumerate()
            .filter(|(index, _)| sites >> index & 1 != 0);
        all.fold((true, false), |(all, _), (_, site)| {
            (all && site.memory, true)
        }) == (true, true)
    }

    fn entry(&self) -> State {
        let mut state = State::at_start();
        let name = self
            .ko
            .functions
            .get(self.function)
            .map_or("", |function| function.name);
        let typed = self
            .objects
            .and_then(|objects| Some((objects, objects.types().find_function(name)?)));
        for (index, register) in ARGUMENTS.iter().enumerate() {
            let by_type = typed.as_ref().and_then(|(objects, function)| {
                let parameter = function.params.iter().nth(index)?;
                Some(Value::Struct {
                    id: objects.pointed_at(parameter.type_id)?,
                    offset: 0,
                })
            });
            let value = by_type.or_else(|| self.shared.parameter(self.function, index));
            if let Some(slot) = state.registers.get_mut(register.number()) {
                *slot = value.unwrap_or(Value::Unknown);
            }
        }
        state
    }

    /// What a register holds.
    pub fn register(&self, state: &State, register: Register) -> Value {
        if !register.is_gpr() {
            return Value::Unknown;
        }
        let value = state
            .registers
            .get(register.full_register().number())
            .copied()
            .unwrap_or(Value::Unknown);
        narrowed(value, register.size())
    }

    fn set(&self, state: &mut State, register: Register, value: Value) {
        if !register.is_gpr() {
            return;
        }
        if let Some(slot) = state.registers.get_mut(register.full_register().number()) {
            *slot = match (value, register.size()) {
                (value, 4 | 8) => value,
                // The upper bytes are what they were.
                (Value::Device { .. }, _) => value,
                _ => Value::Unknown,
            };
        }
    }

    /// What an operand is, loaded if it is in memory.
    pub fn operand(&mut self, state: &State, at: usize, number: u32) -> Value {
        let Some(insn) = self.code.insns.get(at).copied() else {
            return Value::Unknown;
        };
        let i = &insn.i;
        match i.op_kind(number) {
            OpKind::Register => self.register(state, i.op_register(number)),
            OpKind::Memory => self.load(state, at, i.memory_size().size()),
            OpKind::Immediate8
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate32to64
            | OpKind::Immediate64 => match insn.refers.filter(|refers| !refers.displacement) {
                Some(refers) => self.referred(refers.to),
                None => Value::Number(i.immediate(number).cast_signed()),
            },
            _ => Value::Unknown,
        }
    }

    fn referred(&self, to: Place) -> Value {
        match to {
            Place::Here { section, offset } => match self.ko.function_at(section, offset) {
                Some(function) => Value::Function(function),
                None => Value::Data(section, offset),
            },
            Place::Import(_) => Value::Unknown,
        }
    }

    /// What is known behind an instruction.
    pub fn step(&mut self, state: &mut State, at: usize) {
        let Some(insn) = self.code.insns.get(at).copied() else {
            return;
        };
        match insn.goes {
            Goes::Call(callee) | Goes::TailCall(callee) => return self.call(state, at, callee),
            Goes::Next => {}
            _ => return,
        }
        let i = &insn.i;
        match i.mnemonic() {
            Mnemonic::Cmp => self.compared(state, at),
            Mnemonic::Test | Mnemonic::Nop | Mnemonic::Endbr64 | Mnemonic::Bt => {}
            Mnemonic::Call => {}
            Mnemonic::Push => {
                let value = self.operand(state, at, 0);
                self.move_stack(state, -8);
                if let Some(Value::Stack(top)) = state.registers.get(4).copied() {
                    state.store(top, 8, value);
                }
            }
            Mnemonic::Pop => {
                let value = match state.registers.get(4) {
                    Some(Value::Stack(top)) => {
                        state.slots.get(top).copied().unwrap_or(Value::Unknown)
                    }
                    _ => Value::Unknown,
                };
                self.move_stack(state, 8);
                self.set(state, i.op0_register(), value);
            }
            Mnemonic::Mov | Mnemonic::Movzx | Mnemonic::Movsxd | Mnemonic::Movsx => {
                let value = self.operand(state, at, 1);
                self.write(state, at, value);
            }
            Mnemonic::Lea => {
                let value = self.lea(state, at);
                self.set(state, i.op0_register(), value);
            }
            Mnemonic::In => {
                let bits = (i.op0_register().size() * 8) as u8;
                let value = self.site(at, false, bits);
                self.set(state, i.op0_register(), value);
            }
            _ if i.op_count() == 2 && arithmetic(i.mnemonic()) => {
                let (a, b) = (self.operand(state, at, 0), self.operand(state, at, 1));
                let same = i.op1_kind() == OpKind::Register
                    && i.op0_kind() == OpKind::Register
                    && i.op0_register() == i.op1_register();
                let value = match i.mnemonic() {
                    Mnemonic::Xor | Mnemonic::Sub if same => Value::Number(0),
                    mnemonic => computed(mnemonic, a, b),
                };
                self.write(state, at, value);
            }
            Mnemonic::Imul if i.op_count() == 3 => {
                let (a, b) = (self.operand(state, at, 1), self.operand(state, at, 2));
                self.write(state, at, computed(Mnemonic::Imul, a, b));
            }
            // One of the two, of which neither was compared: a maximum or minimum was.
            mnemonic if is_conditional_move(mnemonic) => {
                let (a, b) = (self.operand(state, at, 0), self.operand(state, at, 1));
                self.write(state, at, a.join(b));
            }
            Mnemonic::Bswap | Mnemonic::Cdqe => {}
            _ => self.forget(state, i),
        }
    }

    fn move_stack(&self, state: &mut State, by: i32) {
        if let Some(slot) = state.registers.get_mut(4) {
            *slot = match *slot {
                Value::Stack(top) => top.checked_add(by).map_or(Value::Unknown, Value::Stack),
                _ => Value::Unknown,
            };
        }
    }

    /// Writes the first operand.
    fn write(&mut self, state: &mut State, at: usize, value: Value) {
        let Some(insn) = self.code.insns.get(at) else {
            return;
        };
        match insn.i.op0_kind() {
            OpKind::Register => self.set(state, insn.i.op0_register(), value),
            OpKind::Memory => {
                let bytes = insn.i.memory_size().size();
                self.store(state, at, bytes, value);
            }
            _ => {}
        }
    }

    /// Forgets what an instruction that is not known writes.
    fn forget(&mut self, state: &mut State, i: &Instruction) {
        let info = self.factory.info(i);
        let written: Vec<Register> = info
            .used_registers()
            .iter()
            .filter(|used| {
                !matches!(
                    used.access(),
                    OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess
                )
            })
            .map(|used| used.register())
            .collect();
        for register in written.into_iter().filter(|register| register.is_gpr()) {
            if let Some(slot) = state.registers.get_mut(register.full_register().number()) {
                *slot = Value::Unknown;
            }
        }
        if i.memory_size() != MemorySize::Unknown && i.op0_kind() == OpKind::Memory {
            state.slots.clear();
        }
    }

    fn lea(&mut self, state: &State, at: usize) -> Value {
        let Some(insn) = self.code.insns.get(at).copied() else {
            return Value::Unknown;
        };
        let i = &insn.i;
        if let Some(refers) = insn.refers.filter(|refers| refers.displacement) {
            let plain = i.memory_index() == Register::None
                && matches!(i.memory_base(), Register::RIP | Register::None);
            return if plain {
                self.referred(refers.to)
            } else {
                Value::Unknown
            };
        }
        let base = match i.memory_base() {
            Register::None => Value::Number(0),
            register => self.register(state, register),
        };
        let displacement = i.memory_displacement64().cast_signed();
        let moved = computed(Mnemonic::Add, base, Value::Number(displacement));
        match i.memory_index() {
            Register::None => narrowed(moved, i.op0_register().size()),
            index => {
                let index = self.register(state, index);
                let scaled = computed(
                    Mnemonic::Imul,
                    index,
                    Value::Number(i64::from(i.memory_index_scale())),
                );
                narrowed(
                    computed(Mnemonic::Add, moved, scaled),
                    i.op0_register().size(),
                )
            }
        }
    }

    /// A comparison by size, or with a certain number, counts as a check of all that both come
    /// from.
    fn compared(&mut self, state: &mut State, at: usize) {
        let ordered = self
            .code
            .insns
            .get(at + 1..)
            .unwrap_or_default()
            .iter()
            .take(6);
        let reader = ordered.map(|insn| insn.i).find(reads_condition);
        let by_size = reader.is_some_and(|i| {
            !matches!(
                i.condition_code(),
                iced_x86::ConditionCode::e
                    | iced_x86::ConditionCode::ne
                    | iced_x86::ConditionCode::s
                    | iced_x86::ConditionCode::ns
            )
        });
        let values = [0, 1].map(|number| self.operand(state, at, number));
        // A case of a `switch`; not whether it is zero, or all ones as of a device that has gone.
        let by_case = values.iter().any(|value| matches!(value, Value::Number(number) if !matches!(number, 0 | -1 | 0xff | 0xffff | 0xffff_ffff)));
        for value in values {
            if let (Value::Device { sites, .. }, true) = (value, by_size || by_case) {
                state.checked |= sites;
            }
        }
    }
}
