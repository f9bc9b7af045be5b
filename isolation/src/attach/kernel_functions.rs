//! Kernel functions that are patched in the private VM, by name, and what of a kernel has to be
//! known besides.
//!
//! Functions get other names from version to version. One that is not found is not patched: where
//! calls could do harm then, that is a reason to refuse.

use crate::guest::btf::Btf;
use crate::guest::memory_model::MemoryModel;

/// A kernel function by the names that it has had, the oldest first.
#[derive(Debug, Clone, Copy)]
pub(super) struct KernelFunction {
    /// Its names.
    pub names: &'static [&'static str],
    /// Whether a call that reaches it would do harm if it were not patched.
    pub needed: bool,
}

const fn needed(names: &'static [&'static str]) -> KernelFunction {
    KernelFunction {
        names,
        needed: true,
    }
}

const fn wanted(names: &'static [&'static str]) -> KernelFunction {
    KernelFunction {
        names,
        needed: false,
    }
}

/// Kernel functions that only the guest can run: they switch to another thread, wait for another
/// processor, wake one by a hypercall (which KVM answers for the private VM itself, where no other
/// is), change code under way, load another address space (the kernel writes to code through one,
/// as for a BPF program), or end the machine. A call that reaches one goes on in the guest.
pub(super) const GUEST_ONLY: &[KernelFunction] = &[
    needed(&["__schedule"]),
    needed(&["smp_call_function_many_cond"]),
    needed(&["smp_call_function_single"]),
    needed(&["generic_exec_single"]),
    // The latter since Linux 6.16.
    needed(&["text_poke_bp_batch", "smp_text_poke_batch_finish"]),
    needed(&["__text_poke"]),
    needed(&["switch_mm_irqs_off"]),
    needed(&["stop_machine_cpuslocked"]),
    needed(&["synchronize_rcu_expedited"]),
    needed(&["flush_tlb_mm_range"]),
    needed(&["flush_tlb_kernel_range"]),
    needed(&["flush_tlb_all"]),
    // Kernels that do not know of KVM have none of these, and make no such calls.
    wanted(&["kvm_kick_cpu"]),
    wanted(&["kvm_send_ipi_mask"]),
    wanted(&["kvm_send_ipi_mask_allbutself"]),
    needed(&["machine_restart"]),
    needed(&["kernel_power_off"]),
];

/// Kernel functions that wait for as long as their first argument says, with its unit in
/// microseconds. Where one is not known a call that reaches it goes on in the guest.
pub(super) const SLEEPS: &[(&str, u64)] = &[
    ("msleep", 1000),
    ("msleep_interruptible", 1000),
    ("usleep_range_state", 1),
];

/// Kernel functions that let others run if somebody waits for the processor: inside a call nobody
/// can.
pub(super) const YIELDS: &[KernelFunction] = &[
    wanted(&["__cond_resched"]),
    wanted(&["preempt_schedule"]),
    wanted(&["preempt_schedule_notrace"]),
];

/// Kernel functions that ask whether the FPU may be used. It may not: a call that uses it goes on
/// in the guest, and who asks can do without, as in an interrupt (the random generator's hash, for
/// one, once a minute in whatever call comes).
pub(super) const FPU_QUESTIONS: &[KernelFunction] = &[wanted(&["irq_fpu_usable"])];

/// Kernel functions that only write what they are given where they are told, and call at most one
/// another: they run with the driver's rights, so that one that is told a wrong place or length is
/// stopped there. By all names that they and their variants for processors have (arch/x86/lib,
/// lib/string.c).
pub(super) const COPIES: &[KernelFunction] = &[
    wanted(&["memcpy", "__memcpy", "memcpy_erms", "memcpy_orig"]),
    wanted(&["memmove", "__memmove", "memmove_erms"]),
    wanted(&["memset", "__memset", "memset_erms", "memset_orig"]),
    wanted(&["memset16"]),
    wanted(&["copy_page", "copy_page_regs"]),
    wanted(&["clear_page_rep", "clear_page_orig", "clear_page_erms"]),
    wanted(&["strcpy", "strncpy", "stpcpy"]),
    wanted(&["strcat", "strncat", "strlcat"]),
    // The last since Linux 6.8.
    wanted(&["strlcpy", "strscpy", "sized_strscpy"]),
];

