//! A machine as other threads and upper layers see it while it runs.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use devices::bus::Bus;
use devices::dma::DmaSpace;
use devices::i8042::I8042;
use devices::irq::MsiVectors;
use devices::pci::bus::{PciBus, SharedFunction};
use kvm_ioctls::{Kvm, VmFd};
use serde::Serialize;

use crate::error::Error;
use crate::exits::ExitCounts;
use crate::gate::on_vcpu_thread;
use crate::hotplug::SharedSubscriber;
use crate::lifecycle::Request;
use crate::machine::{Machine, Operations, Phase};
use crate::marks::kept::Marks;
use crate::memory::GuestRam;
use crate::paused::PausedVcpus;
use crate::refused::Refused;
use crate::slot::PciSlot;
use crate::trap::TrapHandler;

/// What a machine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Not started yet.
    Created,
    /// Guest code runs.
    Running,
    /// Paused from outside.
    Paused,
    /// Turned off; it does not start again.
    Stopped,
}

/// Figures of a machine at one moment.
#[derive(Debug, Clone, Serialize)]
pub struct VmStatus {
    /// What it is doing.
    pub state: VmState,
    /// Exits of each vCPU since the machine was made.
    pub exits: Vec<ExitCounts>,
    /// How often it was reset.
    pub resets: u64,
    /// The guest's kernel has told that it panicked, and was not reset since.
    pub panicked: bool,
    /// How often it has told so since the machine was made.
    pub panics: u64,
    /// `CLOCK_MONOTONIC` time in nanoseconds when guest code first ran.
    pub first_entry_ns: Option<u64>,
}

/// Controls a machine from any thread. Clones control the same machine.
#[derive(Clone)]
pub struct VmHandle {
    machine: Arc<Machine>,
    marks: Arc<Mutex<Marks>>,
}

impl VmHandle {
    pub(crate) fn new(machine: Arc<Machine>) -> Self {
        let marks = Arc::new(Mutex::new(Marks::new(machine.ram.size_bytes())));
        Self { machine, marks }
    }

