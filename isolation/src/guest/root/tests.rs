//! Derived roots against the guest's own tables.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::guest::paging::testing::{TestGuest, TestMemory, random_target};
use crate::guest::paging::{
    AddressSpace, ENTRIES, Levels, PageSize, TABLE_BYTES, Translation, entry_address,
};
use crate::guest::phys::OutsideMemory;

const POOL: u64 = 0x2_0000_0000;

/// Pages of a pool, readable like memory.
#[derive(Default)]
struct Pool {
    pages: BTreeMap<u64, Box<[u64; ENTRIES]>>,
    free: Vec<u64>,
    limit: usize,
}

impl Pool {
    fn of(limit: usize) -> Self {
        Self {
            limit,
            ..Self::default()
        }
    }
}

impl TablePool for Pool {
    fn alloc(&mut self) -> Option<GuestAddress> {
        if self.pages.len() >= self.limit {
            return None;
        }
        let page = self
            .free
            .pop()
            .unwrap_or(POOL + self.pages.len() as u64 * TABLE_BYTES);
        assert!(self.pages.insert(page, Box::new([0; ENTRIES])).is_none());
        Some(GuestAddress(page))
    }

    fn free(&mut self, table: GuestAddress) {
        assert!(self.pages.remove(&table.0).is_some(), "double free");
        self.free.push(table.0);
    }

    fn write(&mut self, table: GuestAddress, index: usize, entry: u64) {
        self.pages.get_mut(&table.0).unwrap()[index] = entry;
    }
}

/// The guest's memory and the pool above it, as the private VM has them.
struct Both<'a>(&'a TestMemory, &'a Pool);

impl GuestPhys for Both<'_> {
    fn read(&self, at: GuestAddress, data: &mut [u8]) -> Result<(), OutsideMemory> {
        let Some(page) = self.1.pages.get(&(at.0 & !0xfff)) else {
            return self.0.read(at, data);
        };
        let bytes: Vec<u8> = page.iter().flat_map(|e| e.to_le_bytes()).collect();
        let from = at.0 as usize & 0xfff;
        data.copy_from_slice(&bytes[from..from + data.len()]);
        Ok(())
    }
}

fn derived_space(guest: &TestGuest, root: &DerivedRoot) -> AddressSpace {
    AddressSpace {
        root: root.root(),
        ..guest.space
    }
}

/// Asserts that at `at` the derived root gives what the guest's gives, less what the edits take.
fn check_at(guest: &TestGuest, pool: &Pool, root: &DerivedRoot, at: Gva) {
    let old = guest.space.walk(&guest.memory, at).ok();
    let new = derived_space(guest, root)
        .walk(&Both(&guest.memory, pool), at)
        .ok();
    let what = root.edits().restriction_at(at).unwrap_or_default();
    let cache = |found: &Translation| {
        found
            .path
            .iter()
            .last()
            .and_then(|step| step.entry.pat_index(step.level))
    };
    assert_eq!(
        new.as_ref().and_then(cache),
        old.as_ref().filter(|_| !what.hidden).and_then(cache),
        "memory type at {at}"
    );
    let expected = old.filter(|_| !what.hidden).map(|old| {
        let rights = Rights {
            write: old.rights.write && !what.no_write,
            execute: old.rights.execute && !what.no_execute,
            ..old.rights
        };
        (old.gpa, rights, old.global)
    });
    assert_eq!(
        new.map(|new| (new.gpa, new.rights, new.global)),
        expected,
        "at {at} under {what:?}"
    );
}

const TEXT: Gva = Gva(0xffff_ffff_8100_0000);
const DIRECT: Gva = Gva(0xffff_8880_0000_0000);

fn range(first: Gva, len: u64) -> GvaRange {
    GvaRange::new(first, len).unwrap()
}

fn kernel_like_guest() -> TestGuest {
    let mut guest = TestGuest::new(Levels::Four);
    for i in 0..4 {
        let at = Gva(TEXT.0 + (i << 21));
        guest.map(
            at,
            GuestAddress(0x100_0000 + (i << 21)),
            PageSize::Size2M,
            Entry::GLOBAL,
        );
    }
    let flags = Entry::WRITE | Entry::NO_EXECUTE;
    guest.map(DIRECT, GuestAddress(0), PageSize::Size1G, flags);
    for i in 0..16 {
        let at = Gva(0xffff_ffff_c000_0000 + (i << 12));
        guest.map(
            at,
            GuestAddress(0x500_0000 - (i << 12)),
            PageSize::Size4K,
            Entry::WRITE,
        );
    }
    guest
}

