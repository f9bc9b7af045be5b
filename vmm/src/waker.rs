//! What takes the main loop out of its wait when the machine has something for it.

use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use crate::hotplug::Hotplug;
use crate::lifecycle::Requests;

/// Wakes the main loop for a request or for a change of devices.
pub(crate) struct Waker {
    pub requests: Arc<Requests>,
    pub hotplug: Arc<Hotplug>,
}

impl Waker {
    fn events(&self) -> [&EventFd; 2] {
        [self.requests.wake(), self.hotplug.wake()]
    }
}

impl MutEventSubscriber for Waker {
    fn init(&mut self, ops: &mut EventOps) {
        for event in self.events() {
            if let Err(error) = ops.add(Events::new(event, EventSet::IN)) {
                tracing::error!(%error, "the main loop will not hear requests");
            }
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        // Only its readiness counts; the loop looks for requests after each round.
        for event in self.events() {
            let _ = event.read();
        }
    }
}
