//! A function of the host of which there is no description: the drivers in the guests keep its
//! state themselves. Each suspends it before somebody else gets it, and resumes it in its turn.
//!
//! ```text
//!   switch ─► old VM's control socket: hand over ─► its guest's driver suspends the device
//!          ─► memory, interrupts, a reset: as in [`switching`]
//!          ─► new VM's control socket: take over ─► its guest's driver resumes the device
//! ```

mod drivers;
mod switching;
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use devices::dma::{DmaListener, DmaSpace};
use devices::vfio::passed::driven::{DrivenFunction, DrivenKind};
use devices::vfio::passed::hardware::Hardware;
use devices::vfio::passed::opened::Opened;
use devices::vfio_user::Offered;
use devices::vfio_user::server::{ClientInterrupts, ServerEvent};
use devices::wire::turns::TurnTimes;
use vmm::SharedSubscriber;

use self::drivers::Drivers;
pub use self::drivers::OverSockets;
use self::switching::DrivenSwitch;
use super::at_step::Waiting;
use super::card::{Card, Passing};
use super::context::Context;
use super::follows::Follows;
use super::held::lock;
use super::protocol::{ContextStatus, HostStatus};
use super::share::{Listener, Share};
use crate::options::MacAddress;

/// See the module.
pub struct DrivenCard {
    kind: Arc<DrivenKind>,
    /// The hardware, while nobody has it.
    shelf: Mutex<Option<Box<dyn Hardware>>>,
    drivers: Box<dyn Drivers>,
    waiting: Waiting,
}

impl DrivenCard {
    /// The function that was opened; what its users' drivers are to do is asked of `drivers`.
    ///
    /// # Errors
    /// It cannot be reset.
    pub fn open(opened: Opened, drivers: OverSockets) -> anyhow::Result<Self> {
        let (kind, hardware) = DrivenKind::open(opened)?;
        let (address, device) = (kind.address(), kind.name());
        tracing::info!(%address, device, "the function is this process's, and its drivers keep its state");
        Ok(Self::of(kind, hardware, Box::new(drivers)))
    }

    fn of(kind: DrivenKind, hardware: Box<dyn Hardware>, drivers: Box<dyn Drivers>) -> Self {
        Self {
            kind: Arc::new(kind),
            shelf: Mutex::new(Some(hardware)),
            drivers,
            waiting: Waiting::of_process(),
        }
    }
}

impl Card for DrivenCard {
    type Share = DrivenShare;

    fn name(&self) -> String {
        self.kind.name()
    }

    fn is_suspended_by_drivers(&self) -> bool {
        true
    }

    fn share(&self, _mac: MacAddress) -> anyhow::Result<DrivenShare> {
        let dma = DmaSpace::empty();
        let (function, interrupts) = DrivenFunction::new(self.kind.clone(), dma.clone())?;
        let function = Arc::new(Mutex::new(function));
        let told = function.clone();
        let follows = Follows::by(move |removed, added| lock(&told).memory_changed(removed, added));
        dma.listen(Arc::downgrade(&follows));
        Ok(DrivenShare {
            function,
            _follows: follows,
            dma,
            interrupts,
            turn: AtomicBool::default(),
        })
    }

    fn pass_on(
        &self,
        from: Option<&Context<DrivenShare>>,
        to: Option<&Context<DrivenShare>>,
    ) -> Passing {
        let mut shelf = lock(&self.shelf);
        let mut device = DrivenSwitch::new(&mut shelf, self.drivers.as_ref());
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
    }
}

/// A VM's part of the function.
pub struct DrivenShare {
    function: Arc<Mutex<DrivenFunction>>,
    /// Hears of the VM's memory.
    _follows: Arc<dyn DmaListener>,
    dma: DmaSpace,
    interrupts: ClientInterrupts,
    turn: AtomicBool,
}

impl Share for DrivenShare {
    fn offered(&self) -> Offered {
        Offered {
            function: self.function.clone(),
            dma: self.dma.clone(),
            interrupts: self.interrupts.clone(),
        }
    }

    fn events(&self) -> Option<SharedSubscriber> {
        None
    }

    /// The VM gives it to the interface itself.
    fn set_address(&self, _mac: MacAddress) {}

    /// It is at no wire.
    fn plug(&self, _plugged: bool) -> anyhow::Result<()> {
        Ok(())
    }

    fn has_turn(&self) -> bool {
        self.turn.load(Ordering::Acquire)
    }

    fn listener(&self, _address: Option<MacAddress>) -> Listener {
        let function = self.function.clone();
        Box::new(move |event| match event {
            ServerEvent::InterruptsChanged => lock(&function).interrupts_changed(),
            ServerEvent::Gone(_) => lock(&function).client_gone(),
            ServerEvent::Negotiated | ServerEvent::Reset | ServerEvent::Restored => {}
        })
    }

    fn fill(&self, status: &mut ContextStatus) {
        let function = lock(&self.function);
        status.carrier = function.has_device();
        status.mapped_bytes = Some(function.mapped_bytes());
        status.passed = Some(function.counters());
    }
}
