//! Tests that share a guest: each begins where the guest was when it had booted, or when its NIC
//! had come up. They go back there by a rewind, which takes the place of a boot.

mod attaching;
mod bystanders;
mod compensating;
mod dummy;
pub mod e1000;
mod exact;
mod given_objects;
mod leaks;
mod null_blk;
mod rewinds;
mod soak;

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::bring_up_network;
use crate::machine::Machine;

/// The guest, ended with the process.
static SHARED: Mutex<Option<Machine>> = Mutex::new(None);

/// Where it had booted.
const BOOTED: &str = "booted";
/// Where its NIC had come up.
const NETWORK: &str = "network";

/// The shared guest for the time of one test.
pub struct Lent(MutexGuard<'static, Option<Machine>>);

impl Lent {
    fn lend() -> Self {
        let mut machine = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if machine.is_none() {
            // SAFETY: the handler does nothing that may not be done at the end of a process.
            assert_eq!(unsafe { libc::atexit(end_shared) }, 0);
            let mut new = Machine::boot(1, "");
            new.mark(BOOTED);
            *machine = Some(new);
        }
        Self(machine)
    }
}

extern "C" fn end_shared() {
    drop(SHARED.lock().unwrap_or_else(PoisonError::into_inner).take());
}

impl Deref for Lent {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        self.0.as_ref().unwrap()
    }
}

impl DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut Machine {
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

/// A guest that has just booted.
fn booted() -> Lent {
    let mut machine = Lent::lend();
    machine.rewind(BOOTED);
    machine
}

/// A guest whose NIC is up and reaches the gateway.
fn with_network() -> Lent {
    let mut machine = Lent::lend();
    if machine.has_mark(NETWORK) {
        machine.rewind(NETWORK);
    } else {
        machine.rewind(BOOTED);
        bring_up_network(&mut machine);
        machine.mark(NETWORK);
    }
    machine
}

/// The same where the NIC's guest sends nothing of itself, at any moment: IPv6 would.
fn with_silent_network() -> Lent {
    let mut machine = with_network();
    machine.run(
        "for of in all default eth0; do echo 1 > /proc/sys/net/ipv6/conf/$of/disable_ipv6; done",
    );
    machine
}
