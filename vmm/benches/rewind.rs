//! What a rewind costs, as ratios within one run, on a hand-made guest with a network card.
//!
//! `cargo bench -p vmm` prints one JSON object: times in microseconds are medians over rounds.
//! *Rewind* is the whole call, of a guest that has written 50 pages since the mark and is paused;
//! its phases are in `phases_us`. *Copy* is copying as many pages from kept memory into the guest's
//! and setting one vCPU's registers with the calls that a rewind has to make for it:
//! `KVM_SET_MP_STATE`, `_SREGS`, `_REGS`, `_XSAVE`, `_XCRS`, `_DEBUGREGS`, `_LAPIC`, `_MSRS` (those
//! that the guest has changed), `_VCPU_EVENTS`; *bare* the same with `KVM_SET_SREGS` and
//! `KVM_SET_REGS` alone. Rounds of all of them alternate. The two memory sizes show whether the
//! cost depends on the guest's memory.

#![allow(clippy::unwrap_used, reason = "bench code")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{Guest, Running, config};
use devices::bus::BusDevice;
use devices::nic::{NicModel, NicParts};
use devices::pci::config::InterruptPin;
use devices::wire::gateway::{Gateway, GatewayConfig};
use kvm_bindings::{Msrs, kvm_msr_entry};
use vm_memory::{Bytes, GuestAddress};
use vmm::{PausedVcpus, Rewound, VmConfig, VmHandle};

const ROUNDS: usize = 201;
const LIMIT: Duration = Duration::from_secs(10);
const PAGES: usize = 50;
/// Where the guest writes its pages, one in 16 KiB.
const AREA: u64 = 0x20_0000;
const STRIDE: u64 = 0x4000;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

// Writes a word to each of 50 pages and reports, for ever; before all but the first time it waits
// until port 0x508 says 1, and afterwards until it is rewound.
guest_code!(
    writes,
    "xor ebx, ebx",
    "jmp 2f",
    "1: mov edx, 0x508",
    "in al, dx",
    "cmp al, 1",
    "jne 1b",
    "mov ebx, 1",
    "2: mov ecx, 50",
    "mov edi, 0x200000",
    "3: inc qword ptr [rdi]",
    "add edi, 0x4000",
    "dec ecx",
    "jnz 3b",
    "mov edx, 0x500",
    "out dx, eax",
    "test ebx, ebx",
    "jz 1b",
    "4: pause",
    "jmp 4b",
);

struct Switch(AtomicU8);

impl BusDevice for Switch {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(self.0.load(Ordering::Acquire));
    }
    fn write(&self, _offset: u64, _data: &[u8]) {}
}

struct Bench {
    guest: Running,
    switch: Arc<Switch>,
    kept: Vec<u8>,
    rewinds: Vec<f64>,
    phases: [Vec<f64>; 6],
    copies: Vec<f64>,
    bare: Vec<f64>,
}

fn add_nic(guest: &mut Guest) {
    let vm = &mut guest.vm;
    let wire = Gateway::new(&GatewayConfig::default()).unwrap();
    vm.add_subscriber(Arc::new(Mutex::new(wire.timer())));
    let slot = vm.reserve_pci_slot().unwrap();
    let nic = NicModel::from_name("e1000")
        .unwrap()
        .make(NicParts {
            mac: [2, 0, 0, 0, 0, 1],
            wire: Box::new(wire),
            dma: vm.dma_space(),
            intx: slot.intx_line(InterruptPin::A),
            vectors: &mut |count| vm.msi_vectors(count).map_err(|error| error.to_string()),
        })
        .unwrap();
    vm.add_subscriber(nic.events.clone());
    vm.add_pci(&slot, nic.function).unwrap();
}

impl Bench {
    fn new(memory_bytes: u64) -> Self {
        let mut guest = Guest::new(VmConfig {
            memory_bytes,
            ..config(writes(), 1)
        });
        add_nic(&mut guest);
        let switch = Arc::new(Switch(AtomicU8::new(0)));
        let handle = guest.vm.handle();
        handle.pio_bus().map(0x508, 1, switch.clone()).unwrap();
        let bench = Self {
            guest: guest.start(),
            switch,
            kept: vec![1; PAGES * 4096],
            rewinds: Vec::new(),
            phases: Default::default(),
            copies: Vec::new(),
            bare: Vec::new(),
        };
        // Once around, so that all that it uses is there.
        bench.guest.report();
        bench.guest.handle.mark("mark", LIMIT).unwrap();
        bench
    }

    /// Has the guest write its pages, and pauses it.
    fn dirty(&self) {
        self.switch.0.store(1, Ordering::Release);
        self.guest.report();
        self.guest.handle.pause().unwrap();
        self.switch.0.store(0, Ordering::Release);
    }

