//! A device's state as bytes (specification, "`VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`").

use super::{Client, ClientError};
use crate::vfio_user::channel::ChannelError;
use crate::vfio_user::message::{
    Command, DeviceState, FEATURE_GET, FEATURE_MIG_STATE, FEATURE_MIGRATION, FEATURE_SET, Feature,
    MAX_DATA_BYTES, MIGRATION_STOP_COPY, MigData, MigState, Payload,
};

/// Longest state of a device.
const MAX_STATE_BYTES: usize = 64 << 20;

impl Client {
    /// Whether the device gives its state away.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn can_migrate(&mut self) -> Result<bool, ClientError> {
        let question = Feature {
            argsz: Feature::BYTES + 8,
            flags: FEATURE_GET | FEATURE_MIGRATION,
            data: Vec::new(),
        };
        let reply: Feature = match self.ask(Command::DeviceFeature, &question) {
            Err(ClientError::Refused { .. }) => return Ok(false),
            other => other?,
        };
        let flags = reply
            .data
            .first_chunk()
            .map(|bytes| u64::from_le_bytes(*bytes));
        Ok(flags.is_some_and(|flags| flags & MIGRATION_STOP_COPY != 0))
    }

    /// Has the device do something else.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn set_state(&mut self, state: DeviceState) -> Result<(), ClientError> {
        let set = Feature {
            argsz: Feature::BYTES + 8,
            flags: FEATURE_SET | FEATURE_MIG_STATE,
            data: MigState(state).to_bytes(),
        };
        let payload = set.to_bytes();
        self.call(Command::DeviceFeature, &payload, &[], self.limits.state)?;
        Ok(())
    }

    /// Stops the device: from here on it reads and writes no memory and does not interrupt, until
    /// [`Client::go_on`].
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn stop(&mut self) -> Result<(), ClientError> {
        self.set_state(DeviceState::Stop)?;
        self.stopped = true;
        Ok(())
    }

    /// Has a device go on that was stopped.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn go_on(&mut self) -> Result<(), ClientError> {
        match std::mem::take(&mut self.stopped) {
            true => self.set_state(DeviceState::Running),
            false => Ok(()),
        }
    }

    /// The device's state, as bytes that only such a device reads. Afterwards it runs, or is stopped
    /// if it was.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn save(&mut self) -> Result<Vec<u8>, ClientError> {
        self.set_state(DeviceState::StopCopy)?;
        let state = self.read_state();
        let runs = self.set_state(match self.stopped {
            true => DeviceState::Stop,
            false => DeviceState::Running,
        });
        let state = state?;
        runs.map(|()| state)
    }

    fn read_state(&mut self) -> Result<Vec<u8>, ClientError> {
        let size = self.capabilities.max_data_xfer_size.min(MAX_DATA_BYTES);
        let mut state = Vec::new();
        loop {
            let question = MigData {
                argsz: MigData::BYTES + size,
                size,
                data: Vec::new(),
            };
            let reply: MigData = self.ask(Command::MigDataRead, &question)?;
            if reply.size > size || reply.data.len() != reply.size as usize {
                return Err(self.end(ChannelError::Violation("answered another question")));
            }
            state.extend(reply.data);
            if state.len() > MAX_STATE_BYTES {
                return Err(self.end(ChannelError::Violation("has a state without end")));
            }
            if reply.size < size {
                return Ok(state);
            }
        }
    }

    /// Has the device go on from a state that [`Client::save`] gave.
    ///
    /// # Errors
    /// See [`ClientError`]; the device may have to be reset.
    pub fn restore(&mut self, state: &[u8]) -> Result<(), ClientError> {
        self.set_state(DeviceState::Resuming)?;
        let size = self.capabilities.max_data_xfer_size.min(MAX_DATA_BYTES);
        for piece in state.chunks(size as usize) {
            let message = MigData::new(piece.to_vec());
            self.call(
                Command::MigDataWrite,
                &message.to_bytes(),
                &[],
                self.limits.call,
            )?;
        }
        self.set_state(DeviceState::Running)
    }
}
