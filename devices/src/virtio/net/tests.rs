//! A card on a wire that the test holds the other end of, and on the gateway.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::virtio::testing::{Driver, EVENT_IDX};
use crate::wire::WritableFd;
use crate::wire::gateway::{Gateway, GatewayConfig};
use crate::wire::unix_link::UnixLink;

const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

/// What the two ends of a test's wire share.
pub(crate) struct Cable {
    to_card: VecDeque<Vec<u8>>,
    from_card: Vec<Vec<u8>>,
    room: usize,
    carrier: bool,
    readable: EventFd,
    writable: EventFd,
}

#[derive(Clone)]
pub(crate) struct CableEnd(Arc<Mutex<Cable>>);

impl CableEnd {
    pub(crate) fn new() -> Self {
        let eventfd = || EventFd::new(EFD_NONBLOCK).unwrap();
        Self(Arc::new(Mutex::new(Cable {
            to_card: VecDeque::new(),
            from_card: Vec::new(),
            room: usize::MAX,
            carrier: true,
            readable: eventfd(),
            writable: eventfd(),
        })))
    }

    /// As this one is now, for a twin of the card.
    pub(crate) fn twin(&self) -> Self {
        let twin = Self::new();
        let ours = self.0.lock().unwrap();
        let mut theirs = twin.0.lock().unwrap();
        theirs.to_card = ours.to_card.clone();
        (theirs.room, theirs.carrier) = (ours.room, ours.carrier);
        drop(theirs);
        twin.0.lock().unwrap().readable.write(1).unwrap();
        twin
    }

    /// The cable is pulled or plugged in.
    pub(crate) fn set_carrier(&self, carrier: bool) {
        let mut cable = self.0.lock().unwrap();
        cable.carrier = carrier;
        cable.readable.write(1).unwrap();
    }

    /// The cable takes so many frames more.
    pub(crate) fn set_room(&self, frames: usize) {
        let mut cable = self.0.lock().unwrap();
        cable.room = frames;
        cable.writable.write(1).unwrap();
    }

    pub(crate) fn arrive(&self, frame: Vec<u8>) {
        let mut cable = self.0.lock().unwrap();
        cable.to_card.push_back(frame);
        cable.readable.write(1).unwrap();
    }

    pub(crate) fn sent(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.0.lock().unwrap().from_card)
    }
}

impl Wire for CableEnd {
    fn send(&mut self, frame: &[u8]) -> SendOutcome {
        let mut cable = self.0.lock().unwrap();
        if cable.from_card.len() >= cable.room {
            return SendOutcome::Full;
        }
        cable.from_card.push(frame.to_vec());
        SendOutcome::Sent
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let mut cable = self.0.lock().unwrap();
        let Some(frame) = cable.to_card.pop_front() else {
            let _ = cable.readable.read();
            return None;
        };
        buffer[..frame.len()].copy_from_slice(&frame);
        Some(frame.len())
    }

    fn carrier(&self) -> bool {
        self.0.lock().unwrap().carrier
    }

    fn readable_fd(&self) -> RawFd {
        self.0.lock().unwrap().readable.as_raw_fd()
    }

    fn writable_fd(&self) -> Option<WritableFd> {
        let fd = self.0.lock().unwrap().writable.as_raw_fd();
        Some(WritableFd {
            fd,
            signal: WritableSignal::In,
        })
    }
}

fn card() -> (Driver<Net>, CableEnd) {
    let cable = CableEnd::new();
    let mut driver = Driver::new(Net::new(MAC, Box::new(cable.clone())));
    driver.enable_msix();
    driver.start(F_MAC | F_STATUS | EVENT_IDX);
    (driver, cable)
}

fn frame(n: usize) -> Vec<u8> {
    vec![n as u8; 60 + n]
}

#[test]
fn frames_leave_without_their_header() {
    let (mut driver, cable) = card();
    driver.post(1, &[&[0; 12], &frame(1)], &[]);
    driver.post(1, &[&[&[0; 12][..], &frame(2)].concat()], &[]);
    driver.kick(1);
    assert_eq!(cable.sent(), [frame(1), frame(2)]);
    assert_eq!(driver.used(1).len(), 2);
    assert_eq!(driver.vectors.take_triggered(), [2]);
}

