//! A device host whose function is one of registers in this process, behind real vfio-user
//! connections; the guests' drivers suspend and resume it.

mod kills_at_steps;
mod late;
mod soak;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::ensure;
use devices::pci::registers::Description;
use devices::vfio::passed::driven::DrivenKind;
use recovery::by_turns::{GivenAway, TakenOver};
use recovery::switch::{Outcome, Step};

use super::drivers::Drivers;
use super::{DrivenCard, lock};
use crate::control::client::AskError;
use crate::device::ParkedAs;
use crate::device::at_step::Waiting;
use crate::device::host::Host;
use crate::device::passed::tests::device::{Device, Goes, RDBAL};
use crate::device::passed::tests::guest::{Guest, MEMORY, host_of, wait};
use crate::options::VmName;

const TURNS: usize = 20;
/// All that a device says that does not answer.
const NOTHING: u32 = u32::MAX;

/// A VM with its guest.
struct Vm {
    guest: Guest,
    /// Its driver has begun.
    begun: bool,
    /// Its driver has suspended the device.
    suspended: bool,
}

/// The VMs by their names, as their drivers can be asked; clones are the same ones.
#[derive(Clone)]
struct Vms {
    all: Arc<Mutex<HashMap<String, Vm>>>,
    device: Device,
    /// What was asked of whom.
    asked: Arc<Mutex<Vec<String>>>,
    /// What fails.
    fails: Arc<Mutex<Option<String>>>,
    /// Held while drivers are not to come back from resuming the device.
    waits: Arc<Mutex<()>>,
}

impl Vms {
    fn note(&self, what: &str, vm: &VmName) -> anyhow::Result<()> {
        let said = format!("{vm} {what}");
        let fails = lock(&self.fails).as_ref() == Some(&said);
        lock(&self.asked).push(said);
        if fails {
            return Err(AskError::Refused("injected".to_owned()).into());
        }
        Ok(())
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut *lock(&self.asked))
    }

    /// Does something with the guest of a VM.
    fn with<T>(&self, vm: &str, act: impl FnOnce(&mut Vm) -> T) -> T {
        act(lock(&self.all).get_mut(vm).unwrap())
    }

    /// A VM that attaches; its guest, if it has the device, has its driver begin.
    fn boot(&self, host: &Host<DrivenCard>, vm: &str, mac: u8) {
        self.boot_with(host, vm, mac, MEMORY);
    }

    /// The same with so much memory.
    fn boot_with(&self, host: &Host<DrivenCard>, vm: &str, mac: u8, bytes: u64) {
        let mut guest = Guest::attach_with(host, vm, mac, bytes);
        // Whoever asks its driver for something is answered by it, or by nobody.
        let mut all = lock(&self.all);
        guest.reset();
        // It may have been given the turn since it attached, which nobody asks a driver for then.
        let begun = guest.identity() != [0xff; 4];
        if begun {
            guest.start();
        }
        let suspended = false;
        let vm_state = Vm {
            guest,
            begun,
            suspended,
        };
        all.insert(vm.to_owned(), vm_state);
    }

    /// The guest of a VM begins anew: its driver, if it finds the device.
    fn begin_anew(&self, vm: &str) {
        self.with(vm, |one| {
            one.guest.reset();
            one.begun = one.guest.identity() != [0xff; 4];
            one.suspended = false;
            if one.begun {
                one.guest.start();
            }
        });
    }

    /// What a VM that was asked does, unless it has gone.
    fn answer<T>(
        &self,
        vm: &VmName,
        act: impl FnOnce(&mut Vm) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        match lock(&self.all).get_mut(vm.as_str()) {
            Some(one) => act(one),
            None => anyhow::bail!("{vm} has gone"),
        }
    }

    /// The process of a VM ends.
    fn end(&self, vm: &str) {
        lock(&self.all).remove(vm);
    }

    /// The device does what the driver of `vm` has it do, and for nobody else.
    #[track_caller]
    fn assert_works_for(&self, vm: &str) {
        self.with(vm, |one| {
            assert!(one.begun && !one.suspended, "{vm}");
            let state = self.device.lock();
            assert_eq!(state.get(RDBAL), one.guest.ring(), "{vm}");
            assert!(state.masters, "{vm}");
            assert_eq!((state.mapped, state.goes), (MEMORY, Goes::Messages(5)));
        });
    }
}

