//! Random histories of all that a guest finds at fixed places: timer, interrupt controllers, local
//! APIC, serial port, keyboard controller, PCI configuration, power and hot-plug registers. At any
//! point of one, a twin that goes on from a snapshot reads what the machine that was never stopped
//! reads.
//!
//! Interrupts stay off, and what depends on when it is read is masked: counts and outputs of the
//! timer, requests that it makes, delivery status.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Guest, Running, config};
use devices::nic::{NicModel, NicParts};
use devices::pci::config::InterruptPin;
use devices::wire::gateway::{Gateway, GatewayConfig};
use vm_memory::{Bytes, GuestAddress};
use vmm::Vm;
use vmm::snapshot::{Beside, Chain, SnapshotRequest};

/// What the guest is to do next, 16 bytes each; what it has read; what it waits for.
const STEPS: u64 = 0x20_0000;
const LOG: u64 = 0x30_0000;
const GO: u64 = 0x1f_f000;
/// Second entry of the page tables' second level, and a directory for it.
const FOURTH_GIB: u64 = 0xa000 + 3 * 8;
const DIRECTORY: u64 = 0x1e_0000;

// Waits for the first word, then takes one step after the other: 0 reports and waits for the value,
// 1 and 3 store to a port, 2 and 4 load from one, 5 stores to memory, 6 loads from it; what is
// loaded is masked and goes into the log.
guest_code!(
    steps,
    "mov esi, 0x200000",
    "mov edi, 0x300000",
    "7: cmp dword ptr [0x1ff000], 0",
    "je 7b",
    "1: mov eax, [rsi]",
    "mov edx, [rsi + 4]",
    "mov ecx, [rsi + 8]",
    "mov ebx, [rsi + 12]",
    "add esi, 16",
    "cmp eax, 0",
    "je 9f",
    "cmp eax, 2",
    "je 2f",
    "cmp eax, 3",
    "je 3f",
    "cmp eax, 4",
    "je 4f",
    "cmp eax, 5",
    "je 5f",
    "cmp eax, 6",
    "je 6f",
    "mov eax, ecx",
    "out dx, al",
    "jmp 1b",
    "2: xor eax, eax",
    "in al, dx",
    "jmp 7f",
    "3: mov eax, ecx",
    "out dx, eax",
    "jmp 1b",
    "4: in eax, dx",
    "jmp 7f",
    "5: mov [rdx], ecx",
    "jmp 1b",
    "6: mov eax, [rdx]",
    "7: and eax, ebx",
    "mov [rdi], eax",
    "add edi, 4",
    "jmp 1b",
    "9: mov eax, ecx",
    "mov edx, 0x500",
    "out dx, eax",
    "8: cmp dword ptr [0x1ff000], ecx",
    "jne 8b",
    "jmp 1b",
);

/// One thing that the guest does: what, where, value, mask of what it reads.
type Step = [u32; 4];

fn wait(value: u32) -> Step {
    [0, 0, value, 0]
}

fn out8(port: u32, value: u32) -> Step {
    [1, port, value & 0xff, 0]
}

fn in8(port: u32, mask: u32) -> Step {
    [2, port, 0, mask]
}

/// Pseudo-random numbers (Knuth's MMIX generator).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u32) -> u32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % u64::from(end)) as u32
    }

    fn byte(&mut self) -> u32 {
        self.below(256)
    }

    fn of(&mut self, values: &[u32]) -> u32 {
        values[self.below(values.len() as u32) as usize]
    }
}

fn timer(random: &mut Random, steps: &mut Vec<Step>) {
    let channel = random.below(3);
    match random.below(5) {
        0 => {
            let access = 1 + random.below(3);
            steps.push(out8(
                0x43,
                channel << 6 | access << 4 | random.below(8) << 1,
            ));
        }
        // One byte of a count: the second may come later.
        1 | 2 => steps.push(out8(0x40 + channel, random.byte())),
        3 => {
            // Mode and access, latched; the output and whether the count was taken over are not
            // the same at every moment.
            steps.push(out8(0x43, 0xe0 | 2 << channel));
            steps.push(in8(0x40 + channel, 0x3f));
        }
        _ if random.below(2) == 0 => steps.push(out8(0x61, random.below(4))),
        _ => steps.push(in8(0x61, 3)),
    }
}

