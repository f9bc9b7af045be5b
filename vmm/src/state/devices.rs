//! States of all devices of a machine as one value: everything that is neither in
//! [`super::MachineState`] nor in guest memory.
//!
//! Each device gives a [`Part`], which has its own kind, version and checksum; what a device is
//! connected to on the host (files, sockets, clients) is not in it. A device that was put back
//! drives its interrupts anew and has the event loop look at its rings: a notification is no state.
//!
//! Lock order: devices are locked one at a time, while no vCPU is waited for.

use devices::pci::bus::{FunctionStates, SLOT_COUNT};
use devices::state::Part;
use serde::{Deserialize, Serialize};

use super::encoding::Encoding;
use crate::error::{DEVICE_STATES_VERSION, DEVICE_STATES_VERSION_WITHOUT_I8042, Error, StateError};
use crate::machine::Machine;

/// Of a machine without a keyboard controller. A function has at most some 4 MiB, and there are 32.
const ENCODING: Encoding = Encoding {
    magic: *b"COFFDEVS",
    version: DEVICE_STATES_VERSION_WITHOUT_I8042,
    max_bytes: 160 << 20,
    what: "the states of a machine's devices",
};

/// Of one with it: the controller's state is behind the others.
const WITH_I8042: Encoding = Encoding {
    version: DEVICE_STATES_VERSION,
    ..ENCODING
};

/// See the module's text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStates {
    functions: FunctionStates,
    serial: Part,
    /// The guest's kernel has told that it panicked.
    panicked: bool,
    /// Slots whose function came while the machine ran, as bits.
    plugged: u32,
    /// Those of them that were asked back from the guest.
    leaving: u32,
    /// The keyboard controller, if there is one: it is written by [`WITH_I8042`].
    #[serde(skip)]
    i8042: Option<Part>,
}

impl DeviceStates {
    /// Takes the states of all devices of `machine`, which nobody uses meanwhile.
    pub(crate) fn save(machine: &Machine) -> Result<Self, Error> {
        let (plugged, leaving) = machine.hotplug.plugged();
        let functions = machine.pci.save_functions();
        let serial = machine.serial().save();
        let i8042 = machine.i8042().map(|controller| controller.save());
        Ok(Self {
            functions: functions.map_err(StateError::Functions)?,
            serial: serial.map_err(StateError::Serial)?,
            panicked: machine.panic.panicked(),
            plugged,
            leaving,
            i8042: i8042.transpose().map_err(StateError::KeyboardController)?,
        })
    }

    /// That `others` are of the same kinds of devices in the same places.
    pub(crate) fn are_like(&self, others: &Self) -> Result<(), StateError> {
        if self.plugged != others.plugged {
            return Err(plugged(others.plugged, self.plugged));
        }
        if self.i8042.is_some() != others.i8042.is_some() {
            let here = self.i8042.is_some();
            return Err(StateError::OneHasMouse { here });
        }
        Ok(self.functions.are_like(&others.functions)?)
    }

    /// Puts them back into `machine`, which has the same devices and whose own state was put back
    /// before.
    pub(crate) fn restore(&self, machine: &Machine) -> Result<(), Error> {
        let (here, _) = machine.hotplug.plugged();
        if here != self.plugged {
            return Err(plugged(self.plugged, here).into());
        }
        let here = machine.i8042.get().is_some();
        if here != self.i8042.is_some() {
            return Err(StateError::OneHasMouse { here }.into());
        }
        machine
            .pci
            .restore_functions(&self.functions)
            .map_err(StateError::Functions)?;
        machine
            .serial()
            .restore(&self.serial)
            .map_err(StateError::Serial)?;
        if let Some((mut controller, part)) = machine.i8042().zip(self.i8042.as_ref()) {
            let restored = controller.restore(part);
            restored.map_err(StateError::KeyboardController)?;
        }
        machine.panic.set_panicked(self.panicked);
        machine.hotplug.set_leaving(self.leaving);
        Ok(())
    }

    /// Slot and kind of each PCI function.
    pub fn functions(&self) -> impl Iterator<Item = (u8, &str)> {
        self.functions.kinds()
    }

    /// The states as bytes.
    pub fn to_bytes(&self) -> Result<Vec<u8>, StateError> {
        match &self.i8042 {
            Some(controller) => WITH_I8042.write(&(self, controller)),
            None => ENCODING.write(self),
        }
    }

    /// The states that [`DeviceStates::to_bytes`] gave. Whether this machine can have them is known
    /// only when they are put back.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        match WITH_I8042.read::<(Self, Part)>(bytes) {
            Ok((states, controller)) => Ok(Self {
                i8042: Some(controller),
                ..states
            }),
            Err(StateError::Version {
                found: DEVICE_STATES_VERSION_WITHOUT_I8042,
                ..
            }) => ENCODING.read(bytes),
            Err(error) => Err(error),
        }
    }
}

/// Other functions came while the machine ran: slots as bits.
fn plugged(found: u32, here: u32) -> StateError {
    let slots = |bits: u32| {
        let all = 0..SLOT_COUNT;
        all.filter(|slot| bits >> slot & 1 == 1).collect()
    };
    StateError::Plugged {
        found: slots(found),
        here: slots(here),
    }
}
