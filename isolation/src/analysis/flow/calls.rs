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
        let registered = facts::REGISTERS
            .iter()
            .find(|(registers, ..)| *registers == name);
        if let Some((_, function, cookie, parameter)) = registered
            && let (Some(Value::Function(function)), Some(cookie)) =
                (arguments.get(*function), arguments.get(*cookie))
        {
            self.shared.learn_parameter(*function, *parameter, *cookie);
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
        if facts::MAPS_REGISTERS.contains(&name) {
            return Value::Registers;
        }
        if facts::MAPS_ARRAYS.contains(&name) {
            return Value::RegisterTable;
        }
        if facts::SHARES_MEMORY.contains(&name) {
            return Value::Shared;
        }
        if let Some((_, bits)) = facts::READS_REGISTER
            .iter()
            .find(|(reads, _)| *reads == name)
        {
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
        if let Some((_, structure, argument)) = facts::ALLOCATES_PRIVATE
            .iter()
            .find(|(known, ..)| *known == name)
        {
            let Some(id) = objects.types().find_struct(structure) else {
                return Value::Unknown;
            };
            if let Some(private) = size(*argument) {
                self.shared.learn_private(id, private);
            }
            return Value::Struct { id, offset: 0 };
        }
        let allocates = facts::ALLOCATES.iter().find(|(known, _)| *known == name);
        let id = allocates.and_then(|(_, argument)| size(*argument));
        id.map_or(Value::Unknown, |id| Value::Struct { id, offset: 0 })
    }
}
