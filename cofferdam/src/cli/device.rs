//! `device`: NICs that guests share by turns, and PCI functions of the host that guests are given.

use devices::vfio::address::PciAddress;
use devices::vfio::binding::{Rebound, Sysfs};

use super::device_host::{ListOptions, ServeOptions, StatusOptions, StopOptions};
use super::{Ending, print_bytes};

/// `device`
#[derive(Debug, clap::Subcommand)]
pub enum DeviceCommand {
    /// Have a NIC that guests share by turns, in this terminal
    Serve(ServeOptions),
    /// List the device hosts that run
    List(ListOptions),
    /// Show how a device host is: turn, contexts, frames, last switches
    Status(StatusOptions),
    /// End a device host
    Stop(StopOptions),
    /// Take a PCI function from the host's driver, for guests: vfio-pci has it from then on
    #[command(after_help = "\
Example:
  cofferdam device bind 0000:00:02.0
  cofferdam run --kernel vmlinux --initrd initrd.cpio --nic vfio=0000:00:02.0")]
    Bind(BindOptions),
    /// Give a PCI function back to the host's drivers
    #[command(after_help = "\
Example:
  cofferdam device unbind 0000:00:02.0")]
    Unbind(BindOptions),
}

/// `device bind`, `device unbind`
#[derive(Debug, clap::Args)]
pub struct BindOptions {
    /// Address of the function, such as 0000:00:02.0
    address: PciAddress,
    /// Also if it is in use
    #[arg(long)]
    force: bool,
}

impl DeviceCommand {
    /// `device`
    pub fn run(self) -> anyhow::Result<Ending> {
        let sysfs = Sysfs::default();
        let text = match self {
            Self::Serve(options) => return options.run(),
            Self::List(options) => return options.run(),
            Self::Status(options) => return options.run(),
            Self::Stop(options) => return options.run(),
            Self::Bind(BindOptions { address, force }) => {
                bound_text(address, &sysfs.bind(address, force)?)
            }
            Self::Unbind(BindOptions { address, force }) => {
                unbound_text(address, &sysfs.unbind(address, force)?)
            }
        };
        print_bytes(text.as_bytes())?;
        Ok(Ending::SUCCESS)
    }
}

fn bound_text(address: PciAddress, rebound: &Rebound) -> String {
    let group = rebound
        .group
        .map_or_else(String::new, |group| format!(", IOMMU group {group}"));
    let before = match rebound.from.as_deref() {
        from if from == rebound.to.as_deref() => " already".into(),
        Some(from) => format!(", before to {from}"),
        None => String::new(),
    };
    format!("{address} is bound to vfio-pci{before}{group}\n")
}

fn unbound_text(address: PciAddress, rebound: &Rebound) -> String {
    match &rebound.to {
        Some(driver) => format!("{address} is bound to {driver} again\n"),
        None => format!("{address} has no driver; the next one that is loaded may take it\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changed_is_told() {
        let address: PciAddress = "0000:00:02.0".parse().unwrap();
        let rebound = |from: Option<&str>, to: Option<&str>| Rebound {
            from: from.map(Into::into),
            to: to.map(Into::into),
            group: Some(1),
        };
        let vfio = Some("vfio-pci");
        for (from, text) in [
            (
                vfio,
                "0000:00:02.0 is bound to vfio-pci already, IOMMU group 1\n",
            ),
            (
                Some("e1000e"),
                "0000:00:02.0 is bound to vfio-pci, before to e1000e, IOMMU group 1\n",
            ),
            (None, "0000:00:02.0 is bound to vfio-pci, IOMMU group 1\n"),
        ] {
            assert_eq!(bound_text(address, &rebound(from, vfio)), text);
        }
        let back = unbound_text(address, &rebound(vfio, Some("e1000e")));
        assert_eq!(back, "0000:00:02.0 is bound to e1000e again\n");
    }
}
