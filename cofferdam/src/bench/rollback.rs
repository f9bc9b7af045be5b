//! How long a guest's network is gone when a failed call of its driver is rolled back.
//!
//! ```text
//! fault ─ detect ─ memory ─ device ─ returned ─┬─ irq_live   the guest takes an interrupt of the NIC
//!         └─ the VM's own clock ─────────────┘ ├─ first_tx   a frame of the guest
//!                                              └─ first_rx   a ping sent after the fault is answered
//! ```
//!
//! One fault at a time goes into one call. Each entry is isolated alone: a function that an isolated one
//! calls, directly or through the kernel, is part of that call. The gateway pings all the time, and
//! after the faults at one place the same operation must succeed.

use std::time::{Duration, Instant};

use agent_protocol::message::{Exec, ExecEnd};
use anyhow::{Context, bail, ensure};
use devices::hold::CheckpointBy;
use isolation::attach::plan::Wanted;
use isolation::attach::request::Contain;
use isolation::dispatch::fault::{FaultCount, InstructionAt};
use recovery::fault::{FaultKind, Place};
use recovery::ladder::{LadderConfig, OnFault};
use recovery::request::Spilling;
use serde::Deserialize;

use super::guest::Guest;
use super::network::{LINK_TIME, Probe};
use super::operation::Operation;
use super::recovery::DRIVER;
use super::spilled::GUEST_ONLY;
use crate::control::client::ControlClient;
use crate::control::protocol::{Reply, Request};
use crate::report::{Method, Phase, Recovery, RecoveryRun};

/// Entry points that are measured unless others are asked for: those whose calls do not sleep.
pub const ENTRIES: &[&str] = &[
    "e1000_xmit_frame",
    "e1000_clean",
    "e1000_intr",
    "e1000_get_ethtool_stats",
    "e1000_get_regs",
    "e1000_set_rx_mode",
    "e1000_set_mac",
];

/// Faults that are put in, in turn from place to place.
const FAULTS: [FaultKind; 2] = [FaultKind::NullDereference, FaultKind::UndefinedInstruction];

/// Time for a call in the domain, in microseconds: only a call that hangs should reach it.
const BUDGET_US: u64 = 10_000_000;

/// How long a call may be in coming once it was asked for.
const CALL_TIME: Duration = Duration::from_secs(5);

/// Calls that may miss an instruction before it counts as one that this operation does not reach.
const MISSES: u64 = 2;

/// Faults ordered at most for one rollback, at a place that calls do not always come by.
const TRIES: usize = 16;

/// Instructions tried at most to find one at a place that calls reach.
pub(super) const CANDIDATES: usize = 24;

/// Between two looks at something that will change. Moments are noted by the VM; who looks takes the processor away from
/// it where there is one for both.
const POLL: Duration = Duration::from_millis(20);

/// From seeing that a call failed to going on: the first packets come undisturbed.
const QUIET: Duration = Duration::from_millis(30);

/// Limit of a command in the guest, in milliseconds.
const COMMAND_MS: u64 = 10_000;

/// A rollback as the VM reports it (`isolation::status::report::ViolationReport`).
#[derive(Debug, Deserialize)]
pub(super) struct RolledBack {
    entry: String,
    at_ns: u64,
    phases: Phases,
    pub(super) violation: Violated,
    pub(super) stays: Option<String>,
}

/// `isolation::domain::violation::Violation`
#[derive(Debug, Deserialize)]
pub(super) struct Violated {
    pub(super) spills: u32,
}

/// `isolation::domain::transaction::AbortPhases`
#[derive(Debug, Deserialize)]
struct Phases {
    detect_ns: u64,
    memory_ns: u64,
    device_ns: u64,
    compensate_ns: u64,
    returned_ns: u64,
}