/// Kernel functions that need no other rights than the driver's, on the ways that drivers call them
/// by: they only look at memory and answer, or write to what the driver gives them and might write
/// itself. They run with the driver's rights, at no change of roots. Those that do more where
/// something else is so call others for it, which run with the kernel's (`dma_map_page_attrs` for a
/// device behind an IOMMU, or one that needs bounce buffers: kernel/dma/mapping.c, direct.h;
/// `skb_clone_tx_timestamp` for a PHY with a clock of its own: net/core/timestamping.c).
pub(super) const MODEST: &[KernelFunction] = &[
    wanted(&["dma_map_page_attrs"]),
    wanted(&["dma_unmap_page_attrs"]),
    // The part behind the inline function has another name since Linux 6.10.
    wanted(&["dma_sync_single_for_cpu", "__dma_sync_single_for_cpu"]),
    wanted(&["dma_sync_single_for_device", "__dma_sync_single_for_device"]),
    wanted(&["skb_clone_tx_timestamp"]),
    // `dma_map_single` asks it, inline.
    wanted(&["is_vmalloc_addr"]),
    wanted(&["csum_ipv6_magic"]),
    wanted(&["csum_partial"]),
    // These write: the packet, the driver's `struct napi_struct`, the queue's limits (which
    // `netdev_tx_sent_queue` writes inline).
    wanted(&["skb_put"]),
    wanted(&["eth_type_trans"]),
    wanted(&["napi_schedule_prep"]),
    wanted(&["dql_completed"]),
];

/// What a kernel has of its console by name.
pub(super) struct ConsoleNames {
    /// The function that takes the console if nobody has it, and says whether it has
    /// (`console_trylock`).
    pub take: &'static str,
    /// The word that says which task writes to it, and may be waited for; 0 for none.
    pub writer: &'static str,
    /// The function that has it written to soon, by an interrupt of this processor.
    pub defer: &'static str,
}

/// What calls print is written to the consoles after them. The same since Linux 4.15.
pub(super) const CONSOLE: ConsoleNames = ConsoleNames {
    take: "console_trylock",
    writer: "console_owner",
    defer: "defer_console_output",
};

/// A kernel function that waits while a bit is set in a member of what its first argument points
/// at.
pub(super) struct WaitsForOthers {
    /// Its name.
    pub name: &'static str,
    /// The structure.
    pub of: &'static str,
    /// The 32-bit member, each in the one before it.
    pub member: [&'static str; 2],
    /// The bit, by the kernel's name for its value.
    pub bit: &'static str,
}

/// Kernel functions that wait for other processors without letting go of their own: in a call those
/// stand still. `synchronize_irq` waits here for handlers that run (kernel/irq/manage.c).
pub(super) const WAITS_FOR_OTHERS: &[WaitsForOthers] = &[WaitsForOthers {
    name: "__synchronize_hardirq",
    of: "irq_desc",
    member: ["irq_common_data", "state_use_accessors"],
    bit: "IRQD_IRQ_INPROGRESS",
}];

/// Kernel functions that mean that the driver broke something for good: reaching one is the
/// driver's failure.
pub(super) const FATAL: &[KernelFunction] = &[
    needed(&["panic"]),
    needed(&["oops_begin"]),
    needed(&["stack_chk_fail", "__stack_chk_fail"]),
];

/// Values that failed calls return, by the kernel's name for them: they have to be this kernel's.
const RETURNED: [(&str, i128); 4] = [
    ("NETDEV_TX_BUSY", 0x10),
    ("IRQ_HANDLED", 1),
    ("BLK_EH_RESET_TIMER", 1),
    ("HRTIMER_NORESTART", 0),
];

/// What calls could not be contained or safely be failed without: names of kernel functions,
/// symbols, types, members and values that are not found. `has_symbol` tells whether the kernel has
/// a symbol of a name.
pub fn lacking(types: &Btf, has_symbol: &dyn Fn(&str) -> bool) -> Vec<String> {
    let functions = GUEST_ONLY.iter().chain(FATAL);
    let absent = functions
        .filter(|function| function.needed && !function.names.iter().any(|name| has_symbol(name)));
    let returned = RETURNED
        .iter()
        .filter(|(name, value)| types.enum_value(name).map(i128::from) != Some(*value));
    let memory = MemoryModel::lacking(types, has_symbol).into_iter();
    memory
        .map(str::to_owned)
        .chain(absent.map(|function| function.names.join(" or ")))
        .chain(returned.map(|(name, value)| format!("{name} = {value}")))
        .collect()
}
