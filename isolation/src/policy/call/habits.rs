//! Where the calls of a function store each time in what passes through them, a packet's headers
//! for example: that page can be opened before the call begins, which saves the exits of its first
//! load and its first store there.

use std::collections::HashMap;

use super::{CallMemory, DriverPolicy};
use crate::guest::addr::{Gva, GvaRange};
use crate::guest::phys::GuestPhys;
use crate::policy::range_table::{Object, ObjectKind, RangeTable};

/// Most places that are remembered of one function.
const MAX_PLACES: usize = 4;

/// Most functions.
const MAX_FUNCTIONS: usize = 512;

/// Calls in a row that change nothing there, after which a place is forgotten.
const MAX_MISSES: u32 = 16;

/// A place in an object that is another one with each call.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    /// How the object is come to.
    label: String,
    /// In bytes from its beginning.
    offset: u64,
    /// Where that is for the call in progress.
    now: Option<Gva>,
    misses: u32,
}

/// The places, by function.
#[derive(Debug, Default)]
pub(super) struct Habits {
    places: HashMap<String, Vec<Place>>,
}

impl Habits {
    /// Whether something is known of `function`.
    pub fn knows(&self, function: &str) -> bool {
        self.places.contains_key(function)
    }

    /// A call of `function` stores at `at`, which is in `object`: one that was not opened for it
    /// before.
    pub fn stored(&mut self, function: &str, object: &Object, at: Gva) {
        if object.kind != ObjectKind::Passing || !object.range.contains(at) {
            return;
        }
        if !self.knows(function) && self.places.len() >= MAX_FUNCTIONS {
            return;
        }
        let places = self.places.entry(function.to_owned()).or_default();
        places.retain(|place| place.label != object.label);
        if places.len() >= MAX_PLACES {
            places.remove(0);
        }
        places.push(Place {
            label: object.label.clone(),
            offset: at.0 - object.range.first().0,
            now: Some(at),
            misses: 0,
        });
    }

    /// A call of `function` begins, and what it passes on is in `table`: where it will store.
    pub fn expected(&mut self, function: &str, table: &RangeTable) -> Vec<Gva> {
        let Some(places) = self.places.get_mut(function) else {
            return Vec::new();
        };
        for place in &mut *places {
            let mut objects = table.iter().map(|(_, object)| object);
            let object = objects
                .find(|object| object.kind == ObjectKind::Passing && object.label == place.label);
            let at = object.and_then(|object| {
                let at = object.range.first().checked_add(place.offset)?;
                object.range.contains(at).then_some(at)
            });
            place.now = at;
        }
        places.iter().filter_map(|place| place.now).collect()
    }

    /// Whether calls of `function` store in something that is come to by the argument of this name.
    pub fn is_about(&self, function: &str, argument: &str) -> bool {
        let mut places = self.places.get(function).into_iter().flatten();
        places.any(|place| root(&place.label) == argument)
    }

    /// A call of `function` has changed `range`.
    pub fn changed(&mut self, function: &str, range: GvaRange) {
        for place in self.places.get_mut(function).into_iter().flatten() {
            if place
                .now
                .is_some_and(|at| at.page() == range.first().page())
            {
                (place.now, place.misses) = (None, 0);
            }
        }
    }

    /// The call of `function` is over.
    pub fn end(&mut self, function: &str) {
        let Some(places) = self.places.get_mut(function) else {
            return;
        };
        places.retain_mut(|place| {
            place.misses += u32::from(place.now.take().is_some());
            place.misses < MAX_MISSES
        });
        if places.is_empty() {
            self.places.remove(function);
        }
    }
}

/// What the way to an object begins with, by its label: `skb` of `struct sk_buff (skb->head)`.
fn root(label: &str) -> &str {
    let path = label.rsplit_once('(').map_or(label, |(_, path)| path);
    let path = path.trim_start_matches('*');
    let end = path.find(['-', '.', '[', ')']);
    end.map_or(path, |end| &path[..end])
}

impl DriverPolicy {
    /// The call, or the call-back in it that came last, is about to begin: where it will store, by
    /// what the earlier ones of its function did. Whether it may is another question.
    pub fn expected<M: GuestPhys>(&mut self, memory: &CallMemory<'_, M>) -> Vec<Gva> {
        let Some(call) = self.calls.last() else {
            return Vec::new();
        };
        if !self.habits.knows(&call.function) {
            return Vec::new();
        }
        let near = self.near(memory, call, |argument| {
            self.habits.is_about(&call.function, argument)
        });
        self.open_all(near);
        match self.calls.last() {
            Some(call) => self.habits.expected(&call.function, &self.table),
            None => Vec::new(),
        }
    }

