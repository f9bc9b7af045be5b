//! The first serial port (16550A, `vm-superio`) and where its bytes go: the terminal, a file or a
//! unix socket.
//!
//! Output is written on the vCPU's thread. Input arrives through the event loop and is taken only
//! as far as the UART's FIFO has room, so a guest that does not read costs nothing. A socket serves
//! one client at a time; without a client, or with one that does not read, output is lost, as on a
//! cable with nothing at its end.

use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, SerialState};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bus::MutBusDevice;
use crate::irq::IrqLine;
use crate::rate_limit::RateLimit;
use crate::state::{Form, Part, StateError};

/// First I/O port of COM1.
pub const COM1_PORT: u16 = 0x3f8;
/// I/O ports a UART takes.
pub const UART_PORTS: u16 = 8;
/// ISA interrupt of COM1.
pub const COM1_IRQ: u8 = 4;

/// Bytes that the receiver holds.
const UART_FIFO_BYTES: usize = 64;
/// Line status: something was received.
const LSR_DATA_READY: u8 = 1;

const FORM: Form = Form {
    kind: "serial port",
    version: 1,
};

/// Registers and FIFO of the UART.
#[derive(Serialize, Deserialize)]
struct UartState {
    baud_divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    received: Vec<u8>,
}

/// What is at the other end of the serial cable.
#[derive(Debug)]
pub enum SerialBackend {
    /// Nothing: output is lost, there is no input.
    None,
    /// Output only, for instance a file or a pipe.
    Output(File),
    /// Input only, for instance from a pipe; output is lost but for who looks at it.
    Input(File),
    /// Input and output, for instance a terminal's or a pair of pipes'.
    Streams {
        /// Where the guest's input is read from. Stays in blocking mode.
        input: File,
        /// Where its output goes.
        output: File,
    },
    /// A listening socket; clients come and go.
    Socket(UnixListener),
    /// One of the others, with somebody who looks at what the guest writes on its way there.
    Observed(Box<Self>, Box<dyn SerialObserver>),
}

/// Looks at what a guest writes to its serial port.
pub trait SerialObserver: fmt::Debug + Send {
    /// It wrote `byte`. On the vCPU's thread: must not wait.
    fn wrote(&mut self, byte: u8);
}

