//! What the host tells whoever has a function: that it wants it back, as when somebody removes it or
//! gives it to another driver, and that it has failed.
//!
//! The kernel waits for a function that it wants back until that is given back, and tells again every
//! ten seconds (`VFIO_PCI_REQ_IRQ_INDEX`, `<linux/vfio.h>`).

use std::os::fd::{AsRawFd, RawFd};

use event_manager::{EventOps, EventSet, Events};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{InterruptKind, VfioDevice};
use super::error::VfioError;

/// What was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notice {
    /// The host wants the function back.
    WantedBack,
    /// The function reports an error of its bus.
    Failed,
}

/// Where it is told. See the module.
#[derive(Debug)]
pub struct Notices {
    wanted_back: EventFd,
    failed: EventFd,
}

impl Notices {
    /// Nobody tells anything yet.
    ///
    /// # Errors
    /// There are no descriptors.
    pub fn new() -> Result<Self, VfioError> {
        let event = || {
            EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(VfioError::host("create an eventfd"))
        };
        Ok(Self {
            wanted_back: event()?,
            failed: event()?,
        })
    }

    /// Has the host tell of `device`, as far as it does.
    pub(super) fn have_told(&self, device: &VfioDevice) {
        for (kind, event) in [
            (InterruptKind::Request, &self.wanted_back),
            (InterruptKind::Error, &self.failed),
        ] {
            if device.interrupt_count(kind) == 0 {
                continue;
            }
            if let Err(error) = device.set_interrupts(kind, 0, &[event]) {
                tracing::debug!(%error, ?kind, "the host does not tell");
            }
        }
    }

    /// Takes what was told at the descriptor `fd`, if anything was.
    pub fn take(&self, fd: RawFd) -> Option<Notice> {
        let all = [
            (&self.wanted_back, Notice::WantedBack),
            (&self.failed, Notice::Failed),
        ];
        let mut all = all.into_iter();
        let (event, notice) = all.find(|(event, _)| event.as_raw_fd() == fd)?;
        event.read().is_ok().then_some(notice)
    }

    /// Has an event loop look for it.
    pub fn watch(&self, ops: &mut EventOps<'_>) {
        for event in [&self.wanted_back, &self.failed] {
            if let Err(error) = ops.add(Events::new(event, EventSet::IN)) {
                tracing::error!(?error, "a function of the host is not watched");
            }
        }
    }

    /// Tells, as the host would: for tests of whoever listens.
    ///
    /// # Errors
    /// It was told as often as can be counted.
    pub fn tell(&self, notice: Notice) -> std::io::Result<()> {
        match notice {
            Notice::WantedBack => self.wanted_back.write(1),
            Notice::Failed => self.failed.write(1),
        }
    }
}
