//! The network cards that there are, by name. Whoever needs one asks here; which model it is,
//! nobody above this crate knows.
//!
//! A model is a row of [`MODELS`]: its name, which modules of Linux drive it, and how it is made.
//! What is made is a PCI function like any other, with what else it has to offer.

use std::sync::{Arc, Mutex, PoisonError};

use event_manager::MutEventSubscriber;

use crate::dma::DmaSpace;
use crate::e1000::{E1000, E1000Config, HoldableE1000};
use crate::edge::SetCable;
use crate::hold::goes_on::{GoesOn, HoldableFunction};
use crate::hold::{CheckpointBy, Holdable};
use crate::irq::{IrqLine, MsiVectors};
use crate::moments::Moments;
use crate::pci::bus::SharedFunction;
use crate::pci::registers::{Description, DescriptionError};
use crate::vfio::address::PciAddress;
use crate::vfio::error::VfioError;
use crate::vfio::function::{PassthroughParts, VfioFunction};
use crate::vfio_user::{Client, FunctionError, VfioUserFunction};
use crate::virtio::VirtioDevice;
use crate::virtio::net::Net;
use crate::virtio::pci::{VirtioError, VirtioPciFunction};
use crate::wire::Wire;

/// Why a card cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NicError {
    /// The controller.
    #[error(transparent)]
    E1000(#[from] crate::e1000::Error),
    /// The description of its registers.
    #[error(transparent)]
    Description(#[from] DescriptionError),
    /// The virtio function.
    #[error(transparent)]
    Virtio(#[from] VirtioError),
    /// A function of the host.
    #[error(transparent)]
    Passthrough(#[from] VfioError),
    /// The function of another process.
    #[error(transparent)]
    Remote(#[from] FunctionError),
    /// Its state is to be taken by its registers, which nobody has described.
    #[error(
        "there is no description of the registers of this device, by which its state could be taken"
    )]
    NoDescription,
    /// Interrupt vectors.
    #[error("the NIC gets no interrupt vectors: {0}")]
    Vectors(String),
}

/// A model of card.
#[derive(Debug)]
pub struct NicModel {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it is, in a few words.
    pub summary: &'static str,
    /// Modules of Linux that drive it. Which one does in a guest, only the guest knows.
    pub drivers: &'static [&'static str],
    /// How many message-signalled vectors it has.
    pub vectors: u16,
    make: fn(NicParts<'_>) -> Result<Nic, NicError>,
}

/// All models; the first is the one that a guest gets where nobody says which.
pub static MODELS: [NicModel; 2] = [
    NicModel {
        name: "e1000",
        summary: "Intel 82540EM",
        drivers: &["e1000"],
        vectors: 0,
        make: make_e1000,
    },
    NicModel {
        name: "virtio",
        summary: "virtio-net",
        drivers: &["virtio_net"],
        vectors: 3,
        make: make_virtio,
    },
];

/// What a card is made of.
pub struct NicParts<'a> {
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// What it is plugged into.
    pub wire: Box<dyn Wire>,
    /// The memory that it reaches.
    pub dma: DmaSpace,
    /// Its slot's pin INTA#.
    pub intx: Arc<dyn IrqLine>,
    /// Gives so many message-signalled vectors.
    pub vectors: &'a mut dyn FnMut(u16) -> Result<Arc<dyn MsiVectors>, String>,
}

/// Makes a device holdable whose state is taken in the given way.
pub type MakeHoldable =
    Arc<dyn Fn(CheckpointBy) -> Result<Arc<dyn Holdable>, NicError> + Send + Sync>;

/// Gives a card another Ethernet address, see [`Nic::set_address`].
pub type SetAddress = Arc<dyn Fn([u8; 6]) + Send + Sync>;

/// A card.
#[derive(Clone)]
pub struct Nic {
    /// What is put into a PCI slot.
    pub function: SharedFunction,
    /// What the event loop serves.
    pub events: Arc<Mutex<dyn MutEventSubscriber + Send>>,
    /// How it is held, if it can be.
    pub holdable: Option<MakeHoldable>,
    /// When the guest took interrupts of it, if the model tells.
    pub interrupts: Option<Arc<Moments>>,
    /// Gives it another address, as if it had been made with that one: for a card that goes on from
    /// a saved state, which has the address of the card that was saved. A driver that runs keeps
    /// the one that it has read until the guest gives it another one.
    pub set_address: SetAddress,
    /// Pulls its cable, if that is this process's to pull.
    pub set_cable: Option<SetCable>,
}

/// What a card in another process is made of.
pub struct RemoteParts<'a> {
    /// Its slot's pin INTA#.
    pub intx: Arc<dyn IrqLine>,
    /// Gives so many message-signalled vectors.
    pub vectors: &'a mut dyn FnMut(u16) -> Result<Arc<dyn MsiVectors>, String>,
}

