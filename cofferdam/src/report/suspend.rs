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
    /// The first mark of a guest.
    Mark,
    /// Back to the mark, in the same process.
    Rewind,
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
            Self::Mark => "first mark",
            Self::Rewind => "rewind",
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
