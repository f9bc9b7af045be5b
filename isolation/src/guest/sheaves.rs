//! SLUB's sheaves: arrays of free objects that processors keep beside the slabs' own lists
//! (mm/slub.c, since Linux 6.18; since 7.0 all caches have them, and processors have no slabs any
//! more).
//!
//! ```text
//!   kmem_cache ─► of each processor: main, spare ─► sheaf ─► size, objects[0], objects[1], ...
//!        └─► of each node: barn ─► full sheaves, in a list
//! ```
//!
//! An object in a sheaf is free, though its slab has it for one that was handed out. What waits for
//! RCU to be freed (`rcu_free`) is nobody's to take yet, and is not looked at. Sheaves are the
//! guest's memory and hostile: what is looked at of each, and how many, is limited.

use super::addr::Gva;
use super::btf::{Btf, TypeId};
use super::field::Field;
use super::paging::VirtMemory;
use super::phys::GuestPhys;

/// Most objects of a sheaf that are looked at (`calculate_sheaf_capacity` gives 60 at most where
/// the cache does not ask for more).
const MAX_OBJECTS: u64 = 1024;

/// Most full sheaves of a node that are looked at (`MAX_FULL_SHEAVES`, mm/slub.c, is 10).
const MAX_FULL: usize = 64;

/// Most nodes whose barns are looked at.
const MAX_NODES: u64 = 8;

/// Where sheaves are, and what is in them.
#[derive(Debug, Clone, Copy)]
pub(super) struct SheafModel {
    /// `kmem_cache.cpu_sheaves`, a per-CPU pointer.
    of_cache: Field,
    main: Field,
    spare: Field,
    size: Field,
    /// Where a sheaf's pointers to objects begin.
    objects: u64,
    barns: Option<BarnModel>,
}

/// Where a node's full sheaves are.
#[derive(Debug, Clone, Copy)]
struct BarnModel {
    /// Where a cache's pointers to what belongs to nodes begin, and the bytes of each.
    per_node: (u64, u64),
    barn: Field,
    full: u64,
    /// Where a sheaf has its link.
    link: u64,
}

impl SheafModel {
    /// From the kernel's types; `cache` is `struct kmem_cache`. `None` before there were sheaves.
    pub(super) fn new(types: &Btf, cache: TypeId) -> Option<Self> {
        let sheaf = types.find_struct("slab_sheaf")?;
        let of_cpu = types.find_struct("slub_percpu_sheaves")?;
        Some(Self {
            of_cache: Field::find(types, cache, "cpu_sheaves")?,
            main: Field::find(types, of_cpu, "main")?,
            spare: Field::find(types, of_cpu, "spare")?,
            size: Field::find(types, sheaf, "size")?,
            objects: offset(types, sheaf, "objects")?,
            barns: BarnModel::new(types, cache, sheaf),
        })
    }

    /// Whether `object` is in a sheaf of `cache` that its processor, the one with `per_cpu_base`,
    /// or a node has. `None` if what leads there cannot be read.
    pub(super) fn holds<M: GuestPhys>(
        &self,
        virt: &VirtMemory<'_, M>,
        cache: Gva,
        object: Gva,
        per_cpu_base: Option<u64>,
    ) -> Option<bool> {
        if let Some(base) = per_cpu_base {
            let of_cpu = Gva(base.wrapping_add(self.of_cache.read(virt, cache)?));
            for sheaf in [self.main, self.spare] {
                let sheaf = Gva(sheaf.read(virt, of_cpu)?);
                if sheaf.0 != 0 && self.sheaf_holds(virt, sheaf, object)? {
                    return Some(true);
                }
            }
        }
        match &self.barns {
            Some(barns) => barns.any_full(virt, cache, &mut |sheaf| {
                self.sheaf_holds(virt, sheaf, object)
            }),
            None => Some(false),
        }
    }

    fn sheaf_holds<M: GuestPhys>(
        &self,
        virt: &VirtMemory<'_, M>,
        sheaf: Gva,
        object: Gva,
    ) -> Option<bool> {
        let count = self.size.read(virt, sheaf)?.min(MAX_OBJECTS);
        let objects = sheaf.checked_add(self.objects)?;
        let words = virt
            .read_vec(objects, usize::try_from(count * 8).ok()?)
            .ok()?;
        let object = object.0.to_le_bytes();
        Some(words.as_chunks::<8>().0.contains(&object))
    }
}

impl BarnModel {
    fn new(types: &Btf, cache: TypeId, sheaf: TypeId) -> Option<Self> {
        let of_node = types.find_struct("kmem_cache_per_node_ptrs")?;
        let barn = types.find_struct("node_barn")?;
        Some(Self {
            per_node: (
                offset(types, cache, "per_node")?,
                types.size_of(of_node).filter(|bytes| *bytes >= 8)?,
            ),
            barn: Field::find(types, of_node, "barn")?,
            full: offset(types, barn, "sheaves_full")?,
            link: offset(types, sheaf, "barn_list")?,
        })
    }

