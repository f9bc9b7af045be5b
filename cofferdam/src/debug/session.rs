//! One session with a `gdb`: bytes in, bytes out.
//!
//! Packets are looked at before they are answered: one that is damaged is asked for again, one that
//! is too long or asks for too much is refused, and what is between packets is passed over. So the
//! peer may send what it likes.

use std::cell::RefCell;
use std::convert::Infallible;
use std::rc::Rc;

use gdbstub::common::Signal;
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{GdbStub, GdbStubError, SingleThreadStopReason};
use isolation::fault_image::FaultImage;

use super::target::Fault;

/// Longest packet, in bytes.
pub const PACKET_BYTES: usize = 16 << 10;
/// Most memory that is read at once; a `gdb` asks for no more than half a packet, in hexadecimal
/// digits.
const READ_BYTES: u64 = PACKET_BYTES as u64 / 2;
/// Answer to a packet that cannot be made sense of: `EINVAL`.
const REFUSED: &[u8] = b"$E16#ac";
/// What is said when it is to go on.
const STANDS_STILL: &str = "This is an image of a guest at a fault: it does not run.\n";

/// What the other side is sent.
#[derive(Debug, Clone, Default)]
struct Output(Rc<RefCell<Vec<u8>>>);

impl Connection for Output {
    type Error = Infallible;

    fn write(&mut self, byte: u8) -> Result<(), Infallible> {
        self.0.borrow_mut().push(byte);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Infallible> {
        Ok(())
    }
}

type Machine<'a> = GdbStubStateMachine<'static, Fault<'a>, Output>;
type Step<'a> = Result<Machine<'a>, GdbStubError<Infallible, Infallible>>;

/// A session.
pub struct Session<'a> {
    fault: Fault<'a>,
    /// `None` once the other side has taken its leave.
    machine: Option<Machine<'a>>,
    output: Output,
    framer: Framer,
    /// What was answered last, in case it gets lost.
    last: Vec<u8>,
}

impl<'a> Session<'a> {
    /// About this image.
    pub fn new(image: &'a FaultImage) -> Self {
        let mut session = Self {
            fault: Fault(image),
            machine: None,
            output: Output::default(),
            framer: Framer::default(),
            last: Vec::new(),
        };
        session.begin();
        session
    }

    /// Takes bytes of the other side; what it is to be sent.
    pub fn take(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut answer = Vec::new();
        for byte in bytes {
            match self.framer.take(*byte) {
                Some(Input::Packet(packet)) => {
                    self.last = self.packet(&packet);
                    answer.extend(&self.last);
                }
                Some(Input::Damaged) => answer.push(b'-'),
                Some(Input::Again) => answer.extend(&self.last),
                None => {}
            }
            if self.is_over() {
                break;
            }
        }
        answer
    }

    /// Whether the other side has taken its leave.
    pub fn is_over(&self) -> bool {
        self.machine.is_none()
    }

    fn begin(&mut self) {
        let builder = GdbStub::builder(self.output.clone()).packet_buffer_size(PACKET_BYTES + 64);
        let stub = builder.build().ok();
        self.machine = stub.and_then(|stub| stub.run_state_machine(&mut self.fault).ok());
    }

    /// Answers a packet, which is whole.
    fn packet(&mut self, packet: &[u8]) -> Vec<u8> {
        let Some(mut machine) = self.machine.take() else {
            return Vec::new();
        };
        if asks_for_too_much(packet) {
            self.machine = Some(machine);
            return [b"+", REFUSED].concat();
        }
        for byte in packet {
            machine = match self.step(machine, *byte) {
                Ok(machine) => machine,
                Err(error) => {
                    tracing::debug!("a packet is refused: {error}");
                    self.output.0.borrow_mut().clear();
                    self.begin();
                    return [b"+", REFUSED].concat();
                }
            };
        }
        let is_over = matches!(machine, GdbStubStateMachine::Disconnected(_));
        self.machine = (!is_over).then_some(machine);
        std::mem::take(&mut *self.output.0.borrow_mut())
    }

