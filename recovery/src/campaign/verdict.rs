//! What a run comes to.
//!
//! | native | seen |
//! | --- | --- |
//! | not activated | nobody came to the fault |
//! | benign | all went as without it |
//! | error | a command failed or the kernel warned, and all works afterwards |
//! | crash | the kernel reported an oops, a bug or a panic |
//! | hang | the guest or a command of the workload does not come back, or the kernel reported a stall |
//! | silent corruption | contents are otherwise than they were sent or written, or memory was changed where the driver has no business: a file, or what the kernel's checks of its heap and its free pages found |
//! | lost device | the guest lives, and its device does not work |
//!
//! | isolated | seen |
//! | --- | --- |
//! | not activated, benign | the same |
//! | recovered | a call was taken back, and the device works afterwards |
//! | detected, not recovered | a call was taken back, and the device does not work |
//! | undetected | no call was taken back, and something went otherwise than without the fault, or a command waits for ever |
//! | escaped | the guest's kernel crashed or stands still, or memory was changed that is not the driver's |

use serde::{Deserialize, Serialize};

use super::Way;
use super::times::Times;

/// What was seen of one run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    /// Whether a call came to the fault; `None` where that is not told.
    pub reached: Option<bool>,
    /// The workload came to its end in time.
    pub finished: bool,
    /// The guest's agent answered afterwards.
    pub answers: bool,
    /// Steps of the workload that ended otherwise than without a fault.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub differs: Vec<String>,
    /// Lines of the kernel's log that are never there without a fault, as far as they are known to
    /// be bad.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub log: Vec<String>,
    /// Packets or bytes that arrived otherwise than they were sent.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub corrupted: u64,
    /// What was changed that the driver has no business with.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub elsewhere: Vec<String>,
    /// Isolated: memory that was in use all the time and is otherwise, where it is not in any run
    /// without a fault, nor in those in which calls fail before they do anything.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bystanders: Vec<String>,
    /// Whether the device worked at the end.
    pub works: bool,
    /// Isolated: calls that were taken back.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub taken_back: u64,
    /// Isolated: rungs of the ladder above taking calls back that were climbed.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub rungs: u64,
    /// Isolated: why the driver is not run or not isolated any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub given_up: Option<String>,
    /// Isolated: what the first call that was taken back did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub violation: Option<Detected>,
    /// How long the run took, in milliseconds.
    pub took_ms: u64,
    /// And what of it; `None` in files from before that was looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub times: Option<Times>,
}

impl Seen {
    /// Whether its memory can be compared with that of runs without a fault: the guest lives, and
    /// its driver is the same one, isolated.
    pub fn is_compared(&self) -> bool {
        self.answers && self.given_up.is_none() && self.rungs == 0
    }
}

/// What is as usual is left out of files that have thousands of it.
pub(super) fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// The first call of a run that was taken back.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detected {
    /// What it did, where.
    pub says: String,
    /// From the moment in which a call first came to the fault to its being judged a violation, in
    /// nanoseconds, where it is known when a call came there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after_ns: Option<u64>,
    /// From the exit that told of it to the return to the caller with an error, in nanoseconds.
    pub rollback_ns: u64,
}

/// What a run comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Nobody came to the fault.
    NotActivated,
    /// All went as without it.
    Benign,
    /// Native: something failed or warned, and all works.
    Error,
    /// Native: an oops, a bug or a panic.
    Crash,
    /// Native: something does not come back.
    Hang,
    /// Native: contents are not what they were.
    SilentCorruption,
    /// Native: the device does not work.
    LostDevice,
    /// Isolated: taken back, and the device works.
    Recovered,
    /// Isolated: taken back, and the device does not work.
    DetectedNotRecovered,
    /// Isolated: not noticed.
    Undetected,
    /// Isolated: the guest was hurt.
    Escaped,
}

impl Verdict {
    /// All verdicts, the native ones first.
    pub const ALL: [Self; 11] = [
        Self::NotActivated,
        Self::Benign,
        Self::Error,
        Self::Crash,
        Self::Hang,
        Self::SilentCorruption,
        Self::LostDevice,
        Self::Recovered,
        Self::DetectedNotRecovered,
        Self::Undetected,
        Self::Escaped,
    ];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::NotActivated => "not activated",
            Self::Benign => "benign",
            Self::Error => "error",
            Self::Crash => "crash",
            Self::Hang => "hang",
            Self::SilentCorruption => "silent corruption",
            Self::LostDevice => "lost device",
            Self::Recovered => "recovered",
            Self::DetectedNotRecovered => "detected, not recovered",
            Self::Undetected => "undetected",
            Self::Escaped => "escaped",
        }
    }

    /// Whether an isolated run that ended so is to be looked at, where it ended `native`ly so.
    pub fn is_bad(self, native: Option<Self>) -> bool {
        match self {
            Self::Escaped | Self::DetectedNotRecovered => true,
            Self::Undetected => native.is_some_and(Self::is_harm),
            _ => false,
        }
    }

    /// Whether a guest without isolation lost something by it that it does not get back by itself.
    pub fn is_harm(self) -> bool {
        matches!(
            self,
            Self::Crash | Self::Hang | Self::SilentCorruption | Self::LostDevice
        )
    }
}

