//! A VM in which trials are run: a guest whose driver works, at a mark without isolation and at one
//! with it.
//!
//! ```text
//!   boot ─► driver, network, contents ─► mark "native" ─► isolate, warm up ─► mark "isolated"
//!              run: rewind to one of the two ─► fault ─► workload ─► what was seen
//!                                                 └ in the driver's code, or at its device's edge
//! ```

mod baseline;
mod edge;
mod going_back;
mod look;
mod twins;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use agent_protocol::message::Bytes;
use anyhow::{Context, bail, ensure};
use devices::clock::monotonic_ns;
use devices::edge::{EdgeKind, When};
use devices::hold::CheckpointBy;
use isolation::attach::plan::Wanted;
use isolation::attach::request::Contain;
use isolation::dispatch::fault::{UsedUpBy, WhichCalls};
use isolation::mutation::Mutation;
use isolation::status::ModuleStatus;
use recovery::campaign::Way;
use recovery::campaign::kind::TrialKind;
use recovery::campaign::times::Times;
use recovery::campaign::verdict::Seen;
use recovery::campaign::workload::{
    Calls, Outcome, Steps, Workload, preparation, watch_as_usual, watch_closely,
};
use recovery::ladder::LadderConfig;
use recovery::request::Spilling;
use serde::{Deserialize, Serialize};

use super::millis;
use super::patience::{Heard, listen, output_of};
use crate::bench::guest::{BOOT_TIME, Guest, GuestOptions};
use crate::bench::network::{self, GATEWAY, INTERFACE, LINK_TIME};
use crate::control::client::ControlClient;
use crate::control::protocol::{FaultyCalls, FunctionBytes, Reply, Request};
use baseline::{Baseline, Laps};
use edge::order;
use going_back::{PATIENCE, unless_refused};
use look::faults;
use twins::Twins;

/// Names of the marks.
const NATIVE: &str = "native";
const ISOLATED: &str = "isolated";

/// How long the workload may take before it is known how long it takes.
const FIRST_TIME: Duration = Duration::from_secs(300);

/// What is to be tried.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The guest, with what the workload needs.
    pub guest: GuestOptions,
    /// What it does, and its driver.
    pub workload: Workload,
    /// How stores of isolated calls are checked.
    pub contain: Contain,
    /// Which steps of the work are done in a trial.
    pub steps: Steps,
    /// Runs without a fault that the memory of isolated runs is compared with; 0: it is not.
    pub twins: u32,
}

/// A fault to be put in.
#[derive(Debug, Clone)]
pub enum Fault {
    /// In this function.
    Code(String, Mutation),
    /// At the device's edge: of this kind, after so many of the events that it can strike at, with
    /// this seed.
    Edge(EdgeKind, u64, u64),
}

/// Calls of an isolated function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryCalls {
    /// Its name.
    pub name: String,
    /// Its calls.
    pub calls: u64,
    /// Of these, calls that were taken back.
    pub taken_back: u64,
    /// Times that calls went on in the guest, or were given back to it.
    pub in_the_guest: u64,
}

/// How a part of the workload ended without a fault.
pub struct Round {
    /// It came to its end.
    pub finished: bool,
    /// At its end the device worked.
    pub works: bool,
    /// What was otherwise than it was sent or written.
    pub corrupted: u64,
    /// Steps that ended otherwise than when the guest was made ready.
    pub differs: Vec<String>,
}