    /// The call stores at `at`, which it may, in something that is not the driver's beyond the
    /// call.
    pub fn stored(&mut self, at: Gva) {
        if let (Some(call), Some((_, object))) = (self.calls.last(), self.table.lookup(at)) {
            self.habits.stored(&call.function, object, at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::range_table::{Lifetime, Permit};

    fn packet(at: u64) -> Object {
        Object {
            range: GvaRange::new(Gva(at), 0x400).unwrap(),
            kind: ObjectKind::Passing,
            permit: Permit::Write,
            lifetime: Lifetime::Call(1),
            label: "skb->head".into(),
        }
    }

    fn table_with(object: Object) -> RangeTable {
        let mut table = RangeTable::default();
        table.open(object).unwrap();
        table
    }

    #[test]
    fn the_same_place_in_the_next_packet_is_expected() {
        let mut habits = Habits::default();
        assert!(
            habits
                .expected("xmit", &table_with(packet(0x1000)))
                .is_empty()
        );
        habits.stored("xmit", &packet(0x1000), Gva(0x1122));
        habits.end("xmit");
        let next = table_with(packet(0x5c00));
        assert_eq!(habits.expected("xmit", &next), [Gva(0x5d22)]);
        assert!(habits.expected("other", &next).is_empty());
    }

    #[test]
    fn only_the_arguments_that_lead_to_a_place_are_looked_at() {
        let mut habits = Habits::default();
        for label in [
            "struct sk_buff (skb->head)",
            "u8 (*frames->head)",
            "page (of[0].page)",
        ] {
            let passing = Object {
                label: label.into(),
                ..packet(0x1000)
            };
            habits.stored("xmit", &passing, Gva(0x1122));
        }
        for (argument, is) in [
            ("skb", true),
            ("frames", true),
            ("of", true),
            ("netdev", false),
        ] {
            assert_eq!(habits.is_about("xmit", argument), is, "{argument}");
        }
        assert!(!habits.is_about("other", "skb"));
    }

    #[test]
    fn a_shorter_packet_has_no_such_place() {
        let mut habits = Habits::default();
        habits.stored("xmit", &packet(0x1000), Gva(0x13f0));
        habits.end("xmit");
        let mut short = packet(0x2000);
        short.range = GvaRange::new(Gva(0x2000), 0x100).unwrap();
        assert!(habits.expected("xmit", &table_with(short)).is_empty());
    }

    #[test]
    fn a_place_that_nothing_is_stored_to_any_more_is_forgotten() {
        let mut habits = Habits::default();
        habits.stored("xmit", &packet(0x1000), Gva(0x1122));
        habits.end("xmit");
        let table = table_with(packet(0x3000));
        for _ in 0..3 * MAX_MISSES {
            assert_eq!(habits.expected("xmit", &table), [Gva(0x3122)]);
            habits.changed("xmit", GvaRange::new(Gva(0x3124), 2).unwrap());
            habits.end("xmit");
        }
        for _ in 0..MAX_MISSES {
            assert!(habits.knows("xmit"));
            habits.expected("xmit", &table);
            habits.changed("xmit", GvaRange::new(Gva(0x4124), 2).unwrap());
            habits.end("xmit");
        }
        assert!(!habits.knows("xmit"));
    }

    #[test]
    fn what_is_the_drivers_own_is_no_habit() {
        let mut habits = Habits::default();
        let own = Object {
            kind: ObjectKind::Argument,
            ..packet(0x1000)
        };
        habits.stored("xmit", &own, Gva(0x1122));
        assert!(!habits.knows("xmit"));
    }

    #[test]
    fn no_more_is_remembered_than_there_is_room_for() {
        let mut habits = Habits::default();
        for number in 0..2 * MAX_FUNCTIONS {
            habits.stored(&number.to_string(), &packet(0x1000), Gva(0x1122));
        }
        assert_eq!(habits.places.len(), MAX_FUNCTIONS);
        for number in 0..2 * MAX_PLACES {
            let other = Object {
                label: format!("skb{number}->head"),
                ..packet(0x1000)
            };
            habits.stored("1", &other, Gva(0x1122));
        }
        assert_eq!(habits.places["1"].len(), MAX_PLACES);
    }
}
