//! What keeps devices still while the machine is at rest.
//!
//! Devices work on the guest's memory on vCPUs' threads, which are out of the guest at rest, in the
//! event loop, and where an upper layer works on one ([`crate::VmHandle::with_devices`]). The
//! latter two take a lock, which a machine at rest keeps: what happens meanwhile waits in its
//! descriptor.
//!
//! Lock order: the machine's operations, this lock, a device. Nobody waits for a vCPU with this
//! lock but the one who brings the machine to rest, and then the vCPUs are out already.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber};

use crate::hotplug::SharedSubscriber;

/// Held by whoever works on devices outside vCPUs' threads, and by a machine at rest.
#[derive(Clone, Default)]
pub(crate) struct AtWork(Arc<Mutex<()>>);

impl AtWork {
    /// Waits for whoever is at work, and keeps the others from it.
    pub fn lock(&self) -> MutexGuard<'_, ()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `subscriber` as the event loop is to serve it.
    pub fn guard(&self, subscriber: SharedSubscriber) -> SharedSubscriber {
        Arc::new(Mutex::new(Guarded {
            at_work: self.clone(),
            subscriber,
        }))
    }
}

/// A subscriber that works only while the machine is not at rest.
struct Guarded {
    at_work: AtWork,
    subscriber: SharedSubscriber,
}

impl MutEventSubscriber for Guarded {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let _at_work = self.at_work.lock();
        self.subscriber
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .init(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let _at_work = self.at_work.lock();
        self.subscriber
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .process(events, ops);
    }
}
