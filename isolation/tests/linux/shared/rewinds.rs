//! A stock guest whose NIC carries a checked stream is rewound again and again, with functions of
//! its driver isolated and without: each time all of its memory, its registers and its NIC are those
//! of the mark.
//!
//! `COFFERDAM_REWINDS` says how often to each of the two marks (10).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use devices::e1000::E1000;
use kvm_bindings::{kvm_regs, kvm_sregs};
use serde_json::Value;
use vm_memory::{Bytes, GuestAddress};
use vmm::{Kept, Participant, PausedVcpus, RestFor, Unsettled, VmHandle};

use super::with_network;
use crate::machine::REST_TIME;
use crate::named;

/// Bytes of memory that are compared at once.
const PIECE: u64 = 1 << 20;
/// Of the functions that each frame meets.
const FRAMES: [&str; 3] = ["e1000_xmit_frame", "e1000_clean", "e1000_intr"];

/// All of a guest at rest but its registers.
struct Whole {
    memory: BTreeMap<u64, Vec<u8>>,
    nic: Value,
}

/// Looks at the guest whenever it is marked, and compares when it is back there, before a device
/// works again: one that is paused still has frames and timers come.
struct Witness {
    handle: VmHandle,
    nic: Arc<Mutex<E1000>>,
    compared: AtomicU64,
    differs: Mutex<Vec<String>>,
}

impl Witness {
    fn whole(&self) -> Whole {
        let mut nic = serde_json::to_value(self.nic.lock().unwrap().save()).unwrap();
        // How long they have still to run, and for how long the line has been up.
        nic.as_object_mut().unwrap().remove("timers").unwrap();
        let interrupt = nic["interrupt"].as_object_mut().unwrap();
        interrupt.remove("since_assertion_ns").unwrap();
        Whole {
            memory: memory(&self.handle),
            nic,
        }
    }

    /// How often the guest was as at its mark.
    fn compared(&self) -> u64 {
        let differs = self.differs.lock().unwrap();
        assert!(differs.is_empty(), "{differs:?}");
        self.compared.load(Ordering::Relaxed)
    }
}

impl Participant for Witness {
    fn name(&self) -> String {
        "witness".to_owned()
    }

    fn settle(&self, _: RestFor, _: &mut PausedVcpus<'_>) -> Result<(), Unsettled> {
        Ok(())
    }

    fn go_on(&self) {}

    fn keep(&self) -> Result<Kept, Unsettled> {
        Ok(Some(Arc::new(self.whole())))
    }

