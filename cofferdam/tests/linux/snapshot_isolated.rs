//! A guest that goes on from a snapshot with functions of its driver isolated.

use std::time::{Duration, Instant};

use cofferdam::bench::guest::Guest;
use cofferdam::bench::operation::Operation;
use cofferdam::control::protocol::Request;
use recovery::fault::FaultKind;
use recovery::ladder::LadderConfig;

use super::victim::Victim;
use super::{boot, options};

const ENTRY: &str = "e1000_xmit_frame";

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
