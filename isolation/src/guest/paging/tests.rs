//! Walks, visits and reads over hand-made and random tables.

use devices::dma::GuestMemory;
use proptest::prelude::*;
use vm_memory::Bytes;

use super::testing::{TestGuest, random_target};
use super::visit::{Leaf, VisitError};
use super::*;
use crate::guest::addr::GvaRange;

const KERNEL: Gva = Gva(0xffff_ffff_8100_0000);

fn rights(write: bool, user: bool, execute: bool) -> Rights {
    Rights {
        write,
        user,
        execute,
    }
}

#[test]
fn walk_finds_pages_of_every_size_and_ands_the_rights_of_all_levels() {
    for levels in [Levels::Four, Levels::Five] {
        let mut guest = TestGuest::new(levels);
        let (small, large, huge) = (Gva(0x1000), Gva(0x4000_0000), Gva(0x8000_0000));
        guest.map(
            small,
            GuestAddress(0x7000),
            PageSize::Size4K,
            Entry::WRITE | Entry::USER,
        );
        guest.map(
            large,
            GuestAddress(0x20_0000),
            PageSize::Size2M,
            Entry::NO_EXECUTE | Entry::GLOBAL,
        );
        guest.map(
            huge,
            GuestAddress(0x4000_0000),
            PageSize::Size1G,
            Entry::WRITE,
        );
        let find = |at| guest.space.walk(&guest.memory, at).unwrap();

        let found = find(Gva(0x1234));
        assert_eq!(found.gpa, GuestAddress(0x7234));
        assert_eq!(
            (found.size, found.rights),
            (PageSize::Size4K, rights(true, true, true))
        );
        assert_eq!(found.path.iter().count(), usize::from(levels.top()));
        assert_eq!(
            found.path.at_level(1).unwrap().entry.0 & Entry::ADDRESS,
            0x7000
        );

        let found = find(Gva(0x4000_0000 + 0x12_3456));
        assert_eq!(found.gpa, GuestAddress(0x20_0000 + 0x12_3456));
        assert_eq!(
            (found.size, found.rights),
            (PageSize::Size2M, rights(false, false, false))
        );
        assert!(found.global);
        assert!(found.path.at_level(1).is_none());

        let found = find(Gva(0x8000_0000 + 0x1234_5678));
        assert_eq!(found.gpa, GuestAddress(0x4000_0000 + 0x1234_5678));
        assert_eq!(
            (found.size, found.rights),
            (PageSize::Size1G, rights(true, false, true))
        );

        let pud = guest.entry_at(small, 3);
        let value = guest.memory.read_u64(pud).unwrap();
        guest
            .memory
            .write_u64(pud, value & !Entry::WRITE | Entry::NO_EXECUTE);
        let found = guest.space.walk(&guest.memory, small).unwrap();
        assert_eq!(found.rights, rights(false, true, false));
    }
}

#[test]
fn what_cannot_be_translated_says_why() {
    let mut guest = TestGuest::new(Levels::Four);
    guest.map(
        KERNEL,
        GuestAddress(0x100_0000),
        PageSize::Size2M,
        Entry::WRITE,
    );
    let walk = |guest: &TestGuest, at| guest.space.walk(&guest.memory, at).unwrap_err();
    let at = Gva(0x8000_0000_0000);
    assert_eq!(walk(&guest, at), WalkError::NotCanonical { at });
    assert!(
        matches!(walk(&guest, Gva(0)), WalkError::NotPresent { step } if step.level == 4 && step.at == guest.space.root)
    );
    let pmd = guest.entry_at(KERNEL, 2);
    guest
        .memory
        .write_u64(pmd, 0x100_0000 | Entry::LARGE | Entry::PRESENT | 1 << 13);
    assert!(matches!(walk(&guest, KERNEL), WalkError::ReservedBits { step } if step.level == 2));
    guest.memory.write_u64(pmd, 1 << 46 | Entry::PRESENT);
    assert!(matches!(
        walk(&guest, KERNEL),
        WalkError::ReservedBits { .. }
    ));
    guest.memory.write_u64(pmd, 1 << 45 | Entry::PRESENT);
    assert!(matches!(
        walk(&guest, KERNEL),
        WalkError::TableOutsideMemory { level: 1, .. }
    ));
    guest.memory.write_u64(
        pmd,
        0x100_0000 | Entry::LARGE | Entry::PRESENT | Entry::NO_EXECUTE,
    );
    assert!(
        !guest
            .space
            .walk(&guest.memory, KERNEL)
            .unwrap()
            .rights
            .execute
    );
    guest.space.no_execute = false;
    assert!(matches!(
        walk(&guest, KERNEL),
        WalkError::ReservedBits { .. }
    ));
    let pml4 = guest.entry_at(KERNEL, 4);
    guest.memory.write_u64(pml4, Entry::LARGE | Entry::PRESENT);
    assert!(matches!(walk(&guest, KERNEL), WalkError::ReservedBits { step } if step.level == 4));
}

#[test]
fn registers_tell_the_mode() {
    let space = AddressSpace::from_registers(0x8000_0000_0012_3abc, 1 << 12, 0x801, 48);
    assert_eq!(space.root, GuestAddress(0x12_3000));
    assert_eq!((space.levels, space.no_execute), (Levels::Five, true));
    let space = AddressSpace::from_registers(0x1000, 0, 0x500, 0);
    assert_eq!(
        (space.levels, space.no_execute, space.physical_bits),
        (Levels::Four, false, 32)
    );
}

