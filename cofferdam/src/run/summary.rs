//! What a VM was made from, and how its NICs are, as its control socket tells it.

use super::nics::GuestNic;
use super::{NetConfig, RunConfig};
use crate::control::protocol::{ConfigSummary, NetSummary, NicStatus};

/// A NIC's configuration for people.
fn net_summary(net: &NetConfig) -> NetSummary {
    NetSummary {
        nic: net.nic.name().to_owned(),
        mac: net.mac.map(|mac| mac.to_string()),
        wire: net.nic.wire(),
    }
}

/// A NIC's configuration and counters.
pub fn nic_status(nic: &GuestNic) -> NicStatus {
    let mut counters = nic
        .meter
        .as_ref()
        .map(|meter| meter.read())
        .unwrap_or_default();
    if let Some(gateway) = &nic.gateway {
        let of_gateway = gateway.log().counters();
        counters.insert("gateway_refused".to_owned(), of_gateway.frames_refused);
        counters.insert("gateway_too_long".to_owned(), of_gateway.frames_too_long);
    }
    NicStatus {
        address: nic.address(),
        net: net_summary(&nic.config),
        counters,
    }
}

/// A VM's configuration for people.
pub fn summary(config: &RunConfig) -> ConfigSummary {
    ConfigSummary {
        kernel: config.kernel.display().to_string(),
        memory_mib: config.memory.bytes() >> 20,
        vcpus: u32::from(config.vcpus),
        net: config.nets.first().map(net_summary),
        disks: config.disks.iter().map(ToString::to_string).collect(),
        serial: config.serial.to_string(),
    }
}
