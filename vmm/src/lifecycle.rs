//! Requests to end or restart the machine: made on any thread, carried out by the main loop.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
    pending: Mutex<Pending>,
    wake: EventFd,
}

#[derive(Default)]
struct Pending {
    requests: Vec<Request>,
    /// Counts what became of those that the guest made before it was rewound: nothing.
    age: u64,
    /// Some were taken and are not carried out yet.
    under_way: bool,
}

/// Requests that the main loop has taken.
pub(crate) struct Taken {
    /// How many there were.
    pub count: usize,
    /// The weightiest.
    pub request: Request,
    /// See [`Requests::is_of_now`].
    age: u64,
}

impl Requests {
    pub fn new(gate: Arc<Gate>) -> std::io::Result<Self> {
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self {
            gate,
            pending: Mutex::default(),
            wake,
        })
    }

    /// Asks for `request`; vCPUs leave the guest at once, the calling one after the exit it is in.
    pub fn push(&self, request: Request) {
        self.gate.inhibit();
        self.pending().requests.push(request);
        if let Err(error) = self.wake.write(1) {
            tracing::error!(%error, "main loop not woken");
        }
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes all requests.
    pub fn take(&self) -> Option<Taken> {
        let mut pending = self.pending();
        let requests = std::mem::take(&mut pending.requests);
        let count = requests.len();
        pending.under_way |= count > 0;
        requests.into_iter().max().map(|request| Taken {
            count,
            request,
            age: pending.age,
        })
    }

    /// The machine is another one than the one that was to be reset, or that turned itself off: it
    /// was rewound.
    pub fn forget_guests(&self) {
        let mut pending = self.pending();
        pending.age += 1;
        let before = pending.requests.len();
        let of_guest = |request: &Request| matches!(request, Request::Reset | Request::PowerOff);
        pending.requests.retain(|request| !of_guest(request));
        for _ in pending.requests.len()..before {
            self.gate.release();
        }
    }

    /// Whether the machine was not rewound since `taken` was.
    pub fn is_of_now(&self, taken: &Taken) -> bool {
        self.pending().age == taken.age
    }

    /// What was taken is carried out.
    pub fn done(&self) {
        self.pending().under_way = false;
    }

    /// Whether the machine is to become another one soon: its state has nothing of that.
    pub fn are_open(&self) -> bool {
        let pending = self.pending();
        pending.under_way || !pending.requests.is_empty()
    }

    /// Readable when there are requests; to be read by the main loop.
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }
}