#[test]
fn real_guest_memory_can_be_walked() {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
    for (table, next) in [(0x1000u64, 0x2000u64), (0x2000, 0x3000), (0x3000, 0x4000)] {
        memory.write_obj(next | 3, GuestAddress(table)).unwrap();
    }
    memory.write_obj(0x5003u64, GuestAddress(0x4008)).unwrap();
    let space = AddressSpace::from_registers(0x1000, 0, 0xd01, 40);
    assert_eq!(
        space.walk(&memory, Gva(0x1abc)).unwrap().gpa,
        GuestAddress(0x5abc)
    );
    memory
        .write_obj(0x7fff_f003u64, GuestAddress(0x1000))
        .unwrap();
    assert!(matches!(
        space.walk(&memory, Gva(0x1abc)),
        Err(WalkError::TableOutsideMemory {
            level: 3,
            at: GuestAddress(0x7fff_f000)
        })
    ));
}

#[test]
fn tables_that_point_at_themselves_end_at_the_budget() {
    let mut guest = TestGuest::new(Levels::Five);
    let root = guest.space.root;
    for index in 0..ENTRIES {
        guest
            .memory
            .write_u64(entry_address(root, index), root.0 | 0x67);
    }
    let all = GvaRange::inclusive(Gva(0), Gva(u64::MAX)).unwrap();
    let result = guest.space.visit_pages(&guest.memory, all, 100, |_| {});
    assert_eq!(result, Err(VisitError::OverBudget(100)));
    assert_eq!(
        guest.space.walk(&guest.memory, Gva(0x1234)).unwrap().gpa.0,
        root.0 | 0x234
    );
}

#[test]
fn reads_cross_pages_that_are_apart_in_memory() {
    let mut guest = TestGuest::new(Levels::Four);
    guest.map(KERNEL, GuestAddress(0x9000), PageSize::Size4K, 0);
    guest.map(
        Gva(KERNEL.0 + 0x1000),
        GuestAddress(0x3000),
        PageSize::Size4K,
        0,
    );
    guest.memory.write(GuestAddress(0x9ffc), &[1, 2, 3, 4]);
    guest.memory.write(GuestAddress(0x3000), &[5, 6, 7, 8]);
    let word = guest.virt().read_u64(Gva(KERNEL.0 + 0xffc)).unwrap();
    assert_eq!(word, 0x0807_0605_0403_0201);
    let text: Vec<u8> = (0..=255).cycle().take(0x1800).collect();
    guest.put(Gva(0x7_0f00), &text, 0);
    assert_eq!(
        guest.virt().read_vec(Gva(0x7_0f01), 0x17ff).unwrap(),
        text[1..]
    );
    let past = Gva(KERNEL.0 + 0x2000);
    let error = guest.virt().read_u64(Gva(past.0 - 4)).unwrap_err();
    assert!(matches!(error, VirtError::Walk { at, .. } if at == past));
    let error = guest.virt().read_u64(Gva(u64::MAX - 3)).unwrap_err();
    assert!(matches!(error, VirtError::Wraps { .. }));
}

proptest! {
    /// Tables of random words: whatever a visit reports, a walk finds too, and the other way round.
    #[test]
    fn visit_and_walk_agree_on_random_tables(
        words in prop::collection::vec((0u64..8, 0usize..ENTRIES, 0u64..10, any::<u16>()), 1..200),
        probes in prop::collection::vec((0usize..200, any::<u64>()), 32),
        five in any::<bool>(),
    ) {
        let levels = if five { Levels::Five } else { Levels::Four };
        let mut guest = TestGuest::new(levels);
        for _ in 0..7 {
            guest.new_table();
        }
        // Few distinct indices, so that paths are complete often enough.
        for (table, index, next, flags) in &words {
            let table = GuestAddress(TestGuest::TABLES + table * TABLE_BYTES);
            let flags = u64::from(*flags);
            let target = random_target(*next, flags);
            let entry = target | (flags & 0x1ff) | ((flags & 0x4000) << 49);
            guest.memory.write_u64(entry_address(table, index % 4 * 128), entry | 1);
        }
        let all = GvaRange::inclusive(Gva(0), Gva(u64::MAX)).unwrap();
        let mut leaves = Vec::new();
        let visited = guest.space.visit_pages(&guest.memory, all, 5000, |leaf| leaves.push(*leaf));
        for leaf in &leaves {
            let found = guest.space.walk(&guest.memory, leaf.at).unwrap();
            prop_assert_eq!((found.gpa, found.size, found.rights), (leaf.gpa, leaf.size, leaf.rights));
        }
        for (pick, offset) in &probes {
            let near = leaves.get(pick % leaves.len().max(1)).map_or(0, |l: &Leaf| l.at.0);
            let at = levels.sign_extend(Gva(near ^ (offset & 0x3fff_ffff)));
            if visited.is_ok() && guest.space.walk(&guest.memory, at).is_ok() {
                prop_assert!(leaves.iter().any(|l| GvaRange::aligned(l.at, l.size.bytes()).contains(at)));
            }
        }
    }
}
