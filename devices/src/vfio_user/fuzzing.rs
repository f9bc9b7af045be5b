//! Both sides against any bytes: for fuzzing, and for a test with random ones.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::channel::Channel;
use super::client::{Client, Limits};
use super::function::VfioUserFunction;
use super::message::{
    CONFIG_REGION, Command, DEVICE_FLAGS_PCI, DEVICE_FLAGS_RESET, DeviceInfo, HEADER_BYTES, Header,
    IrqInfo, PCI_IRQS, PCI_REGIONS, Payload, REGION_READ, REGION_WRITE, RegionAccess, RegionInfo,
    Version,
};
use super::server::{ClientInterrupts, Offered, Server};
use crate::dma::DmaSpace;
use crate::irq::IrqLine;
use crate::pci::config::{ConfigSpace, InterruptPin, PciIdentity};
use crate::pci::{BarIndex, BarRange, BarSize, BarSpace, PciFunction};
use crate::state::{Form, Part, StateError};

const FORM: Form = Form {
    kind: "function under exercise",
    version: 1,
};
const REGISTERS: usize = 0x1000;

/// A function of 4 KiB of registers, each of which is memory.
struct Memory {
    config: ConfigSpace,
    registers: Vec<u8>,
    dma: DmaSpace,
}

impl Memory {
    fn new(dma: DmaSpace) -> Option<Self> {
        let mut config = ConfigSpace::new(PciIdentity {
            vendor_id: 0x1234,
            device_id: 0x5678,
            revision_id: 0,
            class_code: 0xff_0000,
            subsystem_vendor_id: 0,
            subsystem_id: 0,
        });
        config
            .add_bar(0, BarSpace::Memory32, REGISTERS as u64)
            .ok()?;
        config.set_interrupt_pin(InterruptPin::A);
        Some(Self {
            config,
            registers: vec![0; REGISTERS],
            dma,
        })
    }

    fn at(&mut self, offset: u64, len: usize) -> Option<&mut [u8]> {
        let start = usize::try_from(offset).ok()?;
        self.registers.get_mut(start..start.checked_add(len)?)
    }
}

impl PciFunction for Memory {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
    }

    fn decoded(&self) -> Vec<BarRange> {
        self.config.decoded()
    }

    fn bars(&self) -> Vec<BarSize> {
        self.config.bars()
    }

    fn bar_read(&mut self, _bar: BarIndex, offset: u64, data: &mut [u8]) {
        // It uses the memory that it was given.
        let mut byte = [0];
        let _ = self.dma.read(offset << 8, &mut byte);
        if let Some(bytes) = self.at(offset, data.len()) {
            data.copy_from_slice(bytes);
        }
    }

    fn bar_write(&mut self, _bar: BarIndex, offset: u64, data: &[u8]) {
        let _ = self.dma.write(offset << 8, data);
        if let Some(bytes) = self.at(offset, data.len()) {
            bytes.copy_from_slice(data);
        }
    }

    fn reset(&mut self) {
        self.config.reset();
        self.registers.fill(0);
    }

    fn save(&self) -> Result<Part, StateError> {
        Part::new(FORM, &(self.config.save(), &self.registers))
    }

    fn restore(&mut self, state: &Part) -> Result<(), StateError> {
        let (config, registers): (_, Vec<u8>) = state.open(FORM)?;
        if registers.len() != REGISTERS {
            return Err(FORM.does_not_fit("registers"));
        }
        let restored = self.config.restore(&config);
        restored.map_err(|error| FORM.does_not_fit(error))?;
        self.registers = registers;
        Ok(())
    }
}

/// Takes pieces off the input.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// So many bytes as the next one says, or as there are.
    fn piece(&mut self) -> Option<&'a [u8]> {
        let len = usize::from(self.byte()?).min(self.0.len());
        let (piece, rest) = self.0.split_at(len);
        self.0 = rest;
        Some(piece)
    }
}

fn pair() -> Option<(UnixStream, UnixStream)> {
    let (ours, theirs) = UnixStream::pair().ok()?;
    ours.set_nonblocking(true).ok()?;
    Some((ours, theirs))
}

/// A client of a server that sends what `input` says: messages whose headers are right but for what
/// it chooses, with descriptors, and bytes.
pub fn serve(input: &[u8]) {
    let _ = try_serve(&mut Input(input));
}

fn try_serve(input: &mut Input<'_>) -> Option<()> {
    let (mut ours, theirs) = pair()?;
    let (dma, interrupts) = (DmaSpace::empty(), ClientInterrupts::new(2));
    let offered = Offered {
        function: Arc::new(Mutex::new(Memory::new(dma.clone())?)),
        dma,
        interrupts,
    };
    let mut server = Server::new(theirs, offered.clone(), Box::new(|_| {})).ok()?;
    let mut peer = Channel::new(ours.try_clone().ok()?).ok()?;
    if input.byte()? & 1 == 0 {
        let version = Version {
            major: 0,
            minor: 1,
            capabilities: Default::default(),
        };
        send(
            &mut peer,
            1,
            Command::Version as u16,
            0,
            &version.to_bytes(),
            &[],
        )?;
    }
    let memory = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).ok()?;
    let memory = File::from(memory);
    memory.set_len(64 << 10).ok()?;
    while let (Some(what), Some(piece)) = (input.byte(), input.piece()) {
        match what {
            0 => drop(ours.write(piece)),
            1 => drop(memory.set_len(piece.len() as u64 * 256)),
            _ => {
                let fds = vec![memory.as_fd(); usize::from(what >> 5)];
                let flags = if what & 0x1f == 31 {
                    Header::FLAG_NO_REPLY
                } else {
                    0
                };
                let command = u16::from(what % 20);
                send(&mut peer, 2, command, flags, piece, &fds)?;
            }
        }
        if server.turn().is_err() {
            server.disconnect();
        }
        // Replies are taken, unread.
        while ours.read(&mut [0; 4096]).is_ok_and(|bytes| bytes > 0) {}
        if server.has_ended() {
            break;
        }
    }
    server.disconnect();
    assert!(
        offered.dma.regions().is_empty(),
        "memory of a client that has gone"
    );
    Some(())
}

