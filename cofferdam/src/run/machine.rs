//! Which devices a VM gets, and where they are plugged in.
//!
//! | slot | device |
//! | --- | --- |
//! | 1 | virtio-console with the guest agent's port |
//! | 2 and on | NICs, in the order in which they are given |
//! | then | a virtio-blk for each disk |

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex};

use agent_protocol::PORT_NAME;
use anyhow::{Context, bail};
use devices::nic::NicParts;
use devices::pci::config::InterruptPin;
use devices::virtio::VirtioDevice;
use devices::virtio::blk::{Block, Disk};
use devices::virtio::console::Console;
use devices::virtio::pci::VirtioPciFunction;
use devices::wire::Wire;
use devices::wire::gateway::{Gateway, GatewayConfig, GatewayControl, NetworkConfig};
use devices::wire::tap::Tap;
use devices::wire::unix_link::UnixLink;
use vmm::Vm;

use super::meter::MeteredWire;
use super::nics::{GuestNic, Nics};
use super::watch::Belongings;
use super::{NetConfig, RunConfig};
use crate::options::{NetSpec, NicModel, NicSpec};

/// VLAN that the gateway of the first NIC is on besides the untagged network.
const GATEWAY_VLAN: u16 = 5;

/// Gives `vm` its devices.
pub fn add_devices(
    vm: &mut Vm,
    config: &RunConfig,
    agent_socket: &Path,
    belongings: &Belongings,
) -> anyhow::Result<Nics> {
    let listener = UnixListener::bind(agent_socket)
        .with_context(|| format!("cannot make the agent's socket {}", agent_socket.display()))?;
    let console = Console::new(PORT_NAME, listener).context("cannot serve the agent's socket")?;
    add_virtio(vm, console)?;
    let mut nics = Vec::new();
    for net in &config.nets {
        let nic = add_nic(vm, net, nics.len(), belongings);
        nics.push(nic.with_context(|| format!("NIC {} ({})", nics.len() + 1, net.nic.wire()))?);
    }
    for (index, disk) in config.disks.iter().enumerate() {
        let file = Disk::open(&disk.path, disk.read_only)?;
        add_virtio(vm, Block::new(file, &format!("disk{index}")))?;
    }
    Ok(Nics::new(nics))
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

/// Puts NIC number `index` into the next slot.
fn add_nic(
    vm: &mut Vm,
    net: &NetConfig,
    index: usize,
    belongings: &Belongings,
) -> anyhow::Result<GuestNic> {
    match &net.nic {
        NicSpec::Model { model, wire } => add_model(vm, net, (*model, wire), index, belongings),
        NicSpec::Device(_) | NicSpec::Passthrough(_) => {
            bail!("this version of the program has no NICs that live elsewhere yet")
        }
    }
}

/// Puts a model into the next slot and plugs it in.
fn add_model(
    vm: &mut Vm,
    net: &NetConfig,
    (model, wire): (NicModel, &NetSpec),
    index: usize,
    belongings: &Belongings,
) -> anyhow::Result<GuestNic> {
    let mac = net.mac.context("a model has an address")?;
    let (wire, gateway) = plug(vm, wire, index, belongings)?;
    let wire = MeteredWire::new(wire, net.is_another_wire);
    let meter = wire.meter();
    let slot = vm.reserve_pci_slot()?;
    let nic = model.model().make(NicParts {
        mac: mac.0,
        wire: Box::new(wire),
        dma: vm.dma_space(),
        intx: slot.intx_line(InterruptPin::A),
        vectors: &mut |count| vm.msi_vectors(count).map_err(|error| error.to_string()),
    })?;
    vm.add_pci(&slot, nic.function.clone())?;
    vm.add_subscriber(nic.events.clone());
    Ok(GuestNic {
        config: net.clone(),
        nic,
        slot: slot.number(),
        meter: Some(meter),
        gateway,
    })
}

/// A wire, and the gateway at its end if there is one.
type Plugged = (Box<dyn Wire>, Option<GatewayControl>);

/// Makes the wire of NIC number `index` that `spec` says.
fn plug(
    vm: &mut Vm,
    spec: &NetSpec,
    index: usize,
    belongings: &Belongings,
) -> anyhow::Result<Plugged> {
    match spec {
        NetSpec::User => {
            // Each gateway is a network of its own. The number of NICs is far below what an octet holds.
            let number = u8::try_from(index).unwrap_or(u8::MAX);
            let mut config = GatewayConfig::numbered(number);
            let vlan = GATEWAY_VLAN + u16::from(number);
            config.networks.push(NetworkConfig::for_vlan(vlan));
            let gateway = Gateway::new(&config)?;
            vm.add_subscriber(Arc::new(Mutex::new(gateway.timer())));
            let control = gateway.control();
            Ok((Box::new(gateway), Some(control)))
        }
        NetSpec::Tap(name) => {
            // One that was made for us would be gone with us; a misspelt name would go unnoticed.
            if !Path::new("/sys/class/net").join(name).exists() {
                bail!(
                    "there is no TAP {name}: make it with `ip tuntap add dev {name} mode tap`, or \
                     use --net user, which needs none"
                );
            }
            Ok((Box::new(Tap::open(name)?), None))
        }
        NetSpec::Unix { path, listen: true } => {
            let link = UnixLink::listen(path)?;
            belongings.add_socket(path.clone());
            Ok((Box::new(link), None))
        }
        NetSpec::Unix {
            path,
            listen: false,
        } => Ok((Box::new(UnixLink::connect(path)?), None)),
    }
}
