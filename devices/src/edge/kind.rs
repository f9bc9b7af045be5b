//! What can go wrong at a device's edge, by name.

use serde::{Deserialize, Serialize};

/// Carburizer: drivers that wait for an interrupt that never comes, or drown in one that does not
/// go.
const CARBURIZER: &str = "A. Kadav, M. J. Renzelmann, M. M. Swift, Tolerating Hardware Device Failures in Software, SOSP 2009 (stuck and missing interrupts)";
/// FaultVisor2: a hypervisor changes what comes back from a device.
const FAULTVISOR2: &str = "M. Misono, M. Ogino, T. Fukai, T. Shinagawa, FaultVisor2: Testing Hypervisor Device Drivers Against Real Hardware Failures, CloudCom 2018";
/// What Linux tells of a slot that is isolated: reads give all ones, writes are ignored.
const ISOLATED_SLOT: &str = "Linux, Documentation/PCI/pci-error-recovery.rst, STEP 0: Error Event";
/// The same text on what goes wrong on a bus.
const PARITY: &str =
    "Linux, Documentation/PCI/pci-error-recovery.rst (parity errors on the data buses)";

/// One way in which a device fails, as its driver sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EdgeKind {
    /// Loads give all ones.
    LoadOnes,
    /// Loads give zero.
    LoadZeroes,
    /// Loads give the value with bits flipped.
    LoadFlipped,
    /// Loads give the value with bits that are always one.
    StuckOnes,
    /// Loads give the value with bits that are always zero.
    StuckZeroes,
    /// Loads give a value of the host's choice.
    LoadValue,
    /// Stores never arrive.
    StoreLost,
    /// Stores arrive behind later accesses.
    StoreLate,
    /// Stores arrive with bits flipped.
    StoreFlipped,
    /// Interrupts never arrive.
    InterruptLost,
    /// Interrupts arrive behind later accesses and interrupts.
    InterruptLate,
    /// An interrupt that the device did not raise.
    InterruptStray,
    /// An interrupt is raised again and again.
    InterruptStorm,
    /// The device stops answering, and answers no more.
    Silent,
    /// The device is gone, with its configuration space.
    Removed,
    /// The link goes down for a while.
    LinkFlap,
}

impl EdgeKind {
    /// All kinds.
    pub const ALL: [Self; 16] = [
        Self::LoadOnes,
        Self::LoadZeroes,
        Self::LoadFlipped,
        Self::StuckOnes,
        Self::StuckZeroes,
        Self::LoadValue,
        Self::StoreLost,
        Self::StoreLate,
        Self::StoreFlipped,
        Self::InterruptLost,
        Self::InterruptLate,
        Self::InterruptStray,
        Self::InterruptStorm,
        Self::Silent,
        Self::Removed,
        Self::LinkFlap,
    ];

