//! Everything at once, on the host's real KVM: vCPUs that call an isolated function all the time,
//! calls that fail, wait in the guest or reach their device at random, timer interrupts, a device
//! that writes words of its own into the pages that calls write and raises its line, and gates that
//! are taken out and put back meanwhile.
//!
//! No word that somebody wrote may be lost, no call may count twice or half, no register may
//! change, every interrupt must arrive. A few seconds by default; `COFFERDAM_STRESS_SECONDS` makes
//! it longer.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code")]

mod device;
mod guest;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use device::{Acknowledge, Device, transfer};
use devices::bus::MutBusDevice;
use devices::pci::config::InterruptPin;
use devices::serial::SerialBackend;
use isolation::attach::Isolator;
use isolation::attach::plan::Wanted;
use isolation::attach::request::{Contain, IsolateRequest};
use isolation::dispatch::after_fault::ReturnErrors;
use isolation::guest::symbols::{SymbolTable, read_kallsyms};
use isolation::status::ModuleStatus;
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_MP_STATE_RUNNABLE, kvm_irqchip, kvm_mp_state, kvm_regs,
};
use vm_memory::{Bytes, GuestAddress};
use vmm::memory::MemorySource;
use vmm::{ExitReason, OnGuestReset, PausedVcpus, Payload, Vm, VmConfig, VmHandle};

/// What does not come by then does not come.
const NEVER: Duration = Duration::from_secs(60);
/// Between two times that the gates are taken out and put back.
const ROUND: Duration = Duration::from_millis(700);
const MODULE: &str = "m";

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

struct Stress {
    handle: VmHandle,
    machine: JoinHandle<Result<ExitReason, vmm::Error>>,
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