    fn step(&mut self, machine: Machine<'a>, byte: u8) -> Step<'a> {
        let mut machine = match machine {
            GdbStubStateMachine::Idle(idle) => idle.incoming_data(&mut self.fault, byte)?,
            other => other,
        };
        loop {
            machine = match machine {
                GdbStubStateMachine::Running(running) => {
                    self.say(STANDS_STILL);
                    let stopped = SingleThreadStopReason::Signal(Signal::SIGTRAP);
                    running.report_stop(&mut self.fault, stopped)?
                }
                GdbStubStateMachine::CtrlCInterrupt(interrupted) => {
                    let nothing = None::<SingleThreadStopReason<u64>>;
                    interrupted.interrupt_handled(&mut self.fault, nothing)?
                }
                done => return Ok(done),
            };
        }
    }

    /// Has the other side show a text (gdb manual, section E.4, `O`).
    fn say(&self, text: &str) {
        let digits: String = text.bytes().map(|byte| format!("{byte:02x}")).collect();
        let body = format!("O{digits}");
        let sum = checksum(body.as_bytes());
        let mut output = self.output.0.borrow_mut();
        output.extend(format!("${body}#{sum:02x}").bytes());
    }
}

/// What comes of a byte.
enum Input {
    /// A packet is whole.
    Packet(Vec<u8>),
    /// One was damaged, or is too long.
    Damaged,
    /// The other side has not understood the last answer.
    Again,
}

/// Finds packets.
#[derive(Debug, Default)]
struct Framer {
    /// What there is of a packet, from its `$` on; empty between packets.
    packet: Vec<u8>,
    /// Bytes of its checksum that have yet to come; `None` in its body.
    sum_left: Option<u8>,
    is_too_long: bool,
}

impl Framer {
    fn take(&mut self, byte: u8) -> Option<Input> {
        if byte == b'$' && self.sum_left.is_none() {
            // In a packet it is never without an escape: the one before has lost its end.
            *self = Self::default();
            self.packet.push(byte);
            return None;
        }
        if self.packet.is_empty() {
            return (byte == b'-').then_some(Input::Again);
        }
        match self.packet.len() < PACKET_BYTES {
            true => self.packet.push(byte),
            false => self.is_too_long = true,
        }
        match self.sum_left {
            None => {
                self.sum_left = (byte == b'#').then_some(2);
                None
            }
            Some(left) if left > 1 => {
                self.sum_left = Some(left - 1);
                None
            }
            Some(_) => {
                let Self {
                    packet,
                    is_too_long,
                    ..
                } = std::mem::take(self);
                Some(match !is_too_long && has_its_sum(&packet) {
                    true => Input::Packet(packet),
                    false => Input::Damaged,
                })
            }
        }
    }
}

/// Whether `$body#12` has the checksum of its body.
fn has_its_sum(packet: &[u8]) -> bool {
    let body_and_sum = packet.strip_prefix(b"$");
    let Some((body, [b'#', sum @ ..])) =
        body_and_sum.and_then(|all| all.split_at_checked(all.len().checked_sub(3)?))
    else {
        return false;
    };
    let sum = std::str::from_utf8(sum).unwrap_or_default();
    let digits = sum.bytes().all(|byte| byte.is_ascii_hexdigit());
    digits && u8::from_str_radix(sum, 16) == Ok(checksum(body))
}

pub(super) fn checksum(body: &[u8]) -> u8 {
    body.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// Whether a packet reads (`m`) more than fits into an answer.
fn asks_for_too_much(packet: &[u8]) -> bool {
    let Some(rest) = packet.strip_prefix(b"$m") else {
        return false;
    };
    let text = std::str::from_utf8(rest).unwrap_or_default();
    let length = text
        .split_once(',')
        .and_then(|(_, rest)| rest.split_once('#'));
    let length = length.and_then(|(digits, _)| u64::from_str_radix(digits, 16).ok());
    length.is_none_or(|length| length > READ_BYTES)
}
