//! A VM in which modules are swept, one after the other from one mark.

mod fault;
mod said;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use devices::clock::monotonic_ns;
use devices::hold::CheckpointBy;
use isolation::attach::plan::Wanted;
use isolation::attach::request::Contain;
use isolation::domain::transaction::AbortPhases;
use isolation::status::{EntryStatus, ModuleStatus};
use recovery::campaign::verdict::is_bad;
use recovery::campaign::workload::{Outcome, Step, Workload, preparation};
use recovery::ladder::{LadderConfig, State};
use recovery::request::Spilling;
use recovery::sweep::record::{Called, Record, Verdict};
use recovery::sweep::{Case, loaded_name};
use serde::Deserialize;

use crate::bench::guest::{BOOT_TIME, Guest, GuestOptions};
use crate::campaign::patience::{has_panicked, output_of};
use crate::control::client::ControlClient;
use crate::control::protocol::{Reply, Request};

/// Names of the marks.
const BOOTED: &str = "booted";
const ISOLATED: &str = "isolated";

/// How long the work may take natively.
const FIRST_TIME: Duration = Duration::from_secs(120);
/// How many times as long it may take isolated, and how much longer: the first call of each
/// function makes its domain ready, and a lab is not always as fast.
const TIMES: u32 = 10;
const LONGER: Duration = Duration::from_secs(60);

/// How long a call may take, in microseconds: nothing here is to hang, and a lab beside others is
/// slow.
const BUDGET_US: u64 = 10_000_000;

/// How long an agent that lives takes to answer at most.
const ANSWER_TIME: Duration = Duration::from_secs(20);

/// How long a driver that is being restarted is waited for.
const REST_TIME: Duration = Duration::from_secs(120);
/// Between two looks at it.
const POLL: Duration = Duration::from_millis(200);

/// What an agent says of a module that there is none of in the guest's files.
const NO_MODULE: &str = "there is no module";

/// Most lines of each kind that are kept.
const MAX_LINES: usize = 12;

/// A VM at its first mark.
pub struct Vm {
    guest: Guest,
    control: ControlClient,
    kernel: String,
    /// Bytes of the console that are of earlier work.
    heard: u64,
    lives: bool,
}

/// What matters here of what isolating answers.
#[derive(Deserialize)]
struct Gates {
    entries: Vec<String>,
    refused: Vec<serde_json::Value>,
}

/// The module natively.
struct Native {
    outcome: Outcome,
    took: Duration,
    /// Whether it can be removed afterwards.
    removed: bool,
}

/// What matters here of a `ViolationReport` of `isolation`.
#[derive(Deserialize)]
struct Report {
    at_ns: u64,
    phases: AbortPhases,
}

impl Vm {
    /// Boots a guest and sets its first mark.
    pub fn start(options: &GuestOptions, progress: &mut dyn FnMut(&str)) -> anyhow::Result<Self> {
        progress("booting a guest");
        let mut guest = Guest::boot(options, BOOT_TIME)?;
        guest.shell(&preparation())?;
        let agent = guest.agent().agent();
        let kernel = agent
            .context("the guest's agent is not connected")?
            .kernel
            .clone();
        let mut vm = Self {
            control: guest.control()?,
            guest,
            kernel,
            heard: 0,
            lives: true,
        };
        vm.mark(BOOTED)?;
        Ok(vm)
    }

    /// Release of the guest's kernel.
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    /// Whether it does what it is asked for.
    pub fn lives(&self) -> bool {
        self.lives
    }

    /// Sweeps a module, with a fault in at most so many of its functions. A VM that does not do
    /// what it is asked for is lost.
    pub fn sweep(&mut self, case: &Case, faults: u32) -> Record {
        let begun = Instant::now();
        let mut record = Record {
            class: case.class.clone(),
            module: case.workload.driver.clone(),
            ..Record::default()
        };
        if let Err(error) = self.fill(case, faults, &mut record) {
            self.lives = false;
            record.answers = false;
            record.differs.push(format!("{error:#}"));
        }
        record.took_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        record
    }