    /// Its name on the command line and in requests.
    pub fn name(self) -> &'static str {
        match self {
            Self::LoadOnes => "load_ones",
            Self::LoadZeroes => "load_zeroes",
            Self::LoadFlipped => "load_flipped",
            Self::StuckOnes => "stuck_ones",
            Self::StuckZeroes => "stuck_zeroes",
            Self::LoadValue => "load_value",
            Self::StoreLost => "store_lost",
            Self::StoreLate => "store_late",
            Self::StoreFlipped => "store_flipped",
            Self::InterruptLost => "interrupt_lost",
            Self::InterruptLate => "interrupt_late",
            Self::InterruptStray => "interrupt_stray",
            Self::InterruptStorm => "interrupt_storm",
            Self::Silent => "silent",
            Self::Removed => "removed",
            Self::LinkFlap => "link_flap",
        }
    }

    /// The kind of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// What it does, for a person.
    pub fn sentence(self) -> &'static str {
        match self {
            Self::LoadOnes => "A load reaches the device, and its driver is given all ones.",
            Self::LoadZeroes => "A load reaches the device, and its driver is given zero.",
            Self::LoadFlipped => "A load gives the device's value with bits flipped.",
            Self::StuckOnes => "A load gives the device's value with bits stuck at one.",
            Self::StuckZeroes => "A load gives the device's value with bits stuck at zero.",
            Self::LoadValue => {
                "A load reaches the device, and its driver is given a value of your choice."
            }
            Self::StoreLost => "A store never reaches the device.",
            Self::StoreLate => {
                "A store reaches the device only before the k-th access that follows it."
            }
            Self::StoreFlipped => "A store reaches the device with bits flipped.",
            Self::InterruptLost => {
                "An interrupt never arrives; the next one does, once the device has lowered its line."
            }
            Self::InterruptLate => {
                "An interrupt arrives at the k-th access or interrupt that follows it, if the device still raises it."
            }
            Self::InterruptStray => "An access brings an interrupt that the device did not raise.",
            Self::InterruptStorm => {
                "An interrupt is raised again at each of the next k accesses, whatever the driver does."
            }
            Self::Silent => {
                "Loads give all ones, stores are lost and there are no interrupts: at once, or from the first strike on."
            }
            Self::Removed => {
                "As silent, and configuration space reads all ones: the device was pulled out without a word."
            }
            Self::LinkFlap => "The link goes down, and is up again after k accesses.",
        }
    }

    /// Where such a failure of a device is described.
    pub fn source(self) -> &'static str {
        match self {
            Self::LoadOnes | Self::StoreLost | Self::Silent | Self::Removed => ISOLATED_SLOT,
            Self::LoadZeroes | Self::LoadValue | Self::StuckOnes | Self::StuckZeroes => FAULTVISOR2,
            Self::LoadFlipped | Self::StoreFlipped => PARITY,
            Self::StoreLate => {
                "PCI Local Bus 3.0, section 3.2.5 (transaction ordering and posting)"
            }
            Self::InterruptLost | Self::InterruptStorm => CARBURIZER,
            Self::InterruptLate => {
                "PCI Local Bus 3.0, section 2.2.6 (interrupt pins are asynchronous to the clock)"
            }
            Self::InterruptStray => "Linux, kernel/irq/spurious.c (interrupts that nobody handles)",
            Self::LinkFlap => {
                "Intel, PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual, section 13.4.2 (STATUS.LU)"
            }
        }
    }

    /// Which events of the edge it strikes at.
    pub(super) fn strikes_at(self) -> At {
        match self {
            Self::LoadOnes
            | Self::LoadZeroes
            | Self::LoadFlipped
            | Self::StuckOnes
            | Self::StuckZeroes
            | Self::LoadValue => At::Loads,
            Self::StoreLost | Self::StoreLate | Self::StoreFlipped => At::Stores,
            Self::InterruptLost | Self::InterruptLate | Self::InterruptStorm => At::Interrupts,
            Self::InterruptStray | Self::Silent | Self::Removed | Self::LinkFlap => At::Accesses,
        }
    }

    /// Whether it needs to see interrupts, which go past the edge where another process or the
    /// kernel raises them.
    pub(super) fn needs_interrupts(self) -> bool {
        self.strikes_at() == At::Interrupts || self == Self::InterruptStray
    }

    /// Whether the device stays so from the first strike on.
    pub(super) fn lasts(self) -> bool {
        matches!(self, Self::Silent | Self::Removed)
    }

    /// Whether it takes a mask of bits.
    pub fn takes_mask(self) -> bool {
        matches!(
            self,
            Self::LoadFlipped | Self::StuckOnes | Self::StuckZeroes | Self::StoreFlipped
        )
    }

    /// Over how many later accesses it goes where nobody says; `None` for a kind that is over with
    /// the access.
    pub fn default_span(self) -> Option<u32> {
        match self {
            Self::StoreLate => Some(1),
            Self::InterruptLate => Some(8),
            Self::InterruptStorm => Some(1000),
            Self::LinkFlap => Some(64),
            _ => None,
        }
    }
}

/// Events of the edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum At {
    /// Loads from base address registers' ranges.
    Loads,
    /// Stores to them.
    Stores,
    /// Both.
    Accesses,
    /// Interrupts.
    Interrupts,
}
