//! May this call write there? The range table of a driver, filled as its calls ask.
//!
//! ```text
//!  store to an address that nothing open covers
//!    1. the driver's variables                        open from the start
//!    2. what the call's arguments point at            looked at at the first such store of a call
//!    3. the kernel's inline functions write there     reference counts of pages, routes, sockets; preemption count
//!    4. reached from the call's arguments by type     worked out where 2 and 3 did not do
//!    5. handed out since the call began               found by comparing the two views of memory
//!       or to an earlier call, and not given back
//!    6. what a kernel function answered with          in this call, by function and type
//!    7. reached when the call began, not any more     the same as 4 in memory as it was then
//!    8. of a network namespace                        counts of references, what the driver keeps in each
//!    9. kept in an array or a queue of the driver's   an xarray, or packets, in what is reached,
//!       a list of its variables, a slab cache that is the driver's alone, or a page of its files
//!    otherwise                                        a stray write
//! ```
//!
//! The order is that of cost: most calls never get past what earlier ones opened for the driver.
//! Both views are read: the private one shows what the call did, the other one what was there
//! when it began. The other vCPUs are held, so neither changes meanwhile.

mod answers;
mod before;
mod habits;
mod handed_out;
mod interfaces;
mod kept;
mod namespaces;
mod opening;
mod own_caches;
mod own_files;
mod own_lists;
mod own_per_cpu;
mod own_variables;
mod programs;
mod red_zones;
mod rehearsal;
mod restorable;
mod shared_counts;
mod whose;

#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::abort_value::REGISTER_ARGUMENTS;
use super::completion::{Completion, Completions};
use super::diff::PAGE_BYTES;
use super::handed_over::HandOvers;
use super::range_table::{Lifetime, Object, ObjectKind, Permit, RangeTable, RangeTableError};
use super::reach::{Names, OwnTypes, Rules, Slots, Start, member_range};
use super::unheard::Unheard;
use crate::domain::effects::KernelCall;
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::allocations::{Allocations, FindAllocation};
use crate::guest::btf::Btf;
use crate::guest::memory_model::MemoryModel;
use crate::guest::module_text::TextPart;
use crate::guest::modules::ModuleLayout;
use crate::guest::paging::VirtMemory;
use crate::guest::phys::GuestPhys;
use crate::guest::symbols::SymbolTable;
use answers::Answers;
pub use before::MemoryBefore;
use habits::Habits;
use handed_out::EarlierAllocations;
use interfaces::InterfaceList;
pub(crate) use kept::KeptPolicy;
use namespaces::Namespaces;
use own_files::OwnFiles;
use own_per_cpu::OwnPerCpu;
use own_variables::OwnVariables;
use programs::Programs;
use red_zones::RedZone;
use shared_counts::SharedCounts;

/// Variables of each processor that inline functions of the kernel write, with their sizes in
/// bytes: `preempt_disable` before and since Linux 6.2.
const PER_CPU_VARIABLES: &[(&str, u64)] = &[("__preempt_count", 4), ("pcpu_hot", 64)];

/// The same, of which they write single members; the variable has the name of its type.
/// `dev_xmit_recursion_inc`, `tcf_mirred_nest_level` (Linux 6.12).
const PER_CPU_MEMBERS: &[(&str, &str)] = &[
    ("softnet_data", "xmit.recursion"),
    ("softnet_data", "xmit.sched_mirred_nest"),
];

/// End of the kernel's own variables of each processor; what `alloc_percpu` hands out lies behind
/// it.
const PER_CPU_END: &str = "__per_cpu_end";

/// The pointer to the running thread, a variable of each processor (Linux before 6.2; since then
/// the first member of `pcpu_hot`).
const CURRENT_TASK: &[&str] = &["current_task", "pcpu_hot"];

/// Slab caches whose objects are `struct sk_buff`s (`net/core/skbuff.c`).
const PACKET_CACHES: &[&str] = &[
    "skbuff_head_cache",
    "skbuff_fclone_cache",
    "skbuff_small_head",
];

const PAGE_SIZE: u64 = PAGE_BYTES as u64;

/// Most pages of slabs whose other objects are looked at: half a GiB of them.
const MAX_OPENED_PAGES: usize = 1 << 17;

/// Most call-backs in one call whose arguments count.
const MAX_CALLS: usize = 1024;

/// Most objects that one question about a range of bytes opens.
const MAX_STEPS: usize = 64;

/// Arguments on the stack that are looked at (System V ABI, section 3.2.3).
pub const STACK_ARGUMENTS: usize = 4;

/// Those and the ones in registers.
const ALL_ARGUMENTS: usize = REGISTER_ARGUMENTS + STACK_ARGUMENTS;

