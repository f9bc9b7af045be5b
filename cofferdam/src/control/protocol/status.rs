//! How a VM is, in answers.

use std::collections::BTreeMap;

use isolation::status::ModuleStatus;
use recovery::ladder::LadderStatus;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How a VM is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// Number of its process.
    pub pid: u32,
    /// What its vCPUs do.
    pub state: VmState,
    /// What the guest's kernel said last if it has panicked since it was booted, as far as its
    /// console shows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_panic: Option<String>,
    /// Time since the process began to build the VM, in milliseconds.
    pub uptime_ms: u64,
    /// When guest code first ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_ns: Option<u64>,
    /// Resident memory of the process beyond guest memory, in KiB; of a guest with isolated modules,
    /// memory of a snapshot or a NIC elsewhere as it was within the last second.
    pub vmm_rss_kib: u64,
    /// Guest memory that is resident, in KiB; as old as that of the process.
    pub guest_rss_kib: u64,
    /// Pages of 4 KiB that are kept for its marks, unless one is being set or gone back to now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark_pages: Option<u64>,
    /// Times the guest was reset since it started.
    pub resets: u64,
    /// What it was started with.
    pub config: ConfigSummary,
    /// Exits of all vCPUs to this process, by reason.
    pub exits: BTreeMap<String, u64>,
    /// Isolated modules.
    #[schema(value_type = Vec<Object>)]
    pub isolation: Vec<ModuleStatus>,
    /// How recovery of each isolated module stands, by its name.
    #[serde(default)]
    #[schema(value_type = BTreeMap<String, Object>)]
    pub recovery: BTreeMap<String, LadderStatus>,
    /// Counters of the first NIC and of what it is plugged into.
    pub nic: BTreeMap<String, u64>,
    /// All NICs.
    #[serde(default)]
    pub nics: Vec<NicStatus>,
}

/// A NIC of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NicStatus {
    /// Its PCI address in the guest, such as `0000:00:02.0`.
    pub address: String,
    /// What it is.
    #[serde(flatten)]
    pub net: NetSummary,
    /// Its counters and those of what it is plugged into.
    pub counters: BTreeMap<String, u64>,
}

/// What the vCPUs of a VM do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// They do not run yet.
    Starting,
    /// They run.
    Running,
    /// They are held.
    Paused,
    /// They do not run any more.
    Ending,
}

impl VmState {
    /// Its name for a person.
    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ending => "ending",
        }
    }
}

/// What a VM was started with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ConfigSummary {
    /// Path of the kernel.
    pub kernel: String,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// The first NIC and what it is plugged into, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net: Option<NetSummary>,
    /// Disks, as given.
    pub disks: Vec<String>,
    /// Where the serial console goes.
    pub serial: String,
}

/// The network of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetSummary {
    /// Which NIC.
    pub nic: String,
    /// Its address, if it was given one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// What it is plugged into, or which one it is.
    pub wire: String,
}

/// What the gateway saw since a given time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeReading {
    /// First answer of the guest to a ping.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_reply_ns: Option<u64>,
    /// Last answer before the given time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_reply_before_ns: Option<u64>,
    /// First frame of the guest that came after a silence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_frame_ns: Option<u64>,
    /// First answer to a ping that was sent at that time or later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_round_trip_ns: Option<u64>,
    /// First frame of the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_tx_ns: Option<u64>,
    /// First interrupt of the NIC that the guest took; only of an e1000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_interrupt_ns: Option<u64>,
    /// Pings sent since the given time, as far as they are remembered.
    pub sent: u64,
    /// Pings answered since the given time, as far as they are remembered.
    pub replied: u64,
}
