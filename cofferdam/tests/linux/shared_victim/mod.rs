//! Tests that share a guest whose driver is made to fail: each begins where the guest was when its
//! NIC had come up. They go back there by a rewind, which takes the place of a boot.

mod handing_over;
mod marks;
mod mutations;
mod recovery;
mod upgrade;

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cofferdam::control::protocol::Request;
use devices::hold::CheckpointBy;

use crate::victim::Victim;

/// The guest, ended when the process ends.
static SHARED: Mutex<Option<Victim>> = Mutex::new(None);
/// Where its NIC had come up.
const READY: &str = "ready";

/// The guest.
fn victim() -> Lent {
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    let name = READY.to_owned();
    match &mut *shared {
        Some(victim) => {
            victim.guest.agent().disconnect();
            victim.ask(&Request::Rewind { name: Some(name) });
            victim.checkpoint = CheckpointBy::Exact;
        }
        none => {
            // SAFETY: the handler does nothing that may not be done at the end of a process.
            assert_eq!(unsafe { libc::atexit(end_shared) }, 0);
            let mut victim = Victim::boot();
            victim.guest.agent().disconnect();
            victim.ask(&Request::Mark { name });
            *none = Some(victim);
        }
    }
    Lent(shared)
}

extern "C" fn end_shared() {
    drop(SHARED.lock().unwrap_or_else(PoisonError::into_inner).take());
}

/// The guest for the time of one test.
struct Lent(MutexGuard<'static, Option<Victim>>);

impl Deref for Lent {
    type Target = Victim;

    fn deref(&self) -> &Victim {
        self.0.as_ref().unwrap()
    }
}

impl DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut Victim {
        self.0.as_mut().unwrap()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Whatever went wrong, the next test has nothing to do with it.
            self.0.take();
        }
    }
}
