//! Another build of the stock e1000 driver in the place of the one that runs, good and bad ones.

use std::time::Duration;

use agent_protocol::message::Bytes;
use cofferdam::bench::network::{self, LINK_TIME};
use cofferdam::control::protocol::{Reply, Request};
use recovery::fault::FaultKind;
use recovery::ladder::{LadderConfig, OnFault, State};
use recovery::upgrade::UpgradeOutcome;

use super::victim;
use crate::builds::{another_build, build_of, hex, stock, with_failing_init, without_the_device};
use crate::streaming;
use crate::victim::{DRIVER, Victim};

const ENTRY: &str = "e1000_xmit_frame";

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn a_driver_is_upgraded_under_a_stream_and_a_bad_one_is_taken_back() {
    let mut victim = victim();
    victim.configure();
    victim.isolate(ENTRY, LadderConfig::default());
    let before = victim.configuration();
    let losses = victim.link_losses();
    streaming::begin(&mut victim.guest);
    let check = |victim: &mut Victim, build: &[u8], after: &str| {
        assert_eq!(hex(&victim.loaded_build()), hex(build), "{after}");
        eprintln!("{after}");
        victim.assert_configured(&before);
        assert_eq!(victim.link_losses(), losses, "{after}");
        assert_eq!(victim.isolated(), [ENTRY], "{after}");
        victim.ping();
        victim.assert_healthy(after);
    };

    let new = another_build(0xa1);
    let report = victim.upgrade(DRIVER, new.clone(), 60_000).unwrap();
    assert_eq!(
        (report.outcome, report.problems.as_slice()),
        (UpgradeOutcome::New, &[][..]),
        "{}",
        victim.guest.last_words()
    );
    assert_eq!(report.old_build, hex(&build_of(&stock(DRIVER))));
    assert_eq!(
        (report.interfaces, report.isolated),
        (vec!["eth0".to_owned()], 1)
    );
    check(&mut victim, &build_of(&new), "a good one");

    let report = victim.upgrade(DRIVER, with_failing_init(), 60_000).unwrap();
    assert_eq!(report.outcome, UpgradeOutcome::Old);
    assert!(
        report.problems[0].contains("cannot be inserted"),
        "{report:?}"
    );
    check(&mut victim, &build_of(&new), "one that cannot be inserted");

    let report = victim.upgrade(DRIVER, without_the_device(), 2000).unwrap();
    assert_eq!(report.outcome, UpgradeOutcome::Old);
    assert!(
        report.problems[0].contains("eth0 does not come back"),
        "{report:?}"
    );
    check(&mut victim, &build_of(&new), "one without an interface");

    for (module, file, why) in [
        (DRIVER, stock("dummy"), "it is the module dummy, not e1000"),
        (DRIVER, b"\x7fELF".to_vec(), "no kernel module"),
        ("dummy", stock("dummy"), "no module dummy loaded"),
    ] {
        let error = victim.upgrade(module, file, 5000).unwrap_err();
        assert!(error.contains(why), "{error}");
    }
    check(&mut victim, &build_of(&new), "files that were refused");

    streaming::is_under_way(&mut victim.guest);
    streaming::moves_on(&mut victim.guest);
    streaming::end(&mut victim.guest);

    // A driver that was stopped is not stopped any more when another build has taken its place.
    victim.ask(&Request::Release {
        module: DRIVER.to_owned(),
    });
    victim.isolate(
        ENTRY,
        LadderConfig {
            on_fault: Some(OnFault::Stop),
            ..LadderConfig::default()
        },
    );
    victim.inject(ENTRY, 5, FaultKind::NullDereference, 1, 1);
    victim.try_command(&["ping", "-c", "1", "-W", "1", "10.0.2.2"]);
    assert_eq!(victim.ladder().state, State::Stopped);
    let newer = another_build(0xa2);
    let report = victim.upgrade(DRIVER, newer.clone(), 60_000).unwrap();
    assert_eq!(report.outcome, UpgradeOutcome::New, "{report:?}");
    assert_eq!(victim.ladder().state, State::Running);
    check(&mut victim, &build_of(&newer), "a driver that was stopped");

    // A plain exchange of the driver shows at the other end of the wire.
    victim.ask(&Request::Release {
        module: DRIVER.to_owned(),
    });
    victim.guest.agent().remove_module(DRIVER).unwrap();
    network::bring_up(&mut victim.guest, DRIVER).unwrap();
    network::wait_for_link(&mut victim.guest, LINK_TIME).unwrap();
    assert!(victim.link_losses() > losses);
}

