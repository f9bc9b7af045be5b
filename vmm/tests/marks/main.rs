//! Marks of running guests, and rewinding to them: every byte and register again, whatever happened
//! in between.

#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod half_way;
#[path = "../nic/mod.rs"]
mod nic;
mod outside;
mod resets;
mod traffic;
mod whole;
#[path = "../writer/mod.rs"]
mod writer;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm::memory::MemorySource;
use vmm::{MarkError, PausedVcpus, QuiesceError, Refused, RewindError, VmHandle, VmState};
use whole::{Whole, mark, rewind, whole};
use writer::writer;

const LIMIT: Duration = Duration::from_secs(20);

fn is_on(handle: &VmHandle) -> bool {
    let memory = handle.ram().memory();
    memory
        .iter()
        .any(|region| region.get_mmap().bitmap().is_on())
}

#[test]
fn a_thousand_rewinds_give_every_byte_and_register_back() {
    let writing = writer(4 << 20, MemorySource::Fresh, 2, 64).start();
    writing.pulse.store(true, Ordering::Release);
    writing.wait(100);
    let then = mark(&writing, "warm");
    for round in 0..1000 {
        writing.wait(round % 12);
        let pages = rewind(&writing, "warm", &then);
        assert!(pages <= 2 * 64 + 8 + 8, "{pages} pages");
    }
    // It was never anything else than a guest that had run without a pause.
    writing.wait(200);
    let handle = writing.handle();
    handle
        .quiesce(LIMIT, |quiesced| writing.check(quiesced))
        .unwrap();
    writing.guest.power_off();
}

#[test]
fn a_guest_that_runs_goes_on_from_the_mark() {
    let writing = writer(4 << 20, MemorySource::Fresh, 3, 64).start();
    // Never off: the event loop writes memory until the machine is at rest, and as soon as it goes
    // on.
    writing.pulse.store(true, Ordering::Release);
    writing.wait(100);
    let handle = writing.handle();
    let info = handle.mark("a", LIMIT).unwrap();
    assert!(info.current && info.pages > 0 && info.bytes == info.pages * 4096);
    for _ in 0..200 {
        writing.wait(20);
        let rewound = handle.rewind(None, LIMIT).unwrap();
        assert_eq!(rewound.mark, "a");
        assert_eq!(handle.state(), VmState::Running);
        handle
            .quiesce(LIMIT, |quiesced| writing.check(quiesced))
            .unwrap();
    }
    writing.guest.power_off();
}

#[test]
fn what_kvm_itself_writes_is_put_back() {
    const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
    const PAGE: u64 = 0x38_0000;
    let writing = writer(4 << 20, MemorySource::Fresh, 1, 64).start();
    let handle = writing.handle();
    let enable = |vcpus: &mut PausedVcpus<'_>| {
        let entry = kvm_bindings::kvm_msr_entry {
            index: MSR_KVM_SYSTEM_TIME_NEW,
            data: PAGE | 1,
            ..Default::default()
        };
        let msrs = kvm_bindings::Msrs::from_entries(&[entry]).unwrap();
        assert_eq!(vcpus.get(0).unwrap().set_msrs(&msrs).unwrap(), 1);
    };
    handle.with_paused(enable).unwrap();
    writing.wait(10);
    let then = mark(&writing, "a");
    let page = PAGE as usize..PAGE as usize + 4096;
    assert!(
        then.memory[page.clone()] != [0; 4096],
        "KVM writes its clock there"
    );
    for _ in 0..10 {
        writing.wait(10);
        // Has KVM write it again.
        handle.with_paused(enable).unwrap();
        writing.wait(10);
        let now = whole(handle);
        assert!(now.memory[page.clone()] != then.memory[page.clone()]);
        rewind(&writing, "a", &then);
    }
    writing.guest.power_off();
}

/// Numbers that look random and are the same in each run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        (self.0 >> 33) % end
    }
}

