//! The controller whose interrupt registers are in memory is the same controller.

use super::histories::{Random, histories};
use crate::e1000::ops::Exercise;
use crate::e1000::regs::{ICR, IMC, IMS, STATUS, icr};
use crate::pci::shared::{SharedPage, SharesRegisters};

/// What the other process's driver does, by messages or by the memory: what it is shown.
fn handler(exercise: &mut Exercise, page: Option<&SharedPage>, step: u8, bits: u32) -> Vec<u32> {
    let bench = exercise.bench();
    let Some(page) = page else {
        return match step % 4 {
            0 => vec![bench.read(ICR)],
            1 => {
                bench.write(IMS, bits);
                vec![bench.read(IMS)]
            }
            2 => {
                bench.write(IMC, bits);
                vec![bench.read(IMS)]
            }
            _ => vec![bench.read(STATUS)],
        };
    };
    let seen = match step % 4 {
        0 => page.clear(u32::MAX),
        1 => {
            page.unmask(bits & icr::ALL);
            page.causes_and_mask().1
        }
        2 => {
            page.mask(bits & icr::ALL);
            page.causes_and_mask().1
        }
        _ => page.get(0),
    };
    bench.nic.look();
    vec![seen]
}

#[test]
fn random_histories_show_the_same_with_interrupt_registers_in_memory() {
    for seed in histories(60) {
        let (mut plain, mut shared) = (Exercise::new().unwrap(), Exercise::new().unwrap());
        let share = |exercise: &mut Exercise| {
            let (file, _) = exercise.bench().nic.share().unwrap();
            SharedPage::of_file(&file.into()).unwrap()
        };
        let mut page = share(&mut shared);
        for (n, op) in Random(seed << 8).ops().into_iter().enumerate() {
            plain.apply(&op);
            shared.apply(&op);
            // What stands between two ops of this history.
            let (step, bits) = (
                n as u8 ^ seed as u8,
                (n as u32).wrapping_mul(0x9e37_79b9) >> 8,
            );
            let seen = handler(&mut plain, None, step, bits);
            assert_eq!(
                seen,
                handler(&mut shared, Some(&page), step, bits),
                "seed {seed}, step {n}, {op:?}"
            );
            assert_eq!(plain.seen, shared.seen, "seed {seed}, step {n}, {op:?}");
            assert_eq!(plain.bench().interrupt(), shared.bench().interrupt());
            if n % 50 == 20 {
                // What is done to memory that is nobody's any more is nothing.
                shared.bench().nic.unshare();
                page.store(u32::MAX, u32::MAX);
                page = share(&mut shared);
            }
        }
        assert_eq!(plain.state(), shared.state(), "seed {seed}");
    }
}
