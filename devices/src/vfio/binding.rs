//! Which driver of the host has a PCI function, and giving it to `vfio-pci` or back, by sysfs
//! (Linux, Documentation/ABI/testing/sysfs-bus-pci).
//!
//! Nothing is remembered: `driver_override` says that only `vfio-pci` may have the function, and
//! without it the host's drivers look at it anew.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use super::address::PciAddress;

/// The driver that gives functions away.
pub const DRIVER: &str = "vfio-pci";

/// Depth below a function's folder at which its network interfaces are looked for: virtio and USB
/// have one in between.
const INTERFACE_DEPTH: usize = 3;
/// Base classes (PCI Code and ID Assignment, section 1).
const CLASS_STORAGE: u8 = 0x01;
const CLASS_BRIDGE: u8 = 0x06;
/// Flag of an interface that is up (`IFF_UP`).
const INTERFACE_UP: u32 = 1;

/// Why a function is not given to another driver.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// There is none at the address.
    #[error("there is no PCI function {0}; `ls /sys/bus/pci/devices` shows those that there are")]
    NoFunction(PciAddress),
    /// The host has no IOMMU, or it is off.
    #[error(
        "{0} is behind no IOMMU, without which it would reach all memory: switch the IOMMU on in the firmware, and \
         on Intel give the host's kernel intel_iommu=on"
    )]
    NoIommu(PciAddress),
    /// A bridge cannot be given away.
    #[error("{0} is a bridge, which cannot be given to a guest")]
    Bridge(PciAddress),
    /// The module is not there.
    #[error("the host has no driver vfio-pci: `modprobe vfio-pci`")]
    NoDriver,
    /// Something of the host uses it.
    #[error("{address} is in use ({by}); --force takes it all the same")]
    InUse {
        /// The function.
        address: PciAddress,
        /// What uses it.
        by: String,
    },
    /// A guest or another program has it.
    #[error("{0} is in use through /dev/vfio/{1}: end the guest that has it first")]
    Given(PciAddress, u32),
    /// It has another driver already.
    #[error("{address} is not bound to vfio-pci but to {driver}: there is nothing to undo")]
    NotBound {
        /// The function.
        address: PciAddress,
        /// Its driver.
        driver: String,
    },
    /// The driver does not take it.
    #[error("vfio-pci does not take {0}; `dmesg` may say why")]
    Declined(PciAddress),
    /// Not privileged.
    #[error("no right to change the driver of {0}: this needs root")]
    Rights(PciAddress),
    /// Anything else.
    #[error("{what} {}: {source}", .path.display())]
    Host {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

/// What changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rebound {
    /// The driver before.
    pub from: Option<String>,
    /// The driver now.
    pub to: Option<String>,
    /// IOMMU group of the function, if it is in one.
    pub group: Option<u32>,
}

/// The host's view of its devices.
#[derive(Debug, Clone)]
pub struct Sysfs {
    root: PathBuf,
    groups: PathBuf,
}

impl Default for Sysfs {
    /// That of this host.
    fn default() -> Self {
        Self {
            root: "/sys".into(),
            groups: "/dev/vfio".into(),
        }
    }
}

impl Sysfs {
    /// The folder of a function.
    ///
    /// # Errors
    /// There is no such function.
    fn folder(&self, address: PciAddress) -> Result<PathBuf, BindError> {
        let folder = self.root.join("bus/pci/devices").join(address.to_string());
        match folder.join("class").exists() {
            true => Ok(folder),
            false => Err(BindError::NoFunction(address)),
        }
    }

    /// The driver that has the function.
    ///
    /// # Errors
    /// There is no such function.
    pub fn driver(&self, address: PciAddress) -> Result<Option<String>, BindError> {
        Ok(link_name(&self.folder(address)?.join("driver")))
    }

    /// The IOMMU group that the function is in.
    ///
    /// # Errors
    /// There is no such function, or it is in none.
    pub fn group(&self, address: PciAddress) -> Result<u32, BindError> {
        let link = self.folder(address)?.join("iommu_group");
        link_name(&link)
            .and_then(|name| name.parse().ok())
            .ok_or(BindError::NoIommu(address))
    }

    /// The other functions of a group that a driver other than `vfio-pci` has, with that.
    pub fn others_of_group(&self, group: u32, address: PciAddress) -> Vec<(String, String)> {
        let folder = self
            .root
            .join(format!("kernel/iommu_groups/{group}/devices"));
        let own = address.to_string();
        let mut others: Vec<_> = entries(&folder)
            .into_iter()
            .filter_map(|name| {
                let driver = link_name(&folder.join(&name).join("driver"))?;
                (name != own && driver != DRIVER).then_some((name, driver))
            })
            .collect();
        others.sort();
        others
    }

