//! How far the allocation around an address goes, from the guest kernel's own bookkeeping.
//!
//! Types say what a pointer points at, but not how many there are behind it: rings, statistics and
//! buffers are arrays whose length no type knows. The kernel knows how much it handed out: the slab
//! cache of the page (SLUB), the order of a compound page, the guard pages around a `vmalloc` area.
//!
//! Field offsets come from the kernel's BTF, so that nothing here is tied to one version; what a
//! version does not have is not found, and an allocation then counts as unknown. The bookkeeping is
//! in guest memory and hostile: a lie makes an allocation look larger than it is, which lets the
//! guest's driver harm the guest, but no host memory is touched and all work is bounded.

use serde::Serialize;

use super::addr::{Gva, GvaRange};
use super::memory_model::MemoryModel;
use super::paging::VirtMemory;
use super::per_cpu::PerCpu;
use super::phys::GuestPhys;
use super::slab::SlabObject;

/// Most pages that one `vmalloc` area is followed over: 64 MiB.
const MAX_AREA_PAGES: u64 = 1 << 14;

/// Largest order of a compound page that is believed: 1 GiB.
const MAX_ORDER: u8 = 18;

/// Largest order of pages that the page allocator hands out (`MAX_ORDER` of Linux 6.1, less 1).
const MAX_PAGES_ORDER: u32 = 10;

/// What `list_del` leaves in a list's link (`LIST_POISON1`, include/linux/poison.h).
const LIST_POISON: u64 = 0xdead_0000_0000_0100;

/// Longest name of a slab cache, in bytes.
const MAX_CACHE_NAME: usize = 64;

/// Most bytes of KFENCE's pool (`CONFIG_KFENCE_NUM_OBJECTS` 255, the default).
const KFENCE_POOL_BYTES: u64 = 2 << 20;

/// Where an allocation came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AllocationKind {
    /// `kmalloc`, `kmem_cache_alloc`.
    Slab,
    /// Whole pages.
    Pages,
    /// `vmalloc`: also modules and stacks.
    Vmalloc,
    /// `alloc_percpu`: what one processor has of it.
    PerCpu,
}

/// A piece of memory that the guest's kernel handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Allocation {
    /// All of it; for slabs what was asked for at most.
    pub range: GvaRange,
    /// Where it came from.
    pub kind: AllocationKind,
    /// The `struct kmem_cache` of a slab's object.
    pub cache: Option<Gva>,
}

/// Something that knows allocations.
pub trait FindAllocation {
    /// The allocation that `at` lies in, if it is known.
    fn allocation_at(&self, at: Gva) -> Option<Allocation>;

    /// The page that the `struct page` at `description` stands for.
    fn page_address(&self, description: Gva) -> Option<Gva>;
}

/// A compound page, or a single one.
struct Block {
    /// Its first `struct page`, or `struct slab`.
    head: Gva,
    whole: GvaRange,
    is_slab: bool,
}

/// The guest's allocations as they are now.
#[derive(Debug)]
pub struct Allocations<'a, M> {
    model: &'a MemoryModel,
    virt: VirtMemory<'a, M>,
    per_cpu_base: Option<u64>,
}

impl<M: GuestPhys> FindAllocation for Allocations<'_, M> {
    fn allocation_at(&self, at: Gva) -> Option<Allocation> {
        let model = self.model;
        if at < model.direct_map || at >= model.vmemmap {
            return None;
        }
        let in_direct_map = at < model.vmalloc;
        match self.per_cpu(at, in_direct_map) {
            PerCpu::HandedOut(range) => Some(Allocation {
                range,
                kind: AllocationKind::PerCpu,
                cache: None,
            }),
            PerCpu::Free => None,
            PerCpu::Other if in_direct_map => self.in_direct_map(at),
            PerCpu::Other => self.in_vmalloc(at),
        }
    }

    fn page_address(&self, description: Gva) -> Option<Gva> {
        let (range, page) = self.model.described_page(description)?;
        (range.first() == description).then_some(page)
    }
}

impl<'a, M> Allocations<'a, M> {
    /// What `model` says of the memory as it is now.
    pub fn new(model: &'a MemoryModel, virt: VirtMemory<'a, M>) -> Self {
        Self {
            model,
            virt,
            per_cpu_base: None,
        }
    }
}