    /// As the device writes: whoever does not hold it may lose what he writes to a page that a call
    /// writes too.
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
                kernel: String::new(),
                contain: Contain::None,
                wanted: Wanted::Named(vec!["function".into()]),
                model: None,
                guest_only: Vec::new(),
                device: Some(self.device.clone()),
                device_slots: Vec::new(),
                memory_moves: false,
                budget: Duration::from_millis(100),
                policy: Box::new(ReturnErrors),
                sleep_limit: Duration::ZERO,
                keep_faults: None,
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

/// Starts a guest whose calls are isolated and do not fail yet.
fn start(vcpus: u8) -> Stress {
    let mut vm = Vm::new(VmConfig {
        memory_bytes: 8 << 20,
        memory: MemorySource::default(),
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
    let device = Arc::new(Device::new(slot.intx_line(InterruptPin::A)));
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
    let stress = Stress {
        handle,
        machine,
        isolator,
        device,
        symbols: Arc::new(symbols()),
        reports,
        vcpus,
        released: Vec::new(),
    };
    // An interrupt for a local APIC that is still off would be gone.
    stress.each_moves_on(guest::TICKS, 1);
    stress.isolate();
    stress.each_moves_on(guest::SUCCEEDED, 2);
    stress
}

fn stress(vcpus: u8) {
    let mut stress = start(vcpus);
    stress.put(guest::DRIVER_DATA + guest::MODE, 1);

    let done = Arc::new(AtomicBool::new(false));
    let (stop, shared) = (done.clone(), stress.handle.ram().memory().clone());
    let device = stress.device.clone();
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
    stress.handle.power_off().unwrap();
    stress.machine.join().unwrap().unwrap();
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

#[test]
fn rewinds_under_calls_of_several_vcpus_lose_nothing_and_leave_nothing() {
    let mut stress = start(2);
    let succeeded = |stress: &Stress| -> u64 { stress.each(guest::SUCCEEDED).iter().sum() };
    stress.handle.mark("warm", NEVER).unwrap();
    let rewound = |stress: &Stress| {
        stress.handle.rewind(None, NEVER).unwrap();
        stress.check();
    };
    let mut most = 0;
    for round in 0..200 {
        if round % 50 == 7 {
            // The gates of the mark come back whatever was done with them since.
            stress
                .released
                .push(stress.isolator.release(MODULE).unwrap());
        }
        stress.each_moves_on(guest::SUCCEEDED, round % 5);
        most = most.max(succeeded(&stress));
        rewound(&stress);
    }
    stress.handle.pause().unwrap();
    stress.handle.rewind(None, NEVER).unwrap();
    assert!(succeeded(&stress) < most, "{most} calls were undone");
    stress.handle.resume().unwrap();
    stress.each_moves_on(guest::TICKS, 1);
    stress.each_moves_on(guest::SUCCEEDED, 5);
    stress.stop();
    let all = succeeded(&stress);
    assert_eq!(stress.word(guest::DRIVER_DATA + guest::TOGETHER), all);
    assert_eq!(
        stress.word(guest::KERNEL_DATA + guest::TOGETHER_BY_KERNEL),
        all
    );
    assert!(stress.released.iter().all(|module| module.broken.is_none()));
    stress.handle.power_off().unwrap();
    stress.machine.join().unwrap().unwrap();
}

#[test]
fn a_rewind_does_not_wait_for_a_call_that_is_open_in_the_guest() {
    let mut stress = start(1);
    stress.handle.mark("warm", NEVER).unwrap();
    for _ in 0..5 {
        stress.put(guest::DRIVER_DATA + guest::MODE, 1);
        pause_at_return_gate(&stress);
        // Paused, it would wait for ever.
        stress.handle.rewind(None, Duration::ZERO).unwrap();
        stress.check();
        stress.handle.resume().unwrap();
        stress.each_moves_on(guest::SUCCEEDED, 3);
    }
    stress.stop();
    let all = stress.each(guest::SUCCEEDED).iter().sum::<u64>();
    assert_eq!(stress.word(guest::DRIVER_DATA + guest::TOGETHER), all);
    assert!(stress.released.iter().all(|module| module.broken.is_none()));
    stress.handle.power_off().unwrap();
    stress.machine.join().unwrap().unwrap();
}

/// Pauses the machine with the first vCPU in the scheduler, where a call that waits goes on, and
/// puts it where it would be next: at the return gate.
fn pause_at_return_gate(stress: &Stress) -> kvm_regs {
    let start = Instant::now();
    loop {
        stress.handle.pause().unwrap();
        let regs = stress
            .handle
            .with_paused(|vcpus| vcpus.get(0).unwrap().get_regs().unwrap());
        let regs = regs.unwrap();
        if regs.rip == guest::SCHEDULER {
            return kvm_regs {
                rip: guest::DRIVER_TEXT + 2,
                rsp: regs.rsp + 16,
                ..regs
            };
        }
        stress.handle.resume().unwrap();
        if start.elapsed() > NEVER {
            stress.fail("no call waits");
        }
        std::thread::sleep(Duration::from_micros(300));
    }
}

fn goes_on_without_the_gate(mut stress: Stress, regs: &kvm_regs) {
    let set = |vcpus: &mut PausedVcpus<'_>| vcpus.get(0).unwrap().set_regs(regs).unwrap();
    stress.handle.with_paused(set).unwrap();
    stress
        .released
        .push(stress.isolator.release(MODULE).unwrap());
    stress.handle.resume().unwrap();
    stress.each_moves_on(guest::SUCCEEDED, 3);
    stress.isolate();
    stress.each_moves_on(guest::SUCCEEDED, 3);
    stress.stop();
    let all: u64 = stress.each(guest::SUCCEEDED).iter().sum();
    assert_eq!(stress.word(guest::DRIVER_DATA + guest::TOGETHER), all);
    stress.handle.power_off().unwrap();
    stress.machine.join().unwrap().unwrap();
}

#[test]
fn a_vcpu_at_a_return_gate_that_is_taken_out_goes_on_in_the_driver() {
    let stress = start(2);
    let regs = pause_at_return_gate(&stress);
    goes_on_without_the_gate(stress, &regs);
}

#[test]
fn a_thread_that_was_interrupted_at_a_return_gate_that_is_taken_out_goes_on_in_the_driver() {
    let stress = start(2);
    let regs = pause_at_return_gate(&stress);
    // As the processor does it: SS, RSP, RFLAGS, CS, RIP.
    let frame = (regs.rsp & !15) - 40;
    let words = [regs.rip, 0x10, regs.rflags, regs.rsp, 0x18];
    for (word, at) in words.into_iter().zip((frame..).step_by(8)) {
        stress.put(at, word);
    }
    let interrupted = kvm_regs {
        rip: guest::TIMER_HANDLER,
        rsp: frame,
        rflags: 2,
        ..regs
    };
    goes_on_without_the_gate(stress, &interrupted);
}
