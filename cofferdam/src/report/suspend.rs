//! How long it takes to put a guest away and to have it back: the `suspend` part of a report.

use serde::{Deserialize, Serialize};

use super::Stat;

/// One way, with one size of memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Suspend {
    /// Which.
    pub method: SuspendMethod,
    /// Guest memory in MiB.
    pub mem_mib: u64,
    /// Pages of 4 KiB that were copied each time, where that is told; the median.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dirty_pages: Option<u64>,
    /// How long it took.
    pub us: Stat,
    /// How long the guest was at rest meanwhile, where it goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rest_us: Option<Stat>,
}

/// Traffic while it is followed what changes, against none of that.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Followed {
    /// Guest memory in MiB.
    pub mem_mib: u64,
    /// Pings a second with a mark set, as a part of those without.
    pub pings_fraction: f64,
    /// The same of TCP's bytes.
    pub tcp_fraction: f64,
}

/// Guests that go on lazily from one snapshot, all alive at the same time. Pages that several have
/// are divided among them (`Pss` of proc_pid_smaps(5)).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Clones {
    /// Guest memory in MiB.
    pub mem_mib: u64,
    /// Each has functions of a driver isolated.
    pub isolated: bool,
    /// Pages that the snapshot has, in KiB.
    pub stored_kib: u64,
    /// What of them is in memory for the clones, in KiB, of all together.
    pub base_kib: u64,
    /// Guest memory that a clone has to itself, in KiB: what it has written; of one that is
    /// isolated what it has touched since then.
    pub guest_kib: Stat,
    /// All else that a clone's process has, in KiB.
    pub rest_kib: Stat,
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SuspendMethod {
    /// Start of the process until the agent of a guest that boots answers.
    Boot,
    /// All of the guest written to a directory.
    Snapshot,
    /// What changed since the last snapshot.
    SnapshotDiff,
    /// Start of the process until the agent of a guest that goes on from a directory answers, its
    /// memory read before.
    Restore,
    /// The same, its memory read when it is touched.
    RestoreLazy,
    /// The same, where what it touches first was recorded: that is fetched ahead.
    RestoreLazyAhead,
    /// [`SuspendMethod::Restore`] with nothing of the snapshot in the host's page cache.
    RestoreCold,
    /// [`SuspendMethod::RestoreLazy`] so.
    RestoreLazyCold,
    /// [`SuspendMethod::RestoreLazyAhead`] so.
    RestoreLazyAheadCold,
    /// The first mark of a guest.
    Mark,
    /// Back to the mark, in the same process.
    Rewind,
    /// `cofferdam suspend-device`: the driver's own function, the device's state, its power.
    DeviceSuspend,
    /// `cofferdam resume-device`.
    DeviceResume,
    /// The guest's kernel suspends the same device, with its driver and bus, while it suspends all
    /// devices (`/sys/power/pm_test`); by the kernel's own account.
    KernelSuspend,
    /// The kernel resumes it.
    KernelResume,
    /// The driver is removed and inserted, and its interface brought up.
    DriverRestart,
}

impl Clones {
    /// What was found, for people.
    pub fn sentence(&self) -> String {
        let mib = |kib: f64| kib / 1024.0;
        format!(
            "{} clones of {} MiB{}: of the snapshot's {:.1} MiB {:.1} in memory for all, each {:.1} MiB of its own \
             guest memory (at most {:.1}) and {:.1} MiB of the process (at most {:.1})",
            self.guest_kib.n,
            self.mem_mib,
            if self.isolated {
                ", a driver isolated in each"
            } else {
                ""
            },
            mib(self.stored_kib as f64),
            mib(self.base_kib as f64),
            mib(self.guest_kib.p50),
            mib(self.guest_kib.max),
            mib(self.rest_kib.p50),
            mib(self.rest_kib.max),
        )
    }
}

impl SuspendMethod {
    /// What it is, for people.
    pub fn words(self) -> &'static str {
        match self {
            Self::Boot => "boot, until the agent answers",
            Self::Snapshot => "full snapshot",
            Self::SnapshotDiff => "diff snapshot",
            Self::Restore => "restore, until the agent answers",
            Self::RestoreLazy => "lazy restore, until the agent answers",
            Self::RestoreLazyAhead => "the same, with the recorded pages fetched ahead",
            Self::RestoreCold => "restore, nothing in the page cache",
            Self::RestoreLazyCold => "lazy restore, nothing in the page cache",
            Self::RestoreLazyAheadCold => "the same, with the recorded pages fetched ahead, cold",
            Self::Mark => "first mark",
            Self::Rewind => "rewind",
            Self::DeviceSuspend => "suspend-device",
            Self::DeviceResume => "resume-device",
            Self::KernelSuspend => "the kernel's suspend of that device",
            Self::KernelResume => "the kernel's resume of that device",
            Self::DriverRestart => "remove and insert its driver",
        }
    }
}

/// What part of the boot with as much memory each way takes; `None` where no boot was measured.
pub fn of_boot(all: &[Suspend], one: &Suspend) -> Option<f64> {
    let boot = all
        .iter()
        .find(|other| other.method == SuspendMethod::Boot && other.mem_mib == one.mem_mib)?;
    Some(one.us.p50 / boot.us.p50)
}
