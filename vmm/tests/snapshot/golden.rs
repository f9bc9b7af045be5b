//! Snapshots that earlier programs wrote are read.

use std::path::Path;

use vmm::snapshot::{Chain, FORMAT_VERSION};

use super::common::MEMORY;
use super::counting::{PAGES, PAGES_AT, count_on, guest, snapshot};

/// A snapshot as `version` writes it, of a guest that has counted to some number.
fn golden(version: u32) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/snapshot-{version}"))
}

/// Writes it: once for each version of the format.
fn write_golden() {
    let golden = golden(FORMAT_VERSION);
    let _ = std::fs::remove_dir_all(&golden);
    std::fs::create_dir_all(golden.parent().unwrap()).unwrap();
    let guest = guest().start();
    count_on(&guest, &mut 0xfff, 200);
    snapshot(&guest, &golden, None);
    guest.power_off();
}

#[test]
fn a_snapshot_that_an_earlier_program_wrote_is_read() {
    if std::env::var_os("COFFERDAM_WRITE_GOLDEN").is_some() {
        write_golden();
    }
    (1..=FORMAT_VERSION).for_each(is_read);
}

fn is_read(version: u32) {
    let chain = Chain::open(&golden(version)).unwrap();
    chain.check(&mut |_| true).unwrap();
    let top = chain.top();
    assert_eq!(top.manifest().version, version);
    assert_eq!(top.manifest().memory_bytes, MEMORY);
    vmm::MachineState::from_bytes(&top.machine_state().unwrap()).unwrap();
    vmm::DeviceStates::from_bytes(&top.device_states().unwrap()).unwrap();
    // 64 consecutive numbers, each where the guest puts it.
    let mut numbers = Vec::new();
    for index in 0..u64::from(PAGES) {
        let mut page = [0; 4096];
        chain.read(PAGES_AT / 4096 + index, &mut page).unwrap();
        let number = u32::from_le_bytes([page[0], page[1], page[2], page[3]]);
        assert_eq!(u64::from(number) % u64::from(PAGES), index);
        numbers.push(number);
    }
    numbers.sort_unstable();
    assert!(
        numbers.windows(2).all(|pair| pair[0] + 1 == pair[1]),
        "{numbers:x?}"
    );
}
