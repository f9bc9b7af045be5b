//! Allocations in a make-believe kernel's bookkeeping.

use proptest::prelude::*;

use super::*;
use crate::guest::btf::Btf;
use crate::guest::btf::encode::Encoder;
use crate::guest::paging::testing::TestGuest;
use crate::guest::paging::{Entry, Levels};
use crate::guest::symbols::{SymbolTable, read_kallsyms};

pub(in crate::guest) const DIRECT: u64 = 0xffff_8880_0000_0000;
const VMALLOC: u64 = 0xffff_c900_0000_0000;
pub(in crate::guest) const VMEMMAP: u64 = 0xffff_ea00_0000_0000;
pub(in crate::guest) const VARIABLES: u64 = 0xffff_ffff_8200_0000;
const CACHE: u64 = 0xffff_8880_0000_0100;
pub(in crate::guest) const PAGE_STRUCT: u64 = 64;

/// Types as Linux 6.1 has them.
pub(in crate::guest) fn types() -> Btf {
    types_of(false)
}

/// Types as Linux 6.1 has them, or 6.12: slabs are a type of page, and the order of a compound page
/// is in the flags of its second one.
fn types_of(newer: bool) -> Btf {
    let mut e = Encoder::new(None);
    let long = e.int("long unsigned int", 8, 0);
    let int = e.int("unsigned int", 4, 0);
    let byte = e.int("unsigned char", 1, 0);
    let atomic = e.structure("", 4, &[("counter", int, 0)]);
    let tail = [
        ("compound_head", long, 0),
        ("compound_dtor", byte, 8),
        ("compound_order", byte, 9),
    ];
    let tail = e.structure("", 16, &tail[..if newer { 1 } else { 3 }]);
    let link = e.pointer(long);
    let list = e.structure("list_head", 16, &[("next", link, 0), ("prev", link, 8)]);
    let listed = e.structure("", 16, &[("lru", list, 0)]);
    let union = e.composite(5, "", 40, &[("", tail, 0), ("", listed, 0)]);
    e.structure(
        "page",
        64,
        &[
            ("flags", long, 0),
            ("", union, 8),
            ("page_type", int, 48),
            ("_refcount", atomic, 52),
        ],
    );
    if newer {
        e.structure("folio", 256, &[("_flags_1", long, 64)]);
        e.enumeration_of("pagetype", &[("PGTY_buddy", 0xf0), ("PGTY_slab", 0xf5)]);
    }
    let cache = e.structure(
        "kmem_cache",
        64,
        &[
            ("cpu_slab", long, 0),
            ("size", int, 24),
            ("object_size", int, 28),
            ("red_left_pad", int, 32),
            ("offset", int, 36),
            ("inuse", int, 48),
            ("random", long, 40),
        ],
    );
    let cpu = [("freelist", long, 0), ("slab", long, 16)];
    e.structure("kmem_cache_cpu", 32, &cpu);
    let cache = e.pointer(cache);
    e.structure(
        "slab",
        64,
        &[("slab_cache", cache, 24), ("freelist", long, 32)],
    );
    let flags = [("PG_head", 16), ("PG_slab", 9)];
    e.enumeration_of("pageflags", &flags[..if newer { 1 } else { 2 }]);
    Btf::parse(&e.bytes(), None).unwrap()
}

pub(in crate::guest) fn symbols() -> SymbolTable {
    let text = format!(
        "{VARIABLES:x} D page_offset_base\n{:x} D vmalloc_base\n{:x} D vmemmap_base\n{:x} D __kfence_pool\n",
        VARIABLES + 8,
        VARIABLES + 16,
        VARIABLES + 24
    );
    read_kallsyms(text.as_bytes(), |_| true).unwrap()
}

pub(in crate::guest) const DATA: u64 = Entry::WRITE | Entry::NO_EXECUTE;

/// Writes a `struct page`.
fn put_page(guest: &mut TestGuest, pfn: u64, flags: u64, compound: u64, order: u8, count: u32) {
    let at = VMEMMAP + pfn * PAGE_STRUCT;
    guest.put(Gva(at), &[0; 64], DATA);
    guest.put(Gva(at), &flags.to_le_bytes(), DATA);
    guest.put(Gva(at + 8), &compound.to_le_bytes(), DATA);
    guest.put(Gva(at + 17), &[order], DATA);
    guest.put(Gva(at + 52), &count.to_le_bytes(), DATA);
}