impl Drivers for Vms {
    fn hand_over(&self, vm: &VmName) -> anyhow::Result<GivenAway> {
        self.note("suspends", vm)?;
        self.answer(vm, |one| {
            if !one.begun {
                return Ok(GivenAway::Forgotten);
            }
            // Its registers are its own until it is done.
            assert_eq!(one.guest.read(RDBAL), one.guest.ring());
            one.guest.set_command(2);
            one.suspended = true;
            let late = format!("{vm} suspends, late");
            ensure!(lock(&self.fails).as_ref() != Some(&late), "injected");
            Ok(GivenAway::Suspended)
        })
    }

    fn take_over(&self, vm: &VmName) -> anyhow::Result<TakenOver> {
        self.note("resumes", vm)?;
        drop(lock(&self.waits));
        self.answer(vm, |one| {
            // Nothing of another guest is left in it.
            assert_ne!(one.guest.identity(), [0xff; 4]);
            let (ring, own) = (one.guest.read(RDBAL), one.guest.ring());
            assert!(ring == 0 || ring == own, "{vm}: {ring:#x}");
            one.guest.start();
            let how = match (one.begun, one.suspended) {
                (false, _) => TakenOver::Found,
                (true, true) => TakenOver::Resumed,
                (true, false) => TakenOver::Anew,
            };
            (one.begun, one.suspended) = (true, false);
            let late = format!("{vm} resumes, late");
            ensure!(lock(&self.fails).as_ref() != Some(&late), "injected");
            Ok(how)
        })
    }
}

fn host() -> (Arc<Host<DrivenCard>>, Vms) {
    host_with(None)
}

fn host_with(description: Option<Description>) -> (Arc<Host<DrivenCard>>, Vms) {
    host_waiting(description, Waiting::default())
}

/// The same; its switches wait where they are told to.
fn host_waiting(
    description: Option<Description>,
    waiting: Waiting,
) -> (Arc<Host<DrivenCard>>, Vms) {
    let (device, shape) = Device::with_shape();
    let (kind, hardware) = DrivenKind::of(Box::new(device.clone()), shape, description).unwrap();
    let vms = Vms {
        all: Arc::default(),
        device,
        asked: Arc::default(),
        fails: Arc::default(),
        waits: Arc::default(),
    };
    let mut card = DrivenCard::of(kind, hardware, Box::new(vms.clone()));
    card.waiting = waiting;
    (host_of(card, ParkedAs::Down, 8), vms)
}

fn name(vm: &str) -> VmName {
    vm.parse().unwrap()
}

#[test]
fn drivers_suspend_and_resume_a_function_that_guests_have_by_turns() {
    let (host, vms) = host();
    vms.boot(&host, "left", 1);
    vms.boot(&host, "right", 2);
    vms.assert_works_for("left");
    for turn in 1..TURNS {
        let names = ["left", "right"];
        let (has, had) = (names[turn % 2], names[1 - turn % 2]);
        let resets = vms.device.lock().resets;
        let record = host.switch_to(&name(has)).unwrap();
        assert_eq!(record.outcome, Outcome::Switched {});
        assert!(record.phases.prepare_ns.is_some() && record.phases.complete_ns.is_some());
        let asked = [format!("{had} suspends"), format!("{has} resumes")];
        assert_eq!(vms.asked(), asked);
        assert_eq!(vms.device.lock().resets, resets + 1);
        vms.assert_works_for(has);
        // Who does not have it finds a device that does not answer, and changes nothing of it.
        let ring = vms.device.lock().get(RDBAL);
        vms.with(had, |one| {
            one.guest.write(RDBAL, 7);
            assert_eq!(one.guest.read(RDBAL), NOTHING);
            one.guest.set_command(6);
        });
        assert_eq!(vms.device.lock().get(RDBAL), ring);
        // Each sends what is its own.
        vms.device.lock().sent.clear();
        vms.with(has, |one| {
            one.guest.send(turn as u32);
            one.guest.read(RDBAL);
        });
        assert_eq!(vms.device.lock().sent, [turn as u32]);
    }
    let status = host.status();
    assert_eq!(
        (status.failed_switches, status.model.as_str()),
        (0, "8086:10d3")
    );
    assert_eq!(status.function.as_deref(), Some("0000:00:02.0"));
    let passed = status.contexts[0].passed.unwrap();
    assert_eq!(passed.turns, TURNS as u64 / 2);
    assert!(passed.accesses > 0 && passed.parked_accesses > 0);
}