    fn fill(&mut self, case: &Case, faults: u32, record: &mut Record) -> anyhow::Result<()> {
        let native = match self.natively(&case.workload)? {
            Ok(native) => native,
            Err(why) => {
                record.unfit = Some(why);
                return Ok(());
            }
        };
        record.restart_us = self.restart(&case.workload)?;
        self.go_to(BOOTED)?;
        self.load(&case.workload)?;
        if let Err(why) = self.isolate(&case.workload, record) {
            self.control.status()?;
            record.refused = Some(format!("{why:#}"));
            return Ok(());
        }
        self.forget(ISOLATED)?;
        self.mark(ISOLATED)?;
        self.isolated(&case.workload, &native, record)?;
        if record.answers {
            self.ask_why(&case.workload, &native, record)?;
        }
        if record.verdict() != Verdict::Right {
            return Ok(());
        }
        for function in fault::some(&record.called, faults) {
            let fault = self.with_fault(&case.workload, &native, &function)?;
            self.lives &= fault.answers;
            record.faults.push(fault);
            if !self.lives {
                break;
            }
        }
        Ok(())
    }

    /// The work without isolation; or why there is none to compare with.
    fn natively(&mut self, work: &Workload) -> anyhow::Result<Result<Native, String>> {
        self.go_to(BOOTED)?;
        if let Err(error) = self.load(work) {
            return Ok(Err(format!("{error:#}")));
        }
        let begun = Instant::now();
        let outcome = self.work(work, FIRST_TIME);
        let took = begun.elapsed();
        let log = self.log();
        let removed = self.guest.agent().remove_module(&loaded_name(&work.driver));
        let ended = |step: &Step| outcome.steps.get_key_value(&step.name);
        let mut steps = work.steps.iter().filter_map(ended);
        let bad = steps.find(|(_, status)| *status != "0");
        let why = match bad {
            _ if !outcome.finished => "its work does not come to its end".to_owned(),
            Some((step, status)) => format!("{step}: {status}{}", self.said(work, step)?),
            None if !outcome.works => format!("it does not work{}", self.said(work, "")?),
            None if outcome.corrupted > 0 => "contents change".to_owned(),
            None => match log.into_iter().next() {
                Some(line) => line,
                None => {
                    return Ok(Ok(Native {
                        outcome,
                        took,
                        removed: removed.is_ok(),
                    }));
                }
            },
        };
        Ok(Err(why))
    }

    /// How long it takes to remove the module, before there is anything that uses it, and to insert
    /// it again; `None` where it cannot be removed then.
    fn restart(&mut self, work: &Workload) -> anyhow::Result<Option<u64>> {
        self.go_to(BOOTED)?;
        self.load_others(work)?;
        self.insert(&work.driver, &work.parameters)?;
        let begun = Instant::now();
        let removed = self.guest.agent().remove_module(&loaded_name(&work.driver));
        if removed.is_err() {
            return Ok(None);
        }
        self.insert(&work.driver, &work.parameters)?;
        Ok(u64::try_from(begun.elapsed().as_micros()).ok())
    }

    /// Loads the module, and what it needs, and prepares its work.
    fn load(&mut self, work: &Workload) -> anyhow::Result<()> {
        self.load_others(work)?;
        self.insert(&work.driver, &work.parameters)?;
        self.guest
            .shell(&format!("({}\n) >/dev/null", work.prepare))?;
        Ok(())
    }

    /// Loads what the module needs.
    fn load_others(&mut self, work: &Workload) -> anyhow::Result<()> {
        for module in work.modules.iter().filter(|module| **module != work.driver) {
            match self.insert(module, "") {
                // Another kernel may have it built in. Where it is missing the work does not end
                // well.
                Err(error) if format!("{error:#}").contains(NO_MODULE) => {}
                inserted => inserted?,
            }
        }
        Ok(())
    }

