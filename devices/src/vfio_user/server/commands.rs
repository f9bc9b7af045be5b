//! What each command of a client does to the function.

use std::os::fd::{OwnedFd, RawFd};
use std::sync::{MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::interrupts::ClientInterrupts;
use super::memory::{MAX_MAPS, Maps};
use super::migration::Migration;
use super::{Offered, ServerEvent};
use crate::pci::PciFunction;
use crate::pci::bus::SharedFunction;
use crate::pci::config::{BAR_COUNT, offset};
use crate::vfio_user::channel::{ChannelError, MAX_FDS, Received};
use crate::vfio_user::message::{
    CONFIG_REGION, Capabilities, Command, DEVICE_FLAGS_PCI, DEVICE_FLAGS_RESET, DeviceInfo,
    DmaUnmap, FEATURE_GET, FEATURE_MIG_STATE, FEATURE_MIGRATION, FEATURE_PROBE, FEATURE_REGISTERS,
    FEATURE_SET, Feature, Header, INTX, MIGRATION_STOP_COPY, MSIX, MigData, MigState, PCI_IRQS,
    PCI_REGIONS, Payload, REGION_READ, REGION_WRITE, RegionAccess, RegionInfo, RegionIoFds,
    RegionWrites, Version,
};

/// Most bytes of one access to a region.
const MAX_ACCESS_BYTES: u32 = 64 << 10;
/// Bytes of configuration space: of a conventional function, and of one that has more.
const CONFIG_BYTES: u64 = 256;
const EXTENDED_CONFIG_BYTES: u64 = 4096;

/// What became of a message.
pub struct CarriedOut {
    /// What the client is to be told.
    pub reply: Option<(Header, Vec<u8>)>,
    /// Descriptors that go with it.
    pub fds: Vec<OwnedFd>,
    /// What is to be told here, before that.
    pub events: Vec<ServerEvent>,
    /// How many accesses it was.
    pub work: usize,
    /// Why the connection has to end after the reply.
    pub refused: Option<&'static str>,
}

/// The function as one client sees it.
pub struct Device {
    function: SharedFunction,
    pub(super) interrupts: ClientInterrupts,
    regions: [u64; PCI_REGIONS as usize],
    pub(super) irqs: [u32; PCI_IRQS as usize],
    maps: Maps,
    migration: Migration,
    version: bool,
    /// Descriptors that may still be watched.
    pub(super) replaced: Vec<EventFd>,
    events: Vec<ServerEvent>,
    reply_fds: Vec<OwnedFd>,
    work: usize,
}

impl Device {
    pub fn new(offered: Offered) -> Self {
        let (function, interrupts) = (offered.function, offered.interrupts);
        let mut regions = [0; PCI_REGIONS as usize];
        let mut irqs = [0; PCI_IRQS as usize];
        {
            let mut function = lock(&function);
            for bar in function.bars() {
                if usize::from(bar.bar) < BAR_COUNT {
                    regions[usize::from(bar.bar)] = bar.size_bytes;
                }
            }
            let mut behind = [0xff; 4];
            function.config_read(CONFIG_BYTES as u16, &mut behind);
            regions[CONFIG_REGION as usize] = match behind {
                [0xff, 0xff, 0xff, 0xff] => CONFIG_BYTES,
                _ => EXTENDED_CONFIG_BYTES,
            };
            let mut pin = [0];
            function.config_read(offset::INTERRUPT_PIN, &mut pin);
            irqs[INTX as usize] = u32::from((1..=4).contains(&pin[0]));
        }
        irqs[MSIX as usize] = interrupts.vectors().count().into();
        Self {
            maps: Maps::new(offered.dma),
            migration: Migration::new(function.clone()),
            function,
            interrupts,
            regions,
            irqs,
            version: false,
            replaced: Vec::new(),
            events: Vec::new(),
            reply_fds: Vec::new(),
            work: 0,
        }
    }

    /// Whether a version was agreed on.
    pub fn has_version(&self) -> bool {
        self.version
    }

    /// The client's eventfd to watch.
    pub fn unmask_fd(&self) -> Option<RawFd> {
        self.interrupts.unmask_fd()
    }

    /// The client's eventfd was written.
    pub fn unmask(&self) {
        self.look();
        self.interrupts.set_masked(false);
    }

    /// Brings the interrupt in line with what the client did to registers in memory.
    fn look(&self) {
        if let Some(shares) = lock(&self.function).shares_registers() {
            shares.look();
        }
    }

    /// Nothing watches what was replaced any more.
    pub fn close_replaced(&mut self) {
        self.replaced.clear();
    }

    pub fn memory_has_shrunk(&self) -> bool {
        self.maps.have_shrunk()
    }

    /// Drops what the client has given.
    pub fn forget_client(&mut self) {
        self.maps.clear();
        self.replaced.extend(self.interrupts.clear());
        if let Some(shares) = lock(&self.function).shares_registers() {
            shares.unshare();
        }
        self.migration.abandon();
    }

    /// Does what a message says.
    ///
    /// # Errors
    /// The connection has to end at once.
    pub fn carry_out(&mut self, message: Received) -> Result<CarriedOut, ChannelError> {
        let mut header = message.header;
        if header.is_reply() {
            return Err(ChannelError::Violation("answered what nobody asked"));
        }
        let command = Command::from_number(header.command);
        if !self.version && command != Some(Command::Version) {
            return Err(ChannelError::Violation("did not agree on a version"));
        }
        self.work = 1;
        let takes_fds = matches!(command, Some(Command::DmaMap | Command::SetIrqs));
        let strange_fds = message.surplus_fds || !takes_fds && !message.fds.is_empty();
        let result = match command {
            _ if strange_fds || header.has_strange_flags() => Err(libc::EINVAL),
            Some(command) => self.command(command, &message.payload, message.fds),
            None => Err(libc::EOPNOTSUPP),
        };
        let refused = (!self.version).then_some("did not agree on a version");
        let wanted = !header.wants_no_reply();
        header.flags = Header::FLAG_REPLY;
        header.error = 0;
        let payload = result.unwrap_or_else(|errno| {
            header.flags |= Header::FLAG_ERROR;
            header.error = errno.unsigned_abs();
            Vec::new()
        });
        Ok(CarriedOut {
            reply: wanted.then_some((header, payload)),
            fds: std::mem::take(&mut self.reply_fds),
            events: std::mem::take(&mut self.events),
            work: self.work,
            refused,
        })
    }

    /// The reply's payload, or `errno`.
    fn command(
        &mut self,
        command: Command,
        payload: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<Vec<u8>, i32> {
        match command {
            Command::Version => self.agree(&parse(payload)?),
            Command::DmaMap => {
                self.maps.map(&parse(payload)?, fds)?;
                Ok(Vec::new())
            }
            Command::DmaUnmap => {
                let unmap: DmaUnmap = parse(payload)?;
                self.maps.unmap(&unmap)?;
                Ok(unmap.to_bytes())
            }
            Command::DeviceGetInfo => {
                parse::<DeviceInfo>(payload)?;
                let info = DeviceInfo {
                    argsz: DeviceInfo::BYTES,
                    flags: DEVICE_FLAGS_PCI | DEVICE_FLAGS_RESET,
                    regions: PCI_REGIONS,
                    irqs: PCI_IRQS,
                };
                Ok(info.to_bytes())
            }
            Command::GetRegionInfo => self.region_info(&parse(payload)?),
            Command::GetRegionIoFds => {
                let mut fds: RegionIoFds = parse(payload)?;
                self.region_bytes(fds.index)?;
                // Every access comes as a message.
                (fds.argsz, fds.count) = (RegionIoFds::BYTES, 0);
                Ok(fds.to_bytes())
            }
            Command::GetIrqInfo => self.irq_info(&parse(payload)?),
            Command::SetIrqs => {
                self.look();
                self.set_irqs(&parse(payload)?, fds)?;
                self.events.push(ServerEvent::InterruptsChanged);
                Ok(Vec::new())
            }
            Command::RegionRead | Command::RegionWrite | Command::RegionWriteMulti => {
                self.access(command, payload)
            }
            Command::DeviceReset if payload.is_empty() => {
                lock(&self.function).reset();
                self.migration.reset();
                self.events.push(ServerEvent::Reset);
                Ok(Vec::new())
            }
            Command::DeviceReset => Err(libc::EINVAL),
            Command::DeviceFeature => self.feature(parse(payload)?),
            Command::MigDataRead => self.read_state(&parse(payload)?),
            Command::MigDataWrite => {
                let data: MigData = parse(payload)?;
                let whole = MigData::BYTES as usize + data.size as usize;
                match payload.len() == whole {
                    true => self.migration.write(&data.data).map(|()| Vec::new()),
                    false => Err(libc::EINVAL),
                }
            }
            // Only a server asks that.
            Command::DmaRead | Command::DmaWrite => Err(libc::EINVAL),
        }
    }

    fn access(&mut self, command: Command, payload: &[u8]) -> Result<Vec<u8>, i32> {
        if command == Command::RegionWriteMulti {
            let writes: RegionWrites = parse(payload)?;
            for access in &writes.0 {
                self.region_write(access)?;
            }
            return Ok((writes.0.len() as u64).to_le_bytes().to_vec());
        }
        let access: RegionAccess = parse(payload)?;
        if command == Command::RegionRead {
            let access = access.without_data().map_err(|_| libc::EINVAL)?;
            return self.region_read(access);
        }
        let mut access = access.with_data().map_err(|_| libc::EINVAL)?;
        self.region_write(&access)?;
        access.data.clear();
        Ok(access.to_bytes())
    }

    fn agree(&mut self, theirs: &Version) -> Result<Vec<u8>, i32> {
        if self.version || theirs.major != 0 {
            return Err(libc::EINVAL);
        }
        self.version = true;
        self.events.push(ServerEvent::Negotiated);
        let ours = Version {
            major: 0,
            minor: theirs.minor.min(1),
            capabilities: Capabilities {
                max_msg_fds: MAX_FDS as u32,
                max_data_xfer_size: MAX_ACCESS_BYTES,
                max_dma_maps: MAX_MAPS as u32,
                write_multiple: theirs.capabilities.write_multiple,
                shared_registers: theirs.capabilities.shared_registers
                    && lock(&self.function).shares_registers().is_some(),
                ..Capabilities::default()
            },
        };
        Ok(ours.to_bytes())
    }

    fn region_bytes(&self, index: u32) -> Result<u64, i32> {
        let bytes = self.regions.get(index as usize);
        bytes.copied().ok_or(libc::EINVAL)
    }

    fn region_info(&self, question: &RegionInfo) -> Result<Vec<u8>, i32> {
        let size = self.region_bytes(question.index)?;
        let info = RegionInfo {
            argsz: RegionInfo::BYTES,
            flags: if size > 0 {
                REGION_READ | REGION_WRITE
            } else {
                0
            },
            index: question.index,
            size,
            offset: 0,
            areas: None,
        };
        Ok(info.to_bytes())
    }

    /// Checks an access; gives how wide its pieces are.
    fn check_access(&mut self, access: &RegionAccess) -> Result<usize, i32> {
        let bytes = self.region_bytes(access.region)?;
        let end = access.offset.checked_add(access.count.into());
        let within = end.is_some_and(|end| end <= bytes);
        if !within || access.count == 0 || access.count > MAX_ACCESS_BYTES {
            return Err(libc::EINVAL);
        }
        if !self.migration.is_running() {
            return Err(libc::EBUSY);
        }
        let whole = access.count <= 8 && access.region != CONFIG_REGION;
        let width = if whole { 8 } else { 4 };
        self.work += (access.count / 4) as usize;
        Ok(width)
    }

    fn region_read(&mut self, mut access: RegionAccess) -> Result<Vec<u8>, i32> {
        let width = self.check_access(&access)?;
        let mut data = vec![0; access.count as usize];
        let mut function = lock(&self.function);
        let mut at = access.offset;
        for piece in pieces(&mut data, at, width) {
            let len = piece.len() as u64;
            match access.region {
                // Within 4096 bytes, by the check above; and a base address register otherwise.
                CONFIG_REGION => function.config_read(at as u16, piece),
                region => function.bar_read(region as u8, at, piece),
            }
            at += len;
        }
        access.data = data;
        Ok(access.to_bytes())
    }

    fn region_write(&mut self, access: &RegionAccess) -> Result<(), i32> {
        let width = self.check_access(access)?;
        let mut data = access.data.clone();
        let mut function = lock(&self.function);
        let mut at = access.offset;
        for piece in pieces(&mut data, at, width) {
            match access.region {
                CONFIG_REGION => function.config_write(at as u16, piece),
                region => function.bar_write(region as u8, at, piece),
            }
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn feature(&mut self, mut feature: Feature) -> Result<Vec<u8>, i32> {
        let both = FEATURE_GET | FEATURE_SET;
        let (action, probes) = (
            feature.action() & both,
            feature.action() & FEATURE_PROBE != 0,
        );
        let allowed = match feature.number() {
            FEATURE_MIGRATION => FEATURE_GET,
            FEATURE_MIG_STATE => both,
            FEATURE_REGISTERS => FEATURE_GET,
            _ => return Err(libc::ENOTTY),
        };
        let strange = feature.action() & !(both | FEATURE_PROBE) != 0;
        if strange
            || action & !allowed != 0
            || !probes && !matches!(action, FEATURE_GET | FEATURE_SET)
        {
            return Err(libc::EINVAL);
        }
        let is_there = match feature.number() {
            FEATURE_REGISTERS => lock(&self.function).shares_registers().is_some(),
            _ => self.migration.is_supported(),
        };
        if !is_there {
            return Err(libc::ENOTTY);
        }
        if probes {
            return Ok(feature.to_bytes());
        }
        if action == FEATURE_SET {
            let MigState(state) = parse(&feature.data)?;
            let restored = self.migration.set(state)?;
            self.events
                .extend(restored.then_some(ServerEvent::Restored));
            return Ok(feature.to_bytes());
        }
        if feature.number() == FEATURE_REGISTERS {
            return self.share_registers(feature);
        }
        let room = feature.argsz >= Feature::BYTES + 8;
        if !room || !feature.data.is_empty() && feature.data.len() != 8 {
            return Err(libc::EINVAL);
        }
        feature.argsz = Feature::BYTES + 8;
        feature.data = match feature.number() {
            FEATURE_MIGRATION => MIGRATION_STOP_COPY.to_le_bytes().to_vec(),
            _ => MigState(self.migration.state()).to_bytes(),
        };
        Ok(feature.to_bytes())
    }

    fn share_registers(&mut self, mut feature: Feature) -> Result<Vec<u8>, i32> {
        let room = std::mem::take(&mut feature.argsz);
        if !feature.data.is_empty() {
            return Err(libc::EINVAL);
        }
        let mut function = lock(&self.function);
        let shares = function.shares_registers().ok_or(libc::ENOTTY)?;
        let (file, layout) = shares.share().map_err(|error| {
            tracing::warn!(%error, "registers cannot be shared");
            libc::ENOMEM
        })?;
        feature.data = layout.to_bytes();
        feature.argsz = Feature::BYTES + feature.data.len() as u32;
        if room < feature.argsz {
            shares.unshare();
            return Err(libc::EINVAL);
        }
        self.reply_fds.push(file);
        Ok(feature.to_bytes())
    }

    fn read_state(&mut self, question: &MigData) -> Result<Vec<u8>, i32> {
        let room = question.argsz.checked_sub(MigData::BYTES);
        if !question.data.is_empty() || room.is_none_or(|room| room < question.size) {
            return Err(libc::EINVAL);
        }
        self.work += question.size as usize / 256;
        let data = self.migration.read(question.size as usize)?;
        Ok(MigData::new(data).to_bytes())
    }
}

fn lock(function: &SharedFunction) -> MutexGuard<'_, dyn PciFunction + 'static> {
    function.lock().unwrap_or_else(PoisonError::into_inner)
}

fn parse<T: Payload>(payload: &[u8]) -> Result<T, i32> {
    T::parse(payload).map_err(|_| libc::EINVAL)
}

/// An access in pieces of at most `width` bytes that do not cross a multiple of it, the first at
/// `offset`. One that is as wide as a register may be is one piece.
fn pieces(data: &mut [u8], offset: u64, width: usize) -> impl Iterator<Item = &mut [u8]> {
    let whole = width == 8;
    let mut rest = data;
    let mut at = offset;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let room = if whole {
            width
        } else {
            width - (at % width as u64) as usize
        };
        let len = room.min(rest.len());
        let (piece, behind) = std::mem::take(&mut rest).split_at_mut(len);
        rest = behind;
        at += len as u64;
        Some(piece)
    })
}
