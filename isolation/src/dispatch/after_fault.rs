//! What becomes of a call that was taken back: the question that is asked after each abort.

use crate::domain::violation::{Violation, ViolationKind};
use crate::status::report::ViolationReport;

/// An isolated call that failed and was taken back.
#[derive(Debug, Clone, Copy)]
pub struct FailedCall<'a> {
    /// The isolated function.
    pub entry: &'a str,
    /// What it did.
    pub violation: &'a Violation,
    /// Whether its device is not as before the call.
    pub device_lost: bool,
    /// How often the same call was run by now, at least 1.
    pub attempts: u32,
    /// Whether its caller cannot know that it failed, as the function returns nothing, or does not
    /// look at what it returns.
    pub unheard: bool,
    /// Whether it has used up the time that it may take, over all runs: it cannot be run again.
    pub out_of_time: bool,
    /// Whether the call of this function before it failed, too: none has ended well in between.
    pub in_a_row: bool,
}

impl FailedCall<'_> {
    /// Whether it was the domain that failed, and not the driver.
    pub fn domain_failed(&self) -> bool {
        self.violation.kind == ViolationKind::DomainFailed
    }
}

/// Hears of calls that failed, each once its caller runs again, in their order. On whichever thread
/// has the time: it must not wait for a vCPU, nor ask for reports.
pub type Listener = Box<dyn Fn(&ViolationReport) + Send + Sync>;

/// What its caller sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterFault {
    /// The call returns an error.
    ReturnError,
    /// The call is run once more, in the domain.
    Retry,
    /// The call returns an error, and so does each further one of this function without being run,
    /// until the driver's device begins anew: a resume of it begins, or the module is isolated
    /// again. The device is silenced.
    Rest,
    /// The call returns an error, and from now on all isolated functions of the module do so
    /// without being run. The device is silenced.
    Stop,
}

/// Decides after each abort. Called on a vCPU's thread with the other vCPUs held: it must not wait.
pub trait FaultPolicy: Send {
    /// Decides what becomes of `call`.
    fn after_fault(&mut self, call: &FailedCall<'_>) -> AfterFault;

    /// Whoever is to hear of all calls that it decides about.
    fn listener(&self) -> Option<Listener> {
        None
    }
}

/// Every call that failed returns an error, however many they are.
#[derive(Debug, Clone, Copy, Default)]
pub struct ReturnErrors;

impl FaultPolicy for ReturnErrors {
    fn after_fault(&mut self, _call: &FailedCall<'_>) -> AfterFault {
        AfterFault::ReturnError
    }
}
