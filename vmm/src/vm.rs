//! Making a machine, giving it devices, and running it.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, OnceLock, RwLock};

use devices::bus::Bus;
use devices::dma::DmaSpace;
use devices::irq::MsiVectors;
use devices::pci::bus::{
    CONFIG_PORTS, CONFIG_PORTS_LEN, ConfigPorts, ECAM_BUS_BYTES, Ecam, PciBus, SharedFunction,
    Windows,
};
use devices::serial::{COM1_IRQ, COM1_PORT, Serial, SerialBackend, UART_PORTS};
use event_manager::{EventManager, SubscriberId, SubscriberOps};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::at_work::AtWork;
use crate::bar_slots::BarSlots;
use crate::boot::{OpenPayload, Payload};
use crate::cpu::cpuid::Shown;
use crate::cpu::regs;
use crate::dirty::DirtyTracking;
use crate::error::Error;
use crate::gate::{Gate, install_kick_handler};
use crate::generation::GenerationId;
use crate::handle::VmHandle;
use crate::hotplug::{HOTPLUG_PORT_COUNT, Hotplug, SharedSubscriber};
use crate::irq::{Gsi, GsiRouting, LineInput};
use crate::lifecycle::Requests;
use crate::machine::{Machine, Operations, Phase, Vcpu};
use crate::memory::{GuestRam, MemoryError, MemorySource};
use crate::power::{POWER_PORT_COUNT, PowerDevice, RESET_PORT, ResetControl};
use crate::slot::PciSlot;
use crate::state::devices::DeviceStates;
use crate::state::{MachineState, Restore};
use crate::waker::Waker;
use crate::{MAX_VCPUS, input, kvm, layout};

/// What a machine is made of.
#[derive(Debug)]
pub struct VmConfig {
    /// Guest memory in bytes, a multiple of 4 KiB.
    pub memory_bytes: u64,
    /// What is in it before the guest is loaded; of use with [`Vm::restore`].
    pub memory: MemorySource,
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// What it starts with.
    pub payload: Payload,
    /// The other end of its serial port.
    pub console: SerialBackend,
    /// What a restart by the guest does.
    pub on_guest_reset: OnGuestReset,
}

/// What happens when the guest restarts itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnGuestReset {
    /// It starts again in the same process.
    #[default]
    Restart,
    /// [`Vm::run`] returns [`ExitReason::GuestReset`].
    Exit,
}

/// Why a machine ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest turned it off.
    GuestPowerOff,
    /// The guest restarted it and [`OnGuestReset::Exit`] was asked for.
    GuestReset,
    /// [`VmHandle::power_off`].
    HostPowerOff,
}

/// A machine. It is made, given devices, and run once, to its end.
pub struct Vm {
    pub(crate) machine: Arc<Machine>,
    handle: VmHandle,
    pub(crate) payload: OpenPayload,
    pub(crate) events: EventManager<SharedSubscriber>,
    /// Devices that came while the machine ran, by slot.
    pub(crate) plugged: BTreeMap<u8, Vec<SubscriberId>>,
    pub(crate) windows: Windows,
    /// As after power-on.
    pub(crate) power_on: MachineState,
    /// It goes on from a state instead of being loaded.
    pub(crate) restored: bool,
    pub(crate) on_guest_reset: OnGuestReset,
    pub(crate) vcpu_start: Option<VcpuStart>,
}

/// What the thread of a vCPU does first.
pub(crate) type VcpuStart = Arc<dyn Fn() -> std::io::Result<()> + Send + Sync>;

