//! What a client asks of the device's regions, memory and interrupts.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use vmm_sys_util::eventfd::EventFd;

use super::{Client, ClientError};
use crate::dma::DmaRegion;
use crate::vfio_user::channel::{ChannelError, MAX_FDS, Patience};
use crate::vfio_user::message::{
    Command, DmaMap, DmaUnmap, Header, IrqAction, IrqData, MAP_READ, MAP_WRITE, MAX_DATA_BYTES,
    Payload, RegionAccess, SetIrqs,
};

impl Client {
    /// Reads from a region.
    ///
    /// # Errors
    /// See [`ClientError`]; `data` may have changed.
    pub fn region_read(
        &mut self,
        region: u32,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), ClientError> {
        let most = self.capabilities.max_data_xfer_size.min(MAX_DATA_BYTES) as usize;
        let mut at = offset;
        for piece in data.chunks_mut(most) {
            let question = RegionAccess {
                offset: at,
                region,
                count: piece.len() as u32,
                data: Vec::new(),
            };
            let reply: RegionAccess = self.ask(Command::RegionRead, &question)?;
            if reply.data.len() != piece.len() || (reply.offset, reply.region) != (at, region) {
                return Err(self.end(ChannelError::Violation("answered another question")));
            }
            piece.copy_from_slice(&reply.data);
            at = at.wrapping_add(piece.len() as u64);
        }
        Ok(())
    }

    /// Writes to a region, and waits until it is done.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn region_write(
        &mut self,
        region: u32,
        offset: u64,
        data: &[u8],
    ) -> Result<(), ClientError> {
        let most = self.capabilities.max_data_xfer_size.min(MAX_DATA_BYTES) as usize;
        let mut at = offset;
        for piece in data.chunks(most) {
            let question = RegionAccess {
                offset: at,
                region,
                count: piece.len() as u32,
                data: piece.to_vec(),
            };
            let _: RegionAccess = self.ask(Command::RegionWrite, &question)?;
            at = at.wrapping_add(piece.len() as u64);
        }
        Ok(())
    }

    /// Writes at most eight bytes to a region without waiting for it. It is done before whatever is
    /// asked for later.
    ///
    /// # Errors
    /// The connection has ended.
    pub fn post_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        self.check()?;
        let mut payload = [0; RegionAccess::BYTES + 8];
        let end = RegionAccess::BYTES + data.len();
        let Some(room) = payload.get_mut(RegionAccess::BYTES..end) else {
            return self.region_write(region, offset, data);
        };
        room.copy_from_slice(data);
        payload[..8].copy_from_slice(&offset.to_le_bytes());
        payload[8..12].copy_from_slice(&region.to_le_bytes());
        payload[12..16].copy_from_slice(&(data.len() as u32).to_le_bytes());
        self.posted = self.posted.saturating_add(1);
        let flags = Header::FLAG_NO_REPLY;
        let mut patience = Patience::new(self.limits.call);
        self.send(Command::RegionWrite, flags, &payload[..end], &[])?;
        while self.channel.has_unsent() {
            self.pump(&mut patience)?;
        }
        Ok(())
    }

    /// Lets the server reach a part of memory by its file.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn dma_map(&mut self, region: &DmaRegion) -> Result<(), ClientError> {
        let map = DmaMap {
            flags: MAP_READ | MAP_WRITE,
            offset: region.offset,
            address: region.address,
            size: region.len,
        };
        let limit = self.limits.call;
        self.call(
            Command::DmaMap,
            &map.to_bytes(),
            &[region.file.as_fd()],
            limit,
        )?;
        self.mapped.push((region.address, region.len));
        Ok(())
    }

    /// Takes exactly such a part from it.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn dma_unmap(&mut self, address: u64, size: u64) -> Result<(), ClientError> {
        let unmap = DmaUnmap {
            flags: 0,
            address,
            size,
        };
        let reply: DmaUnmap = self.ask(Command::DmaUnmap, &unmap)?;
        if (reply.address, reply.size) != (address, size) {
            return Err(self.end(ChannelError::Violation("answered another question")));
        }
        self.mapped.retain(|one| *one != (address, size));
        Ok(())
    }

    /// The parts of memory that the server was told of: address and length.
    pub fn mapped(&self) -> &[(u64, u64)] {
        &self.mapped
    }

    /// Has interrupts of a kind, from the first on, signalled by `events`; or acts on them by
    /// [`Client::act_on_irqs`].
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn set_irqs(
        &mut self,
        index: u32,
        action: IrqAction,
        events: &[EventFd],
    ) -> Result<(), ClientError> {
        let at_once = (self.capabilities.max_msg_fds as usize).clamp(1, MAX_FDS);
        let mut start = 0;
        for events in events.chunks(at_once) {
            let set = SetIrqs {
                action,
                data: IrqData::Events,
                index,
                start,
                count: events.len() as u32,
            };
            let fds: Vec<_> = events.iter().map(borrow).collect();
            self.call(Command::SetIrqs, &set.to_bytes(), &fds, self.limits.call)?;
            start += set.count;
        }
        Ok(())
    }

    /// Acts on `count` interrupts of a kind, from the first on. Triggering none of them turns the
    /// kind off.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn act_on_irqs(
        &mut self,
        index: u32,
        action: IrqAction,
        count: u32,
    ) -> Result<(), ClientError> {
        let set = SetIrqs {
            action,
            data: IrqData::None,
            index,
            start: 0,
            count,
        };
        self.call(Command::SetIrqs, &set.to_bytes(), &[], self.limits.call)?;
        Ok(())
    }

    /// Resets the device.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn reset(&mut self) -> Result<(), ClientError> {
        if !self.can_reset() {
            return Err(ClientError::Unsupported("be reset"));
        }
        self.call(Command::DeviceReset, &[], &[], self.limits.state)?;
        Ok(())
    }
}

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as the eventfd is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
