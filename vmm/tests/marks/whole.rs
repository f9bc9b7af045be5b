//! All of a machine at a mark, and whether it is so again.

use std::sync::atomic::Ordering;

use kvm_bindings::{kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xsave};
use vmm::{VmHandle, VmState};

use super::LIMIT;
use super::writer::{self, Writing, all_of};

type Registers = (kvm_regs, kvm_sregs, kvm_vcpu_events, Vec<u32>, Vec<i8>);

/// All that a guest can see of itself, time apart.
#[derive(PartialEq)]
pub struct Whole {
    pub memory: Vec<u8>,
    vcpus: Vec<Registers>,
    pub devices: vmm::DeviceStates,
}

pub fn whole(handle: &VmHandle) -> Whole {
    handle
        .quiesce(LIMIT, |quiesced| {
            let devices = quiesced.save_devices().unwrap();
            let vcpus = quiesced.vcpus().iter_mut().map(|vcpu| {
                let xsave: kvm_xsave = vcpu.get_xsave().unwrap();
                (
                    vcpu.get_regs().unwrap(),
                    vcpu.get_sregs().unwrap(),
                    vcpu.get_vcpu_events().unwrap(),
                    xsave.region.to_vec(),
                    vcpu.get_lapic().unwrap().regs.to_vec(),
                )
            });
            Whole {
                vcpus: vcpus.collect(),
                memory: all_of(handle),
                devices,
            }
        })
        .unwrap()
}

pub fn assert_same(now: &Whole, then: &Whole, what: &str) {
    let pages = writer::differing(&then.memory, &now.memory);
    assert!(pages.is_empty(), "{what}: pages {pages:x?} differ");
    for (index, (now, then)) in now.vcpus.iter().zip(&then.vcpus).enumerate() {
        assert_eq!(now.0, then.0, "{what}: registers of vCPU {index}");
        assert_eq!(now.1, then.1, "{what}: special registers of vCPU {index}");
        assert!(now == then, "{what}: other state of vCPU {index}");
    }
    assert!(now.devices == then.devices, "{what}: devices");
}

/// Goes back to `name` from wherever the guest is, and looks whether it is there.
pub fn rewind(writing: &Writing, name: &str, then: &Whole) -> u64 {
    let handle = writing.handle();
    let pulse = writing.pulse.swap(false, Ordering::AcqRel);
    handle.pause().unwrap();
    let rewound = handle.rewind(Some(name), LIMIT).unwrap();
    assert_eq!(handle.state(), VmState::Paused);
    assert_same(&whole(handle), then, name);
    handle.resume().unwrap();
    writing.pulse.store(pulse, Ordering::Release);
    rewound.pages
}

/// Sets a mark, and looks at the machine at it.
pub fn mark(writing: &Writing, name: &str) -> Whole {
    let handle = writing.handle();
    let pulse = writing.pulse.swap(false, Ordering::AcqRel);
    handle.pause().unwrap();
    handle.mark(name, LIMIT).unwrap();
    let then = whole(handle);
    handle.resume().unwrap();
    writing.pulse.store(pulse, Ordering::Release);
    then
}