#[test]
fn a_whole_half_is_restricted_without_any_table() {
    let guest = kernel_like_guest();
    let mut edits = Edits::default();
    let upper = GvaRange::inclusive(Gva(0xffff_8000_0000_0000), Gva(u64::MAX)).unwrap();
    edits.restrict(upper, Restriction::NO_WRITE).unwrap();
    let mut pool = Pool::of(1);
    let root = DerivedRoot::build(&guest.virt(), edits, &mut pool).unwrap();
    assert_eq!(root.table_count(), 1);
    check_at(&guest, &pool, &root, DIRECT);
    check_at(&guest, &pool, &root, Gva(0xffff_ffff_c000_0000));
}

#[test]
fn a_page_opened_in_a_read_only_gigabyte_is_the_only_writable_one() {
    let guest = kernel_like_guest();
    let mut pool = Pool::of(16);
    let mut edits = Edits::default();
    let upper = GvaRange::inclusive(Gva(0xffff_8000_0000_0000), Gva(u64::MAX)).unwrap();
    edits.restrict(upper, Restriction::NO_WRITE).unwrap();
    let mut root = DerivedRoot::build(&guest.virt(), edits, &mut pool).unwrap();
    let page = range(Gva(DIRECT.0 + 0x1234_5000), 0x1000);
    root.edit(&guest.virt(), &mut pool, page, Change::Clear)
        .unwrap();
    assert_eq!(root.table_count(), 4);
    for at in [
        page.first().0 - 1,
        page.first().0,
        page.last().0,
        page.last().0 + 1,
        DIRECT.0,
    ] {
        check_at(&guest, &pool, &root, Gva(at));
    }
    let space = derived_space(&guest, &root);
    let whole = range(DIRECT, 1 << 30);
    let runs = space
        .mapped_runs(&Both(&guest.memory, &pool), whole, 8)
        .unwrap();
    let writable: Vec<_> = runs
        .iter()
        .filter(|r| r.rights.write)
        .map(|r| r.range)
        .collect();
    assert_eq!(writable, [page]);
    // Closing and opening it again needs one store each and no table.
    let close = Change::Restrict(Restriction::NO_WRITE);
    assert_eq!(root.edit(&guest.virt(), &mut pool, page, close), Ok(1));
    check_at(&guest, &pool, &root, page.first());
    assert_eq!(
        root.edit(&guest.virt(), &mut pool, page, Change::Clear),
        Ok(1)
    );
    assert_eq!(root.table_count(), 4);
}

#[test]
fn a_monitor_area_is_mapped_where_the_guest_has_nothing() {
    let guest = kernel_like_guest();
    let mut pool = Pool::of(16);
    let (at, gpa) = (Gva(0xffff_fe80_0000_0000), GuestAddress(0x3_0000_0000));
    let execute = Rights {
        write: false,
        user: false,
        execute: true,
    };
    let write = Rights {
        write: true,
        user: true,
        execute: false,
    };
    let mut edits = Edits::default();
    edits.map(range(at, 0x2000), gpa, execute).unwrap();
    let mut root = DerivedRoot::build(&guest.virt(), edits, &mut pool).unwrap();
    let data = Gva(at.0 + 0x2000);
    let change = Change::Map {
        gpa: GuestAddress(gpa.0 + 0x8000),
        rights: write,
    };
    root.edit(&guest.virt(), &mut pool, range(data, 0x1000), change)
        .unwrap();
    let space = derived_space(&guest, &root);
    let find = |at| space.walk(&Both(&guest.memory, &pool), at);
    let code = find(Gva(at.0 + 0x1004)).unwrap();
    assert_eq!(
        (code.gpa, code.rights),
        (GuestAddress(gpa.0 + 0x1004), execute)
    );
    let found = find(data).unwrap();
    assert_eq!(found.gpa, GuestAddress(gpa.0 + 0x8000));
    assert_eq!(
        found.rights,
        Rights {
            user: false,
            ..write
        }
    );
    assert!(find(Gva(at.0 + 0x3000)).is_err());
    check_at(&guest, &pool, &root, TEXT);
}

