//! Which structure of operations an object of a module is.
//!
//! BTF says nothing of a module's variables, so the type is worked out: an object of the same size
//! as a structure, each of whose functions is a pointer of the structure's at that offset, to a
//! function of that very type. Where several structures fit, the name of the object decides; where
//! that does not tell either, none is believed. What a known object points at (`driver.pm`) is of
//! the type that the pointer has.

use std::collections::{BTreeMap, HashMap};

use super::image::{Ko, Place};
use crate::guest::btf::{Btf, Kind, TypeId};

/// Most structures in structures.
const MAX_NESTING: usize = 5;
/// Most members of a structure that are looked at.
const MAX_SLOTS: usize = 2048;
/// Most elements of an array of structures.
const MAX_ELEMENTS: u64 = 256;
/// Smallest structure that is looked for as an array's element, in bytes.
const SMALLEST_ELEMENT: u64 = 64;

/// A pointer in a structure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Offset in bytes.
    pub offset: u64,
    /// Path of members: `driver.pm`.
    pub path: String,
    /// What it points at.
    pub to: TypeId,
    /// It points at a function.
    pub function: bool,
}

/// A structure with pointers to functions in it.
#[derive(Debug, Clone)]
pub struct Layout {
    /// The structure.
    pub id: TypeId,
    /// Its name.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// Its pointers, by offset.
    pub slots: Vec<Slot>,
}

impl Layout {
    /// The pointer at an offset.
    pub fn slot(&self, offset: u64) -> Option<&Slot> {
        let index = self.slots.partition_point(|slot| slot.offset < offset);
        self.slots.get(index).filter(|slot| slot.offset == offset)
    }
}

/// Makes layouts of types.
#[derive(Debug)]
pub struct Layouts;

impl Layouts {
    /// All structures of these that have pointers to functions.
    pub fn of(types: &Btf, ids: impl Iterator<Item = TypeId>) -> Vec<Layout> {
        let layouts = ids.filter_map(|id| {
            let layout = Self::one(types, id)?;
            layout
                .slots
                .iter()
                .any(|slot| slot.function)
                .then_some(layout)
        });
        layouts.collect()
    }

    /// The layout of one structure with a name.
    pub fn one(types: &Btf, id: TypeId) -> Option<Layout> {
        let Some(Kind::Struct { bytes, .. }) = types.kind(id) else {
            return None;
        };
        let name = types.name(id).to_owned();
        if name.is_empty() || bytes == 0 {
            return None;
        }
        let mut slots = Vec::new();
        collect(types, id, 0, "", MAX_NESTING, &mut slots);
        slots.sort_by_key(|slot| slot.offset);
        slots.dedup_by_key(|slot| slot.offset);
        Some(Layout {
            id,
            name,
            bytes: u64::from(bytes),
            slots,
        })
    }
}

fn collect(types: &Btf, id: TypeId, base: u64, path: &str, depth: usize, slots: &mut Vec<Slot>) {
    let Some((_, Kind::Struct { members, .. } | Kind::Union { members, .. })) = types.resolve(id)
    else {
        return;
    };
    let Some(depth) = depth.checked_sub(1) else {
        return;
    };
    for member in members.iter().take(MAX_SLOTS) {
        if slots.len() >= MAX_SLOTS {
            return;
        }
        let Some(offset) = base.checked_add(u64::from(member.bit_offset / 8)) else {
            return;
        };
        let path = match (path, types.string(member.name_at)) {
            (path, "") => path.to_owned(),
            ("", name) => name.to_owned(),
            (path, name) => format!("{path}.{name}"),
        };
        match types.resolve(member.type_id) {
            Some((_, Kind::Pointer(to))) => {
                let function = matches!(types.resolve(to), Some((_, Kind::FunctionType { .. })));
                slots.push(Slot {
                    offset,
                    path,
                    to,
                    function,
                });
            }
            Some((id, Kind::Struct { .. } | Kind::Union { .. })) => {
                collect(types, id, offset, &path, depth, slots)
            }
            _ => {}
        }
    }
}

/// The kernel's structures, by size.
#[derive(Debug, Default)]
pub struct OperationLayouts {
    all: Vec<Layout>,
    by_size: BTreeMap<u64, Vec<usize>>,
}

impl OperationLayouts {
    /// Sorts them.
    pub fn new(all: Vec<Layout>) -> Self {
        let mut by_size: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
        for (index, layout) in all.iter().enumerate() {
            by_size.entry(layout.bytes).or_default().push(index);
        }
        Self { all, by_size }
    }

    fn of_size(&self, bytes: u64) -> impl Iterator<Item = &Layout> {
        let indices = self.by_size.get(&bytes).into_iter().flatten();
        indices.filter_map(|index| self.all.get(*index))
    }

