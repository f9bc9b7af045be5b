//! Pings of the gateway in this process, and what of them came back.

use std::time::Duration;

use devices::wire::gateway::{GatewayControl, GatewayEventKind};

use super::VmService;
use crate::control::protocol::{ProbeReading, Reply};

/// Least time between two pings of the gateway, in microseconds.
const MIN_PROBE_INTERVAL_US: u64 = 1000;

/// Longest time between two pings, in microseconds.
const MAX_PROBE_INTERVAL_US: u64 = 3_600_000_000;

impl VmService {
    pub(super) fn gateway(&self) -> Result<GatewayControl, String> {
        let nics = self.nics.all();
        let mut gateways = nics.into_iter().filter_map(|nic| nic.gateway);
        gateways
            .next()
            .ok_or_else(|| "this VM has no gateway: run it with --net user".to_owned())
    }

    pub(super) fn probe_start(&self, interval_us: u64) -> Result<Reply, String> {
        if !(MIN_PROBE_INTERVAL_US..=MAX_PROBE_INTERVAL_US).contains(&interval_us) {
            return Err(format!(
                "pings come every {MIN_PROBE_INTERVAL_US} to {MAX_PROBE_INTERVAL_US} microseconds"
            ));
        }
        self.gateway()?
            .start_probe(Duration::from_micros(interval_us));
        Ok(Reply::Done {})
    }

    pub(super) fn probe_read(&self, since_ns: u64) -> Result<Reply, String> {
        let log = self.gateway()?.log();
        let events = log.events_since(since_ns);
        let count = |wanted: fn(&GatewayEventKind) -> bool| {
            events.iter().filter(|event| wanted(&event.kind)).count() as u64
        };
        Ok(Reply::Probe(ProbeReading {
            first_reply_ns: log.first_reply_since(since_ns),
            last_reply_before_ns: log.last_reply_before(since_ns),
            first_frame_ns: events
                .iter()
                .find(|event| event.kind == GatewayEventKind::FrameAfterSilence)
                .map(|event| event.at_ns),
            first_round_trip_ns: log.first_round_trip_since(since_ns),
            first_tx_ns: log.first_frame_since(since_ns),
            first_interrupt_ns: self
                .nics
                .all()
                .iter()
                .find(|nic| nic.gateway.is_some())
                .and_then(|nic| nic.nic.interrupts.as_ref())
                .and_then(|taken| taken.first_since(since_ns)),
            sent: count(|kind| matches!(kind, GatewayEventKind::ProbeSent { .. })),
            replied: count(|kind| matches!(kind, GatewayEventKind::ProbeReplied { .. })),
        }))
    }
}