#[test]
fn frames_arrive_behind_a_header_and_padded() {
    let (mut driver, cable) = card();
    driver.post(0, &[], &[1526]);
    driver.post(0, &[], &[12, 1514]);
    driver.kick(0);
    assert!(driver.used(0).is_empty());
    cable.arrive(vec![9; 42]);
    cable.arrive(frame(200));
    driver.run_events();
    let used = driver.used(0);
    assert_eq!(
        used[0].data,
        [&RECEIVED_HEADER[..], &[9; 42], &[0; 18]].concat()
    );
    assert_eq!(used[1].data, [&RECEIVED_HEADER[..], &frame(200)].concat());
    assert_eq!(driver.vectors.take_triggered(), [1]);
}

#[test]
fn frames_wait_in_the_wire_for_buffers() {
    let (mut driver, cable) = card();
    for n in 0..5 {
        cable.arrive(frame(n));
    }
    driver.run_events();
    assert_eq!(cable.0.lock().unwrap().to_card.len(), 5);
    for n in 0..5 {
        driver.post(0, &[], &[1526]);
        driver.kick(0);
        assert_eq!(driver.used(0)[0].data[12..], frame(n));
    }
}

#[test]
fn a_full_wire_leaves_frames_in_the_ring_until_it_has_room() {
    let (mut driver, cable) = card();
    cable.0.lock().unwrap().room = 2;
    for n in 0..4 {
        driver.post(1, &[&[0; 12], &frame(n)], &[]);
    }
    driver.kick(1);
    assert_eq!(driver.used(1).len(), 2);
    assert_eq!(cable.sent(), [frame(0), frame(1)]);
    cable.0.lock().unwrap().writable.write(1).unwrap();
    driver.run_events();
    assert_eq!(driver.used(1).len(), 2);
    assert_eq!(cable.sent(), [frame(2), frame(3)]);
}

#[test]
fn frames_that_are_none_or_want_offloads_are_lost_and_returned() {
    let (mut driver, cable) = card();
    let mut offload = [0; 12];
    offload[GSO_TYPE] = 1;
    driver.post(1, &[b"short"], &[]);
    driver.post(1, &[&[0; 12]], &[]);
    driver.post(1, &[&offload, &frame(1)], &[]);
    driver.post(1, &[&[0; 12], &vec![1; MAX_FRAME_BYTES + 1]], &[]);
    driver.post(1, &[], &[64]);
    driver.post(1, &[&[0; 12], &frame(2)], &[]);
    driver.kick(1);
    assert_eq!(driver.used(1).len(), 6);
    assert_eq!(cable.sent(), [frame(2)]);
    assert_eq!(driver.status(), 15);
}

#[test]
fn a_frame_longer_than_its_buffer_is_lost_and_the_buffer_used_for_the_next() {
    let (mut driver, cable) = card();
    driver.post(0, &[], &[100]);
    driver.kick(0);
    cable.arrive(vec![1; 500]);
    cable.arrive(frame(3));
    driver.run_events();
    assert_eq!(driver.used(0)[0].data[12..], frame(3));
}

#[test]
fn the_driver_sees_the_carrier_and_the_address() {
    let (driver, cable) = card();
    assert_eq!(driver.read(0x2000, 6).to_le_bytes()[..6], MAC);
    assert_eq!(driver.read(0x2006, 2), 1);
    cable.0.lock().unwrap().carrier = false;
    cable.0.lock().unwrap().readable.write(1).unwrap();
    let mut driver = driver;
    driver.run_events();
    assert_eq!(driver.vectors.take_triggered(), [0]);
    assert_eq!(driver.read(0x2006, 2), 0);
}

#[test]
fn frames_that_came_before_the_driver_are_lost() {
    let (mut driver, cable) = card();
    driver.write(0x14, 1, 0);
    cable.arrive(frame(1));
    driver.run_events();
    assert!(cable.0.lock().unwrap().to_card.is_empty());
    cable.arrive(frame(2));
    driver.start(0);
    driver.post(0, &[], &[1526]);
    driver.kick(0);
    cable.arrive(frame(3));
    driver.run_events();
    assert_eq!(driver.used(0)[0].data[12..], frame(3));
}

#[test]
fn the_gateway_answers_within_the_notification() {
    let gateway = Gateway::new(&GatewayConfig::default()).unwrap();
    let mut driver = Driver::new(Net::new(MAC, Box::new(gateway)));
    driver.start(0);
    driver.post(0, &[], &[1526]);
    driver.kick(0);
    let arp = [
        &[0xff; 6][..],
        &MAC,
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
        &MAC,
        &[10, 0, 2, 15],
        &[0; 6],
        &[10, 0, 2, 2],
    ]
    .concat();
    driver.post(1, &[&[0; 12], &arp], &[]);
    driver.kick(1);
    let used = driver.used(0);
    assert_eq!(used[0].data[12..18], MAC);
    assert_eq!(used[0].data[12 + 28..12 + 32], [10, 0, 2, 2]);
}

