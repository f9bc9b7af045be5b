//! What a person asks for when functions of a module are to be isolated. It is kept, to be asked for again after the
//! driver was restarted.

use devices::hold::CheckpointBy;
use isolation::attach::plan::Wanted;
use isolation::attach::request::Contain;
use serde::{Deserialize, Serialize};

/// Which functions of a module are to be isolated, and how.
#[derive(Debug, Clone)]
pub struct IsolationRequest {
    /// Name of the module.
    pub module: String,
    /// Which functions.
    pub entries: Wanted,
    /// Time that a call may take, in microseconds; the default otherwise.
    pub budget_us: Option<u64>,
    /// How the device's state is taken.
    pub checkpoint: CheckpointBy,
    /// What calls go on in the guest for.
    pub spilling: Spilling,
    /// How far calls have to be contained.
    pub contain: Contain,
}

/// What calls go on in the guest for, besides what only the guest can do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spilling {
    /// Time that a call may wait for with the guest standing still, in microseconds, at most a second; a longer wait
    /// goes on in the guest. The default otherwise.
    #[serde(default)]
    pub wait_us: Option<u64>,
    /// Kernel functions that are always run in the guest.
    #[serde(default)]
    pub guest_only: Vec<String>,
}
