//! NICs as a person types them: models in this process, devices of a device host, functions of the
//! host.

use std::fmt;
use std::str::FromStr;

pub use devices::vfio::address::PciAddress;

use super::{BadValue, MacAddress, NetSpec, VmName, bad};

/// A model of NIC, of those that there are ([`devices::nic::MODELS`]).
#[derive(Debug, Clone, Copy)]
pub struct NicModel(&'static devices::nic::NicModel);

impl NicModel {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        self.0.name
    }

    /// Modules of Linux that drive it.
    pub fn drivers(self) -> &'static [&'static str] {
        self.0.drivers
    }

    /// The model.
    pub fn model(self) -> &'static devices::nic::NicModel {
        self.0
    }
}

impl Default for NicModel {
    fn default() -> Self {
        Self(&devices::nic::MODELS[0])
    }
}

impl PartialEq for NicModel {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl Eq for NicModel {}

impl FromStr for NicModel {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        match devices::nic::NicModel::from_name(text) {
            Some(model) => Ok(Self(model)),
            None => {
                let names: Vec<_> = devices::nic::MODELS
                    .iter()
                    .map(|model| model.name)
                    .collect();
                bad(format!(
                    "there is no NIC {text:?}: give {}",
                    names.join(", ")
                ))
            }
        }
    }
}

impl fmt::Display for NicModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A NIC as it is given: `WIRE[,nic=MODEL][,mac=ADDRESS]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetOption {
    /// What it is plugged into.
    pub wire: NetSpec,
    /// Which NIC, if said.
    pub nic: Option<NicModel>,
    /// Its address, if said.
    pub mac: Option<MacAddress>,
}

impl FromStr for NetOption {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let (mut wire, mut nic, mut mac) = (text, None, None);
        // From the end, because a path may have commas.
        while let Some((rest, last)) = wire.rsplit_once(',') {
            if let Some(name) = last.strip_prefix("nic=").filter(|_| nic.is_none()) {
                nic = Some(name.parse()?);
            } else if let Some(address) = last.strip_prefix("mac=").filter(|_| mac.is_none()) {
                mac = Some(address.parse()?);
            } else {
                break;
            }
            wire = rest;
        }
        let wire = wire.parse()?;
        Ok(Self { wire, nic, mac })
    }
}

impl fmt::Display for NetOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.wire)?;
        if let Some(nic) = &self.nic {
            write!(f, ",nic={nic}")?;
        }
        match &self.mac {
            Some(mac) => write!(f, ",mac={mac}"),
            None => Ok(()),
        }
    }
}

/// What a NIC of a guest is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NicSpec {
    /// A model in the VM's own process.
    Model {
        /// Which.
        model: NicModel,
        /// What it is plugged into.
        wire: NetSpec,
    },
    /// The device of the device host of this name, which several guests have in turns.
    Device(VmName),
    /// A function of the host's PCI bus, for this guest alone.
    Passthrough(PciAddress),
}

impl NicSpec {
    /// The model's name, or how the NIC is come by.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Model { model, .. } => model.name(),
            Self::Device(_) => "device",
            Self::Passthrough(_) => "vfio",
        }
    }

    /// What it is plugged into, or which one it is.
    pub fn wire(&self) -> String {
        match self {
            Self::Model { wire, .. } => wire.to_string(),
            Self::Device(host) => format!("device={host}"),
            Self::Passthrough(address) => format!("vfio={address}"),
        }
    }

    /// Modules of Linux that are known to drive it.
    pub fn drivers(&self) -> &'static [&'static str] {
        match self {
            Self::Model { model, .. } => model.drivers(),
            // Only the guest knows.
            Self::Device(_) | Self::Passthrough(_) => &[],
        }
    }
}

/// A value of `--nic`: which model NICs are where nobody says, or a NIC that is not made in the
/// VM's process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NicOption {
    /// `MODEL`
    Default(NicModel),
    /// `device=NAME[,mac=ADDRESS]`
    Device {
        /// Name of the device host.
        host: VmName,
        /// The guest's address on it, if said.
        mac: Option<MacAddress>,
    },
    /// `vfio=PCI-ADDRESS`
    Passthrough(PciAddress),
}

impl FromStr for NicOption {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        if let Some(rest) = text.strip_prefix("device=") {
            let (host, mac) = match rest.split_once(",mac=") {
                Some((host, mac)) => (host, Some(mac.parse()?)),
                None => (rest, None),
            };
            let host = host.parse()?;
            return Ok(Self::Device { host, mac });
        }
        if let Some(address) = text.strip_prefix("vfio=") {
            return match address.parse() {
                Ok(address) => Ok(Self::Passthrough(address)),
                Err(error) => bad(error.to_string()),
            };
        }
        match text.parse() {
            Ok(model) => Ok(Self::Default(model)),
            Err(BadValue(why)) => bad(format!("{why}, device=NAME or vfio=PCI-ADDRESS")),
        }
    }
}

impl fmt::Display for NicOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default(model) => write!(f, "{model}"),
            Self::Device { host, mac: None } => write!(f, "device={host}"),
            Self::Device {
                host,
                mac: Some(mac),
            } => write!(f, "device={host},mac={mac}"),
            Self::Passthrough(address) => write!(f, "vfio={address}"),
        }
    }
}
