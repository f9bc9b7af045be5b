//! One NIC of a device host and two stock guests that have it by turns.
//!
//! `COFFERDAM_FULL=1` switches five hundred times.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use agent_protocol::traffic::TrafficResult;
use cofferdam::bench::device_host::{DeviceHost, NAME};
use cofferdam::bench::guest::Guest;
use cofferdam::device::protocol::Reason;
use memchr::memmem;
use recovery::fault::FaultKind;
use recovery::ladder::{LadderConfig, OnFault, State};
use rustix::fs::{SeekFrom, seek};

use super::victim::Victim;
use super::{
    GATEWAY, Pings, assert_log_is_healthy, assert_probed_once_and_reset_for_lost_links, boot,
    insert_nic, nic_works, options, shell, wait_until_connected,
};
use crate::full;

const NAMES: [&str; 2] = ["left", "right"];
/// So many of the last turns are long enough for a ping to be answered in each.
const HEARD: usize = 4;
/// How long something that happens by itself may be in coming.
const SOON: Duration = Duration::from_secs(300);

/// Two guests with a NIC by turns.
struct Pair {
    guests: [Guest; 2],
    host: Option<DeviceHost>,
    folder: tempfile::TempDir,
}

impl Pair {
    fn new(parked: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let host = Self::host(folder.path(), parked);
        let guests = NAMES.map(|name| {
            let options = options().among(folder.path(), name);
            boot(&options.with(&format!("--nic device={NAME}")))
        });
        let mut pair = Self {
            guests,
            host: Some(host),
            folder,
        };
        for (guest, last) in pair.guests.iter_mut().zip([15, 16]) {
            insert_nic(guest, "e1000", last);
        }
        pair
    }

    fn host(root: &Path, parked: &str) -> DeviceHost {
        let program = options().program;
        let words = ["--model", "e1000", "--net", "user", "--parked", parked];
        DeviceHost::start(&program, root, &words).unwrap()
    }

    fn give(&self, to: usize) {
        if self.turn() != NAMES[to] {
            let host = self.host.as_ref().unwrap();
            if let Err(error) = host.give(NAMES[to]) {
                panic!("{error:#}: {:#?}", host.status().unwrap());
            }
        }
    }

    /// Who has the turn.
    fn turn(&self) -> String {
        let turn = self.host.as_ref().unwrap().turn().unwrap();
        turn.unwrap_or_default()
    }

