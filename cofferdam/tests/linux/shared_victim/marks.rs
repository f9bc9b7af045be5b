//! A guest that goes back to a mark with functions of its driver isolated.

use std::time::Duration;

use cofferdam::bench::network::{self, LINK_TIME};
use cofferdam::control::protocol::{Reply, Request};
use recovery::fault::FaultKind;
use recovery::ladder::{LadderConfig, OnFault, State};

use super::victim;
use crate::victim::{DRIVER, Victim};

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
fn a_guest_whose_driver_cannot_be_restarted_goes_back_to_its_mark() {
    let mut victim = victim();
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
        name: "cannot-be-restarted".to_owned(),
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

mod long {
    use super::*;

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn a_guest_goes_back_to_a_mark_with_its_driver_isolated_whatever_failed_since() {
        let mut victim = victim();
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
            name: "isolated".to_owned(),
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
}
