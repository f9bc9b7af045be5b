//! A guest without a VM: memory in a file, a vfio-user client, and a driver of the e1000 that fits
//! on a page.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam::device::client::{AttachInfo, attach};
use cofferdam::options::MacAddress;
use cofferdam::runtime_dir::RuntimeRoot;
use devices::dma::{DmaSpace, GuestMemory};
use devices::vfio_user::{Client, Limits};
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{FileOffset, GuestAddress};

use crate::common::place::{LIMIT, Place};

const BAR0: u32 = 0;
const CONFIG: u32 = 7;
const COMMAND: u64 = 4;

const CTRL: u64 = 0;
const STATUS: u64 = 8;
const RCTL: u64 = 0x100;
const TCTL: u64 = 0x400;
const RDBAL: u64 = 0x2800;
const RDLEN: u64 = 0x2808;
const RDT: u64 = 0x2818;
const TDBAL: u64 = 0x3800;
const TDLEN: u64 = 0x3808;
const TDT: u64 = 0x3818;

const RX_RING: u64 = 0x1_0000;
const TX_RING: u64 = 0x2_0000;
const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFERS: u64 = 0x20_0000;
const DESCRIPTORS: u64 = 128;

/// Memory of a guest for which nothing else is said.
pub const MEMORY: u64 = 16 << 20;

/// See the module.
pub struct Guest {
    pub info: AttachInfo,
    pub mac: [u8; 6],
    client: Client,
    memory: DmaSpace,
    file: Arc<File>,
    rx: u64,
    tx: u64,
}

/// Attaches a VM's NIC, without a word of vfio-user.
pub fn connect(place: &Place, vm: &str, mac: u8) -> anyhow::Result<(UnixStream, AttachInfo)> {
    let root = RuntimeRoot::new(place.path("run"));
    let mac = MacAddress([2, 0, 0, 0, 0, mac]);
    attach(&root, &"nic".parse()?, (&vm.parse()?, mac), None)
}

impl Guest {
    /// Attaches a VM's NIC and gives it the guest's memory, as a VMM would, but does not reset it.
    pub fn attach(place: &Place, vm: &str, mac: u8, bytes: u64) -> Self {
        let (stream, info) = connect(place, vm, mac).unwrap();
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(file);
        file.set_len(bytes).unwrap();
        let file = Arc::new(file);
        let offset = FileOffset::from_arc(file.clone(), 0);
        let range = (GuestAddress(0), bytes as usize, Some(offset));
        let memory = GuestMemory::from_ranges_with_files([range]).unwrap();
        let memory = DmaSpace::new(Arc::new(memory));
        let mut client = Client::new(stream, memory.clone(), Limits::default()).unwrap();
        for region in memory.regions() {
            client.dma_map(&region).unwrap();
        }
        Self {
            info,
            mac: [2, 0, 0, 0, 0, mac],
            client,
            memory,
            file,
            rx: 0,
            tx: 0,
        }
    }

    /// A guest that boots: the NIC is reset and its driver starts.
    pub fn boot(place: &Place, vm: &str, mac: u8) -> Self {
        Self::boot_with(place, vm, mac, MEMORY)
    }

    pub fn boot_with(place: &Place, vm: &str, mac: u8, bytes: u64) -> Self {
        let mut guest = Self::attach(place, vm, mac, bytes);
        guest.client.reset().unwrap();
        guest.start();
        guest
    }

    fn start(&mut self) {
        self.set_command(6);
        for n in 0..DESCRIPTORS {
            let descriptor = [RX_BUFFERS + n * 2048, 0].map(u64::to_le_bytes).concat();
            self.memory.write(RX_RING + n * 16, &descriptor).unwrap();
        }
        for (register, value) in [
            (CTRL, 1 << 6),
            (RDBAL, RX_RING as u32),
            (RDLEN, DESCRIPTORS as u32 * 16),
            (RDT, DESCRIPTORS as u32 - 1),
            (TDBAL, TX_RING as u32),
            (TDLEN, DESCRIPTORS as u32 * 16),
            (RCTL, 1 << 1 | 1 << 15 | 1 << 26),
            (TCTL, 1 << 1),
        ] {
            self.write(register, value);
        }
    }

