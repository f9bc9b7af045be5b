//! Which kernel stack a stack pointer is on.
//!
//! ```text
//!  a thread's, vmalloc area    |guard|  4 pages, 16 KiB-aligned      |guard|
//!  interrupts', vmalloc area   |guard|  4 pages, page-aligned        |guard|   one for each processor
//!  exceptions', cpu_entry_area |guard|  1 or 2 pages                 |guard|
//!  a thread's, direct map       other    4 pages, 16 KiB-aligned      other    (CONFIG_VMAP_STACK off)
//! ```
//!
//! So a stack is a few mapped pages between unmapped ones (`vmalloc` leaves a page between areas);
//! where more pages in a row are mapped, it is one of the direct map's, which are aligned.

use super::addr::{Gva, GvaRange};
use super::paging::{AddressSpace, Entry, PageSize, VirtMemory};
use super::phys::GuestPhys;
use super::symbols::SymbolTable;

/// Size of a Linux kernel stack on x86-64 in bytes (`THREAD_SIZE`, `IRQ_STACK_SIZE`).
pub const THREAD_SIZE: u64 = 16 * 1024;
const PAGE: u64 = 4096;
const PAGES: u64 = THREAD_SIZE / PAGE;

/// The stack that `rsp` is on.
pub fn stack_around<M: GuestPhys>(virt: VirtMemory<'_, M>, rsp: Gva) -> GvaRange {
    exact_stack(virt, rsp).unwrap_or_else(|| GvaRange::aligned(rsp, THREAD_SIZE))
}

/// The stack that `rsp` is on, if unmapped pages say where it begins and ends.
fn exact_stack<M: GuestPhys>(virt: VirtMemory<'_, M>, rsp: Gva) -> Option<GvaRange> {
    let page = rsp.page();
    let found = virt.space.walk(virt.memory, page).ok()?;
    if found.size != PageSize::Size4K {
        return None;
    }
    let entry = found.path.at_level(1)?.at;
    let is_mapped = |at: Option<Gva>| {
        let Some(at) = at else { return false };
        // Neighbours' entries are neighbours, but for those at the ends of the table.
        if AddressSpace::same_table(at, page) {
            let offset = at.0.wrapping_sub(page.0).cast_signed() / PAGE.cast_signed() * 8;
            let entry = entry.0.wrapping_add_signed(offset);
            let entry = virt.memory.read_u64(vm_memory::GuestAddress(entry));
            return entry.is_ok_and(|entry| Entry(entry).is_present());
        }
        virt.space.walk(virt.memory, at).is_ok()
    };
    let below = (1..=PAGES).take_while(|pages| is_mapped(page.checked_sub(pages * PAGE)));
    let below = below.count() as u64;
    let above = (1..=PAGES - below.min(PAGES))
        .take_while(|pages| is_mapped(page.checked_add(pages * PAGE)));
    let above = above.count() as u64;
    if below + 1 + above > PAGES {
        return None;
    }
    GvaRange::new(page.checked_sub(below * PAGE)?, (below + 1 + above) * PAGE)
}

/// Where a processor's interrupt stack is, to which the kernel switches for interrupts and for what
/// they leave to be done (`call_on_irqstack`, arch/x86/include/asm/irq_stack.h), also in the middle
/// of a call.
#[derive(Debug, Clone, Copy, Default)]
pub struct InterruptStack {
    /// Offset in the per-CPU area of the pointer to its top; `None` if that is not known.
    pointer: Option<u64>,
}

impl InterruptStack {
    /// Of the kernel with these symbols.
    pub fn new(symbols: &SymbolTable) -> Self {
        let symbol = symbols.kernel_symbol("hardirq_stack_ptr");
        Self {
            pointer: symbol.map(|symbol| symbol.at.0),
        }
    }

    /// The interrupt stack of the processor whose per-CPU area is at `per_cpu_base`, if `rsp` is on
    /// it. Where the kernel does not say where it is, any stack between unmapped pages is taken for
    /// it.
    pub fn around<M: GuestPhys>(
        self,
        virt: VirtMemory<'_, M>,
        per_cpu_base: u64,
        rsp: Gva,
    ) -> Option<GvaRange> {
        let Some(pointer) = self.pointer else {
            return exact_stack(virt, rsp);
        };
        let top = virt
            .read_u64(Gva(per_cpu_base.wrapping_add(pointer)))
            .ok()?;
        // It points at the last word.
        let end = Gva(top).page().checked_add(PAGE)?;
        let stack = GvaRange::new(end.checked_sub(THREAD_SIZE)?, THREAD_SIZE)?;
        stack.contains(rsp).then_some(stack)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::paging::Levels;
    use crate::guest::paging::testing::TestGuest;
    use crate::guest::symbols::read_kallsyms;

    const DATA: u64 = Entry::WRITE | Entry::NO_EXECUTE;
    const VMALLOC: u64 = 0xffff_c900_0000_0000;

    fn guest(pages: impl IntoIterator<Item = u64>) -> TestGuest {
        let mut guest = TestGuest::new(Levels::Four);
        for page in pages {
            guest.put(Gva(VMALLOC + page * PAGE), &[0; 8], DATA);
        }
        guest
    }

    /// First and last page of the stack around a byte of this page.
    fn around(guest: &TestGuest, page: u64) -> (u64, u64) {
        let stack = stack_around(guest.virt(), Gva(VMALLOC + page * PAGE + 0x123));
        let number = |at: Gva| (at.0 - VMALLOC) / PAGE;
        (number(stack.first()), number(stack.last()))
    }

    #[test]
    fn a_stack_lies_between_unmapped_pages_however_it_is_aligned() {
        for first in [4, 5, 6, 7, 510] {
            // Neighbours behind their guard pages.
            let others = [first - 2, first - 3, first + 5, first + 6];
            let guest = guest((first..first + 4).chain(others));
            for page in first..first + 4 {
                assert_eq!(around(&guest, page), (first, first + 3));
            }
        }
        // An exception's.
        assert_eq!(around(&guest([5, 6, 8, 9, 10, 11]), 6), (5, 6));
    }

    #[test]
    fn without_unmapped_pages_it_is_aligned() {
        let guest = guest(0..16);
        for page in 0..16 {
            assert_eq!(around(&guest, page), (page / 4 * 4, page / 4 * 4 + 3));
        }
        // Not mapped at all.
        assert_eq!(around(&guest, 21), (20, 23));
    }

    #[test]
    fn the_interrupt_stack_is_where_the_kernel_says_it_is() {
        let per_cpu = VMALLOC + 20 * PAGE;
        let mut guest = guest((5..9).chain(10..14));
        guest.put(
            Gva(per_cpu + 0x40),
            &(VMALLOC + 9 * PAGE - 8).to_le_bytes(),
            DATA,
        );
        let symbols = |text: &str| read_kallsyms(text.as_bytes(), |_| true).unwrap();
        let around = |text: &str, page: u64| {
            let at = Gva(VMALLOC + page * PAGE + 8);
            InterruptStack::new(&symbols(text)).around(guest.virt(), per_cpu, at)
        };
        let stack = |page: u64| GvaRange::new(Gva(VMALLOC + page * PAGE), THREAD_SIZE);
        let known = "40 A hardirq_stack_ptr\n";
        assert_eq!(around(known, 5), stack(5));
        assert_eq!(around(known, 8), stack(5));
        assert_eq!(around(known, 10), None, "somebody else's stack");
        assert_eq!(around("40 A other\n", 10), stack(10));
        assert_eq!(around("40 A other\n", 30), None, "no stack");
    }
}
