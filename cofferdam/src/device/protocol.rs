//! Requests to a device host and its answers: one line of JSON each, as of a VM process
//! ([`crate::control::protocol`]).
//!
//! ```text
//! {"request":"status"}                     {"ok":{"reply":"status","name":"nic0","turn":"left",...}}
//! {"request":"switch","to":"right"}        {"ok":{"reply":"switched","from":"left","to":"right",...}}
//! {"request":"yield","vm":"right"}         {"ok":{"reply":"turn","turn":"left"}}
//! ```

use std::time::Duration;

use devices::vfio::passed::Counters as PassedCounters;
use devices::wire::turns::PortCounters;
use isolation::status::histogram::Histogram;
use recovery::switch::{Outcome, Phases};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::control::Protocol;

/// Shortest time slice, in milliseconds.
pub const MIN_SLICE_MS: u64 = 1;
/// Longest time slice, in milliseconds.
pub const MAX_SLICE_MS: u64 = 3_600_000;

/// How long a switch may take: one whose step failed goes back, and drivers in guests have their time
/// each way.
pub const SWITCH_TIME: Duration = Duration::from_secs(600);

/// Requests to a device host.
#[derive(Debug)]
pub struct DeviceProtocol;

impl Protocol for DeviceProtocol {
    type Request = Request;
    type Reply = Reply;
    const WHO: &'static str = "the device host";
    const END: &'static str = "kill -9";

    /// Drivers in guests may have to be asked.
    fn may_take(request: &Request) -> Option<Duration> {
        match request {
            Request::Switch { .. }
            | Request::Yield { .. }
            | Request::GiveUp { .. }
            | Request::Return { .. } => Some(SWITCH_TIME),
            _ => None,
        }
    }
}

/// What can be asked of a device host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// How is it? Answer: [`Reply::Status`].
    Status {},
    /// Give the turn to a VM. Answer: [`Reply::Switched`].
    Switch {
        /// Its name.
        to: String,
    },
    /// Pass the turn on after each such time, to all VMs that are attached. Answer:
    /// [`Reply::Turn`].
    Every {
        /// In milliseconds.
        ms: u64,
    },
    /// Leave the turn where it is. Answer: [`Reply::Turn`].
    Hold {},
    /// A VM does not run for now: it is not given the turn until [`Request::Return`], and what turn
    /// it has is passed on. Answer: [`Reply::Turn`].
    Yield {
        /// Its name.
        vm: String,
    },
    /// The same because the guest's driver of the device was given up: it is asked for nothing.
    /// Answer: [`Reply::Turn`].
    GiveUp {
        /// Its name.
        vm: String,
    },
    /// A VM runs again: it may be given the turn, and gets it if nobody has it. Answer:
    /// [`Reply::Turn`].
    Return {
        /// Its name.
        vm: String,
    },
    /// End.
    Quit {},
}

/// What a request brought.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// It was done.
    Done {},
    /// How the device host is.
    Status(Box<HostStatus>),
    /// How a switch ended.
    Switched(Box<SwitchRecord>),
    /// Who has the turn now.
    Turn {
        /// Name of a VM.
        turn: Option<String>,
    },
}

/// How a device host is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostStatus {
    /// Its name.
    pub name: String,
    /// Number of its process.
    pub pid: u32,
    /// Model of the NIC, or name of the device.
    pub model: String,
    /// Address of the function on the host, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub function: Option<String>,
    /// What it is plugged into.
    pub net: String,
    /// What guests without the turn see: `down` or `stall`.
    pub parked: String,
    /// What becomes of the turn of a VM that goes: `next` or `keep`.
    pub on_exit: String,
    /// How many VMs can have a context.
    pub slots: usize,
    /// Time since it began, in milliseconds.
    pub uptime_ms: u64,
    /// The VM that has the turn.
    pub turn: Option<String>,
    /// The time slice, in milliseconds, if the turn is passed on by time.
    pub every_ms: Option<u64>,
    /// The contexts, in the order in which they are given the turn.
    pub contexts: Vec<ContextStatus>,
    /// Frames that came while nobody had the turn, and were lost.
    pub lost_without_turn: u64,
    /// Switches since it began.
    pub switch_count: u64,
    /// Of them those that failed.
    pub failed_switches: u64,
    /// How long all of them took, whatever became of them.
    #[serde(default, skip_serializing_if = "Histogram::is_empty")]
    #[schema(value_type = Object)]
    pub switch_times: Histogram,
    /// How long no frame passed at each that gave somebody the turn, as `outage_ns` of a record.
    #[serde(default, skip_serializing_if = "Histogram::is_empty")]
    #[schema(value_type = Object)]
    pub outages: Histogram,
    /// The last ones, oldest first.
    pub switches: Vec<SwitchRecord>,
}