impl RolledBack {
    /// The phases that the VM times itself.
    pub(super) fn run(&self) -> RecoveryRun {
        let Phases {
            detect_ns,
            memory_ns,
            device_ns,
            compensate_ns,
            returned_ns,
        } = self.phases;
        let mut run = RecoveryRun::default();
        let mut at = 0_u64;
        let mut add = |phase, ns: u64| {
            at = at.saturating_add(ns);
            run.at_us.insert(phase, at as f64 / 1e3);
        };
        add(Phase::Detect, detect_ns);
        add(Phase::Memory, memory_ns);
        // What did not run is absent.
        if device_ns > 0 {
            add(Phase::Device, device_ns);
        }
        if compensate_ns > 0 {
            add(Phase::Compensate, compensate_ns);
        }
        add(Phase::Returned, returned_ns);
        run
    }
}

/// Measures rollbacks of `entries` in `guest`, `runs` of each, in turn at each place. If `spilled`, their calls go on
/// in the guest and fail after that.
pub fn measure(
    guest: &mut Guest,
    probe: &mut Probe,
    entries: &[String],
    spilled: bool,
    runs: usize,
    progress: &mut dyn FnMut(&str),
    all: &mut Vec<Recovery>,
) -> anyhow::Result<()> {
    let control = guest.control()?;
    let mut bench = Bench {
        guest,
        probe,
        control,
        link_losses: 0,
    };
    for entry in entries {
        let operation = Operation::of(entry).with_context(|| {
            format!("what makes the kernel call {entry} is not known to this bench")
        })?;
        let before = bench.carrier_changes()?;
        bench.link_losses = 0;
        let isolate = Request::Isolate {
            module: DRIVER.to_owned(),
            entries: Wanted::Named(vec![entry.clone()]),
            budget_us: Some(BUDGET_US),
            device_checkpoint: CheckpointBy::Exact,
            recovery: LadderConfig {
                // The rollback alone: another try takes as long as the call does.
                on_fault: Some(OnFault::Error),
                recoveries_per_minute: u32::MAX,
                ..LadderConfig::default()
            },
            spilling: match spilled {
                true => Spilling {
                    wait_us: Some(0),
                    guest_only: GUEST_ONLY.map(str::to_owned).to_vec(),
                },
                false => Spilling::default(),
            },
            contain: Contain::Full,
        };
        // The VM asks the agent itself, which listens to one client at a time.
        bench.guest.agent().disconnect();
        bench.control.ask(&isolate)?;
        let of_entry = match spilled {
            true => bench.spilling_entry(entry, operation, runs, progress),
            false => bench.entry(entry, operation, runs, progress),
        };
        let of_entry =
            of_entry.with_context(|| format!("rollback of {entry}{}", bench.guest.last_words()))?;
        // Those of the guest's are a part of what spilled calls do.
        let lost = match spilled {
            true => bench.link_losses,
            false => bench.carrier_changes()?.saturating_sub(before),
        };
        all.extend(of_entry.into_iter().map(|recovery| Recovery {
            link_changes: operation.keeps_interface_up().then_some(lost),
            spilled,
            ..recovery
        }));
        bench.control.ask(&Request::Release {
            module: DRIVER.to_owned(),
        })?;
    }
    Ok(())
}

pub(super) struct Bench<'a> {
    pub(super) guest: &'a mut Guest,
    probe: &'a mut Probe,
    pub(super) control: ControlClient,
    /// Losses of the link that the other end of the wire saw in calls that failed after they had gone on in the guest.
    pub(super) link_losses: u64,
}

/// How an order of one fault ended.
pub(super) enum Fired {
    /// In a rollback.
    Yes,
    /// Calls came, and did not reach the instruction.
    Missed,
    /// No call came.
    NoCall,
}

