//! States as bytes, and what is refused to be one.
//!
//! A head of 20 bytes (magic, version, length and CRC-32 of the rest) and `postcard`'s encoding of
//! the value. Bytes are not trusted: what is no state of this kind and version, is cut, changed, or
//! not as it would be written, is refused.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::StateError;

/// Magic, version, length, CRC-32.
pub(super) const HEAD_BYTES: usize = 20;

/// How states of one kind are written.
pub(super) struct Encoding {
    /// First bytes.
    pub magic: [u8; 8],
    /// Changes with every change of the encoding or of what it means.
    pub version: u32,
    /// Longest content that is looked at; less than 4 GiB.
    pub max_bytes: usize,
    /// What it is, for messages.
    pub what: &'static str,
}

impl Encoding {
    /// `state` as bytes.
    pub fn write<T: Serialize>(&self, state: &T) -> Result<Vec<u8>, StateError> {
        let content =
            postcard::to_stdvec(state).map_err(|_| StateError::Content("it cannot be encoded"))?;
        let length = u32::try_from(content.len())
            .ok()
            .filter(|_| content.len() <= self.max_bytes)
            .ok_or(StateError::Content("it is longer than any state"))?;
        let mut bytes = Vec::with_capacity(HEAD_BYTES + content.len());
        bytes.extend_from_slice(&self.magic);
        bytes.extend_from_slice(&self.version.to_le_bytes());
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&crc32fast::hash(&content).to_le_bytes());
        bytes.extend_from_slice(&content);
        Ok(bytes)
    }

    /// The state that [`Encoding::write`] gave. Whether it can be one is still to be checked.
    pub fn read<T: Serialize + DeserializeOwned>(&self, bytes: &[u8]) -> Result<T, StateError> {
        let none = StateError::NoState(self.what);
        let Some((head, content)) = bytes.split_first_chunk::<HEAD_BYTES>() else {
            return Err(none);
        };
        if head[..8] != self.magic {
            return Err(none);
        }
        let word =
            |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        if word(8) != self.version {
            return Err(StateError::Version {
                found: word(8),
                known: self.version,
            });
        }
        let told = u64::from(word(12));
        if told != content.len() as u64 || content.len() > self.max_bytes {
            return Err(StateError::Length {
                told,
                found: content.len() as u64,
            });
        }
        if word(16) != crc32fast::hash(content) {
            return Err(StateError::Checksum);
        }
        let state: T = postcard::from_bytes(content)
            .map_err(|_| StateError::Content("it cannot be decoded"))?;
        // Numbers can be written in several ways, and structures of KVM's cut short.
        if postcard::to_stdvec(&state).ok().as_deref() != Some(content) {
            return Err(StateError::Content("it is written in another way"));
        }
        Ok(state)
    }
}
