//! A real function by real `vfio-pci` and a real IOMMU: the lab's e1000e, taken from one user's
//! memory to another's.
//!
//! The test is the driver of both users: what it sends is an ARP request, which the network behind
//! the function answers.

#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something unexpected happens"
)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::dma::DmaRegion;
use devices::pci::registers::{Description, RegisterAccess, RegisterCheckpoint};
use devices::vfio::address::PciAddress;
use devices::vfio::binding::Sysfs;
use devices::vfio::device::{CONFIG_REGION, VfioDevice, VfioRegisters};
use devices::vfio::dma::{DmaMap, DmaMemory};

const FUNCTION: &str = "0000:00:02.0";
const MEMORY: u64 = 1 << 20;
const RECEIVE_RING: u64 = 0x1000;
const TRANSMIT_RING: u64 = 0x2000;
const FRAME: u64 = 0x3000;
const BUFFERS: u64 = 0x1_0000;
const BUFFER: u64 = 2048;
const DESCRIPTORS: u64 = 32;
const DESCRIPTOR: u64 = 16;
/// Descriptor done, in the status byte of legacy descriptors (82574 datasheet, 7.1.4 and 7.2.10).
const DONE: u8 = 1;
const ANSWER_TIME: Duration = Duration::from_secs(20);
/// Link up, in the status register (10.2.2.2).
const LINK_UP: u32 = 1 << 1;
/// Command register: I/O and memory space, with and without bus mastering.
const MASTERS: u16 = 7;
const STILL: u16 = 3;

mod register {
    pub const CTRL: u32 = 0;
    pub const STATUS: u32 = 8;
    pub const RCTL: u32 = 0x100;
    pub const TCTL: u32 = 0x400;
    pub const RFCTL: u32 = 0x5008;
    pub const RDBAL: u32 = 0x2800;
    pub const RDLEN: u32 = 0x2808;
    pub const RDH: u32 = 0x2810;
    pub const RDT: u32 = 0x2818;
    pub const TDBAL: u32 = 0x3800;
    pub const TDLEN: u32 = 0x3808;
    pub const TDH: u32 = 0x3810;
    pub const TDT: u32 = 0x3818;
    pub const RAL: u32 = 0x5400;
}

/// A user of the function, with its memory and what its driver knows.
struct User {
    file: Arc<File>,
    memory: DmaMemory,
    /// Last byte of its address, by which its frames are told.
    number: u8,
    next_receive: u64,
    next_transmit: u64,
    saved: Option<RegisterCheckpoint>,
}

