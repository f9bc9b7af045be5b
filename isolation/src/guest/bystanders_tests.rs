//! What differs in the memory of a make-believe kernel.

use super::*;
use crate::guest::allocations::tests::{
    DATA, DIRECT, PAGE_STRUCT, VARIABLES, VMEMMAP, guest, symbols, types,
};
use crate::guest::paging::testing::TestGuest;
use crate::guest::symbols::read_kallsyms;

/// Memory below the tables is where the mapping of all memory says.
struct Flat(TestGuest);

impl GuestPhys for Flat {
    fn read(&self, at: GuestAddress, data: &mut [u8]) -> Result<(), OutsideMemory> {
        let len = data.len();
        match at.0 < TestGuest::TABLES {
            true => {
                let mapped = self.0.virt().read(Gva(DIRECT + at.0), data);
                mapped.map_err(|_| OutsideMemory { at, len })
            }
            false => self.0.memory.read(at, data),
        }
    }
}

/// The second object of the slab, in the 17th page.
const OBJECT: u64 = (16 << 12) + 200;

fn before() -> TestGuest {
    let mut guest = guest();
    for pfn in [3, 15, 16] {
        guest.put(Gva(DIRECT + (pfn << 12)), &[0; 4096], DATA);
    }
    guest
}

fn image() -> SymbolTable {
    let text = format!(
        "{VARIABLES:x} T _text\n{:x} D counter\n{:x} D __log_buf\n{:x} D _end\n",
        VARIABLES + 0x100,
        VARIABLES + 0x140,
        VARIABLES + 0x1000
    );
    read_kallsyms(text.as_bytes(), |_| true).unwrap()
}

fn differing(
    before: TestGuest,
    now: TestGuest,
    known: &mut dyn FnMut(u64) -> Option<u64>,
) -> Vec<String> {
    let model = MemoryModel::new(&types(), &symbols(), &before.virt()).unwrap();
    let space = before.space;
    let variables = space.walk(&before.memory, Gva(VARIABLES)).unwrap().gpa;
    let pages = [16 << 12, 3 << 12, variables.0, 15 << 12, 50 << 12].map(GuestAddress);
    let (before, now) = (Flat(before), Flat(now));
    let times = TwoTimes {
        model: &model,
        symbols: &image(),
        space,
        now: &now,
        before: &before,
    };
    let found = times.differing(&pages, &|at| at != 0x3800, known);
    found.into_iter().map(|one| one.what).collect()
}

fn changed() -> TestGuest {
    let mut now = before();
    let places = [
        DIRECT + (3 << 12) + 0x800,
        DIRECT + (3 << 12) + 0x818,
        DIRECT + (3 << 12) + 0x900,
        DIRECT + (15 << 12) + 8,
        DIRECT + OBJECT + 16,
        DIRECT + OBJECT + 24,
        VARIABLES + 0x108,
        VARIABLES + 0x208,
    ];
    for at in places {
        now.put(Gva(at), &[7], DATA);
    }
    now
}

#[test]
fn what_was_in_use_all_the_time_is_told_once_and_what_nobody_holds_or_no_call_has_written_is_not() {
    let found = differing(before(), changed(), &mut |_| None);
    assert_eq!(found.len(), 3, "{found:?}");
    assert_eq!(found[0], "page at 0x3000 + 0x818");
    assert_eq!(found[1], format!("slab object at {OBJECT:#x} + 0x10"));
    assert!(
        found[2].starts_with("counter at") && found[2].ends_with("+ 0x8"),
        "{found:?}"
    );
    assert!(differing(before(), before(), &mut |_| None).is_empty());
}

#[test]
fn what_is_known_is_left_out_to_where_it_ends() {
    let mut asked = Vec::new();
    let mut known = |at: u64| {
        asked.push(at);
        (at >> 12 == 3).then_some(0x4000)
    };
    let found = differing(before(), changed(), &mut known);
    assert_eq!(found.len(), 2, "{found:?}");
    assert_eq!(asked.iter().filter(|at| **at >> 12 == 3).count(), 1);
}

#[test]
fn an_object_that_was_free_or_is_free_is_nobodys() {
    let list = VMEMMAP + 16 * PAGE_STRUCT + 32;
    let free = |mut guest: TestGuest| {
        let link = DIRECT + OBJECT;
        guest.put(Gva(list), &link.to_le_bytes(), DATA);
        guest.put(Gva(link), &link.swap_bytes().to_le_bytes(), DATA);
        guest
    };
    for (before, now) in [(free(before()), changed()), (before(), free(changed()))] {
        let found = differing(before, now, &mut |_| None);
        assert!(
            !found.iter().any(|what| what.contains("object")),
            "{found:?}"
        );
    }
}
