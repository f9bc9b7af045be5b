//! A command for the lab or this host, and how it ended.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;

/// A command for the lab.
#[derive(Clone, Debug)]
pub struct Request {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Environment, complete.
    pub env: Vec<(String, String)>,
    /// Working directory, on the host as in L1.
    pub cwd: PathBuf,
    /// It is killed after this time.
    pub limit: Duration,
}

impl Request {
    /// `argv` with this process's environment and working directory.
    pub fn new(argv: Vec<String>, limit: Duration) -> anyhow::Result<Self> {
        let env = std::env::vars_os()
            // What is not text cannot travel, and no program of ours reads it.
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        let cwd = std::env::current_dir().context("there is no current directory")?;
        Ok(Self {
            argv,
            env,
            cwd,
            limit,
        })
    }
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Exit status.
    Exited(i32),
    /// Killed by this signal.
    Signaled(i32),
    /// Killed because its time was up.
    TimeLimit,
    /// The user pressed Ctrl-C.
    Interrupted,
}

impl Ended {
    /// As a shell would say it; `timeout`'s 124 when the time was up.
    pub fn status(self) -> u8 {
        match self {
            Self::Exited(status) => u8::try_from(status & 0xFF).unwrap_or(u8::MAX),
            Self::Signaled(signal) => u8::try_from(128 + signal).unwrap_or(u8::MAX),
            Self::TimeLimit => 124,
            Self::Interrupted => 130,
        }
    }
}
