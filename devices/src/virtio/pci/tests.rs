//! The transport as a driver sees it, well-behaved or not.

mod hostile;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::state::{Form, StateError};
use crate::virtio::DeviceKind;
use crate::virtio::testing::{Driver, EVENT_IDX, MEMORY_BYTES, VERSION_1};

const F_LOUD: u64 = 1;

const FORM: Form = Form {
    kind: "adder",
    version: 1,
};

/// Writes back what it is sent, each byte plus one; has a configuration of 4 bytes.
#[derive(Default)]
struct Adder {
    active_features: Option<u64>,
    chains: usize,
}

impl VirtioDevice for Adder {
    fn kind(&self) -> DeviceKind {
        DeviceKind {
            id: 42,
            pci_class: 0xff_0000,
            name: "adder",
        }
    }

    fn features(&self) -> u64 {
        F_LOUD
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![16, 16]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        for (n, byte) in data.iter_mut().enumerate() {
            if let Some(value) = b"adds".get(offset as usize + n) {
                *byte = *value;
            }
        }
    }

    fn activate(&mut self, features: u64, _: &mut Queues<'_>) -> Result<(), DeviceError> {
        self.active_features = Some(features);
        Ok(())
    }

    fn reset(&mut self) {
        self.active_features = None;
    }

    fn save(&self) -> Result<Part, StateError> {
        Part::new(FORM, &self.active_features)
    }

    fn restore(&mut self, state: &Part) -> Result<(), StateError> {
        self.active_features = state.open(FORM)?;
        Ok(())
    }

    fn notify(&mut self, queue: u16, queues: &mut Queues<'_>) -> Result<(), DeviceError> {
        while let Some(chain) = queues.pop(queue)? {
            let mut data = vec![0; chain.readable_bytes().min(4096)];
            let length = chain.read(queues.memory(), 0, &mut data)?;
            let answer: Vec<u8> = data[..length]
                .iter()
                .map(|byte| byte.wrapping_add(1))
                .collect();
            let written = chain.write(queues.memory(), 0, &answer)?;
            queues.push(queue, &chain, written)?;
            self.chains += 1;
            if answer.first() == Some(&b'!') {
                queues.signal_config_change();
            }
        }
        Ok(())
    }