impl Bench<'_> {
    fn entry(
        &mut self,
        entry: &str,
        operation: Operation,
        runs: usize,
        progress: &mut dyn FnMut(&str),
    ) -> anyhow::Result<Vec<Recovery>> {
        let mut all = Vec::new();
        for (index, place) in Place::ALL.into_iter().enumerate() {
            // The first places take what does not divide evenly.
            let share = (runs + Place::ALL.len() - 1 - index) / Place::ALL.len();
            if share == 0 {
                continue;
            }
            let fault = FAULTS[index % FAULTS.len()];
            let offset = self
                .find(entry, operation, place, fault)
                .with_context(|| format!("{} instruction", place.name()))?;
            let what = format!("{} at +{offset:#x} ({})", fault.name(), place.name());
            let mut of_place = Vec::new();
            for _ in 0..share * TRIES {
                if of_place.len() == share {
                    break;
                }
                match self.order(entry, operation, offset, fault)? {
                    Fired::Yes => of_place.push(self.collect(entry)?),
                    // Another way through the function this time.
                    Fired::Missed => {}
                    Fired::NoCall => bail!("{entry} is not called any more after {what}"),
                }
            }
            self.works(operation)
                .with_context(|| format!("after {what}"))?;
            let returned: Vec<f64> = of_place
                .iter()
                .filter_map(|run| run.at_us.get(&Phase::Returned).copied())
                .collect();
            let median = crate::report::Stat::from_samples(&returned).map_or(0.0, |s| s.p50);
            progress(&format!(
                "rollback {entry}, {what}: {} of {share}, {median:.0} us",
                of_place.len()
            ));
            let recovery = Recovery::from_runs(DRIVER, Method::Rollback, of_place);
            all.extend(recovery.map(|recovery| Recovery {
                entry: Some(entry.to_owned()),
                fault: Some(what),
                ..recovery
            }));
        }
        Ok(all)
    }

    /// The instructions of a function of the driver.
    pub(super) fn instructions(&mut self, function: &str) -> anyhow::Result<Vec<InstructionAt>> {
        let request = Request::Instructions {
            module: DRIVER.to_owned(),
            function: function.to_owned(),
        };
        let Reply::Instructions { instructions } = self.control.ask(&request)? else {
            bail!("the VM answered something else");
        };
        Ok(instructions)
    }

    /// An instruction at `place` that calls reach.
    fn find(
        &mut self,
        entry: &str,
        operation: Operation,
        place: Place,
        fault: FaultKind,
    ) -> anyhow::Result<u64> {
        let instructions = self.instructions(entry)?;
        for offset in place.candidates(&instructions).into_iter().take(CANDIDATES) {
            match self.order(entry, operation, offset, fault)? {
                Fired::Yes => {
                    self.collect(entry)?;
                    return Ok(offset);
                }
                Fired::Missed => {}
                Fired::NoCall => {
                    bail!(
                        "{entry} is not called at +{offset:#x}{}",
                        self.guest.last_words()
                    )
                }
            }
        }
        bail!("none of the instructions tried is reached by calls of {entry}");
    }

    /// Puts one fault in and has the call made.
    pub(super) fn order(
        &mut self,
        entry: &str,
        operation: Operation,
        offset: u64,
        fault: FaultKind,
    ) -> anyhow::Result<Fired> {
        self.inject(entry, offset, fault, 1)?;
        let deadline = Instant::now() + CALL_TIME;
        let mut steps = [true, false].into_iter().cycle();
        loop {
            let forth = steps.next().unwrap_or(true);
            if let Some(argv) = operation.command(forth) {
                // It may fail: its call did.
                self.command(argv)?;
            }
            let count = self.count()?;
            let whole = operation.command(true).is_none() || !forth || operation.is_one();
            if count.failed > 0 {
                std::thread::sleep(QUIET);
                // The undoing half still has to come, or is what failed.
                if let (Operation::Toggle(..), Some(argv)) = (operation, operation.command(false)) {
                    self.command(argv)?;
                }
                return Ok(Fired::Yes);
            }
            if whole && count.tried >= MISSES {
                self.inject(entry, offset, fault, 0)?;
                return Ok(Fired::Missed);
            }
            if Instant::now() >= deadline {
                self.inject(entry, offset, fault, 0)?;
                return Ok(if count.tried > 0 {
                    Fired::Missed
                } else {
                    Fired::NoCall
                });
            }
            std::thread::sleep(POLL);
        }
    }

    fn inject(
        &mut self,
        entry: &str,
        offset: u64,
        fault: FaultKind,
        times: u64,
    ) -> anyhow::Result<()> {
        self.control.tell(&Request::Inject {
            module: DRIVER.to_owned(),
            entry: entry.to_owned(),
            offset,
            fault,
            every: 1,
            times,
        })
    }

    fn count(&mut self) -> anyhow::Result<FaultCount> {
        let request = Request::FaultCount {
            module: DRIVER.to_owned(),
        };
        match self.control.ask(&request)? {
            Reply::FaultCount(count) => Ok(count),
            other => bail!("the VM answered something else: {other:?}"),
        }
    }

    /// The rollback that happened last, with what the guest did afterwards.
    fn collect(&mut self, entry: &str) -> anyhow::Result<RecoveryRun> {
        let rolled_back = self.last_rollback(entry)?;
        self.followed(&rolled_back)
    }

    /// The rollback that happened last.
    pub(super) fn last_rollback(&mut self, entry: &str) -> anyhow::Result<RolledBack> {
        let request = Request::Violations {
            module: DRIVER.to_owned(),
        };
        let Reply::Violations { reports, texts, .. } = self.control.ask(&request)? else {
            bail!("the VM answered something else");
        };
        let last = reports.as_array().and_then(|all| all.last()).cloned();
        let last = last.context("a call failed and no report of it is there")?;
        let rolled_back: RolledBack = serde_json::from_value(last).context("the report")?;
        ensure!(
            rolled_back.entry == entry,
            "another call than the one with the fault failed: {}",
            texts.last().map_or("", String::as_str)
        );
        Ok(rolled_back)
    }

    /// A rollback with what the guest did afterwards.
    pub(super) fn followed(&mut self, rolled_back: &RolledBack) -> anyhow::Result<RecoveryRun> {
        let at_ns = rolled_back.at_ns;
        let mut run = rolled_back.run();
        let deadline = Instant::now() + LINK_TIME;
        let reading = loop {
            let reading = self.probe.read(at_ns)?;
            if reading.first_round_trip_ns.is_some() {
                break reading;
            }
            if Instant::now() >= deadline {
                bail!("the guest did not answer a ping within {LINK_TIME:?} after a rollback");
            }
            std::thread::sleep(POLL);
        };
        for (phase, moment) in [
            (Phase::IrqLive, reading.first_interrupt_ns),
            (Phase::FirstTx, reading.first_tx_ns),
            (Phase::FirstRx, reading.first_round_trip_ns),
        ] {
            if let Some(moment) = moment {
                run.at_us
                    .insert(phase, moment.saturating_sub(at_ns) as f64 / 1e3);
            }
        }
        Ok(run)
    }

    /// The operation without a fault in it must succeed.
    pub(super) fn works(&mut self, operation: Operation) -> anyhow::Result<()> {
        match operation {
            Operation::Traffic => Ok(()),
            Operation::Command(argv) => self.guest.run(argv).map(drop),
            Operation::Toggle(forth, back) => {
                self.guest.run(forth)?;
                self.guest.run(back).map(drop)
            }
        }
    }

    fn command(&mut self, argv: &[&str]) -> anyhow::Result<ExecEnd> {
        let result = self.guest.agent().exec(Exec {
            argv: argv.iter().map(|word| (*word).to_owned()).collect(),
            limit_ms: Some(COMMAND_MS),
            ..Exec::default()
        });
        Ok(result.context("the guest's agent does not answer")?.end)
    }

    /// How often the link came or went for the guest.
    fn carrier_changes(&mut self) -> anyhow::Result<u64> {
        let text = self
            .guest
            .run(&["cat", "/sys/class/net/eth0/carrier_changes"])?;
        text.trim().parse().context("carrier_changes")
    }
}
