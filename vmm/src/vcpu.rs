//! A vCPU's thread: runs guest code, sends what leaves it to the devices, and calls the trap
//! handler.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, kvm_run};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};
use vm_memory::GuestAddress;

use crate::exits::ExitKind;
use crate::gate::Pass;
use crate::lifecycle::Request;
use crate::machine::Machine;
use crate::post_mortem;
use crate::trap::{TRAP_PORTS, TrapContext, TrapOutcome};

/// Exits that the completion of one instruction may take at most: an MMIO store of 64 bytes takes
/// eight. A string instruction of a hostile guest would go on for ever; it is left in the middle.
const MAX_COMPLETION_EXITS: usize = 16;

/// What happened in the guest that its thread has to deal with between two runs.
enum Flow {
    /// Nothing: run on.
    Continue,
    /// The vCPU wrote `value` to trap port `port`.
    Trap { port: u16, value: u8 },
    /// The machine cannot go on.
    Fail(String),
}

/// Ends the machine if a vCPU's thread panics: it would go on without that vCPU otherwise.
struct PanicGuard<'a> {
    machine: &'a Machine,
    index: u8,
}

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let reason = format!("a device failed on the thread of vCPU {}", self.index);
            self.machine.requests.push(Request::Fail(reason));
        }
    }
}

/// The body of a vCPU thread; returns when the machine stops.
pub(crate) fn run(machine: &Arc<Machine>, index: u8) {
    let _panic_guard = PanicGuard { machine, index };
    let vcpu = &machine.vcpus[usize::from(index)];
    let guard = {
        let mut fd = vcpu.fd.lock().unwrap_or_else(PoisonError::into_inner);
        machine.gate.enter(index, &mut fd)
    };
    while machine.gate.pass(index) == Pass::Run {
        let mut fd = vcpu.fd.lock().unwrap_or_else(PoisonError::into_inner);
        machine.mark_entered();
        vcpu.incomplete.store(false, Ordering::Release);
        if let Err(reason) = run_until_kicked(machine, index, &mut fd) {
            machine.ram.end_if_template_was_cut();
            let state = post_mortem::describe(&fd, &vcpu.exits, &machine.ram);
            machine.requests.push(Request::Fail(format!(
                "vCPU {index} stopped: {reason}\n{state}"
            )));
        }
    }
    drop(guard);
}

/// Runs guest code until the gate wants the thread. Then all registers are complete.
fn run_until_kicked(machine: &Arc<Machine>, index: u8, fd: &mut VcpuFd) -> Result<(), String> {
    let mut io_pending = false;
    while !machine.gate.attention(index) {
        match enter_guest(machine, index, fd)? {
            None => {}
            Some(Flow::Continue) => io_pending = true,
            Some(Flow::Fail(reason)) => return Err(reason),
            Some(Flow::Trap { port, value }) => {
                // The run that completes the `out` brings the handler's registers along.
                fd.set_sync_valid_reg(SyncReg::Register);
                fd.set_sync_valid_reg(SyncReg::SystemRegister);
                let completed = complete(machine, index, fd);
                fd.clear_sync_valid_reg(SyncReg::Register);
                fd.clear_sync_valid_reg(SyncReg::SystemRegister);
                completed?;
                io_pending = false;
                trap(machine, index, fd, port, value);
            }
        }
    }
    if io_pending {
        complete(machine, index, fd)?;
    }
    settle_registers(fd)
}

/// Gives KVM the registers that a trap handler set for the next run, now that others may look at
/// them before it.
fn settle_registers(fd: &mut VcpuFd) -> Result<(), String> {
    let dirty = SyncReg::Register as u64;
    if fd.get_kvm_run().kvm_dirty_regs & dirty != 0 {
        fd.set_regs(&fd.sync_regs().regs)
            .map_err(|error| format!("KVM_SET_REGS: {error}"))?;
        fd.clear_sync_dirty_reg(SyncReg::Register);
    }
    Ok(())
}

/// Completes the instruction whose I/O was just done, without running another one: only then are
/// the registers those behind it.
fn complete(machine: &Arc<Machine>, index: u8, fd: &mut VcpuFd) -> Result<(), String> {
    for _ in 0..MAX_COMPLETION_EXITS {
        fd.set_kvm_immediate_exit(1);
        match enter_guest(machine, index, fd)? {
            None => return Ok(()),
            Some(Flow::Fail(reason)) => return Err(reason),
            // A trap in the middle of a string instruction is none.
            Some(Flow::Continue | Flow::Trap { .. }) => {}
        }
    }
    fd.set_kvm_immediate_exit(0);
    machine.vcpus[usize::from(index)]
        .incomplete
        .store(true, Ordering::Release);
    Ok(())
}

