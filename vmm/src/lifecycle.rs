//! Requests to end or restart the machine: made on any thread, carried out by the main loop.

use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::gate::Gate;

/// What the main loop is asked to do with the machine. Later ones outweigh earlier ones.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Request {
    /// Start again as after power-on.
    Reset,
    /// The guest turned the machine off.
    PowerOff,
    /// The host turns the machine off.
    Stop,
    /// A vCPU cannot go on.
    Fail(String),
}

/// Collects requests and wakes the main loop. Each request keeps the vCPUs out of the guest until
/// it was carried out.
pub(crate) struct Requests {
    gate: Arc<Gate>,
    pending: Mutex<Vec<Request>>,
    wake: EventFd,
}

impl Requests {
    pub fn new(gate: Arc<Gate>) -> std::io::Result<Self> {
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self {
            gate,
            pending: Mutex::new(Vec::new()),
            wake,
        })
    }

    /// Asks for `request`; vCPUs leave the guest at once, the calling one after the exit it is in.
    pub fn push(&self, request: Request) {
        self.gate.inhibit();
        self.pending
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(request);
        if let Err(error) = self.wake.write(1) {
            tracing::error!(%error, "main loop not woken");
        }
    }

    /// Takes all requests: how many there were and the weightiest.
    pub fn take(&self) -> Option<(usize, Request)> {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        let requests = std::mem::take(&mut *pending);
        let count = requests.len();
        requests.into_iter().max().map(|request| (count, request))
    }

    /// Readable when there are requests; to be read by the main loop.
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }
}
