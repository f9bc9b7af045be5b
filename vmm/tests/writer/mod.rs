//! A guest each of whose vCPUs writes words to pages of an area of its own, in an order that
//! follows from a seed: what memory has to hold follows from its registers.

#![allow(dead_code, clippy::unwrap_used)] // Each test file uses a part of it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use devices::bus::MutBusDevice;
use devices::dma::DmaSpace;
use devices::pci::bus::SharedFunction;
use devices::pci::{BarIndex, BarRange, PciFunction};
use devices::state::{Form, Part, StateError};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_memory::{Bytes, GuestAddress};
use vmm::memory::MemorySource;
use vmm::{ChangedPages, PausedVcpus, Quiesced, VmConfig, VmHandle};

use vmm_sys_util::timerfd::TimerFd;

use crate::common::{CODE, Guest, Running, config};
use crate::guest_code;

// RSI: area, R13: number of its pages less one, R12: state of the generator, R14: words written.
// Each 64th word is followed by a word to the device of this test; R15 of them make it pause a
// little.
guest_code!(
    writes,
    "mov edx, 0x500",
    "mov eax, 1",
    "out dx, eax",
    "1: pause",
    "test r13, r13",
    "jz 1b",
    "mov r8, 0x5851f42d4c957f2d",
    "mov r9, 0x14057b7ef767814f",
    "2: imul r12, r8",
    "add r12, r9",
    "mov rax, r12",
    "shr rax, 40",
    "and rax, r13",
    "shl rax, 12",
    "mov rbx, r12",
    "shr rbx, 24",
    "and ebx, 0xff8",
    "add rax, rbx",
    "mov [rsi + rax], r12",
    "inc r14",
    "test r14d, 63",
    "jnz 2b",
    "mov edx, 0x510",
    "mov eax, r14d",
    "out dx, eax",
    "jmp 2b",
);

/// A page behind the code, which nothing is loaded to.
pub const CODE_END: u64 = CODE + 0x8000;

/// Where vCPU `index` writes.
#[derive(Debug, Clone, Copy)]
pub struct Area {
    /// First guest physical address.
    pub start: u64,
    /// Number of pages, a power of two.
    pub pages: u64,
}

fn step(state: &mut u64, area: Area) -> (u64, u64) {
    *state = state
        .wrapping_mul(0x5851_f42d_4c95_7f2d)
        .wrapping_add(0x1405_7b7e_f767_814f);
    let page = (*state >> 40) & (area.pages - 1);
    (area.start + page * 4096 + (*state >> 24 & 0xff8), *state)
}

/// A device that puts a word into guest memory for each word that it is given, from a counter that
/// is its state.
pub struct Echo {
    dma: DmaSpace,
    area: Area,
    count: u64,
}

impl Echo {
    const FORM: Form = Form {
        kind: "echo",
        version: 1,
    };
}

impl MutBusDevice for Echo {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) {
        self.count += 1;
        let at = self.area.start + self.count % (self.area.pages * 512) * 8;
        self.dma.write(at, &self.count.to_le_bytes()).unwrap();
    }
}

