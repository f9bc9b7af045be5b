//! Campaigns: faults by the thousand, each tried from the same warm state, and what became of each.
//!
//! ```text
//!   places, kinds, seed ─► plan: the trials ─► (each run of each, by who has the guest) ─► seen ─► verdict ─► record ─► summary
//! ```
//!
//! Nothing here runs a guest: what was seen of a run is given, and judged.

pub mod kind;
pub mod plan;
pub mod reason;
pub mod record;
pub mod summary;
pub mod times;
pub mod verdict;
pub mod workload;

use serde::{Deserialize, Serialize};

/// How a fault is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// In the guest's own text, where it stays; or at the device's edge, from there on.
    Native,
    /// In the domain's copy, taken out when a call has come to it; or at the device's edge, once.
    Once,
    /// In the domain's copy, where it stays; or at the device's edge, from there on.
    Stays,
}

impl Way {
    /// All ways, in the order in which they are tried.
    pub const ALL: [Self; 3] = [Self::Native, Self::Once, Self::Stays];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Once => "isolated, once",
            Self::Stays => "isolated, stays",
        }
    }
}