/// A call in progress: whose arguments say what it may write.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Call {
    function: String,
    /// Those in registers, and those on the stack; 0 where they are not known.
    arguments: [u64; ALL_ARGUMENTS],
    /// What the arguments point at is in the table.
    is_near_open: bool,
    /// What the arguments reach is in the table.
    resolved: bool,
}

/// Memory as a call has it.
#[derive(Debug)]
pub struct CallMemory<'a, M> {
    /// What the call and the kernel functions it called have made of it.
    pub private: VirtMemory<'a, M>,
    /// As it was when the call began.
    pub before: MemoryBefore<'a, M>,
    /// The stack that the call runs on.
    pub stack: Option<GvaRange>,
    /// GS base of the processor that the call runs on.
    pub per_cpu_base: u64,
}

impl<M> CallMemory<'_, M> {
    /// Memory as it was when the call began, as the same address space has it.
    pub(super) fn earlier(&self) -> VirtMemory<'_, MemoryBefore<'_, M>> {
        VirtMemory {
            space: self.private.space,
            memory: &self.before,
        }
    }
}

/// What the calls of one driver may write.
#[derive(Debug)]
pub struct DriverPolicy {
    types: Arc<Btf>,
    names: Names,
    memory: MemoryModel,
    rules: &'static Rules,
    /// What of the kernel's structures is this driver's own.
    own_too: OwnTypes,
    table: RangeTable,
    /// Offsets in the per-CPU area.
    per_cpu_variables: Vec<(&'static str, GvaRange)>,
    /// End of the kernel's own variables in the per-CPU area.
    per_cpu_handed_out: Option<u64>,
    /// What of each processor is the driver's; `None` if that is not known.
    own_per_cpu: Option<OwnPerCpu>,
    /// How pages of the driver's files are told; `None` if that is not known.
    own_files: Option<OwnFiles>,
    /// What the module's code says of its variables.
    own_variables: OwnVariables,
    /// Variables that may be heads of lists.
    list_heads: Vec<Gva>,
    /// How BPF programs are told; `None` if there are none.
    programs: Option<Programs>,
    /// Offset of the pointer to the running thread in the per-CPU area.
    current_task: Option<u64>,
    /// Offsets in that thread.
    task_members: Vec<(&'static str, GvaRange)>,
    shared_counts: SharedCounts,
    answers: Answers,
    interfaces: Vec<Start>,
    /// Which arguments of functions that were called are pointers to interfaces, by name.
    interface_arguments: HashMap<String, Vec<usize>>,
    /// Where the guest has its interfaces; `None` if that is not known.
    list: Option<InterfaceList>,
    /// The guest's network namespaces; `None` if they are not known.
    namespaces: Option<Namespaces>,
    /// This call has looked for interfaces already.
    listed: bool,
    /// What was handed out to earlier calls.
    owned: Arc<EarlierAllocations>,
    /// Where the driver keeps things by number, as far as this call's arguments lead there.
    arrays: BTreeSet<Gva>,
    /// Where it has queues of packets.
    queues: BTreeSet<Gva>,
    /// Its long arrays.
    slots: BTreeSet<Slots>,
    /// What was handed out to this call.
    handed_out: Vec<GvaRange>,
    /// Pages of slabs that were opened for what was handed out to a call. They stay open, and
    /// stores to others of their objects are not asked about. At most [`MAX_OPENED_PAGES`].
    opened_pages: BTreeSet<u64>,
    /// What lies behind the memory that this call asked for.
    red_zones: Vec<RedZone>,
    /// Where the kernel says whether it zeroes what it hands out (a `struct static_key`).
    init_on_alloc: Option<Gva>,
    /// Sections of the module: where its operations tables are.
    sections: Vec<GvaRange>,
    completions: Completions,
    unheard: Unheard,
    /// What functions take that wait until a call has ended; `None` if they do not wait.
    hand_overs: Option<HandOvers>,
    /// Where calls store in what passes through them.
    habits: Habits,
    calls: Vec<Call>,
    /// Numbers calls, so that their objects can be told apart.
    number: u64,
}

impl DriverPolicy {
    /// For the module with this layout; `types` are the kernel's and the module's.
    pub fn new(
        types: Arc<Btf>,
        memory: MemoryModel,
        layout: &ModuleLayout,
        symbols: &SymbolTable,
    ) -> Result<Self, RangeTableError> {
        let mut table = RangeTable::default();
        for section in layout.data() {
            table.open(Object {
                range: section.range,
                kind: ObjectKind::DriverData,
                permit: Permit::Write,
                lifetime: Lifetime::Driver,
                label: format!("{} of {}", section.name, layout.name),
            })?;
        }
        let variable = |(name, bytes): &(&'static str, u64)| {
            let symbol = symbols.kernel_symbol(name)?;
            Some((*name, GvaRange::new(symbol.at, *bytes)?))
        };
        let member = |(name, member): &(&'static str, &str)| {
            let symbol = symbols.kernel_symbol(name)?;
            let range = member_range(&types, types.find_struct(name)?, member)?;
            let at = symbol.at.checked_add(range.first().0)?;
            Some((*name, GvaRange::new(at, range.len_bytes())?))
        };
        let members = PER_CPU_MEMBERS.iter().filter_map(member);
        let per_cpu_variables = PER_CPU_VARIABLES.iter().filter_map(variable);
        let per_cpu_variables = per_cpu_variables.chain(members).collect();
        let mut current_task = CURRENT_TASK.iter();
        let current_task = current_task.find_map(|name| symbols.kernel_symbol(name));
        let task = types.find_struct("task_struct");
        let task_member = |name: &&'static str| Some((*name, member_range(&types, task?, name)?));
        let task_members = Rules::linux().running_thread.iter();
        let task_members = task_members.filter_map(task_member).collect();
        let list = InterfaceList::new(&types, symbols);
        let namespaces = Namespaces::new(&types, symbols, &layout.name);
        let completions = Completions::new(&types, symbols);
        let own_too = Rules::linux().own_of(&layout.name, &types);
        Ok(Self {
            own_too,
            shared_counts: SharedCounts::new(&types),
            own_per_cpu: OwnPerCpu::new(&types, layout),
            own_files: OwnFiles::new(&types, layout),
            own_variables: OwnVariables::default(),
            list_heads: own_lists::heads(layout, symbols),
            programs: Programs::new(&types),
            completions,
            unheard: Unheard::new(&types),
            hand_overs: HandOvers::new(&types, symbols, layout),
            types,
            names: Names::default(),
            memory,
            rules: Rules::linux(),
            table,
            per_cpu_variables,
            per_cpu_handed_out: symbols.kernel_symbol(PER_CPU_END).map(|end| end.at.0),
            current_task: current_task.map(|symbol| symbol.at.0),
            task_members,
            answers: Answers::new(symbols, Rules::linux()),
            interfaces: Vec::new(),
            interface_arguments: HashMap::new(),
            list,
            namespaces,
            listed: false,
            owned: Arc::default(),
            arrays: BTreeSet::new(),
            queues: BTreeSet::new(),
            slots: BTreeSet::new(),
            handed_out: Vec::new(),
            opened_pages: BTreeSet::new(),
            red_zones: Vec::new(),
            init_on_alloc: symbols
                .kernel_symbol("init_on_alloc")
                .map(|symbol| symbol.at),
            sections: layout
                .sections
                .iter()
                .map(|section| section.range)
                .collect(),
            habits: Habits::default(),
            calls: Vec::new(),
            number: 0,
        })
    }

    /// The same, with what the module's code, `text`, says of its variables: memory that it frees
    /// by them is its own, as far as they point at any now. What is handed out later is noticed
    /// then.
    pub fn with_variables<M: GuestPhys>(
        mut self,
        text: &[TextPart<'_>],
        layout: &ModuleLayout,
        symbols: &SymbolTable,
        virt: VirtMemory<'_, M>,
    ) -> Self {
        let data: Vec<GvaRange> = layout.data().map(|section| section.range).collect();
        let own = OwnVariables::new(text, &data, &self.types, symbols, self.rules);
        let allocations = Allocations::new(&self.memory, virt);
        let pointers = own.freed.iter().filter_map(|at| virt.read_u64(*at).ok());
        let places = pointers.flat_map(|at| allocations.places_of(Gva(at)));
        let owned = Arc::make_mut(&mut self.owned);
        for at in places {
            let found = allocations.allocation_at(at);
            if let Some(found) = found.filter(|found| found.range.first() == at) {
                owned.insert(found.range);
            }
        }
        self.own_variables = own;
        self
    }

    /// Where the guest's kernel keeps what it knows of its memory.
    pub(crate) fn memory_model(&self) -> &MemoryModel {
        &self.memory
    }

    /// What has to be done in place of the function with its gate at `gate`, called by `caller`,
    /// that was not run or was taken back as a whole.
    pub fn completion<M: GuestPhys>(
        &self,
        virt: VirtMemory<'_, M>,
        gate: u64,
        (transmits, is_stopped): (bool, bool),
        arguments: &[u64; REGISTER_ARGUMENTS],
        caller: Option<Gva>,
    ) -> Option<Completion> {
        let flags = (transmits, is_stopped);
        self.completions.of(virt, gate, flags, arguments, caller)
    }

    /// Whether code that the kernel has made (a BPF program) begins at `va`, called with this
    /// second argument.
    pub fn is_program<M: GuestPhys>(
        &self,
        memory: &CallMemory<'_, M>,
        va: u64,
        second: u64,
    ) -> bool {
        let programs = self.programs;
        programs.is_some_and(|programs| programs.is_called(memory.private, va, second))
    }

    /// Whether whoever calls the function with its gate at `gate` goes on whatever it returns.
    pub fn is_unheard<M: GuestPhys>(
        &self,
        virt: VirtMemory<'_, M>,
        gate: u64,
        arguments: &[u64; REGISTER_ARGUMENTS],
    ) -> bool {
        self.unheard.is(virt, gate, arguments)
    }

    /// Whether kernel functions that can wait until a call has ended may wait for the one that
    /// begins.
    pub fn may_hand_over<M: GuestPhys>(&self, memory: &CallMemory<'_, M>) -> bool {
        let hand_overs = self.hand_overs.as_ref();
        hand_overs.is_some_and(|hand_overs| hand_overs.may_wait(memory))
    }

    /// Looks at what `calls` are given that are to be made when this one is committed; `None` if
    /// something of it is not as it should be. Otherwise the first one that stores to the device
    /// have to wait for which come after it, if any is.
    pub fn hands_over<M: GuestPhys>(
        &mut self,
        memory: &CallMemory<'_, M>,
        calls: &[KernelCall],
    ) -> Option<Option<usize>> {
        let hand_overs = self.hand_overs.as_mut()?;
        hand_overs.look(memory, &self.memory, calls)
    }

    /// A call of `function` begins, or the kernel calls back into `function` during one.
    pub fn begin(&mut self, function: &str, arguments: [u64; REGISTER_ARGUMENTS]) {
        if self.calls.len() >= MAX_CALLS {
            return;
        }
        let function = function.to_owned();
        self.remember_interfaces(&function, &arguments);
        let mut all = [0; ALL_ARGUMENTS];
        for (place, argument) in all.iter_mut().zip(arguments) {
            *place = argument;
        }
        self.calls.push(Call {
            function,
            arguments: all,
            is_near_open: false,
            resolved: false,
        });
    }

    /// The call that has begun has these arguments on its stack, as far as it has any there.
    pub fn has_on_stack(&mut self, arguments: [u64; STACK_ARGUMENTS]) {
        if let Some(call) = self.calls.last_mut() {
            let places = call.arguments.iter_mut().skip(REGISTER_ARGUMENTS);
            places
                .zip(arguments)
                .for_each(|(place, argument)| *place = argument);
        }
    }

    /// The call is over: what only it could write is closed. What was handed out to it stays the
    /// driver's if the call was `committed`.
    pub fn end(&mut self, committed: bool) {
        for call in self.calls.drain(..) {
            self.habits.end(&call.function);
        }
        self.arrays.clear();
        self.queues.clear();
        self.slots.clear();
        self.listed = false;
        self.red_zones.clear();
        self.answers.forget();
        self.table.end_call(self.number);
        self.number = self.number.wrapping_add(1);
        let handed_out = std::mem::take(&mut self.handed_out);
        for range in handed_out.into_iter().filter(|_| committed) {
            Arc::make_mut(&mut self.owned).insert(range);
        }
    }

    /// Nothing is left of what the call did, and it is run once more from its beginning: what the
    /// attempt was handed out is not its own any more, and its call-backs have not happened.
    pub fn begin_again<M>(&mut self, memory: &mut CallMemory<'_, M>) {
        self.calls.truncate(1);
        for call in &mut self.calls {
            (call.is_near_open, call.resolved) = (false, false);
        }
        self.listed = false;
        self.handed_out.clear();
        self.red_zones.clear();
        self.answers.forget();
        self.table.end_call(self.number);
        self.number = self.number.wrapping_add(1);
        memory.before.forget();
    }

    /// Whether the call may write every byte of `range`.
    pub fn may_write<M: GuestPhys>(&mut self, memory: &CallMemory<'_, M>, range: GvaRange) -> bool {
        for _ in 0..MAX_STEPS {
            match self.table.first_denied(range) {
                None => return true,
                Some(at) if self.is_in_red_zone(at) => return false,
                Some(at) if !self.open_around(memory, at) => return false,
                Some(_) => {}
            }
        }
        false
    }

    /// The object that `at` lies in, if it is one that a call may write or was asked about.
    pub fn owner(&self, at: Gva) -> Option<&Object> {
        self.table.lookup(at).map(|(_, object)| object)
    }

    /// Whether what the call may write at `at` is the driver's beyond the call.
    pub fn lasts(&self, at: Gva) -> bool {
        let mut objects = self.table.covering(at);
        objects.any(|object| object.kind != ObjectKind::Passing)
    }

    /// The range table, for reports.
    pub fn table(&self) -> &RangeTable {
        &self.table
    }
}
