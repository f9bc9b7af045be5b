//! The client's side of a connection.
//!
//! One command is under way at a time, besides posted writes, which nobody answers. While it waits
//! the client answers what the server asks of its memory. An answer that says that a command failed
//! is that call's error; everything else that goes wrong ends the connection, and every later call
//! fails at once.

mod calls;
mod registers;
mod state;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::channel::{Channel, ChannelError, Counters, MAX_FDS, Patience, Received};
use super::message::{
    CONFIG_REGION, Capabilities, Command, DEVICE_FLAGS_PCI, DEVICE_FLAGS_RESET, DeviceInfo,
    DmaAccess, Header, IrqInfo, MAX_DATA_BYTES, PCI_IRQS, PCI_REGIONS, Payload, REGION_MMAP,
    RegionInfo, Version,
};
use crate::dma::DmaSpace;

/// Most kinds of regions and interrupts that a device may claim to have.
const MAX_INDEXES: u32 = 64;

/// How long a server may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// For a call.
    pub call: Duration,
    /// For a reset, or another state of the device.
    pub state: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            call: Duration::from_secs(5),
            state: Duration::from_secs(30),
        }
    }
}

/// Why a call failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ClientError {
    /// The socket cannot be reached.
    #[error("cannot connect to the device's socket: {0}")]
    Connect(std::sync::Arc<std::io::Error>),
    /// The server refused the call; the connection is as before.
    #[error("the device's server refused {command:?}: {}", std::io::Error::from_raw_os_error(*errno as i32))]
    Refused {
        /// The command.
        command: Command,
        /// `errno`, or 0.
        errno: u32,
    },
    /// The connection ended.
    #[error("the connection to the device's server has ended: {0}")]
    Ended(ChannelError),
    /// The server is none that can be used; the connection was ended.
    #[error("the device's server cannot be used: {0}")]
    Unusable(&'static str),
    /// The device is not one that can do this.
    #[error("the device cannot {0}")]
    Unsupported(&'static str),
}

/// A connection to a server. See the module.
pub struct Client {
    channel: Channel,
    limits: Limits,
    /// Why the connection ended.
    ended: Option<ChannelError>,
    /// The device was stopped, see [`Client::stop`].
    stopped: bool,
    next_id: u16,
    /// Posted writes since the last command that was answered.
    posted: u16,
    /// The server's.
    capabilities: Capabilities,
    info: DeviceInfo,
    regions: Vec<RegionInfo>,
    /// The file of each region that can be mapped.
    files: Vec<Option<Arc<File>>>,
    irqs: Vec<IrqInfo>,
    /// Memory that the server may ask for, and the parts of it that it was told of.
    dma: DmaSpace,
    mapped: Vec<(u64, u64)>,
}

impl Client {
    /// Connects to whoever listens at `path`.
    ///
    /// # Errors
    /// Nobody does, or it cannot be used.
    pub fn connect(path: &Path, dma: DmaSpace) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path);
        let stream = stream.map_err(|error| ClientError::Connect(error.into()))?;
        Self::new(stream, dma, Limits::default())
    }

    /// Agrees on a version over `stream`, and asks what the device has. The server will be able to
    /// reach the parts of `dma` that it is told of.
    ///
    /// # Errors
    /// The server cannot be used.
    pub fn new(stream: UnixStream, dma: DmaSpace, limits: Limits) -> Result<Self, ClientError> {
        let channel = Channel::new(stream);
        let mut client = Self {
            channel: channel.map_err(|error| ClientError::Connect(error.into()))?,
            limits,
            ended: None,
            stopped: false,
            next_id: 0,
            posted: 0,
            capabilities: Capabilities::default(),
            info: DeviceInfo {
                argsz: DeviceInfo::BYTES,
                flags: 0,
                regions: 0,
                irqs: 0,
            },
            regions: Vec::new(),
            files: Vec::new(),
            irqs: Vec::new(),
            dma,
            mapped: Vec::new(),
        };
        client.negotiate()?;
        client.query()?;
        Ok(client)
    }

    fn negotiate(&mut self) -> Result<(), ClientError> {
        let ours = Version {
            major: 0,
            minor: 1,
            capabilities: Capabilities {
                max_msg_fds: MAX_FDS as u32,
                shared_registers: true,
                ..Capabilities::default()
            },
        };
        let reply: Version = self.ask(Command::Version, &ours)?;
        if reply.major != ours.major || reply.minor > ours.minor {
            return Err(self.unusable("it speaks another version of the protocol"));
        }
        if reply.capabilities.max_data_xfer_size < 8 {
            return Err(self.unusable("it takes no data"));
        }
        self.capabilities = reply.capabilities;
        Ok(())
    }

    fn query(&mut self) -> Result<(), ClientError> {
        self.info = self.ask(Command::DeviceGetInfo, &self.info.clone())?;
        if self.info.flags & DEVICE_FLAGS_PCI == 0 {
            return Err(self.unusable("it has no PCI device"));
        }
        if self.info.regions <= CONFIG_REGION
            || self.info.regions > MAX_INDEXES
            || self.info.irqs > MAX_INDEXES
        {
            return Err(self.unusable("it has a PCI device with a strange number of regions"));
        }
        for index in 0..self.info.regions.min(PCI_REGIONS) {
            let (region, file) = self.region_info(index)?;
            self.regions.push(region);
            self.files.push(file);
        }
        for index in 0..self.info.irqs.min(PCI_IRQS) {
            let question = IrqInfo {
                argsz: IrqInfo::BYTES,
                flags: 0,
                index,
                count: 0,
            };
            let irq = match self.ask(Command::GetIrqInfo, &question) {
                // Some have fewer kinds than they say.
                Err(ClientError::Refused { .. }) => question,
                other => other?,
            };
            if irq.index != index {
                return Err(self.unusable("it answers another question"));
            }
            self.irqs.push(irq);
        }
        Ok(())
    }

    fn region_info(&mut self, index: u32) -> Result<(RegionInfo, Option<Arc<File>>), ClientError> {
        let mut question = RegionInfo {
            argsz: RegionInfo::BYTES,
            flags: 0,
            index,
            size: 0,
            offset: 0,
            areas: None,
        };
        let (mut region, mut fds) = match self.ask_for_region(&question) {
            Err(ClientError::Refused { .. }) => return Ok((question, None)),
            other => other?,
        };
        if region.argsz > RegionInfo::BYTES && region.argsz <= MAX_DATA_BYTES {
            question.argsz = region.argsz;
            (region, fds) = self.ask_for_region(&question)?;
        }
        if region.index != index {
            return Err(self.unusable("it answers another question"));
        }
        // There is one file where it can be mapped.
        let file = match <[OwnedFd; 1]>::try_from(fds) {
            Ok([fd]) if region.flags & REGION_MMAP != 0 => Some(Arc::new(File::from(fd))),
            _ => None,
        };
        Ok((region, file))
    }

    fn ask_for_region(
        &mut self,
        question: &RegionInfo,
    ) -> Result<(RegionInfo, Vec<OwnedFd>), ClientError> {
        let (payload, limit) = (question.to_bytes(), self.limits.call);
        let reply = self.exchange(Command::GetRegionInfo, &payload, &[], limit)?;
        let region = RegionInfo::parse(&reply.payload);
        let region = region.map_err(|error| self.end(ChannelError::Garbled(error)))?;
        Ok((region, reply.fds))
    }

    /// Memory that the server may be told of.
    pub fn dma(&self) -> &DmaSpace {
        &self.dma
    }

    /// How long the server may take.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Whether the connection is there.
    pub fn is_connected(&self) -> bool {
        self.ended.is_none()
    }

    /// Whether an answer to the server waits for room in the socket; [`Client::serve`] sends it
    /// then.
    pub fn has_unsent(&self) -> bool {
        self.channel.has_unsent()
    }

    /// Numbers of messages.
    pub fn counters(&self) -> Counters {
        self.channel.counters().clone()
    }

    /// The device's regions, in the order of their indexes.
    pub fn regions(&self) -> &[RegionInfo] {
        &self.regions
    }

    /// The file of a region, if some of that can be mapped.
    pub fn region_file(&self, index: usize) -> Option<&Arc<File>> {
        self.files.get(index)?.as_ref()
    }

    /// How many interrupts of a kind the device has.
    pub fn irq_count(&self, index: u32) -> u32 {
        self.irqs.get(index as usize).map_or(0, |irq| irq.count)
    }

    /// Whether the device can be reset.
    pub fn can_reset(&self) -> bool {
        self.info.flags & DEVICE_FLAGS_RESET != 0
    }

    /// Answers what the server has asked meanwhile, and notices that it went. For an event loop,
    /// when the socket can be read; never waits, and does no more than what one read gives.
    ///
    /// # Errors
    /// The connection has ended.
    pub fn serve(&mut self) -> Result<(), ClientError> {
        self.check()?;
        let result = self.channel.flush().and_then(|_| self.channel.fill());
        if let Err(error) = result {
            return Err(self.end(error));
        }
        while let Some(reply) = self.take_reply()? {
            if !self.is_of_a_posted_write(&reply) {
                return Err(self.end(ChannelError::Violation("answered what nobody asked")));
            }
        }
        Ok(())
    }

    /// Whether a posted write failed, and its server says so all the same.
    fn is_of_a_posted_write(&self, reply: &Received) -> bool {
        let header = &reply.header;
        let failed = header.failed().is_some() && header.command == Command::RegionWrite as u16;
        failed && self.posted > 0
    }

    /// Ends the connection.
    pub fn disconnect(&mut self) {
        self.end(ChannelError::Gone);
    }

    fn check(&self) -> Result<(), ClientError> {
        match &self.ended {
            Some(error) => Err(ClientError::Ended(error.clone())),
            None => Ok(()),
        }
    }

    fn end(&mut self, error: ChannelError) -> ClientError {
        self.channel.shut_down();
        self.mapped.clear();
        ClientError::Ended(self.ended.get_or_insert(error).clone())
    }

    fn unusable(&mut self, why: &'static str) -> ClientError {
        self.end(ChannelError::Violation(why));
        ClientError::Unusable(why)
    }

    /// A call whose answer is a value.
    fn ask<Q: Payload, A: Payload>(
        &mut self,
        command: Command,
        question: &Q,
    ) -> Result<A, ClientError> {
        let reply = self.call(command, &question.to_bytes(), &[], self.limits.call)?;
        A::parse(&reply).map_err(|error| self.end(ChannelError::Garbled(error)))
    }

    fn call(
        &mut self,
        command: Command,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<Vec<u8>, ClientError> {
        let reply = self.exchange(command, payload, fds, limit)?;
        Ok(reply.payload)
    }

    /// A command, and its reply if it was carried out.
    fn exchange(
        &mut self,
        command: Command,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<Received, ClientError> {
        self.check()?;
        let mut patience = Patience::new(limit);
        let id = self.send(command, 0, payload, fds)?;
        let reply = loop {
            match self.take_reply()? {
                Some(reply) if reply.header.id != id && self.is_of_a_posted_write(&reply) => {}
                Some(reply) => break reply,
                None => self.pump(&mut patience)?,
            }
        };
        self.posted = 0;
        if reply.header.id != id || reply.header.command != command as u16 {
            return Err(self.end(ChannelError::Violation("answered what nobody asked")));
        }
        match reply.header.failed() {
            Some(errno) => Err(ClientError::Refused { command, errno }),
            None => Ok(reply),
        }
    }

    fn send(
        &mut self,
        command: Command,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<u16, ClientError> {
        self.next_id = self.next_id.wrapping_add(1);
        let header = Header {
            id: self.next_id,
            command: command as u16,
            size: 0,
            flags,
            error: 0,
        };
        let sent = self.channel.send(header, payload, fds);
        sent.map(|()| header.id).map_err(|error| self.end(error))
    }

    /// Waits for the socket, then moves what can be moved.
    fn pump(&mut self, patience: &mut Patience) -> Result<(), ClientError> {
        let waited = self.channel.wait(patience);
        let moved = waited.and_then(|()| self.channel.flush().and_then(|_| self.channel.fill()));
        moved.map(|_| ()).map_err(|error| self.end(error))
    }

    /// The first reply of what was received, with the server's commands before it answered.
    fn take_reply(&mut self) -> Result<Option<Received>, ClientError> {
        loop {
            let message = match self.channel.next() {
                Ok(Some(message)) => message,
                Ok(None) => return Ok(None),
                Err(error) => return Err(self.end(error)),
            };
            if message.header.is_reply() {
                return Ok(Some(message));
            }
            let answer = self.answer(&message);
            let mut header = message.header;
            if header.wants_no_reply() {
                continue;
            }
            header.flags = Header::FLAG_REPLY;
            header.error = 0;
            let payload = answer.unwrap_or_else(|errno| {
                header.flags |= Header::FLAG_ERROR;
                header.error = errno as u32;
                Vec::new()
            });
            if let Err(error) = self.channel.send(header, &payload, &[]) {
                return Err(self.end(error));
            }
        }
    }

    /// What the server asked of the client's memory.
    fn answer(&self, message: &Received) -> Result<Vec<u8>, i32> {
        let command = Command::from_number(message.header.command);
        let write = match command {
            Some(Command::DmaRead) => false,
            Some(Command::DmaWrite) => true,
            _ => return Err(libc::EOPNOTSUPP),
        };
        let mut access = DmaAccess::parse(&message.payload).map_err(|_| libc::EINVAL)?;
        let given = if write { access.count } else { 0 };
        if access.data.len() as u64 != given || !self.is_mapped(access.address, access.count) {
            return Err(libc::EINVAL);
        }
        if write {
            let data = std::mem::take(&mut access.data);
            let written = self.dma.write(access.address, &data);
            written.map_err(|_| libc::EFAULT)?;
        } else {
            access.data = vec![0; access.count as usize];
            let read = self.dma.read(access.address, &mut access.data);
            read.map_err(|_| libc::EFAULT)?;
        }
        Ok(access.to_bytes())
    }

    fn is_mapped(&self, address: u64, count: u64) -> bool {
        let mut mapped = self.mapped.iter();
        mapped.any(|&(start, len)| {
            let at = address.checked_sub(start);
            at.and_then(|at| at.checked_add(count))
                .is_some_and(|end| end <= len)
        })
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}
