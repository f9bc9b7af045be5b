//! A stock guest that is saved with a NIC of a device host, and goes on with it; or is rewound to
//! marks.

use std::path::Path;

use cofferdam::bench::device_host::{DeviceHost, NAME};
use cofferdam::bench::guest::Guest;
use cofferdam::control::protocol::{Reply, Request};

use devices::vfio::binding::Sysfs;

use super::isolation::{ask, ask_json};
use super::passed::{ECHO, FUNCTION};
use super::{
    BOOT_TIME, GATEWAY, Pings, assert_log_is_healthy, assert_probed_once_and_reset_for_lost_links,
    boot, insert_nic, nic_works, options, shell, wait_until,
};
use crate::full;

const GUEST: &str = "left";

/// Saves the guest, and says how long it stood still.
#[track_caller]
fn save(guest: &mut Guest, dir: &Path, stop: bool) {
    guest.agent().disconnect();
    let request = Request::Snapshot {
        dir: dir.to_owned(),
        parent: None,
        track: false,
        stop,
    };
    match guest.control().unwrap().ask(&request) {
        Ok(Reply::Snapshot(taken)) => eprintln!("{taken:?}"),
        other => panic!("{other:?}{}", guest.last_words()),
    }
}

/// Numbered lines that go to `echo` over one TCP connection and come back, twenty a second, in a
/// session of their own: the agent ends programs whose client goes.
fn begin_lines(guest: &mut Guest, echo: &str) {
    let lines = "n=0; while [ ! -e /tmp/enough ]; do n=$((n+1)); echo line $n of a stream; sleep 0.05; done";
    let script = format!(
        "echo '{lines}' > /tmp/lines.sh; \
         setsid sh -c 'sh /tmp/lines.sh | tee /tmp/sent | nc {echo} 7 > /tmp/back' < /dev/null > /dev/null 2>&1 &"
    );
    shell(guest, &script);
    lines_move_on(guest);
}

/// So many have come back.
#[track_caller]
fn lines(guest: &mut Guest) -> u64 {
    let count = shell(guest, "wc -l < /tmp/back 2> /dev/null || echo 0");
    count.trim().parse().unwrap()
}

/// More come back.
#[track_caller]
fn lines_move_on(guest: &mut Guest) {
    let before = lines(guest);
    wait_until("more lines", || lines(guest) > before + 5);
}

/// Ends them. What came back is what was sent, in its order.
#[track_caller]
fn end_lines(guest: &mut Guest) {
    shell(guest, "touch /tmp/enough");
    wait_until("the last line", || {
        let same = "cmp -s /tmp/sent /tmp/back && echo same || true";
        shell(guest, same).trim() == "same"
    });
}

