//! The lab's e1000e behind a device host that does not use its description: two stock guests have
//! it by turns, and their own drivers suspend and resume it.
//!
//! `COFFERDAM_FULL=1` switches 24 times, and moves the function by unplug and plug besides.

use std::time::{Duration, Instant};

use cofferdam::bench::device_host::{DeviceHost, NAME};
use cofferdam::bench::guest::Guest;
use cofferdam::control::protocol::{Reply, Request};
use cofferdam::device::protocol::SwitchRecord;
use devices::vfio::binding::Sysfs;

use super::passed::{Connection, NAMES, context, refused};
use super::switch::has;
use super::{
    GATEWAY, Pings, assert_log_is_healthy, boot, insert_nic, nic_works, options, shell, wait_until,
};
use crate::full;

/// The lab's e1000e, which the host can reset alone, and its driver.
const FUNCTION: &str = "0000:00:02.0";
const DRIVER: &str = "e1000e";
/// Its vendor, as the guest's kernel writes it.
const VENDOR: &str = "0x8086";
/// The lab's VMXNET3, which it cannot.
const CANNOT_BE_RESET: &str = "0000:00:13.0";
/// Moves by unplug and plug, in the full form.
const MOVES: usize = 5;
const LAST: [u8; 2] = [15, 16];

fn switches() -> usize {
    if full() { 24 } else { 3 }
}

struct Pair {
    guests: [Guest; 2],
    served: DeviceHost,
    _folder: tempfile::TempDir,
}

impl Pair {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let words = ["--vfio", FUNCTION, "--state", "driver"];
        let served = DeviceHost::start(&options().program, folder.path(), &words).unwrap();
        let guests = NAMES.map(|name| {
            let options = options().among(folder.path(), name);
            boot(&options.with(&format!("--nic device={NAME} --memory 256M")))
        });
        Self {
            guests,
            served,
            _folder: folder,
        }
    }

    /// Gives the turn to a guest that has it not. The agents are to listen to their VMs meanwhile.
    #[track_caller]
    fn give(&mut self, index: usize) -> SwitchRecord {
        self.let_agents_go();
        match self.served.give(NAMES[index]) {
            Ok(record) => record,
            Err(error) => panic!("{error:#}: {}", self.guests[index].last_words()),
        }
    }

    fn let_agents_go(&mut self) {
        for guest in &mut self.guests {
            guest.agent().disconnect();
        }
    }
}

/// Waits until a ping is answered that the guest sent.
#[track_caller]
fn is_answered(guest: &mut Guest) {
    let script = format!(
        "for t in $(seq 1 1000); do ping -c 1 -W 1 {GATEWAY} > /dev/null && exit 0; sleep 0.02; done; dmesg; exit 1"
    );
    shell(guest, &script);
}

fn say(what: &str, mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    let median = times[times.len() / 2];
    println!(
        "{what}, n = {}: median {median:?}, {:?} to {:?}",
        times.len(),
        times.first().unwrap(),
        times.last().unwrap()
    );
    median
}

/// The same move by taking the function out of the one guest and plugging it into the other, until
/// a ping is answered.
fn moved_by_hotplug() -> Vec<Duration> {
    let folder = tempfile::tempdir().unwrap();
    let mut guests = NAMES.map(|name| {
        let options = options().among(folder.path(), name);
        let mut guest = boot(&options.with("--memory 256M"));
        shell(&mut guest, &format!("modprobe {DRIVER}"));
        guest
    });
    let (mut plugged, mut times) = (None::<(usize, String)>, Vec::new());
    for number in 0..=MOVES {
        let index = number % 2;
        let begin = Instant::now();
        if let Some((old, address)) = plugged.take() {
            let mut control = guests[old].control().unwrap();
            control.tell(&Request::Unplug { address }).unwrap();
        }
        let nic = Some(format!("vfio={FUNCTION}"));
        let request = Request::Plug { net: None, nic };
        match guests[index].control().unwrap().ask(&request).unwrap() {
            Reply::Plugged(nic) => plugged = Some((index, nic.address)),
            other => panic!("{other:?}"),
        }
        let up = format!(
            "until [ -e /sys/class/net/eth0 ]; do sleep 0.02; done; ip link set eth0 up; ip addr add 10.0.2.{}/24 dev eth0",
            LAST[index]
        );
        shell(&mut guests[index], &up);
        is_answered(&mut guests[index]);
        if number > 0 {
            times.push(begin.elapsed());
        }
    }
    times
}

/// Nothing was lost, changed or the other one's, and neither kernel noticed more than its link.
#[track_caller]
fn finish(pair: &mut Pair, connections: &[Connection], markers: &[String; 2]) {
    let pids = [0, 1].map(|index| {
        let mut control = pair.guests[index].control().unwrap();
        control.status().unwrap().pid
    });
    let now = pair.served.turn().unwrap();
    let now = NAMES.iter().position(|name| now.as_deref() == Some(*name));
    let now = now.unwrap();
    for index in [now, 1 - now] {
        if index != now {
            pair.give(index);
        }
        let guest = &mut pair.guests[index];
        println!(
            "{}: {} bytes",
            NAMES[index],
            connections[index].close(guest)
        );
        assert_log_is_healthy(guest, &["Hardware Unit Hang"]);
        let log = shell(guest, "dmesg");
        assert_eq!(log.matches("Network Connection").count(), 1, "{log}");
        assert!(has(pids[index], markers[index].as_bytes()), "it is found");
        assert!(
            !has(pids[index], markers[1 - index].as_bytes()),
            "frames of {} are in {}",
            NAMES[1 - index],
            NAMES[index]
        );
    }
    let status = pair.served.status().unwrap();
    assert_eq!(status.failed_switches, 0, "{status:?}");
}

