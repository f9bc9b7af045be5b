//! Virtual machines that do nothing but exist, for a machine that is itself a host (the lab).
//!
//! Linux patches jumps in its own code when the first virtual machine comes and when the last one
//! goes (`preempt_notifier_key`, in the scheduler), and KVM does the same for the first local APIC
//! that is switched off and the first vCPU that has none (`apic_sw_disabled`,
//! `kvm_has_noapic_vcpu`). An emulator that translates code must notice that another processor has
//! just changed it; QEMU before 8.1 does not always, and goes on with the breakpoint that patching
//! puts there for a moment. Machines that stay keep those jumps as they are.

use std::fs::File;
use std::os::fd::OwnedFd;

use crate::fail::{Context, Result};
use crate::sys;

/// Keeps one machine with a vCPU whose local APIC is switched off, as all are at first, and one
/// with a vCPU that has no local APIC, until this process ends.
pub fn keep_machines() -> Result<()> {
    let make = |with_apic| -> std::io::Result<[OwnedFd; 2]> {
        let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
        let machine = sys::kvm_create_machine(&kvm)?;
        if with_apic {
            sys::kvm_create_interrupt_controller(&machine)?;
        }
        let vcpu = sys::kvm_create_vcpu(&machine)?;
        Ok([machine, vcpu])
    };
    for with_apic in [true, false] {
        let kept = make(with_apic).context(|| "make a virtual machine to keep".into())?;
        // Never closed while this process lives, and it is process 1.
        std::mem::forget(kept);
    }
    Ok(())
}