/// One `KVM_RUN`. `None` if a signal or `immediate_exit` ended it, which is taken back then.
fn enter_guest(machine: &Arc<Machine>, index: u8, fd: &mut VcpuFd) -> Result<Option<Flow>, String> {
    let run: *const kvm_run = fd.get_kvm_run();
    let exits = &machine.vcpus[usize::from(index)].exits;
    let gone = machine.bar_slots.gone();
    match fd.run() {
        Ok(VcpuExit::IoOut(port, data)) => {
            // SAFETY: KVM filled the `io` part of the structure for this exit, and the mapping
            // lives as long as `fd`.
            let size = usize::from(unsafe { (*run).__bindgen_anon_1.io.size }.max(1));
            if TRAP_PORTS.contains(&port) && machine.has_trap_handler() {
                exits.count(ExitKind::Trap, port.into());
                let value = data.first().copied().unwrap_or_default();
                return Ok(Some(Flow::Trap { port, value }));
            }
            exits.count(ExitKind::IoOut, port.into());
            for item in data.chunks(size) {
                machine.pio.write(u64::from(port), item);
            }
        }
        Ok(VcpuExit::IoIn(port, data)) => {
            exits.count(ExitKind::IoIn, port.into());
            // SAFETY: as above.
            let size = usize::from(unsafe { (*run).__bindgen_anon_1.io.size }.max(1));
            for item in data.chunks_mut(size) {
                machine.pio.read(u64::from(port), item);
            }
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            exits.count(ExitKind::MmioRead, address);
            is_no_memory(machine, address);
            machine.mmio.read(address, data);
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            exits.count(ExitKind::MmioWrite, address);
            is_no_memory(machine, address);
            machine.mmio.write(address, data);
        }
        Ok(VcpuExit::Shutdown) => {
            exits.count(ExitKind::Shutdown, 0);
            machine.ram.end_if_template_was_cut();
            let state = post_mortem::describe(fd, exits, &machine.ram);
            tracing::warn!("triple fault on vCPU {index}: the machine restarts\n{state}");
            machine.requests.push(Request::Reset);
        }
        Ok(VcpuExit::Intr) => exits.count(ExitKind::Interrupted, 0),
        Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {
            exits.count(ExitKind::DirtyRing, 0);
            if let Err(error) = machine.dirty.lock().empty_full_ring(index) {
                return Ok(Some(Flow::Fail(error.to_string())));
            }
            // Nothing of an instruction is open.
            return Ok(None);
        }
        // An error too, for which KVM says the address.
        Ok(VcpuExit::MemoryFault { gpa, .. }) => {
            exits.count(ExitKind::Other, 0);
            return Ok(unreachable_memory(machine, gone, Some(gpa)));
        }
        Ok(other) => {
            exits.count(ExitKind::Other, 0);
            return Ok(Some(Flow::Fail(describe(&other, run))));
        }
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
            exits.count(ExitKind::Interrupted, 0);
            fd.set_kvm_immediate_exit(0);
            return Ok(None);
        }
        Err(error) if error.errno() == libc::EFAULT => {
            exits.count(ExitKind::Other, 0);
            return Ok(unreachable_memory(machine, gone, None));
        }
        Err(error) => {
            exits.count(ExitKind::Other, 0);
            return Ok(Some(Flow::Fail(format!("KVM_RUN: {error}"))));
        }
    }
    Ok(Some(Flow::Continue))
}

/// KVM could not reach some memory, at `address` if it is known. Where that was a function's
/// registers, which are gone now, the instruction is as it was, and is begun again. `gone` is
/// [`crate::bar_slots::BarSlots::gone`] of before.
fn unreachable_memory(machine: &Machine, gone: u64, address: Option<u64>) -> Option<Flow> {
    if machine.bar_slots.withdraw_what_is_lost(gone, address) {
        return None;
    }
    let at = address.map_or_else(String::new, |at| format!(" at {at:#x}"));
    let error = std::io::Error::from_raw_os_error(libc::EFAULT);
    Some(Flow::Fail(format!("KVM_RUN: {error}{at}")))
}

/// A KVM that interprets an instruction takes memory that it cannot reach for a device.
fn is_no_memory(machine: &Machine, address: u64) {
    if machine.ram.page_at(GuestAddress(address)).is_some() {
        machine.ram.end_if_template_was_cut();
    }
}

fn describe(exit: &VcpuExit<'_>, run: *const kvm_run) -> String {
    match exit {
        VcpuExit::InternalError => {
            // SAFETY: KVM filled this part for this exit; the caller's vCPU keeps the mapping.
            let suberror = unsafe { (*run).__bindgen_anon_1.internal.suberror };
            format!("KVM internal error {suberror}")
        }
        VcpuExit::FailEntry(reason, _) => format!("the processor refused entry ({reason:#x})"),
        other => format!("unexpected exit {other:?}"),
    }
}

fn trap(machine: &Arc<Machine>, index: u8, fd: &mut VcpuFd, port: u16, value: u8) {
    let Some(handler) = machine.trap_handler() else {
        return;
    };
    let outcome = handler.on_trap(&mut TrapContext {
        vcpu: fd,
        index,
        port,
        value,
    });
    match outcome {
        TrapOutcome::Resume => {}
        TrapOutcome::Reset => machine.requests.push(Request::Reset),
        TrapOutcome::PowerOff => machine.requests.push(Request::PowerOff),
    }
}
