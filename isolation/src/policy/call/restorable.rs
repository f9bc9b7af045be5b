//! What is the driver's when a call begins: the bytes that are put back if it fails after a part of
//! it was published. What kernel functions keep among them is not the driver's: that is taken back
//! by calling their opposites.

use std::collections::HashMap;

use super::{CallMemory, DriverPolicy};
use crate::guest::addr::GvaRange;
use crate::guest::btf::{Btf, Kind, TypeId};
use crate::guest::phys::GuestPhys;
use crate::policy::range_table::{Lifetime, ObjectKind};
use crate::policy::reach::Rules;

/// Deepest nesting of structures that is looked into.
const MAX_NESTING: usize = 8;
/// Most members of one structure that are looked at, those of members included.
const MAX_MEMBERS: usize = 1 << 14;
/// Most pieces that kernel functions keep in one structure.
const MAX_PIECES: usize = 1 << 10;
/// Most pieces in all.
const MAX_KERNELS: usize = 1 << 16;

/// What is the driver's when a call begins.
#[derive(Debug, Clone, Default)]
pub struct Drivers {
    /// All of it.
    pub own: Vec<GvaRange>,
    /// What kernel functions keep within that.
    pub kernels: Vec<GvaRange>,
    /// Of this, the links of lists (`struct list_head`) in structures that the driver's module
    /// defines.
    pub links: Vec<GvaRange>,
}

/// What kernel functions keep in a structure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    offset: u64,
    bytes: u64,
    links: bool,
}

impl DriverPolicy {
    /// What belongs to the driver now.
    pub fn restorable<M: GuestPhys>(&mut self, memory: &CallMemory<'_, M>) -> Drivers {
        self.list_interfaces(memory);
        let interfaces = self.known_interfaces(memory);
        let data = self.table.iter().map(|(_, object)| object);
        let data = data.filter(|object| object.lifetime == Lifetime::Driver);
        let mut drivers = Drivers {
            own: data.map(|object| object.range).collect(),
            ..Drivers::default()
        };
        let mut layouts: HashMap<TypeId, Vec<Piece>> = HashMap::new();
        for call in &self.calls {
            for object in self.reached_from(memory, call, &interfaces).objects {
                // Counters of the processor at hand, which changes while the call is in the guest.
                if object.kind == ObjectKind::Other && object.layout.is_none() {
                    continue;
                }
                drivers.own.push(object.range);
                let Some(id) = object.layout else { continue };
                let pieces = layouts
                    .entry(id)
                    .or_insert_with(|| kernels_pieces(&self.types, self.rules, id));
                let bytes = self.types.size_of(id).filter(|bytes| *bytes > 0);
                let count = bytes.map_or(0, |bytes| object.range.len_bytes() / bytes);
                for element in 0..count {
                    let first = object
                        .range
                        .first()
                        .checked_add(element * bytes.unwrap_or(0));
                    for piece in pieces.iter() {
                        let at = first.and_then(|first| first.checked_add(piece.offset));
                        let Some(range) = at.and_then(|at| GvaRange::new(at, piece.bytes)) else {
                            continue;
                        };
                        drivers.kernels.push(range);
                        if piece.links && self.types.is_own(id) {
                            drivers.links.push(range);
                        }
                    }
                    if pieces.is_empty() || drivers.kernels.len() > MAX_KERNELS {
                        break;
                    }
                }
            }
        }
        drivers
    }
}

/// What kernel functions keep in a structure of type `id`.
fn kernels_pieces(types: &Btf, rules: &Rules, id: TypeId) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut work = MAX_MEMBERS;
    collect(types, rules, (id, 0), MAX_NESTING, &mut work, &mut pieces);
    pieces
}

fn collect(
    types: &Btf,
    rules: &Rules,
    (type_id, at): (TypeId, u64),
    nesting: usize,
    work: &mut usize,
    pieces: &mut Vec<Piece>,
) {
    let (Some(nesting), Some((id, kind))) = (nesting.checked_sub(1), types.resolve(type_id)) else {
        return;
    };
    match kind {
        Kind::Struct { bytes, members } | Kind::Union { bytes, members } => {
            let name = types.name(id);
            if rules.kernels.contains(&name) {
                if pieces.len() < MAX_PIECES {
                    pieces.push(Piece {
                        offset: at,
                        bytes: bytes.into(),
                        links: name == rules.links,
                    });
                }
                return;
            }
            for member in members.iter() {
                let Some(left) = work.checked_sub(1) else {
                    return;
                };
                *work = left;
                let offset = at + u64::from(member.bit_offset / 8);
                let member_name = types.string(member.name_at);
                let mut kernels = rules.kernels_members.iter();
                let is_kernels = kernels.any(|one| (one.of, one.member) == (name, member_name));
                if is_kernels && pieces.len() < MAX_PIECES {
                    pieces.push(Piece {
                        offset,
                        bytes: types.size_of(member.type_id).unwrap_or(0),
                        links: false,
                    });
                    continue;
                }
                collect(
                    types,
                    rules,
                    (member.type_id, offset),
                    nesting,
                    work,
                    pieces,
                );
            }
        }
        Kind::Array { element, count } => {
            let bytes = types.size_of(element).unwrap_or(0);
            for index in 0..u64::from(count) {
                let before = (pieces.len(), *work);
                collect(
                    types,
                    rules,
                    (element, at + index * bytes),
                    nesting,
                    work,
                    pieces,
                );
                // The other elements are like the first.
                if pieces.len() == before.0 || *work == 0 {
                    return;
                }
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::btf::encode::Encoder;

    #[test]
    fn what_kernel_functions_keep_is_found_at_any_depth() {
        let mut e = Encoder::new(None);
        let word = e.int("unsigned long", 8, 0);
        let list = e.structure("list_head", 16, &[("next", word, 0), ("prev", word, 8)]);
        let work = e.structure("work_struct", 32, &[("data", word, 0), ("entry", list, 8)]);
        let lists = e.array(list, 2);
        let inner = e.structure("inner", 40, &[("n", word, 0), ("lists", lists, 8)]);
        let outer = e.structure(
            "outer",
            96,
            &[("n", word, 0), ("work", work, 8), ("inner", inner, 40)],
        );
        let device = e.structure("net_device", 16, &[("mtu", word, 0), ("state", word, 8)]);
        let types = Btf::parse(&e.bytes(), None).unwrap();
        let pieces = |id| -> Vec<(u64, u64, bool)> {
            let found = kernels_pieces(&types, Rules::linux(), id);
            let parts = found.iter();
            parts
                .map(|piece| (piece.offset, piece.bytes, piece.links))
                .collect()
        };
        assert_eq!(
            pieces(outer),
            [(8, 32, false), (48, 16, true), (64, 16, true)]
        );
        assert_eq!(pieces(device), [(8, 8, false)]);
        assert_eq!(pieces(list), [(0, 16, true)]);
        assert_eq!(pieces(word), []);
    }
}
