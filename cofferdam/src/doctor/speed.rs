//! How fast a guest's kernel mode is, measured with a hand-made guest of a few instructions.
//!
//! Some hosts offer `/dev/kvm` but no second stage to it: guest user mode runs natively there and
//! guest kernel mode is interpreted, some hundred times slower. No flag tells; time does.
//!
//! ```text
//! 0x0000  free
//! 0x1000  PML4 ─► 0x2000 PDPT ─► 0x3000 PD ─► one 2 MiB page, identity
//! 0x4000  code, ring 0, 64-bit: n times the instruction, `out 0x10, al`, from the beginning again
//! ```

use std::time::Instant;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use serde::Serialize;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

const MEMORY_BYTES: usize = 2 << 20;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const CODE: u64 = 0x4000;
/// Present and writable (AMD64 manual volume 2, section 5.4).
const PTE_PRESENT_WRITE: u64 = 0x3;
/// Large page.
const PTE_PS: u64 = 1 << 7;
/// Protection and paging: CR0.PE, CR0.ET, CR0.PG.
const CR0: u64 = 1 | 1 << 4 | 1 << 31;
/// CR4.PAE.
const CR4: u64 = 1 << 5;
/// EFER.LME and EFER.LMA.
const EFER: u64 = 1 << 8 | 1 << 10;
const PORT: u16 = 0x10;

/// A measurement is repeated so often and the smallest value taken: the least disturbed one.
const REPEATS: usize = 12;
const LOOPS: u32 = 2000;
const COSTLY_LOOPS: u32 = 50;

/// Above this many nanoseconds an instruction guest kernel mode is emulated. Interpreters that were
/// measured need over 400, hardware below 1, an emulated processor with nested paging (the lab)
/// about 5.
const EMULATED_NS: f64 = 50.0;

/// A CR3 write that costs more than this part of a trapped instruction is itself trapped: shadow
/// paging.
const TRAPPED_PART: f64 = 0.5;

/// What translates guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SecondStage {
    /// The processor: EPT on Intel, NPT on AMD.
    Hardware,
    /// KVM's shadow page tables. Kernel mode runs natively, page-table changes trap.
    Shadow,
    /// Kernel mode is interpreted.
    Emulated,
}

/// Cost of a guest's kernel mode.
#[derive(Clone, Debug, Serialize)]
pub struct Speed {
    /// What the numbers say about the second stage.
    pub second_stage: SecondStage,
    /// A register-only kernel instruction, in nanoseconds.
    pub ns_per_instruction: f64,
    /// A `KVM_RUN` that comes straight back because of an `out`, in nanoseconds.
    pub exit_ns: f64,
    /// A trapped instruction that KVM answers itself (`cpuid`), in nanoseconds.
    pub trap_ns: f64,
    /// A write of CR3, in nanoseconds.
    pub cr3_write_ns: f64,
}

/// Runs the guest and measures.
///
/// # Errors
/// A line that says which step failed.
pub fn measure(kvm: &Kvm) -> Result<Speed, String> {
    let mut guest = Guest::new(kvm)?;
    let exit_ns = guest.time(&[], 1)?;
    let per_loop = |total: f64, loops: u32| ((total - exit_ns) / f64::from(loops)).max(0.01);
    // Two instructions a turn: DEC and JNZ.
    let ns_per_instruction = per_loop(guest.time(&[], LOOPS)?, LOOPS) / 2.0;
    // xor eax, eax; cpuid
    let trap_ns = per_loop(
        guest.time(&[0x31, 0xC0, 0x0F, 0xA2], COSTLY_LOOPS)?,
        COSTLY_LOOPS,
    );
    // mov rax, cr3; mov cr3, rax
    let cr3_write_ns = per_loop(
        guest.time(&[0x0F, 0x20, 0xD8, 0x0F, 0x22, 0xD8], COSTLY_LOOPS)?,
        COSTLY_LOOPS,
    );
    let second_stage = classify(ns_per_instruction, trap_ns, cr3_write_ns);
    Ok(Speed {
        second_stage,
        ns_per_instruction,
        exit_ns,
        trap_ns,
        cr3_write_ns,
    })
}

fn classify(ns_per_instruction: f64, trap_ns: f64, cr3_write_ns: f64) -> SecondStage {
    if ns_per_instruction > EMULATED_NS {
        SecondStage::Emulated
    } else if cr3_write_ns > trap_ns * TRAPPED_PART {
        SecondStage::Shadow
    } else {
        SecondStage::Hardware
    }
}

/// `mov esi, loops; again: body; dec esi; jnz again; out PORT, al; jmp start`
fn program(body: &[u8], loops: u32) -> Vec<u8> {
    let mut code = vec![0xBE];
    code.extend_from_slice(&loops.to_le_bytes());
    code.extend_from_slice(body);
    code.extend_from_slice(&[0xFF, 0xCE]);
    // Bodies are a few bytes: the displacements stay far from -128.
    code.extend_from_slice(&[0x75, (-(body.len() as i8) - 4) as u8]);
    code.extend_from_slice(&[0xE6, PORT as u8]);
    code.extend_from_slice(&[0xEB, (-(code.len() as i8) - 2) as u8]);
    code
}