/// Puts page `pfn` on a list, or off it.
fn put_link(guest: &mut TestGuest, pfn: u64, link: u64) {
    let at = VMEMMAP + pfn * PAGE_STRUCT + 8;
    guest.put(Gva(at), &link.to_le_bytes(), DATA);
}

/// A guest whose kernel has three kinds of pages: 16 single ones from 0; a slab of two pages at 16
/// with objects of 192 bytes (176 asked for, 8 left of each); a compound page of order 3 at 24.
pub(in crate::guest) fn guest() -> TestGuest {
    let mut guest = TestGuest::new(Levels::Four);
    let bases = [DIRECT, VMALLOC, VMEMMAP, DIRECT + (40 << 12)];
    guest.put(Gva(VARIABLES), &bases.map(u64::to_le_bytes).concat(), DATA);
    guest.put(Gva(DIRECT), &[0; 4096], DATA);
    for pfn in 0..15 {
        put_page(&mut guest, pfn, 0, 0, 0, 1);
    }
    put_page(&mut guest, 15, 0, 0, 0, 0);
    put_link(&mut guest, 15, VMEMMAP + 14 * PAGE_STRUCT + 8);
    let head = |pfn: u64| VMEMMAP + pfn * PAGE_STRUCT;
    put_page(&mut guest, 16, 1 << 9 | 1 << 16, 0, 0, 1);
    put_page(&mut guest, 17, 0, head(16) | 1, 1, 0);
    guest.put(Gva(head(16) + 24), &CACHE.to_le_bytes(), DATA);
    let cache: Vec<u8> = [192u32, 176, 8]
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .collect();
    guest.put(Gva(CACHE + 24), &cache, DATA);
    put_page(&mut guest, 24, 1 << 16, 0, 0, 1);
    for pfn in 25..32 {
        put_page(
            &mut guest,
            pfn,
            0,
            head(24) | 1,
            if pfn == 25 { 3 } else { 0 },
            0,
        );
    }
    guest.put(Gva(VMALLOC + 0x1000), &[0; 0x3000], DATA);
    guest.put(Gva(VMALLOC + 0x5000), &[0; 0x1000], DATA);
    guest
}

fn find(guest: &TestGuest, at: u64) -> Option<(u64, u64, AllocationKind)> {
    let model = MemoryModel::new(&types(), &symbols(), &guest.virt()).unwrap();
    let found = Allocations::new(&model, guest.virt()).allocation_at(Gva(at))?;
    Some((found.range.first().0, found.range.len_bytes(), found.kind))
}

#[test]
fn pages_slabs_and_areas_are_found() {
    use AllocationKind::{Pages, Slab, Vmalloc};
    let guest = guest();
    let at = |pfn: u64, offset: u64| DIRECT + (pfn << 12) + offset;
    assert_eq!(find(&guest, at(3, 5)), Some((at(3, 0), 4096, Pages)));
    assert_eq!(find(&guest, at(15, 0)), None, "a free page");
    assert_eq!(find(&guest, at(24, 0)), Some((at(24, 0), 8 << 12, Pages)));
    assert_eq!(
        find(&guest, at(31, 4095)),
        Some((at(24, 0), 8 << 12, Pages))
    );
    assert_eq!(find(&guest, at(16, 8)), Some((at(16, 8), 176, Slab)));
    assert_eq!(
        find(&guest, at(16, 193)),
        None,
        "the pad left of the second object"
    );
    // The object that lies on both pages of the slab.
    let crossing = 4096 / 192 * 192 + 8;
    assert_eq!(find(&guest, at(17, 0)), Some((at(16, crossing), 176, Slab)));
    assert_eq!(
        find(&guest, VMALLOC + 0x2345),
        Some((VMALLOC + 0x1000, 0x3000, Vmalloc))
    );
    assert_eq!(
        find(&guest, VMALLOC + 0x5fff),
        Some((VMALLOC + 0x5000, 0x1000, Vmalloc))
    );
    assert_eq!(find(&guest, VMALLOC + 0x4000), None);
    assert_eq!(
        find(&guest, VARIABLES),
        None,
        "the kernel's own data is nobody's allocation"
    );
    // KFENCE's objects have a page each, which is hidden while they are free.
    assert_eq!(find(&guest, at(41, 8)), None);
    let mut guest = guest;
    guest.put(Gva(at(41, 0)), &[0; 4096], DATA);
    assert_eq!(find(&guest, at(41, 8)), Some((at(41, 0), 4096, Pages)));
}

