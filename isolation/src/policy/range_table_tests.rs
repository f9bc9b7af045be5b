//! The range table against a table of bytes.

use proptest::prelude::*;

use super::*;
use crate::policy::diff::PAGE_BYTES;

fn range(first: u64, len: u64) -> GvaRange {
    GvaRange::new(Gva(first), len).unwrap()
}

fn object(first: u64, len: u64, permit: Permit, label: &str) -> Object {
    Object {
        range: range(first, len),
        kind: ObjectKind::Argument,
        permit,
        lifetime: Lifetime::Call(1),
        label: label.into(),
    }
}

const PAGE: u64 = 0xffff_8880_0123_4000;

#[test]
fn lookup_prefers_a_guard_then_the_smallest_object() {
    let mut table = RangeTable::default();
    let outer = table
        .open(object(PAGE, 256, Permit::Write, "outer"))
        .unwrap();
    let inner = table
        .open(object(PAGE + 16, 16, Permit::Write, "inner"))
        .unwrap();
    let guard = table
        .open(object(PAGE + 24, 100, Permit::Guard, "guard"))
        .unwrap();
    let at = |offset| table.lookup(Gva(PAGE + offset)).map(|(id, _)| id);
    assert_eq!(at(0), Some(outer));
    assert_eq!(at(16), Some(inner));
    assert_eq!(at(24), Some(guard));
    assert_eq!(at(130), Some(outer));
    assert_eq!(at(256), None);
    assert!(table.may_write(range(PAGE, 24)));
    assert_eq!(table.first_denied(range(PAGE, 256)), Some(Gva(PAGE + 24)));
    assert_eq!(
        table.first_denied(range(PAGE + 124, 133)),
        Some(Gva(PAGE + 256))
    );
    assert_eq!(table.first_denied(range(PAGE - 1, 2)), Some(Gva(PAGE - 1)));
}

#[test]
fn the_end_of_a_call_closes_its_objects_only() {
    let mut table = RangeTable::default();
    let owned = Object {
        lifetime: Lifetime::Driver,
        ..object(PAGE, 8, Permit::Write, "owned")
    };
    table.open(owned).unwrap();
    table
        .open(object(PAGE + 4, 8, Permit::Write, "argument"))
        .unwrap();
    table.end_call(2);
    assert_eq!(table.len(), 2);
    table.end_call(1);
    assert_eq!(
        table
            .iter()
            .map(|(_, o)| o.label.as_str())
            .collect::<Vec<_>>(),
        ["owned"]
    );
    assert_eq!(table.first_denied(range(PAGE, 9)), Some(Gva(PAGE + 8)));
}

#[test]
fn absurd_overlaps_are_refused_and_change_nothing() {
    let mut table = RangeTable::default();
    for i in 0..MAX_DEPTH as u64 {
        table
            .open(object(PAGE + i, 64, Permit::Write, "nested"))
            .unwrap();
    }
    let before = table.segments.clone();
    let error = table
        .open(object(PAGE, 64, Permit::Write, "one more"))
        .unwrap_err();
    assert_eq!(
        error,
        RangeTableError::TooDeep {
            at: Gva(PAGE + MAX_DEPTH as u64 - 1)
        }
    );
    assert_eq!(table.segments, before);
}

#[test]
fn the_ends_of_the_address_space_are_ordinary_places() {
    let mut table = RangeTable::default();
    let low = table.open(object(0, 16, Permit::Write, "low")).unwrap();
    let high = table
        .open(object(u64::MAX - 7, 8, Permit::Write, "high"))
        .unwrap();
    assert!(table.may_write(range(u64::MAX - 7, 8)));
    assert_eq!(
        table.first_denied(range(u64::MAX - 8, 9)),
        Some(Gva(u64::MAX - 8))
    );
    table.close(high).unwrap();
    table.close(low).unwrap();
    assert!(table.segments.is_empty());
    assert_eq!(table.close(low), None);
}

/// Two pages of bytes are enough to model every rule.
const MODEL: u64 = 2 * PAGE_BYTES as u64;

#[derive(Debug, Clone)]
enum Act {
    Open { first: u64, len: u64, guard: bool },
    Close(usize),
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let len = prop_oneof![1u64..32, 1u64..MODEL];
    let act = prop_oneof![
        3 => (0..MODEL, len, prop::bool::weighted(0.2))
            .prop_map(|(first, len, guard)| Act::Open { first, len: len.min(MODEL - first), guard }),
        1 => any::<usize>().prop_map(Act::Close),
    ];
    prop::collection::vec(act, 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn the_table_agrees_with_a_table_of_bytes(
        acts in acts(),
        probes in prop::collection::vec((0..MODEL, 1u64..200), 16),
    ) {
        let mut table = RangeTable::default();
        let mut model: Vec<(ObjectId, u64, u64, bool)> = Vec::new();
        for act in acts {
            match act {
                Act::Open { first, len, guard } => {
                    let permit = if guard { Permit::Guard } else { Permit::Write };
                    let depth = (first..first + len)
                        .map(|at| model.iter().filter(|m| m.1 <= at && at < m.1 + m.2).count())
                        .max();
                    match table.open(object(PAGE + first, len, permit, "x")) {
                        Ok(id) => model.push((id, first, len, guard)),
                        Err(_) => prop_assert!(depth.unwrap_or(0) >= MAX_DEPTH),
                    }
                }
                Act::Close(pick) if !model.is_empty() => {
                    let (id, first, len, _) = model.swap_remove(pick % model.len());
                    let closed = table.close(id).unwrap();
                    prop_assert_eq!(closed.range, range(PAGE + first, len));
                }
                Act::Close(_) => {}
            }
        }
        // No more segments than the open objects need, however many came and went.
        for ((_, left), (first, right)) in table.segments.iter().zip(table.segments.iter().skip(1)) {
            let touch = left.last + 1 == *first;
            prop_assert!(left.last < *first && !(touch && left.covered_by == right.covered_by));
        }
        let covers = |m: &(ObjectId, u64, u64, bool), at: u64| m.1 <= at && at < m.1 + m.2;
        let writable = |at: u64| {
            model.iter().any(|m| covers(m, at) && !m.3) && !model.iter().any(|m| covers(m, at) && m.3)
        };
        for (first, len) in probes {
            let denied = (first..first + len).find(|at| !writable(*at));
            prop_assert_eq!(
                table.first_denied(range(PAGE + first, len)),
                denied.map(|at| Gva(PAGE + at))
            );
            let best = model
                .iter()
                .filter(|m| covers(m, first))
                .min_by_key(|m| (!m.3, m.2, std::cmp::Reverse(m.0)));
            prop_assert_eq!(table.lookup(Gva(PAGE + first)).map(|(id, _)| id), best.map(|m| m.0));
        }
    }
}
