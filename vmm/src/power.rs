//! Fixed devices that turn the machine off, restart it, or tell the guest that it should turn
//! itself off. The guest learns of them from ACPI ([`crate::acpi`]).
//!
//! | port | register |
//! | --- | --- |
//! | 0x64 | keyboard controller's command port where there is none: 0xFE resets |
//! | 0xCF9 | reset control, as on PC chipsets: bit 2 set resets; ACPI's reset register |
//! | 0x600 | ACPI sleep control (ACPI 6.5, section 4.8.3.7): SLP_TYP in bits 4:2, SLP_EN in bit 5 |
//! | 0x601 | ACPI sleep status: WAK_STS in bit 7 |
//! | 0x604 | events of the generic event device: bit 0 power button, bit 1 PCI hot-plug, bit 2 VM generation ID; reading clears |

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use devices::bus::BusDevice;
use devices::irq::IrqLine;
use serde::{Deserialize, Serialize};

use crate::lifecycle::{Request, Requests};

/// Value that ACPI tells the guest to write to [`RESET_PORT`].
pub const RESET_VALUE: u8 = 0x06;
/// Reset control port.
pub const RESET_PORT: u16 = 0xcf9;
/// Number of ports from [`crate::layout::POWER_PORTS`].
pub const POWER_PORT_COUNT: u16 = 8;
/// Offset of the sleep control register.
pub const SLEEP_CONTROL: u16 = 0;
/// Offset of the sleep status register.
pub const SLEEP_STATUS: u16 = 1;
/// Offset of the event register.
pub const EVENTS: u16 = 4;
/// Bit of the event register: the power button was pressed.
pub const EVENT_POWER_BUTTON: u8 = 1;
/// Bit of the event register: functions come or are to go, see [`crate::hotplug`].
pub const EVENT_PCI_HOTPLUG: u8 = 2;
/// Bit of the event register: the VM generation ID is another one, see [`crate::generation`].
pub const EVENT_GENERATION: u8 = 4;
/// SLP_TYP of the soft-off state, S5.
pub const SLEEP_TYPE_S5: u8 = 5;

const SLP_EN: u8 = 1 << 5;

/// Real-mode code for [`crate::layout::RESET_VECTOR`]: all there is of a BIOS. Linux ends there
/// when it restarts a machine that has hardware-reduced ACPI and no EFI: it prefers EFI's reset on
/// such machines, and the BIOS's where there is none.
pub(crate) const RESET_VECTOR_CODE: [u8; 9] = [
    0xba,
    RESET_PORT as u8,
    (RESET_PORT >> 8) as u8, // mov dx, RESET_PORT
    0xb0,
    RESET_VALUE, // mov al, RESET_VALUE
    0xee,        // out dx, al
    0xf4,        // hlt
    0xeb,
    0xfd, // jmp to hlt
];

/// State of the sleep and event registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PowerState {
    events: u8,
}

/// The sleep and event registers.
pub(crate) struct PowerDevice {
    requests: Arc<Requests>,
    irq: Arc<dyn IrqLine>,
    events: AtomicU8,
    /// Whoever announces something has it: an edge while the line is up would be none.
    announcing: Mutex<()>,
}

impl PowerDevice {
    pub fn new(requests: Arc<Requests>, irq: Arc<dyn IrqLine>) -> Self {
        Self {
            requests,
            irq,
            events: AtomicU8::new(0),
            announcing: Mutex::default(),
        }
    }

    /// Presses the power button: a guest that listens turns itself off.
    pub fn press_button(&self) {
        self.announce(EVENT_POWER_BUTTON);
    }

    /// Lets the guest see `event`: each gives the line an edge of its own.
    pub fn announce(&self, event: u8) {
        let _announcing = self
            .announcing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.events.fetch_or(event, Ordering::AcqRel);
        self.irq.set_level(true);
        self.irq.set_level(false);
    }

    pub fn save(&self) -> PowerState {
        PowerState {
            events: self.events.load(Ordering::Acquire),
        }
    }

    pub fn restore(&self, state: PowerState) {
        self.events.store(state.events, Ordering::Release);
    }
}

impl BusDevice for PowerDevice {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset == u64::from(EVENTS)
            && let Some(first) = data.first_mut()
        {
            *first = self.events.swap(0, Ordering::AcqRel);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == u64::from(SLEEP_CONTROL)
            && let Some(&value) = data.first()
            && value & SLP_EN != 0
            && value >> 2 & 7 == SLEEP_TYPE_S5
        {
            self.requests.push(Request::PowerOff);
        }
    }
}

/// The reset control register.
pub(crate) struct ResetControl(pub Arc<Requests>);

impl BusDevice for ResetControl {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data.first().is_some_and(|value| value & 0x04 != 0) {
            tracing::info!("the guest restarts the machine");
            self.0.push(Request::Reset);
        }
    }
}

/// What is left of the keyboard controller where there is none ([`crate::Vm::add_mouse`]).
pub(crate) struct KeyboardController(pub Arc<Requests>);

impl BusDevice for KeyboardController {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // Status: no data, ready for a command. All ones would keep old kernels waiting.
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data.first() == Some(&0xfe) {
            self.0.push(Request::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize};

    use super::*;
    use crate::gate::Gate;

    /// Counts edges; whoever raises it lets others go on before it comes down.
    #[derive(Default)]
    struct Line {
        up: AtomicBool,
        edges: AtomicUsize,
    }

    impl IrqLine for Line {
        fn set_level(&self, asserted: bool) {
            if self.up.swap(asserted, Ordering::AcqRel) != asserted && asserted {
                self.edges.fetch_add(1, Ordering::AcqRel);
            }
            if asserted {
                std::thread::yield_now();
            }
        }
    }

    #[test]
    fn each_announcement_has_an_edge_of_its_own() {
        const EACH: usize = 2000;
        let line = Arc::new(Line::default());
        let requests = Arc::new(Requests::new(Arc::new(Gate::new(1))).unwrap());
        let device = PowerDevice::new(requests, line.clone());
        std::thread::scope(|scope| {
            for event in [EVENT_POWER_BUTTON, EVENT_PCI_HOTPLUG, EVENT_GENERATION] {
                let device = &device;
                scope.spawn(move || (0..EACH).for_each(|_| device.announce(event)));
            }
        });
        assert_eq!(line.edges.load(Ordering::Acquire), 3 * EACH);
        assert!(!line.up.load(Ordering::Acquire));
        let mut seen = [0];
        device.read(u64::from(EVENTS), &mut seen);
        assert_eq!(
            seen,
            [EVENT_POWER_BUTTON | EVENT_PCI_HOTPLUG | EVENT_GENERATION]
        );
    }
}
