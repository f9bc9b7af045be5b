//! The log against a model that knows who wrote each byte, and when.

use proptest::prelude::*;

use super::*;

const PAGES: usize = 3;
/// Only the first bytes of each page are used, so that writers meet.
const BYTES: usize = 48;

type Memory = [Page; PAGES];

/// Somebody stores bytes.
#[derive(Debug, Clone)]
struct Store {
    page: usize,
    offset: usize,
    bytes: Vec<u8>,
}

#[derive(Debug, Clone)]
enum Event {
    /// A part of the call stores and is published.
    Part(Vec<Store>),
    /// A part of the call is recorded and then taken back otherwise.
    Dropped(Vec<Store>),
    /// Others store meanwhile.
    Others(Vec<Store>),
}

fn stores() -> impl Strategy<Value = Vec<Store>> {
    let store = (0..PAGES, 0..BYTES - 8, prop::collection::vec(0..4u8, 1..9)).prop_map(
        |(page, offset, bytes)| Store {
            page,
            offset,
            bytes,
        },
    );
    prop::collection::vec(store, 0..6)
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        3 => stores().prop_map(Event::Part),
        1 => stores().prop_map(Event::Dropped),
        2 => stores().prop_map(Event::Others),
    ];
    prop::collection::vec(event, 0..8)
}

fn carry_out(memory: &mut Memory, stores: &[Store]) {
    for store in stores {
        let end = store.offset + store.bytes.len();
        memory[store.page][store.offset..end].copy_from_slice(&store.bytes);
    }
}

fn undo(log: &UndoLog, memory: &mut Memory) -> u64 {
    let done: Result<u64, ()> = log.undo(|pfn, with| {
        with(&mut memory[pfn.0 as usize]);
        Ok(())
    });
    done.unwrap()
}

/// Addresses and lengths.
type Ranges = Vec<(u64, u64)>;

/// What is put back, and what of it is not.
fn ranges() -> impl Strategy<Value = (Ranges, Ranges)> {
    let range = (
        0..(PAGES as u64 - 1) * PAGE_SIZE + BYTES as u64,
        0..2 * PAGE_SIZE,
    );
    let short = (
        (0..PAGES as u64, 0..BYTES as u64).prop_map(|(page, at)| page * PAGE_SIZE + at),
        0..16u64,
    );
    (
        prop::collection::vec(range, 0..4),
        prop::collection::vec(short, 0..4),
    )
}

proptest! {
    #[test]
    fn what_nobody_else_wrote_is_as_before(events in events(), (included, excluded) in ranges(), fill: u8) {
        let mut restorable = Restorable::default();
        let mut may = [[false; PAGE_SIZE as usize]; PAGES];
        for (list, put) in [(&included, true), (&excluded, false)] {
            for (gpa, bytes) in list {
                if put { restorable.include(*gpa, *bytes) } else { restorable.exclude(*gpa, *bytes) }
                for at in *gpa..gpa + bytes {
                    if let Some(page) = may.get_mut((at / PAGE_SIZE) as usize) {
                        page[(at % PAGE_SIZE) as usize] = put;
                    }
                }
            }
        }
        let mut log = UndoLog::new(restorable);
        let mut memory: Memory = [[fill; PAGE_SIZE as usize]; PAGES];
        // For each byte: what the call changed in each part, in order, and what is there.
        let mut history: Vec<(Memory, Memory)> = Vec::new();
        for event in &events {
            let before = memory;
            match event {
                Event::Others(stores) => carry_out(&mut memory, stores),
                Event::Part(stores) | Event::Dropped(stores) => {
                    let mut after = memory;
                    carry_out(&mut after, stores);
                    for page in 0..PAGES {
                        log.record(Pfn(page as u64), &before[page], &after[page]);
                    }
                    if matches!(event, Event::Part(_)) {
                        log.settle();
                        memory = after;
                        history.push((before, after));
                    } else {
                        log.discard();
                    }
                }
            }
        }
        // The model: part by part from the last, each word whose changed bytes are all as that part
        // left them gets those bytes back.
        let mut expected = memory;
        let mut restored = 0;
        for (before, after) in history.iter().rev() {
            for page in 0..PAGES {
                for word in (0..BYTES).step_by(8) {
                    let ours: Vec<usize> = (word..word + 8)
                        .filter(|at| may[page][*at] && before[page][*at] != after[page][*at])
                        .collect();
                    if ours.iter().all(|at| expected[page][*at] == after[page][*at]) {
                        for at in ours {
                            expected[page][at] = before[page][at];
                            restored += 1;
                        }
                    }
                }
            }
        }
        prop_assert_eq!(undo(&log, &mut memory), restored);
        prop_assert!(memory == expected);
        prop_assert!(!log.is_incomplete());
    }

    #[test]
    fn alone_in_memory_a_call_is_undone_to_the_last_byte(parts in prop::collection::vec(stores(), 0..8), fill: u8) {
        let mut restorable = Restorable::default();
        restorable.include(0, PAGES as u64 * PAGE_SIZE);
        let mut log = UndoLog::new(restorable);
        let first: Memory = [[fill; PAGE_SIZE as usize]; PAGES];
        let mut memory = first;
        for part in &parts {
            let before = memory;
            carry_out(&mut memory, part);
            for page in 0..PAGES {
                log.record(Pfn(page as u64), &before[page], &memory[page]);
            }
        }
        undo(&log, &mut memory);
        prop_assert!(memory == first);
    }
}

