//! The state of a virtio function: transport, queues and device.
//!
//! A notification is not part of it: a function that was put back has the event loop look at all
//! queues.

use serde::{Deserialize, Serialize};
use virtio_queue::QueueT;

use super::common::Common;
use super::{VirtioDevice, VirtioPciFunction, Virtqueue};
use crate::pci::config::ConfigSpaceState;
use crate::pci::msix::MsixState;
use crate::state::{Form, Part, StateError};
use crate::virtio::queues::VirtqueueState;

const FORM: Form = Form {
    kind: "virtio PCI function",
    version: 1,
};

#[derive(Serialize, Deserialize)]
struct VirtioPciState {
    config: ConfigSpaceState,
    msix: MsixState,
    common: Common,
    queues: Vec<VirtqueueState>,
    device: Part,
}

impl<D: VirtioDevice> VirtioPciFunction<D> {
    pub(super) fn save_part(&self) -> Result<Part, StateError> {
        let state = VirtioPciState {
            config: self.config.save(),
            msix: self.msix.save(),
            common: self.common,
            queues: self.queues.iter().map(Virtqueue::save).collect(),
            device: self.device.save()?,
        };
        Part::new(FORM, &state)
    }

    /// On an error nothing has changed.
    pub(super) fn restore_part(&mut self, part: &Part) -> Result<(), StateError> {
        let state: VirtioPciState = part.open(FORM)?;
        let queues = self.queues_of(&state)?;
        let fits = self.config.check(&state.config).map(drop);
        let fits = fits.and_then(|()| self.msix.check(&state.msix));
        fits.map_err(|error| FORM.does_not_fit(error))?;
        self.device.restore(&state.device)?;
        // Neither fails: both were checked.
        let done = self.config.restore(&state.config);
        let done = done.and_then(|()| self.msix.restore(&state.msix, &self.config));
        done.map_err(|error| FORM.does_not_fit(error))?;
        self.common = state.common;
        self.queues = queues;
        self.update_intx();
        if let Err(error) = self.resume.write(1) {
            tracing::error!(%error, "virtio: cannot signal the event loop");
        }
        Ok(())
    }

    /// The queues of a state, if they can be this function's.
    fn queues_of(&self, state: &VirtioPciState) -> Result<Vec<Virtqueue>, StateError> {
        let wrong = |what: &str| Err(FORM.does_not_fit(what));
        if state.queues.len() != self.queues.len() {
            return wrong("it has another number of queues");
        }
        if !state
            .common
            .is_possible(self.offered_features(), self.msix.count())
        {
            return wrong("its driver has negotiated what was not offered");
        }
        let mut queues = Vec::with_capacity(state.queues.len());
        for (here, saved) in self.queues.iter().zip(&state.queues) {
            let queue = Virtqueue::restore(saved, self.msix.count());
            let queue = queue.map_err(|error| FORM.does_not_fit(error))?;
            if queue.queue.max_size() != here.queue.max_size() {
                return wrong("a queue has another size");
            }
            if queue.queue.ready() && !queue.queue.is_valid(&*self.dma.memory()) {
                return wrong("a queue does not lie in guest memory");
            }
            queues.push(queue);
        }
        Ok(queues)
    }
}