/// Its kernel would probe a device that does not answer.
#[test]
fn a_guest_finds_no_function_before_its_first_turn() {
    let (host, vms) = host();
    vms.boot(&host, "left", 1);
    vms.boot(&host, "right", 2);
    let finds = |vm: &str| vms.with(vm, |one| one.guest.identity() != [0xff; 4]);
    assert!(finds("left") && !finds("right"));
    host.switch_to(&name("right")).unwrap();
    // It is known to both now, and one that begins anew without it does not know it any more.
    assert!(finds("left") && finds("right"));
    vms.with("left", |one| {
        one.guest.reset();
        (one.begun, one.suspended) = (false, false);
    });
    vms.with("right", |one| one.guest.reset());
    assert!(!finds("left") && finds("right"));
    assert!(!vms.device.lock().masters);
    vms.with("right", |one| one.guest.start());
    vms.assert_works_for("right");
    host.switch_to(&name("left")).unwrap();
    vms.assert_works_for("left");
    // A guest that has no driver for it forgets it when it goes.
    vms.with("left", |one| one.begun = false);
    host.switch_to(&name("right")).unwrap();
    assert!(!finds("left"));
}

#[test]
fn whatever_step_fails_one_guest_has_the_function_or_nobody_and_it_works_again() {
    for step in Step::ALL {
        let (host, vms) = host();
        vms.boot(&host, "left", 1);
        vms.boot(&host, "right", 2);
        for vm in ["right", "left"] {
            host.switch_to(&name(vm)).unwrap();
        }
        match step {
            Step::Prepare => *lock(&vms.fails) = Some("left suspends".to_owned()),
            Step::Complete => *lock(&vms.fails) = Some("right resumes".to_owned()),
            // There is nothing to be done for these that could fail.
            Step::Quiesce | Step::Save | Step::Load => continue,
            _ => vms.device.lock().fails = Some(step),
        }
        let error = host.switch_to(&name("right")).unwrap_err();
        let error = format!("{error:#}");
        assert!(error.starts_with(&format!("{step} failed")), "{error}");
        let turn = host.turn();
        let silent = vms.device.lock().is_silent();
        match turn.as_deref() {
            Some(vm) => {
                assert_eq!(vm, "left", "{step}");
                vms.assert_works_for("left");
            }
            None => assert!(silent, "{step}"),
        }
        // A driver that could not suspend the device was not disturbed.
        if step == Step::Prepare {
            assert_eq!(vms.asked().last().unwrap(), "left suspends");
        }
        *lock(&vms.fails) = None;
        let mut state = vms.device.lock();
        (state.fails, state.fails_to_reset) = (None, false);
        drop(state);
        for vm in ["right", "left", "right"] {
            host.switch_to(&name(vm)).unwrap();
            vms.assert_works_for(vm);
        }
    }
}

#[test]
fn who_goes_or_whose_driver_was_given_up_is_asked_for_nothing_and_leaves_nothing() {
    let (host, vms) = host();
    vms.boot(&host, "left", 1);
    vms.boot(&host, "right", 2);
    host.driver_lost(&name("left")).unwrap();
    assert_eq!(vms.asked(), ["right resumes"]);
    vms.assert_works_for("right");
    vms.end("right");
    wait("its end", || vms.device.lock().is_silent());
    // Its driver begins anew: it did not suspend the device.
    host.set_away(&name("left"), false).unwrap();
    wait("the turn", || host.turn().as_deref() == Some("left"));
    wait("its driver", || {
        vms.with("left", |one| {
            vms.device.lock().get(RDBAL) == one.guest.ring()
        })
    });
    assert_eq!(vms.asked(), ["left resumes"]);
    vms.assert_works_for("left");
    // One that is paused has suspended it before.
    vms.boot(&host, "right", 2);
    host.set_away(&name("left"), true).unwrap();
    assert_eq!(vms.asked(), ["left suspends", "right resumes"]);
    vms.assert_works_for("right");
}

