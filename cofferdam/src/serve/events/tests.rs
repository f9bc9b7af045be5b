use serde_json::json;

use super::*;
use crate::control::listed::Listed;
use crate::control::protocol::Status;
use crate::device::protocol::HostStatus;
use crate::serve::look::Look;

/// A guest that runs, with an isolated e1000 that failed `aborts` times and was restarted
/// `restarts` times.
pub fn guest(name: &str, aborts: u64, restarts: u64) -> Listed<Status> {
    let entry = isolation::status::EntryStatus {
        name: "e1000_open".to_owned(),
        calls: aborts + 2,
        aborts,
        ..Default::default()
    };
    let module = json!({"module": "e1000", "entries": [entry], "violations": aborts, "warm_pages": 0, "broken": null});
    let mut ladder = recovery::ladder::LadderStatus::default();
    ladder.rungs.restarts = restarts;
    let status = json!({"name": name, "pid": 1, "state": "running", "uptime_ms": 1000, "vmm_rss_kib": 1,
        "guest_rss_kib": 1, "resets": 0, "exits": {"hlt": 12}, "isolation": [module],
        "recovery": {"e1000": ladder}, "nic": {},
        "config": {"kernel": "/k", "memory_mib": 64, "vcpus": 1, "disks": [], "serial": "stdio"}});
    Listed {
        name: name.to_owned(),
        pid: Some(1),
        status: Some(serde_json::from_value(status).unwrap()),
        no_answer: None,
    }
}

/// A device host.
pub fn device(name: &str, turn: Option<&str>, switches: u64) -> Listed<HostStatus> {
    let status = json!({"name": name, "pid": 2, "model": "e1000", "net": "user", "parked": "down", "on_exit": "next",
        "slots": 8, "uptime_ms": 1, "turn": turn, "every_ms": null, "contexts": [], "lost_without_turn": 0,
        "switch_count": switches, "failed_switches": 0, "switches": []});
    Listed {
        name: name.to_owned(),
        pid: Some(2),
        status: Some(serde_json::from_value(status).unwrap()),
        no_answer: None,
    }
}

fn view(guests: Vec<Listed<Status>>, devices: Vec<Listed<HostStatus>>) -> View {
    View::of(&Look { guests, devices })
}

#[test]
fn what_is_different_between_two_looks_is_told() {
    let before = view(
        vec![guest("web", 1, 0), guest("old", 0, 0)],
        vec![device("nic0", Some("web"), 1)],
    );
    assert_eq!(before.since(&before), []);
    let mut web = guest("web", 4, 0);
    let status = web.status.as_mut().unwrap();
    status.guest_panic = Some("Kernel panic".to_owned());
    status.recovery.get_mut("e1000").unwrap().state = recovery::ladder::State::Restarting;
    let after = view(
        vec![web, guest("new", 0, 0)],
        vec![device("nic0", None, 3), device("nic1", None, 0)],
    );
    let events = json!(after.since(&before));
    assert_eq!(
        events,
        json!([
            {"event": "guest_gone", "guest": "old"},
            {"event": "guest_appeared", "guest": "new", "state": "running"},
            {"event": "guest_state", "guest": "web", "state": "panicked", "before": "running"},
            {"event": "violations", "guest": "web", "module": "e1000", "more": 3, "count": 4},
            {"event": "recovery", "guest": "web", "module": "e1000", "state": "restarting"},
            {"event": "turn", "device": "nic0", "turn": null, "before": "web", "switches": 2},
            {"event": "device_appeared", "device": "nic1", "turn": null},
        ])
    );
}

#[test]
fn a_guest_of_the_same_name_is_another_one() {
    let before = view(vec![guest("web", 9, 0)], vec![]);
    let mut other = guest("web", 0, 0);
    other.pid = Some(7);
    let names: Vec<_> = view(vec![other], vec![]).since(&before);
    let names: Vec<_> = names.iter().map(Event::name).collect();
    assert_eq!(names, ["guest_gone", "guest_appeared"]);
}

#[test]
fn what_happens_while_a_guest_does_not_answer_is_told_when_it_does() {
    let before = view(vec![guest("web", 1, 0)], vec![device("nic0", None, 1)]);
    let (mut silent, mut host) = (guest("web", 0, 0), device("nic0", None, 1));
    (silent.status, host.status) = (None, None);
    let mut between = view(vec![silent], vec![host]);
    let events = json!(between.since(&before));
    assert_eq!(events[0]["state"], "no_answer");
    assert_eq!(events.as_array().unwrap().len(), 1);
    between.carry_on(&before);
    let after = view(vec![guest("web", 3, 0)], vec![device("nic0", None, 4)]);
    let events = json!(after.since(&between));
    assert_eq!(events[1]["more"], 2);
    assert_eq!(events[2]["switches"], 3);
}

#[tokio::test]
async fn a_listener_that_is_too_slow_is_told_so_and_gets_nothing_more() {
    let watch = Watching::new(RuntimeRoot::new("/nowhere"));
    let (first, events, is_first) = watch.begin(View::default());
    assert!(is_first);
    let mut listener = Listener::new(first, events);
    for count in 0..=MAX_BEHIND as u64 {
        assert!(watch.saw(view(vec![guest("web", count, 0)], vec![])));
    }
    assert_eq!(listener.next().await.unwrap().name(), "now");
    assert_eq!(listener.next().await.unwrap().name(), "dropped");
    assert!(listener.next().await.is_none());
    drop(listener);
    assert!(!watch.saw(View::default()), "nobody listens any more");
    assert!(watch.listen().is_none());
}

#[tokio::test]
async fn a_listener_that_reads_has_all_of_a_look_however_much_it_is() {
    let many = |aborts| {
        let guests = (0..2000).map(|number| guest(&format!("g{number}"), aborts, 0));
        view(guests.collect(), vec![])
    };
    let watch = Watching::new(RuntimeRoot::new("/nowhere"));
    let (first, changes, _) = watch.begin(many(0));
    let mut listener = Listener::new(first, changes);
    assert_eq!(listener.next().await.unwrap().name(), "now");
    for round in 1..=3 {
        assert!(watch.saw(many(round)));
        for _ in 0..2000 {
            assert_eq!(listener.next().await.unwrap().name(), "violations");
        }
    }
}
