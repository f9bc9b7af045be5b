//! A VM in which trials are run: a guest whose driver works, at a mark without isolation and at one with it.
//!
//! ```text
//!   boot ─► driver, network, contents ─► mark "native" ─► isolate, warm up ─► mark "isolated"
//!              run: rewind to one of the two ─► fault ─► workload ─► what was seen
//!                                                 └ in the driver's code, or at its device's edge
//! ```

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use agent_protocol::message::{Bytes, Exec};
use anyhow::{Context, bail, ensure};
use devices::clock::monotonic_ns;
use devices::edge::{EdgeKind, EdgeOrder, When};
use devices::hold::CheckpointBy;
use isolation::attach::plan::Wanted;
use isolation::attach::request::Contain;
use isolation::dispatch::fault::{UsedUpBy, WhichCalls};
use isolation::domain::transaction::AbortPhases;
use isolation::mutation::Mutation;
use isolation::status::ModuleStatus;
use recovery::campaign::Way;
use recovery::campaign::kind::TrialKind;
use recovery::campaign::verdict::{Detected, Seen, is_bad, is_damage};
use recovery::campaign::workload::{Outcome, Workload, preparation};
use recovery::ladder::{LadderConfig, State};
use recovery::request::Spilling;
use serde::Deserialize;

use super::patience::exec_unless;
use crate::bench::guest::{BOOT_TIME, Guest, GuestOptions, text_from};
use crate::bench::network::{self, GATEWAY, INTERFACE, LINK_TIME};
use crate::control::client::ControlClient;
use crate::control::protocol::{
    Disturbance, FaultsState, FaultyCalls, FunctionBytes, Reply, Request,
};

/// Names of the marks.
const NATIVE: &str = "native";
const ISOLATED: &str = "isolated";

/// How long the workload may take before it is known how long it takes.
const FIRST_TIME: Duration = Duration::from_secs(300);

/// How many times as long as without a fault it may take, and how much longer: retries of a network take seconds, and
/// a lab is not always as fast.
const TIMES: u32 = 3;
const LONGER: Duration = Duration::from_secs(10);

/// How long an agent that lives takes to answer at most.
const ANSWER_TIME: Duration = Duration::from_secs(10);

/// How long a ladder may be at work.
const LADDER_TIME: Duration = Duration::from_secs(120);

/// Between two looks at something that will change.
const POLL: Duration = Duration::from_millis(50);

/// Longest output of a workload that is looked at, in bytes: an honest one writes a few thousand.
const MAX_OUTPUT: usize = 1 << 20;

/// Most lines of the kernel's log that are kept.
const MAX_LINES: usize = 40;

/// What is to be tried.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The guest, with what the workload needs.
    pub guest: GuestOptions,
    /// What it does, and its driver.
    pub workload: Workload,
    /// How stores of isolated calls are checked.
    pub contain: Contain,
}

/// A fault to be put in.
#[derive(Debug, Clone)]
pub enum Fault {
    /// In this function.
    Code(String, Mutation),
    /// At the device's edge: of this kind, after so many of the events that it can strike at, with this seed.
    Edge(EdgeKind, u64, u64),
}

/// How the workload ends without a fault, and how long it may take with one.
#[derive(Default)]
struct Baseline {
    outcome: Outcome,
    limit: Duration,
}

