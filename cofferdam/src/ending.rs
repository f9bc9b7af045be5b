//! How a command ends.

use std::process::ExitCode;

use crate::signals::EndingSignal;

/// How a run or another command ended, for the process's exit.
#[derive(Debug, Clone, Copy)]
pub enum Ending {
    /// With this status.
    Status(ExitCode),
    /// By a signal that asked for it, once everything is cleaned up.
    Signal(EndingSignal),
}

impl Ending {
    /// All went well.
    pub const SUCCESS: Self = Self::Status(ExitCode::SUCCESS);
    /// What was looked for was found, and should not be there.
    pub const FAILURE: Self = Self::Status(ExitCode::FAILURE);
}
