//! What a lab is to be: its machine, where it lives, and how long things may take.

use std::path::PathBuf;
use std::time::Duration;

use super::channel::SILENCE_LIMIT;
use super::machine::Machine;

/// Start of QEMU to an agent that answers: 4 s on an idle host.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// The lab that `lab start` leaves running lives here, below the lab's directory.
const KEPT: &str = "kept";

/// What a lab is to be.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The server.
    pub machine: Machine,
    /// The lab's directory, `target/lab`.
    pub directory: PathBuf,
    /// Root of the workspace, visible in L1.
    pub workspace: PathBuf,
    /// Tells labs that one process has at the same time apart.
    pub number: usize,
    /// Limit for a boot.
    pub boot_limit: Duration,
    /// Silence after which the lab counts as hung.
    pub silence_limit: Duration,
}

impl Settings {
    /// The usual ones for a workspace.
    pub fn new(workspace: &crate::workspace::Workspace) -> Self {
        let images = workspace.images();
        let machine = Machine {
            qemu: std::env::var_os("COFFERDAM_LAB_QEMU")
                .map_or_else(|| "qemu-system-x86_64".into(), PathBuf::from),
            kernel: images.join("vmlinuz"),
            initrd: images.join("l1/initrd.cpio"),
            out: workspace.lab().join("out"),
            cpus: 2,
            memory_mib: 4096,
        };
        Self {
            machine,
            directory: workspace.lab(),
            workspace: workspace.root().to_owned(),
            number: 0,
            boot_limit: BOOT_LIMIT,
            silence_limit: SILENCE_LIMIT,
        }
    }

    /// Where the lab is that stays.
    pub fn kept(&self) -> PathBuf {
        self.directory.join(KEPT)
    }
}
