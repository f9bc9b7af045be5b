//! ACPI tables: hardware-reduced ACPI (ACPI 6.5, section 4.1), as virtual machines need no more.
//!
//! There is no PM timer, no SCI and no legacy interrupt controller for the guest to program. It
//! turns itself off by the sleep control register, restarts by the reset register, and hears of the
//! power button through a generic event device (all in [`crate::power`]). The FADT says that there
//! is no VGA and no CMOS clock, and no keyboard controller unless the machine has one, so that a guest
//! does not wait for them; it takes the time from KVM's clock.
//!
//! ```text
//! RSDP ─► XSDT ─┬► FADT ─► DSDT (PCI root and its slots, COM1, ECAM's reservation, power button,
//!               │               panic device, VM generation ID, _S5)
//!               ├► MADT (local APICs, I/O APIC)
//!               └► MCFG (ECAM of bus 0)
//! ```

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, MethodCall,
    Name, Notify, ONE, OpRegion, OpRegionSpace, PackageBuilder, Path, ResourceTemplate, Scope,
    Store, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use devices::pci::bus::{CONFIG_PORTS, CONFIG_PORTS_LEN, ECAM_BUS_BYTES, SLOT_COUNT, Windows};
use devices::serial::{COM1_IRQ, COM1_PORT, UART_PORTS};
use vm_memory::{Bytes, GuestAddress};

use crate::error::Error;
use crate::layout;
use crate::memory::GuestRam;
use crate::power;

const OEM_ID: [u8; 6] = *b"COFFER";
const OEM_TABLE_ID: [u8; 8] = *b"COFFERDM";
const OEM_REVISION: u32 = 1;

/// FADT IAPC_BOOT_ARCH (ACPI 6.5, table 5.11): no VGA, no CMOS clock.
const BOOT_ARCH: u16 = 1 << 2 | 1 << 5;
/// The same word: there is a keyboard controller.
const BOOT_ARCH_8042: u16 = 1 << 1;

/// What the tables describe.
pub(crate) struct Machine {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// PCI slots whose device can come and go while the guest runs.
    pub removable_slots: Vec<u8>,
    /// Whether there is a keyboard controller, with a mouse.
    pub has_i8042: bool,
    /// Where PCI devices decode.
    pub windows: Windows,
}

/// Writes the tables into guest memory, the RSDP at [`layout::ACPI_TABLES`].
pub(crate) fn write(ram: &GuestRam, machine: &Machine) -> Result<(), Error> {
    let bytes = tables(machine, layout::ACPI_TABLES);
    if bytes.len() > layout::ACPI_TABLES_MAX_BYTES {
        return Err(Error::AcpiTooLarge);
    }
    ram.memory()
        .write_slice(&bytes, layout::ACPI_TABLES)
        .map_err(|error| Error::Boot(error.into()))
}

/// All tables as they lie in memory from `base` on, the RSDP first.
fn tables(machine: &Machine, base: GuestAddress) -> Vec<u8> {
    let mut image = vec![0; Rsdp::len().next_multiple_of(16)];
    let mut place = |table: &dyn Aml| {
        let address = base.0 + image.len() as u64;
        table.to_aml_bytes(&mut image);
        image.resize(image.len().next_multiple_of(16), 0);
        address
    };
    let dsdt = place(&dsdt(machine));
    let entries = [
        place(&fadt(dsdt, machine.has_i8042)),
        place(&madt(machine.vcpus)),
        place(&mcfg()),
    ];
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for entry in entries {
        xsdt.add_entry(entry);
    }
    let xsdt = place(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    image[..rsdp.len()].copy_from_slice(&rsdp);
    image
}

fn port(address: u16) -> GAS {
    GAS::new(
        GasSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(address),
    )
}

fn fadt(dsdt: u64, has_i8042: bool) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::HwReducedAcpi);
    let boot_arch = match has_i8042 {
        true => BOOT_ARCH | BOOT_ARCH_8042,
        false => BOOT_ARCH,
    };
    fadt.iapc_boot_arch = boot_arch.into();
    fadt.reset_reg = port(power::RESET_PORT);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = port(layout::POWER_PORTS + power::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(layout::POWER_PORTS + power::SLEEP_STATUS);
    fadt.finalize()
}

fn madt(vcpus: u8) -> impl Aml {
    let address = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, address);
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    madt
}

fn mcfg() -> impl Aml {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM, 0, 0, 0);
    mcfg
}

fn dsdt(machine: &Machine) -> Sdt {
    let mut aml = Vec::new();
    pci_root(machine, &mut aml);
    fixed_devices(&mut aml);
    if machine.has_i8042 {
        i8042::devices(&mut aml);
    }
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&Scope::raw("\\_SB_".into(), aml));
    let mut s5 = Vec::new();
    let mut states = PackageBuilder::new();
    states.add_element(&power::SLEEP_TYPE_S5);
    for _ in 0..3 {
        states.add_element(&ZERO);
    }
    Name::new("\\_S5_".into(), &states).to_aml_bytes(&mut s5);
    dsdt.append_slice(&s5);
    dsdt
}