    /// Gives the function to `vfio-pci`. One that is in use is refused unless `force` is given.
    ///
    /// # Errors
    /// It cannot be given away; its driver has it as before then, unless that does not take it
    /// back.
    pub fn bind(&self, address: PciAddress, force: bool) -> Result<Rebound, BindError> {
        let folder = self.folder(address)?;
        let class = class_of(&folder);
        if class == Some(CLASS_BRIDGE) {
            return Err(BindError::Bridge(address));
        }
        let group = self.group(address)?;
        let from = self.driver(address)?;
        let rebound = |to| Rebound {
            from: from.clone(),
            to,
            group: Some(group),
        };
        if from.as_deref() == Some(DRIVER) {
            return Ok(rebound(from.clone()));
        }
        if !self.root.join("bus/pci/drivers").join(DRIVER).exists() {
            return Err(BindError::NoDriver);
        }
        if !force
            && from.is_some()
            && let Some(by) = self.user(&folder, class)
        {
            return Err(BindError::InUse { address, by });
        }
        self.change_driver(address, &folder, DRIVER)?;
        let to = self.driver(address)?;
        if to.as_deref() != Some(DRIVER) {
            // As it was.
            self.change_driver(address, &folder, "")?;
            return Err(BindError::Declined(address));
        }
        Ok(rebound(to))
    }

    /// Gives the function back to the host's drivers. While somebody has it through VFIO it is
    /// refused unless `force` is given; with that the kernel waits until it is let go.
    ///
    /// # Errors
    /// `vfio-pci` has not got it, or keeps it.
    pub fn unbind(&self, address: PciAddress, force: bool) -> Result<Rebound, BindError> {
        let folder = self.folder(address)?;
        let from = self.driver(address)?;
        if from.as_deref() != Some(DRIVER) {
            return Err(BindError::NotBound {
                address,
                driver: from.unwrap_or_else(|| "no driver".into()),
            });
        }
        let group = self.group(address).ok();
        if let Some(group) = group
            && !force
            && self.is_given(group)
        {
            return Err(BindError::Given(address, group));
        }
        self.change_driver(address, &folder, "")?;
        let to = self.driver(address)?;
        Ok(Rebound { from, to, group })
    }

    /// Whether somebody has the group open: only one may.
    fn is_given(&self, group: u32) -> bool {
        let file = self.groups.join(group.to_string());
        let opened = fs::OpenOptions::new().read(true).write(true).open(file);
        opened.is_err_and(|error| error.kind() == ErrorKind::ResourceBusy)
    }

    /// Takes the function from its driver and has those probe it that `only` allows: all, if it is
    /// empty.
    fn change_driver(
        &self,
        address: PciAddress,
        folder: &Path,
        only: &str,
    ) -> Result<(), BindError> {
        let name = address.to_string();
        let line = format!("{only}\n");
        write(address, &folder.join("driver_override"), &line)?;
        let unbind = folder.join("driver/unbind");
        if unbind.exists() {
            write(address, &unbind, &name)?;
        }
        let probe = self.root.join("bus/pci/drivers_probe");
        match write(address, &probe, &name) {
            // What a driver says that does not take it.
            Err(BindError::Host { source, .. }) => {
                tracing::debug!(%address, %source, "no driver took the function");
                Ok(())
            }
            result => result,
        }
    }

    /// What of the host uses the function, as far as can be seen.
    fn user(&self, folder: &Path, class: Option<u8>) -> Option<String> {
        if class == Some(CLASS_STORAGE) {
            return Some("a storage controller, whose disks may be mounted".into());
        }
        let mut interfaces = interfaces_below(folder, INTERFACE_DEPTH);
        interfaces.sort();
        let up = interfaces.into_iter().find(|name| {
            let flags = self.root.join("class/net").join(name).join("flags");
            let flags = number_in(&flags).unwrap_or(0);
            flags & INTERFACE_UP != 0
        })?;
        Some(format!("interface {up} is up"))
    }
}

/// Base class of the function in `folder`.
fn class_of(folder: &Path) -> Option<u8> {
    u8::try_from(number_in(&folder.join("class"))? >> 16).ok()
}

/// A file that holds a number such as `0x1003`.
fn number_in(file: &Path) -> Option<u32> {
    let text = fs::read_to_string(file).ok()?;
    u32::from_str_radix(text.trim().strip_prefix("0x")?, 16).ok()
}

/// The last part of what a link leads to.
fn link_name(link: &Path) -> Option<String> {
    let target = fs::read_link(link).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}

/// Names in a folder; none if it cannot be read.
fn entries(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.collect()
}

/// Names of the network interfaces of the device in `folder` and of those below it. Links lead
/// elsewhere.
fn interfaces_below(folder: &Path, depth: usize) -> Vec<String> {
    let mut found = entries(&folder.join("net"));
    if depth == 0 {
        return found;
    }
    for name in entries(folder) {
        let below = folder.join(&name);
        let is_folder = fs::symlink_metadata(&below).is_ok_and(|data| data.is_dir());
        if is_folder && name != "net" {
            found.extend(interfaces_below(&below, depth - 1));
        }
    }
    found
}

fn write(address: PciAddress, path: &Path, text: &str) -> Result<(), BindError> {
    // Not created: what is not there is not to be there afterwards.
    let result = fs::OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| io::Write::write_all(&mut file, text.as_bytes()));
    result.map_err(|source| match source.kind() {
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => BindError::Rights(address),
        _ => BindError::Host {
            what: "cannot write",
            path: path.to_owned(),
            source,
        },
    })
}

#[cfg(test)]
mod tests;
