//! The lab's e1000e behind a device host, with stock guests: what is killed in the middle of a
//! switch, and who attaches in the moment in which another one goes.
//!
//! `COFFERDAM_FULL=1` kills at every step.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use cofferdam::bench::device_host::{DeviceHost, NAME};
use cofferdam::bench::guest::Guest;
use cofferdam::control::protocol::{Reply, Request};
use cofferdam::device::client::attach;
use cofferdam::runtime_dir::RuntimeRoot;
use devices::vfio::binding::Sysfs;
use recovery::switch::Step;

use super::passed::{NAMES, context, guest};
use super::passthrough::{FUNCTION, bring_up, transfer};
use super::switch::kill;
use super::{assert_log_is_healthy, insert_nic, nic_works, shell, wait_until};
use crate::{full, options};

/// Bus mastering, in the command register.
const BUS_MASTER: u8 = 1 << 2;

/// The function's own command register says that it may reach memory.
fn masters() -> bool {
    let file = Path::new("/sys/bus/pci/devices")
        .join(FUNCTION)
        .join("config");
    std::fs::read(file).unwrap()[4] & BUS_MASTER != 0
}

/// A device host whose switches wait, and its two guests.
struct Held {
    // Ended in this order.
    guests: [Option<Guest>; 2],
    host: Option<DeviceHost>,
    folder: tempfile::TempDir,
}

impl Held {
    fn new() -> Self {
        Sysfs::default()
            .bind(FUNCTION.parse().unwrap(), true)
            .unwrap();
        let mut held = Self {
            guests: [None, None],
            host: None,
            folder: tempfile::tempdir().unwrap(),
        };
        held.serve();
        held.boot(0);
        held.boot(1);
        held
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("hold")
    }

    fn serve(&mut self) {
        let mut command = Command::new(options().program);
        command.env("COFFERDAM_SWITCH_WAITS", self.file());
        let words = ["--vfio", FUNCTION];
        let host = DeviceHost::start_by(command, self.folder.path(), &words);
        self.host = Some(host.unwrap());
    }

    fn boot(&mut self, index: usize) {
        let mut guest = guest(self.folder.path(), NAMES[index], "");
        insert_nic(&mut guest, "e1000e", 15 + index as u8);
        self.guests[index] = Some(guest);
    }

    fn host(&self) -> &DeviceHost {
        self.host.as_ref().unwrap()
    }

    fn give(&self, index: usize) {
        if self.host().turn().unwrap().as_deref() != Some(NAMES[index]) {
            self.host().give(NAMES[index]).unwrap();
        }
    }

    /// Kills a process in the middle of a switch to the guest `to`.
    fn kill_amid(&self, to: usize, step: Step, pid: u32) {
        std::fs::write(self.file(), step.to_string()).unwrap();
        let reached = self.file().with_added_extension("reached");
        let host = self.host();
        std::thread::scope(|scope| {
            let asks = scope.spawn(|| host.give(NAMES[to]).is_ok());
            wait_until("the step", || reached.exists());
            kill(pid);
            std::fs::remove_file(self.file()).unwrap();
            asks.join().unwrap();
        });
        std::fs::remove_file(&reached).unwrap();
    }

    /// That guest has the function, and frames come through.
    #[track_caller]
    fn works(&mut self, index: usize) {
        let host = self.host.as_ref().unwrap();
        wait_until("the turn", || {
            host.turn().unwrap().as_deref() == Some(NAMES[index])
        });
        let guest = self.guests[index].as_mut().unwrap();
        nic_works(guest);
        assert_log_is_healthy(guest, &["Hardware Unit Hang"]);
    }

    /// Kills a guest's process in the middle of a switch to `to`; the other one then has a function
    /// that works, and nothing of the dead one's memory is in its reach.
    fn kill_guest(&mut self, to: usize, step: Step, victim: usize) {
        let pid = self.guests[victim].as_ref().unwrap().pid();
        self.kill_amid(to, step, pid);
        wait_until("its end", || !context(self.host(), NAMES[victim]).connected);
        let dead = context(self.host(), NAMES[victim]);
        assert_eq!((dead.mapped_bytes, dead.dma_bytes), (Some(0), 0), "{step}");
        self.works(1 - victim);
        let last = self.host().status().unwrap();
        println!(
            "{} killed at {step}: {:?}",
            NAMES[victim],
            last.switches.last()
        );
        self.guests[victim] = None;
        self.boot(victim);
    }
}

