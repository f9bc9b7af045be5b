use std::process::Command;

use super::*;

const BASE: GuestAddress = layout::ACPI_TABLES;

fn machine(vcpus: u8, removable_slots: Vec<u8>) -> Machine {
    let windows = Windows {
        io: layout::PCI_IO,
        memory32: layout::PCI_MEMORY32,
        memory64: (1 << 39, 1 << 40),
    };
    Machine {
        vcpus,
        removable_slots,
        windows,
        has_i8042: false,
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
}

/// The table at guest physical `address`, as long as its header says.
fn table(image: &[u8], address: u64) -> &[u8] {
    let start = (address - BASE.0) as usize;
    let len = u32_at(image, start + 4) as usize;
    &image[start..start + len]
}

/// All tables of a machine, found as a guest finds them.
fn walk(image: &[u8]) -> Vec<&[u8]> {
    assert_eq!(&image[..8], b"RSD PTR ");
    assert_eq!((sum(&image[..20]), sum(&image[..36])), (0, 0));
    let xsdt = table(image, u64_at(image, 24));
    let mut tables = vec![xsdt];
    tables.extend(
        xsdt[36..]
            .chunks_exact(8)
            .map(|entry| table(image, u64_at(entry, 0))),
    );
    let fadt = tables[1];
    tables.push(table(image, u64_at(fadt, 140)));
    tables
}

#[test]
fn a_guest_finds_every_table_whole() {
    let image = tables(&machine(8, vec![1, 2]), BASE);
    assert!(image.len() <= layout::ACPI_TABLES_MAX_BYTES);
    let tables = walk(&image);
    let names: Vec<&[u8]> = tables.iter().map(|table| &table[..4]).collect();
    assert_eq!(names, [b"XSDT", b"FACP", b"APIC", b"MCFG", b"DSDT"]);
    for table in tables {
        assert_eq!(
            sum(table),
            0,
            "checksum of {:?}",
            std::str::from_utf8(&table[..4])
        );
    }
}

#[test]
fn fadt_offers_reset_and_sleep_and_denies_legacy_devices() {
    let image = tables(&machine(1, vec![]), BASE);
    let fadt = walk(&image)[1];
    let boot_arch = u16::from_le_bytes(fadt[109..111].try_into().unwrap());
    assert_eq!(boot_arch & 0b10, 0, "no keyboard controller");
    assert_eq!(boot_arch & 0b10_0100, 0b10_0100, "no VGA, no CMOS clock");
    let with = Machine {
        has_i8042: true,
        ..machine(1, vec![])
    };
    let with = tables(&with, BASE);
    let boot_arch = u16::from_le_bytes(walk(&with)[1][109..111].try_into().unwrap());
    assert_eq!(boot_arch & 0b10_0110, 0b10_0110, "one with a mouse has it");
    // EISA identifiers of the keyboard's and the mouse's device (ACPI 6.5, 19.3.4).
    for id in [[0x41, 0xd0, 0x03, 0x03], [0x41, 0xd0, 0x0f, 0x13]] {
        let has = |image: &[u8]| image.windows(4).any(|bytes| bytes == id);
        assert!(has(&with) && !has(&image), "{id:x?}");
    }
    let flags = u32_at(fadt, 112);
    assert_eq!(
        flags & (1 << 10 | 1 << 20),
        1 << 10 | 1 << 20,
        "reset register, hardware-reduced"
    );
    // Generic addresses: space 1 is I/O, the address is behind four bytes.
    assert_eq!((fadt[116], u64_at(fadt, 120), fadt[128]), (1, 0xcf9, 0x06));
    assert_eq!((fadt[244], u64_at(fadt, 248)), (1, 0x600));
    assert_eq!((fadt[256], u64_at(fadt, 260)), (1, 0x601));
}

#[test]
fn madt_lists_each_processor_once() {
    let image = tables(&machine(5, vec![]), BASE);
    let madt = walk(&image)[2];
    let (mut at, mut processors, mut io_apics) = (44, Vec::new(), 0);
    while at < madt.len() {
        match madt[at] {
            0 => {
                assert_eq!(u32_at(madt, at + 4) & 1, 1, "enabled");
                processors.push((madt[at + 2], madt[at + 3]));
            }
            1 => {
                assert_eq!(u32_at(madt, at + 4), 0xfec0_0000);
                io_apics += 1;
            }
            other => panic!("unexpected structure {other}"),
        }
        at += usize::from(madt[at + 1]);
    }
    assert_eq!(processors, [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]);
    assert_eq!(io_apics, 1);
}

#[test]
fn all_slots_fit() {
    let image = tables(&machine(8, (1..32).collect()), BASE);
    assert!(
        image.len() <= layout::ACPI_TABLES_MAX_BYTES,
        "{} bytes",
        image.len()
    );
}

/// What the reference compiler makes of the DSDT, where it is installed (Debian: acpica-tools).
#[test]
fn the_reference_disassembler_understands_the_dsdt() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("dsdt.aml");
    let image = tables(&machine(2, vec![1, 3]), BASE);
    std::fs::write(&file, walk(&image)[4]).unwrap();
    let Ok(output) = Command::new("iasl").arg("-d").arg(&file).output() else {
        skipped::skip(
            "vmm::acpi (the reference disassembler)",
            "iasl is not installed",
        );
        return;
    };
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = std::fs::read_to_string(file.with_extension("dsl")).unwrap();
    for part in [
        "PNP0A03",
        "PNP0501",
        "ACPI0013",
        "PNP0C0C",
        "QEMU0001",
        "_S5",
        "_PRT",
        "_EVT",
        "S001",
        "S003",
        "CHNG",
        "_EJ0",
        "VM_Gen_Counter",
        "ADDR",
    ] {
        assert!(text.contains(part), "{part} is missing:\n{text}");
    }
    let compiled = Command::new("iasl")
        .arg(file.with_extension("dsl"))
        .output()
        .unwrap();
    let report = String::from_utf8_lossy(&compiled.stdout);
    assert!(compiled.status.success(), "{report}");
    assert!(report.contains(" 0 Errors"), "{report}");
}
