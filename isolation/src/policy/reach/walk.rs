//! The walk along pointers.

use std::collections::{HashMap, HashSet, VecDeque};

use super::limits::{HIGHEST, LOWEST, MAX_ELEMENTS};
use super::{Found, MAX_DEPTH, MAX_OBJECTS, Reach, Reached, Slots, Start};
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::allocations::{Allocation, FindAllocation};
use crate::guest::btf::{Kind, Member, TypeId};
use crate::guest::phys::GuestPhys;
use crate::policy::range_table::ObjectKind;

/// Most elements of an array whose length the guest says.
const MAX_COUNT: u64 = 4096;

/// Most pieces of memory that block I/Os read into of one question, besides other objects: a chain
/// of requests has thousands.
pub(super) const MAX_DATA: usize = 1 << 14;

/// Most bytes of a buffer on a stack: most are shorter, as compilers warn of whole frames from 1 or
/// 2 KiB on (`CONFIG_FRAME_WARN`).
const MAX_STACK_BUFFER: u64 = 256;

/// Most members that one question looks at.
const MAX_MEMBERS: usize = 1 << 16;

/// Most arrays of one question.
const MAX_ARRAYS: usize = 64;

/// Longest label, in bytes.
const MAX_LABEL: usize = 160;

/// Types of pointers by which nobody reaches kernel memory as it is.
const FOREIGN: [&str; 3] = ["user", "percpu", "iomem"];

/// How far a walk goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// To all that is reached.
    All,
    /// To the objects that it starts from, and what belongs to these without a pointer being
    /// followed to another object.
    Near,
}

/// An object still to be looked at.
pub(super) struct Item {
    pub at: Gva,
    pub type_id: TypeId,
    pub path: String,
    pub depth: usize,
    pub kind: ObjectKind,
}

pub(super) struct Walk<'a, 'r, M, A> {
    pub(super) reach: &'a Reach<'r, M, A>,
    pub(super) queue: VecDeque<Item>,
    seen: HashSet<(Gva, TypeId)>,
    found: Vec<Reached>,
    /// How many of these block I/Os read into.
    data: usize,
    /// Where in `found` each range is.
    ranges: HashMap<GvaRange, usize>,
    pub(super) arrays: Vec<Gva>,
    pub(super) queues: Vec<Gva>,
    pub(super) slots: Vec<Slots>,
    pub(super) members_left: usize,
    pub(super) extent: Extent,
}

impl<'a, 'r, M: GuestPhys, A: FindAllocation> Walk<'a, 'r, M, A> {
    pub(super) fn new(reach: &'a Reach<'r, M, A>, extent: Extent) -> Self {
        Self {
            reach,
            queue: VecDeque::new(),
            seen: HashSet::new(),
            found: Vec::new(),
            data: 0,
            ranges: HashMap::new(),
            arrays: Vec::new(),
            queues: Vec::new(),
            slots: Vec::new(),
            members_left: MAX_MEMBERS,
            extent,
        }
    }

    /// Starts from the object at `at`.
    pub(super) fn enter(&mut self, at: Gva, type_id: TypeId, path: String) {
        self.push(Item {
            at,
            type_id,
            path,
            depth: 0,
            kind: ObjectKind::Argument,
        });
    }

    /// Starts from an object that the driver has a pointer to.
    pub(super) fn enter_held(&mut self, held: Start) {
        self.push(Item {
            at: held.at,
            type_id: held.type_id,
            path: held.name,
            depth: 1,
            kind: ObjectKind::Passing,
        });
    }

    pub(super) fn run(mut self) -> Found {
        while let Some(item) = self.queue.pop_front() {
            self.look_at(&item);
        }
        if self.objects() >= MAX_OBJECTS || self.data >= MAX_DATA || self.members_left == 0 {
            tracing::debug!(
                "not all that a call reaches was looked at: {} objects, {} pieces of memory, {} members left",
                self.objects(),
                self.data,
                self.members_left
            );
        }
        Found {
            objects: self.found,
            arrays: self.arrays,
            queues: self.queues,
            slots: self.slots,
        }
    }

