//! The controller in a real event loop, on a socket for a wire and with the machine's clock.

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};

use crate::dma::GuestMemory;
use event_manager::{EventManager, SubscriberOps};
use vm_memory::GuestAddress;

use super::driver::{EOP, RS, broadcast, descriptor};
use crate::dma::DmaSpace;
use crate::e1000::bench::{BenchLine, MAC};
use crate::e1000::regs::*;
use crate::e1000::{E1000, E1000Config};
use crate::pci::PciFunction;
use crate::wire::{SendOutcome, Wire, WritableFd, WritableSignal};

struct SocketWire(UnixDatagram);

impl Wire for SocketWire {
    fn send(&mut self, frame: &[u8]) -> SendOutcome {
        match self.0.send(frame) {
            Ok(_) => SendOutcome::Sent,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => SendOutcome::Full,
            Err(_) => SendOutcome::Dropped,
        }
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Option<usize> {
        self.0.recv(buffer).ok()
    }

    fn carrier(&self) -> bool {
        true
    }

    fn readable_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    fn writable_fd(&self) -> Option<WritableFd> {
        Some(WritableFd {
            fd: self.0.as_raw_fd(),
            signal: WritableSignal::Out,
        })
    }
}

struct Loop {
    events: EventManager<Arc<Mutex<E1000>>>,
    nic: Arc<Mutex<E1000>>,
    dma: DmaSpace,
    line: Arc<BenchLine>,
    far_end: UnixDatagram,
}

const TX_RING: u64 = 0x1000;
const RX_RING: u64 = 0x2000;
const BUFFER: u64 = 0x8000;
const RX_COUNT: u32 = 8;
const TX_COUNT: u32 = 1024;

impl Loop {
    fn new() -> Self {
        let (near, far_end) = UnixDatagram::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        far_end.set_nonblocking(true).unwrap();
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let dma = DmaSpace::new(Arc::new(memory));
        let line = Arc::new(BenchLine::default());
        let wire = Box::new(SocketWire(near));
        let nic = E1000::new(E1000Config::new(MAC), dma.clone(), line.clone(), wire).unwrap();
        let nic = Arc::new(Mutex::new(nic));
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(nic.clone());
        let this = Self {
            events,
            nic,
            dma,
            line,
            far_end,
        };
        this.nic.lock().unwrap().config_write(4, &[7, 0]);
        for i in 0..u64::from(RX_COUNT) {
            let at = RX_RING + 16 * i;
            this.dma
                .write(at, &descriptor(BUFFER + 0x1000 * i, 0, 0))
                .unwrap();
        }
        for (register, value) in [
            (CTRL, ctrl::SLU),
            (TDBAL, TX_RING as u32 + 0x2000),
            (TDLEN, TX_COUNT * 16),
            (TCTL, tctl::EN),
            (RDBAL, RX_RING as u32),
            (RDLEN, RX_COUNT * 16),
            (RDT, RX_COUNT - 1),
            (RCTL, rctl::EN | rctl::BAM),
        ] {
            this.write(register, value);
        }
        this
    }

    fn write(&self, register: u32, value: u32) {
        let mut nic = self.nic.lock().unwrap();
        nic.bar_write(0, u64::from(register), &value.to_le_bytes());
    }

    fn read(&self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.nic
            .lock()
            .unwrap()
            .bar_read(0, u64::from(register), &mut data);
        u32::from_le_bytes(data)
    }

    /// Handles events until there are none.
    fn settle(&mut self) {
        for _ in 0..1000 {
            if self.events.run_with_timeout(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the event loop spins");
    }
}

#[test]
fn the_loop_rests_while_frames_wait_for_descriptors() {
    let mut this = Loop::new();
    this.settle();
    for _ in 0..10 {
        this.far_end.send(&broadcast(60)).unwrap();
    }
    this.settle();
    assert_eq!(this.read(RDH), RX_COUNT - 1);
    this.write(RDT, 1);
    this.settle();
    assert_eq!(this.read(RDH), 1, "two more");
    this.write(RDT, 6);
    this.settle();
    assert_eq!(this.read(RDH), 2, "the last one");
    this.far_end.send(&broadcast(60)).unwrap();
    this.settle();
    assert_eq!(this.read(RDH), 3, "the loop watches again");
}

#[test]
fn a_full_socket_gets_the_rest_when_it_has_room() {
    let mut this = Loop::new();
    this.dma.write(BUFFER, &broadcast(1500)).unwrap();
    for i in 0..u64::from(TX_COUNT) {
        let bytes = descriptor(BUFFER, EOP | RS | 1500, 0);
        this.dma.write(TX_RING + 0x2000 + 16 * i, &bytes).unwrap();
    }
    this.write(TDT, TX_COUNT - 1);
    this.settle();
    let first = this.read(TDH);
    assert!(first < TX_COUNT - 1, "the socket holds less than the ring");
    let mut received = 0;
    let mut buffer = [0; 2000];
    while received < TX_COUNT - 1 {
        let before = received;
        while this.far_end.recv(&mut buffer).is_ok() {
            received += 1;
        }
        assert!(received > before, "nothing came though there was room");
        this.settle();
    }
    assert_eq!(this.read(TDH), TX_COUNT - 1);
}

#[test]
fn the_end_of_the_throttle_wakes_the_loop() {
    let mut this = Loop::new();
    this.settle();
    this.read(ICR);
    this.write(IMS, icr::RXT0);
    this.write(ITR, 0xffff);
    this.write(ICS, icr::RXT0);
    assert!(this.line.asserted());
    this.read(ICR);
    this.write(ICS, icr::RXT0);
    while !this.line.asserted() {
        this.events.run().unwrap();
    }
    this.settle();
}