/// What a ladder has done since its VM began.
#[derive(Debug, Default)]
struct Counters {
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

/// A VM at its marks.
pub struct Worker {
    guest: Guest,
    control: ControlClient,
    workload: Workload,
    kernel: String,
    texts: Vec<(String, FunctionBytes)>,
    native: Baseline,
    isolated: Baseline,
    /// Of the kinds of faults at the device's edge that are to be tried and that it has: events of a run without a fault that one
    /// can strike at.
    events: BTreeMap<&'static str, u64>,
    /// Bytes of the console that are of earlier runs.
    heard: u64,
}

impl Worker {
    /// Boots a guest and takes it to its marks, for trials of these kinds.
    pub fn start(
        setup: &Setup,
        kinds: &[TrialKind],
        progress: &mut dyn FnMut(&str),
    ) -> anyhow::Result<Self> {
        progress("booting a guest");
        let mut guest = Guest::boot(&setup.guest, BOOT_TIME)?;
        make_ready(&mut guest, &setup.workload)?;
        let agent = guest.agent().agent();
        let agent = agent.context("the guest's agent is not connected")?;
        let kernel = agent.kernel.clone();
        let mut worker = Self {
            control: guest.control()?,
            guest,
            workload: setup.workload.clone(),
            kernel,
            texts: Vec::new(),
            native: Baseline::default(),
            isolated: Baseline::default(),
            events: BTreeMap::new(),
            heard: 0,
        };
        progress("reading the driver's code");
        worker.guest.agent().disconnect();
        for function in setup.workload.functions() {
            let request = Request::FunctionText {
                module: setup.workload.driver.clone(),
                function: function.clone(),
            };
            let Reply::FunctionText(text) = worker.control.ask(&request)? else {
                bail!("the VM answered something else");
            };
            worker.texts.push((function.clone(), text));
        }
        progress("how the guest's work ends without a fault");
        worker.mark(NATIVE)?;
        worker.watch_edge(kinds)?;
        worker.native = worker.healthy(NATIVE)?;
        worker.count_events()?;
        worker.rewind(NATIVE)?;
        worker.control.ask(&Request::Isolate {
            module: setup.workload.driver.clone(),
            entries: Wanted::Named(setup.workload.entries.clone()),
            budget_us: None,
            device_checkpoint: CheckpointBy::Exact,
            recovery: LadderConfig::default(),
            spilling: Spilling::default(),
            contain: setup.contain,
        })?;
        progress("the same with the driver isolated");
        let warm = worker.work(FIRST_TIME)?;
        ensure!(
            warm.works,
            "the device does not work when its driver is isolated"
        );
        worker.mark(ISOLATED)?;
        worker.isolated = worker.healthy(ISOLATED)?;
        let Some(status) = worker.module()? else {
            bail!("the driver is not isolated any more");
        };
        if status.violations > 0 {
            let first = worker.first_violation(0, None, 0)?;
            bail!(
                "{} calls were taken back without a fault, and `cofferdam campaign` cannot tell them from those with one; the first that is known: {}",
                status.violations,
                first.map_or("none".to_owned(), |first| first.says)
            );
        }
        worker.heard = worker.guest.console_bytes();
        Ok(worker)
    }

    /// The functions with their code.
    pub fn texts(&self) -> &[(String, FunctionBytes)] {
        &self.texts
    }

    /// Release of the guest's kernel.
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    /// How many events of a run without a fault one of this kind can strike at; 0 if the device cannot fail so.
    pub fn events(&self, kind: EdgeKind) -> u64 {
        self.events.get(kind.name()).copied().unwrap_or(0)
    }

    /// Has the device's edge count what faults of these kinds could strike at.
    fn watch_edge(&mut self, kinds: &[TrialKind]) -> anyhow::Result<()> {
        for kind in kinds {
            let TrialKind::Edge(kind) = *kind else {
                continue;
            };
            let order = order(kind, u64::MAX, 0);
            let request = Request::Disturb { nic: None, order };
            if let Err(error) = self.control.tell(&request) {
                // A process that has ended answers nothing either.
                self.control.status()?;
                tracing::debug!("{}: {error:#}", kind.name());
            }
        }
        Ok(())
    }

    /// What it has counted, in two runs.
    fn count_events(&mut self) -> anyhow::Result<()> {
        for disturbance in self.calm_edge()? {
            let status = disturbance.status;
            self.events
                .insert(status.order.kind.name(), status.matched / 2);
        }
        Ok(())
    }

