//! What listeners are told.

use crate::client::{Listener, Service};
use crate::common::place::{Place, end, finish, signal};

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
