//! Guests that are put away and had back: marks and rewinds in one process, snapshots and restores
//! in others.
//!
//! `COFFERDAM_FULL=1` takes twenty snapshots under traffic and rewinds a thousand times.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use agent_protocol::clock::ClockResult;
use cofferdam::bench::clones;
use cofferdam::bench::guest::Guest;
use cofferdam::bench::network::{self, DRIVER, LINK_TIME};
use cofferdam::control::protocol::{Reply, Request};
use devices::hold::CheckpointBy;
use isolation::attach::plan::Wanted;
use isolation::attach::request::Contain;
use recovery::ladder::LadderConfig;
use recovery::request::Spilling;
use vmm::Rewound;
use vmm::snapshot::Taken;

use super::{BOOT_TIME, assert_log_is_healthy, boot, options, ping, shell, streaming};
use crate::full;

/// Most memory of a clone's process beyond its guest's, in KiB: 5 MiB, and more than as much again
/// for a program that is not optimised.
const REST_KIB: f64 = 12.0 * 1024.0;

#[track_caller]
fn ask(guest: &Guest, request: &Request) -> Reply {
    let mut control = guest.control().unwrap();
    control
        .ask(request)
        .unwrap_or_else(|error| panic!("{error:#}{}", guest.last_words()))
}