impl Vm {
    /// Makes a machine with memory, vCPUs, interrupt controllers, a serial port and an empty PCI
    /// bus. Files of the payload are opened and checked; nothing runs yet.
    pub fn new(config: VmConfig) -> Result<Self, Error> {
        if !(1..=MAX_VCPUS).contains(&config.vcpus) {
            return Err(Error::VcpuCount(config.vcpus));
        }
        let payload = OpenPayload::open(config.payload)?;
        let kvm = kvm::open()?;
        let shown = Shown::on_this_host(&kvm)?;
        let windows = windows(shown.physical_address_bits());
        let ram = memory_below(windows.memory64.0, config.memory, config.memory_bytes)?;
        let (vm, has_dirty_rings) = kvm::create_vm(&kvm, &ram)?;
        let vm = Arc::new(vm);
        let vcpus = create_vcpus(&vm, &shown, config.vcpus)?;
        let host = |what| move |source| Error::Host { what, source };
        install_kick_handler().map_err(host("install a signal handler"))?;
        let gate = Arc::new(Gate::new(config.vcpus));
        let requests = Arc::new(Requests::new(gate.clone()).map_err(host("create an eventfd"))?);
        let lines = lines(&vm);
        let line = |gsi: u32| Arc::new(LineInput::new(lines[gsi as usize].clone()));
        let serial = Serial::new(line(u32::from(COM1_IRQ)), config.console)
            .map_err(host("set up the serial console"))?;
        let (pio, mmio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let pci = Arc::new(PciBus::new(pio.clone(), mmio.clone()));
        let bar_slots = BarSlots::of(&pci, vm.clone(), windows);
        let power = Arc::new(PowerDevice::new(requests.clone(), line(layout::POWER_GSI)));
        let hotplug =
            Hotplug::new(pci.clone(), power.clone()).map_err(host("create an eventfd"))?;
        let ringed = if has_dirty_rings { &vcpus[..] } else { &[] };
        let dirty = DirtyTracking::new(&vm, ringed, &ram)?;
        let machine = Arc::new(Machine {
            dirty,
            vcpus: vcpus.into_iter().map(Vcpu::new).collect(),
            pci,
            power,
            hotplug: Arc::new(hotplug),
            panic: Arc::default(),
            serial: Arc::new(Mutex::new(serial)),
            i8042: OnceLock::new(),
            at_work: AtWork::default(),
            last_snapshot: Mutex::default(),
            generation: Mutex::new(GenerationId::random()?),
            lines,
            routing: Arc::new(GsiRouting::new(vm.clone())),
            operations: Mutex::new(Operations {
                phase: Phase::Created,
                paused: false,
                mixed: false,
                paused_by_mix: false,
            }),
            trap: RwLock::new(None),
            first_entry_ns: AtomicU64::new(0),
            resets: AtomicU64::new(0),
            reset_hooks: Mutex::new(Vec::new()),
            participants: Mutex::new(Vec::new()),
            outside: Mutex::new(None),
            vm: vm.clone(),
            bar_slots,
            kvm,
            ram,
            pio,
            mmio,
            gate,
            requests,
        });
        let power_on = MachineState::save(&machine, &machine.lock_vcpus())?;
        let mut this = Self {
            power_on,
            payload,
            events: EventManager::new().map_err(Error::EventLoop)?,
            plugged: BTreeMap::new(),
            windows,
            restored: false,
            on_guest_reset: config.on_guest_reset,
            vcpu_start: None,
            handle: VmHandle::new(machine.clone()),
            machine,
        };
        this.map_fixed_devices();
        Ok(this)
    }

    /// Has the thread of each vCPU do `begin` first, before the guest runs: it may give up rights
    /// that only others need. An error of it ends [`Self::run`].
    pub fn on_vcpu_start(
        &mut self,
        begin: impl Fn() -> std::io::Result<()> + Send + Sync + 'static,
    ) {
        self.vcpu_start = Some(Arc::new(begin));
    }

    fn map_fixed_devices(&mut self) {
        let machine = self.machine.clone();
        let requests = &machine.requests;
        let ports: [(u64, u64, Arc<dyn devices::bus::BusDevice>); 6] = [
            (
                u64::from(layout::HOTPLUG_PORTS),
                u64::from(HOTPLUG_PORT_COUNT),
                machine.hotplug.clone(),
            ),
            (u64::from(layout::PANIC_PORT), 1, machine.panic.clone()),
            (
                u64::from(RESET_PORT),
                1,
                Arc::new(ResetControl(requests.clone())),
            ),
            (
                CONFIG_PORTS,
                CONFIG_PORTS_LEN,
                Arc::new(ConfigPorts(machine.pci.clone())),
            ),
            (
                u64::from(COM1_PORT),
                u64::from(UART_PORTS),
                machine.serial.clone(),
            ),
            (
                u64::from(layout::POWER_PORTS),
                u64::from(POWER_PORT_COUNT),
                machine.power.clone(),
            ),
        ];
        for (start, len, device) in ports {
            if let Err(error) = machine.pio.map(start, len, device) {
                // Constants: none is empty or wraps.
                tracing::error!(%error, "fixed device not mapped");
            }
        }
        let ecam = Arc::new(Ecam(machine.pci.clone()));
        if let Err(error) = machine.mmio.map(layout::ECAM, ECAM_BUS_BYTES, ecam) {
            tracing::error!(%error, "ECAM not mapped");
        }
        self.add_subscriber(machine.serial.clone());
        self.events.add_subscriber(Arc::new(Mutex::new(Waker {
            requests: machine.requests.clone(),
            hotplug: machine.hotplug.clone(),
        })));
    }

    /// Controls the machine from other threads and after [`Vm::run`] has begun.
    pub fn handle(&self) -> VmHandle {
        self.handle.clone()
    }

    /// All of guest memory, for a device.
    pub fn dma_space(&self) -> DmaSpace {
        DmaSpace::new(self.machine.ram.memory().clone())
    }

    /// The next free slot of the PCI bus.
    pub fn reserve_pci_slot(&mut self) -> Result<PciSlot, Error> {
        PciSlot::reserve(&self.machine)
    }

    /// Message-signalled vectors for one function.
    pub fn msi_vectors(&self, count: u16) -> Result<Arc<dyn MsiVectors>, Error> {
        Ok(Arc::new(self.machine.routing.vectors(count)?))
    }

    /// Puts a device into its slot. Devices that need the event loop are to be given to
    /// [`Vm::add_subscriber`] too.
    pub fn add_pci(&mut self, slot: &PciSlot, function: SharedFunction) -> Result<(), Error> {
        slot.insert(function)
    }

    /// Lets the machine go on where another one was when `state` was taken, in place of being
    /// loaded. It has the same memory (the caller fills it) and number of vCPUs, and the same
    /// devices, added in the same order (those that came while it ran, by [`VmHandle::plug`]). Call
    /// this before [`Vm::run`], and [`Vm::restore_devices`] after it.
    pub fn restore(&mut self, state: &MachineState) -> Result<(), Error> {
        self.can_be(state)?;
        let vcpus = self.machine.lock_vcpus();
        state.restore(&self.machine, &vcpus, Restore::GoOn)?;
        drop(vcpus);
        self.restored = true;
        Ok(())
    }

    /// That this machine can be in that state, as far as can be seen without trying.
    pub(crate) fn can_be(&self, state: &MachineState) -> Result<(), Error> {
        state.fits(&self.machine)?;
        Ok(state.fits_processor_of(&self.power_on)?)
    }

    /// Gives the devices their states, after [`Vm::restore`] and before [`Vm::run`].
    ///
    /// # Errors
    /// The states are of other devices. The machine is not to be run then.
    pub fn restore_devices(&mut self, states: &DeviceStates) -> Result<(), Error> {
        states.restore(&self.machine)
    }

    /// Gives the machine a keyboard controller with a mouse, before [`Vm::run`] and, where it is to
    /// go on from a state, before that is put back. Without it there is what resets the machine at
    /// the controller's port, and nothing else of it.
    pub fn add_mouse(&mut self) {
        input::add_i8042(&self.machine);
    }

    /// Lets the event loop serve `subscriber`.
    pub fn add_subscriber(&mut self, subscriber: SharedSubscriber) {
        let guarded = self.machine.at_work.guard(subscriber);
        self.events.add_subscriber(guarded);
    }
}

/// Guest memory, all of it below `limit`.
fn memory_below(limit: u64, source: MemorySource, asked: u64) -> Result<GuestRam, MemoryError> {
    let ram = GuestRam::from(source, asked)?;
    if ram.end().0 > limit {
        return Err(MemoryError::MoreThanAddressable { asked, limit });
    }
    Ok(ram)
}

/// The inputs of the I/O APIC.
fn lines(vm: &Arc<VmFd>) -> Arc<[Arc<Gsi>]> {
    let line = |number| Arc::new(Gsi::new(vm.clone(), number));
    (0..layout::IO_APIC_PINS).map(line).collect()
}

/// `count` vCPUs as after power-on.
fn create_vcpus(vm: &VmFd, shown: &Shown, count: u8) -> Result<Vec<VcpuFd>, Error> {
    let create = |index| {
        let fd = vm
            .create_vcpu(u64::from(index))
            .map_err(Error::kvm("create a vCPU"))?;
        let cpuid = shown.for_vcpu(index, count).to_kvm()?;
        fd.set_cpuid2(&cpuid).map_err(Error::kvm("set CPUID"))?;
        regs::set_local_interrupts(&fd)?;
        Ok(fd)
    };
    (0..count).map(create).collect()
}

fn windows(physical_address_bits: u8) -> Windows {
    // KVM's second stage may have four levels only, so not more than 46 bits are counted on.
    let half = 1u64 << (physical_address_bits.clamp(33, 46) - 1);
    Windows {
        io: layout::PCI_IO,
        memory32: layout::PCI_MEMORY32,
        memory64: (half, half + layout::PCI_MEMORY64_BYTES.min(half)),
    }
}
