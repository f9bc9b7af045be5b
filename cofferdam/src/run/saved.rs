//! What a VM was started with, as a snapshot keeps it, and what a VM that goes on from one is started with.

use std::mem::discriminant;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use recovery::request::IsolatedModule;
use serde::{Deserialize, Serialize};
use vmm::snapshot::Manifest;

use super::{NetConfig, Restored, RunConfig};
use crate::options::{DiskSpec, MacAddress, MemorySize, NetOption, NetSpec, SerialSpec, VmName};

/// A VM's configuration in a snapshot. Values are written as on the command line; paths are absolute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedVm {
    name: String,
    kernel: PathBuf,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    initrd: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cmdline: Option<String>,
    append: Vec<String>,
    disks: Vec<String>,
    nics: Vec<SavedNic>,
    memory: String,
    vcpus: u8,
    no_reboot: bool,
    /// What was isolated in the guest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    isolated: Vec<IsolatedModule>,
}

/// A NIC of a [`SavedVm`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedNic {
    model: String,
    wire: String,
    mac: String,
}

/// What a VM that goes on from a snapshot has otherwise than the one that it was taken of.
#[derive(Debug, Clone, Default)]
pub struct Changes {
    /// Its name.
    pub name: Option<VmName>,
    /// The kernel that a reset boots.
    pub kernel: Option<PathBuf>,
    /// Its initial RAM file system.
    pub initrd: Option<PathBuf>,
    /// The disks, all of them in their order.
    pub disks: Vec<DiskSpec>,
    /// What the NICs are plugged into, all of them in their order.
    pub nets: Vec<NetOption>,
    /// Address of the first NIC.
    pub mac: Option<MacAddress>,
    /// Where the serial console goes.
    pub serial: Option<SerialSpec>,
    /// End when the guest reboots.
    pub no_reboot: bool,
}

impl SavedVm {
    /// What `config` says.
    ///
    /// # Errors
    /// The folder that relative paths start from is gone.
    pub fn new(config: &RunConfig) -> anyhow::Result<Self> {
        let absolute = |path: &Path| {
            std::path::absolute(path)
                .with_context(|| format!("{} is not to be found", path.display()))
        };
        let disk = |disk: &DiskSpec| -> anyhow::Result<String> {
            let path = absolute(&disk.path)?;
            Ok(DiskSpec { path, ..*disk }.to_string())
        };
        let nic = |net: &NetConfig| -> anyhow::Result<SavedNic> {
            let wire = match &net.wire {
                NetSpec::Unix { path, listen } => NetSpec::Unix {
                    path: absolute(path)?,
                    listen: *listen,
                },
                other => other.clone(),
            };
            Ok(SavedNic {
                model: net.nic.name().to_owned(),
                wire: wire.to_string(),
                mac: net.mac.to_string(),
            })
        };
        Ok(Self {
            name: config.name.to_string(),
            kernel: absolute(&config.kernel)?,
            initrd: config.initrd.as_deref().map(absolute).transpose()?,
            cmdline: config.cmdline.clone(),
            append: config.append.clone(),
            disks: config.disks.iter().map(disk).collect::<Result<_, _>>()?,
            nics: config.nets.iter().map(nic).collect::<Result<_, _>>()?,
            memory: config.memory.to_string(),
            vcpus: config.vcpus,
            no_reboot: config.no_reboot,
            isolated: Vec::new(),
        })
    }

    /// The same with `isolated` in the guest.
    pub fn with_isolated(&self, isolated: Vec<IsolatedModule>) -> Self {
        Self {
            isolated,
            ..self.clone()
        }
    }

    /// What was isolated in the guest.
    pub fn isolated(&self) -> &[IsolatedModule] {
        &self.isolated
    }

    /// What the snapshot says.
    ///
    /// # Errors
    /// It was written by another program, or does not agree with itself.
    pub fn of(manifest: &Manifest) -> anyhow::Result<Self> {
        let saved: Self = serde_json::from_value(manifest.vm.clone())
            .context("the snapshot's manifest does not say what VM it is of")?;
        ensure!(
            saved.vcpus == manifest.vcpus && saved.memory()?.bytes() == manifest.memory_bytes,
            "the snapshot's manifest says two things about its VM"
        );
        Ok(saved)
    }

