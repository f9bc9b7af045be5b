//! NICs that are plugged into a VM whose guest does not care.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::place::{Place, end};

fn nics(place: &Place) -> Vec<String> {
    let nics = place.status()["nics"].clone();
    let nics = nics.as_array().unwrap().iter();
    nics.map(|nic| {
        format!(
            "{} {}",
            nic["address"].as_str().unwrap(),
            nic["wire"].as_str().unwrap()
        )
    })
    .collect()
}

#[test]
fn a_nic_comes_and_is_shown_and_only_one_that_came_can_go() {
    let place = Place::new();
    let vm = place.idle("--net user");
    let cable = place.path("cable").display().to_string();
    let text = place.ask(&format!("plug idle --net unix={cable},listen,nic=virtio"));
    assert_eq!(
        text,
        format!("0000:00:03.0: virtio on unix={cable},listen\n")
    );
    let text = place.ask("plug idle --net user");
    assert_eq!(text, "0000:00:04.0: e1000 on user\n");
    assert_eq!(
        nics(&place),
        [
            "0000:00:02.0 user".to_owned(),
            format!("0000:00:03.0 unix={cable},listen"),
            "0000:00:04.0 user".to_owned(),
        ]
    );
    for (words, says) in [
        (
            "plug idle --net user,mac=02:cf:00:00:00:09 --nic e1000",
            "--nic",
        ),
        ("plug idle --nic e1000", "needs a wire"),
        ("plug idle --net tap=nobody7", "nobody7"),
        ("unplug idle 0000:00:02.0", "stays"),
        ("unplug idle 0000:00:1f.0", "0000:00:04.0"),
        ("unplug idle somewhere", "PCI address"),
        ("snapshot idle here", "unplug"),
    ] {
        place.ask_refused(words, says);
    }
    end(&place, vm, &[]);
}

#[test]
fn no_more_are_plugged_in_than_a_vm_can_have() {
    let place = Place::new();
    let vm = place.idle("");
    for _ in 0..8 {
        place.ask("plug idle --net user");
    }
    place.ask_refused("plug idle --net user", "at most 8");
    assert_eq!(nics(&place).len(), 8);
    end(&place, vm, &[]);
}