impl User {
    fn new(number: u8) -> Self {
        let file = Arc::new(tempfile::tempfile_in("/tmp").unwrap());
        file.set_len(MEMORY).unwrap();
        let region = DmaRegion {
            address: 0,
            len: MEMORY,
            file: file.clone(),
            offset: 0,
        };
        let memory = DmaMemory::new(&[region]).unwrap();
        Self {
            file,
            memory,
            number,
            next_receive: 0,
            next_transmit: 0,
            saved: None,
        }
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, at).unwrap();
    }

    fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    fn all(&self) -> Vec<u8> {
        let mut bytes = vec![0; MEMORY as usize];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    /// What a driver does when it probes.
    fn probe(&mut self, registers: &mut VfioRegisters<'_>) {
        use register::*;
        registers.store(CTRL, 1 << 26);
        std::thread::sleep(Duration::from_millis(20));
        // Link set up, full duplex.
        let control = registers.load(CTRL);
        registers.store(CTRL, control | 1 | 1 << 6);
        // Without a link what is received now may wait until more comes.
        let deadline = Instant::now() + ANSWER_TIME;
        while registers.load(STATUS) & LINK_UP == 0 {
            assert!(Instant::now() < deadline, "no link");
            std::thread::sleep(Duration::from_millis(10));
        }
        for index in 0..DESCRIPTORS {
            let buffer = BUFFERS + index * BUFFER;
            self.put(RECEIVE_RING + index * DESCRIPTOR, &buffer.to_le_bytes());
        }
        let ring = (DESCRIPTORS * DESCRIPTOR) as u32;
        // The lab's model of it leaves these as they are in a reset.
        for at in [RDH, RDT, TDH, TDT] {
            registers.store(at, 0);
        }
        // Nor this: Linux' driver has it write receive descriptors of another form, whose lowest
        // byte of the length would be taken for the status.
        registers.store(RFCTL, 0);
        // Upper halves of who had it before would lead elsewhere.
        for at in [RDBAL + 4, TDBAL + 4] {
            registers.store(at, 0);
        }
        registers.store(RDBAL, RECEIVE_RING as u32);
        registers.store(RDLEN, ring);
        registers.store(TDBAL, TRANSMIT_RING as u32);
        registers.store(TDLEN, ring);
        registers.store(RAL, 0x0000_cf02);
        registers.store(RAL + 4, 0x8000_0000 | u32::from(self.number) << 8);
        // Enabled, broadcasts accepted, without checksums.
        registers.store(RCTL, 1 << 1 | 1 << 15 | 1 << 26);
        registers.store(RDT, (DESCRIPTORS - 1) as u32);
        registers.store(TCTL, 1 << 1 | 1 << 3);
    }

    /// Asks the gateway for its address, and waits for the answer.
    fn exchange(&mut self, registers: &mut VfioRegisters<'_>) {
        let own = [0x02, 0xcf, 0, 0, 0, self.number];
        let mut frame = [0u8; 60];
        frame[..6].fill(0xff);
        frame[6..12].copy_from_slice(&own);
        // ARP, Ethernet, IPv4, request (RFC 826).
        frame[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame[22..28].copy_from_slice(&own);
        frame[28..32].copy_from_slice(&[10, 0, 2, 20 + self.number]);
        frame[38..42].copy_from_slice(&[10, 0, 2, 2]);
        self.put(FRAME, &frame);
        let at = TRANSMIT_RING + self.next_transmit * DESCRIPTOR;
        self.put(at, &FRAME.to_le_bytes());
        // Length; end of packet, insert FCS, report status.
        self.put(at + 8, &[60, 0, 0, 0b1011, 0, 0, 0, 0]);
        self.next_transmit = (self.next_transmit + 1) % DESCRIPTORS;
        registers.store(register::TDT, self.next_transmit as u32);
        let deadline = Instant::now() + ANSWER_TIME;
        loop {
            let descriptor = RECEIVE_RING + self.next_receive * DESCRIPTOR;
            if self.get::<1>(descriptor + 12)[0] & DONE == 0 {
                if Instant::now() >= deadline {
                    use register::*;
                    let all = [CTRL, STATUS, RCTL, TCTL, RDH, RDT, TDH, TDT];
                    let all = all.map(|at| format!("{at:#x}: {:#x}", registers.load(at)));
                    let sent = self.get::<1>(at + 12)[0] & DONE != 0;
                    panic!("user {} hears nothing (sent: {sent}): {all:?}", self.number);
                }
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            let received: [u8; 42] = self.get(BUFFERS + self.next_receive * BUFFER);
            self.put(descriptor + 12, &[0]);
            registers.store(register::RDT, self.next_receive as u32);
            self.next_receive = (self.next_receive + 1) % DESCRIPTORS;
            // The gateway's answer, to this user.
            if received[12..14] == [8, 6] && received[21] == 2 {
                assert_eq!(received[32..38], own, "somebody else's answer");
                assert_eq!(received[28..32], [10, 0, 2, 2]);
                break;
            }
        }
        let deadline = Instant::now() + ANSWER_TIME;
        while self.get::<1>(at + 12)[0] & DONE == 0 {
            assert!(Instant::now() < deadline, "not transmitted");
        }
    }
}

fn set_command(device: &VfioDevice, command: u16) {
    device
        .write(CONFIG_REGION, 4, &command.to_le_bytes())
        .unwrap();
}

/// Takes the function from `from`, whose map is given, to `to`, whose it is then; how long each
/// step took.
fn switch(
    device: &VfioDevice,
    description: &Description,
    (from, mut map): (&mut User, DmaMap),
    to: &User,
    reset: bool,
) -> (DmaMap, [Duration; 6]) {
    let mut registers = VfioRegisters::new(device, 0);
    let mut times = [Duration::ZERO; 6];
    let mut at = Instant::now();
    let mut lap = |step: Option<usize>| {
        if let Some(step) = step {
            times[step] = at.elapsed();
        }
        at = Instant::now();
    };
    let running = description.look(&mut registers).unwrap();
    description.quiesce(&mut registers).unwrap();
    set_command(device, STILL);
    lap(Some(0));
    from.saved = Some(description.save(&mut registers, &running).unwrap());
    lap(Some(1));
    map.unmap().unwrap();
    lap(Some(2));
    if reset {
        // As if the function had been anybody's in between.
        registers.store(register::CTRL, 1 << 26);
        std::thread::sleep(Duration::from_millis(20));
        for at in [register::RDBAL, register::TDBAL, register::RAL] {
            registers.store(at, 0x5a5a_5a00);
        }
        registers.store(register::RDH, 7);
        registers.store(register::TDH, 9);
    }
    lap(None);
    map.add_all(&to.memory).unwrap();
    lap(Some(3));
    if let Some(saved) = &to.saved {
        description.load(&mut registers, saved).unwrap();
        lap(Some(4));
    }
    set_command(device, MASTERS);
    if let Some(saved) = &to.saved {
        description.resume(&mut registers, saved).unwrap();
        lap(Some(5));
    }
    (map, times)
}

#[test]
#[ignore = "needs the lab's e1000e behind an IOMMU: cargo xtask test runs it there"]
fn two_users_have_the_labs_e1000e_by_turns_and_neither_sees_the_others_frames() {
    const SWITCHES: usize = 40;
    let address: PciAddress = FUNCTION.parse().unwrap();
    let sysfs = Sysfs::default();
    sysfs.bind(address, false).unwrap();
    let device = VfioDevice::open(address).unwrap();
    let description = Description::intel_82574l().unwrap();
    let mut registers = VfioRegisters::new(&device, 0);
    let mut users = [User::new(1), User::new(2)];
    let mut map = device.map();
    map.add_all(&users[0].memory).unwrap();
    set_command(&device, MASTERS);
    // As Linux' driver leaves it: extended receive descriptors (10.2.5.12).
    registers.store(register::RFCTL, 1 << 15);
    users[0].probe(&mut registers);
    users[0].exchange(&mut registers);
    let [first, second] = &mut users;
    (map, _) = switch(&device, &description, (first, map), second, false);
    second.probe(&mut registers);
    second.exchange(&mut registers);
    let (mut has, mut parked) = (second, first);
    let mut total = [Duration::ZERO; 6];
    for round in 0..SWITCHES {
        let times;
        (map, times) = switch(&device, &description, (has, map), parked, round % 8 == 7);
        std::mem::swap(&mut has, &mut parked);
        for (total, time) in total.iter_mut().zip(times) {
            *total += time;
        }
        let before = parked.all();
        has.exchange(&mut registers);
        has.exchange(&mut registers);
        assert!(
            parked.all() == before,
            "round {round}: the other one's memory changed"
        );
    }
    let mean = total.map(|time| time / SWITCHES as u32);
    println!("quiesce, save, unmap, map, load, resume: {mean:?}");
    drop(map);
    drop(device);
    sysfs.unbind(address, false).unwrap();
}

/// Memory in pages of which kind a guest's is mapped, and how.
fn memory_of(kind: &str, bytes: u64) -> Option<(Arc<File>, DmaRegion)> {
    use rustix::fs::{MemfdFlags, memfd_create};
    let file = match kind {
        "small pages" => File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap()),
        "hugetlb" => {
            std::fs::write("/proc/sys/vm/nr_hugepages", (bytes >> 21).to_string()).unwrap();
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
            File::from(memfd_create("guest", flags).ok()?)
        }
        _ => {
            // As guests have it: a tmpfs of its own with huge pages for who asks.
            std::fs::create_dir_all("/tmp/huge").unwrap();
            let mounted = std::process::Command::new("mount")
                .args([
                    "-t",
                    "tmpfs",
                    "-o",
                    "huge=advise,size=90%",
                    "none",
                    "/tmp/huge",
                ])
                .status();
            assert!(mounted.unwrap().success());
            tempfile::tempfile_in("/tmp/huge").unwrap()
        }
    };
    file.set_len(bytes).ok()?;
    let file = Arc::new(file);
    let region = DmaRegion {
        address: 0,
        len: bytes,
        file: file.clone(),
        offset: 0,
    };
    Some((file, region))
}

/// Run in the full form of the suite, or by name.
mod long {
    use super::*;

    /// How long memory takes into the IOMMU's map and out of it, by the kind of its pages. Nothing
    /// depends on it: it is printed.
    #[test]
    #[ignore = "needs the lab's e1000e behind an IOMMU: cargo xtask test runs it there"]
    fn what_memory_costs_in_the_map_is_printed() {
        const BYTES: u64 = 256 << 20;
        let address: PciAddress = FUNCTION.parse().unwrap();
        let sysfs = Sysfs::default();
        sysfs.bind(address, false).unwrap();
        let device = VfioDevice::open(address).unwrap();
        for kind in ["small pages", "huge pages", "hugetlb"] {
            let Some((_file, region)) = memory_of(kind, BYTES) else {
                println!("{kind}: none");
                continue;
            };
            let start = Instant::now();
            let memory = DmaMemory::new(std::slice::from_ref(&region)).unwrap();
            memory.populate(|| true);
            let populated = start.elapsed();
            let mut times = Vec::new();
            for _ in 0..5 {
                let mut map = device.map();
                map.add_all(&memory).unwrap();
                assert_eq!(map.bytes(), BYTES);
                let took = map.took();
                times.push((took, map.unmap().unwrap()));
            }
            // Mapped in this process anew each time.
            let anew = DmaMemory::new(std::slice::from_ref(&region)).unwrap();
            let mut map = device.map();
            map.add_all(&anew).unwrap();
            let cold = map.took();
            drop(map);
            println!(
                "{kind}: populate {populated:?}, (map, unmap) {times:?}, map where it is not in this process yet {cold:?}"
            );
        }
        drop(device);
        sysfs.unbind(address, false).unwrap();
    }
}
