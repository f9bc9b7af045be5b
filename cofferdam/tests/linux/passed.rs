//! The lab's e1000e behind a device host: two stock guests have one real function by turns, with
//! their stock driver.
//!
//! `COFFERDAM_FULL=1` switches a hundred times, and with the parked link up, too.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use cofferdam::bench::device_host::{DeviceHost, NAME};
use cofferdam::bench::guest::Guest;
use cofferdam::bench::network;
use cofferdam::device::protocol::{ContextStatus, SwitchRecord};
use cofferdam::runtime_dir::ROOT_VARIABLE;
use devices::vfio::binding::Sysfs;

use super::passthrough::with_little_locked_memory;
use super::switch::{has, kill};
use super::{
    Pings, SOON, assert_log_is_healthy, assert_probed_once_and_reset_for_lost_links, boot,
    insert_nic, nic_works, options, shell, wait_until,
};
use crate::full;

/// The lab's e1000e.
pub const FUNCTION: &str = "0000:00:02.0";
/// The lab's IOMMU itself, which is behind none.
const WITHOUT_IOMMU: &str = "0000:00:01.0";
/// Memory of each guest.
const MEMORY_MIB: u32 = 256;
pub const NAMES: [&str; 2] = ["left", "right"];
/// What sends everything back, on TCP port 7.
pub const ECHO: &str = "10.0.2.100";

fn serve(root: &Path, words: &[&str]) -> DeviceHost {
    let words = [&["--vfio", FUNCTION], words].concat();
    DeviceHost::start(&options().program, root, &words).unwrap()
}

pub fn context(served: &DeviceHost, vm: &str) -> ContextStatus {
    let mut contexts = served.status().unwrap().contexts.into_iter();
    contexts.find(|context| context.vm == vm).unwrap()
}

pub fn guest(root: &Path, name: &'static str, more: &str) -> Guest {
    let options = options().among(root, name);
    let arguments = format!("--nic device={NAME} --memory {MEMORY_MIB}M {more}");
    boot(&options.with(&arguments))
}

/// Has the host set aside large pages for two guests.
fn set_large_pages_aside() {
    const FILE: &str = "/proc/sys/vm/nr_hugepages";
    let pages = (MEMORY_MIB * 2 / 2).to_string();
    std::fs::write(FILE, &pages).unwrap();
    let has = std::fs::read_to_string(FILE).unwrap();
    assert_eq!(has.trim(), pages, "the host has no room for large pages");
}

fn pid(guest: &Guest) -> u32 {
    guest.control().unwrap().status().unwrap().pid
}

/// Prints how long each step of these switches took.
fn print_phases(what: &str, records: &[SwitchRecord]) {
    let mean = |of: &dyn Fn(&SwitchRecord) -> Option<u64>| {
        let all: Vec<_> = records.iter().filter_map(of).collect();
        all.iter().sum::<u64>() as f64 / 1e6 / all.len().max(1) as f64
    };
    let mut totals: Vec<_> = records.iter().map(|one| one.phases.total_ns()).collect();
    totals.sort_unstable();
    println!(
        "{what}, {} switches, means in ms: quiesce {:.2}, save {:.2}, unmap {:.2}, map {:.2}, load {:.2}, resume {:.2}; \
         total median {:.2}, largest {:.2}",
        records.len(),
        mean(&|one| one.phases.quiesce_ns),
        mean(&|one| one.phases.save_ns),
        mean(&|one| one.phases.unmap_ns),
        mean(&|one| one.phases.map_ns),
        mean(&|one| one.phases.load_ns),
        mean(&|one| one.phases.resume_ns),
        totals
            .get(totals.len() / 2)
            .map_or(0.0, |ns| *ns as f64 / 1e6),
        totals.last().map_or(0.0, |ns| *ns as f64 / 1e6),
    );
}

/// A device host that is to be refused; what it says.
#[track_caller]
pub fn refused(root: &Path, function: &str, change: impl FnOnce(&mut Command)) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cofferdam"));
    command
        .env(ROOT_VARIABLE, root)
        .args(["device", "serve", "other", "--vfio", function]);
    change(&mut command);
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

#[test]
#[ignore = "needs the lab's functions and IOMMU: cargo xtask test runs it in the lab"]
fn a_function_that_cannot_be_served_is_refused_in_a_line_that_says_why() {
    let sysfs = Sysfs::default();
    let address = FUNCTION.parse().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    // An earlier test may have given it away, and one may have loaded the host's driver for it.
    if sysfs.driver(address).unwrap().as_deref() == Some("vfio-pci") {
        sysfs.unbind(address, false).unwrap();
    }
    let text = refused(root, FUNCTION, |_| {});
    assert!(text.contains("cofferdam device bind"), "{text}");
    sysfs.bind(address, true).unwrap();
    for (function, says) in [
        ("0000:00:1e.7", "no PCI function"),
        (WITHOUT_IOMMU, "no IOMMU"),
    ] {
        let text = refused(root, function, |_| {});
        assert!(text.contains(says), "{text}");
    }
    let text = refused(root, FUNCTION, with_little_locked_memory);
    assert!(text.contains("it is 1024 KiB"), "{text}");
    let served = serve(root, &[]);
    let text = refused(root, FUNCTION, |_| {});
    assert!(text.contains("in use"), "{text}");
    assert_eq!(served.status().unwrap().function.as_deref(), Some(FUNCTION));
    drop(served);
    // It is free again at once.
    serve(root, &[]);
}