#[test]
fn edits_that_are_not_whole_pages_are_refused() {
    let mut edits = Edits::default();
    let odd = range(Gva(0x1234), 0x1000);
    assert_eq!(
        edits.restrict(odd, Restriction::READ_ONLY),
        Err(Unaligned { range: odd })
    );
    let page = range(Gva(0x1000), 0x1000);
    assert!(edits.map(page, GuestAddress(0x10), Rights::ALL).is_err());
}

#[test]
fn a_guest_without_no_execute_is_refused_where_it_matters() {
    let mut guest = kernel_like_guest();
    guest.space.no_execute = false;
    let mut pool = Pool::of(8);
    let mut edits = Edits::default();
    edits
        .restrict(range(TEXT, 0x1000), Restriction::NO_EXECUTE)
        .unwrap();
    let result = DerivedRoot::build(&guest.virt(), edits, &mut pool);
    assert_eq!(result.err(), Some(RootError::NoExecuteIsOff));
    assert!(pool.pages.is_empty());
}

#[test]
fn too_small_a_pool_is_an_error_that_can_be_recovered_from() {
    let guest = kernel_like_guest();
    let mut pool = Pool::of(4);
    let mut edits = Edits::default();
    edits
        .restrict(range(DIRECT, 1 << 30), Restriction::NO_WRITE)
        .unwrap();
    let mut root = DerivedRoot::build(&guest.virt(), edits, &mut pool).unwrap();
    let address = root.root();
    let open = |i: u64| range(Gva(DIRECT.0 + (i << 21)), 0x1000);
    root.edit(&guest.virt(), &mut pool, open(1), Change::Clear)
        .unwrap();
    let failed = root.edit(&guest.virt(), &mut pool, open(2), Change::Clear);
    assert_eq!(failed, Err(RootError::PoolExhausted));
    assert!(!root.is_current(&guest.virt()));
    // The first is closed again: its table is taken for the second.
    let close = Change::Restrict(Restriction::NO_WRITE);
    root.edit(&guest.virt(), &mut pool, open(1), close).unwrap();
    assert!(root.is_current(&guest.virt()));
    assert_eq!(root.root(), address);
    for i in [1, 2] {
        check_at(&guest, &pool, &root, open(i).first());
    }
    root.release(&mut pool);
    assert!(pool.pages.is_empty());
}

#[test]
fn another_process_changes_only_the_entries_that_differ() {
    let mut guest = kernel_like_guest();
    let mut pool = Pool::of(16);
    let mut edits = Edits::default();
    edits
        .restrict(range(TEXT, 0x40_1000), Restriction::NO_EXECUTE)
        .unwrap();
    let mut root = DerivedRoot::build(&guest.virt(), edits, &mut pool).unwrap();
    assert_eq!(root.sync(&guest.virt(), &mut pool), Ok(0));
    let other = guest.new_table();
    for index in 256..ENTRIES {
        let entry = guest
            .memory
            .read_u64(entry_address(guest.space.root, index))
            .unwrap();
        guest.memory.write_u64(entry_address(other, index), entry);
    }
    guest.space.root = other;
    guest.map(
        Gva(0x40_0000),
        GuestAddress(0x60_0000),
        PageSize::Size4K,
        Entry::USER,
    );
    assert!(!root.is_current(&guest.virt()));
    assert_eq!(root.sync(&guest.virt(), &mut pool), Ok(1));
    assert!(root.is_current(&guest.virt()));
    for at in [Gva(0x40_0000), TEXT, Gva(TEXT.0 + 0x40_1000)] {
        check_at(&guest, &pool, &root, at);
    }
}

#[test]
fn accessed_and_dirty_bits_are_no_change() {
    let mut guest = kernel_like_guest();
    let mut pool = Pool::of(16);
    let mut edits = Edits::default();
    edits
        .restrict(range(TEXT, 0x1000), Restriction::NO_EXECUTE)
        .unwrap();
    let mut root = DerivedRoot::build(&guest.virt(), edits, &mut pool).unwrap();
    let pmd = guest.entry_at(TEXT, 2);
    let value = guest.memory.read_u64(pmd).unwrap();
    guest
        .memory
        .write_u64(pmd, value | Entry::ACCESSED | Entry::DIRTY);
    assert!(root.is_current(&guest.virt()));
    assert_eq!(root.sync(&guest.virt(), &mut pool), Ok(0));
    guest.memory.write_u64(pmd, value | Entry::WRITE);
    assert_ne!(root.sync(&guest.virt(), &mut pool), Ok(0));
    check_at(&guest, &pool, &root, TEXT);
}

