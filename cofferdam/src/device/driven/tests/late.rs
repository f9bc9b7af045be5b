//! Drivers and device hosts that take their time.

use std::os::unix::net::UnixStream;

use super::*;
use crate::device::hello::{Welcome, read_line};
use crate::device::passed::tests::guest::welcome;
use crate::options::MacAddress;

/// Its VM did not answer in time, and did what it was asked for all the same.
#[test]
fn a_driver_of_which_nothing_was_heard_is_asked_to_resume_what_it_may_have_suspended() {
    let (host, vms) = host();
    vms.boot(&host, "left", 1);
    vms.boot(&host, "right", 2);
    *lock(&vms.fails) = Some("left suspends, late".to_owned());
    let error = host.switch_to(&name("right")).unwrap_err().to_string();
    assert!(error.contains("the turn is where it was"), "{error}");
    assert_eq!(vms.asked(), ["left suspends", "left resumes"]);
    vms.assert_works_for("left");
}

/// Neither guest's driver can resume it for a while.
#[test]
fn what_a_switch_left_with_nobody_is_somebodys_again_as_soon_as_it_can_be() {
    let (host, vms) = host();
    vms.boot(&host, "left", 1);
    vms.device.lock().fails = Some(Step::Map);
    vms.boot(&host, "right", 2);
    host.switch_to(&name("right")).unwrap_err();
    assert_eq!(host.turn(), None);
    let failed = || host.status().failed_switches;
    let before = failed();
    wait("another attempt", || failed() > before);
    assert!(host.turn().is_none() && vms.device.lock().is_silent());
    vms.device.lock().fails = None;
    wait("the turn", || host.turn().is_some());
    let holder = host.turn().unwrap();
    wait("its driver", || {
        vms.asked().contains(&format!("{holder} resumes"))
    });
    wait("its registers", || {
        let ring = vms.with(&holder, |one| one.guest.ring());
        vms.device.lock().get(RDBAL) == ring && vms.device.lock().masters
    });
}

#[test]
fn who_attaches_waits_for_a_switch_in_which_drivers_have_their_time() {
    let (host, vms) = host();
    vms.boot(&host, "left", 1);
    vms.boot(&host, "right", 2);
    let waits = vms.waits.clone();
    let held = lock(&waits);
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let switch = scope.spawn(|| host.switch_to(&name("right")).map(drop));
        wait("the other driver", || {
            lock(&vms.asked).contains(&"right resumes".to_owned())
        });
        let mac = MacAddress([2, 0, 0, 0, 0, 3]);
        let own = &host;
        let attach = scope.spawn(move || own.attach((name("third"), mac), None, theirs));
        for _ in 0..2 {
            let said: Welcome = read_line(&ours, Duration::from_secs(120)).unwrap();
            assert_eq!(said, Welcome::Wait {});
        }
        drop(held);
        let Welcome::Ok(info) = welcome(&ours).unwrap() else {
            panic!("not attached");
        };
        assert!(!info.turn && info.by_driver);
        attach.join().unwrap().unwrap();
        switch.join().unwrap().unwrap();
    });
    vms.assert_works_for("right");
}
