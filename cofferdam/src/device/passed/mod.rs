//! A function of the host's PCI bus: there is one of it, and the VM with the turn has it. The
//! others have images of it.
//!
//! The function is opened when the device host begins and is kept open: closing it would reset it.
//! Each VM's part is a function of its own ([`PassedFunction`]) with its configuration space,
//! interrupts and memory; a switch takes the hardware out of the one and puts it into the other.

mod link;
pub mod notices;
mod switching;
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
pub(super) mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use devices::dma::{DmaListener, DmaSpace};
use devices::pci::registers::parked::ParkedLink;
use devices::vfio::passed::PassedFunction;
use devices::vfio::passed::hardware::Hardware;
use devices::vfio::passed::kind::Kind;
use devices::vfio::passed::opened::Opened;
use devices::vfio_user::Offered;
use devices::vfio_user::server::{ClientInterrupts, ServerEvent};
use devices::wire::turns::TurnTimes;
use vmm::SharedSubscriber;

use self::link::LinkTimer;
use self::switching::PassedSwitch;
use super::ParkedAs;
use super::at_step::Waiting;
use super::card::{Card, Passing};
use super::context::Context;
use super::follows::Follows;
use super::held::lock;
use super::protocol::{ContextStatus, HostStatus};
use super::share::{Listener, Share};
use crate::options::MacAddress;

/// See the module.
pub struct PassedCard {
    kind: Arc<Kind>,
    link: ParkedLink,
    /// The hardware, while nobody has it.
    shelf: Mutex<Option<Box<dyn Hardware>>>,
    waiting: Waiting,
}

impl PassedCard {
    /// The function that was opened.
    ///
    /// # Errors
    /// Nobody has said how its state is taken, or it does not answer.
    pub fn open(opened: Opened, parked: ParkedAs) -> anyhow::Result<Self> {
        let (kind, hardware) = Kind::open(opened)?;
        let address = kind.address();
        tracing::info!(%address, device = kind.name(), "the function is this process's");
        Ok(Self::of(kind, hardware, parked))
    }

    /// A function that stands still.
    fn of(kind: Kind, hardware: Box<dyn Hardware>, parked: ParkedAs) -> Self {
        Self {
            kind: Arc::new(kind),
            link: match parked {
                ParkedAs::Down => ParkedLink::Down,
                ParkedAs::Stall => ParkedLink::Stays,
            },
            shelf: Mutex::new(Some(hardware)),
            waiting: Waiting::of_process(),
        }
    }
}

impl Card for PassedCard {
    type Share = PassedShare;

    fn name(&self) -> String {
        self.kind.name().to_owned()
    }

    fn share(&self, mac: MacAddress) -> anyhow::Result<PassedShare> {
        let dma = DmaSpace::empty();
        let kind = self.kind.clone();
        let (function, interrupts) = PassedFunction::new(kind, mac.0, self.link, dma.clone())?;
        let function = Arc::new(Mutex::new(function));
        let timer = match self.link {
            ParkedLink::Stays => Some(Arc::new(Mutex::new(LinkTimer::new(function.clone())?))),
            ParkedLink::Down => None,
        };
        let told = function.clone();
        let follows = Follows::by(move |removed, added| lock(&told).memory_changed(removed, added));
        dma.listen(Arc::downgrade(&follows));
        Ok(PassedShare {
            function,
            _follows: follows,
            dma,
            interrupts,
            turn: AtomicBool::default(),
            timer,
        })
    }

    fn pass_on(
        &self,
        from: Option<&Context<PassedShare>>,
        to: Option<&Context<PassedShare>>,
    ) -> Passing {
        let mut shelf = lock(&self.shelf);
        let mut device = PassedSwitch::new(&mut shelf);
        let switched = self.waiting.switch(&mut device, from.as_ref(), to.as_ref());
        let (outcome, phases) = switched;
        Passing {
            outcome,
            phases,
            turn: None,
        }
    }

    fn times(&self, _turn: u64) -> Option<TurnTimes> {
        None
    }

    /// The kernel ends DMA and interrupts and resets the function when its file is closed, which
    /// happens with the process.
    fn end(&self) {}

    fn fill(&self, status: &mut HostStatus) {
        status.function = Some(self.kind.address().to_string());
        status.lost_without_turn = self.kind.lost();
    }
}

/// A VM's part of the function.
pub struct PassedShare {
    function: Arc<Mutex<PassedFunction>>,
    /// Hears of the VM's memory.
    _follows: Arc<dyn DmaListener>,
    dma: DmaSpace,
    interrupts: ClientInterrupts,
    turn: AtomicBool,
    /// Where its link stays for a while when it is parked.
    timer: Option<Arc<Mutex<LinkTimer>>>,
}

impl PassedShare {
    fn set_turn(&self, turn: bool) {
        self.turn.store(turn, Ordering::Release);
        if let Some(timer) = &self.timer {
            lock(timer).set(!turn);
        }
    }
}

impl Share for PassedShare {
    fn offered(&self) -> Offered {
        Offered {
            function: self.function.clone(),
            dma: self.dma.clone(),
            interrupts: self.interrupts.clone(),
        }
    }

    fn events(&self) -> Option<SharedSubscriber> {
        let timer = self.timer.clone()?;
        Some(timer)
    }

    fn set_address(&self, mac: MacAddress) {
        lock(&self.function).set_address(mac.0);
    }

    /// It is at no wire.
    fn plug(&self, _plugged: bool) -> anyhow::Result<()> {
        Ok(())
    }

    fn has_turn(&self) -> bool {
        self.turn.load(Ordering::Acquire)
    }

    fn listener(&self, mut address: Option<MacAddress>) -> Listener {
        let function = self.function.clone();
        Box::new(move |event| match event {
            ServerEvent::InterruptsChanged => lock(&function).interrupts_changed(),
            ServerEvent::Gone(_) => lock(&function).client_gone(),
            // The guest's own stores come later.
            ServerEvent::Restored => {
                if let Some(mac) = address.take() {
                    lock(&function).readdress(mac.0);
                }
            }
            ServerEvent::Negotiated | ServerEvent::Reset => {}
        })
    }

    fn fill(&self, status: &mut ContextStatus) {
        let function = lock(&self.function);
        status.carrier = function.has_device() || function.link_stays();
        status.mapped_bytes = Some(function.mapped_bytes());
        status.passed = Some(function.counters());
    }
}
