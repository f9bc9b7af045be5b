//! A wire that counts what passes, whatever NIC and wire are at its ends.

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use devices::state::{Part, StateError};
use devices::wire::{SendOutcome, Wire, WritableFd};

/// Counters of a [`MeteredWire`], readable from any thread.
#[derive(Debug, Default)]
pub struct Meter {
    sent_frames: AtomicU64,
    sent_bytes: AtomicU64,
    dropped_frames: AtomicU64,
    full: AtomicU64,
    received_frames: AtomicU64,
    received_bytes: AtomicU64,
    carrier: AtomicBool,
    link_losses: AtomicU64,
}

impl Meter {
    /// The values now, by name, as the guest sees them: what it sent and what it received.
    pub fn read(&self) -> BTreeMap<String, u64> {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        [
            ("tx_frames", value(&self.sent_frames)),
            ("tx_bytes", value(&self.sent_bytes)),
            ("tx_dropped_by_wire", value(&self.dropped_frames)),
            ("tx_waits_for_wire", value(&self.full)),
            ("rx_frames", value(&self.received_frames)),
            ("rx_bytes", value(&self.received_bytes)),
            ("carrier", u64::from(self.carrier.load(Ordering::Relaxed))),
            ("link_losses", value(&self.link_losses)),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
    }
}

/// See the module.
pub struct MeteredWire {
    wire: Box<dyn Wire>,
    /// It takes the place of one of another kind.
    is_another: bool,
    meter: Arc<Meter>,
}

impl MeteredWire {
    /// Counts what passes through `wire`. `is_another`: a NIC that goes on from a saved state was
    /// on a wire of another kind, and is plugged into this one anew.
    pub fn new(wire: Box<dyn Wire>, is_another: bool) -> Self {
        Self {
            wire,
            is_another,
            meter: Arc::default(),
        }
    }

    /// Its counters.
    pub fn meter(&self) -> Arc<Meter> {
        Arc::clone(&self.meter)
    }
}

/// Adds to a counter.
fn add(counter: &AtomicU64, amount: usize) {
    counter.fetch_add(amount as u64, Ordering::Relaxed);
}

impl Wire for MeteredWire {
    fn send(&mut self, frame: &[u8]) -> SendOutcome {
        let outcome = self.wire.send(frame);
        match outcome {
            SendOutcome::Sent => {
                add(&self.meter.sent_frames, 1);
                add(&self.meter.sent_bytes, frame.len());
            }
            SendOutcome::Full => add(&self.meter.full, 1),
            SendOutcome::Dropped => add(&self.meter.dropped_frames, 1),
        }
        outcome
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let length = self.wire.receive(buffer)?;
        add(&self.meter.received_frames, 1);
        add(&self.meter.received_bytes, length);
        Some(length)
    }

    fn carrier(&self) -> bool {
        let carrier = self.wire.carrier();
        self.meter.carrier.store(carrier, Ordering::Relaxed);
        carrier
    }

    fn nic_link(&mut self, up: bool) {
        if !up {
            add(&self.meter.link_losses, 1);
        }
        self.wire.nic_link(up);
    }

    fn loses_frames(&self) -> bool {
        self.wire.loses_frames()
    }

    fn stations(&mut self, addresses: &[[u8; 6]]) {
        self.wire.stations(addresses);
    }

    fn save(&self) -> Result<Option<Part>, StateError> {
        self.wire.save()
    }

    fn restore(&mut self, state: &Option<Part>) -> Result<(), StateError> {
        match self.is_another {
            true => Ok(()),
            false => self.wire.restore(state),
        }
    }

    fn readable_fd(&self) -> RawFd {
        self.wire.readable_fd()
    }

    fn writable_fd(&self) -> Option<WritableFd> {
        self.wire.writable_fd()
    }
}

#[cfg(test)]
mod tests {
    use devices::wire::gateway::{Gateway, GatewayConfig};

    use super::*;

    #[test]
    fn frames_are_counted_in_both_directions() {
        let gateway = Gateway::new(&GatewayConfig::default()).unwrap();
        let mut wire = MeteredWire::new(Box::new(gateway), false);
        let meter = wire.meter();
        // Who has 10.0.2.2? Tell 10.0.2.15.
        let mut arp = vec![0xff; 6];
        arp.extend([2, 0, 0, 0, 0, 1, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        arp.extend([
            2, 0, 0, 0, 0, 1, 10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2,
        ]);
        assert_eq!(wire.send(&arp), SendOutcome::Sent);
        assert!(wire.carrier());
        let length = wire.receive(&mut [0; 2048]).unwrap();
        let values = meter.read();
        assert_eq!((values["tx_frames"], values["tx_bytes"]), (1, 42));
        assert_eq!(
            (values["rx_frames"], values["rx_bytes"]),
            (1, length as u64)
        );
        assert_eq!(values["carrier"], 1);
        assert_eq!(values["link_losses"], 0);
        for up in [true, false, true] {
            wire.nic_link(up);
        }
        assert_eq!(meter.read()["link_losses"], 1);
    }
}
