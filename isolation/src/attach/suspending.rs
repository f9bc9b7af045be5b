//! Has a driver's own suspend and resume functions called in a live guest
//! ([`crate::suspend_resume`]).

use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_sregs};

use super::arm::text_of;
use super::{AttachError, Isolator, live, physical_bits};
use crate::guest::btf::Btf;
use crate::guest::paging::{AddressSpace, VirtMemory};
use crate::guest::symbols::SymbolTable;
use crate::suspend_resume::{DriverCalls, SuspendError, SuspendResume};

impl Isolator {
    /// Has the next write of `word` to the [`crate::suspend_resume::ATTRIBUTE`] of a device that
    /// `module` drives call these functions of the driver.
    pub fn begin_suspend_resume(
        &self,
        calls: DriverCalls,
        module: &str,
        sections: &[(String, u64)],
        symbols: &SymbolTable,
        types: &Btf,
        word: &[u8],
    ) -> Result<(), AttachError> {
        let memory = self.vm.ram().memory().clone();
        self.vm.with_paused(|vcpus| {
            let mut suspending = self.suspending();
            SuspendResume::end_earlier(&mut suspending, &memory)?;
            let vcpu = vcpus.get(0).ok_or(AttachError::NoKernelTables)?;
            let cpuid = vcpu
                .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
                .map_err(|error| AttachError::Kvm("KVM_GET_CPUID2", error))?;
            let bits = physical_bits(&cpuid);
            let text = text_of(module, sections)?;
            let (_, space) = live::kernel_tables(vcpus, bits, text, &memory)?;
            let virt = VirtMemory {
                space,
                memory: &*memory,
            };
            let which = (module, word);
            *suspending = Some(SuspendResume::arm(
                calls, which, types, symbols, &virt, bits,
            )?);
            if let Some(armed) = self.modules().get_mut(module) {
                armed.device_begins_anew();
            }
            Ok(())
        })?
    }

    /// What came of the calls that were begun, and how long they took together. If one of them has
    /// not returned, its return is waited for by the gate, and this has to be asked again.
    pub fn end_suspend_resume(&self) -> Result<Duration, AttachError> {
        let memory = self.vm.ram().memory().clone();
        self.vm
            .with_paused(|_| {
                let mut suspending = self.suspending();
                match suspending.take().map(|one| one.disarm(&memory)) {
                    None => Err(SuspendError::NotReached),
                    Some(Ok(result)) => result,
                    Some(Err(out)) => {
                        let error = out.out();
                        *suspending = Some(*out);
                        Err(error)
                    }
                }
            })?
            .map_err(AttachError::from)
    }

    pub(crate) fn suspending(&self) -> MutexGuard<'_, Option<SuspendResume>> {
        self.suspending
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Goes on with a suspend or resume, if a vCPU came to its gate. The registers to go on with.
    pub(crate) fn suspend_step(
        &self,
        at: u64,
        regs: &kvm_regs,
        sregs: &kvm_sregs,
    ) -> Option<kvm_regs> {
        let mut suspending = self.suspending();
        let suspending = suspending.as_mut()?;
        let memory = self.vm.ram().memory().clone();
        let bits = suspending.physical_bits;
        let virt = VirtMemory {
            space: AddressSpace::from_registers(sregs.cr3, sregs.cr4, sregs.efer, bits),
            memory: &*memory,
        };
        suspending.step(at, regs, &virt)
    }
}