#[test]
fn a_number_that_others_counted_on_is_not_torn() {
    let mut restorable = Restorable::default();
    restorable.include(0, 8);
    let mut log = UndoLog::new(restorable);
    let page = |number: u64| {
        let mut page = [0; PAGE_SIZE as usize];
        page[..8].copy_from_slice(&number.to_le_bytes());
        page
    };
    // The call counts 0xff up to 0x100, somebody else goes on to 0x101.
    log.record(Pfn(0), &page(0xff), &page(0x100));
    let mut memory = [page(0x101), page(0), page(0)];
    assert_eq!(undo(&log, &mut memory), 0);
    assert!(memory[0] == page(0x101));
}

#[test]
fn a_call_that_changes_more_than_fits_says_so() {
    let mut restorable = Restorable::default();
    let pages = MAX_WORDS as u64 / 512 + 1;
    restorable.include(0, pages * PAGE_SIZE);
    let mut log = UndoLog::new(restorable);
    for page in 0..pages {
        log.record(
            Pfn(page),
            &[0; PAGE_SIZE as usize],
            &[1; PAGE_SIZE as usize],
        );
    }
    assert!(log.is_incomplete());
}

#[test]
fn memory_of_which_too_much_could_be_put_back_is_noticed() {
    let mut restorable = Restorable::default();
    restorable.include(0, u64::MAX);
    assert!(restorable.is_too_large());
    assert_eq!(restorable.pages(), MAX_PAGES);
    // A range that wraps around is none.
    let mut restorable = Restorable::default();
    restorable.include(u64::MAX - 10, 100);
    assert_eq!(restorable.pages(), 0);
}

#[test]
fn links_of_lists_are_noted_and_not_put_back() {
    let mut restorable = Restorable::default();
    restorable.include(0, 64);
    restorable.exclude(16, 16);
    restorable.links(16, 0xffff_8880_0000_0010);
    // Across two pages there are none, nor at odd addresses.
    restorable.links(PAGE_SIZE - 8, 0xffff_8880_0000_0ff8);
    restorable.links(33, 0xffff_8880_0000_0021);
    let mut log = UndoLog::new(restorable);
    let page = |next: u64, prev: u64| {
        let mut page = [0; PAGE_SIZE as usize];
        page[16..24].copy_from_slice(&next.to_le_bytes());
        page[24..32].copy_from_slice(&prev.to_le_bytes());
        page
    };
    log.record(Pfn(0), &page(1, 2), &page(1, 3));
    log.settle();
    log.record(Pfn(0), &page(1, 3), &page(4, 4));
    log.discard();
    log.record(Pfn(1), &page(1, 2), &page(3, 4));
    let changed = ChangedLinks {
        at: 0xffff_8880_0000_0010,
        old: [1, 2],
        new: [1, 3],
    };
    assert_eq!(log.links(), [changed]);
    let mut memory = [page(1, 3), page(0, 0), page(0, 0)];
    assert_eq!(undo(&log, &mut memory), 0);
    assert!(memory[0] == page(1, 3));
}
