//! Switches that are asked for while another one is under way: they wait so long and no longer, and
//! nobody is left with a turn, or without one, that it is not to have.

use std::time::{Duration, Instant};

use cofferdam::device::protocol::Request;
use recovery::switch::Step;

use crate::common::place::Place;
use crate::guest::{Guest, wait};
use crate::host::{FAR, Far, Hold, Host};

/// How long a switch waits for another one, as docs/device-host.md says.
const WAITS: Duration = Duration::from_secs(5);
/// So long, whoever was asked is certainly waiting.
const A_MOMENT: Duration = Duration::from_millis(300);

fn guests(place: &Place) -> [Guest; 3] {
    [("left", 1), ("right", 2), ("third", 3)].map(|(vm, mac)| Guest::boot(place, vm, mac))
}

fn to(vm: &str) -> Request {
    Request::Switch { to: vm.into() }
}

/// The guest has the turn, and frames come through both ways.
fn works(host: &Host, far: &mut Far, guest: &mut Guest, name: &str) {
    assert_eq!(host.status().turn.as_deref(), Some(name));
    guest.await_link(true);
    guest.send(FAR, name);
    assert_eq!(far.receive(), name);
    far.send(guest.mac, name);
    assert_eq!(guest.await_frame().1, name);
}

#[test]
fn of_two_switches_at_once_one_is_done_after_the_other() {
    let place = Place::new();
    let host = Host::start_held(&place);
    let mut far = Far::connect(&place);
    let [_left, _right, mut third] = guests(&place);
    let hold = Hold::at(&place, Step::Map);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| host.ask(&to("right")));
        hold.wait();
        let second = scope.spawn(|| host.ask(&to("third")));
        std::thread::sleep(A_MOMENT);
        assert!(!first.is_finished() && !second.is_finished());
        drop(hold);
        first.join().unwrap().unwrap();
        second.join().unwrap().unwrap();
    });
    let status = host.status();
    let last = &status.switches[status.switches.len() - 2..];
    let way = |n: usize| (last[n].from.as_deref(), last[n].to.as_deref());
    assert_eq!(way(0), (Some("left"), Some("right")));
    assert_eq!(way(1), (Some("right"), Some("third")));
    assert_eq!(status.failed_switches, 0);
    works(&host, &mut far, &mut third, "third");
}

#[test]
fn a_switch_that_waits_too_long_for_another_one_is_refused_in_a_line() {
    let place = Place::new();
    let host = Host::start_held(&place);
    let mut far = Far::connect(&place);
    let [_left, mut right, mut third] = guests(&place);
    let hold = Hold::at(&place, Step::Quiesce);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| host.ask(&to("right")));
        hold.wait();
        let begin = Instant::now();
        let refused = host.ask(&to("third")).unwrap_err().to_string();
        assert!(begin.elapsed() >= WAITS, "{:?}", begin.elapsed());
        assert!(
            refused.contains("another switch is under way and does not end"),
            "{refused}"
        );
        assert_eq!(refused.lines().count(), 1, "{refused}");
        assert!(!first.is_finished());
        drop(hold);
        first.join().unwrap().unwrap();
    });
    works(&host, &mut far, &mut right, "right");
    host.switch("third");
    works(&host, &mut far, &mut third, "third");
    assert_eq!(host.status().failed_switches, 0);
}

/// It was fit to have the turn when it was asked for, and is at rest, or has gone, when it comes to
/// that.
#[test]
fn who_comes_to_rest_or_goes_while_its_switch_waits_is_not_given_the_turn() {
    let place = Place::new();
    let host = Host::start_held(&place);
    let mut far = Far::connect(&place);
    for goes in [false, true] {
        let [left, mut right, third] = guests(&place);
        let mut third = Some(third);
        let hold = Hold::at(&place, Step::Map);
        std::thread::scope(|scope| {
            let first = scope.spawn(|| host.ask(&to("right")));
            hold.wait();
            let second = scope.spawn(|| host.ask(&to("third")));
            std::thread::sleep(A_MOMENT);
            match goes {
                true => drop(third.take()),
                false => {
                    // Answered when the switch is over.
                    scope.spawn(|| host.ask(&Request::Yield { vm: "third".into() }).unwrap());
                }
            }
            wait("third's rest", || {
                let third = host.context("third");
                third.away || !third.connected
            });
            drop(hold);
            first.join().unwrap().unwrap();
            let refused = second.join().unwrap().unwrap_err().to_string();
            let says = match goes {
                true => "third is not attached to nic now",
                false => "third is paused",
            };
            assert!(refused.contains(says), "{refused}");
        });
        works(&host, &mut far, &mut right, "right");
        drop((left, right, third));
        host.await_turn(None);
    }
}
