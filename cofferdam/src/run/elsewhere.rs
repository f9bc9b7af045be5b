//! NICs that are not in this process write guest memory without it: what follows changes of memory,
//! does not see what they write. Snapshots, marks and rewinds do without: where a device host has the
//! NIC, it has it stand still while all memory and its state are taken, or put back.

use std::fmt::{self, Debug, Formatter};
use std::sync::{Arc, Mutex, PoisonError};

use devices::vfio_user::VfioUserFunction;

use isolation::attach::Isolator;
use vmm::{Others, Outside, Refused, VmHandle, VmState};

use super::nics::Nics;

/// That each of `nics` that is elsewhere gives its state away, so that the VM can be `done`.
///
/// # Errors
/// Which one does not.
pub fn give_state(nics: &Nics, done: &str) -> Result<(), String> {
    let all = nics.all().into_iter();
    let mut kept = all.filter(|nic| nic.is_elsewhere() && nic.remote.is_none());
    match kept.next() {
        Some(nic) => Err(format!(
            "the NIC at {} ({}) is a function of the host, whose state is not taken: such a VM cannot be {done} yet",
            nic.address(),
            nic.config.nic.wire()
        )),
        None => Ok(()),
    }
}

/// Devices of a guest's NICs that are elsewhere.
#[derive(Clone)]
pub struct Elsewhere(pub Nics);

impl Debug for Elsewhere {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("NICs that are elsewhere")
    }
}

impl Outside for Elsewhere {
    fn writes(&self) -> bool {
        self.0.elsewhere().is_some()
    }

    fn stand_still(&self) -> Result<Option<Box<dyn Others>>, String> {
        give_state(&self.0, "saved or taken back")?;
        let mut still = Still(Vec::new());
        for nic in self.0.all() {
            let Some(function) = &nic.remote else {
                continue;
            };
            let stopped = {
                let mut function = function.lock().unwrap_or_else(PoisonError::into_inner);
                function.stop()
            };
            stopped.map_err(|error| {
                let (address, wire) = (nic.address(), nic.config.nic.wire());
                format!("the NIC at {address} ({wire}) does not stand still: {error}")
            })?;
            still.0.push(function.clone());
        }
        Ok((!still.0.is_empty()).then(|| Box::new(still) as Box<dyn Others>))
    }
}

/// Devices that stand still until this is dropped.
struct Still(Vec<Arc<Mutex<VfioUserFunction>>>);

impl Debug for Still {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} devices that stand still", self.0.len())
    }
}

impl Others for Still {
    fn stay(mut self: Box<Self>) {
        // Their connections end with the process.
        self.0.clear();
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        for function in &self.0 {
            let mut function = function.lock().unwrap_or_else(PoisonError::into_inner);
            function.go_on();
        }
    }
}

/// That a NIC that is elsewhere may come: nothing follows changes of memory, or works on a copy.
///
/// # Errors
/// What does.
pub fn may_come(vm: &VmHandle, isolator: &Isolator) -> Result<(), String> {
    if let Some(mark) = vm.marks().first() {
        return Err(format!(
            "the VM has marks, and would not see what a device elsewhere writes: `cofferdam marks --forget {}` first",
            mark.name
        ));
    }
    match isolator.status().first() {
        Some(module) => Err(format!(
            "{} is isolated, and would not see what a device elsewhere writes: `cofferdam release` first",
            module.module
        )),
        // What it writes is in no diff but one for which every page is looked at.
        None => vm
            .stop_tracking_changes()
            .map_err(|error| error.to_string()),
    }
}

/// Pauses the VM. What turns it has at device hosts are passed on.
pub fn pause(vm: &VmHandle, nics: &Nics) -> Result<(), Refused> {
    if vm.state() == VmState::Running {
        nics.about_to_pause();
    }
    let paused = vm.pause();
    match &paused {
        Ok(()) => nics.set_paused(true),
        Err(Refused::AlreadyPaused) => {}
        Err(_) => nics.set_paused(false),
    }
    paused
}

/// Lets the VM go on, and have turns again.
pub fn resume(vm: &VmHandle, nics: &Nics) -> Result<(), Refused> {
    vm.resume()?;
    nics.set_paused(false);
    Ok(())
}
