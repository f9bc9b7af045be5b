//! Devices that are at fixed ports and not on the PCI bus, and which modules drive what is behind
//! them: the keyboard controller, behind which each port is a device of the guest's bus `serio`.

use std::sync::Arc;

use agent_protocol::{Client, ClientError};
use devices::hold::{Holdable, HoldableSet};
use devices::i8042::HoldableI8042;
use vmm::VmHandle;

use super::nics::{driver_in, read};

/// Ports of the bus that are looked at: a controller has two, and one that was plugged in again has
/// another number.
const MAX_PORTS: usize = 8;

/// The device at fixed ports that `module` drives in the guest, if it does.
///
/// # Errors
/// The agent does not answer.
pub fn driven_by(
    module: &str,
    vm: &VmHandle,
    agent: &mut Client,
) -> Result<Option<Arc<dyn Holdable>>, ClientError> {
    let Some(controller) = vm.i8042() else {
        return Ok(None);
    };
    for port in 0..MAX_PORTS {
        let uevent = format!("/sys/devices/platform/i8042/serio{port}/uevent");
        let Some(text) = read(agent, &uevent)? else {
            continue;
        };
        let Some(driver) = driver_in(&text) else {
            continue;
        };
        // As of a PCI device: the module's folder has a link to its driver.
        let own = format!("/sys/module/{module}/drivers/serio:{driver}/serio{port}/uevent");
        if read(agent, &own)?.is_some() {
            return Ok(Some(Arc::new(HoldableI8042(controller))));
        }
    }
    Ok(None)
}

/// Both as one.
pub fn together(
    one: Option<Arc<dyn Holdable>>,
    other: Option<Arc<dyn Holdable>>,
) -> Option<Arc<dyn Holdable>> {
    HoldableSet::of(one.into_iter().chain(other))
}
