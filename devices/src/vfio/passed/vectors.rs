//! The messages of a function for one of its users: which of them the guest has masked, and where
//! each goes now.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::irq::{MsiMessage, MsiVectors};

struct Vector {
    /// It can be delivered.
    open: bool,
    /// Keeps what came while it could not.
    wait: EventFd,
}

/// See the module. To [`crate::pci::msix`] these are vectors like any others.
pub struct UserVectors {
    /// Those of the user's client.
    client: Arc<dyn MsiVectors>,
    vectors: Mutex<Vec<Vector>>,
}

impl UserVectors {
    /// As many vectors as the client has, none of which can be delivered yet.
    ///
    /// # Errors
    /// There are no descriptors.
    pub fn new(client: Arc<dyn MsiVectors>) -> io::Result<Self> {
        let vector = |_| {
            let wait = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
            Ok(Vector { open: false, wait })
        };
        let vectors: io::Result<Vec<_>> = (0..client.count()).map(vector).collect();
        Ok(Self {
            client,
            vectors: Mutex::new(vectors?),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Vector>> {
        self.vectors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the function is to write for each message.
    ///
    /// # Errors
    /// There are no descriptors.
    pub fn events(&self) -> io::Result<Vec<EventFd>> {
        let vectors = self.lock();
        let numbered = (0u16..).zip(vectors.iter());
        let events = numbered.map(|(number, vector)| {
            let own = vector.open.then(|| self.client.event(number)).flatten();
            own.map_or_else(|| vector.wait.try_clone(), Ok)
        });
        events.collect()
    }

    /// Vectors for which something came while they could not be delivered.
    pub fn take_waiting(&self) -> Vec<u16> {
        let vectors = self.lock();
        let numbered = (0u16..).zip(vectors.iter());
        let waiting = numbered.filter(|(_, vector)| vector.wait.read().is_ok());
        waiting.map(|(number, _)| number).collect()
    }

    /// Which can be delivered.
    pub fn open(&self) -> Vec<bool> {
        self.lock().iter().map(|vector| vector.open).collect()
    }
}

impl MsiVectors for UserVectors {
    fn count(&self) -> u16 {
        self.client.count()
    }

    fn route(&self, vector: u16, message: Option<MsiMessage>) {
        if let Some(known) = self.lock().get_mut(usize::from(vector)) {
            known.open = message.is_some();
        }
    }

    fn trigger(&self, vector: u16) {
        self.client.trigger(vector);
    }
}