fn send(
    peer: &mut Channel,
    id: u16,
    command: u16,
    flags: u32,
    payload: &[u8],
    fds: &[std::os::fd::BorrowedFd<'_>],
) -> Option<()> {
    let header = Header {
        id,
        command,
        size: 0,
        flags,
        error: 0,
    };
    peer.send(header, payload, fds).ok()
}

struct NoLine;

impl IrqLine for NoLine {
    fn set_level(&self, _asserted: bool) {}
}

/// A server whose replies are what `input` says, to a client that makes a function of it and uses
/// that.
pub fn use_server(input: &[u8]) {
    let _ = try_use(&mut Input(input));
}

/// Good replies to what a client asks first: of a device with 4 KiB of registers that is reset
/// then.
fn first_replies() -> Vec<(Command, Vec<u8>)> {
    let info = DeviceInfo {
        argsz: DeviceInfo::BYTES,
        flags: DEVICE_FLAGS_PCI | DEVICE_FLAGS_RESET,
        regions: PCI_REGIONS,
        irqs: PCI_IRQS,
    };
    let mut replies = vec![
        // Version 0.1.
        (Command::Version, vec![0, 0, 1, 0]),
        (Command::DeviceGetInfo, info.to_bytes()),
    ];
    for index in 0..PCI_REGIONS {
        let there = matches!(index, 0 | CONFIG_REGION);
        let info = RegionInfo {
            argsz: RegionInfo::BYTES,
            flags: REGION_READ | REGION_WRITE,
            index,
            size: if there { REGISTERS as u64 } else { 0 },
            offset: 0,
            areas: None,
        };
        replies.push((Command::GetRegionInfo, info.to_bytes()));
    }
    for index in 0..PCI_IRQS {
        let info = IrqInfo {
            argsz: IrqInfo::BYTES,
            flags: 1,
            index,
            count: 1,
        };
        replies.push((Command::GetIrqInfo, info.to_bytes()));
    }
    replies.push((Command::DeviceReset, Vec::new()));
    replies
}

fn try_use(input: &mut Input<'_>) -> Option<()> {
    let (mut ours, theirs) = pair()?;
    let mut replies = first_replies();
    let config = |data: Vec<u8>| RegionAccess {
        offset: 0,
        region: CONFIG_REGION,
        count: data.len() as u32,
        data,
    };
    let mut space = input.piece()?.to_vec();
    space.resize(256, 0);
    replies.push((Command::RegionRead, config(space).to_bytes()));
    let commands = [
        Command::RegionRead,
        Command::RegionWrite,
        Command::DeviceFeature,
        Command::MigDataRead,
    ];
    // One of them in place of the good one, all that follow, and bytes.
    let changed = usize::from(input.byte()?);
    if let (Some(reply), Some(piece)) = (replies.get_mut(changed), input.piece()) {
        reply.1 = piece.to_vec();
    }
    while let (Some(what), Some(piece)) = (input.byte(), input.piece()) {
        replies.push((commands[usize::from(what) % commands.len()], piece.to_vec()));
    }
    for (id, (command, payload)) in (1..).zip(&replies) {
        let header = Header {
            id,
            command: *command as u16,
            size: (HEADER_BYTES + payload.len()) as u32,
            flags: Header::FLAG_REPLY,
            error: 0,
        };
        // What does not fit into the socket is not needed.
        let _ = ours.write(&[&header.to_bytes(), &payload[..]].concat());
    }
    let _ = ours.write(input.0);
    ours.shutdown(std::net::Shutdown::Write).ok()?;
    let limits = Limits {
        call: Duration::from_secs(1),
        state: Duration::from_secs(1),
    };
    exercise(Client::new(theirs, DmaSpace::empty(), limits).ok()?)
}

/// Does with a function what a guest does.
fn exercise(client: Client) -> Option<()> {
    let mut vectors = |_| Err("none".to_owned());
    let mut function = VfioUserFunction::new(client, Arc::new(NoLine), &mut vectors).ok()?;
    let mut data = [0; 8];
    for at in 0..64 {
        function.config_read(at * 4, &mut data[..4]);
        function.bar_read(0, u64::from(at) * 8, &mut data);
        function.bar_write(0, u64::from(at), &data[..4]);
        function.config_write(at * 4, &data[..4]);
        assert!(function.decoded().len() <= 6);
    }
    let state = function.save();
    if let Ok(state) = state {
        let _ = function.restore(&state);
    }
    function.reset();
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_client_and_any_server_are_survived(input in prop::collection::vec(any::<u8>(), 0..600)) {
            super::serve(&input);
            super::use_server(&input);
        }
    }
}
