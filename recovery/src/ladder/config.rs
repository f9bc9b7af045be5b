//! What is allowed to get a driver back, and what is wanted for which entry point.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What to do about a call that failed, once it was rolled back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnFault {
    /// The call returns an error.
    Error,
    /// The call is run once more, for faults that do not last; an error when it fails again and
    /// again.
    Retry,
    /// The call returns an error, and the driver suspends and resumes its device with its own
    /// functions.
    Resume,
    /// The call returns an error, and the driver is restarted with its configuration put back.
    Restart,
    /// The call returns an error, and no call of the driver is run any more.
    Stop,
}

impl OnFault {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Error,
        Self::Retry,
        Self::Resume,
        Self::Restart,
        Self::Stop,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Retry => "retry",
            Self::Resume => "resume",
            Self::Restart => "restart",
            Self::Stop => "stop",
        }
    }

    /// The one of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|on_fault| on_fault.name() == name)
    }
}

/// Whether the guest may be reset when a driver cannot be restarted, and to what.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MayReset {
    /// It may not.
    #[default]
    No,
    /// It boots anew.
    Boot,
    /// It goes back to its last mark or, where it has none, to its last snapshot in a directory, in
    /// the same process. It boots anew where there is neither, or where that was done less than ten
    /// minutes ago and has not helped.
    Snapshot,
}

impl MayReset {
    /// How it may be reset, where it may.
    pub const ALLOWED: [Self; 2] = [Self::Boot, Self::Snapshot];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::No => "no",
            Self::Boot => "boot",
            Self::Snapshot => "snapshot",
        }
    }

    /// The one of [`Self::ALLOWED`] of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALLOWED.into_iter().find(|one| one.name() == name)
    }
}

/// What is allowed, and what is wanted for which entry point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LadderConfig {
    /// For entry points that are not named. Without it, functions that return a value return an
    /// error, and functions that return nothing, whose caller cannot know that they failed, are run
    /// again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_fault: Option<OnFault>,
    /// For single entry points.
    #[serde(default)]
    pub per_entry: BTreeMap<String, OnFault>,
    /// Faults in one minute, above which the driver is stopped.
    pub recoveries_per_minute: u32,
    /// How often one call is run again.
    pub retries: u32,
    /// Failed calls of one function, with none that ends well in between, after which the next rung
    /// is tried whatever was chosen.
    #[serde(default = "failures_in_a_row")]
    pub failures_in_a_row: u32,
    /// Whether the guest may be reset when the driver cannot be restarted.
    #[serde(default)]
    pub may_reset_guest: MayReset,
}

/// More than a person injects to see what happens, and less than a second of polls.
fn failures_in_a_row() -> u32 {
    100
}

impl Default for LadderConfig {
    fn default() -> Self {
        Self {
            on_fault: None,
            per_entry: BTreeMap::new(),
            // A fault every 100 ms: a driver that fails more often does nothing but fail.
            recoveries_per_minute: 600,
            retries: 2,
            failures_in_a_row: failures_in_a_row(),
            may_reset_guest: MayReset::No,
        }
    }
}
