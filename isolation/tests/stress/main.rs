//! Everything at once, on the host's real KVM: vCPUs that call an isolated function all the time, calls that fail, wait
//! in the guest or reach their device at random, timer interrupts, a device that writes words of its own into the pages
//! that calls write and raises its line, and gates that are taken out and put back meanwhile.
//!
//! No word that somebody wrote may be lost, no call may count twice or half, no register may change, every
//! interrupt must arrive. A few seconds by default; `COFFERDAM_STRESS_SECONDS` makes it longer.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code")]

mod guest;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use devices::bus::MutBusDevice;
use devices::irq::IrqLine;
use devices::pci::config::InterruptPin;
use devices::serial::SerialBackend;
use isolation::attach::after_fault::ReturnErrors;
use isolation::attach::device::{DeviceLost, HeldDevice, IsolatedDevice};
use isolation::attach::plan::Wanted;
use isolation::attach::status::ModuleStatus;
use isolation::attach::{IsolateRequest, Isolator};
use isolation::domain::supervisor::{DeviceAddress, DeviceState};
use isolation::guest::symbols::{SymbolTable, read_kallsyms};
use kvm_bindings::{KVM_IRQCHIP_IOAPIC, KVM_MP_STATE_RUNNABLE, kvm_irqchip, kvm_mp_state};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm::{OnGuestReset, Payload, Vm, VmConfig, VmHandle};

/// What does not come by then does not come.
const NEVER: Duration = Duration::from_secs(60);
/// Between two times that the gates are taken out and put back.
const ROUND: Duration = Duration::from_millis(700);
const MODULE: &str = "m";

/// The device: a register for each vCPU, a line, and words in guest memory.
struct Inner {
    registers: [u64; 8],
    line: Arc<dyn IrqLine>,
    /// When the line was raised, if it is.
    raised: Option<Instant>,
    interrupts: u64,
}

struct Device(Mutex<Inner>);

impl Device {
    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl IsolatedDevice for Device {
    fn hold(&self, with: &mut dyn FnMut(&mut dyn HeldDevice)) {
        let mut inner = self.lock();
        with(&mut Held {
            registers: &mut inner.registers,
            saved: None,
        });
    }
}

struct Held<'a> {
    registers: &'a mut [u64; 8],
    saved: Option<[u64; 8]>,
}

impl Held<'_> {
    fn index(at: DeviceAddress) -> usize {
        let DeviceAddress::Memory(gpa) = at else {
            panic!("the device has no ports");
        };
        (gpa - guest::DEVICE_GPA) as usize / 8
    }
}

impl HeldDevice for Held<'_> {
    fn owns(&self, gpa: u64) -> bool {
        (guest::DEVICE_GPA..guest::DEVICE_GPA + 64).contains(&gpa)
    }

    fn owns_port(&self, _port: u16) -> bool {
        false
    }

    fn read(&mut self, at: DeviceAddress, data: &mut [u8]) {
        let value = self.registers[Self::index(at)].to_le_bytes();
        data.copy_from_slice(&value[..data.len()]);
    }

    fn write(&mut self, at: DeviceAddress, data: &[u8]) {
        let mut value = [0; 8];
        value[..data.len()].copy_from_slice(data);
        self.registers[Self::index(at)] = u64::from_le_bytes(value);
    }

    fn checkpoint(&mut self) {
        self.saved = Some(*self.registers);
    }

    fn restore(&mut self) -> Result<(), DeviceLost> {
        *self.registers = self.saved.take().expect("a checkpoint");
        Ok(())
    }

    fn state(&self) -> Option<DeviceState> {
        None
    }

    fn undo(&mut self, _: &[(DeviceState, DeviceState)]) -> Result<(), String> {
        Err("not in parts".into())
    }

    fn transmitter_changed(&self, _: &DeviceState, _: &DeviceState) -> bool {
        false
    }

    fn memory(&self) -> Vec<(u64, u64)> {
        Vec::new()
    }

    fn freeze_interrupts(&mut self) {}

    fn withhold_interrupts(&mut self, _withhold: bool) {}

    fn silence(&mut self) {}
}

