//! A descriptor chain that was walked once, to its end, and found to have a shape that makes sense.

use crate::dma::GuestMemory;
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress};

use super::queue_error::QueueError;

/// Buffers in one chain: more than any driver uses, few enough to keep.
const MAX_BUFFERS: usize = 1024;

/// Part of guest memory that a chain hands over. It may lie anywhere, also outside guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Buffer {
    address: GuestAddress,
    len: u32,
}

/// The buffers of one chain: first those that the device reads, then those that it writes
/// (section 2.7.4.2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    head: u16,
    readable: Vec<Buffer>,
    writable: Vec<Buffer>,
}

impl Chain {
    /// Walks `descriptors`, at most [`MAX_BUFFERS`] of them.
    pub(super) fn walk(mut descriptors: DescriptorChain<&GuestMemory>) -> Result<Self, QueueError> {
        let head = descriptors.head_index();
        let mut chain = Self {
            head,
            readable: Vec::new(),
            writable: Vec::new(),
        };
        let mut ended = false;
        for descriptor in descriptors.by_ref().take(MAX_BUFFERS) {
            ended = !descriptor.has_next();
            let buffer = Buffer {
                address: descriptor.addr(),
                len: descriptor.len(),
            };
            if descriptor.is_write_only() {
                chain.writable.push(buffer);
            } else if chain.writable.is_empty() {
                chain.readable.push(buffer);
            } else {
                return Err(QueueError::Order);
            }
        }
        // The walk stops early at a loop, at an index or address that is not there, and at 4 GiB.
        if ended {
            Ok(chain)
        } else {
            Err(QueueError::Endless)
        }
    }

    /// Index that the driver knows it by.
    pub(super) fn head(&self) -> u16 {
        self.head
    }

    /// Bytes that the device may read.
    pub fn readable_bytes(&self) -> usize {
        total(&self.readable)
    }

    /// Bytes that the device may write.
    pub fn writable_bytes(&self) -> usize {
        total(&self.writable)
    }

    /// Fills `data` from byte `offset` of the readable part; returns how many bytes there were.
    pub fn read(
        &self,
        memory: &GuestMemory,
        offset: usize,
        data: &mut [u8],
    ) -> Result<usize, QueueError> {
        let mut done = 0;
        each_piece(&self.readable, offset, data.len(), |address, len| {
            let piece = &mut data[done..done + len];
            done += len;
            memory
                .read_slice(piece, address)
                .map_err(|_| QueueError::Unreachable)
        })?;
        Ok(done)
    }

    /// Writes `data` from byte `offset` of the writable part on; returns how many bytes had room.
    pub fn write(
        &self,
        memory: &GuestMemory,
        offset: usize,
        data: &[u8],
    ) -> Result<usize, QueueError> {
        let mut done = 0;
        each_piece(&self.writable, offset, data.len(), |address, len| {
            let piece = &data[done..done + len];
            done += len;
            memory
                .write_slice(piece, address)
                .map_err(|_| QueueError::Unreachable)
        })?;
        Ok(done)
    }
}

fn total(buffers: &[Buffer]) -> usize {
    // At most MAX_BUFFERS times 4 GiB.
    buffers.iter().map(|buffer| buffer.len as usize).sum()
}

/// Calls `f` for each piece of guest memory that bytes `offset..offset + len` of `buffers` lie in.
fn each_piece(
    buffers: &[Buffer],
    mut offset: usize,
    mut len: usize,
    mut f: impl FnMut(GuestAddress, usize) -> Result<(), QueueError>,
) -> Result<(), QueueError> {
    for buffer in buffers {
        let size = buffer.len as usize;
        if len == 0 {
            break;
        }
        if offset >= size {
            offset -= size;
            continue;
        }
        let here = (size - offset).min(len);
        let address = buffer
            .address
            .0
            .checked_add(offset as u64)
            .ok_or(QueueError::Unreachable)?;
        f(GuestAddress(address), here)?;
        len -= here;
        offset = 0;
    }
    Ok(())
}
