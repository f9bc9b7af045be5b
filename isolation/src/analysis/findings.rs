//! What is found wrong, or doubtful, in a module's code.

use serde::Serialize;

/// A kind of finding (after A. Kadav, M. J. Renzelmann, M. M. Swift, *Tolerating Hardware Device
/// Failures in Software*, SOSP 2009, section 3, which calls its tool Carburizer).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FindingKind {
    /// A loop that only a value out of a device's register ends.
    WaitsForDevice,
    /// A value that a device delivered is an index, and nothing was compared with it.
    DeviceIndex,
    /// The same as a length.
    DeviceLength,
    /// What a function returned is not looked at, though it is an error number that matters.
    ErrorIgnored,
}

impl FindingKind {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::WaitsForDevice,
        Self::DeviceIndex,
        Self::DeviceLength,
        Self::ErrorIgnored,
    ];

    /// For a person.
    pub fn words(self) -> &'static str {
        match self {
            Self::WaitsForDevice => "waits for the device without bound",
            Self::DeviceIndex => "device's value as index, unchecked",
            Self::DeviceLength => "device's value as length, unchecked",
            Self::ErrorIgnored => "error not looked at",
        }
    }
}

/// One place.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Finding {
    /// The function.
    pub function: String,
    /// Offset of the instruction in it, in bytes.
    pub offset: u64,
    /// What it is.
    pub kind: FindingKind,
    /// What is there: the instruction, where the value comes from.
    pub what: String,
}
