//! The keyboard controller: with a mouse behind it, or nothing of it but its reset.

use std::sync::{Arc, Mutex};

use devices::bus::BusDevice;
use devices::i8042::{AUX_IRQ, COMMAND_PORT, DATA_PORT, I8042, KEYBOARD_IRQ, Port};

use crate::lifecycle::Request;
use crate::machine::Machine;
use crate::power::KeyboardController;

/// Gives the machine a controller with a mouse, if it has none yet.
pub(crate) fn add_i8042(machine: &Machine) {
    let requests = machine.requests.clone();
    let reset = move || {
        tracing::info!("the guest restarts the machine by its keyboard controller");
        requests.push(Request::Reset);
    };
    let controller = I8042::new(
        machine.line(u32::from(KEYBOARD_IRQ)),
        machine.line(u32::from(AUX_IRQ)),
        Box::new(reset),
    );
    let controller = Arc::new(Mutex::new(controller));
    if machine.i8042.set(controller.clone()).is_ok() {
        map(machine, DATA_PORT, Arc::new(Port::data(controller.clone())));
        map(machine, COMMAND_PORT, Arc::new(Port::command(controller)));
    }
}

/// Has the controller's command port reset a machine that has no controller.
pub(crate) fn map_reset(machine: &Machine) {
    if machine.i8042.get().is_none() {
        let reset = KeyboardController(machine.requests.clone());
        map(machine, COMMAND_PORT, Arc::new(reset));
    }
}

fn map(machine: &Machine, port: u16, device: Arc<dyn BusDevice>) {
    if let Err(error) = machine.pio.map(u64::from(port), 1, device) {
        // Constants: none is empty or wraps.
        tracing::error!(%error, port, "keyboard controller not mapped");
    }
}
