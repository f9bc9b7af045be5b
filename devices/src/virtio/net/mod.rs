//! Virtio network device (section 5.1) on a [`Wire`].
//!
//! It offers no offloads: each chain is one whole frame behind a header that says so. What waits,
//! waits in the driver's rings or in the wire, never here. Without a driver frames are lost, as on
//! a cable with nobody at this end.
//!
//! The wire's descriptors are registered edge-triggered. No edge is missed: frames are taken until
//! the wire has none or the ring is empty, and in the latter case the driver's notification goes
//! on.

#[cfg(test)]
pub(crate) mod tests;

use std::os::fd::RawFd;

use event_manager::{EventOps, EventSet, Events};

use super::pci::VirtioPciFunction;
use super::{DeviceError, DeviceKind, Queues, VirtioDevice, read_structure};
use crate::state::{Form, Part, StateError};
use crate::wire::{MAX_FRAME_BYTES, SendOutcome, Wire, WritableSignal};

const F_MAC: u64 = 1 << 5;
const F_STATUS: u64 = 1 << 16;
/// Status field: VIRTIO_NET_S_LINK_UP.
const S_LINK_UP: u16 = 1;

const FORM: Form = Form {
    kind: "virtio network card",
    version: 1,
};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const QUEUE_SIZE: u16 = 256;

/// `struct virtio_net_hdr` (section 5.1.6).
const HEADER_BYTES: usize = 12;
/// Its `gso_type`.
const GSO_TYPE: usize = 1;
const GSO_NONE: u8 = 0;
/// A received frame's header: no offloads, `num_buffers` 1.
const RECEIVED_HEADER: [u8; HEADER_BYTES] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
/// Shortest frame (IEEE 802.3, clause 3.2.7), without FCS: shorter ones are padded.
const MIN_FRAME_BYTES: usize = 60;
/// Frames dropped in one turn while there is no driver.
const MAX_DROPPED: usize = 1024;

/// A network card.
pub struct Net {
    mac: [u8; 6],
    wire: Box<dyn Wire>,
    /// The carrier as the driver knows it.
    carrier: bool,
    /// The host has pulled the cable: frames are lost both ways.
    cable_pulled: bool,
    /// Header and frame.
    buffer: Box<[u8]>,
}

impl Net {
    /// A card with the unicast address `mac`, plugged into `wire`.
    pub fn new(mac: [u8; 6], wire: Box<dyn Wire>) -> Self {
        let carrier = wire.carrier();
        let buffer = vec![0; HEADER_BYTES + MAX_FRAME_BYTES].into_boxed_slice();
        Self {
            mac,
            wire,
            carrier,
            cable_pulled: false,
            buffer,
        }
    }

    /// Has `mac` be the address that the configuration structure shows. A driver that runs keeps
    /// the one that it has read until it is given another one.
    pub fn set_address(&mut self, mac: [u8; 6]) {
        self.mac = mac;
    }

    fn transmit(&mut self, queues: &mut Queues<'_>) -> Result<(), DeviceError> {
        while let Some(chain) = queues.pop(TRANSMIT)? {
            let fits = (HEADER_BYTES..=self.buffer.len()).contains(&chain.readable_bytes());
            let length = if fits {
                chain.read(queues.memory(), 0, &mut self.buffer)?
            } else {
                0
            };
            // A frame that is no frame or wants an offload is lost.
            let is_frame = length > HEADER_BYTES && self.buffer[GSO_TYPE] == GSO_NONE;
            if is_frame && !self.cable_pulled {
                let frame = &self.buffer[HEADER_BYTES..length];
                if self.wire.send(frame) == SendOutcome::Full {
                    queues.put_back(TRANSMIT);
                    break;
                }
            }
            queues.push(TRANSMIT, &chain, 0)?;
        }
        Ok(())
    }

    fn receive(&mut self, queues: &mut Queues<'_>) -> Result<(), DeviceError> {
        if !queues.active() || self.cable_pulled {
            if !self.drop_frames() {
                queues.go_on_later();
            }
            return Ok(());
        }
        while let Some(chain) = queues.pop(RECEIVE)? {
            let Some(length) = self.wire.receive(&mut self.buffer[HEADER_BYTES..]) else {
                queues.put_back(RECEIVE);
                break;
            };
            let padded = length.max(MIN_FRAME_BYTES);
            self.buffer[HEADER_BYTES + length..HEADER_BYTES + padded].fill(0);
            let total = HEADER_BYTES + padded;
            if chain.writable_bytes() < total {
                // Buffers are not merged: it fits into one or is lost.
                queues.put_back(RECEIVE);
                continue;
            }
            self.buffer[..HEADER_BYTES].copy_from_slice(&RECEIVED_HEADER);
            chain.write(queues.memory(), 0, &self.buffer[..total])?;
            queues.push(RECEIVE, &chain, total)?;
        }
        Ok(())
    }