/// Two guests that have the function by turns, both with their driver up: the one that was parked
/// when it probed, too.
pub struct Pair {
    pub guests: [Guest; 2],
    pub served: DeviceHost,
    folder: tempfile::TempDir,
}

impl Pair {
    /// With more options of the device host and of the guests.
    pub fn new(words: &[&str], more: &str) -> Self {
        let sysfs = Sysfs::default();
        sysfs.bind(FUNCTION.parse().unwrap(), false).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let served = serve(folder.path(), words);
        let mut guests = NAMES.map(|name| guest(folder.path(), name, more));
        assert_eq!(served.status().unwrap().turn.as_deref(), Some(NAMES[0]));
        for (guest, last) in guests.iter_mut().zip([15, 16]) {
            insert_nic(guest, "e1000e", last);
        }
        Self {
            guests,
            served,
            folder,
        }
    }

    /// Gives the turn to a guest, unless it has it.
    #[track_caller]
    pub fn give(&self, index: usize) -> Option<SwitchRecord> {
        let has = self.served.turn().unwrap();
        (has.as_deref() != Some(NAMES[index])).then(|| self.served.give(NAMES[index]).unwrap())
    }

    pub fn context(&self, vm: &str) -> ContextStatus {
        context(&self.served, vm)
    }
}

/// A connection of a guest to an echo, over which something is sent all the time; what was sent and
/// came back is in files.
pub struct Connection {
    marker: String,
}

impl Connection {
    /// Opens it in the turn of its guest.
    #[track_caller]
    pub fn open(guest: &mut Guest, marker: String) -> Self {
        let lines =
            format!("BEGIN {{ for (i = 0; i < 64; i++) printf \"{marker}-%08d-%03d\\n\", n, i }}");
        let script = format!(
            "(n=0; while ! [ -e /tmp/stop ]; do awk -v n=$n '{lines}'; n=$((n+1)); sleep 0.1; done; sleep 10000) 2> /dev/null \
             | tee /tmp/sent | nc {ECHO} 7 > /tmp/back 2> /dev/null &"
        );
        shell(guest, &script);
        let connection = Self { marker };
        connection.moves_on(guest, 0);
        connection
    }

    /// Bytes that came back so far.
    pub fn back(guest: &mut Guest) -> u64 {
        shell(guest, "wc -c < /tmp/back").trim().parse().unwrap()
    }

