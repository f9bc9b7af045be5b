//! Kernel functions that did something for a call, in the order of their calls, found again by what
//! takes them back.
//!
//! A call that sets up a ring of 4,096 descriptors calls thousands of them, and takes as many back:
//! each is looked up in a table, not searched for.

use std::collections::HashMap;

use super::effects::{KernelCall, Pair};

/// A kernel function that did something.
#[derive(Debug, Clone, Copy)]
pub(super) struct Done {
    /// The call.
    pub call: KernelCall,
    /// What takes it back, and how many arguments that has (at most six).
    pub undo: Option<(KernelCall, usize)>,
    /// What it begins, or ends, that is over before the call is.
    pub pair: Option<Pair>,
}

/// What takes functions back: the function, the number of its arguments, and these, padded with
/// zeros.
type Opposite = (u64, usize, [u64; 6]);

fn opposite(call: &KernelCall, arguments: usize) -> Opposite {
    let mut padded = [0; 6];
    let arguments = arguments.min(padded.len());
    padded[..arguments].copy_from_slice(&call.arguments[..arguments]);
    (call.function, arguments, padded)
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    done: Done,
    /// It has not been taken back.
    lasts: bool,
    /// The one before it that the same call takes back, as an index.
    earlier: Option<usize>,
}

/// What lasts of the kernel functions that a call has called.
#[derive(Debug, Clone, Default)]
pub(super) struct Lasting {
    entries: Vec<Entry>,
    /// Entries that last.
    count: usize,
    /// The latest entry that a call takes back.
    latest: HashMap<Opposite, usize>,
    /// With how many arguments a function takes others back, as bits.
    arguments: HashMap<u64, u8>,
    /// Entries that were looked at, for tests of how many they are.
    #[cfg(test)]
    pub steps: u64,
}

/// Entries that were taken back and may be kept, however few last.
const SLACK: usize = 64;