    /// Takes back what goes wrong at the device's edge.
    fn calm_edge(&mut self) -> anyhow::Result<Vec<Disturbance>> {
        let all = Request::Undisturb {
            nic: None,
            number: None,
        };
        match self.control.ask(&all)? {
            Reply::Disturbances { disturbances } => Ok(disturbances),
            other => bail!("the VM answered something else: {other:?}"),
        }
    }

    /// What has the fault be there when the guest comes to it.
    fn request(&self, way: Way, fault: &Fault) -> Request {
        let (function, mutation) = match fault {
            Fault::Code(function, mutation) => (function, mutation),
            Fault::Edge(kind, after, seed) => {
                let when = match way {
                    Way::Once => When::Once,
                    Way::Native | Way::Stays => When::Always,
                };
                let order = order(*kind, *after, *seed).when(when);
                return Request::Disturb { nic: None, order };
            }
        };
        let times = match way {
            Way::Native => None,
            Way::Once => Some(1),
            Way::Stays => Some(u64::MAX),
        };
        Request::InjectCode {
            module: self.workload.driver.clone(),
            function: function.clone(),
            offset: mutation.offset.into(),
            old: Bytes(mutation.old.clone()),
            new: Bytes(mutation.new.clone()),
            replaces_whole: mutation.replaces_whole,
            calls: times.map(|times| FaultyCalls {
                which: WhichCalls::ALL,
                times,
                used_up_by: UsedUpBy::Reaching,
            }),
        }
    }

    /// Runs the workload from a mark with a fault; `None` if the fault cannot be put in.
    ///
    /// # Errors
    /// The VM does not do what it is asked for: another one is needed.
    pub fn run(&mut self, way: Way, fault: &Fault) -> anyhow::Result<Option<Seen>> {
        let begun = Instant::now();
        let mark = match way {
            Way::Native => NATIVE,
            Way::Once | Way::Stays => ISOLATED,
        };
        self.rewind(mark)?;
        let (since_ns, before) = (monotonic_ns(), self.counters()?);
        let request = self.request(way, fault);
        if let Err(error) = self.control.tell(&request) {
            // A process that has ended answers nothing either.
            self.control.status()?;
            tracing::debug!("{fault:?}: {error:#}");
            return Ok(None);
        }
        let limit = self.baseline(way).limit;
        let outcome = self.work(limit).unwrap_or_default();
        let mut seen = Seen {
            finished: outcome.finished,
            differs: outcome.differs(&self.baseline(way).outcome),
            corrupted: outcome.corrupted,
            works: outcome.works,
            ..Seen::default()
        };
        if outcome.contents_changed {
            seen.elsewhere.push("contents of a file".to_owned());
        }
        self.look(way, fault, (since_ns, before), &mut seen)?;
        seen.took_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        Ok(Some(seen))
    }

