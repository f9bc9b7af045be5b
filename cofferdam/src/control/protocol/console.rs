//! What a guest prints, in answers.

use agent_protocol::message::Bytes;
use serde::{Deserialize, Serialize};

/// Something that the guest printed on its console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleOutput {
    /// Number of the first of these bytes, counted from the first that was printed. More than what
    /// was asked for if that is not kept any more.
    pub from: u64,
    /// What was printed from there on; as much as fits into an answer.
    pub bytes: Bytes,
    /// Nothing comes after these: the VM has ended.
    pub ended: bool,
}
