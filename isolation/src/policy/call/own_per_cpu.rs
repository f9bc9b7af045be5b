//! The driver's own variables of each processor (`DEFINE_PER_CPU`), which its `struct module`
//! names.

use crate::guest::addr::{Gva, GvaRange};
use crate::guest::btf::Btf;
use crate::guest::modules::ModuleLayout;
use crate::guest::paging::VirtMemory;
use crate::guest::phys::GuestPhys;

/// The section that is a module's `struct module`.
pub(super) const THIS_MODULE: &str = ".gnu.linkonce.this_module";

/// Most bytes of per-CPU variables that a module has (`PERCPU_MODULE_RESERVE`,
/// include/linux/percpu.h).
const MAX_BYTES: u64 = 8 << 10;

/// Where the module says it: the per-CPU pointer, and how many bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct OwnPerCpu {
    pointer: Gva,
    bytes: Gva,
}

impl OwnPerCpu {
    /// `None` for a kernel with another `struct module`.
    pub(super) fn new(types: &Btf, layout: &ModuleLayout) -> Option<Self> {
        let mut sections = layout.sections.iter();
        let module = sections.find(|section| section.name == THIS_MODULE)?;
        let of = types.find_struct("module")?;
        let at = |name| {
            let member = types.find_member(of, name)?;
            let offset = u64::from(member.bit_offset / 8);
            module.range.first().checked_add(offset)
        };
        Some(Self {
            pointer: at("percpu")?,
            bytes: at("percpu_size")?,
        })
    }

    /// What the processor with this GS base has of them.
    pub(super) fn on<M: GuestPhys>(
        self,
        virt: VirtMemory<'_, M>,
        per_cpu_base: u64,
    ) -> Option<GvaRange> {
        let pointer = virt.read_u64(self.pointer).ok()?;
        let bytes = virt.read_u64(self.bytes).ok()? & u64::from(u32::MAX);
        let first = Gva(per_cpu_base.wrapping_add(pointer));
        GvaRange::new(first, bytes.min(MAX_BYTES)).filter(|_| pointer != 0)
    }
}
