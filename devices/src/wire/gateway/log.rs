//! What passed through the gateway and when, readable from any thread while the guest runs.
//!
//! All times are [`monotonic_ns`](crate::clock::monotonic_ns). Lock order: the log's lock is taken
//! last and nothing is called under it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::moments::Moments;

/// Time without a frame from the guest that makes the next one an event, in nanoseconds.
pub const SILENCE_NS: u64 = 50_000_000;

/// Events kept; the oldest goes when a new one comes.
const EVENTS: usize = 32 * 1024;

/// Something that a measurement of recovery is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GatewayEvent {
    /// When, in nanoseconds of `CLOCK_MONOTONIC`.
    pub at_ns: u64,
    /// What.
    pub kind: GatewayEventKind,
}

/// Kinds of [`GatewayEvent`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GatewayEventKind {
    /// An ARP request for the guest's address was put on the wire.
    ArpSent,
    /// An echo request was put on the wire; `sequence` counts from 0 and never wraps.
    ProbeSent {
        /// Number of the probe.
        sequence: u64,
    },
    /// The guest answered an echo request.
    ProbeReplied {
        /// Number of the probe.
        sequence: u64,
        /// From request to reply, in nanoseconds.
        round_trip_ns: u64,
    },
    /// A frame came from the guest after none had come for [`SILENCE_NS`] or longer (or ever).
    FrameAfterSilence,
    /// The carrier came or went.
    Carrier {
        /// Whether it is there now.
        present: bool,
    },
}

/// Counters of everything that passed since the gateway was made.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct GatewayCounters {
    /// Frames taken from the guest.
    pub frames_from_guest: u64,
    /// Frames handed to the guest.
    pub frames_to_guest: u64,
    /// Frames from the guest that no network of this gateway takes: too short, too long, or of an
    /// unknown VLAN.
    pub frames_refused: u64,
    /// Frames longer than the NIC's buffer, lost.
    pub frames_too_long: u64,
}

/// The gateway's record. Cheap to hold and to read.
#[derive(Debug, Default)]
pub struct GatewayLog {
    events: Mutex<VecDeque<GatewayEvent>>,
    frames_from_guest: AtomicU64,
    frames_to_guest: AtomicU64,
    frames_refused: AtomicU64,
    frames_too_long: AtomicU64,
    /// Frames from the guest.
    from_guest: Moments,
    /// Zero while there was none.
    last_from_guest_ns: AtomicU64,
}

impl GatewayLog {
    /// Events that happened at `since_ns` or later, oldest first.
    pub fn events_since(&self, since_ns: u64) -> Vec<GatewayEvent> {
        let events = self.events();
        let start = events.partition_point(|event| event.at_ns < since_ns);
        events.range(start..).copied().collect()
    }

    /// When the guest first answered a probe at `since_ns` or later.
    pub fn first_reply_since(&self, since_ns: u64) -> Option<u64> {
        let events = self.events();
        let start = events.partition_point(|event| event.at_ns < since_ns);
        events
            .range(start..)
            .find(|event| matches!(event.kind, GatewayEventKind::ProbeReplied { .. }))
            .map(|event| event.at_ns)
    }

    /// When the guest last answered a probe before `before_ns`.
    pub fn last_reply_before(&self, before_ns: u64) -> Option<u64> {
        let events = self.events();
        let end = events.partition_point(|event| event.at_ns < before_ns);
        events
            .range(..end)
            .rev()
            .find(|event| matches!(event.kind, GatewayEventKind::ProbeReplied { .. }))
            .map(|event| event.at_ns)
    }

    /// When the guest first answered a probe that was sent at `since_ns` or later.
    pub fn first_round_trip_since(&self, since_ns: u64) -> Option<u64> {
        let events = self.events();
        let start = events.partition_point(|event| event.at_ns < since_ns);
        events.range(start..).find_map(|event| match event.kind {
            GatewayEventKind::ProbeReplied { round_trip_ns, .. } => {
                let sent_ns = event.at_ns.saturating_sub(round_trip_ns);
                (sent_ns >= since_ns).then_some(event.at_ns)
            }
            _ => None,
        })
    }