    pub(super) fn push(&mut self, item: Item) {
        if self.is_wanted(item.at, item.type_id, item.depth) {
            self.queue.push_back(item);
        }
    }

    /// Whether the object of type `type_id` at `at` is to be looked at, which is so once.
    pub(super) fn is_wanted(&mut self, at: Gva, type_id: TypeId, depth: usize) -> bool {
        let types = self.reach.types;
        let plausible = at >= LOWEST && at <= HIGHEST && depth <= MAX_DEPTH;
        let too_far = self.extent == Extent::Near && depth > 0;
        if !plausible
            || too_far
            || self.objects() + self.queue.len() >= MAX_OBJECTS
            || types.has_tag(type_id, &FOREIGN)
        {
            return false;
        }
        let behind = types.resolve(type_id).map_or(type_id, |(id, _)| id);
        self.seen.insert((at, behind))
    }

    fn look_at(&mut self, item: &Item) {
        let types = self.reach.types;
        let Some((id, kind)) = types.resolve(item.type_id) else {
            return;
        };
        let is_const = types.is_const(item.type_id);
        match kind {
            Kind::Struct { bytes, .. } | Kind::Union { bytes, .. } => {
                let is_own = self.reach.is_own(id) && types.base().is_some();
                match (is_own, is_const) {
                    (true, true) => {}
                    (true, false) => self.look_at_own(item, id, bytes.into()),
                    (false, _) => self.look_at_kernels(item, id, bytes.into(), is_const),
                }
            }
            _ if is_const => {}
            // What an argument has a pointer to goes in and out by it (`struct sk_buff **`).
            Kind::Pointer(to) if item.depth == 0 && self.is_structure(to) => {
                self.add_numbers(item, id, self.rest(item.at));
                self.push_chain(item, item.at, to);
            }
            // Numbers, pointers and void: an array up to the end of what was allocated.
            _ => self.add_numbers(item, id, self.rest(item.at)),
        }
    }

    /// Looks at a structure of the driver's.
    fn look_at_own(&mut self, item: &Item, id: TypeId, bytes: u64) {
        let name = self.reach.types.name(id);
        let rest = self.rest(item.at).filter(|_| !self.on_stack(item.at));
        let Some(range) = rest.or_else(|| GvaRange::new(item.at, bytes)) else {
            return;
        };
        self.add_known(range, item.kind, id, &item.path);
        self.follow_elements(item, id, bytes, range);
        self.listed(item, id, name);
        self.followed(item, id, name);
        self.per_cpu(item, id, name);
        self.in_namespace(item, id, name);
        if self.extent == Extent::All {
            self.written(item, id, name);
        }
    }

    /// Looks at a structure of the kernel's, of which only rules lead on.
    fn look_at_kernels(&mut self, item: &Item, id: TypeId, bytes: u64, is_const: bool) {
        let (name, rules) = (self.reach.types.name(id), self.reach.rules);
        let allocation = self.allocation(item.at);
        let rest = allocation.and_then(|all| GvaRange::inclusive(item.at, all.range.last()));
        let around = allocation.filter(|_| !self.on_stack(item.at));
        if rules.parts.contains(&name)
            && let Some(all) = around
        {
            self.container(item, id, all.range);
        }
        // What is only to be read may still lead to what is to be written.
        if is_const {
            self.followed(item, id, name);
            self.per_cpu(item, id, name);
            // Who gets a structure that is part of its own has its own.
            if rules.embedded.contains(&name)
                && let Some(all) = around
            {
                self.container(item, id, all.range);
            }
            return;
        }
        let from_driver = item.depth > 0;
        if from_driver && rules.closed.contains(&name) {
            self.followed(item, id, name);
            return;
        }
        if let Some(range) = GvaRange::new(item.at, bytes) {
            self.add_known(range, item.kind, id, &item.path);
        }
        if rules.embedded.contains(&name)
            && let Some(all) = around
        {
            self.add(all.range, ObjectKind::PrivateArea, id, &item.path);
            self.container(item, id, all.range);
        }
        self.packet_data(item, id, name);
        self.block_io(item, id, name);
        self.chain_of_list(item, id, name);
        self.page(item, id, name);
        self.pooled(item, id, name);
        self.private_area(item, id, name, bytes, rest);
        self.area_inside(item, name);
        self.followed(item, id, name);
        self.per_cpu(item, id, name);
        if self.extent == Extent::All {
            self.counted(item, id, name);
        }
    }

