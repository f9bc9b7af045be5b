//! The state of a part of a machine as a value that can be stored: what kind of part it is of, the
//! version of its form, and its content.
//!
//! ```text
//!   a device ── Part::new ──► Part { kind, version, content, checksum } ── serde ──► wherever it is kept
//!   a device made alike ◄── Part::open ──┘ refuses: another kind, another version, damage, what the device cannot be
//! ```
//!
//! A part is taken between two accesses to the device, and holds no descriptor, no pointer and no
//! clock reading. What is under way is not in it: a device that was put back looks at its rings for
//! what was asked of it. What a part holds comes from outside and may be anything.

#[cfg(test)]
pub(crate) mod tests;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Longest content, in bytes: what a device may hold of frames and packets and more.
const MAX_CONTENT_BYTES: usize = 16 << 20;
/// Longest name of a kind.
const MAX_KIND_BYTES: usize = 64;

/// Why a state cannot be taken or put back.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// The part does not give its state away.
    #[error("it does not give its state away")]
    Kept,
    /// The state is of something else.
    #[error("the saved state is of a {found}, not of a {wanted}")]
    Kind {
        /// What it is of.
        found: String,
        /// What it should be of.
        wanted: &'static str,
    },
    /// The state has a form that is not known here.
    #[error(
        "the saved state of a {kind} is of version {found}; this program reads version {known}"
    )]
    Version {
        /// What it is of.
        kind: &'static str,
        /// Its version.
        found: u32,
        /// The version that is known.
        known: u32,
    },
    /// It was cut or changed.
    #[error("the saved state of a {0} is damaged")]
    Damaged(&'static str),
    /// The part cannot be in such a state, or not this one.
    #[error("a {kind} made like this one cannot have the saved state: {what}")]
    DoesNotFit {
        /// What it is of.
        kind: &'static str,
        /// What does not fit.
        what: String,
    },
}

/// Name and version of the form of a part's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Form {
    /// What the state is of.
    pub kind: &'static str,
    /// Rises with each change of what is stored.
    pub version: u32,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    kind: String,
    version: u32,
    content: Vec<u8>,
    /// CRC-32 of all of the others.
    checksum: u32,
}

impl Form {
    /// An error of a state of this form.
    pub fn does_not_fit(&self, what: impl ToString) -> StateError {
        StateError::DoesNotFit {
            kind: self.kind,
            what: what.to_string(),
        }
    }
}

impl Part {
    /// The part whose content is `state`.
    ///
    /// # Errors
    /// It is longer than any state.
    pub fn new<T: Serialize>(form: Form, state: &T) -> Result<Self, StateError> {
        let content = postcard::to_stdvec(state).map_err(|error| form.does_not_fit(error))?;
        if content.len() > MAX_CONTENT_BYTES {
            return Err(form.does_not_fit(format!("it has {} bytes", content.len())));
        }
        let mut part = Self {
            kind: form.kind.to_owned(),
            version: form.version,
            content,
            checksum: 0,
        };
        part.checksum = part.sum();
        Ok(part)
    }

    /// What the state is of.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// The content of a part of this form.
    ///
    /// # Errors
    /// It is of another form, or is damaged.
    pub fn open<T: DeserializeOwned>(&self, form: Form) -> Result<T, StateError> {
        if self.kind.len() > MAX_KIND_BYTES
            || self.content.len() > MAX_CONTENT_BYTES
            || self.checksum != self.sum()
        {
            return Err(StateError::Damaged(form.kind));
        }
        if self.kind != form.kind {
            return Err(StateError::Kind {
                found: self.kind.clone(),
                wanted: form.kind,
            });
        }
        if self.version != form.version {
            return Err(StateError::Version {
                kind: form.kind,
                found: self.version,
                known: form.version,
            });
        }
        let damaged = |_| StateError::Damaged(form.kind);
        let (state, rest) = postcard::take_from_bytes(&self.content).map_err(damaged)?;
        if !rest.is_empty() {
            return Err(StateError::Damaged(form.kind));
        }
        Ok(state)
    }

    fn sum(&self) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(self.kind.as_bytes());
        hasher.update(&[0]);
        hasher.update(&self.version.to_le_bytes());
        hasher.update(&self.content);
        hasher.finalize()
    }
}