/// What a driver leaves in it would be there in the next guest's turn.
#[test]
#[ignore = "needs the lab's functions and IOMMU: cargo xtask test runs it in the lab"]
fn a_function_that_the_host_cannot_reset_alone_is_refused() {
    let sysfs = Sysfs::default();
    sysfs.bind(CANNOT_BE_RESET.parse().unwrap(), true).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let text = refused(folder.path(), CANNOT_BE_RESET, |_| {});
    assert!(text.contains("cannot reset"), "{text}");
}

/// Run in the full form of the suite, or by name.
mod long {
    use super::super::switch::kill;
    use super::*;

    /// The second guest has never had the function when it gets its first turn, and probes it then.
    #[test]
    #[ignore = "needs the lab's functions and IOMMU: cargo xtask test runs it in the lab"]
    fn drivers_of_two_guests_suspend_and_resume_a_function_that_they_have_by_turns() {
        let sysfs = Sysfs::default();
        sysfs.bind(FUNCTION.parse().unwrap(), true).unwrap();
        let mut pair = Pair::new();
        assert_eq!(pair.served.turn().unwrap().as_deref(), Some(NAMES[0]));
        insert_nic(&mut pair.guests[0], DRIVER, LAST[0]);
        shell(&mut pair.guests[1], &format!("modprobe {DRIVER}"));
        let unknown = format!("! grep -l {VENDOR} /sys/bus/pci/devices/*/vendor");
        shell(&mut pair.guests[1], &unknown);
        let markers = NAMES.map(|name| format!("driven-sent-by-{name}"));
        let (mut connections, mut pings) = (Vec::new(), Vec::new());
        for (index, marker) in markers.iter().enumerate() {
            if index > 0 {
                println!("the first turn: {:?}", pair.give(index).phases);
                insert_nic(&mut pair.guests[index], DRIVER, LAST[index]);
                let mac = shell(&mut pair.guests[index], "cat /sys/class/net/eth0/address");
                assert_eq!(mac.trim(), context(&pair.served, NAMES[index]).mac);
            }
            nic_works(&mut pair.guests[index]);
            connections.push(Connection::open(&mut pair.guests[index], marker.clone()));
            pings.push(Pings::start(&mut pair.guests[index]));
        }
        let (mut records, mut times) = (Vec::new(), Vec::new());
        for number in 0..switches() {
            let index = number % 2;
            let before = Connection::back(&mut pair.guests[index]);
            let answered = pings[index].answered(&mut pair.guests[index]);
            let begin = Instant::now();
            records.push(pair.give(index));
            is_answered(&mut pair.guests[index]);
            times.push(begin.elapsed());
            connections[index].moves_on(&mut pair.guests[index], before);
            pings[index].go_on(&mut pair.guests[index], answered);
        }
        for (index, pings) in pings.into_iter().enumerate() {
            pings.end(&mut pair.guests[index], NAMES[index]);
        }
        println!("the last one: {:?}", records.last().unwrap().phases);
        let switched = say("switched, until a ping is answered", times);
        finish(&mut pair, &connections, &markers);
        drop(pair);
        if !full() {
            return;
        }
        let plugged = say(
            "unplugged and plugged, until a ping is answered",
            moved_by_hotplug(),
        );
        let ratio = plugged.as_secs_f64() / switched.as_secs_f64();
        println!("a switch takes 1/{ratio:.1} of that");
    }

    /// A guest that is paused has suspended the device before; the next one has it.
    #[test]
    #[ignore = "needs the lab's functions and IOMMU: cargo xtask test runs it in the lab"]
    fn a_guest_that_is_paused_or_killed_leaves_the_function_to_the_next_one() {
        let sysfs = Sysfs::default();
        sysfs.bind(FUNCTION.parse().unwrap(), true).unwrap();
        let mut pair = Pair::new();
        insert_nic(&mut pair.guests[0], DRIVER, LAST[0]);
        shell(&mut pair.guests[1], &format!("modprobe {DRIVER}"));
        nic_works(&mut pair.guests[0]);
        pair.let_agents_go();
        let mut control = pair.guests[0].control().unwrap();
        control.tell(&Request::Pause {}).unwrap();
        assert_eq!(pair.served.turn().unwrap().as_deref(), Some(NAMES[1]));
        insert_nic(&mut pair.guests[1], DRIVER, LAST[1]);
        nic_works(&mut pair.guests[1]);
        control.tell(&Request::Resume {}).unwrap();
        assert_log_is_healthy(&mut pair.guests[0], &[]);
        pair.let_agents_go();
        kill(pair.guests[1].pid());
        // Its driver is asked by its agent, which is left alone until that is over.
        wait_until("the turn", || {
            let status = pair.served.status().unwrap();
            let last = status.switches.last();
            last.is_some_and(|last| last.to.as_deref() == Some(NAMES[0]))
        });
        nic_works(&mut pair.guests[0]);
        assert_log_is_healthy(&mut pair.guests[0], &[]);
    }
}
