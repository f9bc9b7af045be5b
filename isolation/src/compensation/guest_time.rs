//! Time in which the guest could run: what limits on its own work are measured in.
//!
//! Real time passes also while the machine is paused and while the process is stopped (`SIGSTOP`),
//! and a kernel function that does not return meanwhile does not hang. So a thread counts ticks, as
//! long as anybody has a stopwatch: a tick while the machine is paused counts nothing, and one that
//! took long counts as if it had not.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// How often time is counted.
const TICK: Duration = Duration::from_millis(100);
/// What a tick counts at most: after a longer one the thread, and with it the guest, had been
/// stopped.
const LONGEST: Duration = Duration::from_millis(200);

#[derive(Debug, Default)]
struct Shared {
    counted_ns: AtomicU64,
    stopwatches: AtomicUsize,
    end: AtomicBool,
    ticker: OnceLock<Thread>,
}

/// The guest's time. The thread that counts it ends with this.
#[derive(Debug)]
pub(crate) struct GuestTime(Arc<Shared>);

/// Time since this was made.
#[derive(Debug)]
pub(crate) struct Stopwatch {
    shared: Arc<Shared>,
    since_ns: u64,
}

/// Makes stopwatches.
#[derive(Debug, Clone)]
pub(crate) struct Stopwatches(Arc<Shared>);

impl GuestTime {
    /// Time that passes as long as `is_running` says so. If there can be no thread for it, it
    /// stands still.
    pub fn start(is_running: impl Fn() -> bool + Send + 'static) -> Self {
        let shared = Arc::<Shared>::default();
        let theirs = shared.clone();
        let ticker = std::thread::Builder::new()
            .name("guest-time".into())
            .spawn(move || tick(&theirs, is_running));
        match ticker {
            // It is empty until here.
            Ok(ticker) => drop(shared.ticker.set(ticker.thread().clone())),
            Err(error) => tracing::error!(
                "kernel functions that do not return will not be noticed: no thread for it: {error}"
            ),
        }
        Self(shared)
    }

    /// What measures by it.
    pub fn stopwatches(&self) -> Stopwatches {
        Stopwatches(self.0.clone())
    }
}

impl Drop for GuestTime {
    fn drop(&mut self) {
        self.0.end.store(true, Ordering::SeqCst);
        self.0.wake();
    }
}

impl Stopwatches {
    /// One that begins now.
    pub fn start(&self) -> Stopwatch {
        self.0.stopwatches.fetch_add(1, Ordering::SeqCst);
        self.0.wake();
        Stopwatch {
            since_ns: self.0.counted_ns.load(Ordering::SeqCst),
            shared: self.0.clone(),
        }
    }
}

impl Stopwatch {
    /// The guest's time since then, to a tick or two.
    pub fn elapsed(&self) -> Duration {
        let now = self.shared.counted_ns.load(Ordering::SeqCst);
        Duration::from_nanos(now.saturating_sub(self.since_ns))
    }
}

impl Drop for Stopwatch {
    fn drop(&mut self) {
        self.shared.stopwatches.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Shared {
    fn wake(&self) {
        if let Some(ticker) = self.ticker.get() {
            ticker.unpark();
        }
    }
}

fn tick(shared: &Shared, is_running: impl Fn() -> bool) {
    let mut last = Instant::now();
    while !shared.end.load(Ordering::SeqCst) {
        if shared.stopwatches.load(Ordering::SeqCst) == 0 {
            // Who has one unparks, and the thread may not be known yet then.
            std::thread::park_timeout(10 * TICK);
            last = Instant::now();
            continue;
        }
        std::thread::park_timeout(TICK);
        let now = Instant::now();
        let counted = counts(now.duration_since(last), is_running());
        shared.counted_ns.fetch_add(counted, Ordering::SeqCst);
        last = now;
    }
}

/// What a tick that took `passed` counts, in nanoseconds.
fn counts(passed: Duration, is_running: bool) -> u64 {
    let counted = if is_running {
        passed.min(LONGEST)
    } else {
        Duration::ZERO
    };
    u64::try_from(counted.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_and_a_stopped_process_count_nothing() {
        assert_eq!(counts(TICK, true), 100_000_000);
        assert_eq!(counts(TICK, false), 0);
        assert_eq!(counts(Duration::from_secs(12), true), 200_000_000);
    }

    #[test]
    fn stopwatches_stand_still_while_the_guest_does() {
        let running = Arc::new(AtomicBool::new(false));
        let theirs = running.clone();
        let time = GuestTime::start(move || theirs.load(Ordering::SeqCst));
        let paused = time.stopwatches().start();
        std::thread::sleep(3 * TICK);
        assert_eq!(paused.elapsed(), Duration::ZERO);
        running.store(true, Ordering::SeqCst);
        while paused.elapsed() < 3 * TICK {
            std::thread::yield_now();
        }
        let later = time.stopwatches().start();
        assert!(later.elapsed() < paused.elapsed());
    }
}
