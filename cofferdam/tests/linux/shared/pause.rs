//! Pausing the machine.

use std::time::Duration;

use cofferdam::control::protocol::Request;

use super::shared;

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_paused_guest_stands_still_and_goes_on() {
    let mut guest = shared();
    let mut control = guest.control().unwrap();
    control.tell(&Request::Pause {}).unwrap();
    let before = control.status().unwrap().exits;
    std::thread::sleep(Duration::from_millis(200));
    let after = control.status().unwrap().exits;
    control.tell(&Request::Resume {}).unwrap();
    assert_eq!(before, after);
    guest.agent().ping().unwrap();
}