    /// Takes what is at an object and behind it in the `rest` of its allocation; on a stack, one of
    /// it.
    fn add_numbers(&mut self, item: &Item, id: TypeId, rest: Option<GvaRange>) {
        let bytes = self.reach.types.size_of(id);
        if let (Some(bytes), Some(rest)) = (bytes, rest)
            && let Some(count) = rest.len_bytes().checked_div(bytes)
        {
            self.note_slots(item.at, id, (bytes, count));
        }
        let one = bytes.and_then(|bytes| GvaRange::new(item.at, bytes));
        let one = self.buffer_on_stack(item).or(one);
        let rest = rest.filter(|_| !self.on_stack(item.at));
        if let Some(range) = rest.or(one) {
            self.add(range, item.kind, id, &item.path);
        }
    }

    /// What an argument may point at that has a pointer to numbers, or to nobody knows what, on the
    /// stack: how many there are no type says.
    fn buffer_on_stack(&self, item: &Item) -> Option<GvaRange> {
        let stack = self.reach.stack.filter(|stack| stack.contains(item.at))?;
        let is_buffer = item.depth == 0;
        let last = item.at.checked_add(MAX_STACK_BUFFER - 1)?;
        let range = GvaRange::inclusive(item.at, last.min(stack.last()));
        range.filter(|_| is_buffer)
    }

    fn is_structure(&self, id: TypeId) -> bool {
        matches!(self.reach.types.resolve(id), Some((_, Kind::Struct { .. })))
    }

    /// Buffers that the rules know of.
    fn packet_data(&mut self, item: &Item, id: TypeId, name: &str) {
        for rule in self
            .reach
            .rules
            .packet_data
            .iter()
            .filter(|rule| rule.of == name)
        {
            let base = self.member_value(item.at, id, rule.base);
            let end = self.member_value(item.at, id, rule.end);
            let trailer = self.reach.struct_named(rule.trailer);
            let trailer = trailer.and_then(|id| self.reach.types.size_of(id));
            let (Some(base), Some(end), Some(trailer)) = (base, end, trailer) else {
                continue;
            };
            // The end is an offset of at most 32 bits.
            let range = GvaRange::new(Gva(base), (end & u64::from(u32::MAX)) + trailer);
            if let Some(range) = range.filter(|range| range.first() >= LOWEST) {
                let path = format!("{}->{}", item.path, rule.base);
                self.add(range, ObjectKind::Passing, id, &path);
            }
        }
    }

    /// Pointers of the kernel's that the rules follow.
    pub(super) fn followed(&mut self, item: &Item, id: TypeId, name: &str) {
        if self.extent == Extent::Near {
            return;
        }
        let types = self.reach.types;
        let is_const = types.is_const(item.type_id);
        for rule in self
            .reach
            .rules
            .followed
            .iter()
            .filter(|rule| rule.of == name && (rule.from_const || !is_const))
        {
            let virt = self.reach.virt;
            let Some(path) = self.reach.find_path(id, rule.member) else {
                continue;
            };
            let (Some(at), Some(to), Some(holder_at)) = (
                path.read(virt, item.at).map(Gva),
                types.pointee(path.type_id),
                path.holder_at(virt, item.at),
            ) else {
                continue;
            };
            let holder = path.holder;
            let path = format!("{}->{}", item.path, rule.member);
            if let Some(count) = rule.count {
                let count = self
                    .member_value(item.at, id, count)
                    .unwrap_or(0)
                    .min(MAX_COUNT);
                let bytes = types.size_of(to).and_then(|bytes| bytes.checked_mul(count));
                if let Some(range) = bytes.and_then(|bytes| GvaRange::new(at, bytes)) {
                    self.add_known(range, ObjectKind::Other, to, &path);
                }
                continue;
            }
            let is_void = matches!(types.resolve(to), Some((_, Kind::Void)));
            let own = self.named_own(rule.is).or_else(|| {
                let rest = self.rest(at).filter(|_| is_void)?;
                self.structure_that_points_back(rest, holder, holder_at)
            });
            if own.is_none() && rule.own_only {
                continue;
            }
            let type_id = own.unwrap_or(to);
            let (depth, kind) = (item.depth + 1, ObjectKind::PrivateArea);
            self.push(Item {
                at,
                type_id,
                path,
                depth,
                kind,
            });
        }
    }

