//! Random histories: none breaks the controller, and at any point of one a restored twin goes on as
//! the original does.

use arbitrary::{Arbitrary, Unstructured};

use crate::e1000::mmio::store_uses_memory;
use crate::e1000::ops::{Exercise, MEMORY_BYTES, Op};

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

#[test]
fn a_store_that_is_said_not_to_use_memory_does_the_same_whatever_is_there() {
    let mut tried = 0;
    for seed in histories(100) {
        let mut random = Random(seed << 16);
        let mut original = Exercise::new().unwrap();
        for op in random.ops() {
            original.apply(&op);
        }
        let mut twin = original.twin().unwrap();
        let noise: Vec<u8> = (0..MEMORY_BYTES).map(|_| random.next() as u8).collect();
        twin.bench().dma.write(0, &noise).unwrap();
        let (_, memory) = original.take_observations();
        for _ in 0..200 {
            // Most registers are in the first KiB of each of these.
            let block = [0, 0, 0, 0x400, 0x2800, 0x3800, 0x5000, 0x5400];
            let offset = block[random.next() as usize % 8] + (random.next() as u32 & 0x3ff);
            let length = random.next() as u8 % 8;
            if store_uses_memory(offset.into(), usize::from(length) + 1) {
                continue;
            }
            let op = Op::Access {
                io: false,
                write: random.next() & 1 == 0,
                offset,
                data: random.next().to_le_bytes(),
                length,
            };
            original.apply(&op);
            twin.apply(&op);
            tried += 1;
        }
        assert_eq!(original.state(), twin.state(), "seed {seed}");
        let (seen, now) = original.take_observations();
        let (twins_seen, twins_now) = twin.take_observations();
        assert!(seen == twins_seen, "seed {seed}");
        assert!(now == memory && twins_now == noise, "seed {seed}");
    }
    assert!(tried > 1000, "{tried}");
}

#[test]
fn stores_that_hand_descriptors_over_are_said_to_use_memory() {
    for (offset, bytes, uses) in [
        (0x3818, 4, true),
        (0x3810, 4, false),
        (0x3814, 8, true),
        (0x0438, 4, true),
        (0x0128, 4, true),
        (0x0100, 4, true),
        (0x0103, 1, true),
        (0x0400, 4, true),
        (0x0010, 4, false),
        (u64::MAX, 8, false),
    ] {
        assert_eq!(store_uses_memory(offset, bytes), uses, "{offset:#x}");
    }
}