#[derive(Debug, Clone)]
enum Act {
    /// Write one entry of one of the guest's tables.
    Guest {
        table: u64,
        slot: usize,
        next: u64,
        flags: u16,
    },
    /// Change an edit around one of a few places.
    Edit {
        place: u64,
        pages: u64,
        what: Restriction,
    },
    Sync,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let what = prop_oneof![
        Just(Restriction::default()),
        Just(Restriction::NO_WRITE),
        Just(Restriction::NO_EXECUTE),
        Just(Restriction::READ_ONLY),
        Just(Restriction::HIDDEN),
    ];
    let length = prop_oneof![1u64..4, 500u64..2000, Just(1u64 << 18), Just(1u64 << 27)];
    let act = prop_oneof![
        3 => (0u64..8, 0usize..4, 0u64..10, any::<u16>())
            .prop_map(|(table, slot, next, flags)| Act::Guest { table, slot, next, flags }),
        3 => (any::<u64>(), length, what)
            .prop_map(|(place, pages, what)| Act::Edit { place, pages, what }),
        1 => Just(Act::Sync),
    ];
    prop::collection::vec(act, 1..60)
}

/// An address on one of the few paths that the random tables have.
fn place(levels: Levels, seed: u64) -> Gva {
    let mut at = seed & 0x3000;
    for level in 0..u32::from(levels.top()) {
        let index = ((seed >> (8 + 2 * level)) & 3) * 128;
        at |= index << (12 + 9 * level);
    }
    levels.sign_extend(Gva(at))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The derived root, kept up to date step by step, is what the guest's tables and the edits
    /// say, at every place; and so is one built afresh.
    #[test]
    fn derived_root_is_the_guests_less_the_edits(
        acts in acts(), probes in prop::collection::vec(any::<u64>(), 24), five in any::<bool>(),
        limit in prop_oneof![Just(1000usize), 3usize..40],
    ) {
        let levels = if five { Levels::Five } else { Levels::Four };
        let mut guest = TestGuest::new(levels);
        for _ in 0..7 {
            guest.new_table();
        }
        let mut pool = Pool::of(limit);
        let mut root = DerivedRoot::build(&guest.virt(), Edits::default(), &mut pool).unwrap();
        for act in acts.iter().chain([&Act::Sync]) {
            match *act {
                Act::Guest { table, slot, next, flags } => {
                    let flags = u64::from(flags);
                    let at = entry_address(GuestAddress(TestGuest::TABLES + table * TABLE_BYTES), slot * 128);
                    let present = u64::from(flags & 0x7000 != 0);
                    let target = random_target(next, flags);
                    let entry = target | (flags & 0x1fe) | present | ((flags & 0x8000) << 48);
                    guest.memory.write_u64(at, entry);
                    continue;
                }
                Act::Edit { place: seed, pages, what } => {
                    let first = Gva(place(levels, seed).0 & !(pages.next_power_of_two().min(1 << 18) / 2 * 0x1000));
                    let Some(range) = GvaRange::new(first.page(), pages << 12) else { continue };
                    // Edits look at tables as copied: bring those up to date first.
                    let done = root.sync(&guest.virt(), &mut pool)
                        .and_then(|_| root.edit(&guest.virt(), &mut pool, range, Change::Restrict(what)));
                    if done.is_err() {
                        prop_assert_eq!(done, Err(RootError::PoolExhausted));
                        continue;
                    }
                }
                Act::Sync => {
                    if let Err(error) = root.sync(&guest.virt(), &mut pool) {
                        prop_assert_eq!(error, RootError::PoolExhausted);
                        continue;
                    }
                }
            }
            prop_assert!(root.is_current(&guest.virt()));
            for probe in &probes {
                check_at(&guest, &pool, &root, Gva(place(levels, *probe).0 | (probe >> 52)));
            }
        }
        let mut fresh_pool = Pool::of(limit);
        if let Ok(fresh) = DerivedRoot::build(&guest.virt(), root.edits().clone(), &mut fresh_pool) {
            prop_assert!(root.is_current(&guest.virt()));
            for probe in &probes {
                check_at(&guest, &fresh_pool, &fresh, place(levels, *probe));
            }
            fresh.release(&mut fresh_pool);
        }
        prop_assert!(fresh_pool.pages.is_empty());
        root.release(&mut pool);
        prop_assert!(pool.pages.is_empty());
    }
}