/// A UART and its other end. Map it as [`MutBusDevice`] at [`COM1_PORT`] and give it to the event
/// loop for its input.
pub struct Serial {
    uart: vm_superio::Serial<Pulse, NoEvents, Output>,
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

/// What the UART writes to.
struct Output {
    sink: Sink,
    observer: Option<Box<dyn SerialObserver>>,
}

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let written = self.sink.write(data);
        if let Some(observer) = &mut self.observer {
            // Lost or not: the guest has written it.
            for byte in data.iter().take(*written.as_ref().unwrap_or(&data.len())) {
                observer.wrote(*byte);
            }
        }
        written
    }

    fn flush(&mut self) -> io::Result<()> {
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
        let (backend, observer) = match backend {
            SerialBackend::Observed(backend, observer) => (*backend, Some(observer)),
            other => (other, None),
        };
        let (sink, input, listener) = match backend {
            // One observer is enough.
            SerialBackend::None | SerialBackend::Observed(..) => (Sink::Nothing, None, None),
            SerialBackend::Output(file) => (Sink::File(file), None, None),
            SerialBackend::Input(input) => (Sink::Nothing, Some(input), None),
            SerialBackend::Streams { input, output } => (Sink::File(output), Some(input), None),
            SerialBackend::Socket(listener) => {
                listener.set_nonblocking(true)?;
                (Sink::Nothing, None, Some(listener))
            }
        };
        Ok(Self {
            uart: vm_superio::Serial::new(Pulse(irq), Output { sink, observer }),
            input,
            listener,
            room: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            stalled: false,
            log: RateLimit::default(),
        })
    }

    /// Interrupts the guest with nothing to say: its driver finds no reason and goes on, and a guest
    /// that has suspended itself and lets this port wake it is awake.
    pub fn ring(&self) {
        let Ok(()) = self.uart.interrupt_evt().trigger();
    }

    /// Goes back to the state after power-on. The other end stays connected.
    pub fn reset(&mut self) {
        if let Err(error) = self.become_uart(SerialState::default()) {
            // The default state has an empty FIFO and no interrupt, so it is always taken.
            tracing::error!(%error, "serial port not reset");
        }
    }

    /// The port's state; what is at its other end is not in it.
    pub fn save(&self) -> Result<Part, StateError> {
        let state = self.uart.state();
        Part::new(
            FORM,
            &UartState {
                baud_divisor: [state.baud_divisor_low, state.baud_divisor_high],
                interrupt_enable: state.interrupt_enable,
                interrupt_identification: state.interrupt_identification,
                line_control: state.line_control,
                line_status: state.line_status,
                modem_control: state.modem_control,
                modem_status: state.modem_status,
                scratch: state.scratch,
                received: state.in_buffer,
            },
        )
    }

    /// Goes on as the port that `part` was taken of, with its own other end; a client of its socket
    /// is disconnected, since it has talked to another guest. An interrupt that was pending comes
    /// again.
    pub fn restore(&mut self, part: &Part) -> Result<(), StateError> {
        let state: UartState = part.open(FORM)?;
        let [baud_divisor_low, baud_divisor_high] = state.baud_divisor;
        if (state.line_status & LSR_DATA_READY != 0) == state.received.is_empty() {
            return Err(FORM.does_not_fit("it has received something and nothing"));
        }
        self.send_client_away();
        self.become_uart(SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.received,
        })
    }

    /// Ends a client's session, what it said and nobody has read lost; the event loop finds it
    /// gone.
    fn send_client_away(&mut self) {
        if let Sink::Client(stream) = &mut self.uart.writer_mut().sink {
            // It may have gone already.
            let _ = stream.shutdown(Shutdown::Both);
            // Nothing is added to what the socket holds now, so this ends.
            let mut lost = [0; 4096];
            while stream.read(&mut lost).is_ok_and(|length| length > 0) {}
        }
    }

    /// Takes over a state. On an error nothing changes.
    fn become_uart(&mut self, state: SerialState) -> Result<(), StateError> {
        // Checked before the other end is taken from the port that there is.
        if state.in_buffer.len() > UART_FIFO_BYTES {
            return Err(FORM.does_not_fit("it has received more than its FIFO holds"));
        }
        let irq = Pulse(self.uart.interrupt_evt().0.clone());
        let output = self.uart.writer_mut();
        let output = Output {
            sink: std::mem::replace(&mut output.sink, Sink::Nothing),
            observer: output.observer.take(),
        };
        let uart = vm_superio::Serial::from_state(&state, irq, NoEvents, output);
        self.uart = uart.map_err(|error| FORM.does_not_fit(format!("{error:?}")))?;
        self.signal_room();
        Ok(())
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
        match (&self.input, &self.uart.writer().sink) {
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
        let read = match (&mut self.input, &mut self.uart.writer_mut().sink) {
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
        if matches!(self.uart.writer().sink, Sink::Client(_)) {
            self.uart.writer_mut().sink = Sink::Nothing;
        }
    }

    /// Takes the clients that came: the first if there is none at the moment, or only one that has
    /// gone. The listener is watched by edges, so all of them are looked at; where the host has no
    /// descriptor left they wait for the next that comes.
    fn accept(&mut self, ops: &mut EventOps) {
        loop {
            let Some(listener) = &self.listener else {
                return;
            };
            let client = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => {
                    if let Some(suppressed) = self.log.permit() {
                        tracing::warn!(%error, suppressed, "no serial client accepted");
                    }
                    return;
                }
            };
            if let Sink::Client(present) = &self.uart.writer().sink {
                if !has_gone(present) {
                    if let Some(suppressed) = self.log.permit() {
                        tracing::info!(
                            suppressed,
                            "serial console is in use; another client is turned away"
                        );
                    }
                    continue;
                }
                // What it said last and the guest has not read goes with it.
                self.end_of_input(ops);
            }
            if let Err(error) = client.set_nonblocking(true) {
                tracing::warn!(%error, "serial client turned away");
                continue;
            }
            self.uart.writer_mut().sink = Sink::Client(client);
            self.stalled = false;
            self.watch_source(ops);
        }
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

/// Whether nobody is at the other end any more, also where something that was said is still to be
/// read.
fn has_gone(client: &UnixStream) -> bool {
    let mut fds = [PollFd::new(client, PollFlags::empty())];
    let now = Timespec::default();
    // Hang-ups and errors are told without being asked for.
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
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
        let listener = self.listener.as_ref().map(|listener| {
            let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
            Events::new_raw(listener.as_raw_fd(), edges)
        });
        let room = Events::new_raw(self.room.as_raw_fd(), EventSet::IN);
        for events in [Some(room), listener].into_iter().flatten() {
            if let Err(error) = ops.add(events) {
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
mod tests;
