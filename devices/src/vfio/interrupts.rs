//! Which interrupts of the function are in use, and where they go.
//!
//! An interrupt goes from the function through the host's kernel into KVM; nobody here takes part.
//! What comes for a vector that the guest has masked goes into a descriptor of our own instead, and
//! is found there when the mask goes: KVM forgets what it cannot deliver.

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
    /// One for each vector.
    vectors: Vec<Route>,
}

#[derive(Clone, Copy, Default)]
struct Route {
    /// The guest wants it delivered.
    delivered: bool,
    /// Whether the function has it delivered, while vectors are in use; `None` if the host has
    /// refused that last, and where it goes is not known.
    goes: Option<bool>,
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
        let routes = vec![Route::default(); vectors.len()];
        Ok(Self {
            guest,
            device,
            vectors,
            routes: Mutex::new(Routes {
                in_use: false,
                vectors: routes,
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
            .zip(&routes.vectors)
            .map(|(vector, route)| vector.event(route.delivered))
            .collect();
        self.device
            .set_interrupts(InterruptKind::Msix, 0, &events)?;
        routes.in_use = true;
        for route in &mut routes.vectors {
            route.goes = Some(route.delivered);
        }
        Ok(())
    }

    /// Has the function use them no more; what waits is forgotten.
    ///
    /// # Errors
    /// The host says so; it uses them still.
    fn end(&self) -> io::Result<()> {
        let mut routes = self.routes();
        if !routes.in_use {
            return Ok(());
        }
        self.device.end_interrupts(InterruptKind::Msix)?;
        routes.in_use = false;
        self.take_waiting();
        Ok(())
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
        let routes = &mut *self.routes();
        let index = usize::from(vector);
        let (Some(known), Some(route)) = (self.vectors.get(index), routes.vectors.get_mut(index))
        else {
            return;
        };
        let wanted = message.is_some();
        route.delivered = wanted;
        // A message that is to be delivered must have a route when it comes, and may have one when
        // it does not.
        if message.is_some() {
            self.guest.route(vector, message);
        }
        if routes.in_use && route.goes != Some(wanted) {
            let event = known.event(wanted);
            let set = self
                .device
                .set_interrupts(InterruptKind::Msix, vector.into(), &[event]);
            route.goes = set.is_ok().then_some(wanted);
            if let Err(error) = set {
                tracing::error!(%error, vector, "an interrupt of a passed-on device goes astray");
            }
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
    /// The host refuses it. None is in use then, or still the one that could not be ended.
    pub fn set(&mut self, mode: Mode) -> io::Result<()> {
        if mode == self.mode {
            return Ok(());
        }
        self.end()?;
        match (mode, &self.line, &self.vectors) {
            (Mode::Intx, Some(line), _) => {
                let intx = InterruptKind::Intx;
                self.device
                    .set_interrupts(intx, 0, &[&line.events.trigger])?;
                self.mode = mode;
                if let Err(error) = self.device.unmask_by(&line.events.unmask) {
                    // It would interrupt once.
                    self.end()?;
                    return Err(error);
                }
            }
            (Mode::Msix, _, Some(vectors)) => {
                vectors.begin()?;
                self.mode = mode;
            }
            _ => {}
        }
        Ok(())
    }

    /// Ends what is in use.
    fn end(&mut self) -> io::Result<()> {
        match (self.mode, &self.vectors) {
            (Mode::Intx, _) => self.device.end_interrupts(InterruptKind::Intx)?,
            (Mode::Msix, Some(vectors)) => vectors.end()?,
            _ => {}
        }
        self.mode = Mode::Off;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::MsiVectors;

    /// Vectors of a guest that nothing interrupts.
    struct Guest;

    impl MsiVectors for Guest {
        fn count(&self) -> u16 {
            2
        }
        fn route(&self, _: u16, _: Option<MsiMessage>) {}
        fn trigger(&self, _: u16) {}
        fn event(&self, _: u16) -> Option<EventFd> {
            EventFd::new(EFD_NONBLOCK).ok()
        }
    }

    /// Interrupts of a function whose host refuses everything, with its vectors in use, or not.
    fn refused(in_use: bool) -> (Interrupts, Arc<PassedVectors>) {
        let device = Arc::new(VfioDevice::refuses());
        let vectors = Arc::new(PassedVectors::new(device.clone(), Arc::new(Guest)).unwrap());
        let mut interrupts = Interrupts::new(device, None, Some(vectors.clone()));
        if in_use {
            interrupts.mode = Mode::Msix;
            let mut routes = vectors.routes();
            routes.in_use = true;
            for route in &mut routes.vectors {
                route.goes = Some(false);
            }
        }
        (interrupts, vectors)
    }

    #[test]
    fn what_could_not_be_ended_is_known_to_be_in_use() {
        let (mut interrupts, vectors) = refused(true);
        for mode in [Mode::Off, Mode::Intx, Mode::Off] {
            // Each time the host is asked again.
            interrupts.set(mode).unwrap_err();
            assert_eq!(interrupts.mode(), Mode::Msix);
            assert!(vectors.routes().in_use);
        }
        interrupts.set(Mode::Msix).unwrap();
        interrupts.mode = Mode::Intx;
        interrupts.set(Mode::Off).unwrap_err();
        assert_eq!(interrupts.mode(), Mode::Intx);
    }

    #[test]
    fn what_could_not_be_set_up_is_known_not_to_be_in_use() {
        let (mut interrupts, vectors) = refused(false);
        interrupts.set(Mode::Msix).unwrap_err();
        assert_eq!(interrupts.mode(), Mode::Off);
        assert!(!vectors.routes().in_use);
        interrupts.set(Mode::Off).unwrap();
    }

    #[test]
    fn a_vector_that_the_host_did_not_redirect_is_not_taken_for_redirected() {
        let (_interrupts, vectors) = refused(true);
        vectors.route(1, Some(MsiMessage::default()));
        {
            let routes = vectors.routes();
            assert!(routes.vectors[1].delivered);
            assert_eq!(routes.vectors[1].goes, None);
            assert_eq!(routes.vectors[0].goes, Some(false));
        }
        // One that goes where it is wanted already is not asked for.
        vectors.route(0, None);
        assert_eq!(vectors.routes().vectors[0].goes, Some(false));
    }
}