    /// Loses what came. Returns whether that was all.
    fn drop_frames(&mut self) -> bool {
        (0..MAX_DROPPED).any(|_| self.wire.receive(&mut self.buffer).is_none())
    }

    fn wire_carrier(&self) -> bool {
        self.wire.carrier() && !self.cable_pulled
    }

    fn update_carrier(&mut self, queues: &mut Queues<'_>) {
        let carrier = self.wire_carrier();
        if std::mem::replace(&mut self.carrier, carrier) != carrier {
            queues.signal_config_change();
        }
    }

    /// The wire's descriptors and what to watch them for.
    fn descriptors(&self) -> Vec<(RawFd, EventSet)> {
        let mut all = vec![(
            self.wire.readable_fd(),
            EventSet::IN | EventSet::EDGE_TRIGGERED,
        )];
        if let Some(writable) = self.wire.writable_fd() {
            let signal = match writable.signal {
                WritableSignal::Out => EventSet::OUT,
                WritableSignal::In => EventSet::IN,
            };
            if writable.fd == all[0].0 {
                all[0].1 |= signal;
            } else {
                all.push((writable.fd, signal | EventSet::EDGE_TRIGGERED));
            }
        }
        all
    }
}

impl VirtioPciFunction<Net> {
    /// Pulls the network cable, or plugs it in again, whatever is at its other end.
    pub fn set_cable(&mut self, plugged: bool) {
        self.with_queues(|card, queues| {
            card.cable_pulled = !plugged;
            card.update_carrier(queues);
            Ok(())
        });
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind {
            id: 1,
            pci_class: 0x02_0000,
            name: "net",
        }
    }

    fn features(&self) -> u64 {
        F_MAC | F_STATUS
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        // struct virtio_net_config: mac, status.
        let mut config = [0; 8];
        config[..6].copy_from_slice(&self.mac);
        let status = if self.carrier { S_LINK_UP } else { 0 };
        config[6..].copy_from_slice(&status.to_le_bytes());
        read_structure(&config, offset, data);
    }

    fn activate(&mut self, _: u64, _: &mut Queues<'_>) -> Result<(), DeviceError> {
        // What came while nobody listened is lost; a wire may bring more than that in the meantime.
        self.drop_frames();
        self.carrier = self.wire_carrier();
        Ok(())
    }

    fn reset(&mut self) {}

    fn save(&self) -> Result<Part, StateError> {
        Part::new(FORM, &(self.mac, self.carrier, self.wire.save()?))
    }

    fn restore(&mut self, state: &Part) -> Result<(), StateError> {
        let (mac, carrier, wire): ([u8; 6], bool, Option<Part>) = state.open(FORM)?;
        self.wire.restore(&wire)?;
        self.mac = mac;
        // If the wire's is another one by now, the driver is told.
        self.carrier = carrier;
        Ok(())
    }

    fn notify(&mut self, queue: u16, queues: &mut Queues<'_>) -> Result<(), DeviceError> {
        if queue == TRANSMIT {
            self.transmit(queues)?;
        }
        // Whoever was sent to may have answered already.
        self.receive(queues)?;
        // The wire may have learned just now that nobody is at its other end: no event tells of
        // that any more.
        self.update_carrier(queues);
        Ok(())
    }

    fn watch(&mut self, ops: &mut EventOps<'_>) {
        for (fd, events) in self.descriptors() {
            if let Err(error) = ops.add(Events::new_raw(fd, events)) {
                tracing::error!(%error, "cannot watch the wire of a virtio network card");
            }
        }
    }

    fn event(
        &mut self,
        _: Events,
        _: &mut EventOps<'_>,
        queues: &mut Queues<'_>,
    ) -> Result<(), DeviceError> {
        self.transmit(queues)?;
        self.receive(queues)?;
        self.update_carrier(queues);
        Ok(())
    }
}
