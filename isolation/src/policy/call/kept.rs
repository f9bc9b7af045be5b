//! What a policy knows of the guest's memory between two calls, to be put back when that memory is.

use std::sync::Arc;

use super::super::reach::Start;
use super::DriverPolicy;
use super::handed_out::EarlierAllocations;

/// What earlier calls have left in a policy. What single calls open is closed at their end, and all
/// else comes from the guest's types and symbols, which do not change.
#[derive(Debug)]
pub(crate) struct KeptPolicy {
    owned: Arc<EarlierAllocations>,
    interfaces: Vec<Start>,
}

impl DriverPolicy {
    /// What a policy of which no call is under way has to have again with the guest's memory of
    /// this moment.
    pub(crate) fn keep(&self) -> KeptPolicy {
        KeptPolicy {
            owned: self.owned.clone(),
            interfaces: self.interfaces.clone(),
        }
    }

    /// The guest's memory is as it was when `kept` was: what was handed out to the driver since is
    /// somebody else's.
    pub(crate) fn put_back(&mut self, kept: &KeptPolicy) {
        self.end(false);
        self.owned = kept.owned.clone();
        self.interfaces.clone_from(&kept.interfaces);
    }
}