impl PciFunction for Echo {
    fn config_read(&mut self, _offset: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn config_write(&mut self, _offset: u16, _data: &[u8]) {}
    fn decoded(&self) -> Vec<BarRange> {
        Vec::new()
    }
    fn bar_read(&mut self, _bar: BarIndex, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn bar_write(&mut self, _bar: BarIndex, _offset: u64, _data: &[u8]) {}
    fn reset(&mut self) {
        self.count = 0;
    }
    fn save(&self) -> Result<Part, StateError> {
        Part::new(Self::FORM, &self.count)
    }
    fn restore(&mut self, state: &Part) -> Result<(), StateError> {
        self.count = state.open(Self::FORM)?;
        Ok(())
    }
}

/// Has the device write now and then by itself, in the event loop.
struct Pulse {
    timer: TimerFd,
    on: Arc<AtomicBool>,
    echo: Arc<Mutex<Echo>>,
}

impl MutEventSubscriber for Pulse {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let period = Duration::from_micros(300);
        self.timer.reset(period, Some(period)).unwrap();
        ops.add(Events::new(&self.timer, EventSet::IN)).unwrap();
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        self.timer.wait().unwrap();
        if self.on.load(Ordering::Acquire) {
            self.echo.lock().unwrap().write(0, &[]);
        }
    }
}

/// The guest, made but not started.
pub struct Writer {
    pub guest: Guest,
    pub areas: Vec<Area>,
    pub echo_area: Area,
    pub echo: Arc<Mutex<Echo>>,
    pub pulse: Arc<AtomicBool>,
}

/// Each of `vcpus` vCPUs has `pages` pages, below 1 GiB of `memory_bytes` from `source`.
pub fn writer(memory_bytes: u64, source: MemorySource, vcpus: u8, pages: u64) -> Writer {
    let mut areas: Vec<_> = (0..=u64::from(vcpus))
        .map(|index| Area {
            start: (2 << 20) + index * pages * 4096,
            pages,
        })
        .collect();
    let echo_area = Area {
        pages: pages.min(8),
        ..areas.pop().unwrap()
    };
    let mut guest = Guest::new(VmConfig {
        memory_bytes,
        memory: source,
        ..config(writes(), vcpus)
    });
    let echo = Arc::new(Mutex::new(Echo {
        dma: guest.vm.dma_space(),
        area: echo_area,
        count: 0,
    }));
    let slot = guest.vm.reserve_pci_slot().unwrap();
    let function: SharedFunction = echo.clone();
    guest.vm.add_pci(&slot, function).unwrap();
    let handle = guest.vm.handle();
    handle.pio_bus().map(0x510, 4, echo.clone()).unwrap();
    let pulse = Arc::new(AtomicBool::new(false));
    guest.vm.add_subscriber(Arc::new(Mutex::new(Pulse {
        timer: TimerFd::new().unwrap(),
        on: pulse.clone(),
        echo: echo.clone(),
    })));
    Writer {
        pulse,
        guest,
        areas,
        echo_area,
        echo,
    }
}

/// The guest, running.
pub struct Writing {
    pub guest: Running,
    pub areas: Vec<Area>,
    pub echo: Arc<Mutex<Echo>>,
    pub echo_area: Area,
    /// Whether the device writes by itself too.
    pub pulse: Arc<AtomicBool>,
}

impl Writer {
    /// Starts it, and has all vCPUs write.
    pub fn start(self) -> Writing {
        let writing = self.go_on();
        writing.guest.report();
        writing.begin();
        writing
    }

    /// Starts it where a state that was put back has it.
    pub fn go_on(self) -> Writing {
        Writing {
            guest: self.guest.start(),
            areas: self.areas,
            echo: self.echo,
            pulse: self.pulse,
            echo_area: self.echo_area,
        }
    }
}

impl Writing {
    pub fn handle(&self) -> &VmHandle {
        &self.guest.handle
    }

    /// Has all vCPUs write, from the first word on; to be called when the first one waits.
    pub fn begin(&self) {
        self.handle()
            .with_paused(|vcpus| {
                let sregs = vcpus.get(0).unwrap().get_sregs().unwrap();
                for (index, area) in self.areas.iter().enumerate() {
                    let vcpu = vcpus.get(index).unwrap();
                    if index > 0 {
                        let mut own = sregs;
                        own.apic_base = vcpu.get_sregs().unwrap().apic_base;
                        vcpu.set_sregs(&own).unwrap();
                        vcpu.set_mp_state(kvm_bindings::kvm_mp_state { mp_state: 0 })
                            .unwrap();
                    }
                    let mut regs = vcpu.get_regs().unwrap();
                    // Behind what reports.
                    regs.rip = CODE + 11;
                    regs.rflags = 2;
                    (regs.rsi, regs.r13) = (area.start, area.pages - 1);
                    (regs.r12, regs.r14) = (index as u64 + 1, 0);
                    vcpu.set_regs(&regs).unwrap();
                }
            })
            .unwrap();
    }