/// Where the guest's interrupt handler tells the device that it has come.
struct Acknowledge(Arc<Device>);

impl MutBusDevice for Acknowledge {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) {
        let mut inner = self.0.lock();
        if inner.raised.take().is_some() {
            inner.interrupts += 1;
        }
        inner.line.set_level(false);
    }
}

struct Reports(std::sync::mpsc::Sender<u32>);

impl MutBusDevice for Reports {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        // The test may have seen enough and gone.
        let _ = self.0.send(u32::from_le_bytes(data.try_into().unwrap()));
    }
}

/// Writes the device's words and raises its line, until it is told to stop; says what is wrong.
fn transfer(device: &Device, memory: &GuestMemoryMmap, stop: &AtomicBool) -> Result<u64, String> {
    let mut written = guest::BY_DEVICE.map(|_| 0u64);
    let mut random = 1u64;
    let mut transfers = 0;
    while !stop.load(Ordering::Relaxed) {
        let mut inner = device.lock();
        for (va, last) in guest::BY_DEVICE.into_iter().zip(&mut written) {
            let at = GuestAddress(guest::gpa_of(va));
            let now: u64 = memory.read_obj(at).unwrap();
            if now != *last {
                return Err(format!(
                    "the device wrote {last:#x} at {va:#x}, where {now:#x} is"
                ));
            }
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            *last = random;
            memory.write_obj(random, at).unwrap();
        }
        transfers += 1;
        match inner.raised {
            None => {
                inner.raised = Some(Instant::now());
                inner.line.set_level(true);
            }
            Some(since) if since.elapsed() > NEVER => {
                return Err(format!("interrupt {} was not taken", inner.interrupts + 1));
            }
            Some(_) => {}
        }
        drop(inner);
        std::thread::sleep(Duration::from_micros(random >> 32 & 0xff));
    }
    Ok(transfers)
}

struct Stress {
    handle: VmHandle,
    isolator: Arc<Isolator>,
    device: Arc<Device>,
    symbols: Arc<SymbolTable>,
    reports: Receiver<u32>,
    vcpus: u8,
    released: Vec<ModuleStatus>,
}

impl Stress {
    fn word(&self, va: u64) -> u64 {
        let at = GuestAddress(guest::gpa_of(va));
        self.handle.ram().memory().read_obj(at).unwrap()
    }

    /// As the device writes: whoever does not hold it may lose what he writes to a page that a call writes too.
    fn put(&self, va: u64, value: u64) {
        let _held = self.device.lock();
        let at = GuestAddress(guest::gpa_of(va));
        self.handle.ram().memory().write_obj(value, at).unwrap();
    }

    fn each(&self, word: u64) -> Vec<u64> {
        let vcpus = 0..self.vcpus;
        vcpus
            .map(|index| self.word(guest::per_cpu(index, word)))
            .collect()
    }

    fn isolate(&self) {
        let sections = [(".text", guest::DRIVER_TEXT), (".data", guest::DRIVER_DATA)];
        self.isolator
            .isolate(IsolateRequest {
                module: MODULE.into(),
                sections: sections.map(|(name, at)| (name.to_owned(), at)).to_vec(),
                symbols: self.symbols.clone(),
                types: None,
                wanted: Wanted::Named(vec!["function".into()]),
                model: None,
                guest_only: Vec::new(),
                device: Some(self.device.clone()),
                device_slot: None,
                budget: Duration::from_millis(100),
                policy: Box::new(ReturnErrors),
                sleep_limit: Duration::ZERO,
            })
            .unwrap();
    }

    /// Panics if a vCPU has reported that something is wrong.
    fn check(&self) {
        if let Ok(report) = self.reports.try_recv() {
            self.fail(&guest::meaning(report));
        }
    }

    fn fail(&self, what: &str) -> ! {
        let registers = self.handle.with_paused(|vcpus| {
            let regs = vcpus.iter_mut().map(|vcpu| vcpu.get_regs().unwrap());
            regs.map(|regs| format!("{regs:x?}\n")).collect::<String>()
        });
        let (done, failed) = (self.each(guest::SUCCEEDED), self.each(guest::FAILED));
        let ticks = self.each(guest::TICKS);
        panic!(
            "{what}\n{registers:?}\nsucceeded {done:?}, failed {failed:?}, ticks {ticks:?}\n{:?}",
            self.isolator.status()
        );
    }