    /// Addresses of its NICs.
    ///
    /// # Errors
    /// One is none.
    pub fn addresses(&self) -> anyhow::Result<Vec<MacAddress>> {
        let parsed = self.nics.iter().map(|nic| Ok(nic.mac.parse()?));
        parsed.collect()
    }

    fn memory(&self) -> anyhow::Result<MemorySize> {
        Ok(self.memory.parse()?)
    }

    /// The configuration of a VM that goes on as `from` says, with these changes.
    ///
    /// # Errors
    /// There are other NICs or disks than the guest knows.
    pub fn configure(self, changes: Changes, from: Restored) -> anyhow::Result<RunConfig> {
        let saved_name: VmName = self.name.parse()?;
        let memory = self.memory()?;
        let name = changes.name.unwrap_or_else(|| saved_name.clone());
        let is_clone = name != saved_name;
        let disks = match changes.disks.as_slice() {
            [] => self
                .disks
                .iter()
                .map(|disk| disk.parse())
                .collect::<Result<_, _>>()?,
            given => given.to_vec(),
        };
        ensure!(
            disks.len() == self.disks.len(),
            "the guest has {} disks, --disk gives {}: give all of them in their order, or none",
            self.disks.len(),
            disks.len()
        );
        ensure!(
            changes.nets.is_empty() || changes.nets.len() == self.nics.len(),
            "the guest has {} NICs, --net gives {}: give all of them in their order, or none",
            self.nics.len(),
            changes.nets.len()
        );
        let mut given = changes.nets.into_iter();
        let mut nets: Vec<NetConfig> = Vec::new();
        for (index, saved) in self.nics.iter().enumerate() {
            let given = given.next();
            let mac = changes.mac.filter(|_| index == 0);
            let net = saved.configure(given, mac, is_clone.then_some((&name, index)))?;
            ensure!(
                nets.iter().all(|other| other.mac != net.mac),
                "two NICs have the address {}",
                net.mac
            );
            nets.push(net);
        }
        Ok(RunConfig {
            name,
            kernel: changes.kernel.unwrap_or(self.kernel),
            initrd: changes.initrd.or(self.initrd),
            cmdline: self.cmdline,
            append: self.append,
            disks,
            nets,
            memory,
            vcpus: self.vcpus,
            serial: changes.serial.unwrap_or(SerialSpec::Stdio),
            no_reboot: changes.no_reboot || self.no_reboot,
            restored: Some(from),
        })
    }
}

impl SavedNic {
    /// The NIC with what was given. A clone has an address of its own wherever others may be on the same wire.
    fn configure(
        &self,
        given: Option<NetOption>,
        mac: Option<MacAddress>,
        clone: Option<(&VmName, usize)>,
    ) -> anyhow::Result<NetConfig> {
        let nic = self.model.parse()?;
        let saved_wire: NetSpec = self.wire.parse()?;
        let (wire, given_model, given_mac) = match given {
            Some(given) => (given.wire, given.nic, given.mac),
            None => (saved_wire.clone(), None, None),
        };
        ensure!(
            given_model.is_none_or(|model| model == nic),
            "the guest's NIC is a {nic}: it cannot become another one"
        );
        let saved: MacAddress = self.mac.parse()?;
        let own = match (clone, &wire) {
            (Some((name, index)), NetSpec::Tap(_) | NetSpec::Unix { .. }) => {
                MacAddress::for_nic(name, index)
            }
            // On its built-in gateway nobody else is.
            _ => saved,
        };
        Ok(NetConfig {
            is_another_wire: discriminant(&wire) != discriminant(&saved_wire),
            wire,
            nic,
            mac: given_mac.or(mac).unwrap_or(own),
        })
    }
}

#[cfg(test)]
#[path = "saved_tests.rs"]
mod tests;
