//! Takes the link from a VM that has been parked with it for too long, before its driver finds that
//! its transmitter hangs.

use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, TryLockError};
use std::time::Duration;

use devices::vfio::passed::PassedFunction;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::timerfd::TimerFd;

/// How long the link stays. Linux waits five seconds for a transmitter (`watchdog_timeo`), and may
/// be slow to see its turn; an image says that the transmitter is held off (`waits`), which keeps
/// its driver from taking it to hang sooner.
const STAYS: Duration = Duration::from_secs(3);
/// Until it is tried again where a switch was in the way.
const AGAIN: Duration = Duration::from_millis(5);

/// See the module. Its timer runs while its VM is parked.
pub struct LinkTimer {
    function: Arc<Mutex<PassedFunction>>,
    timer: TimerFd,
}

impl LinkTimer {
    /// Does not run yet.
    ///
    /// # Errors
    /// There are no descriptors.
    pub fn new(function: Arc<Mutex<PassedFunction>>) -> std::io::Result<Self> {
        Ok(Self {
            function,
            timer: TimerFd::new()?,
        })
    }

    /// Begins anew, or ends.
    pub fn set(&mut self, runs: bool) {
        match runs {
            true => self.arm(STAYS),
            false => {
                if let Err(error) = self.timer.clear() {
                    tracing::debug!(%error, "a timer that nobody needs runs on");
                }
            }
        }
    }

    fn arm(&mut self, time: Duration) {
        if let Err(error) = self.timer.reset(time, None) {
            tracing::error!(%error, "a parked guest's link is not taken in time");
        }
    }
}

impl MutEventSubscriber for LinkTimer {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        // It is readable, or was set anew.
        if self.timer.is_armed().unwrap_or(false) {
            return;
        }
        // A switch has the function and may be about to set this timer: it is not waited for.
        let function = self.function.clone();
        match function.try_lock() {
            Ok(mut function) => function.lose_link(),
            Err(TryLockError::Poisoned(function)) => function.into_inner().lose_link(),
            Err(TryLockError::WouldBlock) => self.arm(AGAIN),
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
        if let Err(error) = ops.add(Events::new_raw(self.timer.as_raw_fd(), edges)) {
            tracing::error!("the timer of a parked guest's link is not watched: {error:?}");
        }
    }
}
