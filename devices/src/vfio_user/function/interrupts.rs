//! What the function interrupts by: INTx, or MSI-X while the guest has turned it on.

use std::sync::PoisonError;

use super::{FunctionError, VfioUserFunction};
use crate::pci::msix::Msix;
use crate::vfio_user::message::{CONFIG_REGION, INTX, IrqAction, MSIX};

/// Message Control: MSI-X Enable.
const MSIX_ENABLE: u16 = 1 << 15;
/// Message Control: Function Mask.
const MSIX_FUNCTION_MASK: u16 = 1 << 14;

impl VfioUserFunction {
    /// Has the server interrupt by what the guest uses now.
    pub(super) fn connect_interrupts(&mut self) -> Result<(), FunctionError> {
        let enabled = self.msix.as_ref().is_some_and(Msix::enabled);
        let has_msix = self.msix.is_some();
        let client = self
            .client
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        // A real function has one kind at a time.
        if enabled {
            if self.shape.has_intx {
                client.act_on_irqs(INTX, IrqAction::Trigger, 0)?;
            }
            client.set_irqs(MSIX, IrqAction::Trigger, &self.events)?;
            return Ok(());
        }
        if has_msix {
            client.act_on_irqs(MSIX, IrqAction::Trigger, 0)?;
        }
        if let (true, Some(line)) = (self.shape.has_intx, &self.line) {
            client.set_irqs(
                INTX,
                IrqAction::Trigger,
                std::slice::from_ref(&line.trigger),
            )?;
            client.set_irqs(INTX, IrqAction::Unmask, std::slice::from_ref(&line.unmask))?;
        }
        Ok(())
    }

    /// Message Control after a write to configuration space, if that reaches it.
    pub(super) fn control_after(&self, at: u16, data: &[u8]) -> Option<u16> {
        let msix = self.msix.as_ref()?;
        let mut bytes = msix.control().to_le_bytes();
        let start = msix.capability_offset() + 2;
        let mut reached = false;
        for (n, byte) in bytes.iter_mut().enumerate() {
            let index = (usize::from(start) + n).checked_sub(usize::from(at));
            if let Some(new) = index.and_then(|index| data.get(index)) {
                (*byte, reached) = (*new, true);
            }
        }
        let changes = MSIX_ENABLE | MSIX_FUNCTION_MASK;
        let control = u16::from_le_bytes(bytes) & changes;
        reached.then_some(control)
    }

    /// Vectors are routed before the server may use them, and not taken away before it has heard.
    pub(super) fn write_control(&mut self, control: u16, at: u16, data: &[u8]) {
        let enabled = self.msix.as_ref().is_some_and(Msix::enabled);
        let enables = control & MSIX_ENABLE != 0;
        let delivers = enables && control & MSIX_FUNCTION_MASK == 0;
        let route = |function: &mut Self| {
            if let Some(msix) = &mut function.msix {
                msix.control_written(control);
            }
        };
        if delivers || enables && !enabled {
            route(self);
        }
        if enables && !enabled {
            self.reconnect_interrupts();
        }
        let written = self.client().region_write(CONFIG_REGION, at.into(), data);
        self.check(written);
        route(self);
        if enabled && !enables {
            self.reconnect_interrupts();
        }
    }

    /// Has the server interrupt by nothing until they are connected again.
    pub(super) fn disconnect_interrupts(&mut self) {
        for (is_there, kind) in [(self.shape.has_intx, INTX), (self.msix.is_some(), MSIX)] {
            if is_there && self.is_connected() {
                let ended = self.client().act_on_irqs(kind, IrqAction::Trigger, 0);
                self.check(ended);
            }
        }
    }

    pub(super) fn reconnect_interrupts(&mut self) {
        if let Err(FunctionError::Client(error)) = self.connect_interrupts() {
            self.check::<()>(Err(error));
        }
    }
}
