//! Registers that the server has in memory for this client.

use std::fs::File;
use std::os::fd::OwnedFd;

use super::{Client, ClientError};
use crate::pci::shared::{SharedLayout, SharedPage};
use crate::vfio_user::channel::ChannelError;
use crate::vfio_user::message::{Command, FEATURE_GET, FEATURE_REGISTERS, Feature, Payload};

/// Room for the longest [`SharedLayout`].
const ROOM: u32 = Feature::BYTES + 256;

impl Client {
    /// Asks for registers in memory, where the server says that it has them. `None` if it has none,
    /// or none that can be used.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn shared_registers(&mut self) -> Result<Option<(SharedLayout, SharedPage)>, ClientError> {
        if !self.capabilities.shared_registers {
            return Ok(None);
        }
        let question = Feature {
            argsz: ROOM,
            flags: FEATURE_GET | FEATURE_REGISTERS,
            data: Vec::new(),
        };
        let (payload, limit) = (question.to_bytes(), self.limits.call);
        let mut reply = match self.exchange(Command::DeviceFeature, &payload, &[], limit) {
            Err(ClientError::Refused { .. }) => return Ok(None),
            other => other?,
        };
        let layout = Feature::parse(&reply.payload)
            .and_then(|feature| SharedLayout::parse(&feature.data))
            .map_err(|error| self.end(ChannelError::Garbled(error)))?;
        let fds = <[OwnedFd; 1]>::try_from(std::mem::take(&mut reply.fds));
        let Ok([file]) = fds else {
            return Err(self.end(ChannelError::Violation("sent registers without memory")));
        };
        match SharedPage::of_file(&File::from(file)) {
            Ok(page) => Ok(Some((layout, page))),
            Err(error) => {
                tracing::warn!(%error, "registers of a device's server cannot be shared");
                Ok(None)
            }
        }
    }
}
