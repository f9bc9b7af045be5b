use std::os::fd::AsRawFd;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::{SendOutcome, WritableFd, WritableSignal};
use super::*;

mod history;

/// What a test sees of the real wire.
#[derive(Default)]
struct Far {
    incoming: std::collections::VecDeque<Vec<u8>>,
    sent: Vec<Vec<u8>>,
    full: bool,
    no_carrier: bool,
    links: Vec<bool>,
}

/// A wire in memory.
struct TestWire {
    far: Arc<Mutex<Far>>,
    readable: EventFd,
    writable: EventFd,
}

/// The test's end of it.
struct FarEnd {
    far: Arc<Mutex<Far>>,
    readable: EventFd,
}

fn wire() -> (Box<TestWire>, FarEnd) {
    let far = Arc::<Mutex<Far>>::default();
    let readable = EventFd::new(EFD_NONBLOCK).unwrap();
    let writable = EventFd::new(EFD_NONBLOCK).unwrap();
    let end = FarEnd {
        far: far.clone(),
        readable: readable.try_clone().unwrap(),
    };
    let wire = TestWire {
        far,
        readable,
        writable,
    };
    (Box::new(wire), end)
}

impl FarEnd {
    fn arrives(&self, frame: Vec<u8>) {
        self.far().incoming.push_back(frame);
        self.readable.write(1).unwrap();
    }

    fn far(&self) -> MutexGuard<'_, Far> {
        self.far.lock().unwrap()
    }
}

impl Wire for TestWire {
    fn send(&mut self, frame: &[u8]) -> SendOutcome {
        let mut far = self.far.lock().unwrap();
        if far.full {
            return SendOutcome::Full;
        }
        far.sent.push(frame.to_vec());
        SendOutcome::Sent
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let frame = self.far.lock().unwrap().incoming.pop_front();
        let Some(frame) = frame else {
            let _ = self.readable.read();
            return None;
        };
        buffer[..frame.len()].copy_from_slice(&frame);
        Some(frame.len())
    }

    fn carrier(&self) -> bool {
        !self.far.lock().unwrap().no_carrier
    }

    fn nic_link(&mut self, up: bool) {
        self.far.lock().unwrap().links.push(up);
    }

    fn readable_fd(&self) -> std::os::fd::RawFd {
        self.readable.as_raw_fd()
    }

    fn writable_fd(&self) -> Option<WritableFd> {
        Some(WritableFd {
            fd: self.writable.as_raw_fd(),
            signal: WritableSignal::In,
        })
    }
}

/// The address that port `n` is given.
fn address(n: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, n]
}

/// A frame to an address, with a number in it.
fn frame(to: [u8; 6], number: u8) -> Vec<u8> {
    [&to[..], &[2, 9, 9, 9, 9, 9, 8, 0, number]].concat()
}

fn ports(turns: &Turns, count: u8) -> Vec<Port> {
    let ports: Vec<_> = (0..count)
        .map(|n| turns.port(address(n)).unwrap())
        .collect();
    for port in &ports {
        turns.plug(port.id(), true).unwrap();
    }
    ports
}

const FOR_EVER: Parked = Parked::Stall(Duration::from_secs(3600));

fn receive(port: &mut Port) -> Option<Vec<u8>> {
    let mut buffer = [0; 64];
    let length = port.receive(&mut buffer)?;
    Some(buffer[..length].to_vec())
}

/// Whether an event loop would be woken by this descriptor.
fn is_ready(fd: std::os::fd::RawFd) -> bool {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one structure, which the call fills.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
}

fn room(port: &Port) -> bool {
    is_ready(port.writable_fd().unwrap().fd)
}