impl<M: GuestPhys> Allocations<'_, M> {
    /// With the lists of free objects of the processor that has this GS base, too.
    pub fn on_processor(self, per_cpu_base: u64) -> Self {
        Self {
            per_cpu_base: Some(per_cpu_base),
            ..self
        }
    }

    fn per_cpu(&self, at: Gva, in_direct_map: bool) -> PerCpu {
        self.model.per_cpu.map_or(PerCpu::Other, |model| {
            model.find(self.model.pages(), &self.virt, at, in_direct_map)
        })
    }

    /// What a kernel function that has returned `value` has handed out by it begins at: there, or,
    /// if that is a per-CPU pointer, where it points on each processor.
    pub fn places_of(&self, value: Gva) -> Vec<Gva> {
        match self.model.per_cpu {
            Some(model) if value < self.model.direct_map => model.addresses(value.0).collect(),
            _ => vec![value],
        }
    }

    fn in_direct_map(&self, at: Gva) -> Option<Allocation> {
        let model = self.model;
        let single = Allocation {
            range: GvaRange::aligned(at, 4096),
            kind: AllocationKind::Pages,
            cache: None,
        };
        if self.in_pool(at) {
            // Free objects are hidden.
            let is_mapped = self.virt.space.walk(self.virt.memory, at).is_ok();
            return is_mapped.then_some(single);
        }
        let Block {
            head,
            whole,
            is_slab,
        } = self.block(at)?;
        if is_slab {
            let object = model.slabs.object(&self.virt, at, head, whole)?;
            return Some(Allocation {
                range: object.range,
                kind: AllocationKind::Slab,
                cache: Some(object.cache),
            });
        }
        // Several pages in a row need not be a compound page: then only the first one is held.
        if whole.len_bytes() == 4096 {
            let pfn = (at.0 - model.direct_map.0) >> 12;
            return Some(Allocation {
                range: self.pages_in_a_row(pfn)?,
                ..single
            });
        }
        // Nobody holds it: it is free.
        if model.refcount.read(&self.virt, head)? == 0 {
            return None;
        }
        Some(Allocation {
            range: whole,
            ..single
        })
    }

    /// Whether `at` lies in KFENCE's pool.
    fn in_pool(&self, at: Gva) -> bool {
        let pool = self.model.kfence_pool;
        pool.is_some_and(|pool| at >= pool && at.0 - pool.0 < KFENCE_POOL_BYTES)
    }

    /// The compound page, or the page, of `at` in the direct map.
    fn block(&self, at: Gva) -> Option<Block> {
        let model = self.model;
        let pfn = at.0.checked_sub(model.direct_map.0)? >> 12;
        let page = self.page(pfn)?;
        let head = model.head_of(&self.virt, page)?.unwrap_or(page);
        let head_pfn = head.0.checked_sub(model.vmemmap.0)? / model.page_bytes;
        let pages_before = pfn.checked_sub(head_pfn)?;
        let start = Gva(model
            .direct_map
            .0
            .checked_add(head_pfn.checked_mul(4096)?)?);
        let flags = model.flags.read(&self.virt, head)?;
        let order = match flags >> model.head_bit & 1 {
            0 => 0,
            _ => {
                let second = head.checked_add(model.page_bytes)?;
                let order = model.compound_order.read(&self.virt, second)? as u8;
                order.min(MAX_ORDER)
            }
        };
        if pages_before >> order != 0 {
            return None;
        }
        Some(Block {
            head,
            whole: GvaRange::new(start, 4096 << order)?,
            is_slab: model.slab_mark.is_slab(&self.virt, head, flags)?,
        })
    }

    /// The slab's object that `at` lies in.
    fn slab_object(&self, at: Gva) -> Option<SlabObject> {
        let block = self.block(at).filter(|block| block.is_slab)?;
        let slabs = &self.model.slabs;
        slabs.object(&self.virt, at, block.head, block.whole)
    }

    /// The pages that were handed out together with page `pfn`, which is none of a compound page's.
    fn pages_in_a_row(&self, pfn: u64) -> Option<GvaRange> {
        let held = |pfn| Some(self.model.refcount.read(&self.virt, self.page(pfn)?)? != 0);
        let head = (0..=MAX_PAGES_ORDER)
            .map(|order| pfn >> order << order)
            .find(|head| held(*head) == Some(true))?;
        if !(head + 1..=pfn).all(|pfn| self.is_held_by_another(pfn)) {
            return None;
        }
        let most = 1 << head.trailing_zeros().min(MAX_PAGES_ORDER);
        let behind = (head + 1..head + most).take_while(|pfn| self.is_held_by_another(*pfn));
        let pages = 1 + behind.count() as u64;
        let start = head
            .checked_mul(4096)?
            .checked_add(self.model.direct_map.0)?;
        GvaRange::new(Gva(start), pages * 4096)
    }

    /// Whether nobody holds page `pfn` by itself and it is not free either: free pages are on a
    /// list, or behind one that is.
    fn is_held_by_another(&self, pfn: u64) -> bool {
        let model = self.model;
        let known = || {
            let page = self.page(pfn)?;
            let lru = model.lru?;
            let link = lru.read(&self.virt, page)?;
            let unlinked = [0, LIST_POISON, page.checked_add(lru.offset)?.0].contains(&link);
            let compound = model.head_of(&self.virt, page)?.is_some();
            let flags = model.flags.read(&self.virt, page)?;
            let slab = model.slab_mark.is_slab(&self.virt, page, flags)?;
            let single = flags >> model.head_bit & 1 == 0 && !slab;
            let free = model.refcount.read(&self.virt, page)? == 0;
            Some(free && unlinked && !compound && single)
        };
        known().unwrap_or(false)
    }

    /// The `struct page` of page `pfn`.
    fn page(&self, pfn: u64) -> Option<Gva> {
        let offset = pfn.checked_mul(self.model.page_bytes)?;
        self.model.vmemmap.checked_add(offset)
    }

    /// The name of the slab cache that an allocation is from, such as `kmalloc-64`.
    pub fn cache_name(&self, allocation: &Allocation) -> Option<String> {
        let name = self.model.slabs.name?.read(&self.virt, allocation.cache?)?;
        let mut bytes = [0; MAX_CACHE_NAME];
        self.virt.read(Gva(name), &mut bytes).ok()?;
        let len = bytes.iter().position(|byte| *byte == 0)?;
        String::from_utf8(bytes[..len].to_vec()).ok()
    }

    /// Whether an object's slab has nothing between its objects: with `slub_debug` the kernel has
    /// records there, and does not zero what was not asked for.
    pub fn is_plain(&self, allocation: &Allocation) -> bool {
        let slabs = &self.model.slabs;
        allocation
            .cache
            .is_none_or(|cache| slabs.is_plain(&self.virt, cache) == Some(true))
    }

    /// The red zone of the kernel's own behind a slab's object, if there is one.
    pub fn red_zone(&self, allocation: &Allocation) -> Option<GvaRange> {
        let slabs = &self.model.slabs;
        slabs.red_zone(&self.virt, allocation.cache?, allocation.range)
    }

    /// Whether a byte of `allocation` differs from the `earlier` memory: whether somebody has
    /// worked on it since. Looks at the first 4 KiB.
    pub fn is_changed<E: GuestPhys>(
        &self,
        allocation: &Allocation,
        earlier: &Allocations<'_, E>,
    ) -> bool {
        let len = allocation.range.len_bytes().min(4096) as usize;
        let at = allocation.range.first();
        match (self.virt.read_vec(at, len), earlier.virt.read_vec(at, len)) {
            (Ok(now), Ok(before)) => now != before,
            _ => false,
        }
    }

    /// Whether `allocation`, found in this memory, was not there yet in the `earlier` one.
    ///
    /// A slab's object is new if it was free and is not, or if what SLUB notes of it has changed:
    /// the word that links free objects, which kernels clear with the rest when they hand memory
    /// out (`CONFIG_INIT_ON_ALLOC_DEFAULT_ON`, Debian's do), or its red zones and records
    /// (`slub_debug`). An object of KFENCE's is new if its page was hidden, or has changed: all
    /// around it is filled when it is handed out.
    pub fn is_new<E: GuestPhys>(
        &self,
        allocation: &Allocation,
        earlier: &Allocations<'_, E>,
    ) -> bool {
        let at = allocation.range.first();
        if earlier
            .allocation_at(at)
            .is_none_or(|before| before.range != allocation.range)
        {
            return true;
        }
        let slabs = &self.model.slabs;
        let Some(cache) = allocation.cache else {
            return self.in_pool(at) && self.is_changed(allocation, earlier);
        };
        let is_free = self.is_free(at);
        if is_free == Some(true) {
            return false;
        }
        let now = slabs.notes(&self.virt, cache, allocation.range);
        let before = slabs.notes(&earlier.virt, cache, allocation.range);
        let noted = now.zip(before).is_some_and(|(now, before)| now != before);
        noted || is_free == Some(false) && earlier.is_free(at) == Some(true)
    }

    /// Whether the slab's object at `at` is free, if that is known.
    pub fn is_free(&self, at: Gva) -> Option<bool> {
        let object = self.slab_object(at)?;
        let slabs = &self.model.slabs;
        slabs.is_free(&self.virt, &object, self.per_cpu_base)
    }

    /// The pages around `at` up to those that are not mapped: every area has a guard page behind
    /// it.
    fn in_vmalloc(&self, at: Gva) -> Option<Allocation> {
        let rights = |page: Gva| {
            self.virt
                .space
                .walk(self.virt.memory, page)
                .ok()
                .map(|found| found.rights)
        };
        let here = rights(at)?;
        let same = |page: &Gva| rights(*page) == Some(here);
        let area = GvaRange::inclusive(self.model.vmalloc, self.model.vmemmap)?;
        let mut budget = MAX_AREA_PAGES;
        let mut first = at.page();
        while let Some(before) = first
            .checked_sub(4096)
            .filter(|p| area.contains(*p))
            .filter(same)
        {
            budget = budget.checked_sub(1)?;
            first = before;
        }
        let mut last = Gva(at.0 | 0xfff);
        while let Some(after) = last
            .checked_add(1)
            .filter(|p| area.contains(*p))
            .filter(same)
        {
            budget = budget.checked_sub(1)?;
            last = Gva(after.0 | 0xfff);
        }
        let range = GvaRange::inclusive(first, last)?;
        Some(Allocation {
            range,
            kind: AllocationKind::Vmalloc,
            cache: None,
        })
    }
}

#[cfg(test)]
#[path = "allocations_tests.rs"]
pub(super) mod tests;
