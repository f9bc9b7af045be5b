//! Memory that was in use at a mark, has been since, and has other bytes now.
//!
//! Only where calls of a domain have written to what is not their driver's: what the guest has
//! changed by itself is its own business. Taken piece by piece: an object of a slab, a page that somebody holds, a processor's part of a
//! per-CPU allocation, a symbol of the kernel's image. What was handed out or given back meanwhile
//! is none. Which of the pieces had to change whoever compares with other runs knows.

use std::ops::Range;

use vm_memory::GuestAddress;
use vmm::SinceMark;

use super::addr::{Gva, GvaRange};
use super::allocations::{Allocation, AllocationKind, Allocations, FindAllocation};
use super::memory_model::MemoryModel;
use super::paging::{AddressSpace, VirtMemory};
use super::phys::{GuestPhys, OutsideMemory};
use super::symbols::SymbolTable;

const PAGE_BYTES: u64 = 4096;

/// First and last symbol of the kernel's image (arch/x86/kernel/vmlinux.lds.S).
const IMAGE: (&str, &str) = ("_text", "_end");
/// Where the kernel's log is (kernel/printk/printk.c): what calls have it print is no harm.
const LOG: [&str; 4] = [
    "printk_rb_static",
    "_printk_rb_static_infos",
    "_printk_rb_static_descs",
    "__log_buf",
];
/// Where the memory of each processor begins (mm/percpu.c), which is its GS base.
const PER_CPU: &str = "__per_cpu_offset";

impl GuestPhys for SinceMark<'_> {
    fn read(&self, at: GuestAddress, data: &mut [u8]) -> Result<(), OutsideMemory> {
        let len = data.len();
        match SinceMark::read(self, at, data) {
            true => Ok(()),
            false => Err(OutsideMemory { at, len }),
        }
    }
}

/// A piece of memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bystander {
    /// Guest physical addresses of its bytes.
    pub range: Range<u64>,
    /// What it is, and where in it the first other byte is.
    pub what: String,
}

/// Memory at two times, with the kernel's own bookkeeping of either.
#[derive(Debug, Clone, Copy)]
pub struct TwoTimes<'a, N, B> {
    /// Where the kernel keeps it.
    pub model: &'a MemoryModel,
    /// Names of what is in the kernel's image.
    pub symbols: &'a SymbolTable,
    /// Page tables that have been the kernel's at both times.
    pub space: AddressSpace,
    /// Memory now.
    pub now: &'a N,
    /// Memory as it was before.
    pub before: &'a B,
}

/// The kernel's image in memory.
#[derive(Debug, Clone)]
struct Image {
    text: Gva,
    at: Range<u64>,
}

/// What a word is a part of.
enum Found {
    Image(Range<u64>, String),
    Slab(Range<u64>, Allocation),
    Page(Range<u64>),
    PerCpu(Range<u64>),
    /// Nothing that was in use and is: up to here.
    Nothing(u64),
}

