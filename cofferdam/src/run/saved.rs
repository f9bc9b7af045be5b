//! What a VM was started with, as a snapshot keeps it, and what a VM that goes on from one is
//! started with.

use std::mem::discriminant;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use recovery::request::IsolatedModule;
use serde::{Deserialize, Serialize};
use vmm::snapshot::Manifest;

use super::nics::GuestNic;
use super::{NetConfig, RunConfig};
use crate::options::{
    DiskSpec, MacAddress, MemorySize, NetOption, NetSpec, NicOption, NicSpec, SerialSpec, VmName,
};
use crate::sandbox::MachineSandbox;

/// A VM's configuration in a snapshot. Values are written as on the command line; paths are
/// absolute.
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
    /// Absent where there is none, as in snapshots of before there was one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    mouse: bool,
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mac: Option<String>,
    /// Of a NIC of a device host: what `model` is of one in the VM's process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    device_model: Option<String>,
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
    /// The NICs that live elsewhere, all of them in their order.
    pub nics: Vec<NicOption>,
    /// Address of the first NIC.
    pub mac: Option<MacAddress>,
    /// Where the serial console goes.
    pub serial: Option<SerialSpec>,
    /// End when the guest reboots.
    pub no_reboot: bool,
}

/// The snapshot that a VM goes on from.
#[derive(Debug, Clone)]
pub struct Restored {
    /// Its directory.
    pub dir: PathBuf,
    /// Whether the guest begins before its memory is there.
    pub lazy: bool,
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
            let wire = match &net.nic {
                NicSpec::Model {
                    wire: NetSpec::Unix { path, listen },
                    ..
                } => {
                    let (path, listen) = (absolute(path)?, *listen);
                    NetSpec::Unix { path, listen }.to_string()
                }
                other => other.wire(),
            };
            Ok(SavedNic {
                model: net.nic.name().to_owned(),
                wire,
                mac: net.mac.map(|mac| mac.to_string()),
                device_model: None,
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
            mouse: config.mouse,
            memory: config.memory.to_string(),
            vcpus: config.vcpus,
            no_reboot: config.no_reboot,
            isolated: Vec::new(),
        })
    }

    /// The same with what device hosts have said of `nics`, which are in their order.
    pub fn with_models(mut self, nics: &[GuestNic]) -> Self {
        for (saved, nic) in self.nics.iter_mut().zip(nics) {
            let attachment = nic.attachment.as_ref();
            saved.device_model = attachment.and_then(|own| own.model.get().cloned());
        }
        self
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
    pub fn addresses(&self) -> anyhow::Result<Vec<Option<MacAddress>>> {
        self.nics.iter().map(SavedNic::address).collect()
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
        let on_wires = self.nics.iter().filter(|nic| nic.is_model()).count();
        for (what, option, has, gives) in [
            ("NICs", "--net", on_wires, changes.nets.len()),
            (
                "NICs that live elsewhere",
                "--nic",
                self.nics.len() - on_wires,
                changes.nics.len(),
            ),
        ] {
            ensure!(
                gives == 0 || gives == has,
                "the guest has {has} {what}, {option} gives {gives}: give all of them in their order, or none",
            );
        }
        let (mut models, mut others) = (changes.nets.into_iter(), changes.nics.into_iter());
        let mut nets: Vec<NetConfig> = Vec::new();
        for (index, saved) in self.nics.iter().enumerate() {
            let mac = changes.mac.filter(|_| index == 0);
            let clone = is_clone.then_some((&name, index));
            let net = match saved.is_model() {
                true => saved.configure(models.next(), mac, clone)?,
                false => saved.configure_elsewhere(others.next(), mac, clone)?,
            };
            if let Some(mac) = net.mac {
                ensure!(
                    nets.iter().all(|other| other.mac != net.mac),
                    "two NICs have the address {mac}",
                );
            }
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
            mouse: self.mouse,
            memory,
            large_pages: false,
            vcpus: self.vcpus,
            serial: changes.serial.unwrap_or(SerialSpec::Stdio),
            no_reboot: changes.no_reboot || self.no_reboot,
            restored: Some(from),
            sandbox: MachineSandbox::default(),
            jail: false,
            group: crate::sandbox::GroupOptions::default(),
        })
    }
}

impl SavedNic {
    fn address(&self) -> anyhow::Result<Option<MacAddress>> {
        Ok(self.mac.as_deref().map(str::parse).transpose()?)
    }

    /// Whether it is a model in the VM's process, on a wire.
    fn is_model(&self) -> bool {
        self.wire.parse::<NetSpec>().is_ok()
    }

    /// The NIC with what was given. A clone has an address of its own wherever others may be on the
    /// same wire.
    fn configure(
        &self,
        given: Option<NetOption>,
        mac: Option<MacAddress>,
        clone: Option<(&VmName, usize)>,
    ) -> anyhow::Result<NetConfig> {
        let model = self.model.parse()?;
        let saved_wire: NetSpec = self.wire.parse()?;
        let (wire, given_model, given_mac) = match given {
            Some(given) => (given.wire, given.nic, given.mac),
            None => (saved_wire.clone(), None, None),
        };
        ensure!(
            given_model.is_none_or(|given| given == model),
            "the guest's NIC is a {model}: it cannot become another one"
        );
        let own = match (clone, &wire) {
            (Some((name, index)), NetSpec::Tap(_) | NetSpec::Unix { .. }) => {
                Some(MacAddress::for_nic(name, index))
            }
            // On its built-in gateway nobody else is.
            _ => self.address()?,
        };
        Ok(NetConfig {
            is_another_wire: discriminant(&wire) != discriminant(&saved_wire),
            saved_model: None,
            nic: NicSpec::Model { model, wire },
            mac: given_mac.or(mac).or(own),
        })
    }

    /// The same for one that lives elsewhere.
    fn configure_elsewhere(
        &self,
        given: Option<NicOption>,
        mac: Option<MacAddress>,
        clone: Option<(&VmName, usize)>,
    ) -> anyhow::Result<NetConfig> {
        let saved: NicOption = self.wire.parse()?;
        let given = given.unwrap_or_else(|| saved.clone());
        let is_function = |nic: &NicOption| matches!(nic, NicOption::Passthrough(_));
        ensure!(
            is_function(&given) == is_function(&saved),
            "the guest's NIC {} cannot become another one: {given}",
            self.wire
        );
        let (nic, given_mac) = match given {
            NicOption::Device { host, mac } => (NicSpec::Device(host), mac),
            NicOption::Passthrough(address) => (NicSpec::Passthrough(address), None),
            NicOption::Default(model) => {
                bail!("the guest's NICs are what they were: {model} cannot be given to all of them")
            }
        };
        let own = match clone {
            Some((name, index)) => Some(MacAddress::for_nic(name, index)),
            None => self.address()?,
        };
        Ok(NetConfig {
            is_another_wire: false,
            saved_model: self.device_model.clone(),
            mac: match nic {
                NicSpec::Passthrough(_) => None,
                _ => given_mac.or(mac).or(own),
            },
            nic,
        })
    }
}

#[cfg(test)]
#[path = "saved_tests.rs"]
mod tests;