/// Words of the kernel's log that say that it crashed (arch/x86/kernel/dumpstack.c,
/// arch/x86/mm/fault.c, arch/x86/kernel/traps.c, lib/bug.c, kernel/panic.c).
const CRASHED: &[&str] = &[
    "Oops:",
    "BUG: kernel NULL pointer",
    "BUG: unable to handle",
    "general protection fault",
    "kernel BUG at",
    "invalid opcode:",
    "divide error:",
    "stack segment:",
    "double fault:",
    "Kernel panic",
    "kernel stack overflow",
    "kernel tried to execute",
];

/// Words that say that a processor stands still (kernel/watchdog.c, kernel/rcu/tree_stall.h).
const HUNG: &[&str] = &[
    "soft lockup",
    "hard LOCKUP",
    "self-detected stall",
    "detected stalls",
    "rcu_preempt kthread starved",
];

/// Words that say that a process waits for ever (kernel/hung_task.c).
const WAITS: &[&str] = &["blocked for more than"];

/// Words that say that memory was changed in which nobody has business: red zones, poison and
/// records of the heap's objects and of free pages (mm/slub.c, mm/page_poison.c), lists that do not
/// join (lib/list_debug.c).
const DAMAGED: &[&str] = &[
    "Redzone overwritten",
    "Poison overwritten",
    "adding overwritten",
    "Freechain corrupt",
    "Freepointer corrupt",
    "Freelist Pointer",
    "Object already free",
    "Object corrupt",
    "Invalid object pointer",
    "Wrong object count",
    "Not a valid slab page",
    "pagealloc: memory corruption",
    "pagealloc: single bit error",
    "list_add corruption",
    "list_del corruption",
    "Bad page state",
];

/// Words of other lines that only a fault brings (include/linux/kern_levels.h has no level for
/// them): warnings, damaged counters, locks held for too long or given back twice, devices that
/// stand still.
const WARNED: &[&str] = &[
    "WARNING:",
    "refcount_t:",
    "scheduling while atomic",
    "sleeping function called from invalid context",
    "bad: scheduling",
    "NETDEV WATCHDOG",
    "Detected Tx Unit Hang",
    "possible circular locking",
    "nobody cared",
    "DMA-API:",
    "leaked",
];

/// Whether a line of the kernel's log is one that counts.
pub fn is_bad(line: &str) -> bool {
    has(line, CRASHED)
        || has(line, HUNG)
        || has(line, WAITS)
        || is_damage(line)
        || has(line, WARNED)
}

/// Whether a line of the kernel's log says that memory was changed in which nobody has business.
pub fn is_damage(line: &str) -> bool {
    has(line, DAMAGED)
}

/// Whether a line of the kernel's log says that it crashed.
pub fn is_crash(line: &str) -> bool {
    has(line, CRASHED)
}

/// Whether a line of the kernel's log says that a processor stands still.
pub fn is_stall(line: &str) -> bool {
    has(line, HUNG)
}

fn has(line: &str, words: &[&str]) -> bool {
    words.iter().any(|word| line.contains(word))
}