impl Lasting {
    /// How many last.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Those that last, oldest first.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Done> {
        let entries = self.entries.iter().filter(|entry| entry.lasts);
        entries.map(|entry| &entry.done)
    }

    /// `done` happened, which may be what takes an earlier one back: the latest such, and then
    /// neither lasts. What only goes on with something that lasts, or ends something that does not,
    /// is nothing.
    pub fn happened(&mut self, done: Done) {
        let goes_on = done.pair == Some(Pair::GoesOn)
            && done.undo.is_some_and(|(undo, arguments)| {
                self.latest.contains_key(&opposite(&undo, arguments))
            });
        if goes_on || self.take_back(&done.call) || done.pair == Some(Pair::Ends) {
            return;
        }
        self.push(done);
    }

    fn push(&mut self, done: Done) {
        self.step();
        let index = self.entries.len();
        let earlier = done.undo.and_then(|(undo, arguments)| {
            let bits = self.arguments.entry(undo.function).or_default();
            *bits |= 1 << arguments.min(6);
            self.latest.insert(opposite(&undo, arguments), index)
        });
        self.entries.push(Entry {
            done,
            lasts: true,
            earlier,
        });
        self.count += 1;
    }

    /// Whether `call` takes one of them back, which does not last any more then.
    fn take_back(&mut self, call: &KernelCall) -> bool {
        self.step();
        let bits = self.arguments.get(&call.function).copied().unwrap_or(0);
        let possible = (0..=6).filter(|arguments| bits & 1 << arguments != 0);
        let known = possible.filter_map(|arguments| {
            let key = opposite(call, arguments);
            Some((*self.latest.get(&key)?, key))
        });
        let Some((index, key)) = known.max_by_key(|(index, _)| *index) else {
            return false;
        };
        let Some(entry) = self.entries.get_mut(index) else {
            return false;
        };
        entry.lasts = false;
        self.count -= 1;
        match entry.earlier {
            Some(earlier) => self.latest.insert(key, earlier),
            None => self.latest.remove(&key),
        };
        if self.entries.len() > 2 * self.count + SLACK {
            self.forget_taken_back();
        }
        true
    }

    /// Makes room: each entry is moved once for each that was taken back, at most.
    fn forget_taken_back(&mut self) {
        let entries = std::mem::take(&mut self.entries);
        self.latest.clear();
        self.count = 0;
        for entry in entries.into_iter().filter(|entry| entry.lasts) {
            self.push(entry.done);
        }
    }

    fn step(&mut self) {
        #[cfg(test)]
        {
            self.steps += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALLOC: u64 = 0x1000;
    const FREE: u64 = 0x2000;

    fn call(function: u64, arguments: [u64; 2]) -> KernelCall {
        let [first, second] = arguments;
        KernelCall {
            function,
            arguments: [first, second, 0x77, 0, 0, 0],
        }
    }

    /// An allocation of `object`, taken back by a call with `arguments` arguments.
    fn alloc(object: u64, arguments: usize) -> Done {
        Done {
            call: call(ALLOC, [object, 0]),
            undo: Some((call(FREE, [object, 5]), arguments)),
            pair: None,
        }
    }

    fn free(object: u64, second: u64) -> Done {
        Done {
            call: call(FREE, [object, second]),
            undo: None,
            pair: None,
        }
    }

    fn objects(lasting: &Lasting) -> Vec<(u64, u64)> {
        let all = lasting.iter();
        all.map(|done| (done.call.function, done.call.arguments[0]))
            .collect()
    }

    #[test]
    fn the_latest_of_several_that_are_alike_is_taken_back() {
        let mut lasting = Lasting::default();
        for done in [alloc(1, 1), alloc(2, 1), alloc(1, 1), free(1, 9)] {
            lasting.happened(done);
        }
        assert_eq!(objects(&lasting), [(ALLOC, 1), (ALLOC, 2)]);
        lasting.happened(free(1, 9));
        assert_eq!(objects(&lasting), [(ALLOC, 2)]);
        // Nothing is left that it would take back: it is something that happened itself.
        lasting.happened(free(1, 9));
        assert_eq!(objects(&lasting), [(ALLOC, 2), (FREE, 1)]);
        assert_eq!(lasting.len(), 2);
    }

    #[test]
    fn what_goes_on_is_begun_once_and_what_ends_nothing_is_nothing() {
        let waits = Done {
            pair: Some(Pair::GoesOn),
            ..alloc(1, 1)
        };
        let ends = Done {
            pair: Some(Pair::Ends),
            ..free(1, 0)
        };
        let mut lasting = Lasting::default();
        for done in [ends, waits, waits] {
            lasting.happened(done);
        }
        assert_eq!(objects(&lasting), [(ALLOC, 1)]);
        for done in [ends, ends] {
            lasting.happened(done);
        }
        assert_eq!(objects(&lasting), []);
        // Begun anew, it lasts again.
        lasting.happened(waits);
        assert_eq!(objects(&lasting), [(ALLOC, 1)]);
    }

    #[test]
    fn only_the_arguments_that_an_opposite_has_count() {
        let mut lasting = Lasting::default();
        lasting.happened(alloc(1, 2));
        lasting.happened(free(1, 9));
        assert_eq!(lasting.len(), 2, "the second argument is another one");
        lasting.happened(free(1, 5));
        assert_eq!(objects(&lasting), [(FREE, 1)]);
        // One function takes back others with different numbers of arguments: the latest that fits.
        let mut lasting = Lasting::default();
        for done in [alloc(1, 1), alloc(1, 2), free(1, 5), free(1, 9)] {
            lasting.happened(done);
        }
        assert_eq!(lasting.len(), 0);
    }

    #[test]
    fn work_grows_with_the_calls_and_not_with_their_square() {
        let all = 1 << 15;
        for newest_first in [false, true] {
            let mut lasting = Lasting::default();
            (0..all).for_each(|object| lasting.happened(alloc(object, 1)));
            for index in 0..all {
                let object = if newest_first { all - 1 - index } else { index };
                lasting.happened(free(object, 0));
            }
            assert_eq!(lasting.len(), 0);
            assert!(lasting.entries.len() <= SLACK);
            // A search would look at 5 * 10^8.
            assert!(lasting.steps <= 6 * all, "{}", lasting.steps);
        }
    }
}