    #[track_caller]
    fn wait_for_turn(&self, of: usize) {
        let deadline = Instant::now() + SOON;
        while self.turn() != NAMES[of] {
            assert!(Instant::now() < deadline, "{} has the turn", self.turn());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until whoever has the turn has sent or received something in it.
    #[track_caller]
    fn wait_for_frame(&self) {
        let deadline = Instant::now() + SOON;
        loop {
            let status = self.host.as_ref().unwrap().status().unwrap();
            let last = status.switches.last();
            if last.is_some_and(|last| last.first_frame_ns.is_some()) {
                return;
            }
            assert!(Instant::now() < deadline, "{} is not heard", self.turn());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The guest's NIC works, when its driver has seen its link.
    #[track_caller]
    fn works(&mut self, index: usize) {
        nic_works(&mut self.guests[index]);
    }
}

/// Whether the memory of the guest of this process has these bytes.
pub fn has(pid: u32, bytes: &[u8]) -> bool {
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let memory = descriptors
        .map(|entry| entry.unwrap().path())
        .find(|path| {
            let target = std::fs::read_link(path).unwrap_or_default();
            target.to_string_lossy().contains("cofferdam-guest")
        })
        .expect("the guest has memory");
    let file = File::open(memory).unwrap();
    let mut chunk = vec![0; 1 << 20];
    let mut at = 0;
    // Holes have nothing.
    while let Ok(start) = seek(&file, SeekFrom::Data(at)) {
        let read = file.read_at(&mut chunk, start).unwrap();
        if memmem::find(&chunk[..read], bytes).is_some() {
            return true;
        }
        if read <= bytes.len() {
            break;
        }
        at = start + (read - bytes.len()) as u64;
    }
    false
}

/// Two guests send each a marker of its own to the far end and back and a checked stream, while
/// their NIC moves.
fn streams_survive(parked: &str, switches: usize, turn: Duration) {
    let mut pair = Pair::new(parked);
    let markers =
        ["mark-4c656674-", "mark-52696768-"].map(|text| format!("{text}{parked}-0123456789"));
    let seconds = (turn * switches as u32).as_secs().max(2);
    let mut pings = Vec::new();
    for (index, marker) in markers.iter().enumerate() {
        pair.give(index);
        pair.works(index);
        let script = format!(
            "(/init traffic tcp_echo {GATEWAY} {seconds} > /tmp/stream) < /dev/null 2> /tmp/stream.log &\n\
             (while :; do echo {marker}; sleep 0.05; done) 2> /dev/null | nc {GATEWAY} 7 > /dev/null 2>&1 &"
        );
        shell(&mut pair.guests[index], &script);
        wait_until_connected(&mut pair.guests[index], 2);
        pings.push(Pings::start(&mut pair.guests[index]));
    }
    for number in 0..switches {
        let index = number % 2;
        // Turns that are too short to notice stay so until the last ones.
        let is_heard = parked == "down" || number + HEARD >= switches;
        let before = is_heard.then(|| pings[index].answered(&mut pair.guests[index]));
        pair.give(index);
        if parked == "down" {
            // Its driver has to see the link first.
            pair.wait_for_frame();
        }
        std::thread::sleep(turn);
        if let Some(before) = before {
            pings[index].go_on(&mut pair.guests[index], before);
        }
    }
    // Each comes to its end in a turn of its own, which lasts as long as that takes.
    let deadline = Instant::now() + SOON;
    let now = NAMES
        .iter()
        .position(|name| *name == pair.turn())
        .unwrap_or(0);
    for index in [now, 1 - now] {
        pair.give(index);
        while !shell(&mut pair.guests[index], "cat /tmp/stream").ends_with('\n') {
            assert!(Instant::now() < deadline, "a stream does not end");
            std::thread::sleep(Duration::from_millis(200));
        }
    }
    for (index, pings) in pings.into_iter().enumerate() {
        pings.end(&mut pair.guests[index], NAMES[index]);
    }
    let pids = [0, 1].map(|index| pair.guests[index].control().unwrap().status().unwrap().pid);
    for (index, guest) in pair.guests.iter_mut().enumerate() {
        let stream: TrafficResult = serde_json::from_str(&shell(guest, "cat /tmp/stream")).unwrap();
        assert_eq!((&stream.error, stream.corrupted), (&None, 0), "{stream:?}");
        assert!(
            stream.bytes_from_peer > 0 && stream.bytes_from_peer == stream.bytes_to_peer,
            "{stream:?}"
        );
        assert_log_is_healthy(guest, &["Tx Unit Hang"]);
        assert_probed_once_and_reset_for_lost_links(guest);
        assert!(
            has(pids[index], markers[index].as_bytes()),
            "what is looked for is found"
        );
        let other = markers[1 - index].as_bytes();
        assert!(
            !has(pids[index], other),
            "frames of {} are in {}",
            NAMES[1 - index],
            NAMES[index]
        );
    }
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn streams_of_two_guests_survive_switches_with_the_parked_link_up() {
    let switches = if full() { 500 } else { 8 };
    streams_survive("stall", switches, Duration::from_millis(50));
}

pub(super) fn kill(pid: u32) {
    // SAFETY: a plain system call on a process of this test's own.
    let sent = unsafe { libc::kill(pid.cast_signed(), libc::SIGKILL) };
    assert_eq!(sent, 0);
}

/// Run in the full form of the suite, or by name.
mod long {
    use super::*;

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn streams_of_two_guests_survive_switches_with_the_parked_link_down() {
        let switches = if full() { 100 } else { 6 };
        streams_survive("down", switches, Duration::from_millis(700));
    }

    /// A driver that is given up would keep the NIC from the other guest for ever.
    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn a_driver_that_the_ladder_gives_up_passes_the_turn_on() {
        const ENTRY: &str = "e1000_get_ethtool_stats";
        let Pair {
            guests: [left, right],
            host,
            folder: _folder,
        } = Pair::new("down");
        let host = host.unwrap();
        let turn = || host.turn().unwrap();
        if turn().as_deref() != Some(NAMES[0]) {
            host.give(NAMES[0]).unwrap();
        }
        let mut victim = Victim::of(left);
        let stop = LadderConfig {
            on_fault: Some(OnFault::Stop),
            ..LadderConfig::default()
        };
        victim.isolate(ENTRY, stop);
        // What goes wrong is taken back, and the turn stays where it is.
        assert_eq!(turn().as_deref(), Some(NAMES[0]));
        victim.inject(ENTRY, 5, FaultKind::NullDereference, 1, 1);
        victim.try_command(&["ethtool", "-S", "eth0"]);
        victim.guest.agent().disconnect();
        let deadline = Instant::now() + SOON;
        while turn().as_deref() != Some(NAMES[1]) {
            let ladder = victim.ladder();
            assert!(Instant::now() < deadline, "{:?}: {ladder:?}", turn());
            std::thread::sleep(Duration::from_millis(50));
        }
        assert_eq!(victim.ladder().state, State::Stopped);
        let status = host.status().unwrap();
        assert_eq!(status.switches.last().unwrap().reason, Reason::Yielded);
        let mut right = right;
        nic_works(&mut right);
        // It gets no turn before its driver is let go.
        let refused = host.give(NAMES[0]).unwrap_err().to_string();
        assert!(refused.contains("was given up"), "{refused}");
        victim.release();
        host.give(NAMES[0]).unwrap();
        nic_works(&mut victim.guest);
    }

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn the_nic_outlives_guests_and_guests_outlive_its_host() {
        let mut pair = Pair::new("down");
        pair.give(0);
        pair.works(0);
        // The guest that has the turn is killed: the other one gets it.
        let pid = pair.guests[0].control().unwrap().status().unwrap().pid;
        kill(pid);
        pair.wait_for_turn(1);
        pair.works(1);
        // The host is killed, and another one comes.
        kill(pair.host.as_ref().unwrap().pid());
        pair.host = None;
        shell(&mut pair.guests[1], "true");
        pair.host = Some(Pair::host(pair.folder.path(), "down"));
        pair.wait_for_turn(1);
        // The device begins anew; its driver has to be told.
        let vm = pair.guests[1].paths().dir.file_name().unwrap().to_owned();
        assert_eq!(vm, NAMES[1]);
        pair.guests[1].agent().disconnect();
        let mut control = pair.guests[1].control().unwrap();
        let module = "e1000".to_owned();
        let resumed = control.ask(&cofferdam::control::protocol::Request::ResumeDevice { module });
        resumed.unwrap_or_else(|error| panic!("{error:#}{}", pair.guests[1].last_words()));
        pair.works(1);
    }
}