impl Nic {
    /// The card that a server of another process has, and the function itself, for whoever connects
    /// it anew. Its address, wire and model are the server's.
    ///
    /// # Errors
    /// The server cannot be used.
    pub fn remote(
        client: Client,
        parts: RemoteParts<'_>,
    ) -> Result<(Self, Arc<Mutex<VfioUserFunction>>), NicError> {
        let mut function = VfioUserFunction::new(client, parts.intx, parts.vectors)?;
        let description = function.description()?.map(Arc::new);
        let function = Arc::new(Mutex::new(function));
        let nic = Self {
            function: function.clone(),
            events: function.clone(),
            holdable: Some(holdable(function.clone(), description)),
            interrupts: None,
            set_address: Arc::new(|_| {}),
            set_cable: None,
        };
        Ok((nic, function))
    }
}

impl NicModel {
    /// The model of this name.
    pub fn from_name(name: &str) -> Option<&'static Self> {
        MODELS.iter().find(|model| model.name == name)
    }

    /// A card of this model.
    ///
    /// # Errors
    /// The host refuses what it needs.
    pub fn make(&self, parts: NicParts<'_>) -> Result<Nic, NicError> {
        (self.make)(parts)
    }
}

impl Nic {
    /// The function at `address` of the host, with the address and the wire that it has.
    ///
    /// # Errors
    /// See [`VfioFunction::open`].
    pub fn passthrough(address: PciAddress, parts: PassthroughParts<'_>) -> Result<Self, NicError> {
        let function = VfioFunction::open(address, parts)?;
        let description = function.description()?.map(Arc::new);
        let function = Arc::new(Mutex::new(function));
        Ok(Self {
            function: function.clone(),
            events: function.clone(),
            holdable: Some(holdable(function, description)),
            interrupts: None,
            // It is in the function's own memory.
            set_address: Arc::new(|_| {}),
            set_cable: None,
        })
    }
}

/// A function that goes on by itself, as one that can be held. There is one way in which its state
/// is taken.
fn holdable<F: GoesOn + 'static>(
    function: Arc<Mutex<F>>,
    description: Option<Arc<Description>>,
) -> MakeHoldable {
    Arc::new(move |by| match (by, &description) {
        (CheckpointBy::Registers, None) => Err(NicError::NoDescription),
        _ => Ok(Arc::new(HoldableFunction::new(
            function.clone(),
            description.clone(),
        ))),
    })
}

fn make_e1000(parts: NicParts<'_>) -> Result<Nic, NicError> {
    let config = E1000Config::new(parts.mac);
    let nic = E1000::new(config, parts.dma, parts.intx, parts.wire)?;
    let interrupts = nic.interrupts_taken();
    let nic = Arc::new(Mutex::new(nic));
    let (held, addressed, plugged) = (nic.clone(), nic.clone(), Arc::downgrade(&nic));
    Ok(Nic {
        function: nic.clone(),
        events: nic,
        holdable: Some(Arc::new(move |by| {
            Ok(Arc::new(HoldableE1000::new(held.clone(), by)?))
        })),
        interrupts: Some(interrupts),
        set_address: Arc::new(move |mac| {
            let mut nic = addressed.lock().unwrap_or_else(PoisonError::into_inner);
            nic.set_address(mac);
        }),
        set_cable: Some(Arc::new(move |is_in| {
            // The edge has this, and the card has the edge.
            let Some(nic) = plugged.upgrade() else { return };
            let mut nic = nic.lock().unwrap_or_else(PoisonError::into_inner);
            nic.set_cable(is_in);
        })),
    })
}

fn make_virtio(parts: NicParts<'_>) -> Result<Nic, NicError> {
    let device = Net::new(parts.mac, parts.wire);
    // One vector for each queue and one for changes of configuration.
    let count = u16::try_from(device.queue_sizes().len() + 1).unwrap_or(u16::MAX);
    let vectors = (parts.vectors)(count).map_err(NicError::Vectors)?;
    let function = VirtioPciFunction::new(device, parts.dma, parts.intx, vectors)?;
    let function = Arc::new(Mutex::new(function));
    let (addressed, plugged) = (function.clone(), Arc::downgrade(&function));
    Ok(Nic {
        function: function.clone(),
        events: function,
        holdable: None,
        interrupts: None,
        set_address: Arc::new(move |mac| {
            let mut nic = addressed.lock().unwrap_or_else(PoisonError::into_inner);
            nic.device_mut().set_address(mac);
        }),
        set_cable: Some(Arc::new(move |is_in| {
            // The edge has this, and the card has the edge.
            let Some(nic) = plugged.upgrade() else { return };
            let mut nic = nic.lock().unwrap_or_else(PoisonError::into_inner);
            nic.set_cable(is_in);
        })),
    })
}

#[cfg(test)]
mod tests;
