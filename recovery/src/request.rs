//! What a person asks for when functions of a module are to be isolated. It is kept, to be asked
//! for again after the driver was restarted.

use devices::hold::CheckpointBy;
use isolation::attach::plan::Wanted;
use isolation::attach::request::Contain;
use isolation::fault_image::KeepFaults;
use serde::{Deserialize, Serialize};

use crate::ladder::LadderConfig;

/// A module that is isolated, as it has to be told so that it can be isolated again in a guest that
/// was restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IsolatedModule {
    /// What was asked for.
    pub request: IsolationRequest,
    /// What is done about its calls that fail.
    pub recovery: LadderConfig,
    /// Why its calls are not run, if they are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<String>,
}

/// Which functions of a module are to be isolated, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
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
    /// Where images of the guest at faults are kept; none are if this is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_faults: Option<KeepFaults>,
}

/// What calls go on in the guest for, besides what only the guest can do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spilling {
    /// Time that a call may wait for with the guest standing still, in microseconds, at most a
    /// second; a longer wait goes on in the guest. The default otherwise.
    #[serde(default)]
    pub wait_us: Option<u64>,
    /// Kernel functions that are always run in the guest.
    #[serde(default)]
    pub guest_only: Vec<String>,
}