#[test]
fn any_mark_of_a_tree_can_be_gone_to_whatever_was_forgotten() {
    for seed in 0..6 {
        let mut numbers = Numbers(seed);
        let writing = writer(4 << 20, MemorySource::Fresh, 2, 64).start();
        let handle = writing.handle();
        writing.wait(50);
        handle.limit_marks(64 << 20);
        let mut marks: BTreeMap<String, Whole> = BTreeMap::new();
        for step in 0..60 {
            writing.wait(numbers.below(20));
            if numbers.below(3) == 0 {
                // By the host, to pages that only it writes.
                let at = GuestAddress(0x30_0000 + numbers.below(64) * 4096);
                handle.ram().memory().write_obj(step, at).unwrap();
            }
            let any = numbers.below(marks.len().max(1) as u64) as usize;
            let any = marks.keys().nth(any).cloned();
            match (numbers.below(10), any) {
                (0..4, _) | (_, None) => {
                    let name = format!("m{step}");
                    marks.insert(name.clone(), mark(&writing, &name));
                }
                (4..8, Some(name)) => {
                    rewind(&writing, &name, &marks[&name]);
                }
                (_, Some(name)) => {
                    handle.forget_mark(&name).unwrap();
                    marks.remove(&name);
                    assert_eq!(is_on(handle), !marks.is_empty());
                }
            }
            let told: Vec<_> = handle.marks().into_iter().map(|mark| mark.name).collect();
            assert_eq!(told.len(), marks.len());
            assert!(told.iter().all(|name| marks.contains_key(name)));
        }
        for (name, then) in &marks {
            writing.wait(5);
            rewind(&writing, name, then);
        }
        handle
            .quiesce(LIMIT, |quiesced| writing.check(quiesced))
            .unwrap();
        writing.guest.power_off();
    }
}

#[test]
fn the_tree_is_told_with_what_it_keeps() {
    let writing = writer(4 << 20, MemorySource::Fresh, 1, 64).start();
    let handle = writing.handle();
    assert!(handle.marks().is_empty());
    for name in ["a", "b"] {
        writing.wait(30);
        handle.mark(name, LIMIT).unwrap();
    }
    handle.rewind(Some("a"), LIMIT).unwrap();
    handle.mark("c", LIMIT).unwrap();
    let told = |handle: &VmHandle| -> Vec<(String, Option<String>, bool)> {
        let marks = handle.marks().into_iter();
        marks
            .map(|mark| (mark.name, mark.parent, mark.current))
            .collect()
    };
    let entry = |name: &str, parent: Option<&str>, current| {
        (name.to_owned(), parent.map(str::to_owned), current)
    };
    let all = [
        entry("a", None, false),
        entry("b", Some("a"), false),
        entry("c", Some("a"), true),
    ];
    assert_eq!(told(handle), all);
    let marks = handle.marks();
    assert!(
        marks[1].pages <= 64 + 16 && marks[0].pages >= 30,
        "{marks:?}"
    );
    // What b and c build on stays; without b, c takes it over.
    handle.forget_mark("a").unwrap();
    assert_eq!(
        told(handle),
        [entry("b", None, false), entry("c", None, true)]
    );
    handle.forget_mark("b").unwrap();
    assert_eq!(told(handle), [entry("c", None, true)]);
    handle.forget_mark("c").unwrap();
    assert!(!is_on(handle), "nobody needs to know any more what changes");
    writing.guest.power_off();
}