#[test]
fn only_the_port_with_the_turn_is_at_the_wire() {
    let (wire, far) = wire();
    let turns = Turns::new(wire, Parked::Down);
    let mut ports = ports(&turns, 2);
    assert!(!ports[0].carrier() && !ports[1].carrier());
    assert_eq!(ports[0].send(&frame(address(9), 0)), SendOutcome::Dropped);
    for turn in [0, 1, 0] {
        turns.give(Some(ports[turn].id())).unwrap();
        let parked = 1 - turn;
        assert!(ports[turn].carrier() && !ports[parked].carrier());
        far.arrives(frame([0xff; 6], 7));
        assert!(is_ready(ports[turn].readable_fd()));
        assert_eq!(receive(&mut ports[parked]), None);
        assert!(!is_ready(ports[parked].readable_fd()));
        assert_eq!(receive(&mut ports[turn]), Some(frame([0xff; 6], 7)));
        assert_eq!(receive(&mut ports[turn]), None);
        assert!(!is_ready(ports[turn].readable_fd()));
        assert_eq!(ports[turn].send(&frame(address(9), 1)), SendOutcome::Sent);
        assert_eq!(
            ports[parked].send(&frame(address(9), 2)),
            SendOutcome::Dropped
        );
    }
    turns.give(None).unwrap();
    assert_eq!(turns.holder(), None);
    assert_eq!(ports[0].send(&frame(address(9), 3)), SendOutcome::Dropped);
    assert!(far.far().sent.iter().all(|frame| frame[14] == 1));
    let counters = turns.counters(ports[0].id()).unwrap();
    assert_eq!(
        (counters.sent, counters.received, counters.turns),
        (2, 2, 2)
    );
    assert_eq!(counters.sent_without_carrier, 3);
}

#[test]
fn a_frame_for_a_parked_port_is_lost_and_never_the_other_ones() {
    let (wire, far) = wire();
    let turns = Turns::new(wire, Parked::Down);
    let mut ports = ports(&turns, 2);
    turns.give(Some(ports[0].id())).unwrap();
    // Also where its guest asks for the other's address.
    ports[0].stations(&[address(0), address(1)]);
    far.arrives(frame(address(1), 1));
    far.arrives(frame(address(0), 2));
    far.arrives(frame(address(77), 3));
    assert_eq!(receive(&mut ports[0]), Some(frame(address(0), 2)));
    assert_eq!(receive(&mut ports[0]), Some(frame(address(77), 3)));
    assert_eq!(receive(&mut ports[0]), None);
    assert_eq!(turns.counters(ports[1].id()).unwrap().lost_while_parked, 1);
    assert_eq!(
        turns.counters(ports[0].id()).unwrap().refused_as_anothers,
        1
    );
}

#[test]
fn what_a_nic_has_asked_for_is_its_own_too() {
    let (wire, far) = wire();
    let turns = Turns::new(wire, FOR_EVER);
    let mut ports = ports(&turns, 2);
    turns.give(Some(ports[1].id())).unwrap();
    ports[1].stations(&[address(50)]);
    turns.give(Some(ports[0].id())).unwrap();
    far.arrives(frame(address(50), 1));
    assert_eq!(receive(&mut ports[0]), None);
    turns.give(Some(ports[1].id())).unwrap();
    assert_eq!(receive(&mut ports[1]), Some(frame(address(50), 1)));
    // It has another one now.
    ports[1].stations(&[address(51)]);
    turns.give(Some(ports[0].id())).unwrap();
    far.arrives(frame(address(50), 2));
    assert_eq!(receive(&mut ports[0]), Some(frame(address(50), 2)));
}

#[test]
fn frames_wait_for_a_stalled_port_in_their_order_and_within_bounds() {
    let (wire, far) = wire();
    let turns = Turns::new(wire, FOR_EVER);
    let mut ports = ports(&turns, 2);
    turns.give(Some(ports[1].id())).unwrap();
    turns.give(Some(ports[0].id())).unwrap();
    assert!(ports[1].carrier() && !ports[1].loses_frames());
    assert_eq!(ports[1].send(&frame(address(9), 0)), SendOutcome::Full);
    assert!(!room(&ports[1]));
    let many = member::MAX_WAITING_FRAMES as u32 + 7;
    for number in 0..many {
        far.arrives([&address(1)[..], &number.to_be_bytes()].concat());
    }
    // Not all at once; it asks to be called again.
    let mut calls = 0;
    while is_ready(ports[0].readable_fd()) {
        assert_eq!(receive(&mut ports[0]), None);
        calls += 1;
    }
    assert!((8..40).contains(&calls), "{calls}");
    turns.give(Some(ports[1].id())).unwrap();
    assert!(room(&ports[1]));
    assert_eq!(ports[1].send(&frame(address(9), 0)), SendOutcome::Sent);
    assert!(!room(&ports[1]));
    far.arrives([&address(1)[..], &many.to_be_bytes()].concat());
    let numbers = std::iter::from_fn(|| receive(&mut ports[1]));
    let numbers: Vec<_> = numbers
        .map(|frame| u32::from_be_bytes(*frame[6..].first_chunk().unwrap()))
        .collect();
    let kept = 0..member::MAX_WAITING_FRAMES as u32;
    assert_eq!(numbers, kept.chain([many]).collect::<Vec<_>>());
    let counters = turns.counters(ports[1].id()).unwrap();
    assert_eq!((counters.lost_while_parked, counters.waited), (7, 512));
    assert_eq!(counters.delivered_after_wait, 512);
}

