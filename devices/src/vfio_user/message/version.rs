//! `VFIO_USER_VERSION`: the first message of both sides.

use serde::{Deserialize, Serialize};

use super::{MAX_DATA_BYTES, MessageError, Payload, Reader};

/// Longest version data.
const MAX_JSON_BYTES: usize = 4096;

/// What the sender can do (specification, "`VFIO_USER_VERSION`"). What is not said has the
/// specification's value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Capabilities {
    /// Descriptors that the sender takes with one message.
    pub max_msg_fds: u32,
    /// Data bytes that the sender takes in one message.
    pub max_data_xfer_size: u32,
    /// Mappings that the sender keeps at a time.
    pub max_dma_maps: u32,
    /// Page sizes of mappings, or'ed together.
    pub pgsizes: u64,
    /// Whether the sender knows `VFIO_USER_REGION_WRITE_MULTI`.
    pub write_multiple: bool,
    /// Whether the sender knows [`super::FEATURE_REGISTERS`]: not the specification's.
    #[serde(rename = "cofferdam_registers")]
    pub shared_registers: bool,
}

impl Default for Capabilities {
    fn default() -> Self {
        Self {
            max_msg_fds: 1,
            max_data_xfer_size: MAX_DATA_BYTES,
            max_dma_maps: 65535,
            pgsizes: 4096,
            write_multiple: false,
            shared_registers: false,
        }
    }
}

#[derive(Serialize, Deserialize, Default)]
#[serde(default)]
struct Data {
    capabilities: Capabilities,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// Only the same major versions understand each other.
    pub major: u16,
    /// The lower one of two holds.
    pub minor: u16,
    /// What the sender can do.
    pub capabilities: Capabilities,
}

impl Payload for Version {
    fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        let mut reader = Reader::new(bytes);
        let (major, minor) = (reader.u16()?, reader.u16()?);
        let capabilities = match reader.0 {
            [] => Capabilities::default(),
            [json @ .., 0] if json.len() <= MAX_JSON_BYTES => {
                let data: Data = serde_json::from_slice(json)
                    .map_err(|_| MessageError::Field("list of capabilities"))?;
                data.capabilities
            }
            [.., 0] => return Err(MessageError::Long),
            _ => return Err(MessageError::Field("end of the capabilities")),
        };
        Ok(Self {
            major,
            minor,
            capabilities,
        })
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.extend(self.major.to_le_bytes());
        out.extend(self.minor.to_le_bytes());
        let data = Data {
            capabilities: self.capabilities.clone(),
        };
        // Numbers under constant names: this has no way to fail, and without it the defaults would
        // hold.
        if let Ok(json) = serde_json::to_vec(&data) {
            out.extend(json);
            out.push(0);
        }
    }
}
