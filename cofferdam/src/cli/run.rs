//! `run`: its options.

use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use vmm::snapshot::Manifest;

use crate::options::{
    DiskSpec, MacAddress, MemorySize, NetOption, NicOption, NicSpec, SerialSpec, VmName,
};
use crate::run::saved::{Changes, SavedVm};
use crate::run::{MAX_NICS, MAX_VCPUS, NetConfig, Restored, RunConfig};
use crate::sandbox::{GroupOptions, MachineSandbox};

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

  cofferdam run --snapshot DIR
  cofferdam run --config web.toml --name web

Two NICs:
  cofferdam run --kernel vmlinux --initrd initrd.cpio --net user --net tap=tap0,nic=virtio

Two guests on one cable:
  cofferdam run --name left  ... --net unix=/tmp/cable,listen
  cofferdam run --name right ... --net unix=/tmp/cable

Two copies of one guest:
  cofferdam run --snapshot DIR --lazy --name one --serial file=one.log &
  cofferdam run --snapshot DIR --lazy --name two --serial file=two.log &")]
pub struct RunOptions {
    /// Kernel: ELF vmlinux (starts fastest) or bzImage
    #[arg(
        long,
        value_name = "FILE",
        required_unless_present_any = ["snapshot", "config"]
    )]
    kernel: Option<PathBuf>,
    /// Initial RAM file system
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Whole kernel command line, instead of the default one
    #[arg(
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        conflicts_with = "snapshot"
    )]
    cmdline: Option<String>,
    /// More for the kernel command line, after the rest
    #[arg(
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        conflicts_with = "snapshot"
    )]
    append: Vec<String>,
    /// Disk image: PATH, or PATH,ro to let the guest only read it (may be given again)
    #[arg(long, value_name = "PATH[,ro]")]
    disk: Vec<DiskSpec>,
    /// A NIC and what it is plugged into: user (built-in gateway, needs no rights), tap=NAME or
    /// unix=PATH[,listen]; no NIC without it (may be given again)
    #[arg(long, value_name = "WIRE[,nic=MODEL][,mac=ADDRESS]")]
    net: Vec<NetOption>,
    /// Which NIC, where --net does not say: e1000 (when not given) or virtio. Or a NIC that needs
    /// no --net: device=NAME[,mac=ADDRESS], which this guest shares with others (see
    /// `cofferdam device`), or vfio=ADDRESS, a function of the host's PCI bus (may be given again)
    #[arg(long, value_name = "NIC")]
    nic: Vec<NicOption>,
    /// Ethernet address of the first NIC, where --net does not say; made from the VM's name when
    /// not given
    #[arg(long, value_name = "ADDRESS")]
    mac: Option<MacAddress>,
    /// A PS/2 mouse behind a keyboard controller: `cofferdam mouse` moves it
    #[arg(long, conflicts_with = "snapshot")]
    mouse: bool,
    /// Guest memory
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "256M",
        conflicts_with = "snapshot"
    )]
    memory: MemorySize,
    /// Have guest memory in pages of 2 MiB that the host has set aside (vm.nr_hugepages): a device
    /// that is passed on gets it sooner. Such a guest cannot be isolated, marked or saved
    #[arg(long, conflicts_with = "snapshot")]
    large_pages: bool,
    /// Number of vCPUs
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        conflicts_with = "snapshot",
        value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_VCPUS))
    )]
    vcpus: u8,
    /// Name of the VM for the other commands; vm-PID when not given
    #[arg(long, value_name = "NAME")]
    name: Option<VmName>,
    /// Serial console: stdio (when not given), file=PATH, unix=PATH, or control: read and typed
    /// into through the service only
    #[arg(long, value_name = "WHERE")]
    serial: Option<SerialSpec>,
    /// End when the guest reboots, instead of rebooting it
    #[arg(long)]
    no_reboot: bool,
    /// Go on from the snapshot in this directory instead of booting. NICs, disks and the kernel for
    /// a reset are those of the snapshot, unless they are given: all NICs, all disks, in their
    /// order
    #[arg(long, value_name = "DIR")]
    snapshot: Option<PathBuf>,
    /// With --snapshot: begin before the memory is there, and share what is not written with other
    /// VMs that do so. The memory's checksums are not looked at then
    #[arg(long, requires = "snapshot")]
    lazy: bool,
    /// Take options from this file, in TOML: each by its name without dashes before it (memory =
    /// "1G", net = ["user"], no-reboot = true). Those that are given here as well take the place of
    /// the file's
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    sandbox: MachineSandbox,
    /// Put this process into a jail: user and mount namespaces in which it has no rights over
    /// anything outside, and no files but those that are open, its runtime folder and those of
    /// --allow-dir. TAPs and files are opened with its user's rights alone
    #[arg(long)]
    jail: bool,
    #[command(flatten)]
    group: GroupOptions,
}

