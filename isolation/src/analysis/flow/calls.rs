//! Calls: what functions return, and what they are told.

use super::super::code::Callee;
use super::super::facts;
use super::super::reached::ARGUMENTS;
use super::super::values::{State, Value};
use super::{Flow, HANDED_ON, LOST};

impl Flow<'_> {
    /// What a call makes of what is known.
    pub(super) fn call(&mut self, state: &mut State, at: usize, callee: Callee) {
        let arguments = ARGUMENTS.map(|register| self.register(state, register));
        let name = match callee {
            Callee::Import(import) => self.ko.imports.get(import).copied().unwrap_or_default(),
            _ => "",
        };
        let result = match callee {
            Callee::Function(function) => {
                for (index, value) in arguments.iter().enumerate() {
                    self.shared.learn_parameter(function, index, *value);
                }
                match self.shared.returns.get(&function).copied() {
                    Some((Value::Device { bits, .. }, memory)) => self.site(at, memory, bits),
                    Some((value, _)) => value,
                    None => Value::Unknown,
                }
            }
            Callee::Import(_) => self.imported(at, name, &arguments),
            Callee::Indirect | Callee::Inside(_) | Callee::Elsewhere => Value::Unknown,
        };
        if let Some(registered) = facts::LINUX.registers.get(name)
            && let (Some(Value::Function(function)), Some(cookie)) = (
                arguments.get(registered.function),
                arguments.get(registered.handed),
            )
        {
            let parameter = registered.parameter;
            self.shared.learn_parameter(*function, parameter, *cookie);
        }
        for value in arguments {
            if let Value::Stack(from) = value {
                state.store(from, HANDED_ON, Value::Unknown);
            }
        }
        for register in LOST {
            if let Some(slot) = state.registers.get_mut(register) {
                *slot = Value::Unknown;
            }
        }
        if let Some(slot) = state.registers.first_mut() {
            *slot = result;
        }
    }

    /// What a function of the kernel returns.
    fn imported(&mut self, at: usize, name: &str, arguments: &[Value; 6]) -> Value {
        let facts = &*facts::LINUX;
        if facts.maps_registers.contains(&name) {
            return Value::Registers;
        }
        if facts.maps_arrays.contains(&name) {
            return Value::RegisterTable;
        }
        if facts.shares_memory.contains(&name) {
            return Value::Shared;
        }
        if let Some(bits) = facts.reads_register.get(name) {
            return self.site(at, false, *bits);
        }
        let Some(objects) = self.objects else {
            return Value::Unknown;
        };
        let size = |argument: usize| match arguments.get(argument) {
            Some(Value::Number(size)) => u64::try_from(*size)
                .ok()
                .and_then(|size| objects.of_size(size)),
            _ => None,
        };
        if let Some(allocated) = facts.allocates_private.get(name) {
            let Some(id) = objects.types().find_struct(allocated.structure) else {
                return Value::Unknown;
            };
            if let Some(private) = size(allocated.size) {
                self.shared.learn_private(id, private);
            }
            return Value::Struct { id, offset: 0 };
        }
        let id = facts
            .allocates
            .get(name)
            .and_then(|argument| size(*argument));
        id.map_or(Value::Unknown, |id| Value::Struct { id, offset: 0 })
    }
}