#[test]
fn large_frames_wait_within_bounds_too() {
    let (wire, far) = wire();
    let turns = Turns::new(wire, FOR_EVER);
    let mut ports = ports(&turns, 2);
    turns.give(Some(ports[1].id())).unwrap();
    turns.give(Some(ports[0].id())).unwrap();
    let mut buffer = vec![0; 16 << 10];
    for _ in 0..100 {
        far.arrives([&address(1)[..], &vec![0; (16 << 10) - 6]].concat());
        assert_eq!(ports[0].receive(&mut buffer), None);
    }
    let counters = turns.counters(ports[1].id()).unwrap();
    assert_eq!((counters.waited, counters.lost_while_parked), (64, 36));
}

#[test]
fn a_port_that_has_waited_too_long_has_no_carrier() {
    let (wire, far) = wire();
    let turns = Turns::new(wire, Parked::Stall(Duration::ZERO));
    let mut ports = ports(&turns, 2);
    turns.give(Some(ports[1].id())).unwrap();
    turns.give(Some(ports[0].id())).unwrap();
    assert!(is_ready(ports[1].readable_fd()) && room(&ports[1]));
    assert!(!ports[1].carrier() && ports[1].loses_frames() && !ports[0].loses_frames());
    assert_eq!(ports[1].send(&frame(address(9), 0)), SendOutcome::Dropped);
    far.arrives(frame(address(1), 1));
    assert_eq!(receive(&mut ports[0]), None);
    assert_eq!(turns.counters(ports[1].id()).unwrap().lost_while_parked, 1);
    assert_eq!(receive(&mut ports[1]), None);
    assert!(!is_ready(ports[1].readable_fd()));
}

#[test]
fn a_stalled_port_is_woken_when_its_time_is_up() {
    let (wire, far) = wire();
    let turns = Turns::new(wire, Parked::Stall(Duration::from_millis(20)));
    let mut ports = ports(&turns, 2);
    turns.give(Some(ports[1].id())).unwrap();
    turns.give(Some(ports[0].id())).unwrap();
    far.arrives(frame(address(1), 1));
    receive(&mut ports[0]);
    // Nothing is to be seen but the time.
    assert_eq!(receive(&mut ports[1]), None);
    while !is_ready(ports[1].readable_fd()) {}
    assert!(!ports[1].carrier());
    assert!(room(&ports[1]), "what waits in its ring may go");
    let counters = turns.counters(ports[1].id()).unwrap();
    assert_eq!(counters.lost_after_wait + counters.lost_while_parked, 1);
}

#[test]
fn the_far_end_sees_no_link_loss_when_the_turn_goes_on() {
    let (wire, far) = wire();
    let turns = Turns::new(wire, Parked::Down);
    let mut ports = ports(&turns, 2);
    turns.give(Some(ports[0].id())).unwrap();
    ports[0].nic_link(true);
    ports[1].nic_link(false);
    for turn in [1, 0, 1] {
        turns.give(Some(ports[turn].id())).unwrap();
        // The one that lost the turn sees its carrier go, then the other sees its come.
        ports[1 - turn].nic_link(false);
        ports[turn].nic_link(true);
        receive(&mut ports[turn]);
    }
    assert_eq!(far.far().links, [true]);
    ports[1].nic_link(false);
    ports[1].nic_link(true);
    turns.give(None).unwrap();
    assert_eq!(far.far().links, [true, false, true, false]);
    // One that is not up is shown so as soon as it has seen the carrier.
    turns.give(Some(ports[1].id())).unwrap();
    ports[1].nic_link(true);
    turns.give(Some(ports[0].id())).unwrap();
    receive(&mut ports[0]);
    assert_eq!(far.far().links.last(), Some(&false));
}

