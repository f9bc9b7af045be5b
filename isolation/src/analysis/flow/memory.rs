//! Loads and stores: where they go, and what is known of what is there.

use iced_x86::Register;

use super::super::arithmetic::narrowed;
use super::super::image::Place;
use super::super::values::{MAX_SITES, State, Value};
use super::{Address, Flow, Site};

impl Flow<'_> {
    /// Where the memory operand is.
    pub fn address(&self, state: &State, at: usize) -> Address {
        let Some(insn) = self.code.insns.get(at) else {
            return Address::Unknown;
        };
        let i = &insn.i;
        if i.segment_prefix() != Register::None {
            return Address::Unknown;
        }
        let (base, index) = (i.memory_base(), i.memory_index());
        let indexed = index != Register::None;
        if let Some(refers) = insn.refers.filter(|refers| refers.displacement) {
            let Place::Here { section, offset } = refers.to else {
                return Address::Unknown;
            };
            let relative = base == Register::RIP;
            return Address::Data {
                at: (section, offset),
                indexed: indexed || !relative && base != Register::None,
            };
        }
        let displacement = i.memory_displacement64().cast_signed();
        let based = |value: Value| match value {
            Value::Stack(from) if !indexed => i32::try_from(displacement)
                .ok()
                .and_then(|by| from.checked_add(by))
                .map_or(Address::Unknown, Address::Stack),
            Value::Struct { id, offset } => Address::Struct {
                id,
                offset: i64::from(offset).saturating_add(displacement),
                indexed,
            },
            Value::Data(section, offset) => {
                offset
                    .checked_add_signed(displacement)
                    .map_or(Address::Unknown, |offset| Address::Data {
                        at: (section, offset),
                        indexed,
                    })
            }
            Value::Registers => Address::Registers,
            Value::RegisterTable => Address::RegisterTable,
            Value::Shared => Address::Shared,
            _ => Address::Unknown,
        };
        match based(self.register(state, base)) {
            // `(%rdx,%rax)` with the address in the second one.
            Address::Unknown if indexed && i.memory_index_scale() == 1 => {
                match self.register(state, index) {
                    Value::Registers => Address::Registers,
                    Value::Shared => Address::Shared,
                    _ => Address::Unknown,
                }
            }
            address => address,
        }
    }

    pub(super) fn site(&mut self, insn: usize, memory: bool, bits: u8) -> Value {
        let known = self.sites.iter().position(|site| site.insn == insn);
        let index = known.unwrap_or_else(|| {
            if self.sites.len() < MAX_SITES {
                self.sites.push(Site { insn, memory });
            }
            self.sites.len() - 1
        });
        Value::Device {
            sites: 1 << index,
            bits,
        }
    }

    pub(super) fn load(&mut self, state: &State, at: usize, bytes: usize) -> Value {
        let bits = u8::try_from(bytes.saturating_mul(8)).unwrap_or(64).min(64);
        match self.address(state, at) {
            Address::Unknown => Value::Unknown,
            Address::Stack(from) => state
                .slots
                .get(&from)
                .map_or(Value::Unknown, |value| narrowed(*value, bytes)),
            Address::Registers => self.site(at, false, bits),
            Address::Shared => self.site(at, true, bits),
            Address::RegisterTable if bytes == 8 => Value::Registers,
            Address::RegisterTable => Value::Unknown,
            Address::Data { at, indexed: false } if bytes == 8 => {
                self.shared.global(at).unwrap_or(Value::Unknown)
            }
            Address::Data { .. } => Value::Unknown,
            Address::Struct { id, offset, .. } if bytes == 8 => {
                let Some(objects) = self.objects else {
                    return Value::Unknown;
                };
                let member = objects
                    .settle(self.shared, id, offset)
                    .and_then(|(id, offset)| objects.member(id, offset));
                let Some(member) = member else {
                    return Value::Unknown;
                };
                let by_type = objects
                    .pointed_at(member.type_id)
                    .map(|id| Value::Struct { id, offset: 0 });
                // What was stored says more than `void *`.
                self.shared
                    .field(member.field)
                    .filter(|_| by_type.is_none())
                    .or(by_type)
                    .unwrap_or(Value::Unknown)
            }
            Address::Struct { .. } => Value::Unknown,
        }
    }

    pub(super) fn store(&mut self, state: &mut State, at: usize, bytes: usize, value: Value) {
        match self.address(state, at) {
            Address::Stack(from) => state.store(from, bytes, value),
            Address::Struct { id, offset, .. } => {
                let Some(objects) = self.objects else { return };
                let member = objects
                    .settle(self.shared, id, offset)
                    .and_then(|(id, offset)| objects.member(id, offset));
                if let Some(member) =
                    member.filter(|member| objects.pointed_at(member.type_id).is_none())
                {
                    self.shared.learn_field(member.field, value);
                }
            }
            Address::Data { at, indexed: false } => self.shared.learn_global(at, value),
            _ => {}
        }
    }
}