    /// Waits until each vCPU has written `words` more.
    pub fn wait(&self, words: u64) {
        let written = || {
            let read = |vcpus: &mut PausedVcpus<'_>| {
                let words = vcpus.iter_mut().map(|vcpu| vcpu.get_regs().unwrap().r14);
                words.collect::<Vec<_>>()
            };
            self.handle().with_paused(read).unwrap()
        };
        let start = written();
        while written()
            .iter()
            .zip(&start)
            .any(|(now, start)| *now < start + words)
        {
            // Each look stops them: they need time to write in between.
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Checks what is in the areas against what the vCPUs and the device have written by their
    /// registers.
    pub fn check(&self, quiesced: &mut Quiesced<'_, '_>) {
        let mut expected = vec![0u64; 0];
        for (index, &area) in self.areas.iter().enumerate() {
            let regs = quiesced.vcpus().get(index).unwrap().get_regs().unwrap();
            expected.clear();
            expected.resize(area.pages as usize * 512, 0);
            let mut state = index as u64 + 1;
            for _ in 0..regs.r14 {
                let (at, value) = step(&mut state, area);
                expected[(at - area.start) as usize / 8] = value;
            }
            let found = words(quiesced, area);
            // The next word may be on its way.
            let (at, value) = step(&mut state, area);
            let next = (at - area.start) as usize / 8;
            if found[next] == value {
                expected[next] = value;
            }
            assert!(found == expected, "vCPU {index} after {} words", regs.r14);
        }
        let count = self.echo.lock().unwrap().count;
        let slots = self.echo_area.pages * 512;
        let expected: Vec<_> = (0..slots)
            .map(|slot| {
                let last = (count + slots - slot) / slots * slots + slot;
                match last.checked_sub(slots) {
                    Some(value) if slot != 0 || value != 0 => value,
                    _ => 0,
                }
            })
            .collect();
        assert!(words(quiesced, self.echo_area) == expected, "device");
    }
}

fn words(quiesced: &Quiesced<'_, '_>, area: Area) -> Vec<u64> {
    let mut bytes = vec![0; area.pages as usize * 4096];
    let memory = quiesced.ram().memory();
    memory
        .read_slice(&mut bytes, GuestAddress(area.start))
        .unwrap();
    let words = bytes.as_chunks().0.iter();
    words.map(|word| u64::from_le_bytes(*word)).collect()
}

/// All of a machine's memory, one page after the other as its file has them.
pub fn all_of(handle: &VmHandle) -> Vec<u8> {
    let ram = handle.ram();
    let mut bytes = vec![0; ram.size_bytes() as usize];
    for region in ram.regions() {
        let part = &mut bytes[region.file_offset as usize..][..region.len as usize];
        ram.memory().read_slice(part, region.guest_address).unwrap();
    }
    bytes
}

/// All of memory, and the pages that changed since this was last called.
pub fn look(handle: &VmHandle) -> (Vec<u8>, ChangedPages) {
    let looked = handle.quiesce(Duration::from_secs(60), |quiesced| {
        let changed = quiesced.changed_pages().unwrap().unwrap();
        handle.confirm_changes(&changed);
        (all_of(handle), changed)
    });
    looked.unwrap()
}

/// Numbers of the pages in which they differ.
pub fn differing(before: &[u8], after: &[u8]) -> Vec<u32> {
    let pages = before.chunks(4096).zip(after.chunks(4096)).zip(0..);
    pages
        .filter_map(|((before, after), page)| (before != after).then_some(page))
        .collect()
}

/// Maps the first GiB above 4 GiB one to one in the tables that a guest starts with.
pub fn map_high(handle: &VmHandle) {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    const DIRECTORY: u64 = 0x18_0000;
    let read = |vcpus: &mut PausedVcpus<'_>| vcpus.get(0).unwrap().get_sregs().unwrap().cr3;
    let pml4 = handle.with_paused(read).unwrap();
    let memory = handle.ram().memory();
    let pdpt: u64 = memory.read_obj(GuestAddress(pml4)).unwrap();
    let entry = GuestAddress((pdpt & !0xfff) + 4 * 8);
    memory
        .write_obj(DIRECTORY | PRESENT_WRITABLE, entry)
        .unwrap();
    for large in 0..512u64 {
        let target = ((4 << 30) + (large << 21)) | PRESENT_WRITABLE | LARGE;
        memory
            .write_obj(target, GuestAddress(DIRECTORY + large * 8))
            .unwrap();
    }
}