/// What a driver leaves in it, addresses of its guest's memory among it, would be the next one's.
#[test]
fn a_function_that_the_host_cannot_reset_alone_is_refused() {
    let (device, shape) = Device::with_shape();
    device.lock().cannot_be_reset = true;
    let refused = DrivenKind::of(Box::new(device), shape, None).err().unwrap();
    assert!(
        refused.to_string().contains("cannot reset 0000:00:02.0"),
        "{refused}"
    );
}

/// Its old addresses would be addresses in the next one's memory.
#[test]
fn a_function_is_reset_before_it_reaches_the_next_ones_memory_also_on_the_way_back() {
    for description in [None, Some(Description::intel_82574l().unwrap())] {
        let (host, vms) = host_with(description);
        vms.boot(&host, "left", 1);
        vms.boot(&host, "right", 2);
        vms.device.lock().is_blank_when_mapped = true;
        for vm in ["right", "left"] {
            host.switch_to(&name(vm)).unwrap();
            vms.assert_works_for(vm);
        }
        *lock(&vms.fails) = Some("right resumes, late".to_owned());
        let error = host.switch_to(&name("right")).unwrap_err().to_string();
        assert!(error.contains("the turn is where it was"), "{error}");
        vms.assert_works_for("left");
        *lock(&vms.fails) = None;
        vms.device.lock().fails_to_reset = true;
        let error = host.switch_to(&name("right")).unwrap_err().to_string();
        assert!(error.starts_with("map failed"), "{error}");
        assert!(host.turn().is_none() && vms.device.lock().is_silent());
    }
}

#[test]
fn nobody_is_given_a_device_that_reaches_anothers_memory() {
    let (host, vms) = host();
    vms.boot(&host, "left", 1);
    vms.boot(&host, "right", 2);
    vms.device.lock().keeps_memory = true;
    vms.end("left");
    wait("a switch that fails", || host.status().failed_switches > 0);
    for _ in 0..2 {
        let error = host.switch_to(&name("right")).unwrap_err().to_string();
        assert!(error.starts_with("map failed"), "{error}");
        assert!(host.turn().is_none() && !vms.device.lock().masters);
    }
    vms.device.lock().keeps_memory = false;
    wait("the turn", || {
        host.switch_to(&name("right")).is_ok() || host.turn().as_deref() == Some("right")
    });
    vms.assert_works_for("right");
}

#[test]
fn memory_that_cannot_be_given_to_the_device_silences_it_and_its_driver_is_asked_all_the_same() {
    let (host, vms) = host();
    vms.boot(&host, "left", 1);
    vms.boot(&host, "right", 2);
    vms.device.lock().fails = Some(Step::Complete);
    vms.with("left", |one| one.guest.give_more());
    wait("silence", || vms.device.lock().is_silent());
    vms.device.lock().fails = None;
    host.switch_to(&name("right")).unwrap();
    assert_eq!(vms.asked(), ["left suspends", "right resumes"]);
    vms.assert_works_for("right");
    host.switch_to(&name("left")).unwrap();
    let state = vms.device.lock();
    assert!(state.masters && state.mapped == 2 * MEMORY);
}

#[test]
fn what_a_description_withholds_no_driver_gets_at() {
    /// In the packet buffer.
    const HELD: u32 = 0x1_0010;
    let (host, vms) = host_with(Some(Description::intel_82574l().unwrap()));
    vms.boot(&host, "left", 1);
    vms.device.lock().registers.insert(HELD, 0x005e_c4e7);
    vms.with("left", |one| {
        assert_eq!(one.guest.read(HELD), 0);
        one.guest.write(HELD, 7);
        assert_eq!(one.guest.read(RDBAL), one.guest.ring());
    });
    assert_eq!(vms.device.lock().get(HELD), 0x005e_c4e7);
}
