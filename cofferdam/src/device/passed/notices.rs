//! Hears of what the host tells of the function. One that the host wants back is given back by the
//! end of the process: whoever has asked for it waits for that.

use std::sync::mpsc::Sender;

use devices::vfio::address::PciAddress;
use devices::vfio::notices::{Notice, Notices};
use event_manager::{EventOps, Events, MutEventSubscriber};

use crate::device::End;

/// See the module.
pub struct Hears {
    address: PciAddress,
    notices: Notices,
    end: Sender<End>,
}

impl Hears {
    /// Of the function at `address`.
    pub fn of(address: PciAddress, notices: Notices, end: Sender<End>) -> Self {
        Self {
            address,
            notices,
            end,
        }
    }
}

impl MutEventSubscriber for Hears {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        match self.notices.take(events.fd()) {
            Some(Notice::WantedBack) => {
                // The main thread goes only with the process.
                let _ = self.end.send(End::WantedBack(self.address));
            }
            Some(Notice::Failed) => {
                tracing::error!(device = %self.address, "the device reports an error of its bus");
            }
            None => {}
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.notices.watch(ops);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use event_manager::{EventManager, SubscriberOps};

    use super::*;

    #[test]
    fn a_function_that_is_wanted_back_is_the_end_and_one_that_failed_is_not() {
        let address = "0000:00:02.0".parse().unwrap();
        let notices = Notices::new().unwrap();
        notices.tell(Notice::Failed).unwrap();
        let (end, ended) = channel();
        let mut manager = EventManager::new().unwrap();
        let hears = Arc::new(Mutex::new(Hears::of(address, notices, end)));
        manager.add_subscriber(hears.clone());
        manager.run_with_timeout(0).unwrap();
        assert!(ended.try_recv().is_err());
        // It is told once; more of it is more of the same.
        for _ in 0..2 {
            let told = hears.lock().unwrap().notices.tell(Notice::WantedBack);
            told.unwrap();
        }
        manager.run_with_timeout(1000).unwrap();
        let end = ended.recv_timeout(Duration::from_secs(120)).unwrap();
        assert!(matches!(end, End::WantedBack(of) if of == address));
        manager.run_with_timeout(0).unwrap();
        assert!(ended.try_recv().is_err());
    }
}