#[test]
fn pages_and_slabs_are_found_as_linux_6_12_marks_them() {
    use AllocationKind::{Pages, Slab};
    let mut guest = guest();
    let page = |pfn: u64| VMEMMAP + pfn * PAGE_STRUCT;
    let mut put = |pfn: u64, flags: u64, page_type: u32| {
        guest.put(Gva(page(pfn)), &flags.to_le_bytes(), DATA);
        guest.put(Gva(page(pfn) + 48), &page_type.to_le_bytes(), DATA);
    };
    // Bit 9 is another flag there; a count of mappings is in the place of a type.
    put(3, 1 << 9, u32::MAX);
    put(4, 0, 7);
    put(16, 1 << 16, 0xf5 << 24);
    put(17, 0xab00 | 1, u32::MAX);
    put(24, 1 << 9 | 1 << 16, u32::MAX);
    put(25, 0xab00 | 3, u32::MAX);
    let model = MemoryModel::new(&types_of(true), &symbols(), &guest.virt()).unwrap();
    let find = |at: u64| {
        let found = Allocations::new(&model, guest.virt()).allocation_at(Gva(at))?;
        Some((found.range.first().0, found.range.len_bytes(), found.kind))
    };
    let at = |pfn: u64, offset: u64| DIRECT + (pfn << 12) + offset;
    for pfn in [3, 4] {
        assert_eq!(find(at(pfn, 5)), Some((at(pfn, 0), 4096, Pages)));
    }
    assert_eq!(find(at(31, 4095)), Some((at(24, 0), 8 << 12, Pages)));
    assert_eq!(find(at(16, 8)), Some((at(16, 8), 176, Slab)));
    let crossing = 4096 / 192 * 192 + 8;
    assert_eq!(find(at(17, 0)), Some((at(16, crossing), 176, Slab)));
}

#[test]
fn what_a_kernel_lacks_is_named_all_of_it() {
    for newer in [false, true] {
        assert_eq!(
            MemoryModel::lacking(&types_of(newer), &|name| symbols()
                .kernel_symbol(name)
                .is_some()),
            [""; 0],
            "{newer}"
        );
    }
    let mut e = Encoder::new(None);
    let long = e.int("long unsigned int", 8, 0);
    e.structure("page", 64, &[("flags", long, 0), ("_refcount", long, 8)]);
    e.structure("kmem_cache", 64, &[("size", long, 0)]);
    let types = Btf::parse(&e.bytes(), None).unwrap();
    let text = "ffffffff82000000 D page_offset_base\n";
    let symbols = read_kallsyms(text.as_bytes(), |_| true).unwrap();
    assert_eq!(
        MemoryModel::lacking(&types, &|name| symbols.kernel_symbol(name).is_some()),
        [
            "vmalloc_base",
            "vmemmap_base",
            "slab",
            "kmem_cache.object_size",
            "page.compound_head or page.compound_info",
            "page.compound_order or folio._folio_order or folio._flags_1",
            "PG_slab or PGTY_slab",
            "PG_head"
        ]
    );
    assert!(MemoryModel::new(&types, &symbols, &guest().virt()).is_err());
}

#[test]
fn pages_handed_out_together_are_found_from_any_of_them() {
    let mut guest = guest();
    let at = |pfn: u64| DIRECT + (pfn << 12);
    // Four pages in a row at 8, of which only the first is held; then a free block of two at 12,
    // whose first page is on a list, and one page that is in use at 14.
    for pfn in 9..14 {
        put_page(&mut guest, pfn, 0, 0, 0, 0);
        put_link(&mut guest, pfn, LIST_POISON);
    }
    put_link(&mut guest, 12, VMEMMAP + 20 * PAGE_STRUCT + 8);
    let expected = Some((at(8), 4 << 12, AllocationKind::Pages));
    for pfn in 8..12 {
        assert_eq!(find(&guest, at(pfn) + 7), expected, "page {pfn}");
    }
    assert_eq!(find(&guest, at(12)), None, "on a list: free");
    assert_eq!(find(&guest, at(13)), None, "behind one that is free");
    let single = Some((at(14), 4096, AllocationKind::Pages));
    assert_eq!(find(&guest, at(14)), single);
}

