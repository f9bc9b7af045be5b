//! A stock guest that is saved with a NIC of a device host, and goes on with it.

use std::path::Path;

use agent_protocol::traffic::TrafficResult;
use cofferdam::bench::device_host::{DeviceHost, NAME};
use cofferdam::bench::guest::Guest;
use cofferdam::control::protocol::{Reply, Request};

use super::{
    BOOT_TIME, Pings, assert_log_is_healthy, assert_probed_once_and_reset_for_lost_links, boot,
    insert_nic, nic_works, options, streaming,
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

/// Of a checked TCP stream and pings neither the guest nor the far end notices more than a pause.
#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_stream_of_a_stock_guest_goes_on_across_snapshots_of_it_with_a_nic_of_a_device_host() {
    let folder = tempfile::tempdir().unwrap();
    let options = options().among(folder.path(), GUEST);
    let words = ["--model", "e1000", "--net", "user"];
    let host = DeviceHost::start(&options.program, folder.path(), &words).unwrap();
    let mut guest = boot(&options.clone().with(&format!("--nic device={NAME}")));
    insert_nic(&mut guest, "e1000", 15);
    nic_works(&mut guest);
    streaming::begin(&mut guest);
    let pings = Pings::start(&mut guest);
    let rounds = if full() { 20 } else { 3 };
    for round in 0..rounds {
        // While it goes on.
        let live = folder.path().join(format!("live-{round}"));
        save(&mut guest, &live, false);
        std::fs::remove_dir_all(live).unwrap();
        streaming::moves_on(&mut guest);
        let dir = folder.path().join(format!("saved-{round}"));
        save(&mut guest, &dir, true);
        let status = guest.wait_for_end(BOOT_TIME).unwrap();
        assert!(status.success(), "{status}{}", guest.last_words());
        drop(guest);
        guest = boot(&options.clone().from_snapshot(&dir));
        std::fs::remove_dir_all(dir).unwrap();
        streaming::is_under_way(&mut guest);
        streaming::moves_on(&mut guest);
        let answered = pings.answered(&mut guest);
        pings.go_on(&mut guest, answered);
        let status = host.status().unwrap();
        assert_eq!(status.turn.as_deref(), Some(GUEST));
        assert_eq!(status.contexts.len(), 1);
        assert_eq!(status.contexts[0].attached, round + 2);
    }
    let stream: TrafficResult = streaming::end(&mut guest);
    assert!(stream.bytes_to_peer > 0);
    pings.end(&mut guest, GUEST);
    assert_log_is_healthy(&mut guest, &["Tx Unit Hang", "Reset adapter"]);
    assert_probed_once_and_reset_for_lost_links(&mut guest);
}
