//! The keyboard controller for ACPI: a keyboard's device with both ports and its interrupt, and a
//! mouse's with the other one. The first is there without a keyboard, too: it is by it that Linux
//! finds the controller (`drivers/input/serio/i8042-acpipnpio.h`).

use acpi_tables::aml::{Device, EISAName, IO, Interrupt, Name, ResourceTemplate};
use acpi_tables::{Aml, AmlSink};
use devices::i8042::{AUX_IRQ, COMMAND_PORT, DATA_PORT, KEYBOARD_IRQ};

/// Both devices. Their interrupts are edge-triggered and active high, as ISA's are.
pub(super) fn devices(aml: &mut dyn AmlSink) {
    let line = |irq: u8| Interrupt::new(true, true, false, false, u32::from(irq));
    let data = IO::new(DATA_PORT, DATA_PORT, 1, 1);
    let command = IO::new(COMMAND_PORT, COMMAND_PORT, 1, 1);
    let (keyboard, aux) = (line(KEYBOARD_IRQ), line(AUX_IRQ));
    // 101-key keyboard, and PS/2 mouse.
    for (name, id, resources) in [
        (
            "KBD_",
            "PNP0303",
            ResourceTemplate::new(vec![&data, &command, &keyboard]),
        ),
        ("MOU_", "PNP0F13", ResourceTemplate::new(vec![&aux])),
    ] {
        Device::new(
            name.into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new(id)),
                &Name::new("_CRS".into(), &resources),
            ],
        )
        .to_aml_bytes(aml);
    }
}