/// A VM at its marks.
pub struct Worker {
    guest: Guest,
    control: ControlClient,
    workload: Workload,
    /// Steps that call the functions; nothing where all are done.
    calls: Calls,
    kernel: String,
    texts: Vec<(String, FunctionBytes)>,
    native: Baseline,
    isolated: Baseline,
    /// Of the kinds of faults at the device's edge that are to be tried and that it has: events of
    /// a run without a fault that one can strike at.
    events: BTreeMap<&'static str, u64>,
    /// Bytes of the console that are of earlier runs.
    heard: u64,
    twins: Twins,
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
            calls: Calls::default(),
            kernel,
            texts: Vec::new(),
            native: Baseline::default(),
            isolated: Baseline::default(),
            events: BTreeMap::new(),
            heard: 0,
            twins: Twins::None,
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
        worker.guest.shell(&watch_closely())?;
        worker.mark(NATIVE)?;
        worker.watch_edge(kinds)?;
        worker.native = worker.healthy(NATIVE)?;
        worker.count_events()?;
        let in_code = |kind: &TrialKind| matches!(kind, TrialKind::Code(_));
        if setup.steps == Steps::Called && kinds.iter().any(in_code) {
            progress("which functions each step of it calls");
            worker.learn_calls(progress)?;
        }
        worker.rewind(NATIVE)?;
        worker.guest.shell(&watch_as_usual())?;
        worker.guest.agent().disconnect();
        worker.control.ask(&Request::Isolate {
            module: setup.workload.driver.clone(),
            entries: Wanted::Named(setup.workload.entries.clone()),
            budget_us: None,
            device_checkpoint: CheckpointBy::Exact,
            recovery: LadderConfig::default(),
            spilling: Spilling::default(),
            contain: setup.contain,
            keep_faults: None,
        })?;
        progress("the same with the driver isolated");
        let warm = worker.work(&setup.workload, FIRST_TIME)?;
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
        if setup.twins > 0 {
            progress("which memory changes by itself");
            worker.learn(setup.twins)?;
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

    /// Names of the steps that are done with a fault in this function; none if all are.
    pub fn steps_for(&self, function: &str) -> Vec<String> {
        match self.calls.is_empty() {
            true => Vec::new(),
            false => self.workload.steps_for(&self.calls, function),
        }
    }

    /// Has the guest tell which functions each step calls.
    fn learn_calls(&mut self, progress: &mut dyn FnMut(&str)) -> anyhow::Result<()> {
        self.rewind(NATIVE)?;
        let script = self.workload.traced_script(INTERFACE, GATEWAY);
        let output = output_of(&mut self.guest, self.heard, script, FIRST_TIME);
        self.calls = self.workload.read_calls(&output);
        if self.calls.is_empty() {
            progress("its kernel does not tell: each trial has all of the work");
        }
        Ok(())
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

    /// Runs these steps of the workload (all if there are none) from a mark with a fault; `None` if
    /// the fault cannot be put in. Where memory differs that no twin changes, the run is made once
    /// more.
    ///
    /// # Errors
    /// The VM does not do what it is asked for: another one is needed.
    pub fn run(
        &mut self,
        way: Way,
        fault: &Fault,
        steps: &[String],
    ) -> anyhow::Result<Option<Seen>> {
        let mut seen = self.run_once(way, fault, steps)?;
        if let Some(seen) = seen.as_mut().filter(|seen| !seen.bystanders.is_empty()) {
            self.confirm((way, fault), steps, seen)?;
        }
        Ok(seen)
    }

    fn run_once(
        &mut self,
        way: Way,
        fault: &Fault,
        steps: &[String],
    ) -> anyhow::Result<Option<Seen>> {
        let part = self.workload.only(steps);
        let begun = Instant::now();
        let mark = match way {
            Way::Native => NATIVE,
            Way::Once | Way::Stays => ISOLATED,
        };
        let mut watch = Laps(begun);
        let mut times = Times::default();
        self.rewind(mark)?;
        times.rewind = watch.lap(None);
        let (since_ns, before) = (monotonic_ns(), self.counters()?);
        let request = self.request(way, fault);
        if let Err(error) = self.control.ask(&request) {
            // A process that has ended answers nothing either.
            self.control.status()?;
            tracing::debug!("{fault:?}: {error:#}");
            return Ok(None);
        }
        times.fault = watch.lap(None);
        let (outcome, heard) = self.work_with(way, fault, &part);
        times.begin = watch.lap(heard.began);
        times.work = watch.lap(heard.over);
        times.checks = match heard.over {
            Some(_) => watch.lap(None),
            None => 0,
        };
        let mut seen = Seen {
            finished: outcome.finished,
            differs: outcome.differs(&self.baseline(way).outcome, &part),
            corrupted: outcome.corrupted,
            works: outcome.works,
            ..Seen::default()
        };
        if outcome.contents_changed {
            seen.elsewhere.push("contents of a file".to_owned());
        }
        self.look(way, fault, (since_ns, before, heard.silent), &mut seen)?;
        seen.bystanders = self.bystanders(way, &seen)?;
        times.look = watch.lap(None);
        seen.took_ms = millis(begun.elapsed());
        seen.times = Some(times);
        Ok(Some(seen))
    }

    /// These steps of the workload from where the guest is, with its driver isolated and without a
    /// fault.
    ///
    /// # Errors
    /// The VM does not do what it is asked for.
    pub fn round(&mut self, part: &Workload) -> anyhow::Result<Round> {
        let outcome = self.work(part, self.isolated.limits(part, Way::Stays).all)?;
        Ok(Round {
            finished: outcome.finished,
            works: outcome.works,
            corrupted: outcome.corrupted,
            differs: outcome.differs(&self.isolated.outcome, part),
        })
    }

    /// Calls of each isolated function since the driver was isolated, and what those did that were
    /// taken back, as far as it is known.
    pub fn calls(&mut self) -> anyhow::Result<(Vec<EntryCalls>, Vec<String>)> {
        let Some(status) = self.module()? else {
            bail!("the driver is not isolated any more");
        };
        let sum = |counts: &BTreeMap<String, u64>| counts.values().sum::<u64>();
        let entries = status.entries.iter().map(|entry| EntryCalls {
            name: entry.name.clone(),
            calls: entry.calls,
            taken_back: entry.aborts,
            in_the_guest: sum(&entry.spills) + sum(&entry.pass_throughs),
        });
        let request = Request::Violations {
            module: self.workload.driver.clone(),
        };
        let Reply::Violations { texts, .. } = self.control.ask(&request)? else {
            bail!("the VM answered something else");
        };
        Ok((entries.collect(), texts))
    }

    /// The workload from a mark without a fault, twice: what ends alike, and how long it took.
    fn healthy(&mut self, mark: &str) -> anyhow::Result<Baseline> {
        let workload = self.workload.clone();
        let mut once = || {
            self.rewind(mark)?;
            let begun = Instant::now();
            let outcome = self.work(&workload, FIRST_TIME)?;
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
            took: slow.max(slower),
        })
    }

    fn baseline(&self, way: Way) -> &Baseline {
        match way {
            Way::Native => &self.native,
            Way::Once | Way::Stays => &self.isolated,
        }
    }

    /// Has the guest do this part of the workload.
    fn work(&mut self, part: &Workload, limit: Duration) -> anyhow::Result<Outcome> {
        let script = part.script(INTERFACE, GATEWAY);
        let output = output_of(&mut self.guest, self.heard, script, limit);
        Ok(part.read_output(&output))
    }

    /// The same with a fault, and what it said when. The checks behind the work are not waited for
    /// where nobody has come to the fault.
    fn work_with(&mut self, way: Way, fault: &Fault, part: &Workload) -> (Outcome, Heard) {
        let script = part.script(INTERFACE, GATEWAY);
        let limits = self.baseline(way).limits(part, way);
        let (control, driver) = (&mut self.control, &self.workload.driver);
        let mut may_be_reached = || {
            way != Way::Native
                || matches!(fault, Fault::Edge(..))
                || faults(control, driver)
                    .ok()
                    .and_then(|faults| faults.own_text)
                    .is_none_or(|fault| !fault.tells || fault.reached_ns.is_some())
        };
        let (guest, heard) = (&mut self.guest, self.heard);
        let heard = listen(guest, heard, script, &limits, &mut may_be_reached);
        let mut outcome = part.read_output(&heard.output);
        outcome.finished |= heard.cut;
        tracing::debug!("{outcome:?}");
        (outcome, heard)
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
        let rewind = Request::Rewind {
            name: Some(name.to_owned()),
        };
        let module = self.workload.driver.clone();
        let rewound = unless_refused(
            &mut self.control,
            PATIENCE,
            |control| control.ask(&rewind),
            |control| {
                let module = module.clone();
                // There may be none.
                let _ = control.ask(&Request::UndoFaults { module });
            },
        )?;
        tracing::debug!("{rewound:?}");
        // What was said before is of a run that is over, and campaigns have many.
        self.heard = self.guest.cut_console();
        Ok(())
    }

    fn module(&mut self) -> anyhow::Result<Option<ModuleStatus>> {
        let status = self.control.status()?;
        let mut all = status.isolation.into_iter();
        Ok(all.find(|status| status.module == self.workload.driver))
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
