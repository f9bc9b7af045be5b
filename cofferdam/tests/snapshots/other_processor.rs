//! Snapshots of guests that ran on another processor.

use std::path::Path;

use serde_json::Value;

use crate::common::place::{Place, end};

/// Magic, version, length, CRC-32 of a machine's state.
const HEAD_BYTES: usize = 20;
/// Bytes of a leaf (`struct kvm_cpuid_entry2`) with its length in front of the next, and places in
/// it.
const LEAF_BYTES: usize = 40 + 1;
const EBX: usize = 16;

/// Changes the machine's state of the snapshot in `dir`, and makes all checksums right again.
fn change_machine(dir: &Path, change: impl FnOnce(&mut [u8])) {
    let path = dir.join("machine.state");
    let mut bytes = std::fs::read(&path).unwrap();
    change(&mut bytes[HEAD_BYTES..]);
    let sum = crc32fast::hash(&bytes[HEAD_BYTES..]);
    bytes[16..20].copy_from_slice(&sum.to_le_bytes());
    std::fs::write(&path, &bytes).unwrap();
    let path = dir.join("manifest.json");
    let mut text: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    text["manifest"]["files"]["machine"]["crc32"] = crc32fast::hash(&bytes).into();
    text["crc32"] = crc32fast::hash(text["manifest"].to_string().as_bytes()).into();
    std::fs::write(&path, text.to_string()).unwrap();
}

/// Where the leaf `number` of the first vCPU is, whose list begins with leaf 0 of `vendor`.
fn leaf(state: &[u8], vendor: &str, number: u32) -> usize {
    // EBX, ECX and EDX: the last two words are the other way round.
    let (first, rest) = vendor.split_at(4);
    let (second, third) = rest.split_at(4);
    let text = [first, third, second].concat();
    let at = state.windows(12).position(|bytes| bytes == text.as_bytes());
    let first = at.unwrap() - EBX;
    let leaves = state[first..].chunks_exact(LEAF_BYTES);
    let index = leaves
        .take(100)
        .position(|leaf| leaf[..8] == [number.to_le_bytes(), [0; 4]].concat());
    first + index.unwrap() * LEAF_BYTES
}

#[test]
fn a_guest_of_a_processor_that_this_one_cannot_stand_in_for_is_refused_and_why() {
    let place = Place::new();
    let vm = place.idle("--memory 32M");
    let dir = |name: &str| place.path(name);
    for name in ["vendor", "feature", "same"] {
        place.ask(&format!("snapshot idle {}", dir(name).display()));
    }
    end(&place, vm, &[]);
    let shown = place.ask(&format!("snapshot show {} --json", dir("same").display()));
    let shown: Value = serde_json::from_str(&shown).unwrap();
    let vendor = shown[0]["manifest"]["cpu"]["vendor"].as_str().unwrap();
    assert_eq!(vendor.len(), 12, "{vendor}");
    change_machine(&dir("vendor"), |state| {
        let at = leaf(state, vendor, 0);
        state[at + EBX..at + EBX + 4].copy_from_slice(b"Test");
    });
    let mut lacking = 0;
    change_machine(&dir("feature"), |state| {
        let at = leaf(state, vendor, 7) + EBX;
        let mut word = u32::from_le_bytes(state[at..at + 4].try_into().unwrap());
        lacking = 1 << (!word).trailing_zeros();
        word |= lacking;
        state[at..at + 4].copy_from_slice(&word.to_le_bytes());
    });
    change_machine(&dir("same"), |_| {});
    let run = |name: &str, lazily: &str| format!("--snapshot {}{lazily}", dir(name).display());
    for lazily in ["", " --lazy"] {
        place.refused(
            &run("vendor", lazily),
            &[
                "the state needs a processor of Test",
                "this one is of",
                vendor,
            ],
        );
        let feature = format!("CPUID leaf 0x7.0 EBX {lacking:#x}");
        place.refused(
            &run("feature", lazily),
            &["features that this processor lacks", &feature],
        );
    }
    // What was changed is all that is wrong with them.
    for name in ["vendor", "feature", "same"] {
        place.ask(&format!("snapshot check {}", dir(name).display()));
    }
    let twin = crate::go_on(&place, &format!("{} --serial control", run("same", "")));
    place.wait_for("idle");
    end(&place, twin, &[]);
}
