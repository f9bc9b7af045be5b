//! Guests that are rewound, or go on from a snapshot, with functions of their driver isolated.

use std::time::{Duration, Instant};

use cofferdam::bench::guest::Guest;
use cofferdam::bench::network::{self, LINK_TIME};
use cofferdam::bench::operation::Operation;
use cofferdam::control::protocol::{Reply, Request};
use recovery::fault::FaultKind;
use recovery::ladder::{LadderConfig, OnFault, State};

use super::victim::{DRIVER, Victim};
use super::{boot, options};

const ENTRY: &str = "e1000_xmit_frame";

fn rewind(victim: &mut Victim) {
    victim.guest.agent().disconnect();
    match victim.ask(&Request::Rewind { name: None }) {
        Reply::Rewound(rewound) => eprintln!("{rewound:?}"),
        other => panic!("{other:?}"),
    }
}

/// What becomes of the guest between the mark and the rewind.
type Happens = fn(&mut Victim);

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_guest_goes_back_to_a_mark_with_its_driver_isolated_whatever_failed_since() {
    let mut victim = Victim::boot();
    victim.configure();
    let before = victim.configuration();
    let restart = LadderConfig {
        on_fault: Some(OnFault::Restart),
        ..LadderConfig::default()
    };
    victim.isolate(ENTRY, restart);
    victim.ping();
    victim.guest.agent().disconnect();
    victim.ask(&Request::Mark {
        name: "warm".to_owned(),
    });
    let happens: [Happens; 4] = [
        |victim| victim.ping(),
        |victim| {
            victim.inject(ENTRY, 5, FaultKind::NullDereference, 1, 1);
            victim.try_command(&["ping", "-c", "2", "-i", "0.1", "-W", "1", "10.0.2.2"]);
            assert_eq!(victim.wait_until_running().rungs.restarts, 1);
            victim.run(&["ip", "link", "set", "eth0", "mtu", "1300"]);
        },
        |victim| {
            victim.release();
            victim.run(&["ip", "link", "set", "eth0", "down"]);
        },
        |victim| {
            victim.guest.agent().disconnect();
            let module = DRIVER.to_owned();
            victim.ask(&Request::SuspendDevice { module });
        },
    ];
    for happen in happens {
        happen(&mut victim);
        rewind(&mut victim);
        assert_eq!(victim.isolated(), [ENTRY]);
        assert_eq!(victim.ladder().state, State::Running);
        network::wait_for_link(&mut victim.guest, LINK_TIME).unwrap();
        victim.ping();
        victim.assert_configured(&before);
        victim.assert_healthy("a rewind");
    }
    let calls = |victim: &Victim| victim.module().unwrap().entries[0].commits;
    let commits = calls(&victim);
    victim.ping();
    assert!(calls(&victim) > commits, "its calls are isolated");
    victim.release();
    victim.ping();
    victim.assert_healthy("all of it");
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_guest_whose_driver_cannot_be_restarted_goes_back_to_its_mark() {
    let mut victim = Victim::boot();
    victim.configure();
    let before = victim.configuration();
    let go_back = LadderConfig {
        on_fault: Some(OnFault::Restart),
        may_reset_guest: recovery::ladder::MayReset::Snapshot,
        ..LadderConfig::default()
    };
    victim.isolate(ENTRY, go_back);
    victim.ping();
    let boot_id = |victim: &mut Victim| {
        let agent = victim.guest.agent();
        agent
            .hello(Duration::from_secs(60))
            .unwrap()
            .boot_id
            .clone()
    };
    let boot = boot_id(&mut victim);
    victim.guest.agent().disconnect();
    victim.ask(&Request::Mark {
        name: "warm".to_owned(),
    });
    // The driver that was removed is not to be found when it is to be inserted again.
    victim.run(&["mount", "-t", "tmpfs", "none", "/lib/modules"]);
    victim.inject(ENTRY, 5, FaultKind::NullDereference, 1, 1);
    victim.try_command(&["ping", "-c", "2", "-i", "0.1", "-W", "1", "10.0.2.2"]);
    let ladder = victim.wait_until_running();
    let rungs = ladder.rungs;
    assert_eq!(
        (rungs.failed_restarts, rungs.rewinds, rungs.resets),
        (1, 1, 0)
    );
    assert_eq!(boot_id(&mut victim), boot);
    assert_eq!(victim.isolated(), [ENTRY]);
    network::wait_for_link(&mut victim.guest, LINK_TIME).unwrap();
    victim.ping();
    victim.assert_configured(&before);
    victim.assert_healthy("the way back");
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_guest_that_goes_on_from_its_snapshot_has_the_same_isolated() {
    let mut victim = Victim::boot();
    victim.configure();
    let before = victim.configuration();
    victim.isolate(ENTRY, LadderConfig::default());
    victim.ping();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("saved");
    victim.guest.agent().disconnect();
    victim.ask(&Request::Snapshot {
        dir: dir.clone(),
        parent: None,
        track: false,
        stop: false,
    });
    // It goes on as it was.
    victim.ping();
    assert_eq!(victim.isolated(), [ENTRY]);
    victim.assert_healthy("a snapshot");
    drop(victim);

    let mut guest = boot(&options().with(&format!("--snapshot {}", dir.display())));
    // The VM asks the agent itself, which listens to one client at a time.
    guest.agent().disconnect();
    let deadline = Instant::now() + Duration::from_secs(120);
    let isolated = |guest: &Guest| guest.control().unwrap().status().unwrap().isolation;
    while isolated(&guest).is_empty() {
        assert!(Instant::now() < deadline, "{}", guest.last_words());
        std::thread::sleep(Duration::from_millis(100));
    }
    let mut victim = Victim::of(guest);
    assert_eq!(victim.isolated(), [ENTRY]);
    victim.ping();
    victim.assert_configured(&before);
    assert!(victim.fail_once(ENTRY, Operation::Traffic, 5, FaultKind::NullDereference));
    victim.ping();
    victim.release();
    victim.ping();
    victim.assert_healthy("all of it");
}