/// Of a checked TCP stream and pings neither the guest nor the far end notices more than a pause.
fn goes_on_across_snapshots(words: &[&str], driver: &str, (echo, faults): (&str, &[&str])) {
    let folder = tempfile::tempdir().unwrap();
    let options = options().among(folder.path(), GUEST);
    let host = DeviceHost::start(&options.program, folder.path(), words).unwrap();
    let mut guest = boot(
        &options
            .clone()
            .with(&format!("--nic device={NAME} --memory 256M")),
    );
    insert_nic(&mut guest, driver, 15);
    nic_works(&mut guest);
    begin_lines(&mut guest, echo);
    let pings = Pings::start(&mut guest);
    let rounds = if full() { 20 } else { 3 };
    for round in 0..rounds {
        // While it goes on.
        let live = folder.path().join(format!("live-{round}"));
        save(&mut guest, &live, false);
        std::fs::remove_dir_all(live).unwrap();
        lines_move_on(&mut guest);
        let dir = folder.path().join(format!("saved-{round}"));
        save(&mut guest, &dir, true);
        let status = guest.wait_for_end(BOOT_TIME).unwrap();
        assert!(status.success(), "{status}{}", guest.last_words());
        drop(guest);
        guest = boot(&options.clone().from_snapshot(&dir));
        std::fs::remove_dir_all(dir).unwrap();
        lines_move_on(&mut guest);
        let answered = pings.answered(&mut guest);
        pings.go_on(&mut guest, answered);
        let status = host.status().unwrap();
        assert_eq!(status.turn.as_deref(), Some(GUEST));
        assert_eq!(status.contexts.len(), 1);
        assert_eq!(status.contexts[0].attached, round + 2);
    }
    end_lines(&mut guest);
    pings.end(&mut guest, GUEST);
    assert_log_is_healthy(&mut guest, faults);
    assert_probed_once_and_reset_for_lost_links(&mut guest);
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_stream_of_a_stock_guest_goes_on_across_snapshots_of_it_with_a_nic_of_a_device_host() {
    let words = ["--model", "e1000", "--net", "user"];
    let faults = ["Tx Unit Hang", "Reset adapter"];
    goes_on_across_snapshots(&words, "e1000", (GATEWAY, &faults));
}

/// The same with the lab's e1000e: its registers are in the snapshot.
#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_stream_of_a_stock_guest_goes_on_across_snapshots_of_it_with_a_real_function_of_a_device_host()
{
    let sysfs = Sysfs::default();
    sysfs.bind(FUNCTION.parse().unwrap(), false).unwrap();
    let faults = ["Hardware Unit Hang", "Reset adapter", "PHY reset"];
    goes_on_across_snapshots(&["--vfio", FUNCTION], "e1000e", (ECHO, &faults));
}

#[track_caller]
fn mark(guest: &mut Guest, name: &str) {
    let name = name.to_owned();
    match guest.control().unwrap().ask(&Request::Mark { name }) {
        Ok(Reply::Marked(_)) => {}
        other => panic!("{other:?}{}", guest.last_words()),
    }
}

/// Takes the guest back; the agent's channel begins anew.
#[track_caller]
fn rewind(guest: &mut Guest, name: &str) {
    guest.agent().disconnect();
    let name = Some(name.to_owned());
    match guest.control().unwrap().ask(&Request::Rewind { name }) {
        Ok(Reply::Rewound(rewound)) => eprintln!("{rewound:?}"),
        other => panic!("{other:?}{}", guest.last_words()),
    }
}

/// A guest that is taken back again and again, from whatever became of it and its NIC's driver, has a
/// NIC that works each time. What is isolated at the second mark is what `isolated` says.
fn goes_back_to_marks(words: &[&str], driver: &str, isolated: Option<&str>) {
    let folder = tempfile::tempdir().unwrap();
    let options = options().among(folder.path(), GUEST);
    let host = DeviceHost::start(&options.program, folder.path(), words).unwrap();
    let mut guest = boot(&options.with(&format!("--nic device={NAME} --memory 256M")));
    insert_nic(&mut guest, driver, 15);
    nic_works(&mut guest);
    mark(&mut guest, "works");
    shell(&mut guest, "echo one > /tmp/x");
    if let Some(entries) = isolated {
        ask(&mut guest, &format!("isolate {GUEST} {driver} {entries}"));
        nic_works(&mut guest);
    }
    mark(&mut guest, "isolated");
    let breaks = ["true", "ip link set eth0 down", &format!("rmmod {driver}")];
    for round in 0..if full() { 60 } else { 3 } {
        shell(&mut guest, "echo two > /tmp/x");
        shell(&mut guest, breaks[round % 3]);
        rewind(&mut guest, "isolated");
        assert_eq!(shell(&mut guest, "cat /tmp/x"), "one\n", "round {round}");
        nic_works(&mut guest);
        let modules = ask_json(&mut guest, &format!("status {GUEST}"))["isolation"].clone();
        let count = modules.as_array().map_or(0, Vec::len);
        assert_eq!(count, usize::from(isolated.is_some()), "round {round}");
    }
    rewind(&mut guest, "works");
    shell(&mut guest, "! cat /tmp/x");
    nic_works(&mut guest);
    assert_eq!(host.status().unwrap().turn.as_deref(), Some(GUEST));
    assert_log_is_healthy(&mut guest, &["Unit Hang", "Reset adapter"]);
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_stock_guest_goes_back_to_its_marks_with_a_nic_of_a_device_host() {
    let entries = "--entry e1000_xmit_frame --entry e1000_clean --budget-us 10000000";
    let words = ["--model", "e1000", "--net", "user"];
    goes_back_to_marks(&words, "e1000", Some(entries));
}

/// The same with the lab's e1000e.
#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_stock_guest_goes_back_to_its_marks_with_a_real_function_of_a_device_host() {
    let sysfs = Sysfs::default();
    sysfs.bind(FUNCTION.parse().unwrap(), false).unwrap();
    goes_back_to_marks(&["--vfio", FUNCTION], "e1000e", None);
}