    fn that_divide(&self, bytes: u64) -> impl Iterator<Item = &Layout> {
        let from = SMALLEST_ELEMENT.max(bytes / MAX_ELEMENTS);
        let sizes = self.by_size.range(from..=(bytes / 2).max(from));
        let fitting = sizes.filter(move |(size, _)| bytes.is_multiple_of(**size));
        fitting
            .flat_map(|(_, indices)| indices)
            .filter_map(|index| self.all.get(*index))
    }
}

/// What an object's pointer leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PointsAt {
    /// A function of the module, by index.
    Function(usize),
    /// Something of the kernel or of another module, by index.
    Import(usize),
    /// Data, by section and offset.
    Data(usize, u64),
}

/// An object with functions in it.
#[derive(Debug, Clone)]
pub struct Operations {
    /// Index in [`Ko::objects`].
    pub object: usize,
    /// Its structure.
    pub layout: Option<Layout>,
    /// What it points at, by offset in the object.
    pub pointers: Vec<(u64, PointsAt)>,
}

impl Operations {
    /// What the pointer at an offset is called, and what it is.
    pub fn slot(&self, offset: u64) -> Option<&Slot> {
        let layout = self.layout.as_ref()?;
        layout.slot(offset.checked_rem(layout.bytes)?)
    }

    /// What the member of this path points at; the first, if the object is an array.
    pub fn member(&self, path: &str) -> Option<PointsAt> {
        let wanted = |offset: &u64| self.slot(*offset).is_some_and(|slot| slot.path == path);
        self.pointers
            .iter()
            .find(|(offset, _)| wanted(offset))
            .map(|(_, to)| *to)
    }
}

/// Finds the objects of a module that are structures of operations.
pub fn find(ko: &Ko<'_>, types: &Btf, kernels: &OperationLayouts) -> Vec<Operations> {
    let own = OperationLayouts::new(match types.base() {
        Some(_) => Layouts::of(types, types.own_ids()),
        None => Vec::new(),
    });
    let mut pointers: BTreeMap<usize, Vec<(u64, PointsAt)>> = BTreeMap::new();
    for (section, holder) in ko.sections.iter().enumerate() {
        for relocation in &holder.relocations {
            let Some(object) = ko.object_around(section, relocation.at) else {
                continue;
            };
            let Some(start) = ko.objects.get(object).map(|object| object.start) else {
                continue;
            };
            let to = match relocation.to {
                Place::Import(import) => PointsAt::Import(import),
                Place::Here { section, offset } => {
                    let Some(offset) = offset.checked_add_signed(relocation.addend) else {
                        continue;
                    };
                    ko.function_at(section, offset)
                        .map_or(PointsAt::Data(section, offset), PointsAt::Function)
                }
            };
            pointers
                .entry(object)
                .or_default()
                .push((relocation.at - start, to));
        }
    }
    let mut found: Vec<Operations> = Vec::new();
    for (object, pointers) in pointers {
        let layout = best(ko, types, [kernels, &own], object, &pointers).cloned();
        found.push(Operations {
            object,
            layout,
            pointers,
        });
    }
    spread(ko, types, &mut found);
    let calls = |(_, to): &(u64, PointsAt)| matches!(to, PointsAt::Function(_));
    found.retain(|operations| operations.layout.is_some() || operations.pointers.iter().any(calls));
    found
}

/// The one structure that fits.
fn best<'a>(
    ko: &Ko<'_>,
    types: &Btf,
    sources: [&'a OperationLayouts; 2],
    object: usize,
    pointers: &[(u64, PointsAt)],
) -> Option<&'a Layout> {
    if !pointers
        .iter()
        .any(|(_, to)| matches!(to, PointsAt::Function(_)))
    {
        return None;
    }
    let object = ko.objects.get(object)?;
    let fits = |layout: &&Layout| fits(ko, types, layout, pointers);
    let mut candidates: Vec<&Layout> = sources
        .iter()
        .flat_map(|source| source.of_size(object.len))
        .filter(fits)
        .collect();
    if candidates.is_empty() {
        candidates = sources
            .iter()
            .flat_map(|source| source.that_divide(object.len))
            .filter(fits)
            .collect();
    }
    // One structure may be in the types several times, differing in what they point at.
    candidates.dedup_by(|a, b| a.name == b.name);
    if candidates.len() > 1 {
        let named = |layout: &&Layout| is_named_after(object.name, &layout.name);
        let by_name: Vec<&Layout> = candidates.iter().copied().filter(named).collect();
        if by_name.len() == 1 {
            candidates = by_name;
        }
    }
    match candidates.as_slice() {
        [one] => Some(one),
        _ => None,
    }
}

