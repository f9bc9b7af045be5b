//! Queues and chains as only a hostile or broken driver, or one at its limits, writes them.

use proptest::prelude::*;

use super::*;

#[test]
fn a_queue_that_is_not_in_memory_needs_a_reset() {
    let mut driver = driver();
    driver.negotiate(VERSION_1);
    driver.write(0x16, 2, 0);
    driver.write(0x20, 8, MEMORY_BYTES as u64);
    driver.write(0x1c, 2, 1);
    assert_eq!(driver.read(0x1c, 2), 0);
    assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
    driver.start(0);
}

#[test]
fn sizes_vectors_and_queues_that_do_not_exist_are_not_taken() {
    let mut driver = driver();
    driver.negotiate(VERSION_1);
    for size in [0, 3, 32, 0xffff] {
        driver.write(0x18, 2, size);
        assert_eq!(driver.read(0x18, 2), 16);
    }
    driver.write(0x1a, 2, 3);
    assert_eq!(driver.read(0x1a, 2), 0xffff);
    driver.write(0x10, 2, 2);
    assert_eq!(driver.read(0x10, 2), 2);
    driver.write(0x16, 2, 2);
    assert_eq!(driver.read(0x18, 2), 0, "no queue 2");
    driver.write(0x1c, 2, 1);
    assert_eq!(driver.read(0x1c, 2), 0);
    driver.kick(2);
    driver.kick(1000);
}

/// Offers one bad chain by `prepare` and expects the device to stop until it is reset.
fn expect_needs_reset(prepare: impl FnOnce(&mut Driver<Adder>)) {
    let mut driver = driver();
    driver.enable_msix();
    driver.start(0);
    prepare(&mut driver);
    driver.kick(0);
    assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
    assert!(
        driver.vectors.take_triggered().contains(&0),
        "the driver is told"
    );
    let chains = driver.function().device().chains;
    driver.post(1, &[b"x"], &[1]);
    driver.kick(1);
    assert_eq!(driver.function().device().chains, chains, "it stands still");
    driver.start(0);
    driver.post(1, &[b"x"], &[1]);
    driver.kick(1);
    assert_eq!(driver.used(1)[0].data, b"y");
}

const NEXT: u16 = 1;

const WRITE: u16 = 2;

const INDIRECT: u16 = 4;

#[test]
fn hostile_chains_stop_the_device_until_reset() {
    expect_needs_reset(|driver| {
        // A loop.
        driver.descriptor(0, 0, (0x1000, 4), NEXT, 1);
        driver.descriptor(0, 1, (0x1000, 4), NEXT, 0);
        driver.offer(0, 0);
    });
    expect_needs_reset(|driver| {
        // The next one is behind the table.
        driver.descriptor(0, 0, (0x1000, 4), NEXT, 99);
        driver.offer(0, 0);
    });
    expect_needs_reset(|driver| driver.offer(0, 500));
    expect_needs_reset(|driver| {
        // Readable behind writable.
        driver.descriptor(0, 0, (0x1000, 4), NEXT | WRITE, 1);
        driver.descriptor(0, 1, (0x1000, 4), 0, 0);
        driver.offer(0, 0);
    });
    expect_needs_reset(|driver| {
        driver.descriptor(0, 0, (MEMORY_BYTES as u64 - 2, 4), 0, 0);
        driver.offer(0, 0);
    });
    expect_needs_reset(|driver| {
        driver.descriptor(0, 0, (u64::MAX - 1, 4), 0, 0);
        driver.offer(0, 0);
    });
    expect_needs_reset(|driver| {
        // Together more than 4 GiB.
        driver.descriptor(0, 0, (0x1000, u32::MAX), NEXT, 1);
        driver.descriptor(0, 1, (0x1000, u32::MAX), 0, 0);
        driver.offer(0, 0);
    });
    expect_needs_reset(|driver| {
        // An indirect table in an indirect table.
        driver.descriptor(0, 0, (0x8000, 16), INDIRECT, 0);
        let inner = [0x8000u64.to_le_bytes(), (16u64 | 4 << 32).to_le_bytes()].concat();
        driver
            .memory
            .write_slice(&inner, GuestAddress(0x8000))
            .unwrap();
        driver.offer(0, 0);
    });
    expect_needs_reset(|driver| {
        // More chains than the ring has places.
        driver
            .memory
            .write_obj(17u16, GuestAddress(0x1_1002))
            .unwrap();
    });
}

