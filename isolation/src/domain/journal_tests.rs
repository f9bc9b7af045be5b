//! What is journalled, in which order it is taken back, and when it cannot be.

use super::*;
use crate::domain::effects::{Effect, Opposite, Place, Success};

const ALLOC: u64 = 0x1000;
const FREE: u64 = 0x1010;
const LOCK: u64 = 0x1020;
const UNLOCK: u64 = 0x1030;
const FOREVER: u64 = 0x1040;
const SWITCH_OFF: u64 = 0x1050;
const SWITCH_ON: u64 = 0x1060;
const HARMLESS: u64 = 0x1070;

/// Memory in which every number is the same.
struct All(u64);

impl ReadNumber for All {
    fn number(&self, _: u64, _: u8) -> Option<u64> {
        Some(self.0)
    }
}

fn effects() -> KernelEffects {
    let undone_by = |function, arguments: &[OppositeArgument]| Effect {
        undo: Some(Opposite {
            function,
            arguments: arguments.to_vec(),
        }),
        deferred: false,
        success: Success::Always,
        changes: None,
        pair: None,
    };
    let own = OppositeArgument::Own(0);
    let state = Place {
        argument: 0,
        offset: 8,
        bytes: 8,
    };
    let lasting = [
        (
            ALLOC,
            Effect {
                success: Success::Pointer,
                ..undone_by(FREE, &[OppositeArgument::Result])
            },
        ),
        (
            FREE,
            Effect {
                undo: None,
                deferred: true,
                success: Success::Always,
                changes: None,
                pair: None,
            },
        ),
        (LOCK, undone_by(UNLOCK, &[own])),
        (UNLOCK, undone_by(LOCK, &[own])),
        (
            FOREVER,
            Effect {
                undo: None,
                deferred: false,
                success: Success::True,
                changes: None,
                pair: None,
            },
        ),
        (
            SWITCH_OFF,
            Effect {
                changes: Some(state),
                pair: None,
                ..undone_by(
                    SWITCH_ON,
                    &[
                        own,
                        OppositeArgument::At(state),
                        OppositeArgument::Constant(5),
                    ],
                )
            },
        ),
    ];
    KernelEffects {
        lasting: lasting.into(),
        harmless: [HARMLESS].into(),
        ..KernelEffects::default()
    }
}

fn call(function: u64, first: u64) -> KernelCall {
    KernelCall {
        function,
        arguments: [first, 0, 0, 0, 0, 0],
    }
}

/// A call of `function` from beginning to end.
fn crossed(journal: &mut Journal, function: u64, first: u64, result: u64) -> Crossing {
    let crossing = journal.enter(call(function, first), 0x100, &effects(), &All(1));
    if crossing == Crossing::Call {
        journal.leave(0x100, result, &effects(), &All(2));
    }
    crossing
}

#[test]
fn opposites_are_called_in_reverse_order() {
    let mut journal = Journal::default();
    crossed(&mut journal, ALLOC, 64, 0x8000_0000);
    crossed(&mut journal, SWITCH_OFF, 7, 0);
    journal.settle(None, false);
    crossed(&mut journal, ALLOC, 64, 0x9000_0000);
    journal.settle(None, false);
    let switch_on = KernelCall {
        function: SWITCH_ON,
        arguments: [7, 2, 5, 0, 0, 0],
    };
    assert_eq!(
        journal.compensation(),
        [call(FREE, 0x9000_0000), switch_on, call(FREE, 0x8000_0000)]
    );
    assert_eq!(journal.why_it_stays(), None);
}

#[test]
fn a_part_that_was_dropped_leaves_nothing() {
    let mut journal = Journal::default();
    crossed(&mut journal, ALLOC, 64, 0x8000_0000);
    journal.settle(None, false);
    crossed(&mut journal, ALLOC, 64, 0x9000_0000);
    crossed(&mut journal, FOREVER, 1, 1);
    assert_eq!(crossed(&mut journal, FREE, 0x7000, 0), Crossing::Later);
    journal.discard();
    assert_eq!(journal.compensation(), [call(FREE, 0x8000_0000)]);
    assert_eq!(journal.why_it_stays(), None);
    assert!(!journal.has_deferred());
}

