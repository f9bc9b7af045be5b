//! Rewinds that fail half-way.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm::memory::MemorySource;
use vmm::{
    Kept, Participant, PausedVcpus, QuiesceError, Refused, RestFor, RewindError, Unsettled, VmState,
};

use super::LIMIT;
use super::whole::{assert_same, mark, rewind, whole};
use super::writer::writer;

/// Does not put back what it kept, if told so.
#[derive(Default)]
struct Stubborn(AtomicBool);

impl Participant for Stubborn {
    fn name(&self) -> String {
        "stubborn".to_owned()
    }
    fn settle(&self, _rest: RestFor, _vcpus: &mut PausedVcpus<'_>) -> Result<(), Unsettled> {
        Ok(())
    }
    fn go_on(&self) {}
    fn keep(&self) -> Result<Kept, Unsettled> {
        Ok(Some(Arc::new(7u32)))
    }
    fn put_back(&self, kept: &Kept) -> Result<(), String> {
        let kept = kept.as_ref().and_then(|kept| kept.downcast_ref::<u32>());
        assert_eq!(kept, Some(&7));
        match self.0.load(Ordering::Acquire) {
            true => Err("it does not want to".to_owned()),
            false => Ok(()),
        }
    }
}

#[test]
fn a_rewind_that_fails_half_way_keeps_the_guest_still_until_one_succeeds_or_it_is_reset() {
    let writing = writer(4 << 20, MemorySource::Fresh, 1, 64).start();
    let handle = writing.handle();
    let stubborn = Arc::new(Stubborn::default());
    handle.add_participant(stubborn.clone());
    let then = mark(&writing, "a");
    for mended_by_reset in [false, true] {
        writing.wait(20);
        stubborn.0.store(true, Ordering::Release);
        let error = handle.rewind(Some("a"), LIMIT).unwrap_err();
        assert!(matches!(error, RewindError::HalfWay { .. }), "{error}");
        assert!(error.to_string().contains("stubborn: it does not want to"));
        assert_eq!(handle.state(), VmState::Paused);
        assert_eq!(handle.resume(), Err(Refused::HalfRewound));
        let look = handle.quiesce(LIMIT, |_| ()).unwrap_err();
        assert!(matches!(look, QuiesceError::Refused(Refused::HalfRewound)));
        assert!(handle.mark("b", LIMIT).is_err());
        stubborn.0.store(false, Ordering::Release);
        if mended_by_reset {
            let resets = handle.status().resets;
            handle.reset().unwrap();
            while handle.status().resets == resets {
                std::thread::yield_now();
            }
            // It was running when it was to go back, and so it does again.
            assert_eq!(handle.state(), VmState::Running);
            writing.guest.report();
        } else {
            handle.rewind(Some("a"), LIMIT).unwrap();
            assert_same(&whole(handle), &then, "mended");
            handle.resume().unwrap();
        }
    }
    // The mark outlives the reset.
    rewind(&writing, "a", &then);
    writing.wait(20);
    handle
        .quiesce(LIMIT, |quiesced| writing.check(quiesced))
        .unwrap();
    writing.guest.power_off();
}

#[test]
fn after_a_rewind_that_failed_half_way_another_mark_has_its_own_memory() {
    let writing = writer(4 << 20, MemorySource::Fresh, 1, 64).start();
    let handle = writing.handle();
    let stubborn = Arc::new(Stubborn::default());
    handle.add_participant(stubborn.clone());
    writing.wait(20);
    let first = mark(&writing, "a");
    writing.wait(20);
    let second = mark(&writing, "b");
    for (fails, succeeds, then) in [("a", "b", &second), ("b", "a", &first)] {
        writing.wait(20);
        stubborn.0.store(true, Ordering::Release);
        let error = handle.rewind(Some(fails), LIMIT).unwrap_err();
        assert!(matches!(error, RewindError::HalfWay { .. }), "{error}");
        stubborn.0.store(false, Ordering::Release);
        handle.rewind(Some(succeeds), LIMIT).unwrap();
        assert_same(&whole(handle), then, succeeds);
        handle.resume().unwrap();
    }
    writing.guest.power_off();
}
