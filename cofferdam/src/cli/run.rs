//! `run`: its options.

use std::path::PathBuf;

use crate::options::{DiskSpec, MacAddress, MemorySize, NetSpec, NicModel, SerialSpec, VmName};
use crate::run::{MAX_VCPUS, RunConfig};

use super::Ending;

/// `run`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
In a terminal every key goes to the guest, Ctrl-C too. Ctrl-A x ends the guest, Ctrl-A r resets it,
Ctrl-A h shows the rest. SIGINT and SIGTERM from outside end it as well.

Examples:
  cofferdam run --kernel target/images/vmlinux --initrd target/images/initrd.cpio --net user
  cofferdam run --kernel vmlinuz --disk root.img --append 'root=/dev/vda' --memory 1G --vcpus 4
  cofferdam run --kernel vmlinux --initrd initrd.cpio --serial file=console.log --name web &

Two guests on one cable:
  cofferdam run --name left  ... --net unix=/tmp/cable,listen
  cofferdam run --name right ... --net unix=/tmp/cable")]
pub struct RunOptions {
    /// Kernel: ELF vmlinux (starts fastest) or bzImage
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Initial RAM file system
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Whole kernel command line, instead of the default one
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// More for the kernel command line, after the rest
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    append: Vec<String>,
    /// Disk image: PATH, or PATH,ro to let the guest only read it (may be given again)
    #[arg(long, value_name = "PATH[,ro]")]
    disk: Vec<DiskSpec>,
    /// What the NIC is plugged into: user (built-in gateway, needs no rights), tap=NAME or
    /// unix=PATH[,listen]; no NIC without it
    #[arg(long, value_name = "WIRE")]
    net: Option<NetSpec>,
    /// Which NIC
    #[arg(long, value_enum, default_value_t = NicModel::E1000, requires = "net")]
    nic: NicModel,
    /// Ethernet address of the NIC; made from the VM's name when not given
    #[arg(long, value_name = "ADDRESS", requires = "net")]
    mac: Option<MacAddress>,
    /// Guest memory
    #[arg(long, value_name = "SIZE", default_value = "256M")]
    memory: MemorySize,
    /// Number of vCPUs
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_VCPUS))
    )]
    vcpus: u8,
    /// Name of the VM for the other commands; vm-PID when not given
    #[arg(long, value_name = "NAME")]
    name: Option<VmName>,
    /// Serial console: stdio, file=PATH or unix=PATH
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    serial: SerialSpec,
    /// End when the guest reboots, instead of rebooting it
    #[arg(long)]
    no_reboot: bool,
}

impl RunOptions {
    /// `run`
    pub fn run(self) -> anyhow::Result<Ending> {
        let name = match self.name {
            Some(name) => name,
            None => format!("vm-{}", std::process::id()).parse()?,
        };
        let mac = self
            .mac
            .unwrap_or_else(|| MacAddress::for_name(name.as_str()));
        crate::run::run(RunConfig {
            name,
            kernel: self.kernel,
            initrd: self.initrd,
            cmdline: self.cmdline,
            append: self.append,
            disks: self.disk,
            net: self.net.map(|wire| crate::run::NetConfig {
                wire,
                nic: self.nic,
                mac,
            }),
            memory: self.memory,
            vcpus: self.vcpus,
            serial: self.serial,
            no_reboot: self.no_reboot,
        })
    }
}
