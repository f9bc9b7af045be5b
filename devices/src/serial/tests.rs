//! The port from both ends: a guest's accesses, and files, pipes and clients of the socket.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use event_manager::{EventManager, SubscriberOps};

use super::*;
use crate::state::tests::{Random, stored};

#[derive(Default)]
struct CountingLine(AtomicU32);

impl IrqLine for CountingLine {
    fn set_level(&self, asserted: bool) {
        self.0.fetch_add(u32::from(asserted), Ordering::Relaxed);
    }
}

const DATA: u64 = 0;
const IER: u64 = 1;
const LSR: u64 = 5;

fn read_byte(serial: &Mutex<Serial>, offset: u64) -> u8 {
    let mut data = [0];
    serial.lock().unwrap().read(offset, &mut data);
    data[0]
}

type Loop = EventManager<Arc<Mutex<Serial>>>;

/// Runs the loop until nothing more happens.
fn settle(events: &mut Loop) {
    while events.run_with_timeout(20).unwrap() > 0 {}
}

#[test]
fn output_reaches_the_file_in_order() {
    let mut file = tempfile::tempfile().unwrap();
    let backend = SerialBackend::Output(file.try_clone().unwrap());
    let mut serial = Serial::new(Arc::new(CountingLine::default()), backend).unwrap();
    for byte in b"cofferdam\r\n" {
        serial.write(DATA, &[*byte]);
    }
    let mut text = String::new();
    io::Seek::rewind(&mut file).unwrap();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "cofferdam\r\n");
}

#[test]
fn a_long_input_arrives_whole_although_the_fifo_is_short() {
    let (mut peer, ours) = UnixStream::pair().unwrap();
    let input = File::from(std::os::fd::OwnedFd::from(ours));
    let output = input.try_clone().unwrap();
    let line = Arc::new(CountingLine::default());
    let serial = Serial::new(line.clone(), SerialBackend::Streams { input, output }).unwrap();
    let serial = Arc::new(Mutex::new(serial));
    let mut events = Loop::new().unwrap();
    events.add_subscriber(serial.clone());
    serial.lock().unwrap().write(IER, &[1]);
    let sent: Vec<u8> = (0..1000u32).map(|i| (i * 7) as u8).collect();
    peer.write_all(&sent).unwrap();
    let mut received = Vec::new();
    while received.len() < sent.len() {
        settle(&mut events);
        assert_eq!(
            read_byte(&serial, LSR) & 1,
            1,
            "after {} bytes",
            received.len()
        );
        while read_byte(&serial, LSR) & 1 == 1 {
            received.push(read_byte(&serial, DATA));
        }
    }
    assert_eq!(received, sent);
    assert!(line.0.load(Ordering::Relaxed) > 0);
}

#[test]
fn socket_clients_come_and_go() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("serial.sock");
    let backend = SerialBackend::Socket(UnixListener::bind(&path).unwrap());
    let serial = Serial::new(Arc::new(CountingLine::default()), backend).unwrap();
    let serial = Arc::new(Mutex::new(serial));
    let mut events = Loop::new().unwrap();
    events.add_subscriber(serial.clone());
    serial.lock().unwrap().write(DATA, b"?");
    for round in [b'1', b'2'] {
        let mut client = UnixStream::connect(&path).unwrap();
        settle(&mut events);
        let mut second = UnixStream::connect(&path).unwrap();
        settle(&mut events);
        assert_eq!(
            second.read(&mut [0]).unwrap(),
            0,
            "a second client is turned away"
        );
        serial.lock().unwrap().write(DATA, &[round]);
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [round]);
        client.write_all(b"x").unwrap();
        settle(&mut events);
        assert_eq!(read_byte(&serial, DATA), b'x');
        drop(client);
        settle(&mut events);
    }
}

#[test]
fn reset_forgets_registers_and_input() {
    let (mut peer, ours) = UnixStream::pair().unwrap();
    let input = File::from(std::os::fd::OwnedFd::from(ours));
    let output = input.try_clone().unwrap();
    let backend = SerialBackend::Streams { input, output };
    let serial = Serial::new(Arc::new(CountingLine::default()), backend).unwrap();
    let serial = Arc::new(Mutex::new(serial));
    let mut events = Loop::new().unwrap();
    events.add_subscriber(serial.clone());
    peer.write_all(&[b'a'; 100]).unwrap();
    settle(&mut events);
    serial.lock().unwrap().write(IER, &[0xf]);
    serial.lock().unwrap().reset();
    assert_eq!(read_byte(&serial, IER), 0);
    assert_eq!(read_byte(&serial, LSR) & 1, 0);
    settle(&mut events);
    assert_eq!(
        read_byte(&serial, LSR) & 1,
        1,
        "input that waited outside goes on"
    );
}

/// Has a client talk to a port whose guest reads nothing, or everything, and be killed in the
/// middle.
fn kill_clients(guest_reads: bool) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("serial.sock");
    let backend = SerialBackend::Socket(UnixListener::bind(&path).unwrap());
    let serial = Serial::new(Arc::new(CountingLine::default()), backend).unwrap();
    let serial = Arc::new(Mutex::new(serial));
    let mut events = Loop::new().unwrap();
    events.add_subscriber(serial.clone());
    for round in 0..200u32 {
        let mut client = UnixStream::connect(&path).unwrap();
        if round.is_multiple_of(2) {
            settle(&mut events);
        }
        client.write_all(&[round as u8; 100]).unwrap();
        if round.is_multiple_of(3) {
            settle(&mut events);
        }
        serial.lock().unwrap().write(DATA, b"o");
        drop(client);
        serial.lock().unwrap().write(DATA, b"o");
        if round.is_multiple_of(5) {
            settle(&mut events);
        }
        while guest_reads && read_byte(&serial, LSR) & 1 == 1 {
            read_byte(&serial, DATA);
        }
    }
    let mut client = UnixStream::connect(&path).unwrap();
    settle(&mut events);
    while read_byte(&serial, LSR) & 1 == 1 {
        read_byte(&serial, DATA);
        settle(&mut events);
    }
    serial.lock().unwrap().write(DATA, b"!");
    let mut byte = [0];
    client.read_exact(&mut byte).unwrap();
    assert_eq!(byte, *b"!");
    client.write_all(b"?").unwrap();
    settle(&mut events);
    assert_eq!(read_byte(&serial, DATA), b'?');
    // No event is left that comes again and again.
    assert_eq!(events.run_with_timeout(50).unwrap(), 0);
}

