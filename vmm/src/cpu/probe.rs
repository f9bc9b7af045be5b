//! What a processor below us does is asked for by trying it in a VM of its own.
//!
//! XSETBV always leaves the guest on Intel processors (volume 3, section 26.1.2) and where KVM asks
//! for it on AMD's (volume 2, section 15.9); KVM then knows XCR0, tells the guest the size of XSAVE
//! areas, and loads XCR0 at each entry. QEMU's emulated AMD processor lets it pass (seen with 7.2):
//! KVM goes on with XCR0 as after power-on, CPUID contradicts what the guest has set, and what it
//! has set is gone at the next entry. A guest must not be shown XSAVE there.

use std::arch::x86_64::{__cpuid, CpuidResult};
use std::sync::OnceLock;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::error::Error;
use crate::kvm::create_empty_vm;

/// Leaf 1, ECX of the host's own CPUID: it is a guest itself.
const ECX_HYPERVISOR: u32 = 1 << 31;
/// What a hypervisor calls itself (Linux, `arch/x86/kernel/cpu/hypervisor.c`): EBX, ECX and EDX of
/// this leaf.
const HYPERVISOR_NAME: u32 = 0x4000_0000;
/// A processor that QEMU emulates (QEMU, `target/i386/cpu.c`).
const EMULATED: [u8; 12] = *b"TCGTCGTCGTCG";
/// Where the code is.
const CODE: GuestAddress = GuestAddress(0x1000);
/// Enables x87 and SSE state in XCR0, and halts.
const SET_XCR0: [u8; 13] = [
    0x31, 0xc9, // xor ecx, ecx
    0x31, 0xd2, // xor edx, edx
    0xb8, 3, 0, 0, 0, // mov eax, 3
    0x0f, 0x01, 0xd1, // xsetbv
    0xf4, // hlt
];
/// Signals that may interrupt the few instructions before the probe is given up.
const MAX_INTERRUPTIONS: usize = 1000;

/// What the host's processor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Processor {
    Real,
    /// QEMU's.
    Emulated,
    /// The host is a guest.
    BelowUs,
}

impl Processor {
    /// By leaf 1 and leaf 0x4000_0000 of its CPUID.
    fn of(features: CpuidResult, name: CpuidResult) -> Self {
        let words = [name.ebx, name.ecx, name.edx].map(u32::to_le_bytes);
        match features.ecx & ECX_HYPERVISOR {
            0 => Self::Real,
            _ if words.concat() == EMULATED => Self::Emulated,
            _ => Self::BelowUs,
        }
    }
}

/// Whether KVM hears of it when a guest sets XCR0. Asked once a process, and only where the host is
/// a guest itself: real processors do. Of one that says that it is emulated it is not counted on:
/// to make and to end a VM for that takes such a processor longer than most of a VM's start.
pub(super) fn xsetbv_reaches_kvm(kvm: &Kvm) -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        match Processor::of(__cpuid(1), __cpuid(HYPERVISOR_NAME)) {
            Processor::Real => return true,
            Processor::Emulated => {
                tracing::info!("this host's processor is emulated: guests have no XSAVE");
                return false;
            }
            Processor::BelowUs => {}
        }
        match xcr0_after_xsetbv(kvm) {
            Ok(3) => true,
            Ok(xcr0) => {
                tracing::info!(
                    xcr0,
                    "this host's processor does not tell KVM of XSETBV: guests have no XSAVE"
                );
                false
            }
            Err(error) => {
                tracing::warn!(%error, "cannot try XSETBV: guests have no XSAVE");
                false
            }
        }
    })
}

/// XCR0 as KVM knows it after a guest set it to 3.
fn xcr0_after_xsetbv(kvm: &Kvm) -> Result<u64, Error> {
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x2000)])
        .map_err(|error| Error::Host {
            what: "map a page",
            source: std::io::Error::other(error),
        })?;
    let fault = |error: vm_memory::GuestMemoryError| Error::Host {
        what: "write a page",
        source: std::io::Error::other(error),
    };
    memory.write_slice(&SET_XCR0, CODE).map_err(fault)?;
    let host_address = memory.get_host_address(GuestAddress(0)).map_err(fault)?;
    let vm = create_empty_vm(kvm)?;
    let slot = kvm_userspace_memory_region {
        memory_size: 0x2000,
        userspace_addr: host_address as u64,
        ..Default::default()
    };
    // SAFETY: the range is all of `memory`, which lives longer than the VM and its vCPU.
    unsafe { vm.set_user_memory_region(slot) }.map_err(Error::kvm("take guest memory"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(Error::kvm("create a vCPU"))?;
    let cpuid = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(Error::kvm("list CPUID leaves"))?;
    vcpu.set_cpuid2(&cpuid).map_err(Error::kvm("set CPUID"))?;
    let mut sregs = vcpu
        .get_sregs()
        .map_err(Error::kvm("read special registers"))?;
    // Protected mode with flat segments, no paging, CR4.OSXSAVE.
    let code = kvm_segment {
        limit: 0xffff_ffff,
        selector: 8,
        type_: 0b1011,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: 16,
        type_: 0b0011,
        ..code
    };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr0 |= 1;
    sregs.cr4 |= 1 << 18;
    vcpu.set_sregs(&sregs)
        .map_err(Error::kvm("set special registers"))?;
    let regs = kvm_regs {
        rip: CODE.0,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(Error::kvm("set registers"))?;
    for _ in 0..MAX_INTERRUPTIONS {
        match vcpu.run() {
            Ok(VcpuExit::Intr) => {}
            Ok(_) => break,
            Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => {}
            Err(error) => return Err(Error::kvm("run a vCPU")(error)),
        }
    }
    let xcrs = vcpu.get_xcrs().map_err(Error::kvm("read XCR0"))?;
    Ok(xcrs.xcrs[0].value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_emulated_processor_is_told_from_a_real_one_and_from_another_hypervisors() {
        let leaf = |words: [u32; 4]| {
            let [eax, ebx, ecx, edx] = words;
            CpuidResult { eax, ebx, ecx, edx }
        };
        let named = |name: &[u8; 12]| {
            let word = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
            leaf([0x4000_0001, word(0), word(4), word(8)])
        };
        let guest = leaf([0, 0, ECX_HYPERVISOR, 0]);
        for (features, name, expected) in [
            (guest, b"TCGTCGTCGTCG", Processor::Emulated),
            (guest, b"KVMKVMKVM\0\0\0", Processor::BelowUs),
            (guest, b"TCGTCGTCGTCH", Processor::BelowUs),
            // What a real one says there is the highest leaf's again.
            (leaf([0; 4]), b"TCGTCGTCGTCG", Processor::Real),
        ] {
            assert_eq!(Processor::of(features, named(name)), expected, "{name:?}");
        }
    }
}
