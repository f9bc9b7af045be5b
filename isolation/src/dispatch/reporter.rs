//! Calls that failed are told of behind them: their addresses get names, their line is logged and
//! whoever listens hears of them once their callers run again.
//!
//! ```text
//!  vCPU's thread: call fails ─► decision ─► Failed queued ─► caller runs again
//!  reports' thread:                            └─► names ─► log, listener, kept for who asks
//! ```
//!
//! Whoever asks for reports, and a vCPU that finds too many waiting, does that work itself. Lock
//! order: whose turn it is to tell, then what waits or what is kept.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::Thread;
use std::time::Instant;

use crate::dispatch::after_fault::Listener;
use crate::dispatch::failed::Failed;
use crate::guest::symbols::SymbolTable;
use crate::status::report::ViolationReport;

/// How many reports of a module are kept.
const REPORTS_KEPT: usize = 32;
/// How many failed calls may wait to be told of.
const MAX_WAITING: usize = 16;

/// Holds a mutex. What it guards is whole after each statement.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is told of one module's failed calls.
pub(crate) struct Reports {
    symbols: Arc<SymbolTable>,
    listener: Option<Listener>,
    kept: Mutex<VecDeque<ViolationReport>>,
}

impl Reports {
    /// Of a module whose addresses have these names; `listener` hears of each.
    pub fn new(symbols: Arc<SymbolTable>, listener: Option<Listener>) -> Self {
        Self {
            symbols,
            listener,
            kept: Mutex::default(),
        }
    }

    /// The last ones, oldest first.
    pub fn kept(&self) -> Vec<ViolationReport> {
        lock(&self.kept).iter().cloned().collect()
    }

    fn tell(&self, failed: Failed) {
        let report = failed.named(&self.symbols);
        tracing::warn!("{report}");
        if let Some(listener) = &self.listener {
            listener(&report);
        }
        let mut kept = lock(&self.kept);
        if kept.len() >= REPORTS_KEPT {
            kept.pop_front();
        }
        kept.push_back(report);
    }
}

struct Waiting {
    reports: Arc<Reports>,
    failed: Failed,
}

#[derive(Default)]
struct Shared {
    waiting: Mutex<VecDeque<Waiting>>,
    /// Whose turn it is to tell: one at a time, in their order.
    telling: Mutex<()>,
    end: AtomicBool,
    /// Not there if there can be no thread.
    thread: OnceLock<Thread>,
}

impl Shared {
    fn tell_all(&self) {
        let _turn = lock(&self.telling);
        loop {
            let next = lock(&self.waiting).pop_front();
            let Some(Waiting { reports, failed }) = next else {
                return;
            };
            reports.tell(failed);
        }
    }
}

/// Where failed calls are queued.
#[derive(Clone)]
pub(crate) struct Queue(Arc<Shared>);

impl Queue {
    /// Queues a failed call, whose caller runs again at once; `since` is when memory and device were
    /// as before, from which the caller's wait is counted.
    pub fn push(&self, reports: &Arc<Reports>, mut failed: Failed, since: Option<Instant>) {
        let shared = &self.0;
        let thread = shared.thread.get();
        let mut waiting = lock(&shared.waiting);
        let is_for_us = thread.is_none() || waiting.len() >= MAX_WAITING;
        if let Some(thread) = thread.filter(|_| !is_for_us) {
            thread.unpark();
        }
        // It is begun to be told of once this is unlocked.
        if let Some(since) = since {
            let took = since.elapsed().as_nanos();
            failed.phases.returned_ns = u64::try_from(took).unwrap_or(u64::MAX);
        }
        waiting.push_back(Waiting {
            reports: reports.clone(),
            failed,
        });
        drop(waiting);
        if is_for_us {
            shared.tell_all();
        }
    }
}

/// Tells of failed calls. Its thread ends with it, when all are told of.
pub(crate) struct Reporter(Arc<Shared>);

impl Reporter {
    /// Starts its thread. If there can be none, vCPUs do its work.
    pub fn start() -> Self {
        let shared = Arc::<Shared>::default();
        let theirs = shared.clone();
        let thread = std::thread::Builder::new()
            .name("reports".into())
            .spawn(move || {
                while !theirs.end.load(Ordering::SeqCst) {
                    std::thread::park();
                    theirs.tell_all();
                }
            });
        match thread {
            // It is empty until here.
            Ok(thread) => drop(shared.thread.set(thread.thread().clone())),
            Err(error) => {
                tracing::warn!("failed calls wait for their reports: no thread for them: {error}");
            }
        }
        Self(shared)
    }

    /// Where failed calls are queued for it.
    pub fn queue(&self) -> Queue {
        Queue(self.0.clone())
    }

    /// Returns when all that has failed by now was told of.
    pub fn settle(&self) {
        self.0.tell_all();
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.0.end.store(true, Ordering::SeqCst);
        if let Some(thread) = self.0.thread.get() {
            thread.unpark();
        }
        self.settle();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;
    use crate::dispatch::failed::tests::failed;

    fn reports(listener: Listener) -> Arc<Reports> {
        Arc::new(Reports::new(Arc::default(), Some(listener)))
    }

    #[test]
    fn failed_calls_are_told_of_in_their_order_and_the_last_are_kept() {
        let reporter = Reporter::start();
        let told = Arc::<Mutex<Vec<String>>>::default();
        let theirs = told.clone();
        let reports = reports(Box::new(move |report| {
            lock(&theirs).push(report.entry.clone());
        }));
        let names: Vec<String> = (0..100).map(|number| format!("call_{number}")).collect();
        let since = Instant::now();
        for name in &names {
            let queue = reporter.queue();
            queue.push(&reports, failed(name), Some(since));
        }
        reporter.settle();
        assert_eq!(*lock(&told), names);
        let kept = reports.kept();
        let kept_names: Vec<_> = kept.iter().map(|report| report.entry.clone()).collect();
        assert_eq!(kept_names, names[names.len() - REPORTS_KEPT..]);
        assert!(kept.iter().all(|report| report.phases.returned_ns > 0));
    }

    /// Its caller does not wait for it: it is told of by another thread, without anybody asking.
    #[test]
    fn a_failed_call_is_told_of_by_another_thread() {
        let reporter = Reporter::start();
        let (sender, told) = channel();
        let reports = reports(Box::new(move |_| {
            let _ = sender.send(std::thread::current().id());
        }));
        reporter.queue().push(&reports, failed("call"), None);
        let by = told.recv_timeout(Duration::from_secs(120)).unwrap();
        assert_ne!(by, std::thread::current().id());
    }

    /// A listener that takes long: as many as there may be wait for it, and then the next caller.
    #[test]
    fn no_more_wait_than_there_may_be() {
        let reporter = Reporter::start();
        let reports = reports(Box::new(|_| std::thread::sleep(Duration::from_millis(2))));
        let queue = reporter.queue();
        for _ in 0..4 * MAX_WAITING {
            queue.push(&reports, failed("call"), None);
            assert!(lock(&reporter.0.waiting).len() <= MAX_WAITING);
        }
        reporter.settle();
        assert_eq!(reports.kept().len(), REPORTS_KEPT);
    }

    #[test]
    fn what_waits_at_the_end_is_told_of() {
        let reporter = Reporter::start();
        let reports = Arc::new(Reports::new(Arc::default(), None));
        reporter.queue().push(&reports, failed("call"), None);
        drop(reporter);
        assert_eq!(reports.kept().len(), 1);
    }
}
