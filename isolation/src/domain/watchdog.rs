//! Ends calls that hang: interrupts the thread that runs P when a call is over its time budget.
//!
//! One thread a domain, which ticks only while calls are being made. A call that begins and ends
//! between two ticks costs two stores and no system call.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How often a running call is looked at.
const TICK: Duration = Duration::from_millis(2);
/// Ticks without any call after which the thread sleeps until the next one.
const IDLE_TICKS: u32 = 50;

#[derive(Debug)]
struct Shared {
    epoch: Instant,
    /// Deadline of the call in progress in nanoseconds since `epoch`; 0 when none is.
    deadline_ns: AtomicU64,
    /// Calls begun, to tell that something happens at all.
    calls: AtomicU64,
    /// Kernel thread id of the thread that runs the call.
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
    /// Starts the thread. It interrupts with `signal`, for which the process must have a handler that
    /// does nothing, so that `KVM_RUN` returns `EINTR`.
    pub fn start(signal: i32) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            epoch: Instant::now(),
            deadline_ns: AtomicU64::new(0),
            calls: AtomicU64::new(0),
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

    /// A call begins on this thread and may take `budget`.
    pub fn begin(&self, budget: Duration) {
        let deadline = self
            .now_ns()
            .saturating_add(budget.as_nanos() as u64)
            .max(1);
        // SAFETY: gettid has no arguments and cannot fail.
        let tid = unsafe { libc::gettid() };
        self.shared.thread.store(tid, Ordering::Relaxed);
        self.shared.calls.fetch_add(1, Ordering::Relaxed);
        self.shared.deadline_ns.store(deadline, Ordering::SeqCst);
        if self.shared.asleep.load(Ordering::SeqCst) {
            self.waker.unpark();
        }
    }

    /// Whether the call in progress is over its budget.
    pub fn expired(&self) -> bool {
        let deadline = self.shared.deadline_ns.load(Ordering::Relaxed);
        deadline != 0 && self.now_ns() >= deadline
    }

    /// The call ended.
    pub fn end(&self) {
        self.shared.deadline_ns.store(0, Ordering::SeqCst);
    }

    fn now_ns(&self) -> u64 {
        self.shared.epoch.elapsed().as_nanos() as u64
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

fn watch(shared: &Shared, signal: i32) {
    let (mut seen, mut idle) = (0, 0);
    while !shared.stop.load(Ordering::SeqCst) {
        std::thread::park_timeout(TICK);
        let deadline = shared.deadline_ns.load(Ordering::SeqCst);
        if deadline != 0 && shared.epoch.elapsed().as_nanos() as u64 >= deadline {
            // Sent again at every tick until the call ends: one that arrives just before KVM_RUN is
            // lost.
            let thread = shared.thread.load(Ordering::Relaxed);
            // SAFETY: tgkill only sends a signal, to a thread of this very process; one that is gone
            // gives ESRCH, which is harmless.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal) };
        }
        let calls = shared.calls.load(Ordering::Relaxed);
        idle = if calls == seen && deadline == 0 {
            idle + 1
        } else {
            0
        };
        seen = calls;
        if idle >= IDLE_TICKS {
            shared.asleep.store(true, Ordering::SeqCst);
            while shared.deadline_ns.load(Ordering::SeqCst) == 0
                && !shared.stop.load(Ordering::SeqCst)
            {
                std::thread::park();
            }
            shared.asleep.store(false, Ordering::SeqCst);
            idle = 0;
        }
    }
}
