//! Tests that leave their guest as they found it, and share one. They run in one process.

mod agent;
mod command_line;
mod nic;
mod pause;
mod plugging;
mod tracing;

use std::sync::{Mutex, MutexGuard, PoisonError};

use cofferdam::bench::guest::Guest;
use cofferdam::bench::network::{self, LINK_TIME};

use super::{boot, options};

/// The guest, ended when the process ends.
static SHARED: Mutex<Option<Guest>> = Mutex::new(None);

/// The shared guest, with its network up.
fn shared() -> Shared {
    let mut guest = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    if guest.is_none() {
        // SAFETY: the handler does nothing that may not be done at the end of a process.
        assert_eq!(unsafe { libc::atexit(end_shared) }, 0);
        let mut new = boot(&options().with("--net user --nic e1000"));
        network::bring_up(&mut new, "e1000").unwrap();
        network::wait_for_link(&mut new, LINK_TIME).unwrap();
        *guest = Some(new);
    }
    Shared(guest)
}

extern "C" fn end_shared() {
    drop(SHARED.lock().unwrap_or_else(PoisonError::into_inner).take());
}

/// The shared guest for the time of one test.
struct Shared(MutexGuard<'static, Option<Guest>>);

impl std::ops::Deref for Shared {
    type Target = Guest;

    fn deref(&self) -> &Guest {
        self.0.as_ref().unwrap()
    }
}

impl std::ops::DerefMut for Shared {
    fn deref_mut(&mut self) -> &mut Guest {
        self.0.as_mut().unwrap()
    }
}
