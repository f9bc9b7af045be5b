//! States of devices go along with the machine's, and nothing of a device happens while a machine
//! is at rest.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Guest, config};
use devices::nic::{NicModel, NicParts};
use devices::pci::config::InterruptPin;
use devices::virtio::blk::{Block, Disk};
use devices::virtio::pci::VirtioPciFunction;
use devices::wire::gateway::{Gateway, GatewayConfig};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm::{DeviceStates, PciSlot, Vm, VmHandle, VmState};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const LIMIT: Duration = Duration::from_secs(20);
/// Scratch register of the serial port.
const SCRATCH: u64 = 0x3ff;
/// Hot-plug register for slots whose function the guest has let go.
const EJECT: u64 = 0x618;

// Reports for ever, and turns an interrupt of the serial port on.
guest_code!(
    counts,
    "mov edx, 0x3ff",
    "mov al, 0x5a",
    "out dx, al",
    "1: inc dword ptr [0x200000]",
    "mov edx, 0x500",
    "mov eax, [0x200000]",
    "out dx, eax",
    "jmp 1b",
);

fn add_nic(vm: &mut Vm, model: &str, last: u8) {
    let wire = Gateway::new(&GatewayConfig::default()).unwrap();
    vm.add_subscriber(Arc::new(Mutex::new(wire.timer())));
    let slot = vm.reserve_pci_slot().unwrap();
    let nic = NicModel::from_name(model)
        .unwrap()
        .make(NicParts {
            mac: [2, 0, 0, 0, 0, last],
            wire: Box::new(wire),
            dma: vm.dma_space(),
            intx: slot.intx_line(InterruptPin::A),
            vectors: &mut |count| vm.msi_vectors(count).map_err(|error| error.to_string()),
        })
        .unwrap();
    vm.add_subscriber(nic.events.clone());
    vm.add_pci(&slot, nic.function).unwrap();
}

fn disk(handle: &VmHandle, slot: &PciSlot, file: &Path) -> Arc<Mutex<VirtioPciFunction<Block>>> {
    let disk = Block::new(Disk::open(file, true).unwrap(), "disk");
    let vectors = handle.msi_vectors(2).unwrap();
    let line = slot.intx_line(InterruptPin::A);
    let function = VirtioPciFunction::new(disk, handle.dma_space(), line, vectors).unwrap();
    Arc::new(Mutex::new(function))
}

/// Puts a disk into the next slot.
fn add_disk(vm: &mut Vm, file: &Path) {
    let slot = vm.reserve_pci_slot().unwrap();
    let function = disk(&vm.handle(), &slot, file);
    vm.add_subscriber(function.clone());
    vm.add_pci(&slot, function).unwrap();
}

/// Puts a disk into the slot with this number as one that comes later, as soon as it is the next.
fn plug_disk(handle: &VmHandle, file: &Path, number: u8) {
    let slot = loop {
        let slot = handle.reserve_pci_slot().unwrap();
        if slot.number() == number {
            break slot;
        }
        drop(slot);
        std::thread::yield_now();
    };
    let function = disk(handle, &slot, file);
    handle
        .plug(&slot, function.clone(), vec![function])
        .unwrap();
}

/// A machine with two NICs and a disk, and a second disk that came while it ran.
fn machine(file: &Path) -> Guest {
    let mut guest = Guest::new(config(counts(), 1));
    add_nic(&mut guest.vm, "e1000", 1);
    add_nic(&mut guest.vm, "virtio", 2);
    add_disk(&mut guest.vm, file);
    plug_disk(&guest.vm.handle(), file, 4);
    guest
}

fn image() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    file
}

#[test]
fn all_devices_are_in_another_machine_what_they_were_in_the_first() {
    let file = image();
    let first = machine(file.path()).start();
    first.report();
    let bus = first.handle.pci_bus().clone();
    for slot in 1..=4 {
        bus.config_write(slot, 0x3c, &[0x40 + slot]);
        bus.config_write(slot, 0x04, &[0x07]);
    }
    first.handle.unplug(4).unwrap();
    let (state, devices) = first
        .handle
        .quiesce(LIMIT, |quiesced| {
            let devices = quiesced.save_devices().unwrap();
            assert_eq!(quiesced.save_devices().unwrap(), devices);
            (quiesced.save().unwrap(), devices)
        })
        .unwrap();
    let kinds: Vec<_> = devices.functions().collect();
    assert_eq!(kinds[1], (1, "82540EM"));
    assert_eq!(kinds.len(), 5);
    let devices = DeviceStates::from_bytes(&devices.to_bytes().unwrap()).unwrap();
    let mut twin = machine(file.path());
    twin.vm.restore(&state).unwrap();
    twin.vm.restore_devices(&devices).unwrap();
    let handle = twin.vm.handle();
    let mut line = [0];
    handle.pci_bus().config_read(3, 0x3c, &mut line);
    assert_eq!(line, [0x43]);
    handle.pio_bus().read(SCRATCH, &mut line);
    assert_eq!(line, [0x5a]);
    let again = handle
        .quiesce(LIMIT, |quiesced| quiesced.save_devices().unwrap())
        .unwrap();
    assert_eq!(again, devices);
    // Back to it in the same machine, while it is at rest.
    for slot in 1..=4 {
        bus.config_write(slot, 0x3c, &[0xff]);
    }
    let back = first
        .handle
        .quiesce(LIMIT, |quiesced| {
            quiesced.restore_devices(&devices).unwrap();
            quiesced.save_devices().unwrap()
        })
        .unwrap();
    assert_eq!(back, devices);
    first.drain();
    first.report();
    first.power_off();
}

