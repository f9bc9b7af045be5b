//! Snapshots that earlier programs wrote are read.

use std::path::Path;

use vmm::snapshot::Chain;

use super::common::MEMORY;
use super::counting::{PAGES, PAGES_AT, count_on, guest, snapshot};

/// A snapshot as version 1 writes it, of a guest that has counted to some number.
fn golden() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/snapshot-1")
}

/// Writes it: once for each version of the format.
fn write_golden() {
    let _ = std::fs::remove_dir_all(golden());
    std::fs::create_dir_all(golden().parent().unwrap()).unwrap();
    let guest = guest().start();
    count_on(&guest, &mut 0xfff, 200);
    snapshot(&guest, &golden(), None);
    guest.power_off();
}

#[test]
fn a_snapshot_that_an_earlier_program_wrote_is_read() {
    if std::env::var_os("COFFERDAM_WRITE_GOLDEN").is_some() {
        write_golden();
    }
    let chain = Chain::open(&golden()).unwrap();
    chain.check(&mut |_| true).unwrap();
    let top = chain.top();
    assert_eq!(top.manifest().version, 1);
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