impl RunOptions {
    /// `run`
    pub fn run(self) -> anyhow::Result<Ending> {
        let options = match &self.config {
            Some(file) => super::run_file::with_file(file)?,
            None => self,
        };
        let config = match options.snapshot.clone() {
            Some(dir) => options.restored(dir)?,
            None => options.fresh()?,
        };
        crate::run::run(config)
    }

    /// A VM that boots.
    fn fresh(self) -> anyhow::Result<RunConfig> {
        let name = match self.name {
            Some(name) => name,
            None => format!("vm-{}", std::process::id()).parse()?,
        };
        ensure!(
            self.mac.is_none() || !self.net.is_empty(),
            "--mac is the address of a NIC: give --net too, see --help"
        );
        let nets = nets(&name, self.net, self.nic, self.mac)?;
        ensure!(
            nets.len() <= MAX_NICS,
            "a VM has at most {MAX_NICS} NICs: give --net and --nic less often"
        );
        Ok(RunConfig {
            name,
            kernel: self.kernel.context("there is no kernel: give --kernel")?,
            initrd: self.initrd,
            cmdline: self.cmdline,
            append: self.append,
            disks: self.disk,
            nets,
            mouse: self.mouse,
            memory: self.memory,
            large_pages: self.large_pages,
            vcpus: self.vcpus,
            serial: self.serial.unwrap_or(SerialSpec::Stdio),
            no_reboot: self.no_reboot,
            restored: None,
            sandbox: self.sandbox,
            jail: self.jail,
            group: self.group,
        })
    }

    /// A VM that goes on from the snapshot in `dir`.
    fn restored(self, dir: PathBuf) -> anyhow::Result<RunConfig> {
        // The rest of it is looked at when the VM is made.
        let manifest = Manifest::read(&dir)?;
        let changes = Changes {
            name: self.name,
            kernel: self.kernel,
            initrd: self.initrd,
            disks: self.disk,
            nets: self.net,
            nics: self.nic,
            mac: self.mac,
            serial: self.serial,
            no_reboot: self.no_reboot,
        };
        let lazy = self.lazy;
        let saved = SavedVm::of(&manifest)?;
        let config = saved.configure(changes, Restored { dir, lazy })?;
        Ok(RunConfig {
            sandbox: self.sandbox,
            jail: self.jail,
            group: self.group,
            ..config
        })
    }
}