    /// Waits until more has come back than this.
    #[track_caller]
    pub fn moves_on(&self, guest: &mut Guest, before: u64) {
        let deadline = Instant::now() + SOON;
        while Self::back(guest) <= before {
            assert!(
                Instant::now() < deadline,
                "{} stands still at {before}: {}",
                self.marker,
                shell(
                    guest,
                    "cat /proc/net/tcp /proc/interrupts; ethtool -d eth0; ethtool -S eth0; dmesg | tail -n 20"
                )
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// In a turn of its guest: all that was sent comes back, and is the same. How much that is.
    #[track_caller]
    pub fn close(&self, guest: &mut Guest) -> u64 {
        shell(guest, "touch /tmp/stop");
        let deadline = Instant::now() + SOON;
        loop {
            // It may still write a last piece.
            shell(guest, "sleep 0.3");
            let all = "[ $(wc -c < /tmp/sent) -eq $(wc -c < /tmp/back) ] && echo all; true";
            if shell(guest, all).contains("all") {
                break;
            }
            assert!(
                Instant::now() < deadline,
                "{}: {}",
                self.marker,
                shell(guest, "wc -c /tmp/sent /tmp/back; cat /proc/net/tcp")
            );
        }
        shell(guest, "cmp /tmp/sent /tmp/back");
        Self::back(guest)
    }
}

/// A TCP connection of each guest moves on in each of its turns and all of it arrives; no byte of
/// the one is in the memory of the other.
fn connections_survive(parked: &str, more: &str) {
    let mut pair = Pair::new(&["--parked", parked], more);
    let markers = NAMES.map(|name| format!("{parked}-sent-by-{name}"));
    let (mut connections, mut pings) = (Vec::new(), Vec::new());
    for (index, marker) in markers.iter().enumerate() {
        pair.give(index);
        nic_works(&mut pair.guests[index]);
        connections.push(Connection::open(&mut pair.guests[index], marker.clone()));
        pings.push(Pings::start(&mut pair.guests[index]));
    }
    let (mut records, mut times) = (Vec::new(), Vec::new());
    for number in 0..switches() {
        let index = number % 2;
        let guest = &mut pair.guests[index];
        let before = Connection::back(guest);
        let answered = pings[index].answered(guest);
        let begin = Instant::now();
        records.extend(pair.give(index));
        connections[index].moves_on(&mut pair.guests[index], before);
        times.push(begin.elapsed());
        pings[index].go_on(&mut pair.guests[index], answered);
    }
    for (index, pings) in pings.into_iter().enumerate() {
        pings.end(&mut pair.guests[index], NAMES[index]);
    }
    print_phases(
        &format!("parked link {parked}, {MEMORY_MIB} MiB {more}"),
        &records,
    );
    times.sort_unstable();
    println!(
        "until the connection moved on: median {:?}, largest {:?}",
        times[times.len() / 2],
        times.last()
    );
    let pids = [0, 1].map(|index| pid(&pair.guests[index]));
    for index in [1, 0] {
        pair.give(index);
        let guest = &mut pair.guests[index];
        let bytes = connections[index].close(guest);
        println!("{}: {bytes} bytes", NAMES[index]);
        assert_log_is_healthy(guest, &["Hardware Unit Hang", "PHY reset"]);
        assert_probed_once_and_reset_for_lost_links(guest);
        assert!(
            has(pids[index], markers[index].as_bytes()),
            "what is looked for is found"
        );
        assert!(
            !has(pids[index], markers[1 - index].as_bytes()),
            "frames of {} are in {}",
            NAMES[1 - index],
            NAMES[index]
        );
    }
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn connections_of_two_guests_survive_switches_of_a_real_function() {
    set_large_pages_aside();
    connections_survive("down", "--large-pages");
    if full() {
        connections_survive("stall", "");
    }
}

fn switches() -> usize {
    if full() { 100 } else { 4 }
}

/// Run in the full form of the suite, or by name.
mod long {
    use super::*;

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn a_guest_has_the_hosts_function_behind_a_device_host() {
        let sysfs = Sysfs::default();
        sysfs.bind(FUNCTION.parse().unwrap(), false).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let served = serve(folder.path(), &[]);
        let mut left = guest(folder.path(), "left", "");
        assert_eq!(served.status().unwrap().turn.as_deref(), Some("left"));
        network::insert_slowly(&mut left, "e1000e").unwrap();
        let lease = shell(
            &mut left,
            "ip link set eth0 up; udhcpc -i eth0 -s /etc/udhcpc.script -n -q -t 60 -T 1 2>&1",
        );
        assert!(lease.contains("10.0.2."), "{lease}");
        nic_works(&mut left);
        let mac = shell(&mut left, "cat /sys/class/net/eth0/address");
        let context = context(&served, "left");
        assert_eq!(mac.trim(), context.mac);
        assert_eq!(context.mapped_bytes, Some(context.dma_bytes));
        // Receiver and transmitter have vectors of their own, which come from the host's kernel.
        let interrupts = shell(&mut left, "cat /proc/interrupts");
        let own = interrupts.lines().filter(|line| line.contains("eth0-"));
        assert!(own.clone().count() >= 2, "{interrupts}");
        assert!(own.clone().all(|line| line.contains("MSI")), "{interrupts}");
        // With the pin.
        shell(&mut left, "rmmod e1000e");
        shell(&mut left, "modprobe e1000e IntMode=0");
        let up = "ip link set eth0 up && ip addr add 10.0.2.15/24 dev eth0";
        shell(&mut left, up);
        nic_works(&mut left);
        let interrupts = shell(&mut left, "grep eth0 /proc/interrupts");
        assert!(interrupts.contains("IO-APIC"), "{interrupts}");
        assert_log_is_healthy(&mut left, &["Hardware Unit Hang"]);
    }

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn a_real_function_outlives_the_guests_that_are_killed() {
        let mut pair = Pair::new(&[], "");
        nic_works(&mut pair.guests[0]);
        // The one that is parked: the other one does not notice.
        kill(pid(&pair.guests[1]));
        let gone = || !pair.context(NAMES[1]).connected;
        wait_until("its end", gone);
        nic_works(&mut pair.guests[0]);
        pair.guests[1] = guest(pair.folder.path(), NAMES[1], "");
        insert_nic(&mut pair.guests[1], "e1000e", 16);
        nic_works(&mut pair.guests[0]);
        // The one with the turn: the other one gets it, and the function is nowhere else meanwhile.
        kill(pid(&pair.guests[0]));
        wait_until("the turn", || {
            pair.served.turn().unwrap().as_deref() == Some(NAMES[1])
        });
        nic_works(&mut pair.guests[1]);
        let status = pair.context(NAMES[0]);
        assert_eq!((status.mapped_bytes, status.dma_bytes), (Some(0), 0));
        assert_log_is_healthy(
            &mut pair.guests[1],
            &["Hardware Unit Hang", "Reset adapter"],
        );
    }
}
