//! Looks at a guest while its command runs: when its kernel panics nobody answers any more, and
//! what became of the module's calls until then is all that there will be.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::bail;

use super::Seen;
use crate::control::client::ControlClient;
use crate::control::protocol::{Reply, Request};
use crate::runtime_dir::VmPaths;

/// Between two looks.
const LOOK: Duration = Duration::from_secs(2);

/// How often it is looked whether the watch is over.
const POLL: Duration = Duration::from_millis(20);

#[derive(Debug, Default)]
struct Shared {
    over: AtomicBool,
    /// Pieces of output that the command has written.
    heard: AtomicU64,
    found: Mutex<Option<Seen>>,
}

/// A guest that is looked at.
pub struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Looks at a VM from now on. One whose guest has panicked and says nothing more is ended,
    /// after a last look.
    pub fn start(paths: &VmPaths, module: &str) -> Self {
        let shared = Arc::new(Shared::default());
        let (watched, paths, module) = (shared.clone(), paths.clone(), module.to_owned());
        let thread = std::thread::Builder::new()
            .name("watch".to_owned())
            .spawn(move || watched.watch(&paths, &module));
        Self {
            shared,
            // Without it a panic is found when the command's time is up.
            thread: thread.ok(),
        }
    }

    /// The command has written something.
    pub fn heard(&self) {
        self.shared.heard.fetch_add(1, Ordering::Relaxed);
    }

    /// Ends the watch; what was seen last of a guest that panicked.
    pub fn stop(mut self) -> Option<Seen> {
        self.shared.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It does not panic; if it did, nothing was found.
            let _ended = thread.join();
        }
        let mut found = self
            .shared
            .found
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        found.take()
    }
}

impl Shared {
    fn watch(&self, paths: &VmPaths, module: &str) {
        let mut silent_since = None;
        loop {
            for _ in 0..LOOK.as_millis() / POLL.as_millis() {
                if self.over.load(Ordering::Relaxed) {
                    return;
                }
                std::thread::sleep(POLL);
            }
            let seen = look(paths, module).ok();
            let Some(seen) = seen.filter(|seen| seen.status.guest_panic.is_some()) else {
                silent_since = None;
                continue;
            };
            // A guest can print what it likes: only one that says nothing more is taken at its
            // word.
            let now = self.heard.load(Ordering::Relaxed);
            if silent_since == Some(now) {
                *self.found.lock().unwrap_or_else(PoisonError::into_inner) = Some(seen);
                let quit = |mut control: ControlClient| control.tell(&Request::Quit {});
                if let Err(error) = ControlClient::connect(&paths.control_socket()).and_then(quit) {
                    tracing::info!("the guest's VM cannot be ended: {error:#}");
                }
                return;
            }
            silent_since = Some(now);
        }
    }
}

/// How the VM is now, and what calls of `module` did wrong.
///
/// # Errors
/// The VM does not answer.
pub fn look(paths: &VmPaths, module: &str) -> anyhow::Result<Seen> {
    let mut control = ControlClient::connect(&paths.control_socket())?;
    let status = Box::new(control.status()?);
    let request = Request::Violations {
        module: module.to_owned(),
    };
    let violations = match control.ask(&request) {
        Ok(Reply::Violations { all, .. }) => all,
        Ok(_) => bail!("the VM answered something else"),
        // A module that was never isolated has done nothing wrong that would be known.
        Err(_) => Vec::new(),
    };
    Ok(Seen { status, violations })
}
