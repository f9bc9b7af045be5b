//! Which devices a VM gets, and where they are plugged in.
//!
//! | slot | device |
//! | --- | --- |
//! | 1 | virtio-console with the guest agent's port |
//! | 2 | NIC, if there is one |
//! | then | a virtio-blk for each disk |

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex};

use agent_protocol::PORT_NAME;
use anyhow::{Context, bail};
use devices::e1000::{E1000, E1000Config};
use devices::moments::Moments;
use devices::pci::config::InterruptPin;
use devices::virtio::VirtioDevice;
use devices::virtio::blk::{Block, Disk};
use devices::virtio::console::Console;
use devices::virtio::net::Net;
use devices::virtio::pci::VirtioPciFunction;
use devices::wire::Wire;
use devices::wire::gateway::{Gateway, GatewayConfig, GatewayControl, NetworkConfig};
use devices::wire::tap::Tap;
use devices::wire::unix_link::UnixLink;
use vmm::Vm;

use super::isolation::IsolatedNic;
use super::meter::{Meter, MeteredWire};
use super::watch::Belongings;
use super::{NetConfig, RunConfig};
use crate::options::{NetSpec, NicModel};

/// VLAN that the gateway is on besides the untagged network.
const GATEWAY_VLAN: u16 = 5;

/// What is kept of the devices to look at them and to control them while the VM runs.
#[derive(Default)]
pub struct Parts {
    /// What passed between NIC and wire.
    pub meter: Option<Arc<Meter>>,
    /// The e1000, if that is the NIC.
    pub nic: Option<IsolatedNic>,
    /// When the guest took interrupts of the e1000.
    pub interrupts: Option<Arc<Moments>>,
    /// The user-mode gateway.
    pub gateway: Option<GatewayControl>,
}

/// Gives `vm` its devices.
pub fn add_devices(
    vm: &mut Vm,
    config: &RunConfig,
    agent_socket: &Path,
    belongings: &Belongings,
) -> anyhow::Result<Parts> {
    let listener = UnixListener::bind(agent_socket)
        .with_context(|| format!("cannot make the agent's socket {}", agent_socket.display()))?;
    let console = Console::new(PORT_NAME, listener).context("cannot serve the agent's socket")?;
    add_virtio(vm, console)?;
    let mut parts = Parts::default();
    if let Some(net) = &config.net {
        add_nic(vm, net, &mut parts, belongings)?;
    }
    for (index, disk) in config.disks.iter().enumerate() {
        let file = Disk::open(&disk.path, disk.read_only)?;
        add_virtio(vm, Block::new(file, &format!("disk{index}")))?;
    }
    Ok(parts)
}

/// Puts a virtio device into the next slot.
fn add_virtio<D: VirtioDevice + 'static>(vm: &mut Vm, device: D) -> anyhow::Result<()> {
    let slot = vm.reserve_pci_slot()?;
    let queues = u16::try_from(device.queue_sizes().len())?;
    // One vector for each queue and one for changes of configuration.
    let vectors = vm.msi_vectors(queues.saturating_add(1))?;
    let line = slot.intx_line(InterruptPin::A);
    let function = VirtioPciFunction::new(device, vm.dma_space(), line, vectors)?;
    let function = Arc::new(Mutex::new(function));
    vm.add_pci(&slot, function.clone())?;
    vm.add_subscriber(function);
    Ok(())
}

/// Puts a NIC into the next slot and plugs it in.
fn add_nic(
    vm: &mut Vm,
    net: &NetConfig,
    parts: &mut Parts,
    belongings: &Belongings,
) -> anyhow::Result<()> {
    let wire = MeteredWire::new(plug(vm, &net.wire, parts, belongings)?);
    parts.meter = Some(wire.meter());
    let wire = Box::new(wire);
    match net.nic {
        NicModel::E1000 => {
            let slot = vm.reserve_pci_slot()?;
            let line = slot.intx_line(InterruptPin::A);
            let nic = E1000::new(E1000Config::new(net.mac.0), vm.dma_space(), line, wire)?;
            parts.interrupts = Some(nic.interrupts_taken());
            let nic = Arc::new(Mutex::new(nic));
            vm.add_pci(&slot, nic.clone())?;
            parts.nic = Some(IsolatedNic {
                nic: nic.clone(),
                slot: slot.number(),
            });
            vm.add_subscriber(nic);
            Ok(())
        }
        NicModel::Virtio => add_virtio(vm, Net::new(net.mac.0, wire)),
    }
}

/// Makes the wire that `spec` says.
fn plug(
    vm: &mut Vm,
    spec: &NetSpec,
    parts: &mut Parts,
    belongings: &Belongings,
) -> anyhow::Result<Box<dyn Wire>> {
    match spec {
        NetSpec::User => {
            let mut config = GatewayConfig::default();
            config.networks.push(NetworkConfig::for_vlan(GATEWAY_VLAN));
            let gateway = Gateway::new(&config)?;
            vm.add_subscriber(Arc::new(Mutex::new(gateway.timer())));
            parts.gateway = Some(gateway.control());
            Ok(Box::new(gateway))
        }
        NetSpec::Tap(name) => {
            // One that was made for us would be gone with us; a misspelt name would go unnoticed.
            if !Path::new("/sys/class/net").join(name).exists() {
                bail!(
                    "there is no TAP {name}: make it with `ip tuntap add dev {name} mode tap`, or \
                     use --net user, which needs none"
                );
            }
            Ok(Box::new(Tap::open(name)?))
        }
        NetSpec::Unix { path, listen: true } => {
            let link = UnixLink::listen(path)?;
            belongings.add_socket(path.clone());
            Ok(Box::new(link))
        }
        NetSpec::Unix {
            path,
            listen: false,
        } => Ok(Box::new(UnixLink::connect(path)?)),
    }
}