    /// Loads one module, if it is not there: another one may have needed it.
    fn insert(&mut self, module: &str, parameters: &str) -> anyhow::Result<()> {
        match self.guest.agent().load_module(module, parameters) {
            Err(error) if error.errno() == Some(libc::EEXIST) => Ok(()),
            loaded => loaded
                .map(drop)
                .with_context(|| format!("cannot insert {module}")),
        }
    }

    fn isolate(&mut self, work: &Workload, record: &mut Record) -> anyhow::Result<()> {
        self.guest.agent().disconnect();
        let reply = self.control.ask(&Request::Isolate {
            module: loaded_name(&work.driver),
            entries: Wanted::All,
            budget_us: Some(BUDGET_US),
            device_checkpoint: CheckpointBy::Exact,
            recovery: LadderConfig::default(),
            spilling: Spilling::default(),
            contain: Contain::Full,
            keep_faults: None,
        })?;
        let Reply::Isolated(gates) = reply else {
            bail!("the VM answered something else");
        };
        let gates: Gates = serde_json::from_value(gates)?;
        record.gated = gates.entries.len();
        record.ungated = gates.refused.len();
        ensure!(record.gated > 0, "none of its functions can have a gate");
        Ok(())
    }

    /// The work with all functions isolated.
    fn isolated(
        &mut self,
        work: &Workload,
        native: &Native,
        record: &mut Record,
    ) -> anyhow::Result<()> {
        let begun_ns = monotonic_ns();
        let outcome = self.work(work, limit(native));
        self.guest.agent().disconnect();
        record.answers = self.answers();
        self.lives = record.answers;
        self.come_to_rest()?;
        record.differs = outcome.differs(&native.outcome, work);
        if !outcome.finished {
            record
                .differs
                .push("the work did not come to its end".to_owned());
        } else if !outcome.works {
            record
                .differs
                .push("it does not work afterwards".to_owned());
        }
        record.corrupted = outcome.corrupted;
        if outcome.contents_changed {
            record
                .log
                .push("a file of the guest's has changed".to_owned());
        }
        record.log.extend(self.log());
        if let Some(status) = self.module(&work.driver)? {
            record.broken = status.broken;
            record.called = status
                .entries
                .iter()
                .filter(|one| one.calls > 0)
                .map(called)
                .collect();
        }
        record.violations = self.violations(&work.driver, begun_ns)?;
        if record.answers && native.removed {
            self.guest.agent().disconnect();
            let module = loaded_name(&work.driver);
            // One that was restarted after a failure need not be isolated any more.
            let _ = self.control.ask(&Request::Release {
                module: module.clone(),
            });
            self.control.status()?;
            record.removed = self.guest.agent().remove_module(&module).is_ok();
        } else {
            record.removed = true;
        }
        Ok(())
    }

    fn work(&mut self, work: &Workload, limit: Duration) -> Outcome {
        let script = work.script("", Ipv4Addr::UNSPECIFIED);
        let output = output_of(&mut self.guest, self.heard, script, limit);
        work.read_output(&output)
    }

    fn answers(&mut self) -> bool {
        self.guest.agent().disconnect();
        let answers = !has_panicked(&self.guest.console_from(self.heard))
            && self.guest.agent().hello(ANSWER_TIME).is_ok();
        self.guest.agent().disconnect();
        answers
    }

    /// Lines of the kernel's log since this was asked last that count.
    fn log(&mut self) -> Vec<String> {
        let new = self.guest.console_from(self.heard);
        self.heard = self.guest.console_bytes();
        let bad = new.lines().filter(|line| is_bad(line));
        bad.take(MAX_LINES).map(str::to_owned).collect()
    }

    fn module(&mut self, module: &str) -> anyhow::Result<Option<ModuleStatus>> {
        let module = loaded_name(module);
        let all = self.control.status()?.isolation;
        Ok(all.into_iter().find(|status| status.module == module))
    }