#[test]
fn an_indirect_chain_is_followed() {
    let mut driver = driver();
    driver.start(1 << 28);
    let descriptor = |address: u64, flags: u64, next: u64| {
        [
            address.to_le_bytes(),
            (4u64 | flags << 32 | next << 48).to_le_bytes(),
        ]
        .concat()
    };
    let table = [descriptor(0x9000, 1, 1), descriptor(0x9010, 2, 0)].concat();
    driver
        .memory
        .write_slice(&table, GuestAddress(0x8000))
        .unwrap();
    driver
        .memory
        .write_slice(b"1234", GuestAddress(0x9000))
        .unwrap();
    driver.descriptor(0, 0, (0x8000, 32), INDIRECT, 0);
    driver.offer(0, 0);
    driver.kick(0);
    let mut answer = [0; 4];
    driver
        .memory
        .read_slice(&mut answer, GuestAddress(0x9010))
        .unwrap();
    assert_eq!(&answer, b"2345");
}

#[test]
fn more_chains_than_one_turn_has_are_finished_by_the_event_loop() {
    // The ring has 16 places: the same chain over and over, as a second processor could do.
    let mut driver = driver();
    driver.start(0);
    let memory = driver.memory.clone();
    let mut function = driver.function();
    let mut taken = 0;
    let mut again = false;
    let mut available = 0u16;
    function.with_queues(|_, queues| {
        for _ in 0..2000 {
            available = available.wrapping_add(1);
            memory.write_obj(available, GuestAddress(0x1_1002)).unwrap();
            match queues.pop(0)? {
                Some(chain) => queues.push(0, &chain, 0)?,
                None => break,
            }
            taken += 1;
        }
        again = queues.again;
        Ok(())
    });
    assert_eq!((taken, again), (1024, true));
    drop(function);
    driver.run_events();
    assert_eq!(driver.function().device().chains, 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever lies in the rings and is written to the registers: no panic, an end, and a reset
    /// makes the device work again.
    #[test]
    fn hostile_rings_and_registers_do_no_harm(
        ring in prop::collection::vec(any::<u8>(), 256..512),
        available in any::<u16>(),
        heads in prop::collection::vec(0u16..20, 16),
        writes in prop::collection::vec((0u64..0x8000, 1usize..9, any::<u64>()), 0..40),
        common in prop::collection::vec((0u64..0x40, 1usize..9, any::<u64>()), 0..40),
    ) {
        let mut driver = driver();
        driver.start(EVENT_IDX);
        driver.memory.write_slice(&ring, GuestAddress(0x1_0000)).unwrap();
        for (n, head) in heads.iter().enumerate() {
            driver.memory.write_obj(*head, GuestAddress(0x1_1004 + n as u64 * 2)).unwrap();
        }
        driver.memory.write_obj(available % 18, GuestAddress(0x1_1002)).unwrap();
        driver.kick(0);
        for (offset, length, value) in writes.into_iter().chain(common) {
            driver.write(offset, length, value);
            driver.read(offset, length);
        }
        driver.kick(0);
        driver.run_events();
        driver.function().reset();
        driver.function().config_write(0x04, &[0x06, 0]);
        driver.start(0);
        driver.post(1, &[b"x"], &[1]);
        driver.kick(1);
        prop_assert_eq!(&driver.used(1)[0].data, b"y");
    }
}