mod long {
    use super::*;

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn whatever_is_killed_amid_a_switch_of_a_real_function_leaves_one_that_works() {
        let mut held = Held::new();
        let all = Step::ALL;
        let some = [Step::Unmap];
        for step in if full() { &all[..] } else { &some[..] } {
            // The one that has it, the one that is about to.
            held.give(0);
            held.kill_guest(1, *step, 0);
            held.give(1);
            held.kill_guest(0, *step, 0);
        }
        let some = [Step::Load];
        for step in if full() { &all[..] } else { &some[..] } {
            held.give(0);
            held.kill_amid(1, *step, held.host().pid());
            held.host = None;
            // Its file is closed: no DMA, and no guest has ended with it.
            wait_until("the end of DMA", || !masters());
            for guest in held.guests.iter_mut().flatten() {
                shell(guest, "true");
            }
            held.serve();
            wait_until("both guests", || {
                let contexts = held.host().status().unwrap().contexts;
                contexts.iter().filter(|context| context.connected).count() == 2
            });
            for index in [0, 1] {
                held.give(index);
                // The device begins anew, and so does its driver.
                let guest = held.guests[index].as_mut().unwrap();
                shell(guest, "rmmod e1000e");
                insert_nic(guest, "e1000e", 15 + index as u8);
                held.works(index);
            }
        }
    }

    /// As seen of monitors in wide use: a function attached in the moment in which another guest gives
    /// it up is refused as busy, the second attempt is accepted and the device never sends anything;
    /// and attempts that fail use up the slots.
    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn a_guest_that_attaches_in_the_moment_of_anothers_end_has_a_real_function_that_works() {
        let rounds = if full() { 4 } else { 2 };
        Sysfs::default()
            .bind(FUNCTION.parse().unwrap(), true)
            .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let words = ["--vfio", FUNCTION, "--slots", "2"];
        let served = DeviceHost::start(&options().program, root, &words).unwrap();
        let boot = |name| crate::boot(&options().among(root, name).with("--memory 256M"));
        let mut guests = NAMES.map(boot);
        let plug = |guest: &Guest| {
            let request = Request::Plug {
                net: None,
                nic: Some(format!("device={NAME}")),
            };
            match guest.control().unwrap().ask(&request) {
                Ok(Reply::Plugged(nic)) => nic.address,
                other => panic!("{other:?}"),
            }
        };
        let mut places = vec![plug(&guests[0])];
        bring_up(&mut guests[0]);
        for round in 0..rounds {
            let [has, gets] = [round % 2, 1 - round % 2];
            // Those that are refused: its name is taken.
            for _ in 0..8 {
                let runtime = RuntimeRoot::new(root);
                let mac = context(&served, NAMES[has]).mac.parse().unwrap();
                let name = NAMES[has].parse().unwrap();
                let refused = attach(&runtime, &NAME.parse().unwrap(), (&name, mac), None);
                let refused = refused.map(drop).unwrap_err().to_string();
                assert!(refused.contains("busy"), "{refused}");
            }
            let address = places.last().unwrap().clone();
            let mut control = guests[has].control().unwrap();
            let place = std::thread::scope(|scope| {
                let goes = scope.spawn(move || control.tell(&Request::Unplug { address }));
                // From before its end to behind it.
                std::thread::sleep(Duration::from_millis(150 * round as u64));
                let place = plug(&guests[gets]);
                goes.join().unwrap().unwrap();
                place
            });
            places.push(place);
            bring_up(&mut guests[gets]);
            transfer(&mut guests[gets], 2);
            let turn = served.turn().unwrap();
            assert_eq!(turn.as_deref(), Some(NAMES[gets]), "round {round}");
            let status = served.status().unwrap();
            assert_eq!(status.contexts.len(), 2, "{status:?}");
        }
        assert!(places.iter().all(|place| *place == places[0]), "{places:?}");
        for guest in &mut guests {
            assert_log_is_healthy(guest, &["Hardware Unit Hang"]);
        }
    }
}
