//! Devices of a double that are suspended and resumed.

use super::*;
use crate::asker::Nobody;
use crate::double::{DRIVER, come_to_rest, done, refusal, request, supervised};
use crate::ladder::{LadderConfig, OnFault};

#[test]
fn a_device_rests_until_it_is_resumed() {
    let (supervisor, guest) = supervised();
    let device = guest.world().device;
    let phases = supervisor.suspend_device(DRIVER, &Nobody).unwrap();
    let expected = DevicePhases {
        driver_us: 3000,
        state_us: Some(0),
        power_us: Some(7),
    };
    assert_eq!(phases, expected);
    assert_eq!(done(&guest), ["driver suspends", "sleep"]);
    assert!(!guest.world().awake);
    assert_eq!(supervisor.suspended(), [DRIVER]);
    let twice = refusal(supervisor.suspend_device(DRIVER, &Nobody));
    assert!(twice.contains("suspended already"), "{twice}");
    let file = crate::double::build(2);
    let limit = Duration::from_secs(5);
    let upgrade = refusal(supervisor.upgrade(DRIVER, &file, limit, &Nobody));
    assert!(upgrade.contains("are suspended"), "{upgrade}");
    assert!(done(&guest).is_empty());
    let resumed = supervisor.resume_device(DRIVER, &Nobody).unwrap();
    assert_eq!(resumed, Resumed::FromRest(expected));
    assert_eq!(done(&guest), ["wake", "restore device", "driver resumes"]);
    let world = guest.world();
    assert_eq!((world.awake, world.device), (true, device));
    drop(world);
    assert!(supervisor.suspended().is_empty());
    // One that works begins anew.
    let resumed = supervisor.resume_device(DRIVER, &Nobody).unwrap();
    assert_eq!(resumed, Resumed::Anew(vec![Duration::from_millis(3)]));
}

#[test]
fn a_device_without_power_states_rests_as_well() {
    let (supervisor, guest) = supervised();
    guest.world().fails = |step, _| step == "sleep";
    let phases = supervisor.suspend_device(DRIVER, &Nobody).unwrap();
    assert_eq!(phases.power_us, None);
    done(&guest);
    supervisor.resume_device(DRIVER, &Nobody).unwrap();
    assert_eq!(done(&guest), ["restore device", "driver resumes"]);
}

#[test]
fn a_suspend_that_fails_leaves_nothing_suspended_and_a_resume_that_fails_can_be_tried_again() {
    let (supervisor, guest) = supervised();
    guest.world().fails = |step, _| step == "driver suspends";
    let why = refusal(supervisor.suspend_device(DRIVER, &Nobody));
    assert!(why.contains("cannot be suspended"), "{why}");
    assert!(supervisor.suspended().is_empty());
    guest.world().fails = |step, before| step == "driver resumes" && before == 0;
    supervisor.suspend_device(DRIVER, &Nobody).unwrap();
    let why = refusal(supervisor.resume_device(DRIVER, &Nobody));
    assert!(why.contains("cannot be resumed"), "{why}");
    let resumed = supervisor.resume_device(DRIVER, &Nobody).unwrap();
    assert!(matches!(resumed, Resumed::FromRest(_)));
}

#[test]
fn a_driver_that_was_removed_or_a_guest_that_was_reset_meanwhile_has_nothing_to_resume() {
    for is_there in [true, false] {
        let (supervisor, guest) = supervised();
        supervisor.suspend_device(DRIVER, &Nobody).unwrap();
        guest.world().instance += 1;
        if !is_there {
            guest.world().loaded = None;
        }
        let why = refusal(supervisor.resume_device(DRIVER, &Nobody));
        assert!(why.contains("was removed since"), "{why}");
        assert!(supervisor.suspended().is_empty());
    }
    let (supervisor, guest) = supervised();
    supervisor.suspend_device(DRIVER, &Nobody).unwrap();
    guest.world().instance += 1;
    supervisor.suspend_device(DRIVER, &Nobody).unwrap();
    supervisor.guest_was_reset();
    assert!(supervisor.suspended().is_empty());
}

#[test]
fn a_rewind_brings_back_what_rested() {
    let (supervisor, guest) = supervised();
    supervisor.suspend_device(DRIVER, &Nobody).unwrap();
    come_to_rest(&supervisor);
    let kept = supervisor.keep_ladders();
    supervisor.end_rest();
    supervisor.resume_device(DRIVER, &Nobody).unwrap();
    come_to_rest(&supervisor);
    supervisor.put_ladders_back(&kept).unwrap();
    supervisor.end_rest();
    assert_eq!(supervisor.suspended(), [DRIVER]);
    done(&guest);
    supervisor.resume_device(DRIVER, &Nobody).unwrap();
    assert_eq!(done(&guest), ["wake", "restore device", "driver resumes"]);
}

#[test]
fn a_driver_whose_device_rests_is_restarted_awake() {
    let (supervisor, guest) = supervised();
    let config = LadderConfig {
        on_fault: Some(OnFault::Restart),
        ..LadderConfig::default()
    };
    supervisor.isolate(request(), config, &Nobody).unwrap();
    supervisor.suspend_device(DRIVER, &Nobody).unwrap();
    done(&guest);
    guest.fail();
    while guest.count("isolate") == 0 {
        std::thread::yield_now();
    }
    let done = done(&guest);
    assert_eq!(done[..3], ["wake", "restore device", "driver resumes"]);
    assert!(done.contains(&"remove".to_owned()), "{done:?}");
}