#[test]
fn what_nobody_was_there_for_is_not_delivered_late() {
    let (wire, far) = wire();
    let turns = Turns::new(wire, Parked::Down);
    let mut ports = ports(&turns, 2);
    far.arrives(frame([0xff; 6], 1));
    far.arrives(frame(address(1), 2));
    turns.give(Some(ports[0].id())).unwrap();
    assert_eq!(receive(&mut ports[0]), None);
    assert_eq!(turns.lost_without_turn(), 1);
    assert_eq!(turns.counters(ports[1].id()).unwrap().lost_while_parked, 1);
    turns.plug(ports[0].id(), false).unwrap();
    assert_eq!(turns.holder(), Some(ports[0].id()));
    assert!(!ports[0].carrier());
    far.arrives(frame([0xff; 6], 3));
    assert_eq!(receive(&mut ports[0]), None);
    assert_eq!(ports[0].send(&frame(address(9), 1)), SendOutcome::Dropped);
    turns.plug(ports[0].id(), true).unwrap();
    far.arrives(frame([0xff; 6], 4));
    assert_eq!(receive(&mut ports[0]), Some(frame([0xff; 6], 4)));
    assert_eq!(turns.lost_without_turn(), 2);
}

#[test]
fn a_port_that_goes_gives_its_turn_up_and_leaves_no_descriptor() {
    let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let (wire, _far) = wire();
    let turns = Turns::new(wire, Parked::Down);
    let before = count();
    // Other tests of this process have descriptors too: those of a thousand leaks would show all
    // the same.
    for n in 0..200 {
        let port = turns.port(address(n)).unwrap();
        turns.plug(port.id(), true).unwrap();
        turns.give(Some(port.id())).unwrap();
        let id = port.id();
        drop(port);
        assert_eq!((turns.holder(), turns.counters(id)), (None, None));
        assert!(matches!(turns.give(Some(id)), Err(TurnError::Gone)));
        assert!(turns.plug(id, true).is_err());
    }
    assert!(count() < before + 500, "{before} {}", count());
}

#[test]
fn the_frames_at_the_edges_of_a_turn_are_known() {
    let (wire, _far) = wire();
    let turns = Turns::new(wire, Parked::Down);
    let mut ports = ports(&turns, 2);
    let first = turns.give(Some(ports[0].id())).unwrap();
    assert_eq!(turns.times(first).unwrap().first_frame_ns, None);
    ports[0].send(&frame(address(9), 1));
    let second = turns.give(Some(ports[1].id())).unwrap();
    ports[1].send(&frame(address(9), 1));
    let (first, second) = (turns.times(first).unwrap(), turns.times(second).unwrap());
    assert_eq!(first.first_frame_ns, second.last_frame_before_ns);
    assert!(second.first_frame_ns.unwrap() >= second.since_ns);
    assert!(second.since_ns >= first.first_frame_ns.unwrap());
    assert_eq!(turns.give(Some(ports[1].id())).unwrap(), second.serial);
}

/// The models say which addresses they receive.
#[test]
fn an_e1000_says_which_addresses_it_receives() {
    use crate::pci::PciFunction;
    struct NoLine;
    impl crate::irq::IrqLine for NoLine {
        fn set_level(&self, _: bool) {}
    }
    let (wire, far) = wire();
    let turns = Turns::new(wire, Parked::Down);
    let mut other = turns.port(address(1)).unwrap();
    let port = turns.port(address(0)).unwrap();
    for id in [other.id(), port.id()] {
        turns.plug(id, true).unwrap();
    }
    turns.give(Some(other.id())).unwrap();
    let config = crate::e1000::E1000Config::new(address(0));
    let dma = crate::dma::DmaSpace::empty();
    let mut nic = crate::e1000::E1000::new(config, dma, Arc::new(NoLine), Box::new(port)).unwrap();
    let mut for_other = |to| {
        far.arrives(frame(to, 0));
        receive(&mut other).is_some()
    };
    assert!(for_other(address(60)));
    // RAL0 and RAH0 (13.5.2).
    nic.config_write(4, &[7, 0]);
    nic.bar_write(0, 0x5400, &u32::from_le_bytes([2, 0, 0, 0]).to_le_bytes());
    nic.bar_write(0, 0x5404, &(1 << 31 | 0x3c00u32).to_le_bytes());
    assert!(!for_other(address(60)), "it has it now");
    assert!(!for_other(address(0)), "the one it was given stays its own");
    nic.reset();
    assert!(for_other(address(60)), "a reset takes its own one back");
}
