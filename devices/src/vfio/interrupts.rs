//! Which interrupts of the function are in use, and where they go.
//!
//! An interrupt goes from the function through the host's kernel into KVM; nobody here takes part. What comes for a
//! vector that the guest has masked goes into a descriptor of our own instead, and is found there when the mask goes:
//! KVM forgets what it cannot deliver.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{InterruptKind, VfioDevice};
use super::error::VfioError;
use crate::irq::{IrqLine, LineEvents, MsiMessage, MsiVectors};

/// The vectors of a function, as [`crate::pci::msix`] routes them.
pub struct PassedVectors {
    guest: Arc<dyn MsiVectors>,
    device: Arc<VfioDevice>,
    vectors: Vec<PassedVector>,
    routes: Mutex<Routes>,
}

struct PassedVector {
    /// Interrupts the guest.
    deliver: EventFd,
    /// Keeps what came while the vector was masked.
    wait: EventFd,
}

struct Routes {
    /// The function has its vectors in use.
    in_use: bool,
    /// Which vectors are delivered.
    delivered: Vec<bool>,
}

impl PassedVectors {
    /// The vectors of `device`, which are `guest`'s.
    ///
    /// # Errors
    /// There are no descriptors.
    pub fn new(device: Arc<VfioDevice>, guest: Arc<dyn MsiVectors>) -> Result<Self, VfioError> {
        let vector = |number: u16| {
            let deliver = guest
                .event(number)
                .ok_or_else(|| VfioError::Interrupts("there is no way into the guest".into()))?;
            let wait = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
                .map_err(VfioError::host("create an eventfd"))?;
            Ok(PassedVector { deliver, wait })
        };
        let vectors: Result<Vec<_>, VfioError> = (0..guest.count()).map(vector).collect();
        let vectors = vectors?;
        let delivered = vec![false; vectors.len()];
        Ok(Self {
            guest,
            device,
            vectors,
            routes: Mutex::new(Routes {
                in_use: false,
                delivered,
            }),
        })
    }

    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the function use its vectors.
    ///
    /// # Errors
    /// The host has no vectors left.
    fn begin(&self) -> io::Result<()> {
        let mut routes = self.routes();
        let events: Vec<_> = self
            .vectors
            .iter()
            .zip(&routes.delivered)
            .map(|(vector, delivered)| vector.event(*delivered))
            .collect();
        self.device
            .set_interrupts(InterruptKind::Msix, 0, &events)?;
        routes.in_use = true;
        Ok(())
    }

    /// Has the function use them no more; what waits is forgotten.
    ///
    /// # Errors
    /// The host says so.
    fn end(&self) -> io::Result<()> {
        let mut routes = self.routes();
        if !std::mem::take(&mut routes.in_use) {
            return Ok(());
        }
        let result = self.device.end_interrupts(InterruptKind::Msix);
        self.take_waiting();
        result
    }

    /// Vectors for which something came while they were masked.
    pub fn take_waiting(&self) -> Vec<u16> {
        let vectors = (0u16..).zip(&self.vectors);
        vectors
            .filter(|(_, vector)| vector.wait.read().is_ok())
            .map(|(number, _)| number)
            .collect()
    }
}

impl PassedVector {
    fn event(&self, delivered: bool) -> &EventFd {
        match delivered {
            true => &self.deliver,
            false => &self.wait,
        }
    }
}

impl MsiVectors for PassedVectors {
    fn count(&self) -> u16 {
        self.guest.count()
    }

    fn route(&self, vector: u16, message: Option<MsiMessage>) {
        let mut routes = self.routes();
        let index = usize::from(vector);
        let (Some(known), Some(delivered)) =
            (self.vectors.get(index), routes.delivered.get_mut(index))
        else {
            return;
        };
        let changes = std::mem::replace(delivered, message.is_some()) != message.is_some();
        // A message that is to be delivered must have a route when it comes, and may have one when it does not.
        if message.is_some() {
            self.guest.route(vector, message);
        }
        if changes
            && routes.in_use
            && let Err(error) = self.device.set_interrupts(
                InterruptKind::Msix,
                vector.into(),
                &[known.event(message.is_some())],
            )
        {
            tracing::error!(%error, vector, "an interrupt of a passed-on device goes astray");
        }
        if message.is_none() {
            self.guest.route(vector, None);
        }
    }

    fn trigger(&self, vector: u16) {
        self.guest.trigger(vector);
    }
}

/// What of its interrupts a function has in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// None.
    Off,
    /// The pin.
    Intx,
    /// The vectors.
    Msix,
}

/// A line of the guest's that the function drives.
pub struct OutsideLine {
    events: LineEvents,
    /// Its descriptors are of use only while it is there.
    _line: Arc<dyn IrqLine>,
}

impl OutsideLine {
    /// `line`, driven from outside.
    ///
    /// # Errors
    /// It cannot be.
    pub fn new(line: Arc<dyn IrqLine>) -> Result<Self, VfioError> {
        let none = || VfioError::Interrupts("its line cannot be driven from outside".into());
        let events = line.events().ok_or_else(none)?;
        Ok(Self {
            events,
            _line: line,
        })
    }
}

/// All interrupts of a function.
pub struct Interrupts {
    device: Arc<VfioDevice>,
    line: Option<OutsideLine>,
    vectors: Option<Arc<PassedVectors>>,
    mode: Mode,
}

impl Interrupts {
    /// Those of `device`, none of which is in use.
    pub fn new(
        device: Arc<VfioDevice>,
        line: Option<OutsideLine>,
        vectors: Option<Arc<PassedVectors>>,
    ) -> Self {
        Self {
            device,
            line,
            vectors,
            mode: Mode::Off,
        }
    }

    /// What is in use.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Uses `mode` from now on.
    ///
    /// # Errors
    /// The host refuses it; none is in use then.
    pub fn set(&mut self, mode: Mode) -> io::Result<()> {
        if mode == self.mode {
            return Ok(());
        }
        let before = std::mem::replace(&mut self.mode, Mode::Off);
        match (before, &self.vectors) {
            (Mode::Intx, _) => self.device.end_interrupts(InterruptKind::Intx)?,
            (Mode::Msix, Some(vectors)) => vectors.end()?,
            _ => {}
        }
        match (mode, &self.line, &self.vectors) {
            (Mode::Intx, Some(line), _) => {
                self.device
                    .set_interrupts(InterruptKind::Intx, 0, &[&line.events.trigger])?;
                if let Err(error) = self.device.unmask_by(&line.events.unmask) {
                    self.device.end_interrupts(InterruptKind::Intx)?;
                    return Err(error);
                }
            }
            (Mode::Msix, _, Some(vectors)) => vectors.begin()?,
            _ => return Ok(()),
        }
        self.mode = mode;
        Ok(())
    }
}