/// `\_SB.PCI0`: bus 0, its windows, and where each interrupt pin goes.
fn pci_root(machine: &Machine, aml: &mut dyn AmlSink) {
    let windows = &machine.windows;
    let config_end = (CONFIG_PORTS + CONFIG_PORTS_LEN) as u16;
    let bus = AddressSpace::new_bus_number(0u16, 0);
    let config = IO::new(
        CONFIG_PORTS as u16,
        CONFIG_PORTS as u16,
        1,
        CONFIG_PORTS_LEN as u8,
    );
    let low_io = AddressSpace::new_io(0u16, CONFIG_PORTS as u16 - 1, None);
    let high_io = AddressSpace::new_io(config_end, 0xffff, None);
    let memory32 = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        windows.memory32.0 as u32,
        (windows.memory32.1 - 1) as u32,
        None,
    );
    let memory64 = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        windows.memory64.0,
        windows.memory64.1 - 1,
        None,
    );
    let resources =
        ResourceTemplate::new(vec![&bus, &config, &low_io, &high_io, &memory32, &memory64]);

    let mut routes = PackageBuilder::new();
    for slot in 1..SLOT_COUNT {
        for pin in 0..4u8 {
            let mut route = PackageBuilder::new();
            // All functions of the device; the pin; no link device: a GSI.
            route.add_element(&address(slot, 0xffff));
            route.add_element(&pin);
            route.add_element(&ZERO);
            route.add_element(&layout::pci_gsi(slot, pin + 1));
            routes.add_element(&route);
        }
    }
    let mut root = Vec::new();
    for object in [
        &Name::new("_HID".into(), &EISAName::new("PNP0A03")) as &dyn Aml,
        &Name::new("_UID".into(), &ZERO),
        &Name::new("_ADR".into(), &ZERO),
        &Name::new("_SEG".into(), &ZERO),
        &Name::new("_BBN".into(), &ZERO),
        &Name::new("_CRS".into(), &resources),
        &Name::new("_PRT".into(), &routes),
    ] {
        object.to_aml_bytes(&mut root);
    }
    hotplug::slots(&machine.removable_slots, &mut root);
    Device::new("PCI0".into(), vec![&Raw(root)]).to_aml_bytes(aml);
}

/// `_ADR` of `function` in `slot`.
fn address(slot: u8, function: u16) -> u32 {
    u32::from(slot) << 16 | u32::from(function)
}

/// Objects that are AML already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// Devices that every machine has, those on PCI apart.
fn fixed_devices(aml: &mut dyn AmlSink) {
    serial_port(aml);
    ecam_reservation(aml);
    panic_device(aml);
    generation_id(aml);
    Device::new(
        "PWRB".into(),
        vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C"))],
    )
    .to_aml_bytes(aml);
    event_device(aml);
}

fn serial_port(aml: &mut dyn AmlSink) {
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Interrupt::new(true, true, false, false, u32::from(COM1_IRQ)),
                    &IO::new(COM1_PORT, COM1_PORT, 1, UART_PORTS as u8),
                ]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

/// Keeps the kernel from giving the memory of ECAM to others.
fn ecam_reservation(aml: &mut dyn AmlSink) {
    Device::new(
        "ECAM".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Memory32Fixed::new(
                    true,
                    layout::ECAM as u32,
                    ECAM_BUS_BYTES as u32,
                )]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

/// The port at which a kernel tells that it panicked.
fn panic_device(aml: &mut dyn AmlSink) {
    Device::new(
        "PVPN".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(
                    layout::PANIC_PORT,
                    layout::PANIC_PORT,
                    1,
                    1,
                )]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

/// The generic event device: reports the power button, devices that come and go, and that the
/// machine goes on from a state (ACPI 6.4, section 5.6.9).
fn event_device(aml: &mut dyn AmlSink) {
    let events = layout::POWER_PORTS + power::EVENTS;
    Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Interrupt::new(
                    true,
                    true,
                    false,
                    false,
                    layout::POWER_GSI,
                )]),
            ),
            &OpRegion::new("EVRG".into(), OpRegionSpace::SystemIO, &events, &ONE),
            &Field::new(
                "EVRG".into(),
                FieldAccessType::Byte,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"EVTS", 8)],
            ),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    &Store::new(&Local(0), &Path::new("EVTS")),
                    &And::new(&Local(1), &Local(0), &power::EVENT_POWER_BUTTON),
                    &If::new(
                        &Local(1),
                        vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &0x80u8)],
                    ),
                    &And::new(&Local(1), &Local(0), &power::EVENT_PCI_HOTPLUG),
                    &If::new(
                        &Local(1),
                        vec![&MethodCall::new(hotplug::method_path(), vec![])],
                    ),
                    &And::new(&Local(1), &Local(0), &power::EVENT_GENERATION),
                    &If::new(
                        &Local(1),
                        vec![&Notify::new(&Path::new("\\_SB_.VGEN"), &0x80u8)],
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(aml);
}

/// The VM generation ID: where it is, for the driver that goes by the name that its specification
/// asks for, and by the shorter one that fits where names have eight characters.
fn generation_id(aml: &mut dyn AmlSink) {
    let mut names = PackageBuilder::new();
    names.add_element(&"VM_Gen_Counter");
    names.add_element(&"VMGENCTR");
    let mut address = PackageBuilder::new();
    address.add_element(&(layout::GENERATION_ID.0 as u32));
    address.add_element(&((layout::GENERATION_ID.0 >> 32) as u32));
    Device::new(
        "VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"COFF0001"),
            &Name::new("_CID".into(), &names),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &address),
        ],
    )
    .to_aml_bytes(aml);
}

mod hotplug;
mod i8042;
#[cfg(test)]
mod tests;