#[test]
fn the_next_client_is_served_after_two_hundred_were_killed() {
    kill_clients(true);
}

#[test]
fn the_next_client_is_served_although_the_guest_never_read_what_those_before_said() {
    kill_clients(false);
}

/// Random accesses and input, the same for the same random numbers; what was read.
fn happen(serial: &mut Serial, random: &mut Random) -> u8 {
    let offset = random.below(8);
    match random.below(4) {
        0 => serial.write(offset, &[random.next() as u8]),
        1 => {
            let room = serial.uart.fifo_capacity();
            let input = vec![random.next() as u8; (random.below(9) as usize).min(room)];
            // Refused in loop-back mode.
            let _ = serial.uart.enqueue_raw_bytes(&input);
        }
        _ => {
            let mut data = [0];
            serial.read(offset, &mut data);
            return data[0];
        }
    }
    0
}

#[test]
fn a_restored_port_behaves_as_the_original() {
    for seed in 1..200u64 {
        let mut random = Random(seed << 32);
        let make = || {
            let line = Arc::new(CountingLine::default());
            let output = tempfile::tempfile().unwrap();
            let backend = SerialBackend::Output(output.try_clone().unwrap());
            (Serial::new(line.clone(), backend).unwrap(), line, output)
        };
        let (mut original, line, mut output) = make();
        for _ in 0..random.below(200) {
            happen(&mut original, &mut random);
        }
        let (mut twin, twins_line, mut twins_output) = make();
        twin.restore(&stored(&original.save().unwrap())).unwrap();
        let count = |line: &CountingLine| line.0.load(Ordering::Relaxed);
        let before = (count(&line), count(&twins_line));
        let already = output.metadata().unwrap().len();
        for step in 0..200 {
            let mut same = Random(random.0);
            let here = happen(&mut original, &mut random);
            let there = happen(&mut twin, &mut same);
            assert_eq!(here, there, "seed {seed}, step {step}");
        }
        assert_eq!(count(&line) - before.0, count(&twins_line) - before.1);
        assert_eq!(original.save().unwrap(), twin.save().unwrap());
        let read = |file: &mut File, from: u64| {
            let mut text = Vec::new();
            io::Seek::seek(file, io::SeekFrom::Start(from)).unwrap();
            file.read_to_end(&mut text).unwrap();
            text
        };
        assert_eq!(read(&mut output, already), read(&mut twins_output, 0));
    }
}

#[test]
fn a_port_that_has_received_more_than_it_holds_is_refused() {
    let line = Arc::new(CountingLine::default());
    let mut serial = Serial::new(line, SerialBackend::None).unwrap();
    serial.write(7, &[0x5a]);
    let before = serial.save().unwrap();
    let state = |received: usize| UartState {
        baud_divisor: [0; 2],
        interrupt_enable: 0,
        interrupt_identification: 0,
        line_control: 0,
        line_status: LSR_DATA_READY,
        modem_control: 0,
        modem_status: 0,
        scratch: 0,
        received: vec![0; received],
    };
    for wrong in [0, UART_FIFO_BYTES + 1] {
        let part = Part::new(FORM, &state(wrong)).unwrap();
        serial.restore(&part).unwrap_err();
        assert_eq!(serial.save().unwrap(), before);
    }
    let part = Part::new(FORM, &state(UART_FIFO_BYTES)).unwrap();
    serial.restore(&part).unwrap();
}

#[test]
fn a_client_of_a_port_that_is_put_back_is_sent_away_and_the_next_is_served() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("serial.sock");
    let backend = SerialBackend::Socket(UnixListener::bind(&path).unwrap());
    let line = Arc::new(CountingLine::default());
    let serial = Arc::new(Mutex::new(Serial::new(line, backend).unwrap()));
    let mut events = EventManager::new().unwrap();
    events.add_subscriber(serial.clone());
    let state = serial.lock().unwrap().save().unwrap();
    for round in 0..4u8 {
        let mut client = UnixStream::connect(&path).unwrap();
        settle(&mut events);
        // As much as the guest holds, and more.
        client.write_all(&[round; 100]).unwrap();
        if round % 2 == 0 {
            settle(&mut events);
        }
        serial.lock().unwrap().restore(&stored(&state)).unwrap();
        let mut rest = Vec::new();
        // An end or an error, at once; no wait.
        client.set_nonblocking(true).unwrap();
        match client.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
        }
        assert_eq!(read_byte(&serial, LSR) & 1, 0, "nothing of it is left");
    }
    settle(&mut events);
    let mut next = UnixStream::connect(&path).unwrap();
    settle(&mut events);
    next.write_all(b"?").unwrap();
    settle(&mut events);
    assert_eq!(read_byte(&serial, DATA), b'?');
    serial.lock().unwrap().write(DATA, b"!");
    let mut byte = [0];
    next.read_exact(&mut byte).unwrap();
    assert_eq!(byte, *b"!");
}
