//! A machine that is saved in the middle goes on as its twin: another machine that is given its
//! state.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use common::{Guest, MEMORY, Running, config};
use devices::bus::BusDevice;
use devices::irq::{MsiMessage, MsiVectors};
use kvm_bindings::{Msrs, kvm_msr_entry};
use vm_memory::{Bytes, GuestAddress};
use vmm::{MachineState, PausedVcpus, VmHandle};

// Arms the local APIC's timer by TSC deadline (vector 0x41), then steps a generator whose state
// goes through R12, XMM0 and MSR_KERNEL_GS_BASE, and reports each 32nd value with four bytes. Port
// 0x508 says what to do with interrupts: 0 leaves them off, 1 takes them. Handlers report their
// vector with one byte. A TSC that runs backwards is reported as 0xbad with two bytes.
guest_code!(
    generates,
    "mov ecx, 0x1b", // x2APIC mode, APIC on
    "rdmsr",
    "or eax, 0xc00",
    "wrmsr",
    "xor edx, edx",
    "mov ecx, 0x80f",
    "mov eax, 0x1ff",
    "wrmsr",
    "mov al, 0xff", // all inputs of the 8259s masked
    "out 0x21, al",
    "out 0xa1, al",
    "mov rax, cr4", // SSE
    "or eax, 0x200",
    "mov cr4, rax",
    "mov edi, 0x3410", // gates of the IDT at 0x3000
    "lea rax, [rip + 41f]",
    "call 6f",
    "lea rax, [rip + 42f]",
    "call 6f",
    "lidt [rip + 5f]",
    "mov ecx, 0x832", // timer: TSC deadline, vector 0x41
    "xor edx, edx",
    "mov eax, 0x40041",
    "wrmsr",
    "mfence",
    "rdtsc", // in some 100 ms
    "shl rdx, 32",
    "or rax, rdx",
    "add rax, 0x10000000",
    "mov rdx, rax",
    "shr rdx, 32",
    "mov ecx, 0x6e0",
    "wrmsr",
    "mov r12d, 1",
    "xor r15d, r15d",
    "1: mov r14d, 32",
    "2: imul r12, r12, 0x19660d",
    "add r12, 0x3c6ef35f",
    "mov [0x200000], r12",
    "movdqu xmm0, [0x200000]",
    "mov qword ptr [0x200000], 0",
    "movdqu [0x200000], xmm0",
    "mov rax, [0x200000]",
    "mov rdx, rax",
    "shr rdx, 32",
    "and edx, 0x7fff", // canonical
    "mov ecx, 0xc0000102",
    "wrmsr",
    "rdmsr",
    "shl rdx, 32",
    "or rax, rdx",
    "mov r12, rax",
    "dec r14d",
    "jnz 2b",
    "mov edx, 0x500",
    "mov eax, r12d",
    "out dx, eax",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "cmp rax, r15",
    "mov r15, rax",
    "jae 3f",
    "mov edx, 0x500",
    "mov eax, 0xbad",
    "out dx, ax",
    "3: mov edx, 0x508",
    "in al, dx",
    "cli",
    "cmp al, 1",
    "jne 1b",
    "sti",
    "nop",
    "nop",
    "jmp 1b",
    "41: push rax",
    "mov al, 0x41",
    "jmp 8f",
    "42: push rax",
    "mov al, 0x42",
    "8: push rcx",
    "push rdx",
    "mov edx, 0x500",
    "out dx, al",
    "xor eax, eax", // end of interrupt
    "xor edx, edx",
    "mov ecx, 0x80b",
    "wrmsr",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "iretq",
    "6: mov [rdi], ax", // writes an interrupt gate for RAX at RDI
    "mov dword ptr [rdi + 2], 0x8e000010",
    "mov word ptr [rdi + 4], 0x8e00",
    "shr rax, 16",
    "mov [rdi + 6], ax",
    "mov qword ptr [rdi + 8], 0",
    "add edi, 16",
    "ret",
    "5: .word 0xfff",
    ".quad 0x3000",
);

/// What the guest reports 32 steps after `low` (its lower half).
fn next_report(state: &mut u64) -> u32 {
    for _ in 0..32 {
        *state = state.wrapping_mul(0x19_660d).wrapping_add(0x3c6e_f35f);
        *state &= 0x7fff_ffff_ffff;
    }
    *state as u32
}

/// Answers the guest's question what to do with interrupts.
#[derive(Default)]
struct Switch(AtomicU8);

impl BusDevice for Switch {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(self.0.load(Ordering::Acquire));
    }
    fn write(&self, _offset: u64, _data: &[u8]) {}
}

struct Twin {
    guest: Running,
    switch: Arc<Switch>,
    vectors: Arc<dyn MsiVectors>,
}