    /// Waits until every vCPU's `word` has moved on by `count`.
    fn each_moves_on(&self, word: u64, count: u64) {
        let before = self.each(word);
        let start = Instant::now();
        let moved = |now: Vec<u64>| {
            now.iter()
                .zip(&before)
                .all(|(now, old)| *now >= old + count)
        };
        while !moved(self.each(word)) {
            self.check();
            if start.elapsed() > NEVER {
                self.fail(&format!(
                    "word {word} of a vCPU stands still, was {before:?}"
                ));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Takes the gates out under way, lets the guest run the driver itself, and puts them back.
    fn come_and_go(&mut self) {
        // Nobody would take back what fails meanwhile.
        self.put(guest::DRIVER_DATA + guest::MODE, 0);
        self.each_moves_on(guest::SUCCEEDED, 2);
        self.released.push(self.isolator.release(MODULE).unwrap());
        self.each_moves_on(guest::SUCCEEDED, 2);
        self.isolate();
        self.each_moves_on(guest::SUCCEEDED, 2);
        self.put(guest::DRIVER_DATA + guest::MODE, 1);
    }

    fn stop(&mut self) {
        self.put(guest::KERNEL_DATA + guest::STOP, 1);
        for _ in 0..self.vcpus {
            match self.reports.recv_timeout(NEVER) {
                Ok(guest::DONE) => {}
                Ok(report) => self.fail(&guest::meaning(report)),
                Err(_) => self.fail("a vCPU does not come to its end"),
            }
        }
        self.released.push(self.isolator.release(MODULE).unwrap());
    }
}

fn symbols() -> SymbolTable {
    let text = format!(
        "{:x} t function\t[{MODULE}]\n{:x} d data\t[{MODULE}]\n{:x} T kernel_function\n{:x} T waits\n{:x} T __schedule\n",
        guest::DRIVER_TEXT,
        guest::DRIVER_DATA,
        guest::KERNEL_FUNCTION,
        guest::WAITS,
        guest::SCHEDULER
    );
    read_kallsyms(text.as_bytes(), |_| true).unwrap()
}

/// Has the I/O APIC send the level-triggered interrupt of `pin` to the last vCPU.
fn route(handle: &VmHandle, pin: u32, vcpus: u8) {
    let mut chip = kvm_irqchip {
        chip_id: KVM_IRQCHIP_IOAPIC,
        ..Default::default()
    };
    handle.vm_fd().get_irqchip(&mut chip).unwrap();
    let entry = guest::DEVICE_VECTOR | 1 << 15 | u64::from(vcpus - 1) << 56;
    // SAFETY: the chip was filled in as an I/O APIC, and an entry is any pattern of bits.
    unsafe { chip.chip.ioapic.redirtbl[pin as usize].bits = entry };
    handle.vm_fd().set_irqchip(&chip).unwrap();
}

fn stress(vcpus: u8) {
    let mut vm = Vm::new(VmConfig {
        memory_bytes: 8 << 20,
        vcpus,
        payload: Payload::Code {
            code: vec![0xeb, 0xfe],
            address: GuestAddress(0x10_0000),
        },
        console: SerialBackend::None,
        on_guest_reset: OnGuestReset::Exit,
    })
    .expect("this host has no usable KVM");
    let handle = vm.handle();
    let slot = vm.reserve_pci_slot().unwrap();
    let device = Arc::new(Device(Mutex::new(Inner {
        registers: [0; 8],
        line: slot.intx_line(InterruptPin::A),
        raised: None,
        interrupts: 0,
    })));
    let (sender, reports) = channel();
    let reports_device = Arc::new(Mutex::new(Reports(sender)));
    let acknowledge = Arc::new(Mutex::new(Acknowledge(device.clone())));
    handle
        .pio_bus()
        .map(guest::REPORT_PORT.into(), 4, reports_device)
        .unwrap();
    handle
        .pio_bus()
        .map(guest::ACKNOWLEDGE_PORT.into(), 1, acknowledge)
        .unwrap();
    guest::write(handle.ram().memory());
    route(
        &handle,
        vmm::layout::pci_gsi(slot.number(), InterruptPin::A as u8),
        vcpus,
    );
    let isolator = Isolator::attach(handle.clone()).unwrap();
    let machine = std::thread::spawn(move || vm.run());
    while handle.status().first_entry_ns.is_none() {
        std::thread::yield_now();
    }
    handle
        .with_paused(|vcpus| {
            let boot = vcpus.get(0).unwrap().get_sregs().unwrap();
            for (index, vcpu) in vcpus.iter_mut().enumerate() {
                let (regs, sregs) = guest::registers(index as u8, &boot);
                vcpu.set_sregs(&sregs).unwrap();
                vcpu.set_regs(&regs).unwrap();
                let mp_state = KVM_MP_STATE_RUNNABLE;
                vcpu.set_mp_state(kvm_mp_state { mp_state }).unwrap();
            }
        })
        .unwrap();
    let mut stress = Stress {
        handle: handle.clone(),
        isolator,
        device: device.clone(),
        symbols: Arc::new(symbols()),
        reports,
        vcpus,
        released: Vec::new(),
    };
    // An interrupt for a local APIC that is still off would be gone.
    stress.each_moves_on(guest::TICKS, 1);
    stress.isolate();
    stress.each_moves_on(guest::SUCCEEDED, 2);
    stress.put(guest::DRIVER_DATA + guest::MODE, 1);

    let done = Arc::new(AtomicBool::new(false));
    let (stop, shared) = (done.clone(), handle.ram().memory().clone());
    let transfers = std::thread::spawn(move || transfer(&device, &shared, &stop));
    let end = Instant::now() + seconds();
    while Instant::now() < end {
        std::thread::sleep(ROUND.min(end.saturating_duration_since(Instant::now())));
        stress.check();
        if transfers.is_finished() {
            break;
        }
        stress.each_moves_on(guest::TICKS, 1);
        stress.come_and_go();
    }
    stress.stop();
    done.store(true, Ordering::Relaxed);
    let transfers = transfers
        .join()
        .unwrap()
        .unwrap_or_else(|lost| stress.fail(&lost));

    let (succeeded, failed) = (stress.each(guest::SUCCEEDED), stress.each(guest::FAILED));
    let all: u64 = succeeded.iter().sum();
    assert_eq!(stress.word(guest::DRIVER_DATA + guest::TOGETHER), all);
    assert_eq!(
        stress.word(guest::KERNEL_DATA + guest::TOGETHER_BY_KERNEL),
        all
    );
    let entries = || stress.released.iter().flat_map(|module| &module.entries);
    let aborts: u64 = entries().map(|entry| entry.aborts).sum();
    assert_eq!(
        aborts,
        failed.iter().sum::<u64>(),
        "each error is that of a call that was taken back"
    );
    assert!(stress.released.iter().all(|module| module.broken.is_none()));
    assert!(
        entries().all(|entry| entry.pass_throughs.is_empty()),
        "{:?}",
        stress.released
    );
    let spills: u64 = entries().flat_map(|entry| entry.spills.values()).sum();
    let interrupts = stress.device.lock().interrupts;
    println!(
        "{vcpus} vCPUs: {all} calls ended well, {aborts} were taken back, {spills} waited in the guest; {transfers} \
         transfers, {interrupts} interrupts; ticks {:?}; isolated {} times",
        stress.each(guest::TICKS),
        stress.released.len()
    );
    assert!(aborts > 0 && spills > 0 && interrupts > 0 && transfers > 0);
    handle.power_off().unwrap();
    machine.join().unwrap().unwrap();
}

fn seconds() -> Duration {
    let seconds = std::env::var("COFFERDAM_STRESS_SECONDS");
    Duration::from_secs(seconds.map_or(2, |seconds| seconds.parse().expect("a number of seconds")))
}

#[test]
fn one_vcpu_loses_nothing() {
    stress(1);
}

#[test]
fn two_vcpus_lose_nothing() {
    stress(2);
}

#[test]
fn four_vcpus_lose_nothing() {
    stress(4);
}