/// The NICs of the VM `name`: those of `--net`, then those of `--nic`. Addresses that nobody gave
/// follow from the VM's name and the NIC's number.
fn nets(
    name: &VmName,
    given: Vec<NetOption>,
    nics: Vec<NicOption>,
    mac: Option<MacAddress>,
) -> anyhow::Result<Vec<NetConfig>> {
    let (mut default, mut others) = (None, Vec::new());
    for nic in nics {
        match nic {
            NicOption::Default(model) => {
                ensure!(
                    !given.is_empty(),
                    "--nic {model} says which NICs those of --net are: give --net too, see --help"
                );
                ensure!(
                    default.replace(model).is_none(),
                    "--nic says twice which NICs those of --net are: use --net WIRE,nic=MODEL"
                );
            }
            NicOption::Device { host, mac } => others.push((NicSpec::Device(host), mac)),
            NicOption::Passthrough(address) => others.push((NicSpec::Passthrough(address), None)),
        }
    }
    let models = given.into_iter().map(|net| {
        let model = net.nic.or(default).unwrap_or_default();
        (
            NicSpec::Model {
                model,
                wire: net.wire,
            },
            net.mac,
        )
    });
    let mut nets: Vec<NetConfig> = Vec::new();
    for (index, (nic, own)) in models.chain(others).enumerate() {
        let own = own.or(mac.filter(|_| index == 0));
        let mac = match nic {
            NicSpec::Passthrough(_) => None,
            _ => Some(own.unwrap_or_else(|| MacAddress::for_nic(name, index))),
        };
        for other in &nets {
            if let Some(mac) = mac.filter(|mac| other.mac == Some(*mac)) {
                bail!("two NICs have the address {mac}");
            }
            let is_one = !matches!(nic, NicSpec::Model { .. }) && other.nic == nic;
            ensure!(!is_one, "{} is given twice", nic.wire());
        }
        nets.push(NetConfig {
            nic,
            mac,
            is_another_wire: false,
            saved_model: None,
        });
    }
    Ok(nets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_nic_has_what_it_was_given_or_an_address_of_its_own() {
        let name: VmName = "web".parse().unwrap();
        let given = |text: &[&str]| -> Vec<NetOption> {
            text.iter().map(|text| text.parse().unwrap()).collect()
        };
        let mac: MacAddress = "02:00:00:00:00:07".parse().unwrap();
        let all = given(&["user", "user,nic=virtio", "tap=t0,mac=02:00:00:00:00:09"]);
        let nets = nets(&name, all, Vec::new(), None).unwrap();
        assert_eq!(nets[0].mac, Some(MacAddress::for_name("web")));
        assert_ne!(nets[0].mac, nets[1].mac);
        assert_eq!(nets[2].mac.unwrap().to_string(), "02:00:00:00:00:09");
        let models: Vec<_> = nets.iter().map(|net| net.nic.name()).collect();
        assert_eq!(models, ["e1000", "virtio", "e1000"]);
        let same = given(&["user", "tap=t0,mac=02:00:00:00:00:07"]);
        super::nets(&name, same, Vec::new(), Some(mac)).unwrap_err();
    }

    #[test]
    fn nics_that_live_elsewhere_come_after_those_on_wires() {
        let name: VmName = "web".parse().unwrap();
        let nics = |text: &[&str]| -> Vec<NicOption> {
            text.iter().map(|text| text.parse().unwrap()).collect()
        };
        let user = || vec!["user".parse().unwrap()];
        let all = nics(&[
            "device=lan",
            "virtio",
            "vfio=00:02.0",
            "device=dmz,mac=02:00:00:00:00:07",
        ]);
        let all = super::nets(&name, user(), all, None).unwrap();
        let names: Vec<_> = all
            .iter()
            .map(|net| (net.nic.name(), net.nic.wire()))
            .collect();
        let expected = [
            ("virtio", "user"),
            ("device", "device=lan"),
            ("vfio", "vfio=0000:00:02.0"),
            ("device", "device=dmz"),
        ];
        assert!(names.iter().map(|(a, b)| (*a, b.as_str())).eq(expected));
        assert_eq!(all[2].mac, None);
        assert_eq!(all[3].mac.unwrap().to_string(), "02:00:00:00:00:07");
        for wrong in [
            &["device=lan", "device=lan"][..],
            &["vfio=00:02.0", "vfio=0000:00:02.0"],
            &["e1000", "virtio"],
        ] {
            super::nets(&name, user(), nics(wrong), None).unwrap_err();
        }
        super::nets(&name, Vec::new(), nics(&["virtio"]), None).unwrap_err();
        for wrong in [
            "device=",
            "device=a/b",
            "device=a,mac=1",
            "vfio=2",
            "vfio=00:02:0",
            "vfio=0000:00.02:0",
        ] {
            wrong.parse::<NicOption>().unwrap_err();
        }
    }
}
