//! Errors on their way to the host: one line, and the system's error number where there is one.

use agent_protocol::message::AgentError;

/// Result of a request's handler.
pub type Result<T> = std::result::Result<T, AgentError>;

/// An error without a number.
pub fn error(message: impl Into<String>) -> AgentError {
    AgentError {
        message: message.into(),
        errno: None,
    }
}

/// Says what was tried when the system refused.
pub trait Context<T> {
    /// `what` is a phrase such as `open /etc/x`.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for std::io::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| AgentError {
            message: format!("{}: {error}", what()),
            errno: error.raw_os_error(),
        })
    }
}

impl<T> Context<T> for rustix::io::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(std::io::Error::from).context(what)
    }
}