/// What scrambles the links of free objects.
const RANDOM: u64 = 0x1234_5678_9abc_def0;
/// GS base, and where the cache has what belongs to the processor.
const PER_CPU: u64 = DIRECT + 0x3000;
const CPU_SLAB: u64 = 0x40;
/// Objects of 176 bytes in the slab of [`guest`], with 8 bytes of red zone left and the link right
/// of them.
const fn object(index: u64) -> u64 {
    DIRECT + (16 << 12) + index * 192 + 8
}

/// A guest whose slab has its links beside its objects, as with `slub_debug`, and these objects
/// free: in the slab's list, and in the processor's if it takes objects from this slab.
fn guest_with_free(of_slab: &[u64], of_cpu: Option<&[u64]>) -> TestGuest {
    let mut guest = guest();
    let word = |guest: &mut TestGuest, at: u64, value: u64| {
        guest.put(Gva(at), &value.to_le_bytes(), DATA);
    };
    let slab = VMEMMAP + 16 * PAGE_STRUCT;
    guest.put(Gva(object(0) - 8), &[0xcc; 2 * 4096], DATA);
    guest.put(Gva(CACHE + 36), &176u32.to_le_bytes(), DATA);
    word(&mut guest, CACHE, CPU_SLAB);
    word(&mut guest, CACHE + 40, RANDOM);
    guest.put(Gva(PER_CPU), &[0; 4096], DATA);
    for list in [Some(of_slab), of_cpu].into_iter().flatten() {
        for (index, at) in list.iter().enumerate() {
            let next = list.get(index + 1).copied().unwrap_or(0);
            let link = at + 176;
            word(&mut guest, link, next ^ RANDOM ^ link.swap_bytes());
        }
    }
    word(&mut guest, slab + 32, of_slab.first().copied().unwrap_or(0));
    if let Some(list) = of_cpu {
        word(&mut guest, PER_CPU + CPU_SLAB + 16, slab);
        word(
            &mut guest,
            PER_CPU + CPU_SLAB,
            list.first().copied().unwrap_or(0),
        );
    }
    guest
}

/// Whether the object at `at` is one that was handed out between `before` and `now`.
fn is_new(at: u64, before: &TestGuest, now: &TestGuest) -> bool {
    let model = MemoryModel::new(&types(), &symbols(), &now.virt()).unwrap();
    let now = Allocations::new(&model, now.virt()).on_processor(PER_CPU);
    let before = Allocations::new(&model, before.virt()).on_processor(PER_CPU);
    let found = now.allocation_at(Gva(at)).unwrap();
    assert_eq!((found.range.first().0, found.range.len_bytes()), (at, 176));
    now.is_new(&found, &before)
}

/// `slub_debug=P` and `init_on_alloc=0`: the object's bytes are as they were when it was free.
#[test]
fn an_object_that_left_the_list_of_free_ones_is_new_whatever_it_holds() {
    let (a, b, live) = (object(5), object(2), object(1));
    for list in [false, true] {
        let with = |free: &[u64]| match list {
            true => guest_with_free(&[], Some(free)),
            false => guest_with_free(free, None),
        };
        let before = with(&[a, b]);
        let mut now = with(&[b]);
        let link = |guest: &TestGuest| guest.virt().read_u64(Gva(a + 176)).unwrap();
        let old = link(&before).to_le_bytes();
        now.put(Gva(a + 176), &old, DATA);
        assert!(is_new(a, &before, &now));
        assert!(!is_new(a, &before, &before), "free all the time");
        assert!(!is_new(a, &now, &now), "handed out before");
        assert!(!is_new(b, &before, &now), "still free");
        assert!(!is_new(live, &before, &now));
    }
}

#[test]
fn an_object_that_was_given_back_is_not_handed_out() {
    let (a, b) = (object(5), object(2));
    let (before, now) = (guest_with_free(&[b], None), guest_with_free(&[a, b], None));
    assert!(!is_new(a, &before, &now), "its link has changed");
}

