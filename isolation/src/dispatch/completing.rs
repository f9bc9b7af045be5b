//! Ends in a driver's place what it was given with a call that did not take place: a packet, a
//! block I/O, a request.

use devices::dma::GuestMemory;
use kvm_bindings::kvm_regs;
use vm_memory::Bytes;

use crate::compensation::guest_calls::GuestCalls;
use crate::dispatch::armed::{Armed, AtGate, arguments};
use crate::domain::effects::KernelCall;
use crate::guest::addr::Gva;
use crate::guest::paging::VirtMemory;

impl Armed {
    /// The call through `gate`, entered with the registers `entry`, was not run or was taken back
    /// as a whole, and its caller is to go on with `next`: what its value cannot say is done first.
    pub(crate) fn complete(
        &mut self,
        gate: u64,
        entry: &kvm_regs,
        next: kvm_regs,
        at: &AtGate<'_>,
    ) -> kvm_regs {
        let memory = self.domain.memories().1;
        let virt = VirtMemory {
            space: self.space(&at.sregs),
            memory: &memory,
        };
        let known = self.policy.as_ref().zip(self.gates.get(&gate));
        let completion = known.and_then(|(policy, known)| {
            let flags = (known.transmits, self.stopped || known.rests);
            let caller = virt.read_u64(Gva(entry.rsp)).ok().map(Gva);
            policy.completion(virt, gate, flags, &arguments(entry), caller)
        });
        let Some(completion) = completion else {
            return next;
        };
        if let Some((at, byte)) = completion.store
            && !store(virt, at.0, byte)
        {
            return next;
        }
        match completion.is_makeshift {
            true => tracing::warn!("a call that did not take place: {}", completion.what),
            false => tracing::debug!("a call that did not take place: {}", completion.what),
        }
        let (function, arguments) = completion.call;
        let call = KernelCall {
            function,
            arguments,
        };
        let finally = kvm_regs {
            rax: completion.value.unwrap_or(next.rax),
            ..next
        };
        self.run_guest_calls(GuestCalls::new(gate, vec![call], finally, None), at)
    }
}

/// Stores a byte in the guest; `false` if there is no memory.
fn store(virt: VirtMemory<'_, GuestMemory>, va: u64, byte: u8) -> bool {
    let at = virt.space.walk(virt.memory, Gva(va));
    at.is_ok_and(|at| virt.memory.write_obj(byte, at.gpa).is_ok())
}