impl<N: GuestPhys, B: GuestPhys> TwoTimes<'_, N, B> {
    /// The pieces that differ in the pages that begin at `pages`, each once, in a word that counts by
    /// its address, but for those that are known: of a byte of such a one `known` tells where it
    /// ends.
    pub fn differing(
        &self,
        pages: &[GuestAddress],
        counts: &dyn Fn(u64) -> bool,
        known: &mut dyn FnMut(u64) -> Option<u64>,
    ) -> Vec<Bystander> {
        let mut pages = pages.to_vec();
        pages.sort_unstable();
        let (image, per_cpu) = (self.image(), self.per_cpu_base());
        let mut found: Vec<Bystander> = Vec::new();
        let mut behind = 0;
        let (mut now, mut before) = ([0; PAGE_BYTES as usize], [0; PAGE_BYTES as usize]);
        for page in pages {
            let is_there = self.now.read(page, &mut now).is_ok();
            if !is_there || self.before.read(page, &mut before).is_err() {
                continue;
            }
            let words = now.chunks_exact(8).zip(before.chunks_exact(8)).enumerate();
            for (number, _) in words.filter(|(_, (now, before))| now != before) {
                let at = page.0 + 8 * number as u64;
                if at < behind || !counts(at) {
                    continue;
                }
                if let Some(end) = known(at) {
                    behind = end;
                    continue;
                }
                let piece = self.piece(at, image.as_ref(), per_cpu);
                let piece = piece.unwrap_or(Found::Nothing(at + 8));
                behind = piece.end().max(at + 8);
                found.extend(self.named(piece, at));
            }
        }
        found
    }

    fn virt_before(&self) -> VirtMemory<'_, B> {
        VirtMemory {
            space: self.space,
            memory: self.before,
        }
    }

    fn image(&self) -> Option<Image> {
        let at = |name| Some(self.symbols.kernel_symbol(name)?.at);
        let (text, end) = (at(IMAGE.0)?, at(IMAGE.1)?);
        let first = self.space.walk(self.before, text).ok()?.gpa.0;
        let bytes = end.0.checked_sub(text.0)?;
        Some(Image {
            text,
            at: first..first.checked_add(bytes)?,
        })
    }

    fn per_cpu_base(&self) -> Option<u64> {
        let offsets = self.symbols.kernel_symbol(PER_CPU)?.at;
        self.virt_before().read_u64(offsets).ok()
    }

    /// What the byte at `at` is a part of.
    fn piece(&self, at: u64, image: Option<&Image>, per_cpu: Option<u64>) -> Option<Found> {
        if let Some(image) = image.filter(|image| image.at.contains(&at)) {
            let va = image.text.checked_add(at - image.at.start)?;
            let (symbol, within) = self.symbols.lookup(va)?;
            let all = GvaRange::new(image.text, image.at.end - image.at.start)?;
            let extent = self.symbols.extent(symbol.at, all)?;
            let first = at.checked_sub(within)?;
            let range = first..first.checked_add(extent.len_bytes())?;
            if LOG.contains(&symbol.name) {
                return Some(Found::Nothing(range.end));
            }
            return Some(Found::Image(range, symbol.name.to_owned()));
        }
        let page = at & !(PAGE_BYTES - 1);
        let nothing = Some(Found::Nothing(page + PAGE_BYTES));
        let va = Gva(self.model.direct_map.0.checked_add(at)?);
        let virt = VirtMemory {
            space: self.space,
            memory: self.now,
        };
        let now = Allocations::new(self.model, virt);
        let before = Allocations::new(self.model, self.virt_before());
        let (now, before) = match per_cpu {
            Some(base) => (now.on_processor(base), before.on_processor(base)),
            None => (now, before),
        };
        let (Some(is), Some(was)) = (now.allocation_at(va), before.allocation_at(va)) else {
            return nothing;
        };
        let physical = |va: Gva| va.0.checked_sub(self.model.direct_map.0);
        let range = physical(is.range.first())?..physical(is.range.last())?.checked_add(1)?;
        let is_free = before.is_free(va) == Some(true) || now.is_free(va) == Some(true);
        if was.range != is.range || is_free || now.is_new(&is, &before) {
            return match is.kind {
                AllocationKind::Slab => Some(Found::Nothing(range.end)),
                _ => nothing,
            };
        }
        Some(match is.kind {
            AllocationKind::Slab => Found::Slab(range, is),
            AllocationKind::PerCpu => Found::PerCpu(range),
            AllocationKind::Pages | AllocationKind::Vmalloc => Found::Page(page..page + PAGE_BYTES),
        })
    }

    /// A piece, one of whose other bytes is at `at`, with its name.
    fn named(&self, piece: Found, at: u64) -> Option<Bystander> {
        let (range, name) = match piece {
            Found::Nothing(_) => return None,
            Found::Image(range, symbol) => (range, symbol),
            Found::Slab(range, allocation) => {
                let before = Allocations::new(self.model, self.virt_before());
                let cache = before.cache_name(&allocation);
                (
                    range,
                    cache.unwrap_or_else(|| "slab".to_owned()) + " object",
                )
            }
            Found::Page(range) => (range, "page".to_owned()),
            Found::PerCpu(range) => (range, "memory of a processor".to_owned()),
        };
        let what = format!("{name} at {:#x} + {:#x}", range.start, at - range.start);
        Some(Bystander { range, what })
    }
}

impl Found {
    /// The first byte behind it.
    fn end(&self) -> u64 {
        match self {
            Self::Image(range, _)
            | Self::Slab(range, _)
            | Self::Page(range)
            | Self::PerCpu(range) => range.end,
            Self::Nothing(end) => *end,
        }
    }
}

#[cfg(test)]
#[path = "bystanders_tests.rs"]
mod tests;
