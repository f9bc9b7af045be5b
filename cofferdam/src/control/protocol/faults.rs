//! Faults on purpose, in requests and answers.

use agent_protocol::message::Bytes;
use devices::edge::EdgeStatus;
use isolation::attach::text_fault::TextFaultStatus;
use isolation::dispatch::fault::{FaultCount, UsedUpBy, WhichCalls};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Which calls of an isolated function have a fault in them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultyCalls {
    /// Which of them.
    pub which: WhichCalls,
    /// How many calls use it up.
    pub times: u64,
    /// Which do.
    pub used_up_by: UsedUpBy,
}

/// A function of a loaded module as it is in the guest's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionBytes {
    /// Its address.
    pub start: u64,
    /// Its bytes, with the padding behind it and without a gate.
    pub code: Bytes,
    /// Names of the functions that it calls or jumps to outside of itself, by address.
    pub callees: Vec<(u64, String)>,
    /// Whether functions of the module are isolated: faults go into the domain's copy.
    pub isolated: bool,
}

/// What became of the faults of a module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FaultsState {
    /// Of the one that was ordered last for isolated calls; `None` if the module is not isolated.
    #[schema(value_type = Option<Object>)]
    pub calls: Option<FaultCount>,
    /// Of the one in the guest's own text, whichever module it is of.
    #[schema(value_type = Option<Object>)]
    pub own_text: Option<TextFaultStatus>,
}

/// What goes wrong at the edge of a NIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Disturbance {
    /// The NIC's PCI address in the guest.
    pub nic: String,
    /// What was ordered, and how often it matched and struck.
    #[serde(flatten)]
    #[schema(value_type = Object)]
    pub status: EdgeStatus,
}
