//! The main loop: the machine's threads, devices' events, requests to restart or end, and what
//! firmware does.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use event_manager::SubscriberOps;
use vm_memory::Bytes;

use crate::cpu::regs;
use crate::error::Error;
use crate::hotplug::Change;
use crate::lifecycle::{Request, Taken};
use crate::machine::Phase;
use crate::power::RESET_VECTOR_CODE;
use crate::state::Restore;
use crate::vm::{ExitReason, OnGuestReset, Vm};
use crate::{acpi, input, layout, vcpu};

impl Vm {
    /// Starts the guest and serves it until the machine is turned off. The calling thread becomes
    /// the event loop's.
    pub fn run(&mut self) -> Result<ExitReason, Error> {
        input::map_reset(&self.machine);
        let result = match self.restored {
            true => self.machine.renew_generation(),
            false => self.load_guest(),
        };
        let result = result.and_then(|()| self.run_threads());
        self.machine.operations().phase = Phase::Stopped;
        result
    }

    fn run_threads(&mut self) -> Result<ExitReason, Error> {
        // Before guest code runs: whoever hears of it finds a machine that is started.
        self.machine.operations().phase = Phase::Started;
        let mut threads = Vec::new();
        let mut result = Ok(());
        for index in 0..self.machine.vcpus.len() as u8 {
            let machine = self.machine.clone();
            let begin = self.vcpu_start.clone();
            let body = move || match begin.map_or(Ok(()), |begin| begin()) {
                Ok(()) => vcpu::run(&machine, index),
                Err(error) => {
                    let reason = format!("the thread of vCPU {index} cannot begin: {error}");
                    machine.requests.push(Request::Fail(reason));
                }
            };
            match std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(body)
            {
                Ok(thread) => threads.push(thread),
                Err(source) => {
                    result = Err(Error::Host {
                        what: "start a thread",
                        source,
                    });
                    break;
                }
            }
        }
        let result = result.and_then(|()| self.serve());
        self.machine.gate.stop();
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a vCPU thread panicked");
            }
        }
        result
    }

    /// The main loop: devices' events, and requests to restart or end.
    fn serve(&mut self) -> Result<ExitReason, Error> {
        loop {
            self.events.run().map_err(Error::EventLoop)?;
            self.serve_changes();
            let Some(taken) = self.machine.requests.take() else {
                continue;
            };
            match &taken.request {
                Request::Reset if self.on_guest_reset == OnGuestReset::Exit => {
                    return Ok(ExitReason::GuestReset);
                }
                Request::Reset => self.reset(&taken)?,
                Request::PowerOff => return Ok(ExitReason::GuestPowerOff),
                Request::Stop => return Ok(ExitReason::HostPowerOff),
                Request::Fail(reason) => return Err(Error::VcpuFailed(reason.clone())),
            }
            for _ in 0..taken.count {
                self.machine.gate.release();
            }
            self.machine.requests.done();
        }
    }

    /// Begins to serve devices that came, and ends it for those that went.
    fn serve_changes(&mut self) {
        for change in self.machine.hotplug.take_changes() {
            match change {
                Change::Serve(slot, subscribers) => {
                    let guarded = subscribers.into_iter().map(|subscriber| {
                        let guarded = self.machine.at_work.guard(subscriber);
                        self.events.add_subscriber(guarded)
                    });
                    self.plugged.insert(slot, guarded.collect());
                }
                Change::Forget(slot) => {
                    for id in self.plugged.remove(&slot).unwrap_or_default() {
                        if let Err(error) = self.events.remove_subscriber(id) {
                            tracing::error!(%error, slot, "a device that went is still served");
                        }
                    }
                    self.machine.hotplug.release(slot);
                }
            }
        }
    }

    /// Brings everything back to the state after power-on, as it was asked. The vCPUs are
    /// inhibited.
    fn reset(&mut self, asked: &Taken) -> Result<(), Error> {
        let machine = self.machine.clone();
        // Nobody looks at the vCPUs in between.
        let mut operations = machine.operations();
        if !machine.requests.is_of_now(asked) {
            return Ok(());
        }
        self.machine.gate.wait_all_parked();
        self.machine.hotplug.eject_leaving();
        self.serve_changes();
        self.machine.pci.reset();
        machine.serial().reset();
        if let Some(mut controller) = machine.i8042() {
            controller.reset();
        }
        self.machine.panic.reset();
        self.power_on
            .restore(&machine, &machine.lock_vcpus(), Restore::Reset)?;
        self.machine.ram.clear()?;
        for hook in machine.reset_hooks().iter_mut() {
            hook();
        }
        self.load_guest()?;
        operations.mixed = false;
        if std::mem::take(&mut operations.paused_by_mix) {
            operations.paused = false;
            self.machine.gate.release();
        }
        self.machine.resets.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// What firmware and boot loader do: PCI resources, tables, kernel, entry registers.
    fn load_guest(&mut self) -> Result<(), Error> {
        let machine = &self.machine;
        let entry = self.payload.load(&machine.ram)?;
        machine
            .pci
            .assign_resources(&self.windows, |slot, pin| layout::pci_gsi(slot, pin) as u8);
        let tables = acpi::Machine {
            vcpus: machine.vcpus.len() as u8,
            has_i8042: machine.i8042.get().is_some(),
            removable_slots: machine.hotplug.removable(),
            windows: self.windows,
        };
        acpi::write(&machine.ram, &tables)?;
        machine
            .ram
            .memory()
            .write_slice(&RESET_VECTOR_CODE, layout::RESET_VECTOR)
            .map_err(|error| Error::Boot(error.into()))?;
        let id = *machine
            .generation
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        id.write(&machine.ram)?;
        regs::write_boot_tables(&machine.ram)?;
        if let Some(boot_processor) = machine.lock_vcpus().first() {
            regs::set_entry(boot_processor, entry)?;
        }
        Ok(())
    }
}
