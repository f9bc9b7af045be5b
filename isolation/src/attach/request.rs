//! What is asked of an isolator, and what it answers.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::plan::{Refusal, Wanted};
use crate::compensation::effects::KernelModel;
use crate::dispatch::after_fault::FaultPolicy;
use crate::fault_image::KeepFaults;
use crate::guest::btf::Btf;
use crate::guest::symbols::SymbolTable;
pub use crate::status::Strength;
use devices::hold::Holdable;

/// How far calls have to be contained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Contain {
    /// Each store to a page that holds objects of others, too, is checked against what the call may
    /// write, byte by byte.
    Exact,
    /// A call's first store to each page is checked against what it may write, and so is what it
    /// changed if it called no kernel function. Where what that needs is not known of the guest,
    /// its modules are not isolated.
    #[default]
    Full,
    /// As far as what is known of the guest allows: perhaps calls may write to all of the heap.
    None,
}

impl Contain {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Exact, Self::Full, Self::None];

    /// Its name for a person.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Full => "full",
            Self::None => "none",
        }
    }

    /// Whether a module whose calls cannot be contained is not isolated.
    pub fn is_needed(self) -> bool {
        self != Self::None
    }

    /// The one of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.name() == name)
    }
}

/// What to isolate.
pub struct IsolateRequest {
    /// Name of the module.
    pub module: String,
    /// Sections and addresses that the guest reports for it.
    pub sections: Vec<(String, u64)>,
    /// Release of the guest's kernel, as `uname -r` has it.
    pub kernel: String,
    /// The guest's symbols.
    pub symbols: Arc<SymbolTable>,
    /// Types of the kernel and the module. Without them calls are not contained, and failed ones
    /// return `-EIO` whatever they are.
    pub types: Option<Arc<Btf>>,
    /// How far calls have to be contained.
    pub contain: Contain,
    /// Which functions.
    pub wanted: Wanted,
    /// What is known of the kernel's functions. Without it, or without types, a call that went on
    /// in the guest before it failed cannot be taken back.
    pub model: Option<KernelModel>,
    /// Further kernel functions that only the guest may run.
    pub guest_only: Vec<String>,
    /// The module's device, if it has one; all of them as one if it has several.
    pub device: Option<Arc<dyn Holdable>>,
    /// PCI slots of these devices; the functions' locks are the devices' own.
    pub device_slots: Vec<u8>,
    /// The guest has devices that cannot be held and write its memory while calls run: functions of
    /// the host, NICs in other processes.
    pub memory_moves: bool,
    /// Processor time of its own that a call may take before it is aborted, over all of its parts
    /// and runs.
    pub budget: Duration,
    /// Decides what becomes of calls that failed.
    pub policy: Box<dyn FaultPolicy>,
    /// Time that a call may wait for in all, with the guest standing still, and remain atomic.
    pub sleep_limit: Duration,
    /// Where images of the guest at faults are kept; none are if this is missing.
    pub keep_faults: Option<KeepFaults>,
}

/// What was isolated.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Isolated {
    /// Gated functions.
    pub entries: Vec<String>,
    /// Functions that fit a pattern but cannot be gated.
    pub refused: Vec<Refusal>,
    /// Calls of kernel functions that were redirected to trampolines.
    pub redirected_calls: usize,
    /// The kernel functions that these call, each with all its names.
    pub imports: Vec<Vec<String>>,
    /// How strong the isolation is.
    pub strength: Strength,
    /// Time that the guest was stopped, in microseconds.
    pub stopped_us: u64,
    /// Time that was spent on what could be made ready while the guest ran, in microseconds.
    pub prepared_us: u64,
}
