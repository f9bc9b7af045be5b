//! Interrupt causes and the INTx line (13.4.17 to 13.4.21, 3.2.7 and 3.4.3).
//!
//! The line is asserted while a cause that is set is not masked: `ICR & IMS != 0`. ITR only delays
//! the next time that it becomes asserted. The `IrqLine` is called when the level changes and never
//! otherwise.

use serde::{Deserialize, Serialize};

use super::E1000;
use super::regs::{ITR, icr};
use super::timers::Timer;
use crate::clock::monotonic_ns;
use crate::pci::config::Command;

/// Nanoseconds in a unit of ITR.
const ITR_UNIT_NS: u64 = 256;
/// Longest time that ITR can ask for: what was before that does not matter.
pub const LONGEST_THROTTLE_NS: u64 = 0xffff * ITR_UNIT_NS;

/// What the interrupt logic remembers besides its registers.
#[derive(Debug, Clone, Default)]
pub struct InterruptLine {
    /// The controller wants the line asserted.
    pub asserted: bool,
    /// Level that the line was last driven to.
    pub driven: bool,
    /// When it was last asserted.
    pub last_assertion_ns: Option<u64>,
    /// The line stays as it is, whatever the controller wants.
    pub frozen: bool,
    /// The line is kept low, whatever the controller wants: somebody outside of it asks for that.
    /// No part of the controller's state.
    pub withheld: bool,
}

/// [`InterruptLine`] in a checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterruptState {
    pub(super) asserted: bool,
    pub(super) since_assertion_ns: Option<u64>,
}

impl E1000 {
    /// Sets causes; asserts the line where it should be.
    pub(super) fn raise(&mut self, causes: u32) {
        if causes != 0 {
            self.set_causes(causes & icr::ALL);
            self.update_interrupt();
        }
    }

    /// Reading ICR acknowledges all causes.
    pub(super) fn read_icr(&mut self) -> u32 {
        if self.line.driven {
            self.interrupts_taken.record(monotonic_ns());
        }
        let causes = self.take_causes(u32::MAX);
        if causes != 0 {
            self.update_interrupt();
        }
        causes
    }

    /// Clears causes as a read of ICR or a write to it does.
    pub(super) fn clear_causes(&mut self, causes: u32) {
        self.take_causes(causes);
        self.update_interrupt();
    }

    /// Sets or clears bits of the interrupt mask.
    pub(super) fn change_interrupt_mask(&mut self, bits: u32, set: bool) {
        self.change_mask(bits & icr::ALL, set);
        self.update_interrupt();
    }

    /// Brings the line to the level that causes, mask and throttle ask for.
    pub(super) fn update_interrupt(&mut self) {
        let (causes, mask) = self.causes_and_mask();
        let pending = causes & mask != 0;
        if pending && !self.line.asserted {
            if let Some(wait_ns) = self.throttled_for() {
                self.timers.start_if_idle(Timer::Throttle, wait_ns);
                return;
            }
            self.line.asserted = true;
        } else if !pending && self.line.asserted {
            self.line.asserted = false;
        }
        self.drive_line();
    }

    /// How long the line may not be asserted yet. `None`, and the interval begins, when it may.
    fn throttled_for(&mut self) -> Option<u64> {
        let interval = u64::from(self.regs.get(ITR)) * ITR_UNIT_NS;
        if interval == 0 {
            return None;
        }
        let now = self.timers.now();
        if let Some(last) = self.line.last_assertion_ns {
            let passed = now.saturating_sub(last);
            if passed < interval {
                return Some(interval - passed);
            }
        }
        self.line.last_assertion_ns = Some(now);
        None
    }

    /// Leaves the line as it is from now on, or drives it again to what the controller wants by
    /// then.
    pub fn freeze_interrupts(&mut self, freeze: bool) {
        self.line.frozen = freeze;
        self.drive_line();
    }

    /// Keeps the line low from now on, or lets it be driven again to what the controller wants by
    /// then. A reset ends it as well.
    pub fn withhold_interrupts(&mut self, withhold: bool) {
        self.line.withheld = withhold;
        self.drive_line();
    }

    /// Drives the line to what the controller wants and configuration space allows.
    pub(super) fn drive_line(&mut self) {
        let level = self.line.asserted
            && !self.line.withheld
            && !self.config.command().contains(Command::INTERRUPT_DISABLE);
        if level != self.line.driven && !self.line.frozen {
            self.line.driven = level;
            self.intx.set_level(level);
        }
    }
}
