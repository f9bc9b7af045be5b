//! What those who ask may do.

use axum::http::Method;

/// What somebody may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Role {
    /// May look at everything and change nothing
    Look,
    /// May do everything
    Do,
}

impl Role {
    /// Its name in a file of tokens.
    pub fn name(self) -> &'static str {
        match self {
            Self::Look => "look",
            Self::Do => "do",
        }
    }

    /// Whether a request of this method may be made.
    pub fn may(self, method: &Method) -> bool {
        self == Self::Do || matches!(*method, Method::GET | Method::HEAD)
    }
}
