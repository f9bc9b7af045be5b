//! NICs that are not in this process write guest memory without it: what follows changes of memory,
//! or works on a copy of it, does not see what they write. Until it does, the two exclude each
//! other.

use isolation::attach::Isolator;
use vmm::{Refused, VmHandle, VmState};

use super::nics::Nics;

/// That none of `nics` is elsewhere, so that the VM can be `done`.
///
/// # Errors
/// Which one is.
pub fn none(nics: &Nics, done: &str) -> Result<(), String> {
    match nics.elsewhere() {
        Some(nic) => Err(format!(
            "the NIC at {} ({}) writes guest memory without this process: such a VM cannot be {done} yet",
            nic.address(),
            nic.config.nic.wire()
        )),
        None => Ok(()),
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
        None => Ok(()),
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
