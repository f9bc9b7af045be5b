//! Kernel functions that are patched in the private VM, by name, and what of a kernel has to be
//! known besides.
//!
//! Which they are is data (`models/functions.toml`): functions get other names from version to
//! version. One that is not found is not patched: where calls could do harm then, that is a reason
//! to refuse.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use serde::Deserialize;

use crate::guest::addr::GvaRange;
use crate::guest::btf::Btf;
use crate::guest::memory_model::MemoryModel;
use crate::guest::symbols::SymbolTable;
use crate::models;

/// None of the functions that call those of timers is longer, in bytes.
const LONGEST_RUNNER: u64 = 4096;

/// A kernel function by the names that it has had, the oldest first.
pub(crate) type Names = Vec<&'static str>;

/// All that are known.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, bound(deserialize = "'de: 'static"))]
pub(crate) struct KernelFunctions {
    /// Functions that only the guest can run. A call that reaches one goes on in the guest, and
    /// would do harm if it did not.
    pub guest_only: Vec<Names>,
    /// The same, of kernels that know of KVM.
    pub guest_only_with_kvm: Vec<Names>,
    /// Functions that mean that the driver broke something for good.
    pub fatal: Vec<Names>,
    /// Functions that let others run if somebody waits for the processor: inside a call nobody
    /// can.
    pub yields: Vec<Names>,
    /// Functions that ask whether the FPU may be used. It may not: a call that uses it goes on in
    /// the guest, and who asks can do without, as in an interrupt (the random generator's hash, for
    /// one, once a minute in whatever call comes).
    pub fpu_questions: Vec<Names>,
    /// Functions that only write what they are given where they are told, and call at most one
    /// another: they run with the driver's rights, so that one that is told a wrong place or length
    /// is stopped there.
    pub copies: Vec<Names>,
    /// Functions that need no other rights than the driver's, on the ways that drivers call them
    /// by: they only look at memory and answer, or write to what the driver gives them and might
    /// write itself. They run with the driver's rights, at no change of roots.
    pub modest: Vec<Names>,
    /// Functions that hand out as much memory as they are asked for.
    pub sized: Vec<Allocator>,
    /// Functions after which it is not known any more how much was asked for of what their first
    /// argument points at: it is given back, or longer, or its caller knows how long it is.
    pub unsized_now: Vec<Names>,
    /// Functions that wait for as long as their first argument says, with its unit in microseconds.
    /// Where one is not known a call that reaches it goes on in the guest.
    pub sleeps: BTreeMap<&'static str, u64>,
    /// What calls print is written to the consoles after them.
    pub console: ConsoleNames,
    /// Functions that wait for other processors without letting go of their own: in a call those
    /// stand still.
    pub waits_for_others: Vec<WaitsForOthers>,
    /// Functions that call those of timers that have expired, for as long as there are any.
    pub runs_timers: Vec<Names>,
    /// Values that failed calls return: they have to be this kernel's.
    returned: BTreeMap<&'static str, i128>,
}

/// A function that hands out memory from the address that it returns on.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, bound(deserialize = "'de: 'static"))]
pub(crate) struct Allocator {
    /// By the names that it has had with these arguments.
    pub names: Names,
    /// Number of the argument that says how many bytes, from 0.
    pub size: u8,
    /// Number of the one with the flags (`gfp_t`); without one all of it is zeroed.
    pub flags: Option<u8>,
}

/// What a kernel has of its console by name.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ConsoleNames {
    /// The function that takes the console if nobody has it, and says whether it has
    /// (`console_trylock`).
    pub take: &'static str,
    /// The word that says which task writes to it, and may be waited for; 0 for none.
    pub writer: &'static str,
    /// The function that has it written to soon, by an interrupt of this processor.
    pub defer: &'static str,
}

/// A kernel function that waits while a bit is set in a member of what its first argument points
/// at.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WaitsForOthers {
    /// Its name.
    pub name: &'static str,
    /// The structure.
    pub of: &'static str,
    /// The 32-bit member, each in the one before it.
    #[serde(borrow)]
    pub member: [&'static str; 2],
    /// The bit, by the kernel's name for its value.
    pub bit: &'static str,
}

/// Those of Linux.
pub(crate) static LINUX: LazyLock<KernelFunctions> =
    LazyLock::new(|| models::built_in(include_str!("../../models/functions.toml")));

/// Where the kernel's functions are that call those of timers.
pub(crate) fn runs_timers(symbols: &SymbolTable) -> Vec<GvaRange> {
    let names = LINUX.runs_timers.iter().flatten();
    let found = names.filter_map(|name| symbols.kernel_symbol(name));
    found
        .filter_map(|symbol| symbols.extent(symbol.at, GvaRange::new(symbol.at, LONGEST_RUNNER)?))
        .collect()
}

/// What calls could not be contained or safely be failed without: names of kernel functions,
/// symbols, types, members and values that are not found. `has_symbol` tells whether the kernel has
/// a symbol of a name.
pub fn lacking(types: &Btf, has_symbol: &dyn Fn(&str) -> bool) -> Vec<String> {
    let functions = LINUX.guest_only.iter().chain(&LINUX.fatal);
    let absent = functions.filter(|names| !names.iter().any(|name| has_symbol(name)));
    let returned = LINUX
        .returned
        .iter()
        .filter(|(name, value)| types.enum_value(name).map(i128::from) != Some(**value));
    let memory = MemoryModel::lacking(types, has_symbol).into_iter();
    memory
        .map(str::to_owned)
        .chain(absent.map(|names| names.join(" or ")))
        .chain(returned.map(|(name, value)| format!("{name} = {value}")))
        .collect()
}