#[test]
fn what_cannot_be_marked_or_rewound_is_refused_and_nothing_changes() {
    let made = writer(4 << 20, MemorySource::Fresh, 1, 64);
    let handle = made.guest.vm.handle();
    let refused = handle.rewind(Some("a"), LIMIT).unwrap_err();
    assert!(matches!(
        refused,
        RewindError::Refused(MarkError::NoSuchMark(_))
    ));
    let refused = handle.mark("a", LIMIT).unwrap_err();
    let not_started = QuiesceError::Refused(Refused::NotStarted).to_string();
    assert_eq!(refused.to_string(), not_started);
    let writing = made.start();
    writing.wait(200);
    let no_mark = handle.rewind(None, LIMIT).unwrap_err();
    assert!(matches!(no_mark, RewindError::Refused(MarkError::NoMark)));
    let long = "x".repeat(65);
    for name in ["", " ", "a b", "-a", ".", "../a", "ä", &long] {
        let refused = handle.mark(name, LIMIT).unwrap_err();
        assert!(matches!(refused, MarkError::Name(_)), "{name}");
    }
    handle.limit_marks(16 * 4096);
    let refused = handle.mark("a", LIMIT).unwrap_err();
    assert!(
        matches!(refused, MarkError::TooMuch { limit: 65_536 }),
        "{refused}"
    );
    assert!(!is_on(&handle) && handle.marks().is_empty());
    handle.limit_marks(1 << 20);
    handle.mark("a", LIMIT).unwrap();
    let exists = handle.mark("a", LIMIT).unwrap_err();
    assert!(matches!(exists, MarkError::Exists(_)));
    let then = handle.marks();
    handle.limit_marks(then[0].bytes);
    writing.wait(5);
    let refused = handle.mark("b", LIMIT).unwrap_err();
    assert!(matches!(refused, MarkError::TooMuch { .. }));
    assert_eq!(handle.marks(), then);
    assert!(matches!(
        handle.forget_mark("b"),
        Err(MarkError::NoSuchMark(_))
    ));
    handle.limit_marks(1 << 30);
    for number in 1..vmm::MAX_MARKS {
        handle.mark(&format!("n{number}"), LIMIT).unwrap();
    }
    assert!(matches!(
        handle.mark("one-more", LIMIT),
        Err(MarkError::TooMany)
    ));
    handle.rewind(Some("a"), LIMIT).unwrap();
    handle
        .quiesce(LIMIT, |quiesced| writing.check(quiesced))
        .unwrap();
    writing.guest.power_off();
    let refused = handle.rewind(Some("a"), LIMIT).unwrap_err();
    let stopped = QuiesceError::Refused(Refused::Stopped).to_string();
    assert_eq!(refused.to_string(), stopped);
}

#[test]
fn memory_above_4_gib_is_rewound_and_what_is_empty_costs_nothing() {
    let mut made = writer(4 << 30, MemorySource::Fresh, 1, 64);
    made.areas[0].start = (4 << 30) + (16 << 20);
    let writing = made.go_on();
    writing.guest.report();
    let handle = writing.handle();
    writer::map_high(handle);
    writing.begin();
    writing.wait(100);
    let info = handle.mark("a", LIMIT).unwrap();
    assert!(info.pages < 200, "{info:?}");
    let high = GuestAddress((4 << 30) + (700 << 20));
    for _ in 0..20 {
        handle.ram().memory().write_obj(7u64, high).unwrap();
        writing.wait(100);
        let rewound = handle.rewind(None, LIMIT).unwrap();
        assert!(rewound.pages <= 64 + 16, "{rewound:?}");
        assert_eq!(handle.ram().memory().read_obj::<u64>(high).unwrap(), 0);
        handle
            .quiesce(LIMIT, |quiesced| writing.check(quiesced))
            .unwrap();
    }
    writing.guest.power_off();
}

#[test]
fn who_follows_changes_for_snapshots_sees_rewinds_too() {
    let writing = writer(4 << 20, MemorySource::Fresh, 1, 64).start();
    let handle = writing.handle();
    writing.wait(50);
    handle.mark("a", LIMIT).unwrap();
    writing.wait(50);
    handle.track_changes(LIMIT).unwrap();
    let look = || writer::look(handle);
    let (mut before, _) = look();
    for round in 0..10 {
        match round % 3 {
            0 => drop(handle.rewind(Some("a"), LIMIT).unwrap()),
            1 => drop(handle.mark(&format!("m{round}"), LIMIT).unwrap()),
            _ => writing.wait(10),
        }
        let (after, changed) = look();
        let told = |page: &u32| changed.pages().contains(page);
        assert!(writer::differing(&before, &after).iter().all(told));
        before = after;
    }
    // Each ends for itself.
    handle.stop_tracking_changes().unwrap();
    assert!(is_on(handle));
    handle.rewind(Some("a"), LIMIT).unwrap();
    handle
        .quiesce(LIMIT, |quiesced| writing.check(quiesced))
        .unwrap();
    writing.guest.power_off();
}
