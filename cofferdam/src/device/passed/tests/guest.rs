//! A device host with such a device in this process, and its guests: memory in a file and a
//! vfio-user client each.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use devices::dma::{DmaRegion, DmaSpace, GuestMemory};
use devices::vfio_user::message::{IrqAction, MSIX};
use devices::vfio_user::{Client, Limits};
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{FileOffset, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Device, EIAC, IMS, IVAR, RCTL, RDBAL, RDLEN, TCTL, TDT};
use crate::device::at_step::Waiting;
use crate::device::card::Card;
use crate::device::happened::Happened;
use crate::device::hello::{AttachInfo, Welcome, read_line};
use crate::device::host::Host;
use crate::device::passed::PassedCard;
use crate::device::{HostConfig, OnExit, ParkedAs, keeper};
use crate::options::MacAddress;

pub const MEMORY: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(120);
const CONFIG: u32 = 7;
const COMMAND: u64 = 4;
/// Message Control of its MSI-X capability.
const CONTROL: u64 = 0xa2;
const ENABLE: u16 = 1 << 15;

/// A device host named "nic".
pub fn host(parked: ParkedAs, slots: usize) -> (Arc<Host<PassedCard>>, Device) {
    waiting_host(parked, slots, Waiting::default())
}

/// The same; its switches wait where they are told to.
pub fn waiting_host(
    parked: ParkedAs,
    slots: usize,
    waiting: Waiting,
) -> (Arc<Host<PassedCard>>, Device) {
    let (device, kind, hardware) = Device::new();
    let mut card = PassedCard::of(kind, hardware, parked);
    card.waiting = waiting;
    (host_of(card, parked, slots), device)
}

/// The same with this card.
pub fn host_of<C: Card>(card: C, parked: ParkedAs, slots: usize) -> Arc<Host<C>> {
    let (host, events) = host_without_keeper(card, parked, slots);
    let kept = host.clone();
    std::thread::spawn(move || keeper::keep(&kept, &events));
    host
}

/// The same, and what its keeper would hear.
pub fn host_without_keeper<C: Card>(
    card: C,
    parked: ParkedAs,
    slots: usize,
) -> (Arc<Host<C>>, Receiver<Happened>) {
    let config = HostConfig {
        name: "nic".parse().unwrap(),
        wire: "its own wire".to_owned(),
        parked,
        on_exit: OnExit::Next,
        slots,
    };
    let (sender, events) = channel();
    (Arc::new(Host::new(config, card, sender)), events)
}

/// Memory of a VM.
fn file(bytes: u64) -> Arc<File> {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(bytes).unwrap();
    Arc::new(file)
}

/// See the module.
pub struct Guest {
    pub mac: [u8; 6],
    pub info: AttachInfo,
    client: Client,
    events: Vec<EventFd>,
}

/// Attaches a VM; the host's answer is on the stream.
pub fn connect<C: Card>(
    host: &Host<C>,
    vm: &str,
    mac: u8,
) -> anyhow::Result<(UnixStream, AttachInfo)> {
    connect_saved(host, (vm, mac), None)
}

/// The same for one that goes on from a snapshot, with a NIC of this model.
pub fn connect_saved<C: Card>(
    host: &Host<C>,
    (vm, mac): (&str, u8),
    goes_on: Option<&str>,
) -> anyhow::Result<(UnixStream, AttachInfo)> {
    let (ours, theirs) = UnixStream::pair()?;
    let mac = MacAddress([2, 0, 0, 0, 0, mac]);
    host.attach((vm.parse()?, mac), goes_on, theirs)?;
    match welcome(&ours)? {
        Welcome::Ok(info) => Ok((ours, info)),
        Welcome::Wait {} => anyhow::bail!("it was waited for"),
        Welcome::Error(error) => anyhow::bail!(error),
    }
}

/// What a device host says to one that attaches.
pub fn welcome(stream: &UnixStream) -> anyhow::Result<Welcome> {
    loop {
        match read_line(stream, LIMIT)? {
            Welcome::Wait {} => {}
            welcome => return Ok(welcome),
        }
    }
}

impl Guest {
    /// A VM with its memory, whose driver has not begun.
    pub fn attach<C: Card>(host: &Host<C>, vm: &str, mac: u8) -> Self {
        Self::attach_with(host, vm, mac, MEMORY)
    }

    /// The same with so much memory.
    pub fn attach_with<C: Card>(host: &Host<C>, vm: &str, mac: u8, bytes: u64) -> Self {
        Self::at(connect(host, vm, mac).unwrap(), mac, bytes)
    }

    /// A VM that goes on from this state of its NIC.
    pub fn from_saved<C: Card>(host: &Host<C>, vm: &str, mac: u8, state: &[u8]) -> Self {
        let at = connect_saved(host, (vm, mac), Some("82574L")).unwrap();
        let mut guest = Self::at(at, mac, MEMORY);
        guest.reset();
        guest.give_events();
        guest.client.restore(state).unwrap();
        guest
    }

