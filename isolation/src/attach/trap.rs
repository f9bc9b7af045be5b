//! A vCPU at a gate: whose it is, and what it goes on with.
//!
//! ```text
//!   others held ─┬─ gate of the removal watch, of suspend and resume, of a thread that is moved on: registers at once
//!                └─ a module's: devices held ─► enter, come back or be called back ─► again while it is to be retried
//! ```

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_regs, kvm_sregs};
use vmm::trap::{TrapContext, TrapHandler, TrapOutcome};

use crate::attach::Isolator;
use crate::dispatch::armed::{Armed, AtGate};
use crate::dispatch::serve::Standing;
use crate::guest::gate::{GATE, OUT_BYTES};

impl TrapHandler for Isolator {
    fn on_trap(&self, context: &mut TrapContext<'_>) -> TrapOutcome {
        let returning = match u8::try_from(context.port) {
            Ok(port) if port == GATE.entry => false,
            Ok(port) if port == GATE.returning => true,
            _ => return TrapOutcome::Resume,
        };
        let (regs, sregs) = context.registers();
        let start = Instant::now();
        let _others = self.vm.hold_others(context.index);
        let standing = Standing {
            at: regs.rip.wrapping_sub(OUT_BYTES),
            returning,
        };
        if let Some(next) = self.at_own_gate(standing, &regs, &sregs) {
            context.set_regs(&next);
            return TrapOutcome::Resume;
        }
        let mut modules = self.modules();
        let turned = modules.values().find_map(|armed| armed.turned(&regs));
        if let Some(next) = turned.filter(|_| returning) {
            context.set_regs(&next);
            return TrapOutcome::Resume;
        }
        let found = modules.values_mut();
        let Some(armed) = found.into_iter().find(|one| one.owns(standing, regs.rsp)) else {
            // Code that may use I/O ports wrote to this one, or jumped into a gate.
            return TrapOutcome::Resume;
        };
        self.at_module(armed, standing, (regs, sregs), start, context);
        TrapOutcome::Resume
    }
}

impl Isolator {
    /// What a vCPU goes on with that stands at a gate of no module: the removal watch, or suspend
    /// and resume.
    fn at_own_gate(
        &self,
        standing: Standing,
        regs: &kvm_regs,
        sregs: &kvm_sregs,
    ) -> Option<kvm_regs> {
        let watch = *self.watch();
        if let Some(watch) = watch.filter(|watch| !standing.returning && watch.gate == standing.at)
        {
            let is_done = self.module_freed(watch, regs, sregs);
            let rip = if is_done { watch.body() } else { watch.gate };
            return Some(kvm_regs { rip, ..*regs });
        }
        self.suspend_step(standing.at, regs, sregs)
            .or_else(|| self.text_fault_reached(standing.at, regs))
    }

    /// Serves a vCPU at a gate of a module, with all devices but the module's own held.
    fn at_module(
        &self,
        armed: &mut Armed,
        standing: Standing,
        (regs, sregs): (kvm_regs, kvm_sregs),
        start: Instant,
        context: &mut TrapContext<'_>,
    ) {
        let functions = self.vm.pci_bus().functions_except(&armed.device.slots);
        let _devices: Vec<_> = functions
            .iter()
            .map(|function| function.lock().unwrap_or_else(PoisonError::into_inner))
            .collect();
        let mut at = AtGate {
            reached: start,
            holding: Duration::ZERO,
            index: context.index,
            regs,
            sregs,
            vcpu: context.vcpu,
            vm: self.vm.vm_fd(),
            ports: self.vm.pio_bus(),
        };
        at.holding = start.elapsed();
        let next = armed.serve(standing, &mut at);
        context.set_regs(&next);
        armed.back_in_guest();
        armed.failures.caller_runs_again();
    }
}
