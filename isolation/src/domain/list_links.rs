//! Lists that a failed call has changed with its own instructions, and how their links are put
//! back.
//!
//! What kernel functions did to lists their opposites put right. `list_add` and `list_del` are
//! inline, though (include/linux/list.h): what they did is still there when all opposites have been
//! called. The neighbours of an object are whoever's, and others may have changed the list since,
//! so links are put back only where the whole list around them is right then.
//!
//! ```text
//!   before   p ◄──► at ◄──► n          at the end, after all opposites
//!   now      p ◄──────────► n          p and n still follow each other: `at` goes in between again
//!                  at: poison
//! ```

use std::collections::BTreeMap;

/// Bytes of the links (`struct list_head`): next, then previous.
pub const LINKS_BYTES: u64 = 16;

/// The two links at one place, which a call has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChangedLinks {
    /// Guest virtual address of the links.
    pub at: u64,
    /// Next and previous before the call.
    pub old: [u64; 2],
    /// As the call left them.
    pub new: [u64; 2],
}

/// One entry for each place: the oldest and the newest of each.
pub fn in_all(changes: &[ChangedLinks]) -> Vec<ChangedLinks> {
    let mut all: BTreeMap<u64, ChangedLinks> = BTreeMap::new();
    for change in changes {
        let known = all.entry(change.at).or_insert(*change);
        known.new = change.new;
    }
    all.into_values().collect()
}

