//! The command line of device hosts: what is said and refused.

use serde_json::Value;

use crate::common::place::{Place, finish, signal};
use crate::guest::Guest;
use crate::host::Host;

/// A command that must fail with one line that says this.
#[track_caller]
fn refused(place: &Place, words: &str, says: &str) {
    let output = finish(place.command().args(words.split(' ')).spawn().unwrap());
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{words}");
    assert!(error.contains(says), "{words}: {error}");
    assert_eq!(error.lines().count(), 1, "{words}: {error}");
}

#[test]
#[expect(
    clippy::too_many_lines,
    reason = "one story: each step begins where the last ended"
)]
fn device_hosts_are_listed_shown_switched_and_stopped() {
    let place = Place::new();
    assert_eq!(place.ask("device list --json").trim(), "[]");
    refused(&place, "device status nic", "no device host named \"nic\"");
    refused(
        &place,
        "switch nic --to left",
        "no device host named \"nic\"",
    );
    refused(
        &place,
        "device serve nic --net tap=cofnone",
        "there is no TAP cofnone",
    );
    refused(
        &place,
        "device serve nic --net user --slots 0",
        "0 is not in 1..=64",
    );
    refused(
        &place,
        "device serve nic --net user --model ne2k",
        "e1000, virtio",
    );
    refused(&place, "device serve nic", "--net");
    refused(
        &place,
        "device serve nic --vfio 0000:ff:1f.7",
        "there is no PCI function 0000:ff:1f.7",
    );
    refused(
        &place,
        "device serve nic --vfio 0000:ff:1f.7 --net user",
        "cannot be used with",
    );
    refused(&place, "device serve nic --vfio nic", "is no PCI address");
    let mut host = Host::start(&place, "");
    refused(
        &place,
        "device serve nic --net user",
        "a device host named \"nic\" is running",
    );
    refused(&place, "switch nic --to left", "nor is any other");
    let _left = Guest::boot(&place, "left", 1);
    let _right = Guest::boot(&place, "right", 2);
    refused(&place, "switch nic --to nobody", "left, right are");
    refused(&place, "switch nic --to left", "left has the turn already");
    refused(
        &place,
        "switch nic --to left --every 1s",
        "cannot be used with",
    );
    refused(&place, "switch nic", "--to");
    let said = place.ask("switch nic --to right");
    assert!(
        said.starts_with("2: left to right (asked for) in "),
        "{said}"
    );
    let record: Value = serde_json::from_str(&place.ask("switch nic --to left --json")).unwrap();
    assert_eq!(
        (&record["outcome"], &record["to"]),
        (&"switched".into(), &"left".into())
    );
    assert!(record["phases"]["quiesce_ns"].is_u64());
    let said = place.ask("switch nic --every 3000s");
    assert_eq!(said, "passed on every 3000000 ms; left has the turn\n");
    assert_eq!(place.ask("switch nic --hold"), "left keeps the turn\n");
    let status: Value = serde_json::from_str(&place.ask("device status nic --json")).unwrap();
    assert_eq!(status["turn"], "left");
    assert_eq!(status["contexts"][0]["mac"], "02:00:00:00:00:01");
    let shown = place.ask("device status nic");
    for word in [
        "left",
        "right",
        "parked",
        "has the turn",
        "16 MiB",
        "asked for",
    ] {
        assert!(shown.contains(word), "{shown}");
    }
    let listed = place.ask("device list");
    assert!(
        listed.contains("nic") && listed.contains("left"),
        "{listed}"
    );
    let listed: Value = serde_json::from_str(&place.ask("device list --json")).unwrap();
    let [only] = listed.as_array().unwrap().as_slice() else {
        panic!("{listed}");
    };
    assert_eq!(
        (
            &only["name"],
            &only["status"]["turn"],
            &only["status"]["model"]
        ),
        (&"nic".into(), &"left".into(), &"e1000".into()),
        "{listed}"
    );
    assert_eq!(only["pid"], host.child.id(), "{listed}");
    // No VM of that name, and none in the list of VMs.
    assert!(!place.ask("list").contains("nic"));
    signal(&host.child, libc::SIGTERM);
    host.child.wait().unwrap();
    let left: Vec<_> = std::fs::read_dir(place.path("run/.devices"))
        .unwrap()
        .collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(!place.path("wire").exists());
}