    pub fn write(&mut self, register: u64, value: u32) {
        let written = self
            .client
            .region_write(BAR0, register, &value.to_le_bytes());
        written.unwrap();
    }

    pub fn read(&mut self, register: u64) -> u32 {
        let mut value = [0; 4];
        self.client.region_read(BAR0, register, &mut value).unwrap();
        u32::from_le_bytes(value)
    }

    /// Where its receive ring is, as the NIC knows it.
    pub fn ring(&mut self) -> u32 {
        self.read(RDBAL)
    }

    pub fn set_command(&mut self, command: u16) {
        let written = self
            .client
            .region_write(CONFIG, COMMAND, &command.to_le_bytes());
        written.unwrap();
    }

    pub fn command(&mut self) -> u16 {
        let mut value = [0; 2];
        self.client
            .region_read(CONFIG, COMMAND, &mut value)
            .unwrap();
        u16::from_le_bytes(value)
    }

    pub fn link(&mut self) -> bool {
        self.read(STATUS) & 2 != 0
    }

    /// Waits until the NIC's link is up or down.
    pub fn await_link(&mut self, up: bool) {
        wait("the link", || self.link() == up);
    }

    /// Hands a frame to the NIC. Answers which descriptor it is in.
    pub fn send(&mut self, to: [u8; 6], text: &str) -> u64 {
        let frame = frame(to, self.mac, text);
        let n = self.tx;
        self.tx = (n + 1) % DESCRIPTORS;
        let buffer = TX_BUFFERS + n * 2048;
        self.memory.write(buffer, &frame).unwrap();
        let lower = frame.len() as u64 | 0x0b << 24;
        let descriptor = [buffer, lower].map(u64::to_le_bytes).concat();
        self.memory.write(TX_RING + n * 16, &descriptor).unwrap();
        self.write(TDT, self.tx as u32);
        n
    }

    /// Whether the NIC is done with the descriptor.
    pub fn is_sent(&self, descriptor: u64) -> bool {
        let mut status = [0];
        let at = TX_RING + descriptor * 16 + 12;
        self.memory.read(at, &mut status).unwrap();
        status[0] & 1 != 0
    }

    pub fn await_sent(&self, descriptor: u64) {
        wait("a frame to be sent", || self.is_sent(descriptor));
    }

    /// The next frame that has come: its destination and its text.
    pub fn receive(&mut self) -> Option<([u8; 6], String)> {
        let at = RX_RING + self.rx * 16;
        let mut descriptor = [0; 16];
        self.memory.read(at, &mut descriptor).unwrap();
        if descriptor[12] & 1 == 0 {
            return None;
        }
        let length = u16::from_le_bytes([descriptor[8], descriptor[9]]);
        let mut frame = vec![0; length.into()];
        self.memory
            .read(RX_BUFFERS + self.rx * 2048, &mut frame)
            .unwrap();
        self.memory.write(at + 8, &[0; 8]).unwrap();
        self.write(RDT, self.rx as u32);
        self.rx = (self.rx + 1) % DESCRIPTORS;
        Some((*frame.first_chunk().unwrap(), text(&frame)))
    }

    pub fn await_frame(&mut self) -> ([u8; 6], String) {
        let mut frame = None;
        wait("a frame", || {
            frame = self.receive();
            frame.is_some()
        });
        frame.unwrap()
    }

    /// Whether these bytes are anywhere in its memory.
    pub fn has_in_memory(&self, bytes: &[u8]) -> bool {
        use std::os::unix::fs::FileExt;
        let mut all = vec![0; self.file.metadata().unwrap().len() as usize];
        self.file.read_exact_at(&mut all, 0).unwrap();
        memchr::memmem::find(&all, bytes).is_some()
    }
}

/// A frame with a text in it.
pub fn frame(to: [u8; 6], from: [u8; 6], text: &str) -> Vec<u8> {
    let mut frame = [&to[..], &from, &[0x88, 0xb5], text.as_bytes()].concat();
    frame.resize(frame.len().max(60), 0);
    frame
}

/// The text in a frame.
pub fn text(frame: &[u8]) -> String {
    let text = String::from_utf8_lossy(&frame[14..]);
    text.trim_end_matches('\0').to_owned()
}

/// Waits until something is so.
#[track_caller]
pub fn wait(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::sleep(Duration::from_micros(20));
    }
}
