//! How a served function interrupts: by the eventfds that its client has given.
//!
//! INTx is VFIO's: a trigger masks it until the client unmasks it, by its eventfd or by a message,
//! and it triggers again if the line is still asserted. What happens while a client has given
//! nothing is kept: the level of the line, and one pending message for each vector.

use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::OFlags;
use vmm_sys_util::eventfd::EventFd;

use crate::irq::{IrqLine, LineEvents, MsiMessage, MsiVectors};

/// The interrupts of one function that is shown to clients. Clones are the same.
#[derive(Clone)]
pub struct ClientInterrupts(Arc<Interrupts>);

struct Interrupts {
    line: Mutex<Line>,
    vectors: Mutex<Vec<Vector>>,
    count: u16,
}

#[derive(Default)]
struct Line {
    asserted: bool,
    masked: bool,
    trigger: Option<EventFd>,
    /// Only watched, never read: see the server.
    unmask: Option<EventFd>,
}

impl Line {
    fn deliver(&mut self) {
        if self.asserted && !self.masked {
            self.signal();
        }
    }

    fn signal(&mut self) {
        if let Some(trigger) = &self.trigger {
            signal(trigger);
            self.masked = true;
        }
    }
}

#[derive(Default)]
struct Vector {
    event: Option<EventFd>,
    pending: bool,
}

impl Vector {
    fn signal(&mut self) {
        self.pending = self.event.is_none();
        if let Some(event) = &self.event {
            signal(event);
        }
    }
}

fn signal(event: &EventFd) {
    // It fails where the counter is full, and then one more is no news.
    let _ = event.write(1);
}

impl ClientInterrupts {
    /// Interrupts of a function with so many message-signalled vectors, none if 0.
    pub fn new(vectors: u16) -> Self {
        let all = std::iter::repeat_with(Vector::default);
        Self(Arc::new(Interrupts {
            line: Mutex::default(),
            vectors: Mutex::new(all.take(vectors.into()).collect()),
            count: vectors,
        }))
    }

    /// The pin INTA# for the function.
    pub fn line(&self) -> Arc<dyn IrqLine> {
        self.0.clone()
    }

    /// The vectors for the function.
    pub fn vectors(&self) -> Arc<dyn MsiVectors> {
        self.0.clone()
    }

    /// Signals the line by `trigger` from now on, at once if it is asserted.
    pub(super) fn set_trigger(&self, trigger: Option<EventFd>) {
        let mut line = self.0.line();
        line.trigger = trigger;
        line.masked = false;
        line.deliver();
    }

    /// Takes or forgets the descriptor by which the client unmasks the line; gives the one before,
    /// which may be watched.
    pub(super) fn set_unmask(&self, unmask: Option<EventFd>) -> Option<EventFd> {
        std::mem::replace(&mut self.0.line().unmask, unmask)
    }

    /// The descriptor to watch.
    pub(super) fn unmask_fd(&self) -> Option<RawFd> {
        self.0.line().unmask.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Masks or unmasks the line.
    pub(super) fn set_masked(&self, masked: bool) {
        let mut line = self.0.line();
        line.masked = masked;
        line.deliver();
    }

    /// Signals the line as if it were asserted.
    pub(super) fn trigger_line(&self) {
        self.0.line().signal();
    }

    /// Signals a vector by `event` from now on, at once if it is pending.
    pub(super) fn set_vector(&self, vector: u32, event: Option<EventFd>) {
        if let Some(vector) = self.0.vectors().get_mut(vector as usize) {
            vector.event = event;
            if vector.pending && vector.event.is_some() {
                vector.signal();
            }
        }
    }

    /// Signals a vector.
    pub(super) fn trigger_vector(&self, vector: u32) {
        if let Some(vector) = self.0.vectors().get_mut(vector as usize) {
            vector.signal();
        }
    }

    /// Forgets what a client has given, and gives the descriptor that may be watched.
    pub(super) fn clear(&self) -> Option<EventFd> {
        for vector in &mut *self.0.vectors() {
            vector.event = None;
        }
        let mut line = self.0.line();
        line.trigger = None;
        line.masked = false;
        line.unmask.take()
    }
}

impl Interrupts {
    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn vectors(&self) -> MutexGuard<'_, Vec<Vector>> {
        self.vectors.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl IrqLine for Interrupts {
    fn set_level(&self, asserted: bool) {
        let mut line = self.line();
        if line.asserted != asserted {
            line.asserted = asserted;
            line.deliver();
        }
    }

    /// Those that the client has given.
    fn events(&self) -> Option<LineEvents> {
        let line = self.line();
        let (trigger, unmask) = (line.trigger.as_ref()?, line.unmask.as_ref()?);
        Some(LineEvents {
            trigger: trigger.try_clone().ok()?,
            unmask: unmask.try_clone().ok()?,
        })
    }
}

impl MsiVectors for Interrupts {
    fn count(&self) -> u16 {
        self.count
    }

    /// Where the messages go is the client's business.
    fn route(&self, _vector: u16, _message: Option<MsiMessage>) {}

    fn trigger(&self, vector: u16) {
        if let Some(vector) = self.vectors().get_mut(usize::from(vector)) {
            vector.signal();
        }
    }

    /// The one that the client has given.
    fn event(&self, vector: u16) -> Option<EventFd> {
        let vectors = self.vectors();
        let event = vectors.get(usize::from(vector))?.event.as_ref()?;
        event.try_clone().ok()
    }
}

/// The eventfd that a client has sent, if it is one: nothing else is certain not to wait when it is
/// written.
pub(super) fn eventfd(fd: OwnedFd) -> Option<EventFd> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok()?;
    if link.as_os_str() != "anon_inode:[eventfd]" {
        return None;
    }
    let flags = rustix::fs::fcntl_getfl(&fd).ok()?;
    rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK).ok()?;
    // SAFETY: an open descriptor that nobody else has.
    Some(unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) })
}
