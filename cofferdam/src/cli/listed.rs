//! A process that runs, as `list` and `device list` show it.

use serde::Serialize;

use super::one_line;
use crate::runtime_dir::RunningVm;

/// One line of a list, with the process's status if it answered.
#[derive(Debug, Serialize)]
pub struct Listed<S> {
    /// Name.
    pub name: String,
    /// Number of the process, if it is known.
    pub pid: Option<u32>,
    /// What it answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<S>,
    /// Why there is no status.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_answer: Option<String>,
}

impl<S> Listed<S> {
    /// `process`, which was asked for its status.
    pub fn new(process: &RunningVm, asked: anyhow::Result<S>) -> Self {
        let (status, no_answer) = match asked {
            Ok(status) => (Some(status), None),
            Err(error) => (None, Some(one_line(&error))),
        };
        Self {
            name: process.name.to_string(),
            pid: process.pid,
            status,
            no_answer,
        }
    }

    /// The number of its process for a table.
    pub fn pid_text(&self) -> String {
        self.pid
            .map_or_else(|| "?".to_owned(), |pid| pid.to_string())
    }
}
