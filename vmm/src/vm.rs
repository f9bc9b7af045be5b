//! Making a machine, giving it devices, and running it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use devices::bus::Bus;
use devices::dma::DmaSpace;
use devices::irq::{IrqLine, MsiVectors};
use devices::pci::bus::{
    CONFIG_PORTS, CONFIG_PORTS_LEN, ConfigPorts, ECAM_BUS_BYTES, Ecam, PciBus, SharedFunction,
    Windows,
};
use devices::pci::config::InterruptPin;
use devices::serial::{COM1_IRQ, COM1_PORT, Serial, SerialBackend, UART_PORTS};
use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, RemoteEndpoint, SubscriberOps,
};
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::Bytes;

use crate::boot::{OpenPayload, Payload};
use crate::cpu::state::{ChipState, VcpuState};
use crate::cpu::{cpuid, regs};
use crate::error::Error;
use crate::exits::ExitCounters;
use crate::gate::{Gate, install_kick_handler};
use crate::handle::VmHandle;
use crate::irq::{Gsi, GsiRouting, LineInput};
use crate::lifecycle::{Request, Requests};
use crate::machine::{Machine, Operations, Phase};
use crate::memory::{GuestRam, MemoryError};
use crate::power::{
    KEYBOARD_COMMAND_PORT, KeyboardController, POWER_PORT_COUNT, PowerDevice, RESET_PORT,
    RESET_VECTOR_CODE, ResetControl,
};
use crate::vcpu::{self, Vcpu};
use crate::{MAX_VCPUS, acpi, layout};

/// What a machine is made of.
#[derive(Debug)]
pub struct VmConfig {
    /// Guest memory in bytes, a multiple of 4 KiB.
    pub memory_bytes: u64,
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

/// What the event loop serves.
pub type SharedSubscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// A place for a PCI device, see [`Vm::reserve_pci_slot`].
pub struct PciSlot {
    number: u8,
    lines: Arc<[Arc<Gsi>]>,
}

impl PciSlot {
    /// Device number on bus 0.
    pub fn number(&self) -> u8 {
        self.number
    }

