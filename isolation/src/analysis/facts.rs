//! What is known of functions of Linux by name, for the analysis: the reader of
//! `models/analysis.toml`.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use serde::Deserialize;

use crate::models::built_in;

/// `__GFP_DIRECT_RECLAIM` (include/linux/gfp_types.h): an allocation that may wait.
pub const MAY_RECLAIM: u64 = 0x400;

/// Structures that drivers are registered with end so (`pci_driver`, `usb_driver`,
/// `platform_driver`).
pub const DRIVER_SUFFIX: &str = "_driver";

/// All of it. Arguments are numbered from 0.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, bound(deserialize = "'de: 'static"))]
pub struct Facts {
    /// Functions that say themselves that whoever calls them may have to wait, and those that wait.
    pub sleeps: Vec<&'static str>,
    /// Functions that do not return.
    pub no_return: Vec<&'static str>,
    /// Allocators that wait only if they are asked to, with the argument that says so.
    pub allocators: BTreeMap<&'static str, usize>,
    /// Functions that return the address of a device's registers.
    pub maps_registers: Vec<&'static str>,
    /// Functions that return an array of such addresses.
    pub maps_arrays: Vec<&'static str>,
    /// Functions that return memory that a device writes as well.
    pub shares_memory: Vec<&'static str>,
    /// Functions that return what a register of a device holds, and its bits.
    pub reads_register: BTreeMap<&'static str, u8>,
    /// Functions that take a length of what is there already, with the argument.
    pub takes_length: BTreeMap<&'static str, usize>,
    /// Functions that allocate a structure of the kernel's with private data behind it.
    pub allocates_private: BTreeMap<&'static str, PrivateData>,
    /// Functions that return zeroed memory of a size that an argument says.
    pub allocates: BTreeMap<&'static str, usize>,
    /// Functions that register another one to be called.
    pub registers: BTreeMap<&'static str, Registered>,
    /// Functions whose errors say that something is not as the driver takes it to be from there on:
    /// a device that is not enabled, a transfer that was not started, an interface that is not
    /// there.
    pub errors_matter: Vec<&'static str>,
    /// Members of a table or of a driver that are called before the device loses power.
    pub suspends: Vec<&'static str>,
    /// Those that are called after.
    pub resumes: Vec<&'static str>,
}

/// A structure with private data behind it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrivateData {
    /// The structure.
    pub structure: &'static str,
    /// The argument that is the private data's size.
    pub size: usize,
}

/// A function that will be called.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registered {
    /// The argument that is the function.
    pub function: usize,
    /// The argument that is handed to it.
    pub handed: usize,
    /// Which parameter of it that becomes.
    pub parameter: usize,
}

/// That of Linux.
pub static LINUX: LazyLock<Facts> =
    LazyLock::new(|| built_in(include_str!("../../models/analysis.toml")));
