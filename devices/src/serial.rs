//! The first serial port (16550A, `vm-superio`) and where its bytes go: the terminal, a file or a
//! unix socket.
//!
//! Output is written on the vCPU's thread. Input arrives through the event loop and is taken only as
//! far as the UART's FIFO has room, so a guest that does not read costs nothing. A socket serves one
//! client at a time; without a client, or with one that does not read, output is lost, as on a cable
//! with nothing at its end.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, SerialState};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bus::MutBusDevice;
use crate::irq::IrqLine;
use crate::rate_limit::RateLimit;

/// First I/O port of COM1.
pub const COM1_PORT: u16 = 0x3f8;
/// I/O ports a UART takes.
pub const UART_PORTS: u16 = 8;
/// ISA interrupt of COM1.
pub const COM1_IRQ: u8 = 4;

/// What is at the other end of the serial cable.
#[derive(Debug)]
pub enum SerialBackend {
    /// Nothing: output is lost, there is no input.
    None,
    /// Output only, for instance a file or a pipe.
    Output(File),
    /// Input and output, for instance a terminal's or a pair of pipes'.
    Streams {
        /// Where the guest's input is read from. Stays in blocking mode.
        input: File,
        /// Where its output goes.
        output: File,
    },
    /// A listening socket; clients come and go.
    Socket(UnixListener),
}

impl SerialBackend {
    /// The process's own standard input and output.
    pub fn stdio() -> io::Result<Self> {
        let input = io::stdin().as_fd().try_clone_to_owned()?;
        let output = io::stdout().as_fd().try_clone_to_owned()?;
        Ok(Self::Streams {
            input: input.into(),
            output: output.into(),
        })
    }
}

/// A UART and its other end. Map it as [`MutBusDevice`] at [`COM1_PORT`] and give it to the event
/// loop for its input.
pub struct Serial {
    uart: vm_superio::Serial<Pulse, NoEvents, Sink>,
    input: Option<File>,
    listener: Option<UnixListener>,
    /// Written when a full FIFO has room again, so that the loop goes on reading input.
    room: EventFd,
    /// Input is not being waited for because the FIFO is full.
    stalled: bool,
    log: RateLimit,
}

/// COM1's line is edge-triggered: a pulse for each interrupt.
struct Pulse(Arc<dyn IrqLine>);

impl Trigger for Pulse {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.set_level(true);
        self.0.set_level(false);
        Ok(())
    }
}

enum Sink {
    Nothing,
    File(File),
    Client(UnixStream),
}

