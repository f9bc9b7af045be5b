//! Any sequence of accesses, descriptors, frames, timers and checkpoints on the 82540EM; half-way a
//! twin is restored from a checkpoint, which has to behave the same from there on.
//! The same interpreter runs with random sequences in `cargo test -p devices`.

use arbitrary::{Arbitrary, Unstructured};
use devices::e1000::ops::{Exercise, Op};

/// One input.
pub fn run(input: &[u8]) {
    let Ok(ops) = Vec::<Op>::arbitrary_take_rest(Unstructured::new(input)) else {
        return;
    };
    let Ok(mut exercise) = Exercise::new() else {
        return;
    };
    // Without this, nearly all sequences would find a controller that is switched off.
    exercise.apply(&Op::Open {
        tx_count: 1,
        rx_count: 1,
        receive: 0,
        vlan_mode: true,
    });
    let (before, after) = ops.split_at(ops.len() / 2);
    for op in before {
        exercise.apply(op);
    }
    exercise.take_observations();
    let Ok(mut twin) = exercise.twin() else {
        panic!("a saved state is refused")
    };
    for op in after {
        exercise.apply(op);
        twin.apply(op);
    }
    assert!(
        exercise.take_observations() == twin.take_observations(),
        "the twin differs"
    );
    assert_eq!(exercise.state(), twin.state(), "the twin differs");
}