    /// What the VM, the ladder and the console say afterwards.
    fn look(
        &mut self,
        way: Way,
        fault: &Fault,
        (since_ns, before): (u64, Counters),
        seen: &mut Seen,
    ) -> anyhow::Result<()> {
        // The ladder asks the agent itself.
        self.guest.agent().disconnect();
        self.wait_for_ladder()?;
        let panicked = has_panicked(&self.guest.console_from(self.heard));
        seen.answers = !panicked && self.guest.agent().hello(ANSWER_TIME).is_ok();
        let faults = self.faults()?;
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
        if seen.rungs > 0 && seen.answers {
            // It was restarted meanwhile: what counts is whether it works now.
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

    /// The first call since `since_ns` that was taken back, of so many; the fault was first come to at `reached_ns`. `None` where
    /// it is not among those that are still known: the last ones, and none of before a restart.
    fn first_violation(
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
    fn counters(&mut self) -> anyhow::Result<Counters> {
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

    /// The workload from a mark without a fault, twice: what ends alike, and how long it took.
    fn healthy(&mut self, mark: &str) -> anyhow::Result<Baseline> {
        let mut once = || {
            self.rewind(mark)?;
            let begun = Instant::now();
            let outcome = self.work(FIRST_TIME)?;
            ensure!(
                outcome.finished && outcome.works && outcome.corrupted == 0,
                "the workload does not end well without a fault: {outcome:?}{}",
                self.guest.last_words()
            );
            Ok((outcome, begun.elapsed()))
        };
        let (first, slow) = once()?;
        let (second, slower) = once()?;
        Ok(Baseline {
            outcome: first.alike(&second),
            limit: slow.max(slower) * TIMES + LONGER,
        })
    }

    fn baseline(&self, way: Way) -> &Baseline {
        match way {
            Way::Native => &self.native,
            Way::Once | Way::Stays => &self.isolated,
        }
    }

    fn work(&mut self, limit: Duration) -> anyhow::Result<Outcome> {
        self.guest.agent().disconnect();
        let mut output = Vec::new();
        let script = self.workload.script(INTERFACE, GATEWAY);
        let exec = Exec {
            argv: ["sh", "-c", &script].map(str::to_owned).to_vec(),
            limit_ms: Some(u64::try_from(limit.as_millis())?),
            ..Exec::default()
        };
        let mut collect = |bytes: Vec<u8>| {
            if output.len() < MAX_OUTPUT {
                output.extend(bytes);
            }
        };
        let (console, heard) = (self.guest.console_file(), self.heard);
        let has_ended = || has_panicked(&text_from(&console, heard));
        // What it said before it hung counts.
        let agent = self.guest.paths().agent_socket();
        let _ended = exec_unless(has_ended, &agent, exec, &mut collect);
        Ok(self.workload.read_output(&String::from_utf8_lossy(&output)))
    }

    fn mark(&mut self, name: &str) -> anyhow::Result<()> {
        self.guest.agent().disconnect();
        self.control.ask(&Request::Mark {
            name: name.to_owned(),
        })?;
        Ok(())
    }

    fn rewind(&mut self, name: &str) -> anyhow::Result<()> {
        self.guest.agent().disconnect();
        self.control.ask(&Request::Rewind {
            name: Some(name.to_owned()),
        })?;
        Ok(())
    }

    fn module(&mut self) -> anyhow::Result<Option<ModuleStatus>> {
        let status = self.control.status()?;
        let mut all = status.isolation.into_iter();
        Ok(all.find(|status| status.module == self.workload.driver))
    }

    fn faults(&mut self) -> anyhow::Result<FaultsState> {
        let request = Request::Faults {
            module: self.workload.driver.clone(),
        };
        match self.control.ask(&request)? {
            Reply::Faults(faults) => Ok(faults),
            other => bail!("the VM answered something else: {other:?}"),
        }
    }
}

/// A fault of this kind at an edge, after so many events, with all that the kind needs from the seed.
fn order(kind: EdgeKind, after: u64, seed: u64) -> EdgeOrder {
    let order = EdgeOrder::new(kind).after(after).seed(seed);
    match kind {
        EdgeKind::LoadValue => order.value(seed),
        _ => order,
    }
}

/// Loads the driver, and brings the guest to where its work begins.
fn make_ready(guest: &mut Guest, workload: &Workload) -> anyhow::Result<()> {
    let load = |guest: &mut Guest, module: &str, parameters: &str| {
        let loaded = guest.agent().load_module(module, parameters);
        loaded.with_context(|| format!("cannot insert {module}"))
    };
    load(guest, &workload.driver, &workload.parameters)?;
    for module in &workload.modules {
        load(guest, module, "")?;
    }
    if workload.network {
        network::configure(guest)?;
        network::wait_for_link(guest, LINK_TIME)?;
    }
    guest.shell(&preparation())?;
    guest.shell(&workload.prepare)?;
    Ok(())
}

/// Whether this is of the console of a guest whose kernel has panicked (`panic` in kernel/panic.c).
fn has_panicked(console: &str) -> bool {
    console.contains("Kernel panic - not syncing")
}
