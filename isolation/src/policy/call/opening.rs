//! Finding a reason why a call may write somewhere, and opening what lies there: the steps 2 to 9
//! of the parent module's picture.

use std::sync::Arc;

use super::handed_out::EarlierAllocations;
use super::{Call, CallMemory, DriverPolicy, MAX_OPENED_PAGES, PACKET_CACHES, PAGE_SIZE};
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::allocations::{Allocation, AllocationKind, Allocations, FindAllocation};
use crate::guest::paging::VirtMemory;
use crate::guest::phys::GuestPhys;
use crate::policy::range_table::{Lifetime, Object, ObjectKind, Permit};
use crate::policy::reach::{Found, Reach, Reached, Slots, Start};

impl DriverPolicy {
    /// Finds a reason why the byte at `at` may be written, and opens what it lies in.
    pub(super) fn open_around<M: GuestPhys>(
        &mut self,
        memory: &CallMemory<'_, M>,
        at: Gva,
    ) -> bool {
        let one = GvaRange::aligned(at, 1);
        self.open_near(memory);
        if self.table.may_write(one) || self.open_kernels_word(memory, at) {
            return true;
        }
        self.resolve(memory);
        if self.table.may_write(one) || self.open_in_slot(memory, at) {
            return true;
        }
        // A driver notes things in the descriptions of its own pages (`page->index`,
        // `page->private`).
        if let Some((description, page)) = self.memory.described_page(at) {
            let own = self.table.may_write(GvaRange::aligned(page, 1))
                || self.is_of_own_files(memory, description.first())
                || self.open_new_allocation(memory, page);
            let label = "struct page of a page of the driver's".into();
            return own && self.open(description, ObjectKind::Other, label);
        }
        if self.open_new_allocation(memory, at) || self.open_answered(memory, one) {
            return true;
        }
        // Before it is a stray write: has the driver interfaces that no argument was about yet, has
        // the call since hung something new into what its arguments reach, or taken something out?
        self.list_interfaces(memory);
        self.calls.iter_mut().for_each(|call| call.resolved = false);
        self.resolve(memory);
        let may = self.table.may_write(one)
            || self.open_as_it_began(memory, one)
            || self.open_in_namespace(memory, at)
            || self.open_queued(memory, one)
            || self.open_kept(memory, at)
            || self.open_listed(memory, at)
            || self.open_in_own_cache(memory, at)
            || self.open_in_own_files(memory, at);
        if !may {
            for (_, object) in self.table.iter() {
                tracing::trace!("open, when {at} was not: {} {}", object.range, object.label);
            }
        }
        may
    }

    /// Opens the objects that the calls' arguments point at, once for each call: what most stores
    /// are to.
    pub(super) fn open_near<M: GuestPhys>(&mut self, memory: &CallMemory<'_, M>) {
        let fresh = self.calls.iter_mut().filter(|call| !call.is_near_open);
        let fresh: Vec<Call> = fresh
            .map(|call| {
                call.is_near_open = true;
                call.clone()
            })
            .collect();
        for call in fresh {
            let near = self.near(memory, &call, |_| true);
            self.open_all(near);
        }
    }

    /// The objects that the arguments of a call point at which `wanted` picks by name.
    pub(super) fn near<M: GuestPhys>(
        &self,
        memory: &CallMemory<'_, M>,
        call: &Call,
        wanted: impl Fn(&str) -> bool,
    ) -> Vec<Reached> {
        let Some(function) = self.names.find_function(&self.types, &call.function) else {
            return Vec::new();
        };
        self.reach(memory.private, memory, |reach| {
            reach.near_objects(&function, &call.arguments, wanted)
        })
    }

    /// Opens the byte at `at` if inline functions of the kernel write there, whatever the call is
    /// about.
    fn open_kernels_word<M: GuestPhys>(&mut self, memory: &CallMemory<'_, M>, at: Gva) -> bool {
        let one = GvaRange::aligned(at, 1);
        if self.memory.is_page_reference_count(at) {
            return self.open(one, ObjectKind::Other, "reference count of a page".into());
        }
        let offset = Gva(at.0.wrapping_sub(memory.per_cpu_base));
        let variable = self
            .per_cpu_variables
            .iter()
            .find(|(_, range)| range.contains(offset));
        if let Some((name, _)) = variable {
            let label = format!("{name} of this processor");
            return self.open(one, ObjectKind::Other, label);
        }
        let own = self.own_per_cpu;
        let own = own.and_then(|own| own.on(memory.private, memory.per_cpu_base));
        if let Some(own) = own.filter(|own| own.contains(at)) {
            let label = "per-CPU variables of the driver's".into();
            return self.open(own, ObjectKind::DriverData, label);
        }
        if let Some(name) = self.member_of_current_task(memory, at) {
            let label = format!("{name} of the running thread");
            return self.open(one, ObjectKind::Other, label);
        }
        let allocations = Allocations::new(&self.memory, memory.private);
        if let Some((count, cache)) = self.shared_counts.at(&allocations, at) {
            let label = format!("count in an object of {cache}");
            return self.open(count, ObjectKind::Other, label);
        }
        false
    }

