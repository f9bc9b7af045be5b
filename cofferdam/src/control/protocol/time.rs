//! How long requests to a VM process may take.

use std::time::Duration;

use super::{Request, line};
use crate::device::protocol::SWITCH_TIME;

impl Request {
    /// How long a VM process may be at work on it, where that can be long: what it does is told at
    /// least every [`super::BEAT`] then. The others are answered at once.
    pub fn may_take(&self) -> Option<Duration> {
        match self {
            Self::Mark { .. } | Self::Rewind { .. } => Some(Duration::from_secs(600)),
            // The device hosts of its NICs are told, and may have drivers in this guest and in
            // others hand a device over; what is attached may have to wait for that.
            Self::Pause {} | Self::Resume {} | Self::Release { .. } | Self::Plug { .. } => {
                Some(SWITCH_TIME)
            }
            Self::Unplug { .. } => Some(Duration::from_secs(120)),
            // All of the memory is written, to whatever kind of disk.
            Self::Snapshot { .. } => Some(Duration::from_secs(3600)),
            // The agent lists all symbols, for which it has a minute; each device has one.
            Self::Isolate { .. } | Self::SuspendDevice { .. } | Self::ResumeDevice { .. } => {
                Some(Duration::from_secs(600))
            }
            // The same the first time; the rest has limits of its own.
            Self::HandOver { .. } | Self::TakeOver { .. } => Some(Duration::from_secs(120)),
            // The agent lists all symbols the first time.
            Self::FunctionText { .. } | Self::InjectCode { .. } => Some(Duration::from_secs(600)),
            // Its steps have limits of their own.
            Self::Upgrade { .. } => Some(Duration::from_secs(1200)),
            _ => None,
        }
    }

    /// The request as it travels.
    pub fn line(&self) -> String {
        line(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever asks for it would give up while drivers in guests have their time.
    #[test]
    fn what_device_hosts_are_told_of_has_the_time_of_a_switch() {
        let module = "driver".to_owned();
        for request in [
            Request::Pause {},
            Request::Resume {},
            Request::Release { module },
            Request::Plug {
                net: None,
                nic: None,
            },
        ] {
            let time = request.may_take();
            assert!(time.is_some_and(|time| time >= SWITCH_TIME), "{request:?}");
        }
    }
}