#[test]
fn what_was_taken_back_already_is_not_again() {
    let mut journal = Journal::default();
    crossed(&mut journal, LOCK, 1, 0);
    crossed(&mut journal, LOCK, 2, 0);
    journal.settle(None, false);
    // Still held if this part is dropped.
    crossed(&mut journal, UNLOCK, 1, 0);
    assert_eq!(journal.compensation().len(), 2);
    journal.settle(None, false);
    assert_eq!(journal.compensation(), [call(UNLOCK, 2)]);
}

/// `prepare_to_wait_event`, which a signal ends.
#[test]
fn a_wait_that_was_given_up_is_over() {
    let mut effects = effects();
    let waits = Effect {
        success: Success::NotNegativeLong,
        pair: Some(Pair::GoesOn),
        ..effects.lasting[&LOCK].clone()
    };
    effects.lasting.insert(HARMLESS, waits);
    let mut journal = Journal::default();
    let mut wait = |result: i64| {
        journal.enter(call(HARMLESS, 1), 0x100, &effects, &All(1));
        journal.leave(0x100, result.cast_unsigned(), &effects, &All(1));
        journal.settle(None, false);
        journal.compensation()
    };
    assert_eq!(wait(-512), []);
    assert_eq!(wait(0), [call(UNLOCK, 1)]);
    assert_eq!(wait(0), [call(UNLOCK, 1)]);
    assert_eq!(wait(-512), []);
    assert_eq!(journal.why_it_stays(), None);
}

#[test]
fn what_is_given_back_waits_for_the_end() {
    let mut journal = Journal::default();
    crossed(&mut journal, ALLOC, 64, 0x8000_0000);
    assert_eq!(crossed(&mut journal, FREE, 0x8000_0000, 0), Crossing::Later);
    journal.settle(None, false);
    assert_eq!(journal.compensation(), [call(FREE, 0x8000_0000)]);
    assert_eq!(journal.take_deferred(), [call(FREE, 0x8000_0000)]);
    assert!(!journal.has_deferred());
}

#[test]
fn functions_that_did_nothing_are_not_taken_back() {
    let mut journal = Journal::default();
    crossed(&mut journal, ALLOC, 64, 0);
    crossed(&mut journal, FOREVER, 1, 0);
    // The number that it would have changed is the same.
    journal.enter(call(SWITCH_OFF, 7), 0x100, &effects(), &All(1));
    journal.leave(0x100, 0, &effects(), &All(1));
    journal.settle(None, false);
    assert_eq!(journal.compensation(), []);
    assert_eq!(journal.why_it_stays(), None);
}

#[test]
fn what_cannot_be_taken_back_is_named() {
    let stays = |crossings: &dyn Fn(&mut Journal)| {
        let mut journal = Journal::default();
        crossings(&mut journal);
        journal.settle(None, false);
        journal.why_it_stays()
    };
    let forever = stays(&|journal| {
        crossed(journal, FOREVER, 1, 1);
    });
    assert_eq!(forever, Some(Stays::Irrevocable { function: FOREVER }));
    let unknown = stays(&|journal| {
        crossed(journal, 0x5000, 1, 1);
    });
    assert_eq!(unknown, Some(Stays::Unknown { function: 0x5000 }));
    let device = stays(&|journal| journal.reach_device(None));
    assert!(matches!(device, Some(Stays::Device { .. })));
    let many = stays(&|journal| {
        for _ in 0..=MAX_CALLS {
            crossed(journal, LOCK, 1, 0);
        }
    });
    assert_eq!(many, Some(Stays::TooManyCalls));
    let mut journal = Journal::default();
    journal.settle(None, true);
    assert_eq!(journal.why_it_stays(), Some(Stays::KernelFunctionOpen));
    // It has returned by the next time.
    journal.settle(None, false);
    assert_eq!(journal.why_it_stays(), None);
}

#[test]
fn functions_return_in_any_order_of_stacks() {
    let mut journal = Journal::default();
    let effects = effects();
    journal.enter(call(LOCK, 1), 0x200, &effects, &All(0));
    // Called back, the driver calls another one, which returns first.
    journal.enter(call(ALLOC, 1), 0x100, &effects, &All(0));
    journal.leave(0x100, 0x8000_0000, &effects, &All(0));
    // A return that was never a call.
    journal.leave(0x300, 0, &effects, &All(0));
    journal.leave(0x200, 0, &effects, &All(0));
    journal.settle(None, false);
    assert_eq!(
        journal.compensation(),
        [call(UNLOCK, 1), call(FREE, 0x8000_0000)]
    );
}