#[track_caller]
fn snapshot(guest: &Guest, dir: &Path, parent: Option<&Path>, stop: bool) -> Taken {
    let request = Request::Snapshot {
        dir: dir.to_owned(),
        parent: parent.map(Path::to_owned),
        track: true,
        stop,
    };
    match ask(guest, &request) {
        Reply::Snapshot(taken) => taken,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn mark(guest: &Guest, name: &str) {
    let name = name.to_owned();
    match ask(guest, &Request::Mark { name }) {
        Reply::Marked(_) => {}
        other => panic!("{other:?}"),
    }
}

/// Takes the guest back; the agent's channel begins anew.
#[track_caller]
fn rewind(guest: &mut Guest, name: &str) -> Rewound {
    guest.agent().disconnect();
    let name = Some(name.to_owned());
    match ask(guest, &Request::Rewind { name }) {
        Reply::Rewound(rewound) => rewound,
        other => panic!("{other:?}"),
    }
}

/// A guest that goes on from `dir`, with more options of `run`.
#[track_caller]
fn go_on(dir: &Path, arguments: &str) -> Guest {
    let options = options().from_snapshot(dir).with(arguments);
    let mut guest = Guest::boot(&options, BOOT_TIME).unwrap_or_else(|error| panic!("{error:#}"));
    // The VM has something to tell its guest, too, and the agent listens to one client at a time.
    guest.agent().disconnect();
    guest
}

fn networked(arguments: &str) -> Guest {
    let mut guest = boot(&options().with("--net user --nic e1000").with(arguments));
    network::bring_up(&mut guest, DRIVER).unwrap();
    network::wait_for_link(&mut guest, LINK_TIME).unwrap();
    ping(&mut guest, "10.0.2.2", 1000);
    guest
}

fn isolate(guest: &mut Guest) {
    // The VM asks the agent itself, which listens to one client at a time.
    guest.agent().disconnect();
    let request = Request::Isolate {
        module: DRIVER.to_owned(),
        entries: Wanted::Named(vec![
            "e1000_xmit_frame".to_owned(),
            "e1000_clean".to_owned(),
        ]),
        budget_us: None,
        device_checkpoint: CheckpointBy::Exact,
        recovery: LadderConfig::default(),
        spilling: Spilling::default(),
        contain: Contain::Full,
        keep_faults: None,
    };
    match ask(guest, &request) {
        Reply::Isolated(_) => {}
        other => panic!("{other:?}"),
    }
}

/// Functions of the driver that are isolated.
fn isolated(guest: &Guest) -> usize {
    let status = guest.control().unwrap().status().unwrap();
    status
        .isolation
        .iter()
        .map(|module| module.entries.len())
        .sum()
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_guest_goes_back_to_its_marks_with_and_without_isolation() {
    let mut guest = networked("");
    mark(&guest, "booted");
    shell(&mut guest, "echo one > /tmp/x");
    isolate(&mut guest);
    ping(&mut guest, "10.0.2.2", 1000);
    mark(&guest, "isolated");
    let rounds = if full() { 1000 } else { 10 };
    let mut rewound = None;
    for round in 0..rounds {
        shell(&mut guest, &format!("echo {round} > /tmp/x"));
        if round % 5 == 0 {
            ping(&mut guest, "10.0.2.2", 1000);
        }
        rewound = Some(rewind(&mut guest, "isolated"));
        assert_eq!(shell(&mut guest, "cat /tmp/x"), "one\n", "round {round}");
        assert_eq!(isolated(&guest), 2, "round {round}");
    }
    eprintln!("the last rewind: {rewound:?}");
    rewind(&mut guest, "booted");
    assert_eq!(isolated(&guest), 0);
    shell(&mut guest, "! cat /tmp/x");
    ping(&mut guest, "10.0.2.2", 1000);
    rewind(&mut guest, "isolated");
    assert_eq!(isolated(&guest), 2);
    ping(&mut guest, "10.0.2.2", 1000);
    assert_log_is_healthy(&mut guest, &[]);
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_checked_stream_goes_on_across_snapshots_and_into_another_process() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = networked("");
    isolate(&mut guest);
    streaming::begin(&mut guest);
    let snapshots = if full() { 20 } else { 4 };
    let mut dirs: Vec<PathBuf> = Vec::new();
    for number in 0..snapshots {
        let dir = folder.path().join(number.to_string());
        let stop = number + 1 == snapshots;
        // It is taken amid the stream, or nothing is shown.
        streaming::is_under_way(&mut guest);
        streaming::moves_on(&mut guest);
        guest.agent().disconnect();
        let taken = snapshot(&guest, &dir, dirs.last().map(PathBuf::as_path), stop);
        eprintln!("{taken:?}");
        assert_eq!(taken.diff, number > 0);
        dirs.push(dir);
    }
    assert!(guest.wait_for_end(BOOT_TIME).unwrap().success());
    drop(guest);
    let mut guest = go_on(&dirs[snapshots - 1], "");
    // What came from the other end before the last snapshot is not all that comes.
    streaming::is_under_way(&mut guest);
    streaming::moves_on(&mut guest);
    streaming::end(&mut guest);
    // Isolated as it was, by the process that goes on.
    guest.agent().disconnect();
    let deadline = Instant::now() + BOOT_TIME;
    while isolated(&guest) != 2 {
        assert!(Instant::now() < deadline, "{}", guest.last_words());
        std::thread::sleep(Duration::from_millis(100));
    }
    ping(&mut guest, "10.0.2.2", 1000);
    assert_log_is_healthy(&mut guest, &[]);
    drop(guest);
    // The first is as good as on its day, and need not be read before the guest goes on.
    let mut guest = go_on(&dirs[0], "--lazy");
    ping(&mut guest, "10.0.2.2", 1000);
    assert_log_is_healthy(&mut guest, &[]);
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn clones_share_their_memory_and_reach_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, link) = (folder.path().join("s"), folder.path().join("link"));
    let mut guest = networked("");
    // What the template drew before, its clones may not draw again.
    let drawn = "head -c 16 /dev/urandom | od -An -tx1";
    shell(&mut guest, drawn);
    snapshot(&guest, &dir, None, true);
    assert!(guest.wait_for_end(BOOT_TIME).unwrap().success());
    drop(guest);
    let link = link.display();
    let mut first = go_on(
        &dir,
        &format!("--lazy --net unix={link},listen,mac=02:00:00:00:00:01"),
    );
    let mut second = go_on(
        &dir,
        &format!("--lazy --net unix={link},mac=02:00:00:00:00:02"),
    );
    assert_ne!(shell(&mut first, drawn), shell(&mut second, drawn));
    for clone in [&mut first, &mut second] {
        // Told by the generation ID, and not for another reason.
        let said = "crng reseeded due to virtual machine fork";
        let wait = format!(
            "for t in $(seq 1 200); do dmesg | grep -q '{said}' && exit 0; sleep 0.05; done; exit 1"
        );
        shell(clone, &wait);
        let log = shell(clone, "dmesg");
        assert_eq!(log.matches(said).count(), 1, "{log}");
    }
    first.agent().disconnect();
    second.agent().disconnect();
    for (number, clone) in [(1, &mut first), (2, &mut second)] {
        let mac = format!("02:00:00:00:00:0{number}");
        let deadline = Instant::now() + BOOT_TIME;
        while shell(clone, "cat /sys/class/net/eth0/address").trim() != mac {
            assert!(Instant::now() < deadline, "{}", clone.last_words());
            clone.agent().disconnect();
            std::thread::sleep(Duration::from_millis(100));
        }
        let replace = format!("ip addr flush dev eth0; ip addr add 10.9.0.{number}/24 dev eth0");
        shell(clone, &replace);
        network::wait_for_link(clone, LINK_TIME).unwrap();
    }
    ping(&mut first, "10.9.0.2", 1000);
    ping(&mut second, "10.9.0.1", 1000);
    let own = |clone: &Guest| clone.control().unwrap().status().unwrap().guest_rss_kib;
    eprintln!(
        "guest memory resident, KiB: {} and {}",
        own(&first),
        own(&second)
    );
    // One of them has its driver isolated, which takes memory of its own; the other notices
    // nothing.
    isolate(&mut first);
    ping(&mut first, "10.9.0.2", 1000);
    ping(&mut second, "10.9.0.1", 1000);
    assert_log_is_healthy(&mut first, &[]);
    assert_log_is_healthy(&mut second, &[]);
}

/// Seconds since the guest booted.
fn uptime(guest: &mut Guest) -> f64 {
    let text = shell(guest, "cat /proc/uptime");
    text.split(' ').next().unwrap().parse().unwrap()
}

/// The host's clock, in seconds since 1970.
fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

/// Run in the full form of the suite, or by name.
mod long {
    use super::*;

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn four_processors_and_their_clocks_go_on_in_another_process() {
        const WATCH: &str = "setsid sh -c 'last=0; while :; do read now _ < /proc/uptime; now=${now%.*}${now#*.}; \
         [ $now -ge $last ] || echo $now after $last >> /tmp/backwards; last=$now; done' \
         < /dev/null > /dev/null 2>&1 &";
        const CLOCK: &str = "setsid sh -c '/init clock /tmp/clock-ends > /tmp/clock 2>&1; \
         mv /tmp/clock /tmp/clock-seen' < /dev/null > /dev/null 2>&1 &";
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("s");
        let mut guest = networked("--vcpus 4");
        for _ in 0..2 {
            shell(&mut guest, WATCH);
        }
        shell(&mut guest, CLOCK);
        let before = uptime(&mut guest);
        shell(&mut guest, "sleep 1");
        snapshot(&guest, &dir, None, true);
        assert!(guest.wait_for_end(BOOT_TIME).unwrap().success());
        drop(guest);
        // Time in which the guest is nowhere.
        std::thread::sleep(Duration::from_secs(5));
        let mut guest = go_on(&dir, "");
        assert_eq!(shell(&mut guest, "nproc").trim(), "4");
        let after = uptime(&mut guest);
        assert!(after >= before, "{after} after {before}");
        // The real time is the host's again, soon, but for the time that the word of it takes.
        let deadline = Instant::now() + BOOT_TIME;
        loop {
            let earlier = now();
            let guests: u64 = shell(&mut guest, "date +%s").trim().parse().unwrap();
            if (earlier.saturating_sub(4)..=now() + 1).contains(&guests) {
                break;
            }
            assert!(Instant::now() < deadline, "{guests} instead of {earlier}");
            guest.agent().disconnect();
            std::thread::sleep(Duration::from_millis(100));
        }
        // Timers fire on each processor.
        for processor in 0..4 {
            shell(&mut guest, &format!("taskset {} sleep 0.2", 1 << processor));
        }
        mark(&guest, "here");
        for _ in 0..3 {
            rewind(&mut guest, "here");
            shell(&mut guest, "sleep 0.1");
            ping(&mut guest, "10.0.2.2", 1000);
        }
        shell(&mut guest, "! cat /tmp/backwards");
        // The clock that programs read, on all processors and from before the snapshot on.
        shell(&mut guest, "touch /tmp/clock-ends");
        let deadline = Instant::now() + BOOT_TIME;
        let seen = loop {
            let seen = shell(&mut guest, "cat /tmp/clock-seen 2> /dev/null; true");
            if !seen.is_empty() {
                break seen;
            }
            assert!(Instant::now() < deadline, "the clock is still looked at");
            std::thread::sleep(Duration::from_millis(200));
        };
        let seen: ClockResult = serde_json::from_str(seen.trim()).unwrap();
        eprintln!("{seen:?}");
        assert_eq!(seen.reads.len(), 4);
        assert!(seen.reads.iter().all(|reads| *reads > 0), "{seen:?}");
        assert_eq!((seen.backwards, seen.worst_ns), (0, 0), "{seen:?}");
        // Those seconds in which the guest was nowhere are not in it.
        let elapsed = Duration::from_nanos(seen.last_ns - seen.first_ns);
        assert!(elapsed > Duration::from_secs(1), "{elapsed:?}");
        assert_log_is_healthy(&mut guest, &[]);
    }

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn clones_cost_what_they_change_and_isolated_ones_what_they_touch() {
        const CLONES: usize = 4;
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("s");
        let guest = networked("");
        snapshot(&guest, &dir, None, true);
        drop(guest);
        let boots = options().with("--net user --nic e1000");
        let [plain, isolated] = [false, true].map(|isolated| {
            let clones = clones::measure(&boots, &dir, CLONES, isolated).unwrap();
            eprintln!("{}", clones.sentence());
            clones
        });
        for clones in [plain, isolated] {
            assert_eq!(clones.guest_kib.n, CLONES as u64);
            // Shared by all, and no more of it than there is.
            assert!(clones.base_kib <= clones.stored_kib, "{clones:?}");
            // None has a copy of all of the snapshot.
            assert!(
                clones.guest_kib.max < clones.stored_kib as f64 * 0.6,
                "{clones:?}"
            );
        }
        assert!(
            plain.guest_kib.max < plain.stored_kib as f64 * 0.3,
            "{plain:?}"
        );
        assert!(plain.rest_kib.max < REST_KIB, "{plain:?}");
    }
}
