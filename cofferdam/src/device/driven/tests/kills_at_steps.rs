//! VMs that go in the middle of a switch by their drivers, before each of its steps.

use std::path::PathBuf;

use super::*;

/// A device host whose switches wait, and the file that says where.
struct Held {
    host: Arc<Host<DrivenCard>>,
    vms: Vms,
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
        let (host, vms) = host_waiting(None, Waiting::at(file.clone()));
        Self {
            host,
            vms,
            file,
            _folder: folder,
        }
    }

    fn boot(&self, vm: &str, number: u8) {
        self.vms.boot_with(&self.host, vm, number, memory(number));
    }

    fn give(&self, vm: &str) {
        if self.host.turn().as_deref() != Some(vm) {
            self.host.switch_to(&name(vm)).unwrap();
        }
    }

    /// Asks for a switch to `to`, and ends a VM when it has come to `step`. As soon as that is said
    /// to have gone the device reaches none of its memory.
    fn kill_amid(&self, to: &str, step: Step, (gone, number): (&str, u8)) {
        let its_end = || {
            wait("its end", || {
                let contexts = self.host.contexts();
                let mut contexts = contexts.iter();
                contexts.any(|one| one.vm.as_str() == gone && !one.is_connected())
            });
            let state = self.vms.device.lock();
            let bytes = state.mapped;
            assert!(
                bytes == 0 || state.user != memory(number),
                "{step}: {bytes} bytes of {gone}"
            );
        };
        std::fs::write(&self.file, step.to_string()).unwrap();
        let reached = self.file.with_added_extension("reached");
        std::thread::scope(|scope| {
            let asks = scope.spawn(|| self.host.switch_to(&name(to)).is_ok());
            wait("the step", || reached.exists());
            self.vms.end(gone);
            // Whose function is held by the switch then is heard to have gone behind it.
            let is_held = match gone == to {
                true => step > Step::Map,
                false => step > Step::Quiesce,
            };
            if !is_held {
                its_end();
            }
            std::fs::remove_file(&reached).unwrap();
            std::fs::remove_file(&self.file).unwrap();
            asks.join().unwrap();
        });
        its_end();
    }

    /// This VM has the device, which reaches its memory alone, and what it hands it is sent.
    fn assert_works(&self, vm: &str, text: &str) {
        wait("the turn", || self.host.turn().as_deref() == Some(vm));
        let (ring, number) = self
            .vms
            .with(vm, |one| (one.guest.ring(), one.guest.mac[5]));
        wait("its driver", || {
            let state = self.vms.device.lock();
            state.get(RDBAL) == ring && state.masters && state.goes == Goes::Messages(5)
        });
        self.vms.with(vm, |one| {
            one.guest.send(u32::from(number));
            // Behind the store.
            assert_eq!(one.guest.read(RDBAL), ring, "{text}");
        });
        let state = self.vms.device.lock();
        assert_eq!(state.sent.last(), Some(&number.into()), "{text}");
        let memory = memory(number);
        assert_eq!((state.user, state.mapped), (memory, memory), "{text}");
    }
}

#[test]
fn whoever_is_killed_at_any_step_leaves_a_function_that_another_ones_driver_has() {
    let held = Held::new();
    held.boot("bystander", 4);
    for step in Step::ALL {
        // It has the device, and dies while it is taken from it.
        held.boot("old", 1);
        held.give("old");
        held.boot("new", 2);
        held.kill_amid("new", step, ("old", 1));
        held.assert_works("new", &format!("old, {step}"));
        // It is about to get it, and dies.
        held.boot("next", 3);
        held.kill_amid("next", step, ("next", 3));
        wait("the turn", || {
            let turn = held.host.turn();
            turn.is_some_and(|turn| turn != "next")
        });
        held.give("new");
        held.assert_works("new", &format!("next, {step}"));
        // One that has nothing to do with it: neither does it notice, nor is it missed.
        held.boot("third", 5);
        held.kill_amid("bystander", step, ("third", 5));
        held.assert_works("bystander", &format!("third, {step}"));
        held.vms.end("new");
        wait("new's end", || {
            let contexts = held.host.status().contexts;
            contexts.iter().any(|one| one.vm == "new" && !one.connected)
        });
    }
}