/// How long the interface of a new driver is waited for: longer than a mark, a rewind or a snapshot
/// waits for its turn.
const LONG_UPGRADE_MS: u64 = 40_000;

mod long {
    use super::*;

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn what_takes_or_puts_back_state_is_refused_while_a_driver_is_upgraded_and_nothing_is_harmed() {
        let mut victim = victim();
        victim.configure();
        victim.isolate(ENTRY, LadderConfig::default());
        let before = victim.configuration();
        let old = victim.loaded_build();
        victim.guest.agent().disconnect();
        victim.ask(&Request::Mark {
            name: "before".to_owned(),
        });
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("s");
        let meanwhile = [
            Request::Rewind {
                name: Some("before".to_owned()),
            },
            Request::Mark {
                name: "amid".to_owned(),
            },
            Request::Snapshot {
                dir: dir.clone(),
                parent: None,
                track: false,
                stop: false,
            },
        ];
        let upgrade = Request::Upgrade {
            module: DRIVER.to_owned(),
            file: Bytes(without_the_device()),
            limit_ms: LONG_UPGRADE_MS,
        };
        let mut control = victim.guest.control().unwrap();
        let (say, said) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let upgraded = scope.spawn(move || {
                let answer = control.ask_and_watch(&upgrade, &mut |what| {
                    let _ = say.send(what.to_owned());
                });
                answer.unwrap()
            });
            let begun = said.recv_timeout(Duration::from_secs(60)).unwrap();
            let mut asked = Vec::new();
            for request in &meanwhile {
                let mut control = victim.guest.control().unwrap();
                let request = request.clone();
                asked.push(scope.spawn(move || (control.ask(&request), request)));
            }
            for asked in asked {
                let (answer, request) = asked.join().unwrap();
                let error = format!("{:#}", answer.unwrap_err());
                let why = "a driver is being isolated, resumed, restarted or exchanged";
                assert!(error.contains(why), "{request:?} after {begun}: {error}");
            }
            match upgraded.join().unwrap() {
                Reply::Upgraded(report) => {
                    assert_eq!(report.outcome, UpgradeOutcome::Old, "{report:?}")
                }
                other => panic!("{other:?}"),
            }
        });
        assert!(!dir.exists(), "nothing of a refused snapshot stays");
        let check = |victim: &mut Victim, build: &[u8]| {
            assert_eq!(hex(&victim.loaded_build()), hex(build));
            victim.assert_configured(&before);
            assert_eq!(victim.isolated(), [ENTRY]);
            victim.ping();
            victim.assert_healthy("an upgrade");
        };
        check(&mut victim, &old);

        // Behind the upgrade the same requests are granted; the driver of the mark is back, too.
        let new = another_build(0xa3);
        let report = victim.upgrade(DRIVER, new.clone(), 60_000).unwrap();
        assert_eq!(report.outcome, UpgradeOutcome::New, "{report:?}");
        check(&mut victim, &build_of(&new));
        for request in &meanwhile[1..] {
            victim.guest.agent().disconnect();
            victim.ask(request);
        }
        victim.guest.agent().disconnect();
        victim.ask(&meanwhile[0]);
        network::wait_for_link(&mut victim.guest, LINK_TIME).unwrap();
        check(&mut victim, &old);
    }
}
