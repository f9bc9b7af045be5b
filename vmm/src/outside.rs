//! Who writes guest memory beside this process: devices that other processes have.
//!
//! Nobody tells what they write. So they stand still while a state is taken or put back, and all of
//! memory is copied or compared then.

use std::fmt::Debug;
use std::sync::{Arc, PoisonError};

use crate::handle::VmHandle;
use crate::quiesce::Quiesced;

/// Those who write guest memory beside this process.
pub trait Outside: Debug + Send + Sync {
    /// Whether there is anybody now.
    fn writes(&self) -> bool;

    /// Has all of them stand still: from here on they read and write no memory and do not
    /// interrupt. `None` if there is nobody. The machine is at rest.
    ///
    /// # Errors
    /// Which one does not, and why; the others go on.
    fn stand_still(&self) -> Result<Option<Box<dyn Others>>, String>;
}

/// Who writes guest memory beside this process, and stands still. Dropped, they go on.
pub trait Others: Debug {
    /// The guest does not go on where it was saved, and so they do not either.
    fn stay(self: Box<Self>);
}

impl VmHandle {
    /// Has `outside` stand still whenever the machine's memory is taken or put back, in the place
    /// of whoever was named before.
    pub fn set_outside(&self, outside: Arc<dyn Outside>) {
        let here = self.machine().outside.lock();
        *here.unwrap_or_else(PoisonError::into_inner) = Some(outside);
    }

    fn outside(&self) -> Option<Arc<dyn Outside>> {
        let here = self.machine().outside.lock();
        here.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether anybody writes guest memory beside this process.
    pub(crate) fn others_write(&self) -> bool {
        self.outside().is_some_and(|outside| outside.writes())
    }
}

impl Quiesced<'_, '_> {
    /// Has everybody stand still who writes guest memory beside this process, see
    /// [`Outside::stand_still`].
    pub(crate) fn others_rest(&self) -> Result<Option<Box<dyn Others>>, String> {
        let here = self.machine.outside.lock();
        let outside = here.unwrap_or_else(PoisonError::into_inner).clone();
        outside.map_or(Ok(None), |outside| outside.stand_still())
    }
}
