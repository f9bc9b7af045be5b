//! What was seen of a run: of the VM, of the ladder, and on the console.

use std::time::{Duration, Instant};

use anyhow::bail;
use isolation::domain::transaction::AbortPhases;
use recovery::campaign::Way;
use recovery::campaign::verdict::{Detected, Seen, is_bad, is_damage, is_stall};
use recovery::ladder::State;
use serde::Deserialize;

use super::{Fault, Worker};
use crate::bench::network::{GATEWAY, INTERFACE};
use crate::campaign::patience::has_panicked;
use crate::control::client::ControlClient;
use crate::control::protocol::{FaultsState, Reply, Request};

/// How long an agent that lives takes to answer at most.
const ANSWER_TIME: Duration = Duration::from_secs(10);

/// How long a ladder may be at work.
const LADDER_TIME: Duration = Duration::from_secs(120);

/// Between two looks at something that will change.
const POLL: Duration = Duration::from_millis(50);

/// Most lines of the kernel's log that are kept.
const MAX_LINES: usize = 40;

/// What a ladder has done since its VM began.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Calls that were taken back.
    taken_back: u64,
    /// Rungs above that.
    rungs: u64,
    /// Why the driver is not run or not isolated any more.
    given_up: Option<String>,
}

/// What matters here of a `ViolationReport` of `isolation`.
#[derive(Deserialize)]
struct Report {
    at_ns: u64,
    phases: AbortPhases,
}

impl Worker {
    /// What the VM, the ladder and the console say afterwards.
    pub(super) fn look(
        &mut self,
        way: Way,
        fault: &Fault,
        (since_ns, before, silent): (u64, Counters, bool),
        seen: &mut Seen,
    ) -> anyhow::Result<()> {
        // The ladder asks the agent itself.
        self.guest.agent().disconnect();
        self.wait_for_ladder()?;
        let console = self.guest.console_from(self.heard);
        let is_over = has_panicked(&console) || console.lines().any(is_stall);
        let limit = match silent && way == Way::Native {
            // It was asked for as long already.
            true => ANSWER_TIME / 2,
            false => ANSWER_TIME,
        };
        seen.answers = !is_over && self.guest.agent().hello(limit).is_ok();
        let faults = faults(&mut self.control, &self.workload.driver)?;
        let reached_ns = faults.calls.and_then(|count| count.reached_ns);
        let reached = match (fault, way) {
            (Fault::Edge(..), _) => {
                let armed = self.calm_edge()?;
                Some((true, armed.iter().any(|one| one.status.struck > 0)))
            }
            (_, Way::Native) => faults
                .own_text
                .map(|fault| (fault.tells, fault.reached_ns.is_some())),
            (_, Way::Once | Way::Stays) => faults.calls.map(|count| (true, count.reached > 0)),
        };
        seen.reached = reached.and_then(|(tells, reached)| tells.then_some(reached));
        if way != Way::Native {
            let after = self.counters()?;
            seen.taken_back = after.taken_back.saturating_sub(before.taken_back);
            seen.rungs = after.rungs.saturating_sub(before.rungs);
            seen.given_up = after.given_up;
            seen.violation = self.first_violation(since_ns, reached_ns, seen.taken_back)?;
            if seen.taken_back > 0 && matches!(fault, Fault::Code(..)) {
                // A driver that was restarted has forgotten it.
                seen.reached = Some(true);
            }
        }
        let looks_again = seen.rungs > 0 || seen.taken_back > 0 && !seen.works;
        if looks_again && seen.answers {
            // It was restarted meanwhile, or the call that failed was one of those by which it was
            // seen: what counts is whether it works now.
            let works = self.workload.works_alone(INTERFACE, GATEWAY);
            seen.works = self.guest.shell(&works).is_ok();
        }
        let new = self.guest.console_from(self.heard);
        let bad = new.lines().filter(|line| is_bad(line));
        seen.log = bad.take(MAX_LINES).map(str::to_owned).collect();
        let damage = seen.log.iter().filter(|line| is_damage(line));
        seen.elsewhere.extend(damage.cloned());
        self.heard = self.guest.console_bytes();
        Ok(())
    }

    /// The first call since `since_ns` that was taken back, of so many; the fault was first come to
    /// at `reached_ns`. `None` where it is not among those that are still known: the last ones, and
    /// none of before a restart.
    pub(super) fn first_violation(
        &mut self,
        since_ns: u64,
        reached_ns: Option<u64>,
        taken_back: u64,
    ) -> anyhow::Result<Option<Detected>> {
        let request = Request::Violations {
            module: self.workload.driver.clone(),
        };
        let Reply::Violations { reports, texts, .. } = self.control.ask(&request)? else {
            bail!("the VM answered something else");
        };
        let reports: Vec<Report> = serde_json::from_value(reports)?;
        let since: Vec<_> = reports
            .into_iter()
            .zip(texts)
            .filter(|(report, _)| report.at_ns >= since_ns)
            .collect();
        let all_known = u64::try_from(since.len()).is_ok_and(|known| known >= taken_back);
        let first = since.into_iter().next().filter(|_| all_known);
        Ok(first.map(|(report, text)| Detected {
            says: text,
            after_ns: reached_ns.map(|reached| report.at_ns.saturating_sub(reached)),
            rollback_ns: report.phases.total_ns(),
        }))
    }

    /// What counts of a ladder and goes on over rewinds.
    pub(super) fn counters(&mut self) -> anyhow::Result<Counters> {
        let status = self.control.status()?;
        let mut all = status.isolation.iter();
        let broken = all.find(|status| status.module == self.workload.driver);
        let broken = broken.and_then(|status| status.broken.clone());
        let Some(ladder) = status.recovery.get(&self.workload.driver) else {
            return Ok(Counters {
                given_up: broken,
                ..Counters::default()
            });
        };
        let rungs = ladder.rungs;
        let above = [
            rungs.resumes,
            rungs.restarts,
            rungs.rewinds,
            rungs.resets,
            rungs.stops,
        ];
        let above = above.into_iter().fold(0, u64::saturating_add);
        let calls = rungs.errors.saturating_add(rungs.retries);
        Ok(Counters {
            taken_back: calls.saturating_add(above),
            rungs: above,
            given_up: ladder.gave_up.clone().or(broken),
        })
    }

    /// Waits until the ladder has done what it is at.
    fn wait_for_ladder(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + LADDER_TIME;
        loop {
            let status = self.control.status()?;
            let at_work = status
                .recovery
                .get(&self.workload.driver)
                .is_some_and(|ladder| {
                    matches!(
                        ladder.state,
                        State::Resuming | State::Restarting | State::Resetting
                    )
                });
            if !at_work || Instant::now() >= deadline {
                return Ok(());
            }
            std::thread::sleep(POLL);
        }
    }
}

/// What has become of the faults in this driver.
pub(super) fn faults(control: &mut ControlClient, driver: &str) -> anyhow::Result<FaultsState> {
    let request = Request::Faults {
        module: driver.to_owned(),
    };
    match control.ask(&request)? {
        Reply::Faults(faults) => Ok(faults),
        other => bail!("the VM answered something else: {other:?}"),
    }
}