    fn watch(&mut self, _: &mut EventOps<'_>) {}

    fn event(
        &mut self,
        _: Events,
        _: &mut EventOps<'_>,
        _: &mut Queues<'_>,
    ) -> Result<(), DeviceError> {
        Ok(())
    }
}

const NEEDS_RESET: u8 = 64;

fn driver() -> Driver<Adder> {
    Driver::new(Adder::default())
}

#[test]
fn function_is_a_modern_virtio_device_with_all_structures() {
    let driver = driver();
    let mut function = driver.function();
    let mut id = [0; 4];
    function.config_read(0, &mut id);
    assert_eq!(u32::from_le_bytes(id), 0x106a_1af4);
    let mut all = [0; 256];
    function.config_read(0, &mut all);
    let mut found = Vec::new();
    let mut at = usize::from(all[0x34]);
    while at != 0 {
        if all[at] == 0x09 {
            found.push((all[at + 3], all[at + 2], all[at + 9]));
        }
        at = usize::from(all[at + 1]);
    }
    // Type, length, and bits 15:8 of the offset.
    assert_eq!(
        found,
        [
            (1, 16, 0),
            (3, 16, 0x10),
            (4, 16, 0x20),
            (2, 20, 0x30),
            (5, 20, 0)
        ]
    );
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let mut driver = driver();
    driver.negotiate(VERSION_1 | 1 << 7);
    assert_eq!(driver.status(), 3);
    driver.negotiate(F_LOUD);
    assert_eq!(driver.status(), 3, "a legacy driver is refused");
    driver.negotiate(VERSION_1 | F_LOUD);
    assert_eq!(driver.status(), 11);
    driver.write(0x08, 4, 0);
    driver.write(0x0c, 4, 0);
    driver.write(0x14, 1, 15);
    let features = driver.function().device().active_features;
    assert_eq!(
        features,
        Some(VERSION_1 | F_LOUD),
        "they are fixed by FEATURES_OK"
    );
}

#[test]
fn driver_ok_needs_features_ok() {
    let driver = driver();
    driver.write(0x14, 1, 7);
    assert_eq!(driver.status(), 3);
    assert_eq!(driver.function().device().active_features, None);
}

#[test]
fn chains_are_answered_and_signalled_on_their_vector() {
    for features in [0, EVENT_IDX] {
        let mut driver = driver();
        driver.enable_msix();
        driver.start(features);
        let head = driver.post(1, &[b"ab", b"cd"], &[3, 8]);
        driver.kick(1);
        let used = driver.used(1);
        assert_eq!(
            (used[0].head, used[0].data.as_slice()),
            (head, &b"bcde"[..])
        );
        assert_eq!(driver.vectors.take_triggered(), [2]);
        assert!(!*driver.line.asserted.lock().unwrap());
        // Many rounds, more than the ring has places.
        for n in 100..200u8 {
            driver.post(1, &[&[n]], &[1]);
            assert!(features == 0 || driver.wants_kick(1));
            driver.kick(1);
            assert_eq!(driver.used(1)[0].data, [n + 1]);
            assert_eq!(driver.vectors.take_triggered(), [2]);
        }
    }
}

#[test]
fn a_driver_that_wants_no_interrupts_gets_none() {
    let mut driver = driver();
    driver.enable_msix();
    driver.start(0);
    // VIRTQ_AVAIL_F_NO_INTERRUPT in the flags of the available ring.
    driver
        .memory
        .write_obj(1u16, GuestAddress(0x1_1000))
        .unwrap();
    driver.post(0, &[b"x"], &[1]);
    driver.kick(0);
    assert_eq!(driver.used(0).len(), 1);
    assert!(driver.vectors.take_triggered().is_empty());
}

#[test]
fn without_msix_the_line_is_asserted_until_isr_is_read() {
    let mut driver = driver();
    driver.start(0);
    driver.post(0, &[b"x"], &[1]);
    driver.kick(0);
    assert!(*driver.line.asserted.lock().unwrap());
    driver.function().config_write(0x04, &[0x06, 0x04]);
    assert!(!*driver.line.asserted.lock().unwrap(), "Interrupt Disable");
    driver.function().config_write(0x04, &[0x06, 0x00]);
    assert!(*driver.line.asserted.lock().unwrap());
    assert_eq!(driver.read(0x1000, 1), 1);
    assert_eq!(driver.read(0x1000, 1), 0);
    assert!(!*driver.line.asserted.lock().unwrap());
}

#[test]
fn a_configuration_change_is_signalled_and_counted() {
    let mut driver = driver();
    driver.enable_msix();
    driver.start(0);
    let generation = driver.read(0x15, 1);
    driver.post(0, &[b" "], &[1]);
    driver.kick(0);
    assert_eq!(driver.vectors.take_triggered(), [1, 0]);
    assert_eq!(driver.read(0x15, 1), generation + 1);
    assert_eq!(driver.read(0x2000, 4).to_le_bytes()[..4], *b"adds");
    assert_eq!(driver.read(0x2002, 4).to_le_bytes()[..4], *b"ds\0\0");
}

#[test]
fn nothing_is_taken_before_the_driver_is_ready_and_all_after() {
    let mut driver = driver();
    driver.negotiate(VERSION_1);
    driver.set_queues_up();
    driver.post(0, &[b"x"], &[1]);
    driver.kick(0);
    assert_eq!(driver.used(0), []);
    driver.write(0x14, 1, 15);
    assert_eq!(driver.used(0).len(), 1);
}

#[test]
fn rings_are_left_alone_while_the_function_may_not_master_the_bus() {
    let mut driver = driver();
    driver.start(0);
    driver.set_bus_master(false);
    driver.post(0, &[b"x"], &[1]);
    driver.kick(0);
    assert_eq!(driver.used(0), []);
    driver.set_bus_master(true);
    assert_eq!(driver.used(0)[0].data, b"y");
}

#[test]
fn reset_forgets_queues_and_features() {
    let mut driver = driver();
    driver.start(F_LOUD);
    driver.post(0, &[b"x"], &[1]);
    driver.kick(0);
    driver.write(0x14, 1, 0);
    assert_eq!(driver.status(), 0);
    assert!(!*driver.line.asserted.lock().unwrap());
    assert_eq!(driver.read(0x1c, 2), 0);
    assert_eq!(driver.read(0x1a, 2), 0xffff);
    assert_eq!(driver.function().device().active_features, None);
    driver.start(0);
    driver.post(0, &[b"y"], &[1]);
    driver.kick(0);
    assert_eq!(driver.used(0)[0].data, b"z");
}

#[test]
fn registers_are_reachable_through_configuration_space() {
    let mut driver = driver();
    driver.negotiate(VERSION_1);
    let mut at = driver.capability(0x09);
    loop {
        let mut header = [0; 4];
        driver.function().config_read(at, &mut header);
        if header[3] == 5 {
            break;
        }
        at = header[1].into();
    }
    let set = |offset: u32, length: u32| {
        let mut function = driver.function();
        function.config_write(at + 4, &[0]);
        function.config_write(at + 8, &offset.to_le_bytes());
        function.config_write(at + 12, &length.to_le_bytes());
    };
    set(0x16, 2);
    driver.function().config_write(at + 16, &[1, 0]);
    assert_eq!(driver.read(0x16, 2), 1);
    set(0x12, 2);
    let mut data = [0; 4];
    driver.function().config_read(at + 16, &mut data);
    assert_eq!(data, [2, 0, 0, 0]);
    // What makes no sense does nothing.
    set(0x13, 4);
    driver.function().config_read(at + 16, &mut data);
    set(0xffff_fffc, 4);
    driver.function().config_write(at + 16, &[1; 4]);
}

#[test]
fn a_restored_function_goes_on_where_the_saved_one_stopped() {
    let mut driver = driver();
    driver.enable_msix();
    driver.start(EVENT_IDX);
    driver.post(0, &[b"a"], &[1]);
    driver.kick(0);
    assert_eq!(driver.used(0).len(), 1);
    let state = driver.function().save().unwrap();
    driver.function().reset();
    assert_eq!(driver.status(), 0);
    driver.function().restore(&state).unwrap();
    assert_eq!(driver.function().save().unwrap(), state);
    driver.vectors.take_triggered();
    driver.post(0, &[b"b"], &[1]);
    driver.kick(0);
    assert_eq!(driver.used(0)[0].data, b"c");
    assert_eq!(driver.vectors.take_triggered(), [1]);
}

#[test]
fn a_request_that_nobody_was_notified_about_is_found_after_a_restore() {
    let mut driver = driver();
    driver.start(0);
    driver.post(0, &[b"a"], &[1]);
    let mut twin = driver.twin(Adder::default());
    assert!(twin.used(0).is_empty());
    twin.run_events();
    assert_eq!(twin.used(0)[0].data, b"b");
}

#[test]
fn a_state_that_no_driver_can_have_made_is_refused_and_nothing_changes() {
    let mut driver = driver();
    driver.start(0);
    let before = driver.function().save().unwrap();
    // Another kind of function, another number of queues, a queue outside of memory.
    let mut foreign = Driver::new(crate::virtio::console::tests::console());
    foreign.start(0);
    let console = foreign.function().save().unwrap();
    driver.function().restore(&console).unwrap_err();
    driver.write(0x14, 1, 0);
    driver.negotiate(VERSION_1);
    let stopped = driver.function().save().unwrap();
    driver.function().restore(&before).unwrap();
    assert_eq!(driver.function().save().unwrap(), before);
    driver.function().restore(&stopped).unwrap();
    assert_eq!(driver.status(), 11);
    driver.function().restore(&before).unwrap();
    driver.post(0, &[b"x"], &[1]);
    driver.kick(0);
    assert_eq!(driver.used(0)[0].data, b"y");
}