fn interrupt_controllers(random: &mut Random, steps: &mut Vec<Step>) {
    let base = random.of(&[0x20, 0xa0]);
    match random.below(8) {
        0 => steps.push(out8(base, random.of(&[0x11, 0x13]))),
        // No poll: it would acknowledge what the timer asks for.
        1 => steps.push(out8(
            base,
            random.of(&[0x08, 0x0a, 0x0b, 0x20, 0x48, 0x68, 0xa0, 0xc1]),
        )),
        2 | 3 => steps.push(out8(base + 1, random.byte())),
        4 => steps.push(in8(base + 1, 0xff)),
        5 => {
            let port = random.of(&[0x4d0, 0x4d1]);
            match random.below(2) {
                0 => steps.push(out8(port, random.byte())),
                _ => steps.push(in8(port, 0xff)),
            }
        }
        6 => steps.push([5, 0xfec0_0000, random.below(0x40), 0]),
        _ => {
            let entry = 0x10 + 2 * random.below(24);
            steps.push([5, 0xfec0_0000, entry, 0]);
            if random.below(2) == 0 {
                let modes = random.of(&[0, 0x2000, 0x8000, 0xa000]);
                let vector = 0x20 + random.below(0xd0);
                steps.push([5, 0xfec0_0010, 0x1_0000 | modes | vector, 0]);
                steps.push([5, 0xfec0_0000, entry + 1, 0]);
                steps.push([5, 0xfec0_0010, random.byte() << 24, 0]);
            }
            steps.push([6, 0xfec0_0010, 0, !0x5000]);
        }
    }
}

fn local_apic(random: &mut Random, steps: &mut Vec<Step>) {
    let (register, value) = match random.below(7) {
        0 => (0x80, random.byte()),
        1 => (0xd0, random.byte() << 24),
        2 => (0xe0, random.of(&[0xffff_ffff, 0x0fff_ffff])),
        3 => (0x310, random.byte() << 24),
        4 => (0x320, 0x1_0000 | random.below(2) << 17 | random.byte()),
        5 => (0x370, 0x1_0000 | random.byte()),
        _ => (0x3e0, random.below(16)),
    };
    let at = 0xfee0_0000 + register;
    match random.below(2) {
        0 => steps.push([5, at, value, 0]),
        _ => steps.push([6, at, 0, !0x1000]),
    }
}

fn serial(random: &mut Random, steps: &mut Vec<Step>) {
    let port = 0x3f8 + random.below(8);
    match random.below(2) {
        0 => steps.push(out8(port, random.byte())),
        _ => steps.push(in8(port, 0xff)),
    }
}

fn keyboard_controller(random: &mut Random, steps: &mut Vec<Step>) {
    match random.below(6) {
        0 => {
            let command = random.of(&[
                0x20, 0x60, 0xa7, 0xa8, 0xa9, 0xaa, 0xab, 0xad, 0xae, 0xd3, 0xd4,
            ]);
            steps.push(out8(0x64, command));
        }
        1 => steps.push(out8(
            0x60,
            random.of(&[
                0xe6, 0xe7, 0xe8, 0xe9, 0xea, 0xf2, 0xf3, 0xf4, 0xf5, 0xf6, 3, 100, 0x47,
            ]),
        )),
        2 | 3 => steps.push(in8(0x60, 0xff)),
        _ => steps.push(in8(0x64, 0xff)),
    }
}

fn pci(random: &mut Random, steps: &mut Vec<Step>) {
    if random.below(3) > 0 {
        let register = random.of(&[
            0, 4, 8, 0xc, 0x10, 0x14, 0x18, 0x1c, 0x20, 0x24, 0x2c, 0x30, 0x34, 0x3c, 0x40, 0xdc,
        ]);
        steps.push([3, 0xcf8, 0x8000_0000 | random.below(4) << 11 | register, 0]);
    }
    match random.below(6) {
        0 | 1 => {
            let value = match random.below(4) {
                0 => 0xffff_ffff,
                1 => 0xc000_0000 | random.below(64) << 20,
                2 => 0x1000 + 0x400 * random.below(32),
                // Also as a command: decoding, bus mastering, no interrupts.
                _ => random.below(8) | random.below(2) << 10,
            };
            steps.push([3, 0xcfc, value, 0]);
        }
        2 => steps.push(in8(0xcfc + random.below(4), 0xff)),
        3 => steps.push([4, 0xcf8, 0, u32::MAX]),
        _ => steps.push([4, 0xcfc, 0, u32::MAX]),
    }
}

fn power(random: &mut Random, steps: &mut Vec<Step>) {
    match random.below(3) {
        // A twin has a generation of its own.
        0 => steps.push(in8(0x604, 0xfb)),
        1 => steps.push(in8(0x601, 0xff)),
        _ => steps.push([4, 0x610 + 4 * random.below(3), 0, u32::MAX]),
    }
}