    /// Each after the guest has run, so that all find the same in the processor's caches.
    fn round(&mut self) {
        let handle = self.guest.handle.clone();
        self.dirty();
        let start = Instant::now();
        let rewound = handle.rewind(None, LIMIT).unwrap();
        self.rewinds.push(start.elapsed().as_secs_f64() * 1e6);
        assert!(rewound.pages as usize >= PAGES, "{rewound:?}");
        for (times, ns) in self.phases.iter_mut().zip(phases(&rewound)) {
            times.push(ns as f64 / 1e3);
        }
        handle.resume().unwrap();
        for all in [true, false] {
            self.dirty();
            let time = self.copy(&handle, all);
            match all {
                true => self.copies.push(time),
                false => self.bare.push(time),
            }
            // What was copied is taken back.
            handle.rewind(None, LIMIT).unwrap();
            handle.resume().unwrap();
        }
    }

    /// Copies pages and sets registers; gives the microseconds.
    fn copy(&self, handle: &VmHandle, all: bool) -> f64 {
        let memory = handle.ram().memory();
        let work = |vcpus: &mut PausedVcpus<'_>| {
            let vcpu = vcpus.get(0).unwrap();
            let (regs, sregs) = (vcpu.get_regs().unwrap(), vcpu.get_sregs().unwrap());
            let (xsave, xcrs) = (vcpu.get_xsave().unwrap(), vcpu.get_xcrs().ok());
            let (debug, lapic) = (vcpu.get_debug_regs().unwrap(), vcpu.get_lapic().unwrap());
            let (events, mp) = (
                vcpu.get_vcpu_events().unwrap(),
                vcpu.get_mp_state().unwrap(),
            );
            let msr = kvm_msr_entry {
                index: MSR_TSC_DEADLINE,
                ..Default::default()
            };
            let msrs = Msrs::from_entries(&[msr]).unwrap();
            let start = Instant::now();
            for (page, at) in self
                .kept
                .chunks(4096)
                .zip((AREA..).step_by(STRIDE as usize))
            {
                memory
                    .write_slice(black_box(page), GuestAddress(at))
                    .unwrap();
            }
            if all {
                vcpu.set_mp_state(mp).unwrap();
            }
            vcpu.set_sregs(&sregs).unwrap();
            vcpu.set_regs(&regs).unwrap();
            if all {
                // SAFETY: the structure has the 4 KiB that the call reads.
                unsafe { vcpu.set_xsave(&xsave) }.unwrap();
                if let Some(xcrs) = &xcrs {
                    vcpu.set_xcrs(xcrs).unwrap();
                }
                vcpu.set_debug_regs(&debug).unwrap();
                vcpu.set_lapic(&lapic).unwrap();
                vcpu.set_msrs(&msrs).unwrap();
                vcpu.set_vcpu_events(&events).unwrap();
            }
            start.elapsed().as_secs_f64() * 1e6
        };
        handle.with_paused(work).unwrap()
    }
}

fn phases(rewound: &Rewound) -> [u64; 6] {
    let phases = rewound.phases;
    [
        phases.rest_ns,
        phases.find_ns,
        phases.memory_ns,
        phases.machine_ns,
        phases.devices_ns,
        phases.participants_ns,
    ]
}

fn median(times: &[f64]) -> f64 {
    let mut times = times.to_vec();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let mut both = [Bench::new(256 << 20), Bench::new(4 << 30)];
    for _ in 0..ROUNDS {
        both.iter_mut().for_each(Bench::round);
    }
    let [small, large] = &both;
    let names = [
        "rest",
        "find",
        "memory",
        "machine",
        "devices",
        "participants",
    ];
    let phases: Vec<_> = names
        .iter()
        .zip(&small.phases)
        .map(|(name, times)| format!("\"{name}\":{:.1}", median(times)))
        .collect();
    let (rewind, copy, bare) = (
        median(&small.rewinds),
        median(&small.copies),
        median(&small.bare),
    );
    println!(
        "{{\"pages\":{PAGES},\"rewind_us\":{rewind:.1},\"rewinds_per_second\":{:.0},\"phases_us\":{{{}}},\"copy_us\":{copy:.1},\
         \"bare_us\":{bare:.1},\"rewind_per_copy\":{:.2},\"rewind_per_bare\":{:.2},\"rewind_4g_per_256m\":{:.2}}}",
        1e6 / rewind,
        phases.join(","),
        rewind / copy,
        rewind / bare,
        median(&large.rewinds) / rewind,
    );
    for bench in both {
        bench.guest.power_off();
    }
}
