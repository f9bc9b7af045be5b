//! Interrupts runs of P that last: whoever runs it then looks at how much time the call has had.
//!
//! ```text
//!   thread that runs P:  enter ─► KVM_RUN ..................... EINTR ─► leave ─► time counted ─► enter ─► ...
//!   this thread:                  tick      tick (still there) ─► signal
//! ```
//!
//! One thread a domain, which ticks only while calls are being made. It measures nothing and
//! decides nothing: real time passes also for a thread that does not get a processor. A run that
//! begins and ends between two ticks costs two stores and no system call.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How often a run is looked at.
const TICK: Duration = Duration::from_millis(5);
/// After how long it is interrupted: long enough to get on in it on a slow host.
const LASTS: Duration = Duration::from_millis(10);
/// Ticks without any run after which the thread sleeps until the next one.
const IDLE_TICKS: u32 = 50;

#[derive(Debug)]
struct Shared {
    epoch: Instant,
    /// When the run under way began, in nanoseconds since `epoch`; 0 when there is none.
    since_ns: AtomicU64,
    /// Runs begun, to tell that something happens at all.
    runs: AtomicU64,
    /// Kernel thread id of the thread that runs P.
    thread: AtomicI32,
    asleep: AtomicBool,
    stop: AtomicBool,
}

/// The watchdog of one domain.
#[derive(Debug)]
pub struct Watchdog {
    shared: Arc<Shared>,
    waker: Thread,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Starts the thread. It interrupts with `signal`, for which the process must have a handler
    /// that does nothing, so that `KVM_RUN` returns `EINTR`.
    pub fn start(signal: i32) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            epoch: Instant::now(),
            since_ns: AtomicU64::new(0),
            runs: AtomicU64::new(0),
            thread: AtomicI32::new(0),
            asleep: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let theirs = shared.clone();
        let thread = std::thread::Builder::new()
            .name("domain-watchdog".into())
            .spawn(move || watch(&theirs, signal))?;
        Ok(Self {
            shared,
            waker: thread.thread().clone(),
            thread: Some(thread),
        })
    }

    /// A run of P begins on this thread.
    pub fn enter(&self, now: Instant) {
        let since = now.saturating_duration_since(self.shared.epoch).as_nanos();
        let since = u64::try_from(since).unwrap_or(u64::MAX).max(1);
        self.shared.thread.store(thread_id(), Ordering::Relaxed);
        self.shared.runs.fetch_add(1, Ordering::Relaxed);
        self.shared.since_ns.store(since, Ordering::SeqCst);
        if self.shared.asleep.load(Ordering::SeqCst) {
            self.waker.unpark();
        }
    }

    /// It has ended.
    pub fn leave(&self) {
        self.shared.since_ns.store(0, Ordering::SeqCst);
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.waker.unpark();
        if let Some(thread) = self.thread.take() {
            // The thread does not panic; if it did, there would be nothing left to stop.
            let _ = thread.join();
        }
    }
}

/// Kernel thread id of this thread, asked for once.
fn thread_id() -> i32 {
    thread_local! {
        static ID: Cell<i32> = const { Cell::new(0) };
    }
    if ID.get() == 0 {
        // SAFETY: gettid has no arguments and cannot fail.
        ID.set(unsafe { libc::gettid() });
    }
    ID.get()
}

fn watch(shared: &Shared, signal: i32) {
    let (mut seen, mut idle) = (0, 0);
    while !shared.stop.load(Ordering::SeqCst) {
        std::thread::park_timeout(TICK);
        let since = shared.since_ns.load(Ordering::SeqCst);
        let now = u64::try_from(shared.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX);
        if since != 0 && now.saturating_sub(since) >= LASTS.as_nanos() as u64 {
            // Sent again at every tick until the run ends: one that arrives just before KVM_RUN is
            // lost.
            let thread = shared.thread.load(Ordering::Relaxed);
            // SAFETY: tgkill only sends a signal, to a thread of this very process; one that is
            // gone gives ESRCH, which is harmless.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal) };
        }
        let runs = shared.runs.load(Ordering::Relaxed);
        idle = if runs == seen && since == 0 {
            idle + 1
        } else {
            0
        };
        seen = runs;
        if idle >= IDLE_TICKS {
            shared.asleep.store(true, Ordering::SeqCst);
            while shared.since_ns.load(Ordering::SeqCst) == 0 && !shared.stop.load(Ordering::SeqCst)
            {
                std::thread::park();
            }
            shared.asleep.store(false, Ordering::SeqCst);
            idle = 0;
        }
    }
}
