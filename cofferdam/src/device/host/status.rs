//! What a device host says of itself.

use devices::clock::monotonic_ns;

use super::Host;
use crate::device::card::Card;
use crate::device::held::lock;
use crate::device::protocol::HostStatus;
use crate::device::{OnExit, ParkedAs};

impl<C: Card> Host<C> {
    /// How it is.
    pub fn status(&self) -> HostStatus {
        let contexts = self.contexts().clone();
        // Each may wait for its NIC: before the history is locked, which a switch writes to.
        let contexts = contexts.iter().map(|context| context.status()).collect();
        let turn = self.turn();
        let mut history = lock(&self.history);
        let switches = history.last(|turn| self.card.times(turn));
        let every = *lock(&self.every);
        let mut status = HostStatus {
            name: self.config.name.to_string(),
            pid: std::process::id(),
            model: self.card.name(),
            function: None,
            net: self.config.wire.clone(),
            parked: match self.config.parked {
                ParkedAs::Down => "down",
                ParkedAs::Stall => "stall",
            }
            .to_owned(),
            on_exit: match self.config.on_exit {
                OnExit::Keep => "keep",
                OnExit::Next => "next",
            }
            .to_owned(),
            slots: self.config.slots,
            uptime_ms: monotonic_ns().saturating_sub(self.started_ns) / 1_000_000,
            turn,
            every_ms: every.map(|every| u64::try_from(every.as_millis()).unwrap_or(u64::MAX)),
            contexts,
            lost_without_turn: 0,
            switch_count: history.count,
            failed_switches: history.failed,
            switch_times: history.times.clone(),
            outages: history.outages.clone(),
            switches,
        };
        self.card.fill(&mut status);
        status
    }
}