    /// Whether `holds` says so of any full sheaf.
    fn any_full<M: GuestPhys>(
        &self,
        virt: &VirtMemory<'_, M>,
        cache: Gva,
        holds: &mut dyn FnMut(Gva) -> Option<bool>,
    ) -> Option<bool> {
        let (first, bytes) = self.per_node;
        for node in 0..MAX_NODES {
            let of_node = cache.checked_add(first + node * bytes)?;
            // The table has places for all nodes that are possible: what is there are the first.
            let barn = match self.barn.read(virt, of_node)? {
                0 => break,
                barn => Gva(barn),
            };
            let head = barn.checked_add(self.full)?;
            let mut at = Gva(virt.read_u64(head).ok()?);
            let mut left = MAX_FULL;
            while at != head && left > 0 {
                if holds(Gva(at.0.checked_sub(self.link)?))? {
                    return Some(true);
                }
                at = Gva(virt.read_u64(at).ok()?);
                left -= 1;
            }
        }
        Some(false)
    }
}

/// Where a member begins, whatever it is.
fn offset(types: &Btf, of: TypeId, name: &str) -> Option<u64> {
    let member = types.find_member(of, name)?;
    Some(u64::from(member.bit_offset / 8))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::guest::allocations::{AllocationKind, Allocations, FindAllocation};
    use crate::guest::btf::encode::Encoder;
    use crate::guest::memory_model::MemoryModel;
    use crate::guest::paging::testing::TestGuest;
    use crate::guest::paging::{Entry, Levels};
    use crate::guest::symbols::{SymbolTable, read_kallsyms};

    const DIRECT: u64 = 0xffff_8880_0000_0000;
    const VMALLOC: u64 = 0xffff_c900_0000_0000;
    const VMEMMAP: u64 = 0xffff_ea00_0000_0000;
    const VARIABLES: u64 = 0xffff_ffff_8200_0000;
    const DATA: u64 = Entry::WRITE | Entry::NO_EXECUTE;
    /// Pages of the slab, the first of four, which are one compound page.
    const SLAB: u64 = 16;
    const CACHE: u64 = DIRECT + 0x100;
    const BARN: u64 = DIRECT + 0x400;
    const PER_CPU: u64 = DIRECT + 0x1000;
    const OF_CPU: u64 = 0x40;
    const MAIN: u64 = DIRECT + 0x2000;
    const SPARE: u64 = DIRECT + 0x2400;
    const FULL: [u64; 2] = [DIRECT + 0x2800, DIRECT + 0x2c00];

    const fn object(index: u64) -> u64 {
        DIRECT + (SLAB << 12) + index * 128
    }

    /// Types as Linux 7.3 has them, as far as they are looked at.
    fn types() -> Btf {
        let mut e = Encoder::new(None);
        let long = e.int("long unsigned int", 8, 0);
        let int = e.int("unsigned int", 4, 0);
        let link = e.pointer(long);
        let list = e.structure("list_head", 16, &[("next", link, 0), ("prev", link, 8)]);
        let page = [
            ("flags", long, 0),
            ("compound_info", long, 8),
            ("page_type", int, 48),
            ("_refcount", int, 52),
        ];
        e.structure("page", 64, &page);
        e.structure("folio", 256, &[("_flags_1", long, 64)]);
        e.structure(
            "slab",
            64,
            &[("slab_cache", long, 8), ("freelist", long, 32)],
        );
        let of_node = [("barn", long, 0), ("node", long, 8)];
        let of_node = e.structure("kmem_cache_per_node_ptrs", 16, &of_node);
        let cache = [
            ("cpu_sheaves", long, 0),
            ("size", int, 24),
            ("object_size", int, 28),
            ("offset", int, 40),
            ("per_node", of_node, 208),
        ];
        e.structure("kmem_cache", 512, &cache);
        let sheaves = [("main", long, 8), ("spare", long, 16)];
        e.structure("slub_percpu_sheaves", 32, &sheaves);
        let sheaf = [
            ("barn_list", list, 0),
            ("size", int, 24),
            ("objects", long, 32),
        ];
        e.structure("slab_sheaf", 40, &sheaf);
        e.structure("node_barn", 48, &[("sheaves_full", list, 8)]);
        e.enumeration_of("pageflags", &[("PG_head", 6)]);
        e.enumeration_of("pagetype", &[("PGTY_slab", 0xf5)]);
        Btf::parse(&e.bytes(), None).unwrap()
    }

    fn symbols() -> SymbolTable {
        let names = ["page_offset_base", "vmalloc_base", "vmemmap_base"];
        let lines = (0..).zip(names);
        let lines = lines.map(|(at, name)| format!("{:x} D {name}\n", VARIABLES + at * 8));
        read_kallsyms(lines.collect::<String>().as_bytes(), |_| true).unwrap()
    }

    fn put(guest: &mut TestGuest, at: u64, words: &[u64]) {
        let words: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        guest.put(Gva(at), &words, DATA);
    }

    /// What a sheaf holds, behind its link.
    fn put_sheaf(guest: &mut TestGuest, at: u64, objects: &[u64]) {
        put(guest, at + 24, &[objects.len() as u64]);
        put(guest, at + 32, objects);
    }

    /// A guest with a slab of objects of 128 bytes, these of them in the processor's sheaves and in
    /// the two full ones of its node.
    fn guest(main: &[u64], spare: &[u64], full: [&[u64]; 2]) -> TestGuest {
        let mut guest = TestGuest::new(Levels::Four);
        put(&mut guest, VARIABLES, &[DIRECT, VMALLOC, VMEMMAP]);
        guest.put(Gva(DIRECT), &[0; 3 << 12], DATA);
        guest.put(Gva(DIRECT + (SLAB << 12)), &[0; 4 << 12], DATA);
        guest.put(Gva(VMEMMAP), &[0; 4096], DATA);
        let page = |index: u64| VMEMMAP + (SLAB + index) * 64;
        put(&mut guest, page(0), &[1 << 6, CACHE]);
        guest.put(Gva(page(0) + 51), &[0xf5], DATA);
        // Order 2, and the mask that makes the first of four descriptions of any of them.
        put(&mut guest, page(1), &[2]);
        (1..4).for_each(|tail| put(&mut guest, page(tail) + 8, &[!(4 * 64 - 1) | 1]));
        put(&mut guest, CACHE, &[OF_CPU, 0, 0, 128 | 128 << 32]);
        put(&mut guest, CACHE + 208, &[BARN]);
        put(&mut guest, PER_CPU + OF_CPU, &[0, MAIN, SPARE]);
        put_sheaf(&mut guest, MAIN, main);
        put_sheaf(&mut guest, SPARE, spare);
        put(&mut guest, BARN + 8, &[FULL[0]]);
        put(&mut guest, FULL[0], &[FULL[1]]);
        put(&mut guest, FULL[1], &[BARN + 8]);
        for (at, objects) in FULL.into_iter().zip(full) {
            put_sheaf(&mut guest, at, objects);
        }
        guest
    }

    fn model(guest: &TestGuest) -> MemoryModel {
        MemoryModel::new(&types(), &symbols(), &guest.virt()).unwrap()
    }

    #[test]
    fn a_tail_with_a_mask_leads_to_its_head() {
        let guest = guest(&[], &[], [&[], &[]]);
        let model = model(&guest);
        let all = Allocations::new(&model, guest.virt());
        let found = all.allocation_at(Gva(object(100) + 5)).unwrap();
        assert_eq!(found.kind, AllocationKind::Slab);
        assert_eq!(found.range.first(), Gva(object(100)));
        let lacking =
            MemoryModel::lacking(&types(), &|name| symbols().kernel_symbol(name).is_some());
        assert_eq!(lacking, [""; 0]);
    }

    #[test]
    fn objects_in_sheaves_are_free_and_new_where_they_have_left_them() {
        let (a, b, c, live) = (object(1), object(40), object(127), object(2));
        let before = guest(&[object(3), a], &[b], [&[], &[c]]);
        let now = guest(&[object(3)], &[], [&[], &[]]);
        let model = model(&now);
        let now = Allocations::new(&model, now.virt()).on_processor(PER_CPU);
        let before = Allocations::new(&model, before.virt()).on_processor(PER_CPU);
        for object in [a, b, c] {
            assert_eq!(before.is_free(Gva(object)), Some(true));
            let found = now.allocation_at(Gva(object)).unwrap();
            assert!(now.is_new(&found, &before), "{object:x}");
            assert!(!before.is_new(&found, &before), "free all the time");
        }
        let found = now.allocation_at(Gva(live)).unwrap();
        assert!(!now.is_new(&found, &before));
        assert_eq!(now.is_free(Gva(live)), Some(false));
    }

    #[test]
    fn sheaves_that_are_damaged_say_nothing_and_are_left() {
        let mut ring = guest(&[], &[], [&[], &[]]);
        put(&mut ring, FULL[1], &[FULL[0]]);
        let mut away = guest(&[], &[], [&[], &[]]);
        put(&mut away, BARN + 8, &[VMALLOC]);
        for (guest, expected) in [(ring, Some(false)), (away, None)] {
            let model = model(&guest);
            let all = Allocations::new(&model, guest.virt()).on_processor(PER_CPU);
            assert_eq!(all.is_free(Gva(object(2))), expected);
        }
    }

    proptest! {
        #[test]
        fn whatever_is_in_them_is_read_without_harm(
            changes in prop::collection::vec((0u64..0x3000, any::<u64>()), 0..40),
        ) {
            let mut guest = guest(&[object(1)], &[], [&[object(2)], &[]]);
            for (at, value) in changes {
                put(&mut guest, DIRECT + (at & !7), &[value]);
            }
            let model = model(&guest);
            let all = Allocations::new(&model, guest.virt()).on_processor(PER_CPU);
            for index in 0..128 {
                all.is_free(Gva(object(index)));
            }
        }
    }
}
