//! NICs that are disturbed, of a VM whose guest does not care.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::place::{Place, end};

fn listed(place: &Place) -> Vec<serde_json::Value> {
    serde_json::from_str(&place.ask("disturb idle --list --json")).unwrap()
}

#[test]
fn disturbances_are_told_by_nic_and_end_one_by_one_or_all_together() {
    let place = Place::new();
    let vm = place.idle("--net user --net user,nic=virtio");
    assert_eq!(
        place.ask("disturb idle --list"),
        "nothing is disturbed\n".to_owned()
    );
    place.ask_refused("disturb idle --kind removed", "0000:00:03.0");
    let text = place.ask("disturb idle 0 --kind load_ones --range 0x8..0xc --when nth=3");
    assert_eq!(
        text,
        "0000:00:02.0: 1: load_ones at 0x8..0xc every 3rd time; it has struck 0 times, 0 matched\n"
    );
    place.ask("disturb idle 0000:00:03.0 --kind interrupt_lost --when p=0.5 --seed 3");
    place.ask("disturb idle 1 --kind link_flap");
    let all = listed(&place);
    let names: Vec<_> = all
        .iter()
        .map(|one| {
            (
                one["nic"].as_str().unwrap(),
                one["number"].as_u64().unwrap(),
            )
        })
        .collect();
    assert_eq!(
        names,
        [
            ("0000:00:02.0", 1),
            ("0000:00:03.0", 1),
            ("0000:00:03.0", 2)
        ]
    );
    assert_eq!(
        place.ask("disturb idle 1 --list").lines().count(),
        2,
        "those of one NIC"
    );
    assert_eq!(all[1]["order"]["when"]["chance"], 500_000);
    // A reset of the guest leaves them.
    place.ask("reset idle");
    place.wait_for("idle");
    assert_eq!(listed(&place).len(), 3);
    place.ask_refused("disturb idle 1 --undo=7", "no disturbance 7");
    place.ask_refused("disturb idle 2 --kind removed", "no NIC 2");
    assert!(place.ask("disturb idle 1 --undo=2").contains("link_flap"));
    assert_eq!(listed(&place).len(), 2);
    place.ask("disturb idle --undo");
    assert_eq!(place.ask("disturb idle --undo"), "nothing was disturbed\n");
    end(&place, vm, &[]);
}
