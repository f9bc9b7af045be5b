//! What listeners are told.

use crate::client::{Listener, Service};
use crate::common::place::{Place, end, finish, signal};
use crate::scripted::script;

#[test]
fn every_listener_is_told_what_changes() {
    let place = Place::new();
    let service = Service::start(&place, "");
    let vm = place.idle("");
    let mut listeners: Vec<_> = (0..200).map(|_| Listener::new(&service)).collect();
    for listener in &mut listeners {
        let now = listener.next();
        assert_eq!(
            (&now["event"], &now["guests"]["idle"]),
            (&"now".into(), &"running".into())
        );
    }
    service.ask("POST", "/v1/guests/idle/pause", None).ok(204);
    for listener in &mut listeners {
        let event = listener.next();
        assert_eq!(event["event"], "guest_state");
        assert_eq!(
            (&event["state"], &event["before"]),
            (&"paused".into(), &"running".into())
        );
    }
    listeners.truncate(1);
    let other = place.start("other", &place.idle_kernel(), "");
    assert_eq!(listeners[0].until("guest_appeared")["guest"], "other");
    signal(&other, libc::SIGSTOP);
    assert_eq!(listeners[0].until("guest_state")["state"], "no_answer");
    signal(&other, libc::SIGCONT);
    assert_eq!(listeners[0].until("guest_state")["state"], "running");
    signal(&other, libc::SIGTERM);
    finish(other);
    assert_eq!(listeners[0].until("guest_gone")["guest"], "other");
    drop(listeners);
    service.end();
    end(&place, vm, &[]);
}

/// Modules of a guest that all fail at once: as many events at one look, each of more than 300
/// bytes.
const MODULES: usize = 300;

/// Looks at which they have failed anew: more than a socket and a connection hold, and what a
/// listener may be behind.
const FAILURES: usize = 20;

#[test]
fn a_listener_that_is_too_slow_is_told_so_and_the_others_miss_nothing() {
    let place = Place::new();
    // It is not to be given up before, as one that takes nothing at all.
    let service = Service::start(&place, "--client-time 3600");
    let (_dir, script) = script(&place);
    script.have_modules(MODULES);
    let mut fast = Listener::new(&service);
    assert_eq!(fast.next()["guests"]["script"], "running");
    let mut slow = Listener::new(&service);
    assert_eq!(slow.next()["event"], "now");
    for _ in 0..FAILURES {
        script.fail(1);
        // The scripted guest's own module, and these.
        for _ in 0..=MODULES {
            let event = fast.next();
            assert_eq!(
                (&event["event"], &event["more"]),
                (&"violations".into(), &1.into())
            );
        }
    }
    let mut events = 0;
    let dropped = loop {
        let event = slow.next();
        if event["event"] == "dropped" {
            break event;
        }
        assert_eq!(event["event"], "violations");
        events += 1;
    };
    let reason = dropped["reason"].as_str().unwrap();
    assert!(
        reason.contains("was not read in time: listen anew"),
        "{reason}"
    );
    // What it was told before had not been lost, and after it there is nothing more.
    assert!((1..FAILURES * (MODULES + 1)).contains(&events), "{events}");
    script.fail(1);
    assert_eq!(fast.next()["event"], "violations");
    let mut anew = Listener::new(&service);
    assert_eq!(anew.next()["event"], "now");
    drop((fast, slow, anew));
    service.end();
}
