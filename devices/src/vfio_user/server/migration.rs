//! Taking a served function's state and putting it back (specification,
//! "`VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`").
//!
//! A function that is stopped has its bus mastering turned off, so that it reaches no memory and
//! sends no message, and the client's accesses are refused as busy. Its state is the one before
//! that. One that does something by itself is made to stand still first. A state that was written is put back when the function is to run again, so that nothing of
//! it happens before.

use std::sync::{MutexGuard, PoisonError};

use crate::pci::PciFunction;
use crate::pci::bus::SharedFunction;
use crate::pci::config::{Command, offset};
use crate::state::Part;
use crate::vfio_user::message::DeviceState;

/// Longest state that is taken: a part's, with what it is wrapped in.
const MAX_STATE_BYTES: usize = 17 << 20;

/// A function that is stopped.
struct Stopped {
    /// The state from which it goes on.
    state: Part,
    /// That is another one than its own.
    replaced: bool,
    /// It was master of the bus.
    mastered: bool,
}

enum Phase {
    Running,
    Stop(Stopped),
    StopCopy {
        stopped: Stopped,
        data: Vec<u8>,
        read: usize,
    },
    Resuming {
        stopped: Stopped,
        data: Vec<u8>,
    },
    Error,
}

/// See the module.
pub struct Migration {
    function: SharedFunction,
    phase: Phase,
}

impl Migration {
    pub fn new(function: SharedFunction) -> Self {
        Self {
            function,
            phase: Phase::Running,
        }
    }

    pub fn state(&self) -> DeviceState {
        match self.phase {
            Phase::Running => DeviceState::Running,
            Phase::Stop(_) => DeviceState::Stop,
            Phase::StopCopy { .. } => DeviceState::StopCopy,
            Phase::Resuming { .. } => DeviceState::Resuming,
            Phase::Error => DeviceState::Error,
        }
    }

    pub fn is_running(&self) -> bool {
        matches!(self.phase, Phase::Running)
    }

    /// Whether the function gives its state away at all.
    pub fn is_supported(&self) -> bool {
        !self.is_running() || lock(&self.function).gives_state()
    }

    /// Goes to a state by way of [`DeviceState::Stop`], or gives `errno`. Says whether the function
    /// goes on from a state that was written.
    pub fn set(&mut self, state: DeviceState) -> Result<bool, i32> {
        if state == self.state() {
            return Ok(false);
        }
        if state == DeviceState::Error || self.state() == DeviceState::Error {
            return Err(libc::EINVAL);
        }
        let stopped = self.stop()?;
        match state {
            DeviceState::StopCopy => {
                let data = postcard::to_stdvec(&stopped.state).map_err(|_| libc::EIO);
                self.phase = match data {
                    Ok(data) => Phase::StopCopy {
                        stopped,
                        data,
                        read: 0,
                    },
                    Err(errno) => {
                        self.phase = Phase::Stop(stopped);
                        return Err(errno);
                    }
                };
            }
            DeviceState::Resuming => {
                let data = Vec::new();
                self.phase = Phase::Resuming { stopped, data };
            }
            DeviceState::Running => return self.run(&stopped),
            DeviceState::Stop | DeviceState::Error => self.phase = Phase::Stop(stopped),
        }
        Ok(false)
    }

    /// Stops the function, if it runs, and gives its state out of the phase.
    fn stop(&mut self) -> Result<Stopped, i32> {
        match std::mem::replace(&mut self.phase, Phase::Error) {
            Phase::Running => {
                let mut function = lock(&self.function);
                let state = match function.begin_still().and_then(|()| function.save()) {
                    Ok(state) => state,
                    Err(error) => {
                        tracing::debug!(%error, "a served function gives no state");
                        function.end_still();
                        self.phase = Phase::Running;
                        return Err(libc::EOPNOTSUPP);
                    }
                };
                let mastered = set_bus_master(&mut *function, false);
                Ok(Stopped {
                    state,
                    replaced: false,
                    mastered,
                })
            }
            Phase::Stop(stopped) | Phase::StopCopy { stopped, .. } => Ok(stopped),
            Phase::Resuming { stopped, data } => match postcard::from_bytes(&data) {
                Ok(state) => Ok(Stopped {
                    state,
                    replaced: true,
                    mastered: stopped.mastered,
                }),
                Err(_) => {
                    // As if nothing had been written.
                    self.phase = Phase::Stop(stopped);
                    Err(libc::EINVAL)
                }
            },
            Phase::Error => Err(libc::EINVAL),
        }
    }

    fn run(&mut self, stopped: &Stopped) -> Result<bool, i32> {
        let mut function = lock(&self.function);
        if stopped.replaced {
            if let Err(error) = function.restore(&stopped.state) {
                tracing::warn!(%error, "a state does not fit a served function");
                self.phase = Phase::Error;
                return Err(libc::EINVAL);
            }
        } else {
            if stopped.mastered {
                set_bus_master(&mut *function, true);
            }
            function.end_still();
        }
        self.phase = Phase::Running;
        Ok(stopped.replaced)
    }

    /// The next `size` bytes of the state, fewer at its end, or `errno`.
    pub fn read(&mut self, size: usize) -> Result<Vec<u8>, i32> {
        let Phase::StopCopy { data, read, .. } = &mut self.phase else {
            return Err(libc::EINVAL);
        };
        let left = data.get(*read..).unwrap_or_default();
        let piece = left[..size.min(left.len())].to_vec();
        *read += piece.len();
        Ok(piece)
    }

    /// Takes the next bytes of a state, or gives `errno`.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), i32> {
        let Phase::Resuming { data, .. } = &mut self.phase else {
            return Err(libc::EINVAL);
        };
        if data.len() + bytes.len() > MAX_STATE_BYTES {
            return Err(libc::EFBIG);
        }
        data.extend_from_slice(bytes);
        Ok(())
    }

    /// The function was reset.
    pub fn reset(&mut self) {
        self.phase = Phase::Running;
    }

    /// The client has gone, and its memory: the function goes on from the state that it had when it
    /// was stopped, but without mastering the bus. What waits for it at a wire would be read into
    /// nothing; whoever comes back lets it master the bus.
    pub fn abandon(&mut self) {
        self.phase = Phase::Running;
    }
}

fn lock(function: &SharedFunction) -> MutexGuard<'_, dyn PciFunction + 'static> {
    function.lock().unwrap_or_else(PoisonError::into_inner)
}

fn set_bus_master(function: &mut dyn PciFunction, on: bool) -> bool {
    let mut bytes = [0; 2];
    function.config_read(offset::COMMAND, &mut bytes);
    let mut command = Command::from_bits_retain(u16::from_le_bytes(bytes));
    let was = command.contains(Command::BUS_MASTER);
    if was != on {
        command.set(Command::BUS_MASTER, on);
        function.config_write(offset::COMMAND, &command.bits().to_le_bytes());
    }
    was
}
