//! Objects on a failed call's own stack that kernel functions have put somewhere: they are taken out
//! before the frames are gone, whatever else of the call stays (`add_wait_queue` in
//! `__snd_pcm_lib_xfer`, of which a guest was lost).

use isolation::compensation::effects::ArgumentModel;
use isolation::domain::effects::Pair;

use super::*;

/// What the queue begins with.
const OTHER: u64 = 0x1234_5678;

/// A guest whose first module is isolated, and fails behind its wait.
fn joining(pair: Option<Pair>) -> Guest {
    let guest = Guest::start();
    let joins = FunctionModel {
        name: "kernel_joins".to_owned(),
        undo: Some(OppositeModel {
            function: "kernel_leaves".to_owned(),
            arguments: vec![ArgumentModel::Own(0), ArgumentModel::Own(1)],
        }),
        pair,
        ..FunctionModel::default()
    };
    let leaves = FunctionModel {
        name: "kernel_leaves".to_owned(),
        pair: Some(Pair::Ends),
        ..FunctionModel::default()
    };
    guest
        .isolator
        .isolate(IsolateRequest {
            types: Some(no_types()),
            model: Some(KernelModel {
                lasting: vec![joins, leaves],
                harmless: vec!["kernel_waits".to_owned()],
                ..KernelModel::default()
            }),
            guest_only: vec!["kernel_schedule".to_owned()],
            ..Guest::request("first")
        })
        .unwrap();
    guest.write(QUEUE, OTHER);
    guest.write(FAILS, 1);
    guest
}

#[test]
fn what_a_failed_call_has_put_into_a_queue_from_its_stack_is_taken_out_before_that_is_gone() {
    for pair in [None, Some(Pair::Begins), Some(Pair::GoesOn)] {
        let guest = joining(pair);
        for _ in 0..3 {
            assert_eq!(guest.call(JOINS), ERROR);
            assert_eq!(guest.read(QUEUE), OTHER, "{pair:?}");
        }
        let entry = guest.entry("first_joins");
        assert_eq!((entry.undone, entry.left_over), (3, 0), "{entry:?}");
        guest.write(FAILS, 0);
        assert_eq!((guest.call(JOINS), guest.read(QUEUE)), (7, OTHER));
    }
}

#[test]
fn it_is_taken_out_also_where_something_else_of_the_call_stays() {
    for pair in [None, Some(Pair::Begins)] {
        let guest = joining(pair);
        guest.write(LASTS, 1);
        assert_eq!(guest.call(JOINS), ERROR);
        assert_eq!(guest.read(QUEUE), OTHER, "{pair:?}");
        let entry = guest.entry("first_joins");
        assert_eq!((entry.undone, entry.left_over), (0, 1), "{entry:?}");
        let report = guest.isolator.reports("first").unwrap().pop().unwrap();
        assert!(report.stays.unwrap().contains("kernel_lasts"));
    }
}