/// A card on a wire that listens, with `buffers` to receive into, and where to connect to it.
fn listening_card(buffers: usize) -> (Driver<Net>, std::path::PathBuf, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("link.sock");
    let link = UnixLink::listen(&path).unwrap();
    let mut driver = Driver::new(Net::new(MAC, Box::new(link)));
    driver.enable_msix();
    driver.start(F_MAC | F_STATUS);
    for _ in 0..buffers {
        driver.post(0, &[], &[1526]);
    }
    driver.kick(0);
    driver.run_events();
    driver.vectors.take_triggered();
    (driver, path, directory)
}

fn link_is_up(driver: &Driver<Net>) -> bool {
    driver.read(0x2006, 2) == 1
}

#[test]
fn the_driver_is_told_each_time_that_a_peer_of_a_listening_wire_came_and_went() {
    let (mut driver, path, _directory) = listening_card(8);
    assert!(!link_is_up(&driver));
    for round in 0..50 {
        let mut peer = std::os::unix::net::UnixStream::connect(&path).unwrap();
        driver.run_events();
        assert!(link_is_up(&driver), "round {round}");
        assert!(driver.vectors.take_triggered().contains(&0));
        if round % 2 == 0 {
            use std::io::Write;
            peer.write_all(&[&60u32.to_be_bytes()[..], &[1; 60]].concat())
                .unwrap();
        }
        drop(peer);
        if round % 3 == 0 {
            // Whoever sends into the wire finds out before the event loop does.
            driver.post(1, &[&[0; 12], &frame(1)], &[]);
            driver.kick(1);
        }
        driver.run_events();
        driver.run_events();
        assert!(!link_is_up(&driver), "round {round}");
        assert!(driver.vectors.take_triggered().contains(&0));
        if !driver.used(0).is_empty() {
            driver.post(0, &[], &[1526]);
            driver.kick(0);
            driver.vectors.take_triggered();
        }
    }
}

#[test]
fn a_peer_that_went_while_there_was_no_buffer_is_noticed_with_the_next_buffer() {
    let (mut driver, path, _directory) = listening_card(0);
    let peer = std::os::unix::net::UnixStream::connect(&path).unwrap();
    // Without a buffer nothing is taken from the wire.
    driver.post(0, &[], &[1526]);
    driver.kick(0);
    driver.run_events();
    assert!(link_is_up(&driver));
    {
        use std::io::Write;
        (&peer)
            .write_all(&[&60u32.to_be_bytes()[..], &[1; 60]].concat())
            .unwrap();
    }
    driver.run_events();
    drop(peer);
    driver.run_events();
    driver.vectors.take_triggered();
    driver.post(0, &[], &[1526]);
    driver.kick(0);
    assert!(!link_is_up(&driver));
    assert!(driver.vectors.take_triggered().contains(&0));
}

#[test]
fn a_flood_without_a_driver_is_lost_to_the_last_frame() {
    let (mut driver, cable) = card();
    driver.write(0x14, 1, 0);
    for _ in 0..3 * MAX_DROPPED {
        cable.arrive(frame(1));
    }
    for _ in 0..4 {
        driver.run_events();
    }
    assert!(cable.0.lock().unwrap().to_card.is_empty());
}

#[test]
fn a_pulled_cable_loses_frames_both_ways_and_the_driver_is_told() {
    let (mut driver, cable) = card();
    driver.post(0, &[], &[1526]);
    driver.kick(0);
    driver.vectors.take_triggered();
    driver.function().set_cable(false);
    assert_eq!(driver.vectors.take_triggered(), [0]);
    assert_eq!(driver.read(0x2006, 2), 0);
    cable.arrive(frame(1));
    driver.post(1, &[&[0; 12], &frame(2)], &[]);
    driver.kick(1);
    driver.run_events();
    assert_eq!((driver.used(0).len(), driver.used(1).len()), (0, 1));
    assert!(cable.sent().is_empty());
    driver.function().set_cable(true);
    assert_eq!(driver.read(0x2006, 2), 1);
    cable.arrive(frame(3));
    driver.run_events();
    assert_eq!(driver.used(0)[0].data[12..], frame(3));
}