    /// The slot's interrupt pin, for the device that will be put there.
    pub fn intx_line(&self, pin: InterruptPin) -> Arc<dyn IrqLine> {
        let gsi = layout::pci_gsi(self.number, pin as u8);
        Arc::new(LineInput::new(self.lines[gsi as usize].clone()))
    }
}

/// A machine. It is made, given devices, and run once, to its end.
pub struct Vm {
    machine: Arc<Machine>,
    payload: OpenPayload,
    events: EventManager<SharedSubscriber>,
    lines: Arc<[Arc<Gsi>]>,
    routing: Arc<GsiRouting>,
    windows: Windows,
    next_slot: u8,
    serial: Arc<Mutex<Serial>>,
    power_on: PowerOnState,
    on_guest_reset: OnGuestReset,
}

/// State of what is in KVM, as after power-on.
struct PowerOnState {
    vcpus: Vec<VcpuState>,
    chips: ChipState,
}

impl Vm {
    /// Makes a machine with memory, vCPUs, interrupt controllers, a serial port and an empty PCI
    /// bus. Files of the payload are opened and checked; nothing runs yet.
    pub fn new(config: VmConfig) -> Result<Self, Error> {
        if !(1..=MAX_VCPUS).contains(&config.vcpus) {
            return Err(Error::VcpuCount(config.vcpus));
        }
        let payload = OpenPayload::open(config.payload)?;
        let kvm = open_kvm()?;
        let supported = cpuid::supported(&kvm)?;
        let windows = windows(cpuid::physical_address_bits(&supported));
        let ram = GuestRam::new(config.memory_bytes)?;
        if ram.end().0 > windows.memory64.0 {
            let (asked, limit) = (config.memory_bytes, windows.memory64.0);
            return Err(MemoryError::MoreThanAddressable { asked, limit }.into());
        }
        let vm = Arc::new(create_vm(&kvm, &ram)?);
        let mut vcpus = Vec::new();
        for index in 0..config.vcpus {
            let fd = vm
                .create_vcpu(u64::from(index))
                .map_err(Error::kvm("create a vCPU"))?;
            let cpuid = cpuid::for_vcpu(&kvm, &supported, index, config.vcpus)?;
            fd.set_cpuid2(&cpuid).map_err(Error::kvm("set CPUID"))?;
            regs::set_local_interrupts(&fd)?;
            vcpus.push(fd);
        }
        let msrs = kvm.get_msr_index_list().map_err(Error::kvm("list MSRs"))?;
        let power_on = PowerOnState {
            vcpus: vcpus
                .iter()
                .map(|vcpu| VcpuState::save(&kvm, vcpu, &msrs))
                .collect::<Result<_, _>>()?,
            chips: ChipState::save(&vm)?,
        };

        let host = |what| move |source| Error::Host { what, source };
        install_kick_handler().map_err(host("install a signal handler"))?;
        let gate = Arc::new(Gate::new(config.vcpus));
        let requests = Arc::new(Requests::new(gate.clone()).map_err(host("create an eventfd"))?);
        let lines: Arc<[Arc<Gsi>]> = (0..layout::IO_APIC_PINS)
            .map(|number| Arc::new(Gsi::new(vm.clone(), number)))
            .collect();
        let line = |gsi: u32| Arc::new(LineInput::new(lines[gsi as usize].clone()));
        let serial = Serial::new(line(u32::from(COM1_IRQ)), config.console)
            .map_err(host("set up the serial console"))?;
        let (pio, mmio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let machine = Arc::new(Machine {
            vcpus: vcpus
                .into_iter()
                .map(|fd| Vcpu {
                    fd: Mutex::new(fd),
                    exits: ExitCounters::default(),
                })
                .collect(),
            pci: Arc::new(PciBus::new(pio.clone(), mmio.clone())),
            power: Arc::new(PowerDevice::new(requests.clone(), line(layout::POWER_GSI))),
            operations: Mutex::new(Operations {
                phase: Phase::Created,
                paused: false,
            }),
            trap: RwLock::new(None),
            first_entry_ns: AtomicU64::new(0),
            resets: AtomicU64::new(0),
            reset_hooks: Mutex::new(Vec::new()),
            vm: vm.clone(),
            kvm,
            ram,
            pio,
            mmio,
            gate,
            requests,
        });
        let mut this = Self {
            routing: Arc::new(GsiRouting::new(vm)),
            payload,
            events: EventManager::new().map_err(Error::EventLoop)?,
            lines,
            windows,
            next_slot: 1,
            serial: Arc::new(Mutex::new(serial)),
            power_on,
            on_guest_reset: config.on_guest_reset,
            machine,
        };
        this.map_fixed_devices();
        Ok(this)
    }

    fn map_fixed_devices(&mut self) {
        let machine = self.machine.clone();
        let requests = &machine.requests;
        let ports: [(u64, u64, Arc<dyn devices::bus::BusDevice>); 5] = [
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
                self.serial.clone(),
            ),
            (
                u64::from(layout::POWER_PORTS),
                u64::from(POWER_PORT_COUNT),
                machine.power.clone(),
            ),
            (
                u64::from(KEYBOARD_COMMAND_PORT),
                1,
                Arc::new(KeyboardController(requests.clone())),
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
        self.events.add_subscriber(self.serial.clone());
        self.events
            .add_subscriber(Arc::new(Mutex::new(Waker(machine.requests.clone()))));
    }

    /// Controls the machine from other threads and after [`Vm::run`] has begun.
    pub fn handle(&self) -> VmHandle {
        VmHandle::new(self.machine.clone())
    }

    /// All of guest memory, for a device.
    pub fn dma_space(&self) -> DmaSpace {
        DmaSpace::new(self.machine.ram.memory().clone())
    }

    /// The next free slot of the PCI bus.
    pub fn reserve_pci_slot(&mut self) -> Result<PciSlot, Error> {
        if self.next_slot >= devices::pci::bus::SLOT_COUNT {
            return Err(Error::NoFreeSlot);
        }
        let number = self.next_slot;
        self.next_slot += 1;
        Ok(PciSlot {
            number,
            lines: self.lines.clone(),
        })
    }

    /// Message-signalled vectors for one function.
    pub fn msi_vectors(&self, count: u16) -> Result<Arc<dyn MsiVectors>, Error> {
        Ok(Arc::new(self.routing.vectors(count)?))
    }

    /// Puts a device into its slot. Devices that need the event loop are to be given to
    /// [`Vm::add_subscriber`] too.
    pub fn add_pci(&mut self, slot: &PciSlot, function: SharedFunction) -> Result<(), Error> {
        Ok(self.machine.pci.insert(slot.number, function)?)
    }

    /// Lets the event loop serve `subscriber`.
    pub fn add_subscriber(&mut self, subscriber: SharedSubscriber) {
        self.events.add_subscriber(subscriber);
    }

    /// Changes the event loop's subscribers from other threads while it runs.
    pub fn event_loop(&self) -> RemoteEndpoint<SharedSubscriber> {
        self.events.remote_endpoint()
    }

    /// Starts the guest and serves it until the machine is turned off. The calling thread becomes
    /// the event loop's.
    pub fn run(&mut self) -> Result<ExitReason, Error> {
        let result = self.load_guest().and_then(|()| self.run_threads());
        self.machine.operations().phase = Phase::Stopped;
        result
    }

    fn run_threads(&mut self) -> Result<ExitReason, Error> {
        let mut threads = Vec::new();
        let mut result = Ok(());
        for index in 0..self.machine.vcpus.len() as u8 {
            let machine = self.machine.clone();
            let body = move || vcpu::run(&machine, index);
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
        self.machine.operations().phase = Phase::Started;
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
            let Some((count, request)) = self.machine.requests.take() else {
                continue;
            };
            match request {
                Request::Reset if self.on_guest_reset == OnGuestReset::Exit => {
                    return Ok(ExitReason::GuestReset);
                }
                Request::Reset => self.reset()?,
                Request::PowerOff => return Ok(ExitReason::GuestPowerOff),
                Request::Stop => return Ok(ExitReason::HostPowerOff),
                Request::Fail(reason) => return Err(Error::VcpuFailed(reason)),
            }
            for _ in 0..count {
                self.machine.gate.release();
            }
        }
    }

    /// Brings everything back to the state after power-on. The vCPUs are inhibited.
    fn reset(&mut self) -> Result<(), Error> {
        let machine = self.machine.clone();
        // Nobody looks at the vCPUs in between.
        let _operations = machine.operations();
        self.machine.gate.wait_all_parked();
        self.machine.pci.reset();
        self.serial
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .reset();
        self.machine.power.reset();
        self.power_on.chips.restore(&self.machine.vm)?;
        for (vcpu, state) in self.machine.lock_vcpus().iter().zip(&self.power_on.vcpus) {
            state.restore(vcpu)?;
        }
        self.machine.ram.clear()?;
        for hook in machine.reset_hooks().iter_mut() {
            hook();
        }
        self.load_guest()?;
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
            pci_slots: machine.pci.occupied(),
            windows: self.windows,
        };
        acpi::write(&machine.ram, &tables)?;
        machine
            .ram
            .memory()
            .write_slice(&RESET_VECTOR_CODE, layout::RESET_VECTOR)
            .map_err(|error| Error::Boot(error.into()))?;
        regs::write_boot_tables(&machine.ram)?;
        if let Some(boot_processor) = machine.lock_vcpus().first() {
            regs::set_entry(boot_processor, entry)?;
        }
        Ok(())
    }
}

/// Wakes the main loop for a request.
struct Waker(Arc<Requests>);

impl MutEventSubscriber for Waker {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(self.0.wake(), EventSet::IN)) {
            tracing::error!(%error, "the main loop will not hear requests");
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        // Only its readiness counts; the loop looks for requests after each round.
        let _ = self.0.wake().read();
    }
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

fn open_kvm() -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => Error::NoKvm,
        libc::EACCES | libc::EPERM => Error::KvmForbidden,
        _ => Error::KvmUnusable(error),
    })?;
    const API_VERSION: i32 = 12;
    if kvm.get_api_version() != API_VERSION {
        return Err(Error::KvmLacks("API version 12"));
    }
    let needed = [
        (Cap::Irqchip, "an in-kernel interrupt controller"),
        (Cap::Pit2, "a timer"),
        (Cap::UserMemory, "user memory"),
        (Cap::Irqfd, "irqfd"),
        (Cap::IrqRouting, "interrupt routing"),
        (Cap::ImmediateExit, "immediate exit"),
        (Cap::MpState, "vCPU run states"),
        (Cap::VcpuEvents, "vCPU events"),
        (Cap::Debugregs, "debug registers"),
        (Cap::Xsave, "extended registers"),
    ];
    match needed
        .into_iter()
        .find(|&(cap, _)| !kvm.check_extension(cap))
    {
        Some((_, name)) => Err(Error::KvmLacks(name)),
        None => Ok(kvm),
    }
}

fn create_vm(kvm: &Kvm, ram: &GuestRam) -> Result<VmFd, Error> {
    let vm = loop {
        match kvm.create_vm() {
            Ok(vm) => break vm,
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(Error::kvm("create a virtual machine")(error)),
        }
    };
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(Error::kvm("place its identity map"))?;
    vm.set_tss_address(layout::KVM_TSS)
        .map_err(Error::kvm("place its TSS"))?;
    vm.create_irq_chip()
        .map_err(Error::kvm("create interrupt controllers"))?;
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    vm.create_pit2(pit).map_err(Error::kvm("create a timer"))?;
    for region in ram.regions() {
        let slot = kvm_userspace_memory_region {
            slot: region.slot,
            flags: 0,
            guest_phys_addr: region.guest_address.0,
            memory_size: region.len,
            userspace_addr: region.host_address,
        };
        // SAFETY: the range is a mapping of `ram`, which the machine drops after its vCPUs, so no
        // guest code runs once it is gone; regions do not overlap.
        unsafe { vm.set_user_memory_region(slot) }.map_err(Error::kvm("take guest memory"))?;
    }
    Ok(vm)
}
