//! Why a function cannot be given to a guest.

use std::io;

use super::address::{AddressError, PciAddress};
use super::binding::BindError;
use crate::pci::config::ConfigError;

/// See the module's text. Each message says what to do about it, if anything can be done.
#[derive(Debug, thiserror::Error)]
pub enum VfioError {
    /// The address is none.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// There is no such function, or no IOMMU.
    #[error(transparent)]
    Binding(#[from] BindError),
    /// The host uses it itself.
    #[error(
        "{address} has {driver}, not vfio-pci: give it to guests by `cofferdam device bind {address}`"
    )]
    WrongDriver {
        /// The function.
        address: PciAddress,
        /// Its driver, in words.
        driver: String,
    },
    /// A file of VFIO's is not this user's.
    #[error("no right to open {0}: run as root, or give yourself the file by `chown`")]
    Rights(String),
    /// There is no VFIO.
    #[error("cannot open /dev/vfio/vfio ({0}): `modprobe vfio-pci`")]
    NoVfio(io::Error),
    /// The kernel has no IOMMU of type 1.
    #[error("the host's kernel has no VFIO for this IOMMU: `modprobe vfio_iommu_type1`")]
    NoType1,
    /// Somebody else has it.
    #[error("{0} is in use by another guest or program, which has /dev/vfio/{1} open")]
    Busy(PciAddress, u32),
    /// Others of its group are the host's.
    #[error(
        "{address} cannot be told from {others} by the IOMMU (group {group}): these must be given away, or have no \
         driver, too"
    )]
    NotViable {
        /// The function.
        address: PciAddress,
        /// Its IOMMU group.
        group: u32,
        /// The others, with their drivers.
        others: String,
    },
    /// Guest memory stays in place while a function may reach it, and the user may not have so
    /// much.
    #[error(
        "a guest with such a device has all of its memory locked: this needs a limit of {} KiB at least and it is {} \
         KiB; raise it by `ulimit -l`, or run with the capability CAP_IPC_LOCK",
        .needed.div_ceil(1024), .limit / 1024
    )]
    LockedMemory {
        /// Bytes that are needed.
        needed: u64,
        /// Bytes that are allowed.
        limit: u64,
    },
    /// The memory's bytes are in a template's file.
    #[error(
        "the guest's memory is shared with other guests (--lazy), where no device may reach it: start without --lazy"
    )]
    SharedMemory,
    /// The function is not one that can be passed on.
    #[error("{0} cannot be given to a guest: {1}")]
    Unfit(PciAddress, &'static str),
    /// Its configuration space cannot be shown to a guest.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// There are not enough vectors, or no line.
    #[error("the device gets no interrupts: {0}")]
    Interrupts(String),
    /// Anything else.
    #[error("cannot {what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

impl VfioError {
    /// The group of `address` cannot be used: of `others` in it, each with its driver, the host has
    /// drivers.
    pub(super) fn not_viable(address: PciAddress, group: u32, others: &[(String, String)]) -> Self {
        let others: Vec<_> = others
            .iter()
            .map(|(other, driver)| format!("{other} ({driver})"))
            .collect();
        Self::NotViable {
            address,
            group,
            // Their driver may just have let go of them.
            others: match others.is_empty() {
                true => "another function".to_owned(),
                false => others.join(", "),
            },
        }
    }

    /// Makes a [`VfioError::Host`].
    pub(super) fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}
