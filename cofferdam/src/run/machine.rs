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
use anyhow::{Context, bail, ensure};
use devices::nic::{Nic, NicParts, RemoteParts};
use devices::pci::config::InterruptPin;
use devices::vfio::function::PassthroughParts;
use devices::vfio_user::client::{Client, Limits};
use devices::virtio::VirtioDevice;
use devices::virtio::blk::{Block, Disk};
use devices::virtio::console::Console;
use devices::virtio::pci::VirtioPciFunction;
use devices::wire::Wire;
use devices::wire::gateway::{Gateway, GatewayConfig, GatewayControl, NetworkConfig};
use devices::wire::tap::Tap;
use devices::wire::unix_link::UnixLink;
use vmm::{PciSlot, SharedSubscriber, Vm, VmHandle};

use super::attachment::Attachment;
use super::meter::MeteredWire;
use super::nics::{GuestNic, Nics};
use super::watch::Belongings;
use super::{NetConfig, RunConfig};
use crate::options::{NetSpec, NicModel, NicSpec, PciAddress, VmName};
use crate::runtime_dir::RuntimeRoot;

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
        let made = MadeNic::new(&vm.handle(), &config.name, net, nics.len(), belongings);
        let made = made.with_context(|| format!("NIC {} ({})", nics.len() + 1, net.nic.wire()))?;
        nics.push(made.add(vm)?);
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
    let vectors = slot.msi_vectors(queues.saturating_add(1))?;
    let line = slot.intx_line(InterruptPin::A);
    let function = VirtioPciFunction::new(device, vm.dma_space(), line, vectors)?;
    let function = Arc::new(Mutex::new(function));
    vm.add_pci(&slot, function.clone())?;
    vm.add_subscriber(function);
    Ok(())
}

/// A NIC that is in no slot yet.
pub struct MadeNic {
    nic: GuestNic,
    slot: PciSlot,
    /// What the event loop has to serve.
    subscribers: Vec<SharedSubscriber>,
}

impl MadeNic {
    /// Makes NIC number `index` for the next slot of `vm`, whose name is `name`.
    ///
    /// # Errors
    /// The host does not have what it needs.
    pub fn new(
        vm: &VmHandle,
        name: &VmName,
        net: &NetConfig,
        index: usize,
        belongings: &Belongings,
    ) -> anyhow::Result<Self> {
        match &net.nic {
            NicSpec::Model { model, wire } => {
                Self::model(vm, net, (*model, wire), index, belongings)
            }
            NicSpec::Passthrough(address) => Self::passthrough(vm, net, *address, index),
            NicSpec::Device(host) => Self::device(vm, name, net, host, index),
        }
    }

    /// The device of a device host.
    fn device(
        vm: &VmHandle,
        name: &VmName,
        net: &NetConfig,
        host: &VmName,
        index: usize,
    ) -> anyhow::Result<Self> {
        has_own_memory(vm)?;
        let attachment = Attachment {
            root: RuntimeRoot::from_environment(),
            host: host.clone(),
            vm: name.clone(),
            mac: net.mac.context("a NIC of a device host has an address")?,
            away: Arc::default(),
            by_driver: Arc::default(),
            model: Arc::default(),
        };
        let slot = vm.reserve_pci_slot()?;
        let stream = attachment.attach(net.saved_model.as_deref())?;
        let client = Client::new(stream, vm.dma_space(), Limits::default())?;
        let (nic, function) = Nic::remote(
            client,
            RemoteParts {
                intx: slot.intx_line(InterruptPin::A),
                vectors: &mut |count| slot.msi_vectors(count).map_err(|error| error.to_string()),
            },
        )?;
        attachment.keep(&function)?;
        let mut made = Self::elsewhere(nic, slot, net, index);
        made.nic.attachment = Some(attachment);
        made.nic.remote = Some(function);
        Ok(made)
    }

    /// A function of the host.
    fn passthrough(
        vm: &VmHandle,
        net: &NetConfig,
        address: PciAddress,
        index: usize,
    ) -> anyhow::Result<Self> {
        has_own_memory(vm)?;
        let slot = vm.reserve_pci_slot()?;
        let nic = Nic::passthrough(
            address,
            PassthroughParts {
                dma: vm.dma_space(),
                intx: slot.intx_line(InterruptPin::A),
                vectors: &mut |count| slot.msi_vectors(count).map_err(|error| error.to_string()),
            },
        )?;
        Ok(Self::elsewhere(nic, slot, net, index))
    }

    /// A NIC that is not in this process, made for `slot`.
    fn elsewhere(nic: Nic, slot: PciSlot, net: &NetConfig, index: usize) -> Self {
        let subscribers = vec![nic.events.clone()];
        let nic = GuestNic {
            config: net.clone(),
            nic,
            number: index,
            slot: slot.number(),
            came: false,
            meter: None,
            gateway: None,
            attachment: None,
            remote: None,
            edge: slot.edge().clone(),
        };
        Self {
            nic,
            slot,
            subscribers,
        }
    }

