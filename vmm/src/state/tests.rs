//! States as bytes: what is refused, and that nothing of it panics.

#![allow(clippy::unwrap_used)]

use ::devices::serial::SerialBackend;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use vm_memory::GuestAddress;

use super::encoding::HEAD_BYTES;
use super::*;
use crate::memory::MemorySource;
use crate::{OnGuestReset, Payload, Vm, VmConfig};

fn vm(vcpus: u8, memory_bytes: u64) -> Vm {
    Vm::new(VmConfig {
        memory_bytes,
        memory: MemorySource::default(),
        vcpus,
        payload: Payload::Code {
            code: vec![0xf4],
            address: GuestAddress(0x10_0000),
        },
        console: SerialBackend::None,
        on_guest_reset: OnGuestReset::Restart,
    })
    .unwrap()
}

fn bytes(vm: &Vm) -> Vec<u8> {
    vm.power_on.to_bytes().unwrap()
}

/// Makes the checksum right again.
fn resealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let content = &bytes[HEAD_BYTES..];
    let (len, sum) = (content.len() as u32, crc32fast::hash(content));
    bytes[12..16].copy_from_slice(&len.to_le_bytes());
    bytes[16..20].copy_from_slice(&sum.to_le_bytes());
    bytes
}

#[test]
fn a_state_is_the_same_after_encoding_and_decoding() {
    let vm = vm(2, 4 << 20);
    let bytes = bytes(&vm);
    let again = MachineState::from_bytes(&bytes).unwrap();
    assert_eq!(again.to_bytes().unwrap(), bytes);
    assert!(bytes.len() < 2 * (16 << 10), "{} bytes", bytes.len());
}

#[test]
fn every_cut_and_every_flipped_bit_is_refused() {
    let bytes = bytes(&vm(1, 4 << 20));
    for len in 0..bytes.len() {
        assert!(MachineState::from_bytes(&bytes[..len]).is_err(), "{len}");
    }
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(MachineState::from_bytes(&flipped).is_err(), "bit {bit}");
    }
    let mut longer = bytes;
    longer.push(0);
    let refused = MachineState::from_bytes(&longer).unwrap_err();
    assert!(matches!(refused, StateError::Length { .. }), "{refused}");
}

#[test]
fn other_versions_and_other_machines_are_refused_with_the_reason() {
    let mut one = vm(1, 4 << 20);
    let mut bytes = bytes(&one);
    let two = vm(2, 4 << 20);
    let error = one.restore(&two.power_on).unwrap_err().to_string();
    assert!(error.contains("2 vCPUs, this one has 1"), "{error}");
    let error = one.restore(&vm(1, 8 << 20).power_on).unwrap_err();
    assert!(error.to_string().contains("bytes of memory"), "{error}");
    bytes[8] = 99;
    assert_eq!(
        MachineState::from_bytes(&bytes).unwrap_err(),
        StateError::Version {
            found: 99,
            known: STATE_VERSION
        }
    );
    bytes[0] = b'X';
    let refused = MachineState::from_bytes(&bytes).unwrap_err();
    assert_eq!(refused, StateError::NoState("the state of a machine"));
}

#[test]
fn a_route_of_a_device_that_is_not_there_is_refused() {
    let giving = vm(1, 4 << 20);
    let vectors = giving.msi_vectors(2).unwrap();
    let message = ::devices::irq::MsiMessage {
        address: 0xfee0_0000,
        data: 0x41,
    };
    vectors.route(1, Some(message));
    let state = MachineState::save(&giving.machine, &giving.machine.lock_vcpus()).unwrap();
    let mut taking = vm(1, 4 << 20);
    let error = taking.restore(&state).unwrap_err();
    assert!(
        matches!(error, Error::State(StateError::Route(25))),
        "{error}"
    );
    let _vectors = taking.msi_vectors(2).unwrap();
    taking.restore(&state).unwrap();
    assert_eq!(taking.machine.routing.save(), state.routes);
    // Vectors of a device that is gone are free again.
    drop(vectors);
    assert!(giving.machine.routing.save().is_empty());
    for _ in 0..20 {
        giving.msi_vectors(2000).unwrap();
    }
}

/// Whatever bytes with a right checksum say: no panic, and a state that decodes is taken or refused
/// by KVM.
#[test]
fn changed_content_is_decoded_or_refused_and_never_more_than_that() {
    let original = bytes(&vm(1, 4 << 20));
    let taking = vm(1, 4 << 20);
    let len = original.len();
    let changes = proptest::collection::vec((HEAD_BYTES..len, any::<u8>()), 1..4);
    let mut runner = TestRunner::new(Config::with_cases(256));
    let cut = proptest::option::weighted(0.2, HEAD_BYTES..len);
    runner
        .run(&(changes, cut), |(changes, cut)| {
            let mut bytes = original.clone();
            for (at, value) in changes {
                bytes[at] = value;
            }
            bytes.truncate(cut.unwrap_or(len));
            if let Ok(state) = MachineState::from_bytes(&resealed(bytes)) {
                // KVM has the last word.
                let _ = state.restore(&taking.machine, &taking.machine.lock_vcpus(), Restore::GoOn);
            }
            Ok(())
        })
        .unwrap();
}

/// What Linux guests depend on and KVM may list or not.
#[test]
fn registers_of_clocks_interrupts_and_memory_types_are_in_a_state() {
    let vm = vm(2, 4 << 20);
    // TSC_ADJUST, KVM's wall clock and system time, steal time, end of interrupt; memory types;
    // TSC_DEADLINE.
    let wanted = [
        0x3b,
        0x4b56_4d00,
        0x4b56_4d01,
        0x4b56_4d03,
        0x4b56_4d04,
        0x277,
        0x200,
        0x250,
        0x2ff,
        0x6e0,
    ];
    let (kvm, fd) = (&vm.machine.kvm, &vm.machine.lock_vcpus()[0]);
    let listed = kvm.get_msr_index_list().unwrap();
    for vcpu in &vm.power_on.vcpus {
        let saved: Vec<u32> = vcpu.msr_indices().collect();
        for index in wanted {
            let entry = kvm_bindings::kvm_msr_entry {
                index,
                ..Default::default()
            };
            let mut one = kvm_bindings::Msrs::from_entries(&[entry]).unwrap();
            let there = fd.get_msrs(&mut one).is_ok_and(|read| read == 1);
            assert_eq!(saved.contains(&index), there, "{index:#x}");
        }
        // The deadline is armed when everything else is there.
        let last = saved.last().copied();
        assert!(last == Some(0x6e0) || !listed.as_slice().contains(&0x6e0));
    }
}
