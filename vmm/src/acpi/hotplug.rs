//! PCI slots whose device can come and go: an object for each, and the method that tells the guest
//! which.
//!
//! The registers are those of [`crate::hotplug`]. `CHNG` reads them once (reading clears) and
//! notifies each slot that they name: 1, a device came; 3, it is to be ejected. `_EJ0` of a slot
//! writes its bit.

use acpi_tables::aml::{
    And, Device, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local,
    Method, Name, Notify, OpRegion, OpRegionSpace, Path, Store,
};
use acpi_tables::{Aml, AmlSink};

use super::address;
use crate::hotplug::HOTPLUG_PORT_COUNT;
use crate::layout;

/// Notification values (ACPI 6.5, section 5.6.6).
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;

/// The method that the event device calls.
pub(super) fn method_path() -> Path {
    Path::new("\\_SB_.PCI0.CHNG")
}

/// Name of the object of `slot`.
fn name(slot: u8) -> Path {
    Path::new(&format!("S{slot:03}"))
}

/// Writes the objects of `slots` and the method, for the scope of the PCI root.
pub(super) fn slots(slots: &[u8], aml: &mut dyn AmlSink) {
    OpRegion::new(
        "HPRG".into(),
        OpRegionSpace::SystemIO,
        &layout::HOTPLUG_PORTS,
        &HOTPLUG_PORT_COUNT,
    )
    .to_aml_bytes(aml);
    let register = |name| FieldEntry::Named(name, 32);
    Field::new(
        "HPRG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![register(*b"PCIU"), register(*b"PCID"), register(*b"PCIE")],
    )
    .to_aml_bytes(aml);
    for &slot in slots {
        let bit = 1u32 << slot;
        Device::new(
            name(slot),
            vec![
                &Name::new("_ADR".into(), &address(slot, 0)),
                &Name::new("_SUN".into(), &slot),
                &Method::new(
                    "_EJ0".into(),
                    1,
                    true,
                    vec![&Store::new(&Path::new("PCIE"), &bit)],
                ),
            ],
        )
        .to_aml_bytes(aml);
    }
    let mut code = Vec::new();
    Store::new(&Local(0), &Path::new("PCIU")).to_aml_bytes(&mut code);
    Store::new(&Local(1), &Path::new("PCID")).to_aml_bytes(&mut code);
    for &slot in slots {
        for (register, event) in [(Local(0), DEVICE_CHECK), (Local(1), EJECT_REQUEST)] {
            And::new(&Local(2), &register, &(1u32 << slot)).to_aml_bytes(&mut code);
            If::new(&Local(2), vec![&Notify::new(&name(slot), &event)]).to_aml_bytes(&mut code);
        }
    }
    Method::new("CHNG".into(), 0, true, vec![&super::Raw(code)]).to_aml_bytes(aml);
}
