//! A double whose device is somebody else's for a while.

use super::*;
use crate::asker::Nobody;
use crate::double::{ADDRESS, DRIVER, done, refusal, supervised};

const MAC: &str = "02:cf:00:00:00:07";

#[test]
fn a_driver_suspends_its_device_and_resumes_it_in_its_turn_and_nobody_else_wakes_it_meanwhile() {
    let (supervisor, guest) = supervised();
    // Done twice is as good as once.
    for expected in [&["driver suspends"][..], &[]] {
        let given = supervisor.hand_over(ADDRESS, &Nobody).unwrap();
        assert_eq!(given, GivenAway::Suspended);
        assert_eq!(done(&guest), expected);
    }
    let file = crate::double::build(2);
    let limit = Duration::from_secs(5);
    for why in [
        refusal(supervisor.suspend_device(DRIVER, &Nobody)),
        refusal(supervisor.resume_device(DRIVER, &Nobody)),
        refusal(supervisor.upgrade(DRIVER, &file, limit, &Nobody)),
    ] {
        assert!(why.contains("another guest's"), "{why}");
    }
    assert!(done(&guest).is_empty());
    let taken = supervisor.take_over(ADDRESS, MAC, &Nobody).unwrap();
    assert_eq!(taken, TakenOver::Resumed);
    assert_eq!(done(&guest), ["driver resumes"]);
    supervisor.resume_device(DRIVER, &Nobody).unwrap();
    done(&guest);
    // One that works has lost its device, and begins anew.
    let taken = supervisor.take_over(ADDRESS, MAC, &Nobody).unwrap();
    assert_eq!(taken, TakenOver::Anew);
    assert_eq!(done(&guest), ["end suspend"]);
}

#[test]
fn a_device_that_no_driver_has_is_forgotten_and_found_with_its_address() {
    let (supervisor, guest) = supervised();
    guest.world().bound = false;
    for _ in 0..2 {
        let given = supervisor.hand_over(ADDRESS, &Nobody).unwrap();
        assert_eq!(given, GivenAway::Forgotten);
        assert!(!guest.world().known);
    }
    assert_eq!(done(&guest), ["forget"]);
    let taken = supervisor.take_over(ADDRESS, MAC, &Nobody).unwrap();
    assert_eq!(taken, TakenOver::Found);
    assert_eq!(done(&guest), [format!("find {MAC}")]);
    assert!(guest.world().known && guest.world().bound);
    guest.world().fails = |step, _| step == "forget" || step.starts_with("find");
    guest.world().bound = false;
    refusal(supervisor.hand_over(ADDRESS, &Nobody));
    assert!(guest.world().known);
    refusal(supervisor.take_over(ADDRESS, MAC, &Nobody));
}

#[test]
fn a_suspend_that_fails_leaves_the_device_working_and_a_resume_that_fails_can_be_tried_again() {
    let (supervisor, guest) = supervised();
    guest.world().fails = |step, _| step == "driver suspends";
    let why = refusal(supervisor.hand_over(ADDRESS, &Nobody));
    assert!(why.contains("cannot be suspended"), "{why}");
    assert!(supervisor.has_its_devices(DRIVER).is_ok());
    guest.world().fails = |step, before| step == "driver resumes" && before == 0;
    supervisor.hand_over(ADDRESS, &Nobody).unwrap();
    let why = refusal(supervisor.take_over(ADDRESS, MAC, &Nobody));
    assert!(why.contains("cannot be resumed"), "{why}");
    let taken = supervisor.take_over(ADDRESS, MAC, &Nobody).unwrap();
    assert_eq!(taken, TakenOver::Resumed);
}

#[test]
fn a_driver_that_was_inserted_anew_or_a_guest_that_was_reset_meanwhile_begins_anew() {
    for reset in [false, true] {
        let (supervisor, guest) = supervised();
        supervisor.hand_over(ADDRESS, &Nobody).unwrap();
        match reset {
            true => supervisor.guest_was_reset(),
            false => guest.world().instance += 1,
        }
        let taken = supervisor.take_over(ADDRESS, MAC, &Nobody).unwrap();
        assert_eq!(taken, TakenOver::Anew);
    }
}

/// Who changes a driver may wait for the device host, which waits for this.
#[test]
fn who_asks_while_a_driver_is_changed_does_not_wait_for_long() {
    let (supervisor, guest) = supervised();
    let taken = supervisor.change_driver();
    let begin = guest.now();
    for why in [
        refusal(supervisor.hand_over(ADDRESS, &Nobody)),
        refusal(supervisor.take_over(ADDRESS, MAC, &Nobody)),
    ] {
        assert!(why.contains("under way"), "{why}");
    }
    assert!(guest.now() - begin <= 3 * BUSY_TIME);
    drop(taken);
    supervisor.hand_over(ADDRESS, &Nobody).unwrap();
}

#[test]
fn nonsense_of_a_guest_is_no_module() {
    for line in [
        "module ../x 3",
        "module  3",
        "module x",
        "x",
        "module a b c",
        "built-in",
    ] {
        let (supervisor, guest) = supervised();
        guest.world().says = Some(line);
        refusal(supervisor.hand_over(ADDRESS, &Nobody));
        refusal(supervisor.take_over(ADDRESS, MAC, &Nobody));
        assert!(done(&guest).is_empty());
    }
}

/// Hears so many words, and goes then.
struct Goes(std::cell::Cell<usize>);

impl Asker for Goes {
    fn tell(&self, _what: &str) -> Result<(), crate::asker::Gone> {
        let left = self.0.get().checked_sub(1).ok_or(crate::asker::Gone)?;
        self.0.set(left);
        Ok(())
    }
}

#[test]
fn a_device_that_nobody_waits_for_any_more_is_resumed() {
    let (supervisor, guest) = supervised();
    refusal(supervisor.hand_over(ADDRESS, &Goes(1.into())));
    assert_eq!(done(&guest), ["driver suspends", "driver resumes"]);
    assert!(supervisor.has_its_devices(DRIVER).is_ok());
    // Where that fails it is resumed in its turn.
    guest.world().fails = |step, before| step == "driver resumes" && before == 0;
    guest.world().done.clear();
    refusal(supervisor.hand_over(ADDRESS, &Goes(1.into())));
    let taken = supervisor.take_over(ADDRESS, MAC, &Nobody).unwrap();
    assert_eq!(taken, TakenOver::Resumed);
}

#[test]
fn a_driver_whose_functions_have_succeeded_has_done_it_whatever_its_agent_says() {
    let (supervisor, guest) = supervised();
    guest.world().fails = |step, _| step.starts_with("write ");
    supervisor.hand_over(ADDRESS, &Nobody).unwrap();
    let taken = supervisor.take_over(ADDRESS, MAC, &Nobody).unwrap();
    assert_eq!(taken, TakenOver::Resumed);
}

#[test]
fn a_device_that_was_taken_out_is_nobody_elses() {
    let (supervisor, _) = supervised();
    supervisor.hand_over(ADDRESS, &Nobody).unwrap();
    supervisor.device_gone(ADDRESS);
    assert!(supervisor.has_its_devices(DRIVER).is_ok());
}