    /// A model, plugged into its wire.
    fn model(
        vm: &VmHandle,
        net: &NetConfig,
        (model, wire): (NicModel, &NetSpec),
        index: usize,
        belongings: &Belongings,
    ) -> anyhow::Result<Self> {
        let mac = net.mac.context("a model has an address")?;
        let Plugged {
            wire,
            gateway,
            mut subscribers,
        } = plug(wire, index, belongings)?;
        let wire = MeteredWire::new(wire, net.is_another_wire);
        let meter = wire.meter();
        let slot = vm.reserve_pci_slot()?;
        let nic = model.model().make(NicParts {
            mac: mac.0,
            wire: Box::new(wire),
            dma: vm.dma_space(),
            intx: slot.intx_line(InterruptPin::A),
            vectors: &mut |count| slot.msi_vectors(count).map_err(|error| error.to_string()),
        })?;
        subscribers.push(nic.events.clone());
        if let Some(set_cable) = &nic.set_cable {
            slot.edge().has_link(set_cable.clone());
        }
        let nic = GuestNic {
            config: net.clone(),
            nic,
            number: index,
            slot: slot.number(),
            came: false,
            meter: Some(meter),
            gateway,
            attachment: None,
            remote: None,
            edge: slot.edge().clone(),
        };
        Ok(Self {
            nic,
            slot,
            subscribers,
        })
    }

    /// Puts it into its slot, before the guest begins.
    fn add(self, vm: &mut Vm) -> anyhow::Result<GuestNic> {
        vm.add_pci(&self.slot, self.nic.nic.function.clone())?;
        for subscriber in self.subscribers {
            vm.add_subscriber(subscriber);
        }
        Ok(self.nic)
    }

    /// Puts it into its slot while the guest runs, which is told.
    ///
    /// # Errors
    /// The slot is taken.
    pub fn plug(self, vm: &VmHandle) -> anyhow::Result<GuestNic> {
        vm.plug(&self.slot, self.nic.nic.function.clone(), self.subscribers)?;
        Ok(GuestNic {
            came: true,
            ..self.nic
        })
    }
}

/// A NIC that is not in this process reaches the file that guest memory is, and nothing else.
fn has_own_memory(vm: &VmHandle) -> anyhow::Result<()> {
    ensure!(
        !vm.ram().is_template(),
        "a NIC that lives elsewhere does not reach memory that is shared with a snapshot: go on from it without --lazy"
    );
    Ok(())
}

/// A wire, the gateway at its end if there is one, and what the event loop has to serve of it.
pub struct Plugged {
    /// The wire.
    pub wire: Box<dyn Wire>,
    /// The gateway.
    pub gateway: Option<GatewayControl>,
    /// What an event loop has to serve.
    pub subscribers: Vec<SharedSubscriber>,
}

impl Plugged {
    fn into(wire: impl Wire + 'static) -> Self {
        Self {
            wire: Box::new(wire),
            gateway: None,
            subscribers: Vec::new(),
        }
    }
}

/// Makes the wire of NIC number `index` that `spec` says.
pub fn plug(spec: &NetSpec, index: usize, belongings: &Belongings) -> anyhow::Result<Plugged> {
    match spec {
        NetSpec::User => {
            // Each gateway is a network of its own. The number of NICs is far below what an octet
            // holds.
            let number = u8::try_from(index).unwrap_or(u8::MAX);
            let mut config = GatewayConfig::numbered(number);
            let vlan = GATEWAY_VLAN + u16::from(number);
            config.networks.push(NetworkConfig::for_vlan(vlan));
            let gateway = Gateway::new(&config)?;
            let timer = Arc::new(Mutex::new(gateway.timer()));
            Ok(Plugged {
                gateway: Some(gateway.control()),
                wire: Box::new(gateway),
                subscribers: vec![timer],
            })
        }
        NetSpec::Tap(name) => {
            // One that was made for us would be gone with us; a misspelt name would go unnoticed.
            if !Path::new("/sys/class/net").join(name).exists() {
                bail!(
                    "there is no TAP {name}: make it with `ip tuntap add dev {name} mode tap`, or \
                     use --net user, which needs none"
                );
            }
            Ok(Plugged::into(Tap::open(name)?))
        }
        NetSpec::Unix { path, listen: true } => {
            let link = UnixLink::listen(path)?;
            belongings.add_socket(path.clone());
            Ok(Plugged::into(link))
        }
        NetSpec::Unix {
            path,
            listen: false,
        } => Ok(Plugged::into(UnixLink::connect(path)?)),
    }
}
