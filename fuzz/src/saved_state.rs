//! What a snapshot's readers make of any bytes: an error, or something that is within its bounds.
//! The first byte says which.
//!
//! The seeds are the parts of the golden snapshots (`vmm/tests/golden`, `cofferdam/tests/golden`), states
//! without their heads, behind the byte that says which: without them nearly no input is read as
//! anything.

use std::path::Path;

use serde_json::json;
use vmm::snapshot::{Manifest, MemoryMap};
use vmm::{
    DEVICE_STATES_VERSION, DEVICE_STATES_VERSION_WITHOUT_I8042, DeviceStates, MachineState,
    STATE_VERSION,
};

/// Memory that the maps are for: 64 MiB.
const MEMORY_BYTES: u64 = 64 << 20;

/// One input.
pub fn run(input: &[u8]) {
    let Some((which, bytes)) = input.split_first() else {
        return;
    };
    match which % 5 {
        0 => manifest(bytes),
        1 => {
            if let Ok(map) = MemoryMap::from_bytes(bytes, MEMORY_BYTES) {
                assert!(
                    map.runs()
                        .iter()
                        .all(|run| run.end() * 4096 <= MEMORY_BYTES)
                );
            }
        }
        2 => drop(MachineState::from_bytes(&headed(
            b"COFFMACH",
            STATE_VERSION,
            bytes,
        ))),
        3 => drop(DeviceStates::from_bytes(&headed(
            b"COFFDEVS",
            DEVICE_STATES_VERSION_WITHOUT_I8042,
            bytes,
        ))),
        _ => drop(DeviceStates::from_bytes(&headed(
            b"COFFDEVS",
            DEVICE_STATES_VERSION,
            bytes,
        ))),
    }
}

/// `content` with a head that fits: a checksum would keep every change from what is behind it.
fn headed(magic: &[u8; 8], version: u32, content: &[u8]) -> Vec<u8> {
    let mut bytes = magic.to_vec();
    bytes.extend_from_slice(&version.to_le_bytes());
    bytes.extend_from_slice(&(content.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&crc32fast::hash(content).to_le_bytes());
    bytes.extend_from_slice(content);
    bytes
}

/// As a file, and as what the file's checksum is of.
fn manifest(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let path = Path::new("fuzz");
    let whole = serde_json::from_str::<serde_json::Value>(&text).map(|manifest| {
        let crc32 = crc32fast::hash(manifest.to_string().as_bytes());
        let whole = json!({"format": "cofferdam-snapshot", "crc32": crc32, "manifest": manifest});
        whole.to_string()
    });
    for text in [Ok(text.into_owned()), whole].into_iter().flatten() {
        // Whatever is read can be written, and is the same then.
        if let Ok(manifest) = Manifest::from_text(path, &text) {
            let again = manifest.to_text().expect("it was no longer than this");
            let again = Manifest::from_text(path, &again);
            assert_eq!(again.expect("it was just written"), manifest);
        }
    }
}
