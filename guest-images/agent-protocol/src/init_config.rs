//! What an image tells its own `/init`: the file [`PATH`] in the initramfs.
//!
//! The agent is `/init` of every image. What an image is for (a guest, the lab's emulated server)
//! is not compiled in but written here by the image builder.

use serde::{Deserialize, Serialize};

/// Where the file is in the initramfs.
pub const PATH: &str = "/etc/cofferdam/init.json";

/// What `/init` does after it has said that it runs. An image without the file gets the default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct InitConfig {
    /// Modules to load, by name, in this order; what they depend on is loaded before.
    pub modules: Vec<BootModule>,
    /// File systems to mount after that, in this order. `/proc`, `/sys`, `/dev`, `/run` and `/tmp`
    /// are always there.
    pub mounts: Vec<Mount>,
    /// A shell on the console. Its end powers the machine off. The command line's
    /// `cofferdam.shell=` has the last word.
    pub shell: bool,
    /// Serve the agent's channel.
    pub serve: bool,
    /// Make KVM virtual machines and keep them, after the modules: then the kernel never changes
    /// its own code when the first machine comes or the last one goes.
    pub keep_machines: bool,
}

/// A module to load at boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootModule {
    /// Its name.
    pub name: String,
    /// Its parameters.
    #[serde(default)]
    pub params: String,
    /// The boot goes on without it: no hardware for it, for example.
    #[serde(default)]
    pub optional: bool,
}

impl BootModule {
    /// A module that must be there, with no parameters.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            params: String::new(),
            optional: false,
        }
    }

    /// A module that may fail to load.
    pub fn optional(name: impl Into<String>) -> Self {
        Self {
            optional: true,
            ..Self::new(name)
        }
    }

    /// With parameters, as on a command line.
    pub fn params(self, params: impl Into<String>) -> Self {
        Self {
            params: params.into(),
            ..self
        }
    }
}

/// A file system to mount at boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Device, mount tag or directory.
    pub source: String,
    /// Directory, made if it is not there.
    pub target: String,
    /// Type, such as `9p`; `bind` for a bind mount (with all that is mounted below).
    pub fstype: String,
    /// Options of the file system, such as `trans=virtio,version=9p2000.L`.
    #[serde(default)]
    pub options: String,
    /// Nothing can be written.
    #[serde(default)]
    pub read_only: bool,
    /// The boot goes on without it.
    #[serde(default)]
    pub optional: bool,
}