impl Write for Sink {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match self {
            Self::Nothing => Ok(data.len()),
            Self::File(file) => file.write(data),
            Self::Client(stream) => stream.write(data),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Serial {
    /// A UART whose interrupt is `irq` and whose other end is `backend`.
    pub fn new(irq: Arc<dyn IrqLine>, backend: SerialBackend) -> io::Result<Self> {
        let (sink, input, listener) = match backend {
            SerialBackend::None => (Sink::Nothing, None, None),
            SerialBackend::Output(file) => (Sink::File(file), None, None),
            SerialBackend::Streams { input, output } => (Sink::File(output), Some(input), None),
            SerialBackend::Socket(listener) => {
                listener.set_nonblocking(true)?;
                (Sink::Nothing, None, Some(listener))
            }
        };
        Ok(Self {
            uart: vm_superio::Serial::new(Pulse(irq), sink),
            input,
            listener,
            room: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            stalled: false,
            log: RateLimit::default(),
        })
    }

    /// Goes back to the state after power-on. The other end stays connected.
    pub fn reset(&mut self) {
        let irq = Pulse(self.uart.interrupt_evt().0.clone());
        let sink = std::mem::replace(self.uart.writer_mut(), Sink::Nothing);
        match vm_superio::Serial::from_state(&SerialState::default(), irq, NoEvents, sink) {
            Ok(uart) => self.uart = uart,
            // The default state has an empty FIFO and no interrupt, so it is always taken.
            Err(error) => tracing::error!(%error, "serial port not reset"),
        }
        self.signal_room();
    }

    fn signal_room(&mut self) {
        if self.stalled && self.uart.fifo_capacity() > 0 {
            self.stalled = false;
            if let Err(error) = self.room.write(1) {
                tracing::warn!(%error, "serial input stays stopped");
            }
        }
    }

    /// Where input comes from at the moment.
    fn source(&self) -> Option<RawFd> {
        match (&self.input, self.uart.writer()) {
            (Some(input), _) => Some(input.as_raw_fd()),
            (None, Sink::Client(stream)) => Some(stream.as_raw_fd()),
            _ => None,
        }
    }

    fn read_input(&mut self, ops: &mut EventOps) {
        let mut buffer = [0; 64];
        let room = self.uart.fifo_capacity().min(buffer.len());
        if room == 0 {
            self.stall(ops);
            return;
        }
        let read = match (&mut self.input, self.uart.writer_mut()) {
            (Some(input), _) => input.read(&mut buffer[..room]),
            (None, Sink::Client(stream)) => stream.read(&mut buffer[..room]),
            _ => return,
        };
        match read {
            Ok(0) => self.end_of_input(ops),
            Ok(count) => {
                // In loop-back mode the UART drops input, as its receiver is disconnected then.
                if let Err(error) = self.uart.enqueue_raw_bytes(&buffer[..count]) {
                    tracing::warn!(%error, "serial input lost");
                }
                if self.uart.fifo_capacity() == 0 {
                    self.stall(ops);
                }
            }
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => self.end_of_input(ops),
        }
    }

    /// Stops waiting for input until the guest has read some.
    fn stall(&mut self, ops: &mut EventOps) {
        self.stalled = true;
        self.unwatch_source(ops);
    }

    fn end_of_input(&mut self, ops: &mut EventOps) {
        self.unwatch_source(ops);
        self.input = None;
        if matches!(self.uart.writer(), Sink::Client(_)) {
            *self.uart.writer_mut() = Sink::Nothing;
        }
    }

    fn accept(&mut self, ops: &mut EventOps) {
        let Some(listener) = &self.listener else {
            return;
        };
        let client = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(error) => return tracing::warn!(%error, "no serial client accepted"),
        };
        if matches!(self.uart.writer(), Sink::Client(_)) {
            return tracing::info!("serial console is in use; second client turned away");
        }
        if let Err(error) = client.set_nonblocking(true) {
            return tracing::warn!(%error, "serial client turned away");
        }
        *self.uart.writer_mut() = Sink::Client(client);
        self.stalled = false;
        self.watch_source(ops);
    }

    fn watch_source(&mut self, ops: &mut EventOps) {
        let Some(fd) = self.source() else { return };
        if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
            // Regular files and /dev/null cannot be waited for.
            tracing::debug!(%error, "no serial input from here");
            self.input = None;
        }
    }

    fn unwatch_source(&mut self, ops: &mut EventOps) {
        let Some(fd) = self.source() else { return };
        if let Err(error) = ops.remove(Events::new_raw(fd, EventSet::IN)) {
            tracing::debug!(%error, "serial input was not being waited for");
        }
    }
}

impl MutBusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            // The bus keeps accesses inside the eight ports.
            *byte = self.uart.read(offset as u8 + i as u8);
        }
        self.signal_room();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (i, &byte) in data.iter().enumerate() {
            let Err(error) = self.uart.write(offset as u8 + i as u8, byte) else {
                continue;
            };
            if let Some(suppressed) = self.log.permit() {
                tracing::debug!(%error, suppressed, "serial output lost");
            }
        }
        self.signal_room();
    }
}

impl MutEventSubscriber for Serial {
    fn init(&mut self, ops: &mut EventOps) {
        let listener = self.listener.as_ref().map(AsRawFd::as_raw_fd);
        for fd in [Some(self.room.as_raw_fd()), listener]
            .into_iter()
            .flatten()
        {
            if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                tracing::error!(%error, "serial port has no input");
            }
        }
        self.watch_source(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let fd = events.fd();
        if fd == self.room.as_raw_fd() {
            // Only its readiness counts.
            let _ = self.room.read();
            self.watch_source(ops);
        } else if self
            .listener
            .as_ref()
            .is_some_and(|listener| listener.as_raw_fd() == fd)
        {
            self.accept(ops);
        } else {
            self.read_input(ops);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU32, Ordering};

    use event_manager::{EventManager, SubscriberOps};

    use super::*;

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
}