    /// Opens what the calls reached when the outermost one began: a driver may take something out
    /// of its structures first, and write to it then.
    fn open_as_it_began<M: GuestPhys>(
        &mut self,
        memory: &CallMemory<'_, M>,
        one: GvaRange,
    ) -> bool {
        let interfaces = self.known_interfaces(memory);
        for call in self.calls.clone() {
            let found = self.reached_in(memory.earlier(), memory, &call, &interfaces);
            self.open_all(found.objects);
            self.arrays.extend(found.arrays);
            self.queues.extend(found.queues);
        }
        self.table.may_write(one)
    }

    /// The member that `at` is part of, among those of the running thread that may be written.
    fn member_of_current_task<M: GuestPhys>(
        &self,
        memory: &CallMemory<'_, M>,
        at: Gva,
    ) -> Option<&'static str> {
        let current = Gva(memory.per_cpu_base.wrapping_add(self.current_task?));
        let task = memory.private.read_u64(current).ok()?;
        let offset = Gva(at.0.checked_sub(task)?);
        let mut members = self.task_members.iter();
        let found = members.find(|(_, range)| range.contains(offset))?;
        Some(found.0)
    }

    /// Puts what the calls' arguments reach into the table, once for each.
    fn resolve<M: GuestPhys>(&mut self, memory: &CallMemory<'_, M>) {
        let open: Vec<Call> = self
            .calls
            .iter()
            .filter(|call| !call.resolved)
            .cloned()
            .collect();
        let interfaces = self.known_interfaces(memory);
        for call in &open {
            let found = self.reached_from(memory, call, &interfaces);
            self.open_all(found.objects);
            self.arrays.extend(found.arrays);
            self.queues.extend(found.queues);
            self.slots.extend(found.slots);
        }
        self.calls.iter_mut().for_each(|call| call.resolved = true);
    }

    /// What a call reaches from its arguments and from the driver's interfaces.
    pub(super) fn reached_from<M: GuestPhys>(
        &self,
        memory: &CallMemory<'_, M>,
        call: &Call,
        interfaces: &[Start],
    ) -> Found {
        self.reached_in(memory.private, memory, call, interfaces)
    }

    /// The same in another view of memory.
    fn reached_in<M: GuestPhys, V: GuestPhys>(
        &self,
        virt: VirtMemory<'_, V>,
        memory: &CallMemory<'_, M>,
        call: &Call,
        interfaces: &[Start],
    ) -> Found {
        // The compiler's copies (`f.isra.0`) have other parameters, which no type tells.
        let function = self.names.find_function(&self.types, &call.function);
        let variables = self.own_variables.structures.iter();
        let starts: Vec<Start> = interfaces.iter().chain(variables).cloned().collect();
        self.reach(virt, memory, |reach| match &function {
            Some(function) => reach.objects(function, &call.arguments, &starts),
            None => reach.objects_from(&starts),
        })
    }

    /// What was handed out to the driver, in this call or an earlier one, is the driver's.
    pub(super) fn open_new_allocation<M: GuestPhys>(
        &mut self,
        memory: &CallMemory<'_, M>,
        at: Gva,
    ) -> bool {
        let model = self.memory;
        let base = memory.per_cpu_base;
        let now = Allocations::new(&model, memory.private).on_processor(base);
        let before = Allocations::new(&model, memory.earlier()).on_processor(base);
        let Some(found) = now.allocation_at(at) else {
            return false;
        };
        if memory
            .stack
            .is_some_and(|stack| stack.intersection(&found.range).is_some())
        {
            return false;
        }
        let cache = now.cache_name(&found).unwrap_or_else(|| "memory".into());
        let is_packet = PACKET_CACHES.contains(&cache.as_str());
        // Packets are kept in stock by each processor, so that one that is handed out need not be
        // new; but the kernel fills in its head.
        let filled_in = is_packet && now.is_changed(&found, &before);
        let owned = self.owned.contains(found.range);
        if !filled_in && !owned && !now.is_new(&found, &before) {
            return false;
        }
        // A packet is passed on, not kept.
        if !is_packet {
            if found.kind == AllocationKind::Slab && self.opened_pages.len() < MAX_OPENED_PAGES {
                self.opened_pages.insert(at.0 & !(PAGE_SIZE - 1));
            }
            self.handed_out.push(found.range);
        }
        let label = format!("{cache} handed out to the driver");
        let opened = self.open(found.range, kind_of(&found), label);
        if is_packet && let Some(type_id) = self.names.find_struct(&self.types, "sk_buff") {
            let packet = Start {
                at: found.range.first(),
                type_id,
                name: "packet of this call".into(),
            };
            let found = self.reach(memory.private, memory, |reach| {
                reach.objects_from(&[packet])
            });
            self.open_all(found.objects);
        }
        opened
    }

    /// Packets in queues of the driver's are the driver's, with their data.
    fn open_queued<M: GuestPhys>(&mut self, memory: &CallMemory<'_, M>, one: GvaRange) -> bool {
        let variables = self.own_variables.queues.iter();
        let queues: Vec<Gva> = self.queues.iter().chain(variables).copied().collect();
        if queues.is_empty() {
            return false;
        }
        let found = self.reach(memory.private, memory, |reach| {
            reach.objects_from(&reach.queued_in(&queues))
        });
        for object in found.objects {
            self.open(object.range, ObjectKind::Passing, object.label);
        }
        self.table.may_write(one)
    }

    /// What a slot of the driver's rings points at is its own, and what one pointed at when the
    /// call began: a driver takes a packet out of its ring before it does something with it.
    fn open_in_slot<M: GuestPhys>(&mut self, memory: &CallMemory<'_, M>, at: Gva) -> bool {
        if self.slots.is_empty() {
            return false;
        }
        let Some(object) = Allocations::new(&self.memory, memory.private).allocation_at(at) else {
            return false;
        };
        let stack = memory.stack;
        if stack.is_some_and(|stack| stack.intersection(&object.range).is_some()) {
            return false;
        }
        let slots: Vec<Slots> = self.slots.iter().copied().collect();
        let range = object.range;
        let held = self
            .reach(memory.earlier(), memory, |reach| {
                reach.held_in(&slots, range)
            })
            .or_else(|| self.reach(memory.private, memory, |reach| reach.held_in(&slots, range)));
        if let Some(held) = held {
            let found = self.reach(memory.private, memory, |reach| reach.objects_held(held));
            self.open_all(found.objects);
        }
        self.table.may_write(GvaRange::aligned(at, 1))
    }

    /// What the driver keeps in its arrays is the driver's, also if it was handed out before
    /// anybody looked. It is looked for at the first store to something that is not known, and
    /// remembered as what was handed out to earlier calls.
    fn open_kept<M: GuestPhys>(&mut self, memory: &CallMemory<'_, M>, at: Gva) -> bool {
        let mut arrays: Vec<Gva> = self.arrays.iter().copied().collect();
        let variables = &self.own_variables.arrays;
        self.reach(memory.private, memory, |reach| {
            let found = variables
                .iter()
                .filter_map(|(at, id)| reach.array(*at, *id));
            arrays.extend(found);
        });
        if arrays.is_empty() {
            return false;
        }
        let (mut found, mut all) = (None, Vec::new());
        self.reach(memory.private, memory, |reach| {
            reach.kept_in(&arrays, &mut |kept| {
                let on_stack = |stack: GvaRange| stack.intersection(&kept.range).is_some();
                if memory.stack.is_some_and(on_stack) {
                    return true;
                }
                if all.len() < EarlierAllocations::CAPACITY / 2 {
                    all.push(kept.range);
                }
                found = found.or(kept.range.contains(at).then_some(kept));
                found.is_none() || all.len() < EarlierAllocations::CAPACITY / 2
            });
        });
        let Some(found) = found else { return false };
        let owned = Arc::make_mut(&mut self.owned);
        for range in all.into_iter().chain([found.range]) {
            owned.insert(range);
        }
        let label = "kept in an array of the driver's".into();
        self.open(found.range, kind_of(&found), label)
    }

    /// Asks what is reached in `virt`, a view of memory of the call that `memory` is of.
    pub(super) fn reach<M, V: GuestPhys, T>(
        &self,
        virt: VirtMemory<'_, V>,
        memory: &CallMemory<'_, M>,
        ask: impl FnOnce(&Reach<'_, V, Allocations<'_, V>>) -> T,
    ) -> T {
        ask(&Reach {
            types: &self.types,
            names: &self.names,
            virt,
            allocations: &Allocations::new(&self.memory, virt),
            stack: memory.stack,
            per_cpu_base: Some(memory.per_cpu_base),
            per_cpu_handed_out: self.per_cpu_handed_out,
            own_too: &self.own_too,
            rules: self.rules,
        })
    }

    pub(super) fn open_all(&mut self, found: Vec<Reached>) {
        for object in found {
            // What does not fit into the table is not permitted; the store will say so.
            self.open(object.range, object.kind, object.label);
        }
    }

    /// Opens an object for this call; `false` if the table is full.
    pub(super) fn open(&mut self, range: GvaRange, kind: ObjectKind, label: String) -> bool {
        if self.table.may_write(range) {
            return true;
        }
        let lifetime = Lifetime::Call(self.number);
        let object = Object {
            range,
            kind,
            permit: Permit::Write,
            lifetime,
            label,
        };
        match self.table.open(object) {
            Ok(_) => true,
            Err(error) => {
                tracing::warn!(%range, "object of a driver not opened: {error}");
                false
            }
        }
    }
}

/// What was handed out is to the driver: pages go from hand to hand, objects are kept.
fn kind_of(found: &Allocation) -> ObjectKind {
    match found.kind {
        AllocationKind::Pages => ObjectKind::Passing,
        AllocationKind::Slab | AllocationKind::Vmalloc | AllocationKind::PerCpu => {
            ObjectKind::Allocated
        }
    }
}
