//! The manifest: what a snapshot is, for people and for the reader.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{PageSums, SnapshotError};

/// Version of the directory's form. Changes with every change of it or of what is in it.
pub const FORMAT_VERSION: u32 = 2;
/// The first version whose pages are under XXH64.
const XXH64_VERSION: u32 = 2;
/// What the head of a manifest says.
const FORMAT: &str = "cofferdam-snapshot";
/// Longest manifest that is looked at, in bytes.
pub(super) const MAX_MANIFEST_BYTES: u64 = 1 << 20;

/// Most memory of a VM that is believed, in bytes: what is made for a snapshot, such as the list of
/// its pages, grows with it.
const MAX_MEMORY_BYTES: u64 = 1 << 40;

/// Identity of a snapshot: 16 random bytes, written as 32 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotId([u8; 16]);

impl SnapshotId {
    /// One that no other snapshot has.
    ///
    /// # Errors
    /// The host gives no random bytes.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 16];
        let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        // Up to 256 bytes are never cut short (getrandom(2)).
        if got != bytes.len() {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl From<SnapshotId> for String {
    fn from(id: SnapshotId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for SnapshotId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl FromStr for SnapshotId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if text.len() != 32 || !text.bytes().all(is_digit) {
            return Err("an identity has 32 hexadecimal digits".to_owned());
        }
        let number = u128::from_str_radix(text, 16).map_err(|error| error.to_string())?;
        Ok(Self(number.to_be_bytes()))
    }
}

/// A file of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredFile {
    /// Length in bytes.
    pub bytes: u64,
    /// CRC-32 (IEEE 802.3) of all of it; of the memory image none, its pages are under the
    /// checksums of the map.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crc32: Option<u32>,
}

/// What a diff is based on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParentSnapshot {
    /// Its identity.
    pub id: SnapshotId,
    /// Where it is: from the diff's directory, or absolute.
    pub path: String,
}

/// The processor that a machine ran on, for messages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuModel {
    /// Vendor (CPUID leaf 0).
    pub vendor: String,
    /// Brand (CPUID leaves 0x8000_0002 to 4).
    pub brand: String,
}

/// The files besides the manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Files {
    /// The machine's state.
    pub machine: StoredFile,
    /// The devices' states.
    pub devices: StoredFile,
    /// The list of pages.
    pub map: StoredFile,
    /// The pages.
    pub image: StoredFile,
}

/// See the module's text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// 1 to [`FORMAT_VERSION`].
    pub version: u32,
    /// Which snapshot this is.
    pub id: SnapshotId,
    /// What a diff is based on; a full snapshot has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<ParentSnapshot>,
    /// When it was taken: seconds since 1970 (UTC).
    pub created_unix_s: u64,
    /// Program and version that wrote it.
    pub program: String,
    /// Processor that the guest ran on.
    pub cpu: CpuModel,
    /// Guest memory, in bytes.
    pub memory_bytes: u64,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// The other files.
    pub files: Files,
    /// What the program on top needs to make the same machine.
    pub vm: Value,
}

/// The file: a manifest and its checksum.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Enveloped {
    format: String,
    crc32: u32,
    manifest: Value,
}

impl Manifest {
    /// The file's text.
    ///
    /// # Errors
    /// It is longer than any that is read.
    pub fn to_text(&self) -> Result<String, String> {
        let manifest = serde_json::to_value(self).map_err(|error| error.to_string())?;
        let enveloped = Enveloped {
            format: FORMAT.to_owned(),
            crc32: checksum(&manifest),
            manifest,
        };
        let mut text =
            serde_json::to_string_pretty(&enveloped).map_err(|error| error.to_string())?;
        text.push('\n');
        if text.len() as u64 > MAX_MANIFEST_BYTES {
            return Err(format!("it has {} bytes", text.len()));
        }
        Ok(text)
    }

    /// The manifest in `text`, which was read from `path`.
    ///
    /// # Errors
    /// It is not one, has another version, or was changed.
    pub fn from_text(path: &Path, text: &str) -> Result<Self, SnapshotError> {
        let damaged = |what: String| SnapshotError::damaged(path, what);
        let enveloped: Enveloped =
            serde_json::from_str(text).map_err(|error| damaged(error.to_string()))?;
        if enveloped.format != FORMAT {
            return Err(damaged("it is of another program".to_owned()));
        }
        // A later version may say whatever it likes besides its number.
        let version = enveloped.manifest.get("version").and_then(Value::as_u64);
        match version {
            Some(version) if (1..=u64::from(FORMAT_VERSION)).contains(&version) => {}
            Some(found) => {
                let path = path.to_owned();
                return Err(SnapshotError::Version { path, found });
            }
            None => return Err(damaged("it has no version".to_owned())),
        }
        if enveloped.crc32 != checksum(&enveloped.manifest) {
            return Err(damaged("its checksum is wrong".to_owned()));
        }
        let manifest: Self = serde_json::from_value(enveloped.manifest)
            .map_err(|error| damaged(error.to_string()))?;
        manifest.check().map_err(damaged)?;
        Ok(manifest)
    }

    /// What the pages of its image are summed up by.
    pub fn page_sums(&self) -> PageSums {
        match self.version < XXH64_VERSION {
            true => PageSums::Crc32,
            false => PageSums::Xxh64,
        }
    }

    fn check(&self) -> Result<(), String> {
        if self.memory_bytes == 0 || !self.memory_bytes.is_multiple_of(super::PAGE_BYTES) {
            return Err("its memory is no whole number of pages".to_owned());
        }
        if self.memory_bytes > MAX_MEMORY_BYTES {
            return Err(format!("it tells of {} bytes of memory", self.memory_bytes));
        }
        if self.files.image.bytes != self.memory_bytes {
            return Err("its image is not as long as its memory".to_owned());
        }
        Ok(())
    }
}

/// CRC-32 of a value as compact JSON: how it is laid out in the file makes no difference.
fn checksum(value: &Value) -> u32 {
    crc32fast::hash(value.to_string().as_bytes())
}
