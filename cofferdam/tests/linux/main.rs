//! Stock Linux guests and their own drivers on our machine and devices.
//!
//! Each test needs a KVM that boots Linux in seconds and the guest images, so all are ignored unless
//! asked for. Those that leave the guest as they found it share one; the others boot their own.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends where something unexpected happens"
)]

mod agent;
mod isolation;
mod machine;
mod nic;
mod recovery;
mod upgrade;
mod victim;
mod virtio;
mod wires;

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cofferdam::bench::guest::{Guest, GuestOptions};
use cofferdam::bench::network::{self, LINK_TIME};

/// How long a guest may take to boot or to end.
const BOOT_TIME: Duration = Duration::from_secs(120);

/// The guest that tests share, ended when the process ends.
static SHARED: Mutex<Option<Guest>> = Mutex::new(None);

/// A guest without a network; each test adds what it needs.
fn options() -> GuestOptions {
    let images = std::env::var_os("COFFERDAM_IMAGES").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/images"),
        PathBuf::from,
    );
    GuestOptions {
        program: env!("CARGO_BIN_EXE_cofferdam").into(),
        images,
        initrd: "initrd.cpio",
        arguments: Vec::new(),
    }
}

#[track_caller]
fn boot(options: &GuestOptions) -> Guest {
    Guest::boot(options, BOOT_TIME).unwrap_or_else(|error| panic!("{error:#}"))
}

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

/// Runs a shell command in the guest; it must succeed.
#[track_caller]
fn shell(guest: &mut Guest, script: &str) -> String {
    guest
        .shell(script)
        .unwrap_or_else(|error| panic!("{error:#}"))
}

/// Pings from the guest with payloads of `bytes`; every one must be answered.
#[track_caller]
fn ping(guest: &mut Guest, to: &str, bytes: u32) {
    let output = shell(guest, &format!("ping -c 3 -i 0.1 -W 5 -s {bytes} {to}"));
    assert!(output.contains(" 0% packet loss"), "{output}");
}