/// What a run comes to that was made in this way.
pub fn verdict(way: Way, seen: &Seen) -> Verdict {
    let crashed = seen.log.iter().any(|line| has(line, CRASHED));
    let stands_still = !seen.answers || seen.log.iter().any(|line| has(line, HUNG));
    let waits = !seen.finished || seen.log.iter().any(|line| has(line, WAITS));
    let otherwise = !seen.differs.is_empty() || !seen.log.is_empty();
    if way == Way::Native {
        return match () {
            () if crashed => Verdict::Crash,
            () if stands_still || waits => Verdict::Hang,
            () if seen.corrupted > 0 || !seen.elsewhere.is_empty() => Verdict::SilentCorruption,
            () if !seen.works => Verdict::LostDevice,
            () if otherwise => Verdict::Error,
            () if seen.reached == Some(false) => Verdict::NotActivated,
            () => Verdict::Benign,
        };
    }
    let memory = !seen.elsewhere.is_empty() || !seen.bystanders.is_empty();
    let hurt = crashed || stands_still || memory;
    let works = seen.works && !waits;
    match () {
        () if hurt => Verdict::Escaped,
        () if seen.taken_back > 0 && works && seen.corrupted == 0 => Verdict::Recovered,
        () if seen.taken_back > 0 => Verdict::DetectedNotRecovered,
        () if otherwise || seen.corrupted > 0 || !works => Verdict::Undetected,
        () if seen.reached == Some(false) => Verdict::NotActivated,
        () => Verdict::Benign,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn well() -> Seen {
        Seen {
            reached: Some(true),
            finished: true,
            answers: true,
            works: true,
            ..Seen::default()
        }
    }

    fn with(change: impl FnOnce(&mut Seen)) -> Seen {
        let mut seen = well();
        change(&mut seen);
        seen
    }

    fn logged(line: &str) -> Seen {
        assert!(is_bad(line), "{line}");
        with(|seen| seen.log = vec![line.to_owned()])
    }

    fn damaged(line: &str) -> Seen {
        assert!(is_damage(line), "{line}");
        let mut seen = logged(line);
        seen.elsewhere = vec![line.to_owned()];
        seen
    }

    #[test]
    fn scripted_outcomes_have_their_verdicts() {
        use Verdict::*;
        let cases = [
            (well(), Benign, Benign),
            (
                with(|seen| seen.reached = Some(false)),
                NotActivated,
                NotActivated,
            ),
            (with(|seen| seen.reached = None), Benign, Benign),
            (logged("Oops: 0000 [#1] PREEMPT SMP NOPTI"), Crash, Escaped),
            (
                logged("watchdog: BUG: soft lockup - CPU#0 stuck for 22s!"),
                Hang,
                Escaped,
            ),
            // A request that a driver loses is one that it may lose; what waits for it waits.
            (with(|seen| seen.finished = false), Hang, Undetected),
            (
                logged("INFO: task mount:71 blocked for more than 120 seconds."),
                Hang,
                Undetected,
            ),
            (with(|seen| seen.answers = false), Hang, Escaped),
            (
                with(|seen| seen.corrupted = 1),
                SilentCorruption,
                Undetected,
            ),
            (
                with(|seen| seen.elsewhere = vec!["/tmp/contents".into()]),
                SilentCorruption,
                Escaped,
            ),
            (
                with(|seen| seen.bystanders = vec!["task_struct object".into()]),
                Benign,
                Escaped,
            ),
            (with(|seen| seen.works = false), LostDevice, Undetected),
            (
                with(|seen| seen.differs = vec!["ethtool -S".into()]),
                Error,
                Undetected,
            ),
            (
                damaged("BUG kmalloc-64 (Not tainted): Right Redzone overwritten"),
                SilentCorruption,
                Escaped,
            ),
            (
                damaged("BUG skbuff_head_cache (Tainted: G): Object padding overwritten"),
                SilentCorruption,
                Escaped,
            ),
            (
                damaged("pagealloc: memory corruption"),
                SilentCorruption,
                Escaped,
            ),
            (
                logged("WARNING: CPU: 0 PID: 1 at net/core/dev.c:1"),
                Error,
                Undetected,
            ),
        ];
        for (seen, native, isolated) in cases {
            assert_eq!(verdict(Way::Native, &seen), native, "{seen:?}");
            for way in [Way::Once, Way::Stays] {
                assert_eq!(verdict(way, &seen), isolated, "{seen:?}");
            }
        }
    }

    #[test]
    fn a_call_that_was_taken_back_is_recovered_if_the_device_works() {
        let taken_back = |change: fn(&mut Seen)| {
            let mut seen = well();
            seen.taken_back = 1;
            change(&mut seen);
            verdict(Way::Once, &seen)
        };
        assert_eq!(taken_back(|_| {}), Verdict::Recovered);
        // Its caller saw the error.
        let failed = |seen: &mut Seen| seen.differs = vec!["ip link set up".into()];
        assert_eq!(taken_back(failed), Verdict::Recovered);
        let lost = |seen: &mut Seen| seen.works = false;
        assert_eq!(taken_back(lost), Verdict::DetectedNotRecovered);
        let corrupted = |seen: &mut Seen| seen.corrupted = 3;
        assert_eq!(taken_back(corrupted), Verdict::DetectedNotRecovered);
        let died = |seen: &mut Seen| seen.answers = false;
        assert_eq!(taken_back(died), Verdict::Escaped);
    }

    #[test]
    fn what_a_healthy_kernel_says_is_not_bad() {
        for line in [
            "e1000: eth0 NIC Link is Up 1000 Mbps Full Duplex, Flow Control: RX",
            "IPv6: ADDRCONF(NETDEV_CHANGE): eth0: link becomes ready",
            "Speculative Return Stack Overflow: Mitigation",
        ] {
            assert!(!is_bad(line), "{line}");
        }
    }
}