    fn entry(&mut self, work: &Workload, function: &str) -> anyhow::Result<EntryStatus> {
        let status = self.module(&work.driver)?;
        let mut entries = status.into_iter().flat_map(|status| status.entries);
        let found = entries.find(|entry| entry.name == function);
        Ok(found.unwrap_or_default())
    }

    /// Waits until no driver is being restarted any more: the guest cannot be taken back meanwhile.
    fn come_to_rest(&mut self) -> anyhow::Result<()> {
        let begun = Instant::now();
        while begun.elapsed() < REST_TIME {
            let recovery = self.control.status()?.recovery;
            let at_rest = recovery.values().all(|ladder| {
                matches!(
                    ladder.state,
                    State::Running | State::Stopped | State::Unisolated
                )
            });
            if at_rest {
                break;
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// What calls did wrong since then (`CLOCK_MONOTONIC`), each once; also of a driver that was
    /// restarted for it.
    fn violations(&mut self, module: &str, since_ns: u64) -> anyhow::Result<Vec<String>> {
        let module = loaded_name(module);
        let Reply::Violations { all, texts, .. } =
            self.control.ask(&Request::Violations { module })?
        else {
            bail!("the VM answered something else");
        };
        let new = all.into_iter().filter(|one| one.last_ns >= since_ns);
        let mut known = BTreeSet::new();
        let mut texts: Vec<String> = texts.into_iter().chain(new.map(|one| one.text)).collect();
        texts.retain(|text| known.insert(text.clone()));
        texts.truncate(MAX_LINES);
        Ok(texts)
    }

    /// How long the first call that failed since then (`CLOCK_MONOTONIC`) took until its caller was
    /// about to run again, in microseconds; `None` where that is not known any more.
    fn returned_us(&mut self, module: &str, since_ns: u64) -> anyhow::Result<Option<u64>> {
        let module = loaded_name(module);
        let request = Request::Violations { module };
        let Reply::Violations { reports, .. } = self.control.ask(&request)? else {
            bail!("the VM answered something else");
        };
        let reports: Vec<Report> = serde_json::from_value(reports)?;
        let first = reports.iter().find(|report| report.at_ns >= since_ns);
        Ok(first.map(|report| report.phases.total_ns().div_ceil(1000)))
    }

    fn mark(&mut self, name: &str) -> anyhow::Result<()> {
        self.guest.agent().disconnect();
        self.control.ask(&Request::Mark {
            name: name.to_owned(),
        })?;
        Ok(())
    }

    /// Forgets a mark if there is one.
    fn forget(&mut self, name: &str) -> anyhow::Result<()> {
        let Reply::Marks { marks } = self.control.ask(&Request::Marks {})? else {
            bail!("the VM answered something else");
        };
        if marks.iter().any(|mark| mark.name == name) {
            let name = name.to_owned();
            self.control.ask(&Request::ForgetMark { name })?;
        }
        Ok(())
    }

    /// Goes back to a mark. That is refused while a driver is being restarted, which ends.
    fn go_to(&mut self, name: &str) -> anyhow::Result<()> {
        self.guest.agent().disconnect();
        self.come_to_rest()?;
        let begun = Instant::now();
        let request = Request::Rewind {
            name: Some(name.to_owned()),
        };
        while let Err(error) = self.control.ask(&request) {
            if begun.elapsed() > REST_TIME {
                return Err(error);
            }
            std::thread::sleep(POLL);
        }
        self.heard = self.guest.cut_console();
        Ok(())
    }
}

/// How long the work may take isolated.
fn limit(native: &Native) -> Duration {
    native.took * TIMES + LONGER
}

fn called(entry: &EntryStatus) -> Called {
    let mut outside = BTreeMap::new();
    for (reason, count) in entry.spills.iter().chain(&entry.pass_throughs) {
        *outside.entry(reason.clone()).or_default() += count;
    }
    Called {
        name: entry.name.clone(),
        calls: entry.calls,
        inside: entry.commits,
        taken_back: entry.aborts,
        outside,
    }
}
