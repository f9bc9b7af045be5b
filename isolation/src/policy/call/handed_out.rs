//! What was handed out to earlier calls of a driver, as far back as there is room: the oldest is
//! forgotten first.

use std::collections::{HashMap, VecDeque};

use crate::guest::addr::GvaRange;

/// An allocation.
#[derive(Debug, Clone, Copy)]
struct HandedOut {
    /// Its last byte.
    last: u64,
    /// Number of the occasion on which it was handed out.
    at: u64,
}

/// Allocations of earlier calls. The driver may have given one back since; then somebody else's
/// object of the same place and size counts as the driver's.
#[derive(Debug, Clone, Default)]
pub(super) struct EarlierAllocations {
    /// By first byte.
    known: HashMap<u64, HandedOut>,
    /// First bytes and occasions, oldest first. One that was handed out again since is in it twice,
    /// and only the later occasion counts.
    order: VecDeque<(u64, u64)>,
    occasions: u64,
}

impl EarlierAllocations {
    /// Most allocations that are remembered.
    pub const CAPACITY: usize = 1 << 16;

    /// `range` was handed out just now.
    pub fn insert(&mut self, range: GvaRange) {
        let (first, at) = (range.first().0, self.occasions);
        self.occasions += 1;
        let last = range.last().0;
        self.known.insert(first, HandedOut { last, at });
        self.order.push_back((first, at));
        while self.known.len() > Self::CAPACITY {
            let Some((first, at)) = self.order.pop_front() else {
                break;
            };
            if self.is_latest(first, at) {
                self.known.remove(&first);
            }
        }
        if self.order.len() > 2 * Self::CAPACITY {
            let mut order = std::mem::take(&mut self.order);
            order.retain(|(first, at)| self.is_latest(*first, *at));
            self.order = order;
        }
    }

    /// Whether exactly `range` was handed out.
    pub fn contains(&self, range: GvaRange) -> bool {
        let known = self.known.get(&range.first().0);
        known.is_some_and(|known| known.last == range.last().0)
    }

    fn is_latest(&self, first: u64, at: u64) -> bool {
        self.known.get(&first).is_some_and(|known| known.at == at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::addr::Gva;

    const CAPACITY: usize = EarlierAllocations::CAPACITY;
    const BASE: u64 = 0xffff_8880_0000_0000;

    fn object(number: u64) -> GvaRange {
        GvaRange::new(Gva(BASE + number * 64), 64).unwrap()
    }

    #[test]
    fn the_oldest_is_forgotten_whatever_its_address() {
        let mut earlier = EarlierAllocations::default();
        // From the highest address down: the oldest is the last by address.
        let all = CAPACITY as u64;
        for number in (1..=all).rev() {
            earlier.insert(object(number));
        }
        assert!((1..=all).all(|number| earlier.contains(object(number))));
        earlier.insert(object(0));
        assert!(!earlier.contains(object(all)));
        assert!((0..all).all(|number| earlier.contains(object(number))));
    }

    #[test]
    fn what_is_handed_out_again_is_not_old_any_more() {
        let mut earlier = EarlierAllocations::default();
        let all = CAPACITY as u64;
        // The same object over and over does not crowd out others, nor take up room.
        for number in 0..all {
            earlier.insert(object(number));
            earlier.insert(object(0));
            earlier.insert(object(0));
        }
        assert!(earlier.order.len() <= 2 * CAPACITY + 1);
        assert!((0..all).all(|number| earlier.contains(object(number))));
        earlier.insert(object(all));
        assert!(earlier.contains(object(0)) && !earlier.contains(object(1)));
    }

    #[test]
    fn another_size_at_the_same_place_is_another_object() {
        let mut earlier = EarlierAllocations::default();
        earlier.insert(object(1));
        let other = GvaRange::new(object(1).first(), 128).unwrap();
        assert!(!earlier.contains(other));
        earlier.insert(other);
        assert!(earlier.contains(other) && !earlier.contains(object(1)));
    }
}
