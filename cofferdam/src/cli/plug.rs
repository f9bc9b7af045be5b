//! `plug`, `unplug`: NICs come and go while a guest runs.

use anyhow::bail;

use super::isolation::ask;
use super::{Ending, print_bytes, print_json};
use crate::control::protocol::{NetSummary, Reply, Request};
use crate::options::{NetOption, NetSpec, NicOption, PciAddress, VmName};

/// `plug`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The guest is told by ACPI and probes the NIC; its link and addresses are the guest's to set.

Examples:
  cofferdam plug web --net user
  cofferdam plug web --net unix=/tmp/cable,nic=virtio
  cofferdam plug web --nic device=lan")]
pub struct PlugOptions {
    /// Name of the VM
    vm: VmName,
    /// A model and what it is plugged into, as `cofferdam run` takes it
    #[arg(
        long,
        value_name = "WIRE[,nic=MODEL][,mac=ADDRESS]",
        required_unless_present = "nic"
    )]
    net: Option<NetOption>,
    /// A NIC that is not made in the VM's process, as `cofferdam run` takes it: device=NAME or
    /// vfio=ADDRESS
    #[arg(long, value_name = "NIC", conflicts_with = "net")]
    nic: Option<NicOption>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// `unplug`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Only a NIC that `cofferdam plug` brought can go. The guest is asked by ACPI, and its driver lets go of it first.

Example:
  cofferdam unplug web 0000:00:03.0")]
pub struct UnplugOptions {
    /// Name of the VM
    vm: VmName,
    /// The NIC's PCI address in the guest; `cofferdam plug` and `cofferdam status` say it
    address: PciAddress,
}

impl PlugOptions {
    /// `plug`
    pub fn run(self) -> anyhow::Result<Ending> {
        let net = self.net.map(absolute).transpose()?;
        let request = Request::Plug {
            net: net.map(|net| net.to_string()),
            nic: self.nic.map(|nic| nic.to_string()),
        };
        let Reply::Plugged(nic) = ask(&self.vm, &request)? else {
            bail!("the VM answered something else");
        };
        if self.json {
            print_json(&nic)?;
        } else {
            let NetSummary {
                nic: kind, wire, ..
            } = &nic.net;
            let text = format!("{}: {kind} on {wire}\n", nic.address);
            print_bytes(text.as_bytes())?;
        }
        Ok(Ending::SUCCESS)
    }
}

impl UnplugOptions {
    /// `unplug`
    pub fn run(self) -> anyhow::Result<Ending> {
        let address = self.address.to_string();
        match ask(&self.vm, &Request::Unplug { address })? {
            Reply::Done {} => Ok(Ending::SUCCESS),
            _ => bail!("the VM answered something else"),
        }
    }
}

/// The same with paths that do not start from this process's folder.
fn absolute(net: NetOption) -> anyhow::Result<NetOption> {
    let wire = match net.wire {
        NetSpec::Unix { path, listen } => NetSpec::Unix {
            path: std::path::absolute(path)?,
            listen,
        },
        other => other,
    };
    Ok(NetOption { wire, ..net })
}