    /// When the guest first sent a frame at `since_ns` or later.
    pub fn first_frame_since(&self, since_ns: u64) -> Option<u64> {
        self.from_guest.first_since(since_ns)
    }

    /// Frames counted so far.
    pub fn counters(&self) -> GatewayCounters {
        GatewayCounters {
            frames_from_guest: self.frames_from_guest.load(Ordering::Relaxed),
            frames_to_guest: self.frames_to_guest.load(Ordering::Relaxed),
            frames_refused: self.frames_refused.load(Ordering::Relaxed),
            frames_too_long: self.frames_too_long.load(Ordering::Relaxed),
        }
    }

    pub(super) fn record(&self, at_ns: u64, kind: GatewayEventKind) {
        let mut events = self.events();
        if events.len() == EVENTS {
            events.pop_front();
        }
        events.push_back(GatewayEvent { at_ns, kind });
    }

    pub(super) fn frame_from_guest(&self, at_ns: u64) {
        self.frames_from_guest.fetch_add(1, Ordering::Relaxed);
        self.from_guest.record(at_ns);
        let last = self.last_from_guest_ns.swap(at_ns, Ordering::Relaxed);
        if at_ns.saturating_sub(last) >= SILENCE_NS {
            self.record(at_ns, GatewayEventKind::FrameAfterSilence);
        }
    }

    pub(super) fn frame_to_guest(&self) {
        self.frames_to_guest.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn frame_refused(&self) {
        self.frames_refused.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn frame_too_long(&self) {
        self.frames_too_long.fetch_add(1, Ordering::Relaxed);
    }

    fn events(&self) -> MutexGuard<'_, VecDeque<GatewayEvent>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_event_makes_room_for_a_new_one() {
        let log = GatewayLog::default();
        for at_ns in 0..EVENTS as u64 + 10 {
            log.record(at_ns, GatewayEventKind::ArpSent);
        }
        let events = log.events_since(0);
        assert_eq!(events.len(), EVENTS);
        assert_eq!(events[0].at_ns, 10);
    }

    #[test]
    fn replies_are_found_on_either_side_of_an_outage() {
        let log = GatewayLog::default();
        for at_ns in [10, 20, 500, 510] {
            log.record(at_ns - 1, GatewayEventKind::ProbeSent { sequence: at_ns });
            log.record(
                at_ns,
                GatewayEventKind::ProbeReplied {
                    sequence: at_ns,
                    round_trip_ns: 1,
                },
            );
        }
        assert_eq!(log.last_reply_before(100), Some(20));
        assert_eq!(log.first_reply_since(100), Some(500));
        assert_eq!(log.first_reply_since(511), None);
    }

    #[test]
    fn a_frame_and_a_round_trip_count_only_if_they_began_afterwards() {
        let log = GatewayLog::default();
        let reply = |sequence, round_trip_ns| GatewayEventKind::ProbeReplied {
            sequence,
            round_trip_ns,
        };
        for (at_ns, sequence) in [(110, 0), (160, 1)] {
            log.frame_from_guest(at_ns);
            log.record(at_ns, reply(sequence, 50));
        }
        assert_eq!(log.first_frame_since(100), Some(110));
        assert_eq!(log.first_round_trip_since(100), Some(160));
        assert_eq!(log.first_round_trip_since(111), None);
        assert_eq!(log.counters().frames_from_guest, 2);
    }

    #[test]
    fn the_frame_that_ends_a_silence_is_an_event() {
        let log = GatewayLog::default();
        for at_ns in [1, 2, SILENCE_NS].map(|ns| 10 * SILENCE_NS + ns) {
            log.frame_from_guest(at_ns);
        }
        log.frame_from_guest(20 * SILENCE_NS);
        let events = log.events_since(0);
        let at: Vec<u64> = events.iter().map(|event| event.at_ns).collect();
        assert_eq!(at, [10 * SILENCE_NS + 1, 20 * SILENCE_NS]);
    }
}