fn add_nic(vm: &mut Vm, model: &str) {
    let wire = Gateway::new(&GatewayConfig::default()).unwrap();
    vm.add_subscriber(Arc::new(Mutex::new(wire.timer())));
    let slot = vm.reserve_pci_slot().unwrap();
    let nic = NicModel::from_name(model).unwrap().make(NicParts {
        mac: [2, 0, 0, 0, 0, slot.number()],
        wire: Box::new(wire),
        dma: vm.dma_space(),
        intx: slot.intx_line(InterruptPin::A),
        vectors: &mut |count| vm.msi_vectors(count).map_err(|error| error.to_string()),
    });
    let nic = nic.unwrap();
    vm.add_subscriber(nic.events.clone());
    vm.add_pci(&slot, nic.function).unwrap();
}

fn machine() -> Guest {
    let mut guest = Guest::new(config(steps(), 1));
    guest.vm.add_mouse();
    add_nic(&mut guest.vm, "e1000");
    add_nic(&mut guest.vm, "virtio");
    guest
}

fn put(guest: &Running, at: u64, value: u32) {
    let memory = guest.handle.ram().memory();
    memory.write_obj(value, GuestAddress(at)).unwrap();
}

/// Gives a guest that waits for its first word what it is to do, and the last GiB below 4 GiB.
fn begin(guest: &Running, history: &[Step]) {
    while guest.handle.status().first_entry_ns.is_none() {
        std::thread::yield_now();
    }
    let memory = guest.handle.ram().memory();
    let write = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).unwrap();
    // Large pages of 2 MiB, present, writable, not cached.
    for (entry, address) in [(0x1f6, 0xfec0_0000), (0x1f7, 0xfee0_0000)] {
        write(DIRECTORY + 8 * entry, address | 0x93);
    }
    write(FOURTH_GIB, DIRECTORY | 3);
    let bytes: Vec<u8> = history
        .iter()
        .flatten()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    memory.write_slice(&bytes, GuestAddress(STEPS)).unwrap();
    put(guest, GO, 1);
}

fn snapshot(guest: &Running, dir: &Path) {
    let request = SnapshotRequest {
        dir,
        parent: None,
        program: "test",
        track: false,
        stop: false,
        limit: Duration::from_secs(20),
    };
    let mut beside = || {
        Ok(Beside {
            vm: serde_json::Value::Null,
            instead: Vec::new(),
        })
    };
    let taken = guest.handle.snapshot(&request, &mut |_| true, &mut beside);
    taken.unwrap();
}

/// Has the guest go on behind its second wait to its end; what it has read in all.
fn end(guest: &Running, reads: usize) -> Vec<u32> {
    put(guest, GO, 2);
    assert_eq!(guest.report(), 3);
    let memory = guest.handle.ram().memory();
    let word = |number: usize| memory.read_obj(GuestAddress(LOG + 4 * number as u64));
    (0..reads).map(|number| word(number).unwrap()).collect()
}

#[test]
fn a_twin_reads_at_fixed_places_what_the_machine_that_was_never_stopped_reads() {
    const FAMILIES: [fn(&mut Random, &mut Vec<Step>); 7] = [
        timer,
        interrupt_controllers,
        local_apic,
        serial,
        keyboard_controller,
        pci,
        power,
    ];
    let folder = tempfile::tempdir().unwrap();
    for seed in 0..24 {
        let mut random = Random(seed * 0x9e37_79b9 + 1);
        let (mut history, middle) = (Vec::new(), 20 + random.below(300) as usize);
        while history.len() < 400 {
            if history.len() >= middle && !history.contains(&wait(2)) {
                history.push(wait(2));
            }
            FAMILIES[random.below(7) as usize](&mut random, &mut history);
        }
        history.push(wait(3));
        let reads = history.iter().filter(|step| [2, 4, 6].contains(&step[0]));
        let reads = reads.count();
        let original = machine().start();
        begin(&original, &history);
        assert_eq!(original.report(), 2);
        let dir = folder.path().join(seed.to_string());
        snapshot(&original, &dir);
        let mut twin = machine();
        let chain = Chain::open(&dir).unwrap();
        twin.vm.go_on_from(&chain, &mut |_| true).unwrap();
        let twin = twin.start();
        let (then, now) = (end(&original, reads), end(&twin, reads));
        let behind = history.iter().filter(|step| [2, 4, 6].contains(&step[0]));
        for (number, (step, (then, now))) in behind.zip(then.iter().zip(&now)).enumerate() {
            assert_eq!(
                now, then,
                "seed {seed}, read {number} of {reads}: {step:x?}"
            );
        }
        original.power_off();
        twin.power_off();
    }
}
