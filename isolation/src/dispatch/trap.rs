//! A vCPU at a gate: whose it is, and what it goes on with.

use std::sync::PoisonError;
use std::time::Instant;

use kvm_bindings::kvm_regs;
use vmm::trap::{TrapContext, TrapHandler, TrapOutcome};

use crate::attach::{GATE, Isolator, OUT_BYTES};
use crate::dispatch::armed::AtGate;

impl TrapHandler for Isolator {
    fn on_trap(&self, context: &mut TrapContext<'_>) -> TrapOutcome {
        let Ok(port) = u8::try_from(context.port) else {
            return TrapOutcome::Resume;
        };
        if port != GATE.entry && port != GATE.returning {
            return TrapOutcome::Resume;
        }
        let (regs, sregs) = context.registers();
        let start = Instant::now();
        let _others = self.vm.hold_others(context.index);
        let gate = regs.rip.wrapping_sub(OUT_BYTES);
        let watch = *self.watch();
        if let Some(watch) = watch.filter(|watch| port == GATE.entry && watch.gate == gate) {
            self.module_freed(watch, &regs, &sregs);
            let next = kvm_regs {
                rip: watch.body(),
                ..regs
            };
            context.set_regs(&next);
            return TrapOutcome::Resume;
        }
        if let Some(next) = self.suspend_step(gate, &regs, &sregs) {
            context.set_regs(&next);
            return TrapOutcome::Resume;
        }
        let mut modules = self.modules();
        let turned = modules.values().find_map(|armed| armed.turned(&regs));
        if let Some(next) = turned.filter(|_| port == GATE.returning) {
            context.set_regs(&next);
            return TrapOutcome::Resume;
        }
        let found = modules.values_mut().find(|armed| {
            if port == GATE.entry {
                armed.gates.contains_key(&gate)
            } else {
                let open = armed.spilled.get(&regs.rsp).map(|open| open.gate);
                let calling = armed.guest_calls.get(&regs.rsp).map(|calling| calling.gate);
                open.or(calling)
                    .is_some_and(|open| open + OUT_BYTES == gate)
            }
        });
        let Some(armed) = found else {
            // Code that may use I/O ports wrote to this one, or jumped into a gate.
            return TrapOutcome::Resume;
        };
        let functions = self.vm.pci_bus().functions_except(&armed.device_slots);
        let _devices: Vec<_> = functions
            .iter()
            .map(|function| function.lock().unwrap_or_else(PoisonError::into_inner))
            .collect();
        let mut at = AtGate {
            holding: start.elapsed(),
            regs,
            sregs,
            vcpu: context.vcpu,
            vm: self.vm.vm_fd(),
        };
        armed.give_up_hanging();
        let returning = port == GATE.returning;
        // A call that once had this stack and enters anew never came back.
        let (open, calling) = (
            armed.spilled.remove(&regs.rsp),
            armed.guest_calls.remove(&regs.rsp),
        );
        let mut next = match (open, calling) {
            (Some(open), _) if returning => armed.go_on(open, &at),
            (None, Some(calling)) if returning => armed.run_guest_calls(calling, &at),
            _ => armed.call(gate, 1, &at),
        };
        while let Some(again) = armed.again.take() {
            at.regs = again.entry;
            next = armed.call(again.gate, again.attempts.saturating_add(1), &at);
        }
        armed.let_device_go();
        armed.guard();
        context.set_regs(&next);
        armed.caller_runs_again();
        TrapOutcome::Resume
    }
}
