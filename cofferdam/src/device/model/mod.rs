//! A model of a NIC: each VM has one of its own, and what they have by turns is the wire.

mod switching;

use std::sync::PoisonError;

use anyhow::Context as _;
use devices::dma::DmaSpace;
use devices::nic::{Nic, NicParts};
use devices::pci::bus::SharedFunction;
use devices::pci::config::{Command, offset};
use devices::vfio_user::Offered;
use devices::vfio_user::server::{ClientInterrupts, ServerEvent};
use devices::wire::turns::{PortId, TurnTimes, Turns};
use vmm::SharedSubscriber;

use self::switching::ModelSwitch;
use super::at_step::Waiting;
use super::card::{Card, Passing};
use super::context::Context;
use super::protocol::{ContextStatus, HostStatus};
use super::share::{Listener, Share};
use crate::options::{MacAddress, NicModel};

/// See the module.
pub struct ModelCard {
    model: NicModel,
    turns: Turns,
    waiting: Waiting,
}

impl ModelCard {
    /// NICs of `model` at that wire.
    pub fn new(model: NicModel, turns: Turns) -> Self {
        Self {
            model,
            turns,
            waiting: Waiting::of_process(),
        }
    }
}

impl Card for ModelCard {
    type Share = ModelShare;

    fn name(&self) -> String {
        self.model.name().to_owned()
    }

    fn share(&self, mac: MacAddress) -> anyhow::Result<ModelShare> {
        let dma = DmaSpace::empty();
        let port = self.turns.port(mac.0).context("no descriptors for a NIC")?;
        let id = port.id();
        let interrupts = ClientInterrupts::new(self.model.model().vectors);
        let vectors = interrupts.vectors();
        let nic = self.model.model().make(NicParts {
            mac: mac.0,
            wire: Box::new(port),
            dma: dma.clone(),
            intx: interrupts.line(),
            vectors: &mut |count| match count == vectors.count() {
                true => Ok(vectors.clone()),
                false => Err(format!("{count} are not what the model is known to have")),
            },
        })?;
        Ok(ModelShare {
            nic,
            port: id,
            dma,
            interrupts,
            turns: self.turns.clone(),
        })
    }

    fn pass_on(
        &self,
        from: Option<&Context<ModelShare>>,
        to: Option<&Context<ModelShare>>,
    ) -> Passing {
        let mut device = ModelSwitch::new(&self.turns);
        let switched = self.waiting.switch(&mut device, from.as_ref(), to.as_ref());
        let (outcome, phases) = switched;
        Passing {
            outcome,
            phases,
            turn: device.turn,
        }
    }

    fn times(&self, turn: u64) -> Option<TurnTimes> {
        self.turns.times(turn)
    }

    fn end(&self) {
        if let Err(error) = self.turns.give(None) {
            tracing::debug!("{error}");
        }
    }

    fn fill(&self, status: &mut HostStatus) {
        status.lost_without_turn = self.turns.lost_without_turn();
    }
}

/// A VM's NIC, with registers and rings of its own.
pub struct ModelShare {
    nic: Nic,
    /// Its end of the wire.
    port: PortId,
    dma: DmaSpace,
    interrupts: ClientInterrupts,
    turns: Turns,
}

impl Share for ModelShare {
    fn offered(&self) -> Offered {
        Offered {
            function: self.nic.function.clone(),
            dma: self.dma.clone(),
            interrupts: self.interrupts.clone(),
        }
    }

    fn events(&self) -> Option<SharedSubscriber> {
        Some(self.nic.events.clone())
    }

    fn set_address(&self, mac: MacAddress) {
        (self.nic.set_address)(mac.0);
        self.turns.set_address(self.port, mac.0);
    }

    fn plug(&self, plugged: bool) -> anyhow::Result<()> {
        Ok(self.turns.plug(self.port, plugged)?)
    }

    fn has_turn(&self) -> bool {
        self.turns.holder() == Some(self.port)
    }

    fn listener(&self, mut address: Option<MacAddress>) -> Listener {
        let (function, port) = (self.nic.function.clone(), self.port);
        let set_address = self.nic.set_address.clone();
        let turns = self.turns.clone();
        Box::new(move |event| match event {
            ServerEvent::Gone(_) => {
                stop_dma(&function);
                // It fails for a port that is gone.
                let _ = turns.plug(port, false);
            }
            // The guest's own stores come later.
            ServerEvent::Restored => {
                if let Some(mac) = address.take() {
                    set_address(mac.0);
                }
            }
            ServerEvent::Negotiated | ServerEvent::InterruptsChanged | ServerEvent::Reset => {}
        })
    }

    fn fill(&self, status: &mut ContextStatus) {
        status.carrier = self.turns.carrier(self.port);
        status.frames = self.turns.counters(self.port).unwrap_or_default();
    }
}

/// Switches bus mastering off: the NIC reads and writes no memory until somebody switches it on.
fn stop_dma(function: &SharedFunction) {
    let mut function = function.lock().unwrap_or_else(PoisonError::into_inner);
    let mut command = [0; 2];
    function.config_read(offset::COMMAND, &mut command);
    let without = u16::from_le_bytes(command) & !Command::BUS_MASTER.bits();
    function.config_write(offset::COMMAND, &without.to_le_bytes());
}
