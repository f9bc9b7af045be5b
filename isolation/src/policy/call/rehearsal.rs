//! The first question, asked before there is a call: while the guest still runs and nobody waits
//! for the answer.
//!
//! What a call may write is worked out at its first store. The first time of all that takes several
//! times as long as later: names are looked for, types and code that nobody has needed until then
//! are read from files. So it is asked once as soon as a module is isolated, about what its
//! interfaces reach, with one of them in the place of each argument. The answer says nothing, since
//! the guest changes its memory meanwhile, and is thrown away with the interfaces that were found:
//! what is one by a list that was read half changed would be taken for one by later calls, too.
//! What is kept is known of types, which do not change.

use std::collections::BTreeSet;

use super::{ALL_ARGUMENTS, Call, CallMemory, DriverPolicy};
use crate::guest::addr::Gva;
use crate::guest::allocations::{Allocations, FindAllocation};
use crate::guest::btf::TypeId;
use crate::guest::phys::GuestPhys;
use crate::policy::abort_value::REGISTER_ARGUMENTS;

/// Most functions of which it is asked: a driver's take few kinds of arguments.
const MAX_QUESTIONS: usize = 12;

impl DriverPolicy {
    /// Asks what calls of these `functions`, of which none is under way, would reach.
    pub(crate) fn rehearse<'a, M: GuestPhys>(
        &mut self,
        memory: &CallMemory<'_, M>,
        functions: impl Iterator<Item = &'a str>,
    ) {
        let before = self.interfaces.clone();
        self.list_interfaces(memory);
        self.ask_about(memory, functions);
        self.listed = false;
        self.interfaces = before;
    }

    fn ask_about<'a, M: GuestPhys>(
        &mut self,
        memory: &CallMemory<'_, M>,
        functions: impl Iterator<Item = &'a str>,
    ) {
        let interfaces = self.known_interfaces(memory);
        // Where the driver has none, its variables are as good as anything.
        let data = self.table.iter().map(|(_, object)| object.range.first());
        let stand_in = interfaces.first().map(|interface| interface.at);
        let Some(stand_in) = stand_in.or_else(|| data.min()) else {
            return;
        };
        let (mut seen, mut asked) = (BTreeSet::new(), 0);
        for function in functions {
            self.know_interface_arguments(function);
            if !self.takes_something_new(function, &mut seen) || asked >= MAX_QUESTIONS {
                continue;
            }
            asked += 1;
            let call = Call {
                function: function.to_owned(),
                arguments: [stand_in.0; ALL_ARGUMENTS],
                is_near_open: false,
                resolved: false,
            };
            self.near(memory, &call, |_| true);
            self.reached_from(memory, &call, &interfaces);
        }
        self.look_around(memory, stand_in);
    }

    /// Whether an argument of `function` is of a type that is not among those that were `seen`.
    fn takes_something_new(&self, function: &str, seen: &mut BTreeSet<TypeId>) -> bool {
        let Some(function) = self.names.find_function(&self.types, function) else {
            return false;
        };
        let arguments = function.params.iter().take(REGISTER_ARGUMENTS);
        let pointees = arguments.filter_map(|argument| self.types.pointee(argument.type_id));
        let types = pointees.filter_map(|to| Some(self.types.resolve(to)?.0));
        // All of them count as seen, not only those up to the first new one.
        types.filter(|id| seen.insert(*id)).count() > 0
    }

    /// Looks for what else could be a reason to write at `at`.
    fn look_around<M: GuestPhys>(&self, memory: &CallMemory<'_, M>, at: Gva) {
        let allocations = Allocations::new(&self.memory, memory.private);
        let allocations = allocations.on_processor(memory.per_cpu_base);
        let before = Allocations::new(&self.memory, memory.earlier());
        let before = before.on_processor(memory.per_cpu_base);
        if let Some(found) = allocations.allocation_at(at) {
            let _: bool = allocations.is_new(&found, &before);
            let _: Option<String> = allocations.cache_name(&found);
        }
        self.shared_counts.at(&allocations, at);
    }
}
