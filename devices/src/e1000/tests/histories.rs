//! Random histories: none breaks the controller, and at any point of one a restored twin goes on as the
//! original does.

use arbitrary::{Arbitrary, Unstructured};

use crate::e1000::ops::{Exercise, Op};

/// Random bytes that are the same in every run (xorshift64*).
pub(super) struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn open(&mut self) -> Op {
        Op::Open {
            tx_count: self.next() as u8,
            rx_count: self.next() as u8,
            receive: self.next() as u32,
            vlan_mode: self.next() & 1 != 0,
        }
    }

    pub fn ops(&mut self) -> Vec<Op> {
        let bytes: Vec<u8> = (0..600).flat_map(|_| self.next().to_le_bytes()).collect();
        let mut source = Unstructured::new(&bytes);
        let mut ops = vec![self.open()];
        while let Ok(op) = Op::arbitrary(&mut source) {
            if source.is_empty() {
                break;
            }
            // What switches the controller off happens seldom, or little else would.
            let seldom = match op {
                Op::Reset | Op::Config { .. } | Op::Carrier { up: false } => 20,
                Op::WritePhy { .. } => 8,
                Op::Write { .. } | Op::WriteSmall { .. } => 4,
                _ => 1,
            };
            if self.next().is_multiple_of(seldom) {
                ops.push(op);
            }
            if self.next().is_multiple_of(40) {
                ops.extend([
                    Op::WritePhy {
                        number: 0,
                        value: 0x9340,
                    },
                    self.open(),
                ]);
            }
        }
        ops
    }
}

/// How many histories to try; `E1000_HISTORIES` asks for more.
pub(super) fn histories(default: u64) -> std::ops::Range<u64> {
    let count = std::env::var("E1000_HISTORIES")
        .ok()
        .and_then(|n| n.parse().ok());
    1..count.unwrap_or(default) + 1
}

#[test]
fn random_histories_break_nothing() {
    for seed in histories(100) {
        let mut exercise = Exercise::new().unwrap();
        for op in Random(seed).ops() {
            exercise.apply(&op);
        }
    }
}

#[test]
fn a_restored_twin_behaves_as_the_original() {
    for seed in histories(100) {
        let mut random = Random(seed << 32);
        // A checkpoint on the way would lose in the original too what checkpoints lose.
        let mut ops = random.ops();
        ops.retain(|op| *op != Op::Checkpoint);
        let mut original = Exercise::new().unwrap();
        for op in ops {
            original.apply(&op);
        }
        original.take_observations();
        let mut twin = original.twin().unwrap();
        for op in random.ops().split_off(1) {
            original.apply(&op);
            twin.apply(&op);
            assert_eq!(original.seen, twin.seen, "seed {seed}, {op:?}");
        }
        assert_eq!(original.state(), twin.state(), "seed {seed}");
        original.read_all();
        twin.read_all();
        assert!(
            original.take_observations() == twin.take_observations(),
            "seed {seed}"
        );
    }
}

#[test]
fn a_state_that_was_stored_is_as_it_was_and_a_damaged_one_is_refused() {
    use crate::state::{Part, StateError};
    for seed in histories(20) {
        let mut exercise = Exercise::new().unwrap();
        for op in Random(seed).ops() {
            exercise.apply(&op);
        }
        let nic = exercise.nic();
        let bytes = postcard::to_stdvec(&nic.save().unwrap()).unwrap();
        let before = nic.save().unwrap();
        for bit in (0..bytes.len() * 8).step_by(977) {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            if let Ok(part) = postcard::from_bytes::<Part>(&changed) {
                let refused = nic.restore(&part);
                assert!(matches!(refused, Err(StateError::Damaged(_))), "bit {bit}");
            }
        }
        assert_eq!(nic.save().unwrap(), before);
        let part = postcard::from_bytes::<Part>(&bytes).unwrap();
        nic.restore(&part).unwrap();
    }
}

#[test]
fn a_state_survives_its_stored_form() {
    let mut exercise = Exercise::new().unwrap();
    for op in Random(99).ops() {
        exercise.apply(&op);
    }
    let state = exercise.state();
    let stored = serde_json::to_vec(&state).unwrap();
    assert_eq!(
        serde_json::from_slice::<crate::e1000::E1000State>(&stored).unwrap(),
        state
    );
}
