//! What the calls of a stock driver give away, which the guest has when they have ended.

use std::time::{Duration, Instant};

use agent_protocol::traffic::TrafficKind;
use cofferdam::bench::traffic;
use recovery::fault::{FaultKind, after_kernel_calls};

use super::recovery::{STREAM_ENTRIES, unlimited};
use super::victim;
use crate::victim::Victim;

mod long {
    use super::*;

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn what_a_poll_hands_over_arrives_once_and_nothing_of_one_that_fails_behind_it() {
        let mut victim = victim();
        let poll = "e1000_clean";
        victim.isolate_all(&STREAM_ENTRIES, unlimited());
        let traffic = |victim: &mut Victim, kind, seconds| {
            let result = traffic::send(&mut victim.guest, kind, Duration::from_secs(seconds));
            let result = result.unwrap();
            assert_eq!((result.corrupted, &result.error), (0, &None), "{result:?}");
            assert_eq!((result.duplicated, result.reordered), (0, 0), "{result:?}");
            result
        };
        let handed_over = |victim: &Victim| {
            let module = victim.module().unwrap();
            let of = |name| module.entries.iter().find(|entry| entry.name == name);
            let count = |name| of(name).map_or(0, |entry| entry.handed_over);
            assert_eq!(module.broken, None);
            [count(poll), count("e1000_intr")]
        };
        let echoed = traffic(&mut victim, TrafficKind::UdpEcho, 3);
        let [by_polls, by_interrupts] = handed_over(&victim);
        // Each datagram came with a poll, and each poll with an interrupt, or a few with one.
        assert!(
            by_polls > echoed.answered && by_interrupts > 0,
            "{by_polls} {by_interrupts}"
        );
        // The poll is at its end, and all that it received has been handed over.
        let instructions = victim.instructions(poll);
        let mut ends = after_kernel_calls(&instructions).into_iter();
        let (behind, _) = ends
            .find(|(_, called)| *called == "napi_complete_done")
            .unwrap();
        victim.inject(poll, behind, FaultKind::NullDereference, 3, 60);
        let deadline = Instant::now() + Duration::from_secs(600);
        while victim.count().left > 0 {
            assert!(Instant::now() < deadline, "{:?}", victim.count());
            traffic(&mut victim, TrafficKind::UdpEcho, 3);
            traffic(&mut victim, TrafficKind::TcpEcho, 3);
        }
        assert_eq!(victim.count().failed, 60);
        assert!(handed_over(&victim)[0] > by_polls);
        victim.release();
        victim.ping();
        victim.assert_healthy("polls that failed at their end");
    }
}