    fn at((stream, info): (UnixStream, AttachInfo), mac: u8, bytes: u64) -> Self {
        let offset = FileOffset::from_arc(file(bytes), 0);
        let range = (GuestAddress(0), bytes as usize, Some(offset));
        let memory = GuestMemory::from_ranges_with_files([range]).unwrap();
        let memory = DmaSpace::new(Arc::new(memory));
        let mut client = Client::new(stream, memory.clone(), Limits::default()).unwrap();
        for region in memory.regions() {
            client.dma_map(&region).unwrap();
        }
        let event = |_| EventFd::new(EFD_NONBLOCK).unwrap();
        Self {
            mac: [2, 0, 0, 0, 0, mac],
            info,
            client,
            events: (0..5).map(event).collect(),
        }
    }

    /// A VM whose driver runs, with values of its own in the registers.
    pub fn boot<C: Card>(host: &Host<C>, vm: &str, mac: u8) -> Self {
        Self::boot_with(host, vm, mac, MEMORY)
    }

    /// The same with so much memory.
    pub fn boot_with<C: Card>(host: &Host<C>, vm: &str, mac: u8, bytes: u64) -> Self {
        let mut guest = Self::attach_with(host, vm, mac, bytes);
        guest.client.reset().unwrap();
        guest.start();
        guest
    }

    fn give_events(&mut self) {
        self.client
            .set_irqs(MSIX, IrqAction::Trigger, &self.events)
            .unwrap();
    }

    /// Has its NIC stand still.
    pub fn stop(&mut self) {
        self.client.stop().unwrap();
    }

    /// Has it go on.
    pub fn go_on(&mut self) {
        self.client.go_on().unwrap();
    }

    /// The state of its NIC.
    pub fn save(&mut self) -> Vec<u8> {
        self.client.save().unwrap()
    }

    /// Puts a state in the place of that which its NIC has. Says whether it was taken.
    pub fn restore(&mut self, state: &[u8]) -> bool {
        self.client.restore(state).is_ok()
    }

    pub fn start(&mut self) {
        self.set_command(6);
        self.give_events();
        let client = &mut self.client;
        client
            .region_write(CONFIG, CONTROL, &ENABLE.to_le_bytes())
            .unwrap();
        for vector in 0..5 {
            // Its message is routed here, where nobody looks at it; its mask goes.
            client.region_write(3, vector * 16 + 12, &[0; 4]).unwrap();
        }
        self.write(RDBAL, self.ring());
        self.write(RDLEN, 0x100);
        self.write(EIAC, 0x01f0_0000);
        // Each cause has the vector of its number, as the device sends them.
        self.write(IVAR, 0x000c_ba98);
        self.write(RCTL, 2);
        self.write(TCTL, 2);
        // What came of that is dealt with.
        self.rearm();
        self.rearm();
    }

    /// As the end of an interrupt's handler: every cause is let through again.
    pub fn rearm(&mut self) {
        self.write(IMS, 0x01f0_0004);
    }

    /// Where its receive ring is.
    pub fn ring(&self) -> u32 {
        u32::from(self.mac[5]) << 16
    }

    pub fn write(&mut self, register: u32, value: u32) {
        let bytes = value.to_le_bytes();
        self.client
            .region_write(0, register.into(), &bytes)
            .unwrap();
    }

    pub fn read(&mut self, register: u32) -> u32 {
        let mut bytes = [0; 4];
        self.client
            .region_read(0, register.into(), &mut bytes)
            .unwrap();
        u32::from_le_bytes(bytes)
    }

    /// The first bytes of configuration space: who it is.
    pub fn identity(&mut self) -> [u8; 4] {
        let mut bytes = [0; 4];
        self.client.region_read(CONFIG, 0, &mut bytes).unwrap();
        bytes
    }

    pub fn set_command(&mut self, command: u16) {
        let bytes = command.to_le_bytes();
        self.client.region_write(CONFIG, COMMAND, &bytes).unwrap();
    }

    pub fn reset(&mut self) {
        self.client.reset().unwrap();
    }

    /// Gives the device host as much memory again, behind the first.
    pub fn give_more(&mut self) {
        let more = DmaRegion {
            address: MEMORY,
            len: MEMORY,
            file: file(MEMORY),
            offset: 0,
        };
        self.client.dma_map(&more).unwrap();
    }

    /// Takes that away.
    pub fn take_back(&mut self) {
        self.client.dma_unmap(MEMORY, MEMORY).unwrap();
    }

    /// Hands the device something to send.
    pub fn send(&mut self, tail: u32) {
        self.write(TDT, tail);
    }

    /// Vectors that have interrupted it since the last time.
    pub fn interrupts(&self) -> Vec<usize> {
        let numbered = self.events.iter().enumerate();
        let came = numbered.filter(|(_, event)| event.read().is_ok());
        came.map(|(number, _)| number).collect()
    }
}

/// Waits until something is so.
#[track_caller]
pub fn wait(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
