//! What is done side by side, so that no processor waits while another, or the network, works.

use std::thread::available_parallelism;

use crate::lab::Settings;
use crate::workspace::Workspace;

/// Memory that compilers, fuzz targets and the tests of this host take at most beside the labs.
const BESIDE_LABS_MIB: u64 = 4096;
/// How much what is done beside the labs gives way to them: it fills what they leave of the
/// processors, and all of them work to the end.
const GIVE_WAY: i32 = 5;

/// Does both at the same time, the first on this thread.
pub fn beside<A, B: Send>(first: impl FnOnce() -> A, second: impl FnOnce() -> B + Send) -> (A, B) {
    std::thread::scope(|scope| {
        let second = scope.spawn(second);
        let first = first();
        let second = second.join();
        (
            first,
            second.unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
        )
    })
}

/// Lets this thread, and the processes that it starts, give way to the others.
pub fn give_way() {
    // On Linux it is the thread's own. Where it may not be, nothing but the order of ends changes.
    let _ = rustix::process::nice(GIVE_WAY);
}

/// Labs side by side: one for each of this host's processors.
pub fn labs() -> usize {
    available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Whether this host's memory is enough for all else beside the labs.
pub fn has_room(workspace: &Workspace) -> bool {
    let lab = Settings::new(workspace).machine.memory_mib;
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    is_enough(&memory, labs() as u64 * u64::from(lab))
}

/// Whether all else has room beside labs that take so many MiB; no, where it is not known.
fn is_enough(memory: &str, labs_mib: u64) -> bool {
    available_mib(memory).is_some_and(|mib| mib >= labs_mib + BESIDE_LABS_MIB)
}

/// proc_meminfo(5): what can be had without swapping.
fn available_mib(memory: &str) -> Option<u64> {
    let line = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn both_are_under_way_at_the_same_time() {
        let barrier = Barrier::new(2);
        let one = |number: u32| {
            // For ever, if the other one began only after this one.
            barrier.wait();
            number
        };
        assert_eq!(beside(|| one(1), || one(2)), (1, 2));
    }

    #[test]
    fn what_gives_way_is_one_thread_and_what_it_starts() {
        let nice = || {
            let output = std::process::Command::new("nice").output().unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            text.trim().parse::<i32>().unwrap()
        };
        let before = nice();
        let ((), given_way) = beside(
            || (),
            || {
                give_way();
                nice()
            },
        );
        assert_eq!(given_way, (before + GIVE_WAY).min(19));
        assert_eq!(nice(), before);
    }

    #[test]
    fn memory_is_read_in_mib_or_not_at_all() {
        let memory = "MemTotal: 24000000 kB\nMemAvailable:   12582912 kB\nBuffers: 1 kB\n";
        assert_eq!(available_mib(memory), Some(12288));
        assert_eq!(available_mib("MemAvailable: much"), None);
        assert_eq!(available_mib(""), None);
    }

    #[test]
    fn room_is_what_labs_and_all_else_take_together() {
        let has = |mib: u64| format!("MemAvailable: {} kB\n", mib * 1024);
        let labs = 8192;
        assert!(is_enough(&has(labs + BESIDE_LABS_MIB), labs));
        assert!(!is_enough(&has(labs + BESIDE_LABS_MIB - 1), labs));
        assert!(!is_enough("", 0));
    }
}