/// A machine with the devices of this test; `state` and memory of another one if it is to go on
/// there.
fn machine(vcpus: u8, from: Option<(&MachineState, &[u8])>) -> Twin {
    let mut guest = Guest::new(config(generates(), vcpus));
    let switch = Arc::new(Switch::default());
    let handle = guest.vm.handle();
    handle.pio_bus().map(0x508, 1, switch.clone()).unwrap();
    let vectors = guest.vm.msi_vectors(1).unwrap();
    if let Some((state, memory)) = from {
        handle
            .ram()
            .memory()
            .write_slice(memory, GuestAddress(0))
            .unwrap();
        guest.vm.restore(state).unwrap();
    }
    Twin {
        guest: guest.start(),
        switch,
        vectors,
    }
}

fn save(handle: &VmHandle) -> (Vec<u8>, Vec<u8>) {
    let mut memory = vec![0; MEMORY as usize];
    let state = handle
        .quiesce(Duration::from_secs(10), |quiesced| {
            handle
                .ram()
                .memory()
                .read_slice(&mut memory, GuestAddress(0))
                .unwrap();
            quiesced.save().unwrap()
        })
        .unwrap();
    (state.to_bytes().unwrap(), memory)
}

/// Follows the generator from `state` until both interrupts were taken, and a little more.
fn follow(twin: &Twin, mut state: u64) {
    let (mut taken, mut left) = (Vec::new(), 50);
    while left > 0 {
        match twin.guest.report_with_width() {
            (4, value) => {
                assert_eq!(value, next_report(&mut state), "a step lost or done twice");
                if taken.len() == 2 {
                    left -= 1;
                }
            }
            (1, vector) => taken.push(vector),
            other => panic!("the TSC ran backwards: {other:x?}"),
        }
    }
    taken.sort_unstable();
    assert_eq!(taken, [0x41, 0x42], "each interrupt once");
}

#[test]
fn a_machine_saved_in_the_middle_goes_on_elsewhere_with_what_is_pending() {
    let original = machine(2, None);
    let mut state = 1;
    for _ in 0..20 {
        assert_eq!(original.guest.report(), next_report(&mut state));
    }
    // Pending from now on, since the guest takes no interrupts; the timer is, or will be.
    let message = MsiMessage {
        address: 0xfee0_0000,
        data: 0x42,
    };
    original.vectors.route(0, Some(message));
    original.vectors.trigger(0);
    original.guest.handle.pause().unwrap();
    for (_, value) in original.guest.reports.try_iter() {
        assert_eq!(value, next_report(&mut state));
    }
    let (bytes, memory) = save(&original.guest.handle);
    let saved = MachineState::from_bytes(&bytes).unwrap();

    let twin = machine(2, Some((&saved, &memory)));
    twin.switch.0.store(1, Ordering::Release);
    follow(&twin, state);
    // Messages go where they went, without the device having said so.
    twin.vectors.trigger(0);
    loop {
        match twin.guest.report_with_width() {
            (4, _) => {}
            (1, vector) => break assert_eq!(vector, 0x42),
            other => panic!("{other:x?}"),
        }
    }
    // A reset loads it anew, as if it had never been elsewhere.
    twin.switch.0.store(0, Ordering::Release);
    twin.guest.handle.reset().unwrap();
    let start = next_report(&mut 1);
    while twin.guest.report() != start {}
    twin.guest.power_off();

    original.switch.0.store(1, Ordering::Release);
    original.guest.handle.resume().unwrap();
    follow(&original, state);
    original.guest.power_off();
}

#[test]
fn a_machine_that_is_rewound_takes_what_was_pending_each_time_once() {
    let twin = machine(2, None);
    let handle = &twin.guest.handle;
    let mut state = 1;
    for _ in 0..20 {
        assert_eq!(twin.guest.report(), next_report(&mut state));
    }
    let message = MsiMessage {
        address: 0xfee0_0000,
        data: 0x42,
    };
    twin.vectors.route(0, Some(message));
    twin.vectors.trigger(0);
    handle.pause().unwrap();
    for (_, value) in twin.guest.reports.try_iter() {
        assert_eq!(value, next_report(&mut state));
    }
    handle.mark("pending", Duration::from_secs(10)).unwrap();
    for _ in 0..5 {
        twin.switch.0.store(1, Ordering::Release);
        handle.resume().unwrap();
        follow(&twin, state);
        // Elsewhere by then, and one more: it is not taken, or the guest dies of it, and both are
        // rewound.
        twin.switch.0.store(0, Ordering::Release);
        let elsewhere = MsiMessage {
            data: 0x43,
            ..message
        };
        twin.vectors.route(0, Some(elsewhere));
        twin.vectors.trigger(0);
        handle.pause().unwrap();
        handle
            .rewind(Some("pending"), Duration::from_secs(10))
            .unwrap();
        twin.guest.drain();
    }
    handle.resume().unwrap();
    twin.guest.report();
    twin.guest.power_off();
}