    pub(super) fn member_value(&self, at: Gva, id: TypeId, name: &'static str) -> Option<u64> {
        let types = self.reach.types;
        let member = self.reach.member_named(id, name)?;
        let bytes = types.size_of(member.type_id).filter(|bytes| *bytes <= 8)?;
        let value = self.word_at(at, &member)?;
        Some(if bytes == 8 {
            value
        } else {
            value & ((1 << (bytes * 8)) - 1)
        })
    }

    pub(super) fn word_at(&self, at: Gva, member: &Member) -> Option<u64> {
        self.read_word(at.checked_add(u64::from(member.bit_offset / 8))?)
    }

    pub(super) fn read_word(&self, at: Gva) -> Option<u64> {
        self.reach.virt.read_u64(at).ok()
    }

    pub(super) fn on_stack(&self, at: Gva) -> bool {
        self.reach.stack.is_some_and(|stack| stack.contains(at))
    }

    pub(super) fn allocation(&self, at: Gva) -> Option<Allocation> {
        self.reach
            .allocations
            .allocation_at(at)
            .filter(|all| all.range.contains(at))
    }

    /// From `at` to the end of the allocation that it lies in.
    pub(super) fn rest(&self, at: Gva) -> Option<GvaRange> {
        GvaRange::inclusive(at, self.allocation(at)?.range.last())
    }

    /// Takes an object that consists of structures of type `id`.
    fn add_known(&mut self, range: GvaRange, kind: ObjectKind, id: TypeId, path: &str) {
        self.add(range, kind, id, path);
        let found = self.ranges.get(&range).copied();
        if let Some(object) = found.and_then(|index| self.found.get_mut(index)) {
            object.layout.get_or_insert(id);
        }
    }

    /// Takes an object, if its first byte is memory.
    /// Remembers an array of which not all elements are looked into.
    pub(super) fn note_slots(&mut self, at: Gva, element: TypeId, (bytes, count): (u64, u64)) {
        let is_long = count > MAX_ELEMENTS && self.slots.len() < MAX_ARRAYS;
        if is_long && self.reach.has_slots(element) {
            self.slots.push(Slots {
                at,
                element,
                bytes,
                count,
            });
        }
    }

    pub(super) fn add(&mut self, range: GvaRange, kind: ObjectKind, id: TypeId, path: &str) {
        if self.objects() < MAX_OBJECTS {
            self.put(range, kind, id, path);
        }
    }

    /// Takes memory that a block I/O reads into, if its first byte is memory.
    pub(super) fn add_data(&mut self, range: GvaRange, id: TypeId, path: &str) {
        if self.data < MAX_DATA && self.put(range, ObjectKind::Passing, id, path) {
            self.data += 1;
        }
    }

    /// How many objects were found that are no such memory.
    fn objects(&self) -> usize {
        self.found.len() - self.data
    }

    fn put(&mut self, range: GvaRange, kind: ObjectKind, id: TypeId, path: &str) -> bool {
        let mut byte = [0];
        let is_new = !self.ranges.contains_key(&range)
            && self.reach.virt.read(range.first(), &mut byte).is_ok();
        if !is_new {
            return false;
        }
        let mut label = format!("{} ({path})", self.reach.types.type_name(id));
        if label.len() > MAX_LABEL {
            let mut end = MAX_LABEL;
            while !label.is_char_boundary(end) {
                end -= 1;
            }
            label.truncate(end);
        }
        self.ranges.insert(range, self.found.len());
        self.found.push(Reached {
            range,
            kind,
            label,
            layout: None,
        });
        true
    }
}