/// `e1000_driver` after `pci_driver`, `rtl_ethtool_ops` after `ethtool_ops`.
fn is_named_after(object: &str, structure: &str) -> bool {
    let object = object.split('.').next().unwrap_or(object);
    let words: Vec<&str> = structure.split('_').collect();
    object.ends_with(structure) || words.len() > 1 && words.iter().all(|word| object.contains(word))
}

fn fits(ko: &Ko<'_>, types: &Btf, layout: &Layout, pointers: &[(u64, PointsAt)]) -> bool {
    let mut functions = 0;
    let all = pointers.iter().all(|(offset, to)| {
        let slot = layout.slot(offset % layout.bytes);
        match to {
            PointsAt::Function(index) => {
                functions += 1;
                let name = ko
                    .functions
                    .get(*index)
                    .map_or("", |function| function.name);
                slot.is_some_and(|slot| slot.function && takes(types, slot.to, name))
            }
            PointsAt::Import(index) => {
                let name = ko.imports.get(*index).copied().unwrap_or_default();
                slot.is_some_and(|slot| {
                    functions += usize::from(slot.function);
                    !slot.function || takes(types, slot.to, name)
                })
            }
            PointsAt::Data(..) => slot.is_some_and(|slot| !slot.function),
        }
    });
    all && functions > 0
}

/// Whether a pointer to a function of type `wanted` may be the function of this name. One without a
/// type may be any.
fn takes(types: &Btf, wanted: TypeId, name: &str) -> bool {
    let name = name.split('.').next().unwrap_or(name);
    let Some(function) = types.find_function(name) else {
        return true;
    };
    let Some((_, Kind::FunctionType { returns, params })) = types.resolve(wanted) else {
        return false;
    };
    params.len() == function.params.len()
        && same(types, returns, function.returns, 4)
        && params
            .iter()
            .zip(function.params.iter())
            .all(|(a, b)| same(types, a.type_id, b.type_id, 4))
}

/// Whether two types are the same to a caller.
pub fn same(types: &Btf, a: TypeId, b: TypeId, depth: usize) -> bool {
    if a == b {
        return true;
    }
    let (Some((a, of_a)), Some((b, of_b))) = (types.resolve(a), types.resolve(b)) else {
        return false;
    };
    let names = || types.name(a) == types.name(b);
    match (of_a, of_b) {
        _ if a == b => true,
        (Kind::Pointer(a), Kind::Pointer(b)) => depth == 0 || same(types, a, b, depth - 1),
        (
            Kind::Int {
                bytes: a,
                signed: s,
                ..
            },
            Kind::Int {
                bytes: b,
                signed: t,
                ..
            },
        ) => (a, s) == (b, t),
        (
            Kind::Struct { .. } | Kind::Forward { .. },
            Kind::Struct { .. } | Kind::Forward { .. },
        )
        | (Kind::Union { .. }, Kind::Union { .. })
        | (Kind::Enum { .. }, Kind::Enum { .. }) => names(),
        (Kind::FunctionType { .. }, Kind::FunctionType { .. }) => true,
        _ => false,
    }
}

/// Gives objects that known ones point at the type of the pointer.
fn spread(ko: &Ko<'_>, types: &Btf, found: &mut [Operations]) {
    let at: HashMap<usize, usize> = found
        .iter()
        .enumerate()
        .map(|(index, operations)| (operations.object, index))
        .collect();
    let mut todo: Vec<usize> = (0..found.len()).collect();
    let mut left = found.len() * 4;
    while let Some(index) = todo.pop() {
        let Some(rest) = left.checked_sub(1) else {
            return;
        };
        left = rest;
        let Some(operations) = found
            .get(index)
            .filter(|operations| operations.layout.is_some())
        else {
            continue;
        };
        let mut learnt = Vec::new();
        for (offset, to) in &operations.pointers {
            let PointsAt::Data(section, target) = to else {
                continue;
            };
            let Some(object) = ko.object_around(*section, *target) else {
                continue;
            };
            let starts = ko
                .objects
                .get(object)
                .is_some_and(|object| object.start == *target);
            let layout = operations
                .slot(*offset)
                .and_then(|slot| Layouts::one(types, types.resolve(slot.to)?.0));
            if let (true, Some(other), Some(layout)) = (starts, at.get(&object), layout) {
                learnt.push((*other, layout));
            }
        }
        for (other, layout) in learnt {
            if let Some(operations) = found
                .get_mut(other)
                .filter(|operations| operations.layout.is_none())
                && fits(ko, types, &layout, &operations.pointers)
            {
                operations.layout = Some(layout);
                todo.push(other);
            }
        }
    }
}