    fn put_back(&self, kept: &Kept) -> Result<(), String> {
        let kept = kept.as_ref().and_then(|kept| kept.downcast_ref::<Whole>());
        // Marks of before.
        let Some(then) = kept else { return Ok(()) };
        let now = self.whole();
        let mut differs = self.differs.lock().unwrap();
        let pieces = differing(&now.memory, &then.memory);
        if !pieces.is_empty() {
            differs.push(format!("MiB {pieces:?} of memory"));
        }
        for (part, then) in then.nic.as_object().unwrap() {
            if now.nic[part] != *then {
                differs.push(format!(
                    "{part} of the NIC: {} and not {then}",
                    now.nic[part]
                ));
            }
        }
        self.compared.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// All of memory that may be other than zero, by numbers of pieces.
fn memory(handle: &VmHandle) -> BTreeMap<u64, Vec<u8>> {
    let (ram, mut found) = (handle.ram(), BTreeMap::new());
    for range in ram.populated() {
        for piece in range.start / PIECE..range.end.div_ceil(PIECE) {
            found.entry(piece).or_insert_with(|| {
                // No piece reaches over the gap: there is less memory.
                let region = ram.region_of(piece * PIECE).unwrap();
                let mut bytes = vec![0; PIECE as usize];
                let address = region.guest_address.0 + (piece * PIECE - region.file_offset);
                let read = ram.memory().read_slice(&mut bytes, GuestAddress(address));
                read.unwrap();
                bytes
            });
        }
    }
    found
}

/// Pieces that differ, where one that is not there is zero.
fn differing(now: &BTreeMap<u64, Vec<u8>>, then: &BTreeMap<u64, Vec<u8>>) -> Vec<u64> {
    let zero = vec![0; PIECE as usize];
    let pieces: BTreeSet<u64> = now.keys().chain(then.keys()).copied().collect();
    let differ = |piece: &u64| now.get(piece).unwrap_or(&zero) != then.get(piece).unwrap_or(&zero);
    pieces.into_iter().filter(differ).collect()
}

type Registers = (kvm_regs, kvm_sregs);

fn registers(handle: &VmHandle) -> Registers {
    let look = |vcpus: &mut PausedVcpus<'_>| {
        let vcpu = vcpus.get(0).unwrap();
        (vcpu.get_regs().unwrap(), vcpu.get_sregs().unwrap())
    };
    handle.with_paused(look).unwrap()
}

/// Sets a mark at a moment at which the guest's calls are over; its registers then. The guest stays
/// paused there.
fn mark(handle: &VmHandle, name: &str) -> Registers {
    handle.mark(name, REST_TIME).unwrap();
    handle.pause().unwrap();
    handle.rewind(Some(name), REST_TIME).unwrap();
    registers(handle)
}

/// Calls of the isolated driver, as long as there are any.
fn called(machine: &crate::machine::Machine) -> u64 {
    let status = machine.isolator.status();
    let entries = status.iter().flat_map(|module| &module.entries);
    entries.map(|entry| entry.calls).sum()
}

/// Run in the full form of the suite, or by name.
mod long {
    use super::*;

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn a_guest_under_traffic_is_rewound_to_the_byte_with_its_driver_isolated_and_without() {
        let rounds = std::env::var("COFFERDAM_REWINDS");
        let rounds: u64 = rounds.map_or(10, |text| text.parse().unwrap());
        let mut machine = with_network();
        let handle = machine.handle.clone();
        let witness = Arc::new(Witness {
            handle: handle.clone(),
            nic: machine.nic.clone(),
            compared: AtomicU64::new(0),
            differs: Mutex::default(),
        });
        let participant: Arc<dyn Participant> = witness.clone();
        handle.add_participant(participant.clone());
        machine.run(
            "(/init traffic tcp_echo 10.0.2.2 20 > /tmp/stream.new 2>&1; mv /tmp/stream.new /tmp/stream) < /dev/null > /dev/null 2>&1 &",
        );
        machine.agent.disconnect();
        std::thread::sleep(Duration::from_secs(1));
        let plain = mark(&handle, "plain");
        handle.resume().unwrap();
        machine.isolate("e1000", named(&FRAMES)).unwrap();
        machine.agent.disconnect();
        std::thread::sleep(Duration::from_secs(1));
        let isolated = mark(&handle, "isolated");
        let before = witness.compared();
        let (mut pages, mut calls) = (0, 0);
        for round in 0..rounds {
            for (name, then, is_isolated) in
                [("isolated", &isolated, true), ("plain", &plain, false)]
            {
                // From where the other one left it.
                handle.rewind(Some(name), REST_TIME).unwrap();
                assert_eq!(machine.isolator.status().len(), usize::from(is_isolated));
                let before = called(&machine);
                handle.resume().unwrap();
                std::thread::sleep(Duration::from_millis(10 + round % 40));
                handle.pause().unwrap();
                calls += called(&machine) - before;
                pages += handle.rewind(Some(name), REST_TIME).unwrap().pages;
                assert_eq!(registers(&handle), *then, "{name}, round {round}");
            }
        }
        // Each time twice: from the other mark, and from where the guest has come to.
        assert_eq!(witness.compared() - before, 4 * rounds);
        assert!(pages > rounds, "{pages} pages: the guest does nothing");
        assert!(calls > 0, "the isolated driver was never called");
        println!("{rounds} rewinds to each: {pages} pages put back, {calls} calls");
        // Both of them work on, and the stream ends well.
        for name in ["plain", "isolated"] {
            handle.rewind(Some(name), REST_TIME).unwrap();
            handle.resume().unwrap();
            let ended = "for i in $(seq 600); do [ -e /tmp/stream ] && break; sleep 0.1; done; cat /tmp/stream";
            let stream = machine.run(ended);
            assert!(
                stream.contains("\"corrupted\":0") && !stream.contains("\"error\""),
                "{stream}"
            );
            machine.agent.disconnect();
            handle.pause().unwrap();
        }
        handle.resume().unwrap();
        let status = machine.isolator.release("e1000").unwrap();
        assert_eq!((status.violations, status.broken), (0, None));
        machine.assert_healthy();
        for name in ["isolated", "plain"] {
            handle.forget_mark(name).unwrap();
        }
        handle.remove_participant(&participant);
    }
}
