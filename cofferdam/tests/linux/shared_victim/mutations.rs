//! Faults in one instruction of a stock driver, by hand and taken back.

use agent_protocol::message::Bytes;
use cofferdam::bench::network::{self, LINK_TIME};
use cofferdam::campaign::with_function;
use cofferdam::control::protocol::{FaultyCalls, FunctionBytes, Reply, Request};
use isolation::dispatch::fault::{UsedUpBy, WhichCalls};
use isolation::mutation::{Kind, Site, mutate, sites};
use recovery::fault::FaultKind;
use recovery::ladder::{LadderConfig, OnFault, State};

use super::victim;
use crate::GATEWAY;
use crate::victim::{DRIVER, Victim};

/// Fills in the driver's name, by a call that can be left out.
const DRVINFO: &str = "e1000_get_drvinfo";
/// Takes packets out of the ring for reception; `e1000_clean` calls it.
const CLEAN_RX: &str = "e1000_clean_rx_irq";

fn text_of(victim: &mut Victim, function: &str) -> FunctionBytes {
    victim.guest.agent().disconnect();
    match victim.ask(&Request::FunctionText {
        module: DRIVER.to_owned(),
        function: function.to_owned(),
    }) {
        Reply::FunctionText(text) => text,
        other => panic!("{other:?}"),
    }
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_call_is_left_out_of_a_driver_that_is_not_isolated_and_put_back() {
    let mut victim = victim();
    let says_driver = |victim: &mut Victim| {
        let info = victim.guest.run(&["ethtool", "-i", "eth0"]).unwrap();
        info.lines().any(|line| line.trim() == "driver: e1000")
    };
    assert!(says_driver(&mut victim));
    let text = text_of(&mut victim, DRVINFO);
    assert!(!text.isolated);
    // The first that copies a text copies the driver's name.
    let mutation = with_function(DRVINFO, &text, |function| {
        let all = sites(function);
        let copies = |site: &&Site| site.text.contains("strscpy");
        let mut copying = all.iter().filter(copies);
        let site = copying.find(|site| site.kinds.contains(&Kind::MissingCall));
        mutate(function, Kind::MissingCall, site.unwrap().offset, 0)
    });
    let mutation = mutation.unwrap();
    eprintln!("{mutation:?}");
    victim.guest.agent().disconnect();
    victim.ask(&Request::InjectCode {
        module: DRIVER.to_owned(),
        function: DRVINFO.to_owned(),
        offset: mutation.offset.into(),
        old: Bytes(mutation.old.clone()),
        new: Bytes(mutation.new.clone()),
        replaces_whole: mutation.replaces_whole,
        calls: None,
    });
    assert!(!says_driver(&mut victim));
    let undo = Request::UndoFaults {
        module: DRIVER.to_owned(),
    };
    victim.guest.agent().disconnect();
    let Reply::Faults(faults) = victim.ask(&undo) else {
        panic!("no faults");
    };
    assert!(faults.own_text.unwrap().reached_ns.is_some());
    assert!(says_driver(&mut victim));
    assert_eq!(text_of(&mut victim, DRVINFO), text);
    victim.assert_healthy("a call that was left out for a while");
}

/// A length that no packet has room for: the kernel prints that and gives up (`skb_over_panic`,
/// net/core/skbuff.c).
fn absurd_length(victim: &mut Victim) -> Request {
    let text = text_of(victim, CLEAN_RX);
    let mutation = with_function(CLEAN_RX, &text, |function| {
        let all = sites(function);
        let lengths = all
            .iter()
            .filter(|site| site.kinds.contains(&Kind::LengthOverrun));
        let mut changes = lengths.flat_map(|site| {
            let change = |seed| mutate(function, Kind::LengthOverrun, site.offset, seed).ok();
            (0..16).filter_map(change)
        });
        let change = changes.find(|change| {
            change.says.contains("skb_put gets") && change.says.contains("stack pointer")
        });
        change.ok_or("no such change")
    });
    let mutation = mutation.unwrap();
    eprintln!("{mutation:?}");
    Request::InjectCode {
        module: DRIVER.to_owned(),
        function: CLEAN_RX.to_owned(),
        offset: mutation.offset.into(),
        old: Bytes(mutation.old),
        new: Bytes(mutation.new),
        replaces_whole: mutation.replaces_whole,
        calls: Some(FaultyCalls {
            which: WhichCalls::ALL,
            times: 1,
            used_up_by: UsedUpBy::Reaching,
        }),
    }
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_call_that_makes_the_kernel_print_and_give_up_is_taken_back_and_a_stopped_driver_is_not_polled()
{
    let mut victim = victim();
    victim.isolate("e1000_clean", LadderConfig::default());
    let mut once = absurd_length(&mut victim);
    victim.guest.agent().disconnect();
    victim.ask(&once);
    victim.ping();
    let violations = victim.violations();
    assert_eq!(victim.ladder().rungs.errors, 1, "{violations:?}");
    assert!(violations[0].contains("invalid opcode"), "{violations:?}");
    assert!(violations[0].contains("skb_panic"), "{violations:?}");
    victim.assert_healthy("a kernel function that gave up");
    // What it printed went with the call.
    assert!(!victim.run(&["dmesg"]).contains("skb_over_panic"));
    victim.release();
    // A driver that is stopped while the device is polled: nobody polls it for ever.
    let stop = LadderConfig {
        on_fault: Some(OnFault::Stop),
        ..LadderConfig::default()
    };
    victim.isolate("e1000_clean", stop);
    if let Request::InjectCode { calls, .. } = &mut once {
        *calls = Some(FaultyCalls {
            which: WhichCalls::ALL,
            times: u64::MAX,
            used_up_by: UsedUpBy::Reaching,
        });
    }
    victim.guest.agent().disconnect();
    victim.ask(&once);
    // An answer may be slow in coming.
    for _ in 0..60 {
        victim.try_command(&["ping", "-c", "1", "-W", "1", GATEWAY]);
        if victim.ladder().state == State::Stopped {
            break;
        }
    }
    assert_eq!(victim.ladder().state, State::Stopped);
    let polled = |victim: &Victim| {
        let entry = &victim.module().unwrap().entries[0];
        entry.calls + entry.refused
    };
    let before = polled(&victim);
    victim.run(&["sleep", "2"]);
    // An interrupt may have been on its way.
    assert!(polled(&victim) - before < 10, "{before}");
    // The interface can be set down, which waits for the end of a poll.
    victim.run(&["ip", "link", "set", "eth0", "down"]);
    victim.release();
    victim.run(&["ip", "link", "set", "eth0", "up"]);
    network::wait_for_link(&mut victim.guest, LINK_TIME).unwrap();
    victim.ping();
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_stopped_driver_that_sets_its_device_going_again_does_not_drown_the_guest_in_interrupts() {
    let mut victim = victim();
    let stop = LadderConfig {
        on_fault: Some(OnFault::Stop),
        ..LadderConfig::default()
    };
    victim.isolate_all(&["e1000_intr", "e1000_clean", "e1000_xmit_frame"], stop);
    victim.inject("e1000_xmit_frame", 5, FaultKind::NullDereference, 1, 1);
    victim.try_command(&["ping", "-c", "1", "-W", "1", GATEWAY]);
    assert_eq!(victim.ladder().state, State::Stopped);
    // Functions that are not isolated switch the device's interrupts on, and its link comes up: its
    // handler is not run, and nobody acknowledges that.
    victim.run(&["ip", "link", "set", "eth0", "down"]);
    victim.run(&["ip", "link", "set", "eth0", "up"]);
    victim.run(&["sleep", "2"]);
    let module = victim.module().unwrap();
    let handler = module
        .entries
        .iter()
        .find(|entry| entry.name == "e1000_intr");
    let refused = handler.unwrap().refused;
    assert!((1..100).contains(&refused), "{refused}");
    victim.release();
    victim.run(&["ip", "link", "set", "eth0", "down"]);
    victim.run(&["ip", "link", "set", "eth0", "up"]);
    network::wait_for_link(&mut victim.guest, LINK_TIME).unwrap();
    victim.ping();
}