/// `slub_debug=Z` and `U`: an object that somebody gave back and the call got is on no list before
/// or after.
#[test]
fn an_object_that_changed_hands_is_told_by_what_lies_beside_it() {
    let (a, b) = (object(5), object(2));
    let before = guest_with_free(&[b], None);
    let mut now = before.clone();
    now.put(Gva(a + 176 + 7), &[0xbb], DATA);
    assert!(is_new(a, &before, &now));
    assert!(!is_new(object(6), &before, &now), "the next one");
}

#[test]
fn lists_that_are_damaged_say_nothing_and_are_left() {
    let (a, b) = (object(5), object(2));
    let before = guest_with_free(&[a, b, a], None);
    let outside = guest_with_free(&[b, DIRECT], None);
    assert!(!is_new(object(1), &before, &outside));
    assert!(!is_new(object(1), &outside, &before), "a ring");
}

#[test]
fn a_description_leads_to_its_page() {
    let guest = guest();
    let model = MemoryModel::new(&types(), &symbols(), &guest.virt()).unwrap();
    let (description, page) = model
        .described_page(Gva(VMEMMAP + 9 * PAGE_STRUCT + 32))
        .unwrap();
    assert_eq!(description.first(), Gva(VMEMMAP + 9 * PAGE_STRUCT));
    assert_eq!(description.len_bytes(), PAGE_STRUCT);
    assert_eq!(page, Gva(DIRECT + (9 << 12)));
    assert_eq!(model.described_page(Gva(VMEMMAP - 1)), None);
    let behind = (VMALLOC - DIRECT) / 4096 * PAGE_STRUCT;
    assert_eq!(model.described_page(Gva(VMEMMAP + behind)), None);
}

#[test]
fn a_kernel_that_is_unknown_says_what_is_missing() {
    let guest = guest();
    let error = MemoryModel::new(&types(), &SymbolTable::default(), &guest.virt()).unwrap_err();
    assert_eq!(error.missing, "page_offset_base");
    let empty = Btf::parse(&Encoder::new(None).bytes(), None).unwrap();
    let error = MemoryModel::new(&empty, &symbols(), &guest.virt()).unwrap_err();
    assert_eq!(error.missing, "page");
}

proptest! {
    #[test]
    fn damaged_bookkeeping_is_read_without_harm(
        changes in prop::collection::vec((0u64..40 * PAGE_STRUCT, any::<u8>()), 0..60),
        cache in prop::collection::vec((0u64..64, any::<u8>()), 0..20),
        probes in prop::collection::vec(0u64..(40 << 12), 20),
    ) {
        static GUEST: std::sync::LazyLock<TestGuest> = std::sync::LazyLock::new(guest);
        let mut guest = GUEST.clone();
        for (at, value) in changes {
            guest.put(Gva(VMEMMAP + at), &[value], DATA);
        }
        for (at, value) in cache {
            guest.put(Gva(CACHE + at), &[value], DATA);
        }
        let model = MemoryModel::new(&types(), &symbols(), &guest.virt()).unwrap();
        for probe in probes {
            if let Some(found) = Allocations::new(&model, guest.virt()).allocation_at(Gva(DIRECT + probe)) {
                prop_assert!(found.range.contains(Gva(DIRECT + probe)));
                prop_assert!(found.range.len_bytes() <= 4096 << MAX_ORDER);
            }
        }
    }
}

#[test]
fn the_red_zone_right_of_an_object_is_that_of_the_kernels_own_checks() {
    let mut guest = guest();
    let types = types();
    let model = MemoryModel::new(&types, &symbols(), &guest.virt()).unwrap();
    let red_zone = |guest: &TestGuest| {
        let allocations = Allocations::new(&model, guest.virt());
        let found = allocations
            .allocation_at(Gva(DIRECT + (16 << 12) + 8))
            .unwrap();
        let zone = allocations.red_zone(&found)?;
        assert_eq!(zone.first().0, found.range.last().0 + 1);
        Some(zone.len_bytes())
    };
    let cache = CACHE;
    guest.put(Gva(cache + 48), &180u32.to_le_bytes(), DATA);
    assert_eq!(red_zone(&guest), Some(4));
    // Without red zones, and with none right of objects.
    guest.put(Gva(cache + 32), &0u32.to_le_bytes(), DATA);
    assert_eq!(red_zone(&guest), None);
    guest.put(Gva(cache + 32), &8u32.to_le_bytes(), DATA);
    guest.put(Gva(cache + 48), &176u32.to_le_bytes(), DATA);
    assert_eq!(red_zone(&guest), None);
}