    pub(crate) fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    /// The marks of the machine. Locked before the operations.
    pub(crate) fn kept_marks(&self) -> MutexGuard<'_, Marks> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`Self::kept_marks`], without waiting for who has them.
    pub(crate) fn kept_marks_if_free(&self) -> Option<MutexGuard<'_, Marks>> {
        match self.marks.try_lock() {
            Ok(marks) => Some(marks),
            Err(TryLockError::Poisoned(marks)) => Some(marks.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// What the machine is doing.
    pub fn state(&self) -> VmState {
        let operations = self.machine.operations();
        match (operations.phase, operations.paused) {
            (Phase::Stopped, _) => VmState::Stopped,
            (_, true) => VmState::Paused,
            (Phase::Created, false) => VmState::Created,
            (Phase::Started, false) => VmState::Running,
        }
    }

    /// Figures of the machine.
    pub fn status(&self) -> VmStatus {
        VmStatus {
            state: self.state(),
            exits: self
                .machine
                .vcpus
                .iter()
                .map(|vcpu| vcpu.exits.read())
                .collect(),
            resets: self.machine.resets.load(Ordering::Relaxed),
            panicked: self.machine.panic.panicked(),
            panics: self.machine.panic.panics(),
            first_entry_ns: match self.machine.first_entry_ns.load(Ordering::Relaxed) {
                0 => None,
                time => Some(time),
            },
        }
    }

    /// Stops guest code; returns when no vCPU runs any. Devices go on: what arrives meanwhile is
    /// put where the guest will find it. Do not call this with a device locked.
    pub fn pause(&self) -> Result<(), Refused> {
        let mut operations = self.machine.operations();
        self.can_wait(operations.phase)?;
        if operations.paused {
            return Err(Refused::AlreadyPaused);
        }
        operations.paused = true;
        self.machine.gate.inhibit();
        self.machine.gate.wait_all_parked();
        self.tell_guest_that_it_stopped();
        Ok(())
    }

    /// So that its watchdog finds no lock-up. KVM refuses where the guest does not use KVM's clock.
    fn tell_guest_that_it_stopped(&self) {
        for vcpu in self.machine.lock_vcpus() {
            let _ = vcpu.kvmclock_ctrl();
        }
    }

    /// Undoes [`VmHandle::pause`].
    pub fn resume(&self) -> Result<(), Refused> {
        let mut operations = self.machine.operations();
        if operations.phase == Phase::Stopped {
            return Err(Refused::Stopped);
        }
        if operations.mixed {
            return Err(Refused::HalfRewound);
        }
        if !std::mem::take(&mut operations.paused) {
            return Err(Refused::NotPaused);
        }
        // Again: a look at the vCPUs in between may have let the guest's clock take note of the
        // first time.
        self.tell_guest_that_it_stopped();
        self.machine.gate.release();
        Ok(())
    }

    /// Asks for a restart as after power-on. The main loop does it soon; guest code stops at once.
    pub fn reset(&self) -> Result<(), Refused> {
        self.request(Request::Reset)
    }

    /// Asks for the machine to be turned off, without regard to what the guest is doing.
    pub fn power_off(&self) -> Result<(), Refused> {
        self.request(Request::Stop)
    }

    /// Presses the power button: a guest that listens for it shuts down and turns itself off.
    pub fn press_power_button(&self) -> Result<(), Refused> {
        if self.machine.operations().phase == Phase::Stopped {
            return Err(Refused::Stopped);
        }
        self.machine.power.press_button();
        Ok(())
    }

    /// Wakes a guest that has suspended itself to idle (`echo freeze > /sys/power/state`), if it
    /// lets its serial port do so (`power/wakeup` of that `tty`): an interrupt that means nothing
    /// to one that is awake. Neither the power button does that, nor any other device: a kernel
    /// that sleeps has all interrupts off but those that are to wake it, and Linux never counts the
    /// generic event device's among them (`drivers/acpi/evged.c`).
    ///
    /// # Errors
    /// The machine has ended.
    pub fn wake(&self) -> Result<(), Refused> {
        if self.machine.operations().phase == Phase::Stopped {
            return Err(Refused::Stopped);
        }
        self.machine.serial().ring();
        Ok(())
    }

    fn request(&self, request: Request) -> Result<(), Refused> {
        if self.machine.operations().phase == Phase::Stopped {
            return Err(Refused::Stopped);
        }
        self.machine.requests.push(request);
        Ok(())
    }

    fn can_wait(&self, phase: Phase) -> Result<(), Refused> {
        if phase == Phase::Stopped {
            return Err(Refused::Stopped);
        }
        if on_vcpu_thread() {
            return Err(Refused::OnVcpuThread);
        }
        Ok(())
    }

    /// Calls `look` with all vCPUs in hand while none runs guest code and all registers are those
    /// between two instructions. A machine that was running goes on afterwards. Do not call this
    /// with a device locked, and do not wait for the event loop in `look`: it may be waiting for
    /// its end.
    pub fn with_paused<R>(
        &self,
        look: impl FnOnce(&mut PausedVcpus<'_>) -> R,
    ) -> Result<R, Refused> {
        self.at_gate(|_operations, vcpus| look(vcpus))
    }

    /// The same, with the operations in hand.
    pub(crate) fn at_gate<R>(
        &self,
        look: impl FnOnce(&mut Operations, &mut PausedVcpus<'_>) -> R,
    ) -> Result<R, Refused> {
        let mut operations = self.machine.operations();
        self.can_wait(operations.phase)?;
        self.machine.gate.inhibit();
        let _release = Release(&self.machine);
        self.machine.gate.wait_all_parked();
        let mut vcpus = PausedVcpus::new(self.machine.lock_vcpus());
        Ok(look(&mut operations, &mut vcpus))
    }

    /// Calls `work`, which works on devices on a thread that is not a vCPU's, while the machine is
    /// not at rest. It must not wait for vCPUs, and must not bring the machine to rest.
    pub fn with_devices<R>(&self, work: impl FnOnce() -> R) -> R {
        let _at_work = self.machine.at_work.lock();
        work()
    }

    /// Keeps all vCPUs but `index` out of the guest until the guard is dropped. To be called by a
    /// trap handler, with the number of its own vCPU. Returns when the others are out; if another
    /// vCPU holds, waits for it first.
    pub fn hold_others(&self, index: u8) -> HoldGuard<'_> {
        self.machine.gate.hold(index);
        HoldGuard {
            machine: &self.machine,
        }
    }

    /// All of guest memory, for a device.
    pub fn dma_space(&self) -> DmaSpace {
        DmaSpace::new(self.machine.ram.memory().clone())
    }

    /// The next free slot of the PCI bus.
    pub fn reserve_pci_slot(&self) -> Result<PciSlot, Error> {
        PciSlot::reserve(&self.machine)
    }

    /// Message-signalled vectors for one function.
    pub fn msi_vectors(&self, count: u16) -> Result<Arc<dyn MsiVectors>, Error> {
        Ok(Arc::new(self.machine.routing.vectors(count)?))
    }

    /// Puts a device into its slot while the machine runs, lets the event loop serve it and what
    /// belongs to it, and tells the guest to look for it.
    pub fn plug(
        &self,
        slot: &PciSlot,
        function: SharedFunction,
        subscribers: Vec<SharedSubscriber>,
    ) -> Result<(), Error> {
        slot.insert(function)?;
        self.machine.hotplug.came(slot.number(), subscribers);
        Ok(())
    }

    /// Asks the guest to let the device go that [`VmHandle::plug`] put into `slot`. It is taken out
    /// when the guest ejects it or restarts; [`VmHandle::is_plugged`] tells.
    pub fn unplug(&self, slot: u8) -> Result<(), Refused> {
        if self.machine.operations().phase == Phase::Stopped {
            return Err(Refused::Stopped);
        }
        match self.machine.hotplug.ask_back(slot) {
            true => Ok(()),
            false => Err(Refused::NotPlugged),
        }
    }

    /// Whether `slot` has a device that [`VmHandle::plug`] put there.
    pub fn is_plugged(&self, slot: u8) -> bool {
        self.machine.hotplug.is_removable(slot)
    }

    /// Attaches the one trap handler ([`crate::trap`]).
    pub fn attach_trap_handler(&self, handler: Arc<dyn TrapHandler>) -> Result<(), Refused> {
        let mut slot = self
            .machine
            .trap
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if slot.is_some() {
            return Err(Refused::TrapHandlerAttached);
        }
        *slot = Some(handler);
        Ok(())
    }

    /// Detaches the trap handler. A call of it that is under way goes on; inside
    /// [`VmHandle::with_paused`] there is none.
    pub fn detach_trap_handler(&self) {
        *self
            .machine
            .trap
            .write()
            .unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Calls `hook` at each reset from now on, when guest memory was emptied and before the guest
    /// is loaded again. The hook runs on the event loop's thread with the machine locked: it may
    /// read and write guest memory, but call no operation of this handle.
    pub fn on_reset(&self, hook: impl FnMut() + Send + 'static) {
        self.machine.reset_hooks().push(Box::new(hook));
    }

    /// Guest memory.
    pub fn ram(&self) -> &GuestRam {
        &self.machine.ram
    }

    /// The machine's VM in KVM.
    pub fn vm_fd(&self) -> &Arc<VmFd> {
        &self.machine.vm
    }

    /// The connection to KVM that the VM was made with.
    pub fn kvm(&self) -> &Kvm {
        &self.machine.kvm
    }

    /// The keyboard controller with its mouse, if [`crate::Vm::add_mouse`] gave it one. What is done
    /// with it has to be done inside [`VmHandle::with_devices`].
    pub fn i8042(&self) -> Option<Arc<Mutex<I8042>>> {
        self.machine.i8042.get().cloned()
    }

    /// Devices in the memory space.
    pub fn mmio_bus(&self) -> &Arc<Bus> {
        &self.machine.mmio
    }

    /// Devices in the I/O space.
    pub fn pio_bus(&self) -> &Arc<Bus> {
        &self.machine.pio
    }

    /// The PCI bus.
    pub fn pci_bus(&self) -> &Arc<PciBus> {
        &self.machine.pci
    }
}

/// Lets the vCPUs go on, whatever happens to the closure in between.
struct Release<'a>(&'a Machine);

impl Drop for Release<'_> {
    fn drop(&mut self) {
        self.0.gate.release();
    }
}

/// Other vCPUs are out of the guest as long as this lives. See [`VmHandle::hold_others`].
pub struct HoldGuard<'a> {
    machine: &'a Machine,
}

impl Drop for HoldGuard<'_> {
    fn drop(&mut self) {
        self.machine.gate.unhold();
    }
}