/// The stores, addresses and values, that put back those of `changes` (one for each place) that are
/// still as the call left them; `read` loads a word of the guest's. The error is the address of
/// links that cannot be put back.
pub fn put_back(
    changes: &[ChangedLinks],
    read: impl Fn(u64) -> Option<u64>,
) -> Result<Vec<(u64, u64)>, u64> {
    let mut stores: BTreeMap<u64, u64> = BTreeMap::new();
    let now = |stores: &BTreeMap<u64, u64>, at: u64| {
        let stored = stores.get(&at).copied();
        stored.or_else(|| read(at))
    };
    let prev_of = |links: u64| links.wrapping_add(8);
    let is = |stores: &BTreeMap<u64, u64>, at: u64, links: [u64; 2]| {
        now(stores, at) == Some(links[0]) && now(stores, prev_of(at)) == Some(links[1])
    };
    let left = changes
        .iter()
        .filter(|change| change.old != change.new && is(&stores, change.at, change.new));
    let left: Vec<&ChangedLinks> = left.collect();
    for ChangedLinks { at, old, new } in &left {
        let ([next, prev], [next_now, prev_now]) = (*old, *new);
        // One that is in a list now would have to be taken out of that first.
        let is_alone = [next_now, prev_now] == [*at; 2];
        let follows = now(&stores, prev_of(next_now)) == Some(*at);
        if !is_alone && (follows || now(&stores, prev_now) == Some(*at)) {
            continue;
        }
        let (before, behind) = (now(&stores, prev), now(&stores, prev_of(next)));
        let is_bypassed = before == Some(next) && behind == Some(prev);
        // Neighbours that are data of the driver's have been put back already.
        let is_expected = before == Some(*at) && behind == Some(*at);
        if is_bypassed {
            stores.extend([(prev, *at), (prev_of(next), *at)]);
        }
        if is_bypassed || is_expected {
            stores.extend([(*at, next), (prev_of(*at), prev)]);
        }
    }
    match left
        .iter()
        .find(|change| !is(&stores, change.at, change.old))
    {
        Some(change) => Err(change.at),
        None => Ok(stores.into_iter().collect()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    const POISON: [u64; 2] = [0xdead_0000_0000_0100, 0xdead_0000_0000_0122];

    type Memory = HashMap<u64, u64>;

    fn links(memory: &Memory, at: u64) -> [u64; 2] {
        [memory[&at], memory[&(at + 8)]]
    }

    fn set(memory: &mut Memory, at: u64, links: [u64; 2]) {
        memory.extend([(at, links[0]), (at + 8, links[1])]);
    }

    /// `list_del`, and `list_del_init`.
    fn delete(memory: &mut Memory, at: u64, leaves: [u64; 2]) {
        let [next, prev] = links(memory, at);
        memory.extend([(prev, next), (next + 8, prev)]);
        set(memory, at, leaves);
    }

    /// `list_add`.
    fn add(memory: &mut Memory, at: u64, behind: u64) {
        let next = memory[&behind];
        set(memory, at, [next, behind]);
        memory.extend([(behind, at), (next + 8, at)]);
    }

    /// A list with its head at 0x100, and as many others as there are.
    fn list(others: &[u64]) -> Memory {
        let mut memory = Memory::new();
        set(&mut memory, 0x100, [0x100, 0x100]);
        others.iter().for_each(|at| add(&mut memory, *at, 0x100));
        memory
    }

    /// What a call did that is known of the places `of`.
    fn changes(before: &Memory, after: &Memory, of: &[u64]) -> Vec<ChangedLinks> {
        let of = of.iter().map(|at| ChangedLinks {
            at: *at,
            old: links(before, *at),
            new: links(after, *at),
        });
        of.filter(|change| change.old != change.new).collect()
    }

    fn carry_out(memory: &mut Memory, changes: &[ChangedLinks]) -> Result<(), u64> {
        let stores = put_back(changes, |at| memory.get(&at).copied())?;
        memory.extend(stores);
        Ok(())
    }

    #[test]
    fn an_object_that_took_itself_out_of_a_list_is_in_it_again() {
        for (others, known) in [
            // Alone in it, with the head known and not.
            (vec![0x200], vec![0x200]),
            (vec![0x200], vec![0x100, 0x200]),
            // In the middle, with nothing known but itself.
            (vec![0x300, 0x200, 0x400], vec![0x200]),
            (vec![0x300, 0x200, 0x400], vec![0x100, 0x300, 0x200, 0x400]),
        ] {
            for leaves in [POISON, [0x200, 0x200]] {
                let before = list(&others);
                let mut memory = before.clone();
                delete(&mut memory, 0x200, leaves);
                let changed = changes(&before, &memory, &known);
                assert_eq!(carry_out(&mut memory, &changed), Ok(()));
                assert_eq!(memory, before);
            }
        }
    }

    #[test]
    fn neighbours_that_were_put_back_as_data_are_left_alone() {
        let before = list(&[0x200]);
        let mut memory = before.clone();
        delete(&mut memory, 0x200, POISON);
        let changed = changes(&before, &memory, &[0x200]);
        set(&mut memory, 0x100, links(&before, 0x100));
        assert_eq!(carry_out(&mut memory, &changed), Ok(()));
        assert_eq!(memory, before);
    }

    #[test]
    fn what_an_opposite_has_put_right_is_left_alone() {
        let before = list(&[0x200]);
        let mut memory = before.clone();
        delete(&mut memory, 0x200, POISON);
        let changed = changes(&before, &memory, &[0x100, 0x200]);
        add(&mut memory, 0x200, 0x100);
        let right = memory.clone();
        assert_eq!(carry_out(&mut memory, &changed), Ok(()));
        assert_eq!(memory, right);
    }

    #[test]
    fn a_list_that_others_have_changed_stays_and_is_said_to() {
        let before = list(&[0x300, 0x200]);
        let mut memory = before.clone();
        delete(&mut memory, 0x200, POISON);
        let changed = changes(&before, &memory, &[0x200]);
        add(&mut memory, 0x400, 0x100);
        let left = memory.clone();
        assert_eq!(carry_out(&mut memory, &changed), Err(0x200));
        assert_eq!(memory, left);
    }

    #[test]
    fn an_object_that_was_put_into_a_list_and_is_still_there_is_said_to_stay() {
        let before = list(&[0x200]);
        let mut memory = before.clone();
        // Memory that was allocated meanwhile: nothing is known of it.
        add(&mut memory, 0x400, 0x200);
        let changed = changes(&before, &memory, &[0x200]);
        assert_eq!(carry_out(&mut memory, &changed), Err(0x200));
    }

    #[test]
    fn an_object_whose_neighbour_was_moved_behind_it_is_no_deleted_one() {
        let before = list(&[0x200, 0x300, 0x400]);
        let mut memory = before.clone();
        delete(&mut memory, 0x400, POISON);
        add(&mut memory, 0x400, 0x300);
        let changed = changes(&before, &memory, &[0x300]);
        let left = memory.clone();
        assert_eq!(carry_out(&mut memory, &changed), Err(0x300));
        assert_eq!(memory, left);
    }

    #[test]
    fn changes_of_several_parts_are_one() {
        let part = |old, new| ChangedLinks {
            at: 0x200,
            old: [old; 2],
            new: [new; 2],
        };
        assert_eq!(in_all(&[part(1, 2), part(3, 4)]), [part(1, 4)]);
    }

    #[derive(Debug, Clone)]
    enum Doing {
        Deletes(usize),
        Adds(usize, usize),
    }

    proptest! {
        /// Whatever the call and others did: either the call's part is undone and the list is
        /// whole, or nothing is stored.
        #[test]
        fn lists_are_whole_or_left_alone(
            calls in prop::collection::vec(doing(), 0..4), others in prop::collection::vec(doing(), 0..3), known in 0u8..64,
        ) {
            let places: Vec<u64> = (1..7).map(|n| n * 0x100).collect();
            let before = list(&places[1..4]);
            let mut memory = before.clone();
            places[4..].iter().for_each(|at| set(&mut memory, *at, POISON));
            let before = memory.clone();
            let run = |memory: &mut Memory, doing: &[Doing]| for one in doing {
                let is_in = |memory: &Memory, at: u64| links(memory, at) != POISON;
                match one {
                    Doing::Deletes(at) if is_in(memory, places[*at]) => delete(memory, places[*at], POISON),
                    Doing::Adds(at, behind) if !is_in(memory, places[*at]) && is_in(memory, places[*behind]) => {
                        add(memory, places[*at], places[*behind]);
                    }
                    _ => {}
                }
            };
            run(&mut memory, &calls);
            let known: Vec<u64> = places.iter().enumerate().filter(|(n, _)| known >> n & 1 == 1).map(|(_, at)| *at).collect();
            let changed = changes(&before, &memory, &known);
            run(&mut memory, &others);
            let left = memory.clone();
            match carry_out(&mut memory, &changed) {
                Err(_) => prop_assert!(memory == left),
                Ok(()) => for at in &places {
                    let [next, prev] = links(&memory, *at);
                    if [next, prev] != POISON {
                        prop_assert_eq!(memory[&(next + 8)], *at);
                        prop_assert_eq!(memory[&prev], *at);
                    }
                }
            }
        }
    }

    fn doing() -> impl Strategy<Value = Doing> {
        prop_oneof![
            (1usize..6).prop_map(Doing::Deletes),
            (1usize..6, 0usize..6).prop_map(|(at, behind)| Doing::Adds(at, behind)),
        ]
    }
}