struct Guest {
    vcpu: VcpuFd,
    // Fields are dropped in this order: the VM before the memory it uses.
    _vm: VmFd,
    memory: GuestMemoryMmap<()>,
}

impl Guest {
    fn new(kvm: &Kvm) -> Result<Self, String> {
        let step = |what: &'static str| move |e: kvm_ioctls::Error| format!("{what} failed: {e}");
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)])
            .map_err(|e| format!("cannot map {MEMORY_BYTES} bytes of guest memory: {e}"))?;
        for (at, entry) in [
            (PML4, PDPT | PTE_PRESENT_WRITE),
            (PDPT, PD | PTE_PRESENT_WRITE),
            (PD, PTE_PRESENT_WRITE | PTE_PS),
        ] {
            memory
                .write_obj(entry, GuestAddress(at))
                .map_err(|e| format!("cannot write guest memory: {e}"))?;
        }
        let vm = kvm.create_vm().map_err(step("KVM_CREATE_VM"))?;
        for (slot, region) in (0..).zip(memory.iter()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the mapping belongs to `memory`, which `Guest` drops after the VM.
            unsafe { vm.set_user_memory_region(region) }
                .map_err(step("KVM_SET_USER_MEMORY_REGION"))?;
        }
        let vcpu = vm.create_vcpu(0).map_err(step("KVM_CREATE_VCPU"))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(step("KVM_GET_SUPPORTED_CPUID"))?;
        vcpu.set_cpuid2(&cpuid).map_err(step("KVM_SET_CPUID2"))?;
        let mut sregs = vcpu.get_sregs().map_err(step("KVM_GET_SREGS"))?;
        let flat = kvm_segment {
            limit: u32::MAX,
            present: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        sregs.cs = kvm_segment {
            type_: 0xB,
            l: 1,
            selector: 0x8,
            ..flat
        };
        let data = kvm_segment {
            type_: 0x3,
            db: 1,
            selector: 0x10,
            ..flat
        };
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0, PML4, CR4, EFER);
        vcpu.set_sregs(&sregs).map_err(step("KVM_SET_SREGS"))?;
        Ok(Self {
            vcpu,
            _vm: vm,
            memory,
        })
    }

    /// Smallest time in nanoseconds from entering `body`, run `loops` times, to the exit at its
    /// end.
    fn time(&mut self, body: &[u8], loops: u32) -> Result<f64, String> {
        self.memory
            .write_slice(&program(body, loops), GuestAddress(CODE))
            .map_err(|e| format!("cannot write guest memory: {e}"))?;
        // The pending `out` of the measurement before is completed before registers are changed.
        self.vcpu.set_kvm_immediate_exit(1);
        if let Err(error) = self.vcpu.run()
            && error.errno() != libc::EINTR
        {
            return Err(format!("KVM_RUN failed: {error}"));
        }
        self.vcpu.set_kvm_immediate_exit(0);
        self.vcpu
            .set_regs(&kvm_regs {
                rip: CODE,
                rflags: 2,
                ..Default::default()
            })
            .map_err(|e| format!("KVM_SET_REGS failed: {e}"))?;
        let mut least = f64::INFINITY;
        for _ in 0..REPEATS {
            let begin = Instant::now();
            let exit = self
                .vcpu
                .run()
                .map_err(|e| format!("KVM_RUN failed: {e}"))?;
            let time_ns = begin.elapsed().as_nanos() as f64;
            match exit {
                VcpuExit::IoOut(PORT, _) => least = least.min(time_ns),
                other => {
                    return Err(format!(
                        "the test guest ended in an unexpected exit: {other:?}"
                    ));
                }
            }
        }
        Ok(least)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_of_the_program_go_where_they_should() {
        for body in [&[][..], &[0x31, 0xC0, 0x0F, 0xA2]] {
            let code = program(body, 7);
            let after_jnz = 5 + body.len() + 4;
            assert_eq!(
                after_jnz as i64 + i64::from(code[after_jnz - 1] as i8),
                5,
                "jnz goes to the body"
            );
            assert_eq!(
                code.len() as i64 + i64::from(code[code.len() - 1] as i8),
                0,
                "jmp goes to the start"
            );
        }
    }

    #[test]
    fn times_tell_the_second_stage() {
        assert_eq!(classify(620.0, 9000.0, 700.0), SecondStage::Emulated);
        assert_eq!(classify(0.3, 900.0, 150.0), SecondStage::Hardware);
        assert_eq!(classify(0.3, 900.0, 1400.0), SecondStage::Shadow);
        // The lab: everything is slow, the relation is what counts.
        assert_eq!(classify(6.0, 50_000.0, 2_000.0), SecondStage::Hardware);
    }
}