/// A VM's context.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ContextStatus {
    /// Name of the VM.
    pub vm: String,
    /// Ethernet address of its NIC.
    pub mac: String,
    /// Whether the VM is attached now.
    pub connected: bool,
    /// Whether the VM does not run for now, and is not given the turn.
    pub away: bool,
    /// Whether it has the turn.
    pub turn: bool,
    /// Whether its NIC sees a carrier.
    pub carrier: bool,
    /// How often it was attached.
    pub attached: u64,
    /// What passed at its port.
    #[schema(value_type = Object)]
    pub frames: PortCounters,
    /// Parts of its memory that the device reaches.
    pub dma_maps: usize,
    /// Bytes of them.
    pub dma_bytes: u64,
    /// Of them the device reaches just now, where that is a function of the host: the IOMMU's map.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mapped_bytes: Option<u64>,
    /// What was done with a function of the host for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub passed: Option<PassedCounters>,
    /// Messages of its connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub messages: Option<Messages>,
}

/// Messages of a vfio-user connection, as the device host counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Messages {
    /// Sent.
    pub sent: u64,
    /// Received.
    pub received: u64,
    /// Of those received the commands that wanted no reply.
    pub posted: u64,
}

/// Why the turn went on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// A VM was attached while nobody had it.
    Attached,
    /// Somebody asked for it.
    Asked,
    /// Its time was up.
    Slice,
    /// The VM that had it has gone.
    Gone,
    /// The VM that had it does not run for now.
    Yielded,
    /// A VM runs again, and nobody had it.
    Returned,
    /// A switch had left it with nobody.
    Again,
}

impl Reason {
    /// In words.
    pub fn text(self) -> &'static str {
        match self {
            Self::Attached => "attached",
            Self::Asked => "asked for",
            Self::Slice => "time slice",
            Self::Gone => "VM gone",
            Self::Yielded => "VM at rest",
            Self::Returned => "VM goes on",
            Self::Again => "nobody had it",
        }
    }
}

/// A switch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SwitchRecord {
    /// Which; they are counted from 1.
    pub number: u64,
    /// When it began (`CLOCK_MONOTONIC`).
    pub begin_ns: u64,
    /// The VM that had the turn.
    pub from: Option<String>,
    /// The VM that was to have it.
    pub to: Option<String>,
    /// Why.
    pub reason: Reason,
    /// How it ended.
    #[serde(flatten)]
    #[schema(value_type = Object)]
    pub outcome: Outcome,
    /// How long its steps took.
    #[schema(value_type = Object)]
    pub phases: Phases,
    /// From the moment in which the turn was given to the first frame that its VM sent or received.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_frame_ns: Option<u64>,
    /// From the last frame before the switch to the first one after it: with traffic, how long
    /// there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outage_ns: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::protocol::line;

    #[test]
    fn requests_and_records_travel_as_one_short_line() {
        let request = Request::Switch { to: "b".to_owned() };
        assert_eq!(line(&request), "{\"request\":\"switch\",\"to\":\"b\"}\n");
        let record = SwitchRecord {
            number: 1,
            begin_ns: 2,
            from: None,
            to: Some("b".to_owned()),
            reason: Reason::Attached,
            outcome: Outcome::Switched {},
            phases: Phases::default(),
            first_frame_ns: None,
            outage_ns: Some(3),
        };
        let text = line(&Reply::Switched(Box::new(record.clone())));
        assert!(text.contains("\"outcome\":\"switched\""), "{text}");
        let Reply::Switched(back) = serde_json::from_str(&text).unwrap() else {
            panic!("{text}");
        };
        assert_eq!(*back, record);
    }
}
