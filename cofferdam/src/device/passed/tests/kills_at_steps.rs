//! Guests whose connections end in the middle of a switch of a function, before each of its steps:
//! what the host's kernel does with that of a VMM that is killed.

use std::path::PathBuf;
use std::sync::Arc;

use recovery::switch::{Outcome, Step};

use super::device::Device;
use super::guest::{Guest, MEMORY, wait, waiting_host};
use crate::device::ParkedAs;
use crate::device::at_step::Waiting;
use crate::device::host::Host;
use crate::device::passed::PassedCard;
use crate::device::protocol::{ContextStatus, Reason};

/// A device host whose switches wait, and the file that says where.
struct Held {
    host: Arc<Host<PassedCard>>,
    device: Device,
    file: PathBuf,
    _folder: tempfile::TempDir,
}

/// Memory of the VM with this number, which tells them apart.
fn memory(number: u8) -> u64 {
    MEMORY * u64::from(number)
}

impl Held {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("hold");
        let (host, device) = waiting_host(ParkedAs::Down, 8, Waiting::at(file.clone()));
        Self {
            host,
            device,
            file,
            _folder: folder,
        }
    }

    fn boot(&self, vm: &str, number: u8) -> Guest {
        Guest::boot_with(&self.host, vm, number, memory(number))
    }

    fn give(&self, vm: &str) {
        if self.host.turn().as_deref() != Some(vm) {
            self.host.switch_to(&vm.parse().unwrap()).unwrap();
        }
    }

    /// Asks for a switch to `to`, and does something when it has come to `step`. What comes of the
    /// switch is the host's to choose.
    fn amid(&self, to: &str, step: Step, act: impl FnOnce()) {
        std::fs::write(&self.file, step.to_string()).unwrap();
        let reached = self.file.with_added_extension("reached");
        std::thread::scope(|scope| {
            let asks = scope.spawn(|| self.host.switch_to(&to.parse().unwrap()).is_ok());
            wait("the step", || reached.exists());
            act();
            std::fs::remove_file(&reached).unwrap();
            std::fs::remove_file(&self.file).unwrap();
            asks.join().unwrap();
        });
    }

    fn context(&self, vm: &str) -> ContextStatus {
        let mut contexts = self.host.status().contexts.into_iter();
        contexts.find(|context| context.vm == vm).unwrap()
    }

    /// Ends a VM's connection in the middle of a switch. As soon as it is said to have gone, before
    /// anybody may use its memory for something else, the device reaches none of that.
    fn kill_amid(&self, to: &str, step: Step, (name, number, guest): (&str, u8, Guest)) {
        let its_end = || {
            let gone = || {
                let contexts = self.host.contexts();
                contexts
                    .iter()
                    .any(|context| context.vm.as_str() == name && !context.is_connected())
            };
            wait("its end", gone);
            let state = self.device.lock();
            assert!(
                state.mapped == 0 || state.user != memory(number),
                "{step}: {} bytes of {name}",
                state.mapped
            );
        };
        self.amid(to, step, || {
            drop(guest);
            // Its function is held from the step that gives it the device to the one that ends.
            if name == to && step <= Step::Map {
                its_end();
            }
        });
        its_end();
        assert_eq!(self.context(name).dma_bytes, 0, "{name}, {step}");
    }

    /// This guest has the device, which reaches its memory alone, and what it hands it is sent.
    fn assert_works(&self, guest: &mut Guest, name: &str, text: &str) {
        wait("the turn", || self.host.turn().as_deref() == Some(name));
        wait("the end of the switch", || {
            self.device.lock().mapped == memory(guest.mac[5])
        });
        let (ring, mac) = (guest.ring(), guest.mac);
        guest.send(3);
        // Behind the store.
        assert_eq!(guest.read(super::RDBAL), ring, "{text}");
        let state = self.device.lock();
        assert_eq!(state.sent.last(), Some(&3), "{text}");
        assert_eq!((state.address(), state.masters), (mac, true), "{text}");
        assert_eq!(state.user, memory(mac[5]), "{text}");
    }

    /// How the switches after the first so many ended: to whom, why, and the step that failed.
    fn said(&self, after: u64) -> Vec<(Option<String>, Reason, Option<Step>)> {
        let switches = self.host.status().switches.into_iter();
        let new = switches.filter(|switch| switch.number > after);
        new.map(|switch| {
            let failed = match switch.outcome {
                Outcome::Switched {} => None,
                Outcome::Back { failed } => Some(failed.step),
                outcome @ Outcome::Nobody { .. } => panic!("{outcome:?}"),
            };
            (switch.to, switch.reason, failed)
        })
        .collect()
    }
}

#[test]
fn whoever_is_killed_at_any_step_leaves_a_function_that_the_other_one_has() {
    let held = Held::new();
    let mut bystander = held.boot("bystander", 4);
    for step in Step::ALL {
        // It has the device, and dies while it is taken from it.
        let old = held.boot("old", 1);
        held.give("old");
        let mut new = held.boot("new", 2);
        let before = held.host.status().switch_count;
        held.kill_amid("new", step, ("old", 1, old));
        held.assert_works(&mut new, "new", &format!("old, {step}"));
        let asked = |to: &str| (Some(to.to_owned()), Reason::Asked, None);
        assert_eq!(held.said(before), [asked("new")], "old, {step}");
        // It is about to get it, and dies.
        let next = held.boot("next", 3);
        let before = held.host.status().switch_count;
        held.kill_amid("next", step, ("next", 3, next));
        wait("the turn", || {
            let turn = held.host.turn();
            turn.is_some_and(|turn| turn != "next")
        });
        held.give("new");
        held.assert_works(&mut new, "new", &format!("next, {step}"));
        let first = held.said(before).swap_remove(0);
        let failed = (step <= Step::Map).then_some(Step::Map);
        assert_eq!(
            first,
            (Some("next".to_owned()), Reason::Asked, failed),
            "next, {step}"
        );
        // One that has nothing to do with it: neither does it notice, nor is it missed.
        let before = held.host.status().switch_count;
        let third = held.boot("third", 5);
        held.kill_amid("bystander", step, ("third", 5, third));
        held.assert_works(&mut bystander, "bystander", &format!("third, {step}"));
        assert_eq!(held.said(before), [asked("bystander")], "third, {step}");
        drop(new);
        wait("new's end", || !held.context("new").connected);
    }
    assert_eq!(held.host.status().failed_switches, 5);
}