#[test]
fn states_of_other_devices_are_refused_and_say_so() {
    let file = image();
    let guest = machine(file.path());
    let save = |vm: &Vm| {
        vm.handle()
            .quiesce(LIMIT, |quiesced| quiesced.save_devices().unwrap())
            .unwrap()
    };
    let states = save(&guest.vm);
    let mut other = Guest::new(config(counts(), 1));
    let refused = |vm: &mut Vm| vm.restore_devices(&states).unwrap_err().to_string();
    let error = refused(&mut other.vm);
    assert!(error.contains("[4] came while it ran"), "{error}");
    add_nic(&mut other.vm, "virtio", 2);
    add_nic(&mut other.vm, "e1000", 1);
    add_disk(&mut other.vm, file.path());
    assert!(refused(&mut other.vm).contains("[4] came while it ran"));
    plug_disk(&other.vm.handle(), file.path(), 4);
    let error = refused(&mut other.vm);
    assert!(error.contains("PCI slot 1"), "{error}");
    assert!(error.contains("82540EM"), "{error}");
    let mut fewer = Guest::new(config(counts(), 1));
    let few = save(&fewer.vm);
    add_disk(&mut fewer.vm, file.path());
    let error = fewer.vm.restore_devices(&few).unwrap_err().to_string();
    assert!(
        error.contains("in slots [0], this one in [0, 1]"),
        "{error}"
    );
}

#[test]
fn cut_and_changed_bytes_are_refused() {
    let file = image();
    let guest = machine(file.path());
    let states = guest
        .vm
        .handle()
        .quiesce(LIMIT, |quiesced| quiesced.save_devices().unwrap())
        .unwrap();
    let bytes = states.to_bytes().unwrap();
    for len in 0..bytes.len() {
        assert!(DeviceStates::from_bytes(&bytes[..len]).is_err(), "{len}");
    }
    // Every bit of the head, and one in eleven of the rest.
    let bits = bytes.len() * 8;
    for bit in (0..200).chain((200..bits).step_by(11)) {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(DeviceStates::from_bytes(&flipped).is_err(), "bit {bit}");
    }
    let mut longer = bytes.clone();
    longer.push(0);
    assert!(DeviceStates::from_bytes(&longer).is_err());
    assert_eq!(DeviceStates::from_bytes(&bytes).unwrap(), states);
}

/// Counts how often the event loop serves it; each time it asks for the next.
struct Busy {
    event: EventFd,
    served: Arc<AtomicU64>,
}

impl MutEventSubscriber for Busy {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        ops.add(Events::new(&self.event, EventSet::IN)).unwrap();
        self.event.write(1).unwrap();
    }

    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        // Never read: it is served without end.
        self.served.fetch_add(1, Ordering::AcqRel);
    }
}

#[test]
fn no_device_works_while_the_machine_is_at_rest() {
    let served = Arc::new(AtomicU64::new(0));
    let mut guest = Guest::new(config(counts(), 1));
    guest.vm.add_subscriber(Arc::new(Mutex::new(Busy {
        event: EventFd::new(EFD_NONBLOCK).unwrap(),
        served: served.clone(),
    })));
    let guest = guest.start();
    let count = || served.load(Ordering::Acquire);
    let goes_on = |from: u64| {
        while count() == from {
            std::thread::yield_now();
        }
    };
    for _ in 0..20 {
        goes_on(count());
        let handle = guest.handle.clone();
        let mut other = None;
        handle
            .quiesce(LIMIT, |_| {
                let before = count();
                let handle = handle.clone();
                // Nor does whoever works on devices on another thread.
                let served = served.clone();
                other = Some(std::thread::spawn(move || {
                    handle.with_devices(|| served.fetch_add(1, Ordering::AcqRel));
                }));
                std::thread::sleep(Duration::from_millis(5));
                assert_eq!(count(), before);
            })
            .unwrap();
        other.unwrap().join().unwrap();
    }
    // A machine that is only paused has devices that go on.
    guest.handle.pause().unwrap();
    goes_on(count());
    guest.handle.resume().unwrap();
    guest.drain();
    guest.report();
    guest.power_off();
}

/// The one that came has another state, and what it is connected to is another thing.
#[test]
fn a_rewind_behind_an_exchange_of_a_function_in_its_slot_is_refused_and_nothing_changes() {
    let file = image();
    let guest = Guest::new(config(counts(), 1)).start();
    let handle = &guest.handle;
    let bus = handle.pci_bus().clone();
    let line = || {
        let mut line = [0];
        bus.config_read(1, 0x3c, &mut line);
        line[0]
    };
    guest.report();
    plug_disk(handle, file.path(), 1);
    bus.config_write(1, 0x3c, &[0x41]);
    handle.mark("a", LIMIT).unwrap();
    bus.config_write(1, 0x3c, &[0x42]);
    handle.rewind(Some("a"), LIMIT).unwrap();
    assert_eq!(line(), 0x41);
    assert!(handle.pio_bus().write(EJECT, &2u32.to_le_bytes()));
    let refused = handle.rewind(Some("a"), LIMIT).unwrap_err().to_string();
    assert!(refused.contains("in slots [0, 1], now"), "{refused}");
    plug_disk(handle, file.path(), 1);
    bus.config_write(1, 0x3c, &[0x43]);
    let refused = handle.rewind(Some("a"), LIMIT).unwrap_err().to_string();
    assert!(refused.contains("in slots [1] were taken out"), "{refused}");
    assert_eq!(line(), 0x43);
    // A mark of what is there now can be gone to.
    handle.mark("b", LIMIT).unwrap();
    bus.config_write(1, 0x3c, &[0x44]);
    handle.rewind(Some("b"), LIMIT).unwrap();
    assert_eq!(line(), 0x43);
    assert_eq!(handle.state(), VmState::Running);
    guest.drain();
    guest.report();
    guest.power_off();
}