/// A vector without a gate: a fault in delivering a fault, twice, and the guest is to be reset.
/// Rewound at every moment of that, it goes on from the mark.
#[test]
fn a_machine_that_is_rewound_forgets_a_triple_fault_under_way() {
    let twin = machine(2, None);
    let handle = &twin.guest.handle;
    let mut state = 1;
    for _ in 0..20 {
        assert_eq!(twin.guest.report(), next_report(&mut state));
    }
    handle.pause().unwrap();
    for (_, value) in twin.guest.reports.try_iter() {
        assert_eq!(value, next_report(&mut state));
    }
    handle.mark("before", Duration::from_secs(10)).unwrap();
    let message = MsiMessage {
        address: 0xfee0_0000,
        data: 0x43,
    };
    for turn in 0..300 {
        handle.resume().unwrap();
        let mut expected = state;
        for _ in 0..3 {
            let report = twin.guest.report();
            assert_eq!(report, next_report(&mut expected), "turn {turn}");
        }
        twin.switch.0.store(1, Ordering::Release);
        twin.vectors.route(0, Some(message));
        twin.vectors.trigger(0);
        let start = Instant::now();
        while start.elapsed() < Duration::from_micros(turn) {
            std::hint::spin_loop();
        }
        handle.pause().unwrap();
        twin.switch.0.store(0, Ordering::Release);
        handle
            .rewind(Some("before"), Duration::from_secs(10))
            .unwrap();
        twin.guest.drain();
    }
    handle.resume().unwrap();
    twin.guest.power_off();
}

#[test]
fn a_machine_can_be_handed_on_again_and_again() {
    let mut guest = machine(1, None);
    let mut state = 1;
    for _ in 0..8 {
        for _ in 0..5 {
            assert_eq!(guest.guest.report(), next_report(&mut state));
        }
        guest.guest.handle.pause().unwrap();
        for (_, value) in guest.guest.reports.try_iter() {
            assert_eq!(value, next_report(&mut state));
        }
        let (bytes, memory) = save(&guest.guest.handle);
        guest.guest.power_off();
        let saved = MachineState::from_bytes(&bytes).unwrap();
        guest = machine(1, Some((&saved, &memory)));
    }
    guest.guest.power_off();
}

const MSR_IA32_TSC: u32 = 0x10;

fn host_tsc() -> u64 {
    // SAFETY: every processor with KVM has the instruction.
    unsafe { std::arch::x86_64::_rdtsc() }
}

fn tsc(vcpus: &mut PausedVcpus<'_>, index: usize) -> u64 {
    let entry = kvm_msr_entry {
        index: MSR_IA32_TSC,
        ..Default::default()
    };
    let mut msrs = Msrs::from_entries(&[entry]).unwrap();
    let vcpu = vcpus.get(index).unwrap();
    assert_eq!(vcpu.get_msrs(&mut msrs).unwrap(), 1);
    msrs.as_slice()[0].data
}

#[test]
fn time_stamp_counters_go_on_from_one_moment_on_all_vcpus() {
    let original = machine(4, None);
    original.guest.report();
    original.guest.handle.pause().unwrap();
    let host_before = host_tsc();
    let before = original
        .guest
        .handle
        .with_paused(|vcpus| tsc(vcpus, 0))
        .unwrap();
    let (bytes, memory) = save(&original.guest.handle);
    let after = original
        .guest
        .handle
        .with_paused(|vcpus| tsc(vcpus, 0))
        .unwrap();
    // A state that waited: time stood still for the guest, and goes on from where it was.
    std::thread::sleep(Duration::from_millis(300));
    let start = Instant::now();
    let saved = MachineState::from_bytes(&bytes).unwrap();
    let twin = machine(4, Some((&saved, &memory)));
    let khz = twin
        .guest
        .handle
        .with_paused(|vcpus| {
            for other in 1..4 {
                let (first, between, last) = (tsc(vcpus, 0), tsc(vcpus, other), tsc(vcpus, 0));
                assert!((first..=last).contains(&between), "vCPU {other} is off");
                assert!(first >= before, "{first} {before}");
            }
            vcpus.get(0).unwrap().get_tsc_khz().unwrap()
        })
        .unwrap();
    let now = twin
        .guest
        .handle
        .with_paused(|vcpus| tsc(vcpus, 0))
        .unwrap();
    // KVM without a second stage cannot offset TSCs: guests have the host's, before and after.
    let host_now = host_tsc();
    if (host_before..host_now).contains(&before) && (host_before..host_now).contains(&now) {
        skipped::skip(
            "vmm::state (TSCs go on from where they were)",
            "this KVM cannot offset TSCs",
        );
        twin.guest.power_off();
        return original.guest.power_off();
    }
    // No more than what has passed since, and half of that for inexact frequencies.
    let passed = start.elapsed().as_micros() as u64 * u64::from(khz) / 1000;
    assert!(now <= after + passed * 3 / 2, "{now} {after} {passed}");
    twin.guest.power_off();
    original.guest.power_off();
}
