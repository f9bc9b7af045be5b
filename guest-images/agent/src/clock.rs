//! `/init clock FILE`: reads `CLOCK_MONOTONIC` on all processors side by side until there is a file
//! of that name, and prints a line of JSON about it ([`agent_protocol::clock`]): no read may give
//! less than one that had ended before it, on whatever processor.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use agent_protocol::clock::ClockResult;
use rustix::thread::{CpuSet, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};

/// Reads between two pauses, in which others may run, and how long these are.
const READS: u32 = 50;
const PAUSE: Duration = Duration::from_millis(2);

/// What the threads share.
#[derive(Default)]
struct Shared {
    highest: AtomicU64,
    backwards: AtomicU64,
    worst: AtomicU64,
    ends: AtomicBool,
}

/// Reads until `end` is there. Returns the exit status: 0 when time never went backwards.
pub fn main(end: &str) -> u8 {
    let shared = Shared::default();
    let first_ns = now();
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let reads = std::thread::scope(|scope| {
        let watch = |processor| {
            let shared = &shared;
            scope.spawn(move || shared.watch(processor))
        };
        let threads: Vec<_> = (0..processors).map(watch).collect();
        while !Path::new(end).exists() {
            std::thread::sleep(10 * PAUSE);
        }
        shared.ends.store(true, Ordering::Release);
        let reads = threads.into_iter().map(|thread| thread.join().unwrap_or(0));
        reads.collect()
    });
    let result = ClockResult {
        reads,
        backwards: shared.backwards.load(Ordering::Acquire),
        worst_ns: shared.worst.load(Ordering::Acquire),
        first_ns,
        last_ns: shared.highest.load(Ordering::Acquire),
    };
    match serde_json::to_string(&result) {
        Ok(line) => println!("{line}"),
        Err(error) => eprintln!("clock: {error}"),
    }
    u8::from(result.backwards > 0)
}

impl Shared {
    /// Reads on this processor, and says how often.
    fn watch(&self, processor: usize) -> u64 {
        let mut only = CpuSet::new();
        only.set(processor);
        if let Err(error) = sched_setaffinity(None, &only) {
            eprintln!("clock: processor {processor} cannot be had: {error}");
            return 0;
        }
        let mut reads = 0;
        while !self.ends.load(Ordering::Acquire) {
            for _ in 0..READS {
                let before = self.highest.load(Ordering::SeqCst);
                let now = now();
                if now < before {
                    self.backwards.fetch_add(1, Ordering::AcqRel);
                    self.worst.fetch_max(before - now, Ordering::AcqRel);
                }
                self.highest.fetch_max(now, Ordering::SeqCst);
                reads += 1;
            }
            std::thread::sleep(PAUSE);
        }
        reads
    }
}

/// `CLOCK_MONOTONIC`, as a program reads it.
fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let rest = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(rest)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;

    #[test]
    fn time_does_not_go_backwards_here() {
        let folder = tempfile::tempdir().unwrap();
        let end = folder.path().join("end");
        std::thread::scope(|scope| {
            let status = scope.spawn(|| main(end.to_str().unwrap()));
            std::thread::sleep(20 * PAUSE);
            std::fs::write(&end, b"").unwrap();
            assert_eq!(status.join().unwrap(), 0);
        });
    }
}
