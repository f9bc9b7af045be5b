//! One fault at a time in a call of the driver, and what the VM and the guest's network say of it.

use std::time::{Duration, Instant};

use agent_protocol::message::{Exec, ExecEnd};
use anyhow::{Context, bail, ensure};
use isolation::dispatch::fault::{FaultCount, InstructionAt};
use recovery::fault::FaultKind;
use serde::Deserialize;

use crate::bench::guest::Guest;
use crate::bench::network::{DRIVER, LINK_TIME, Probe};
use crate::bench::operation::Operation;
use crate::control::client::ControlClient;
use crate::control::protocol::{Reply, Request};
use crate::report::{Phase, RecoveryRun};

/// How long a call may be in coming once it was asked for.
const CALL_TIME: Duration = Duration::from_secs(5);

/// Calls that may miss an instruction before it counts as one that this operation does not reach.
const MISSES: u64 = 2;

/// Instructions tried at most to find one at a place that calls reach.
pub(super) const CANDIDATES: usize = 24;

/// Between two looks at something that will change. Moments are noted by the VM; who looks takes
/// the processor away from it where there is one for both.
const POLL: Duration = Duration::from_millis(20);

/// From seeing that a call failed to going on: the first packets come undisturbed.
const QUIET: Duration = Duration::from_millis(30);

/// Limit of a command in the guest, in milliseconds.
const COMMAND_MS: u64 = 10_000;

/// A rollback as the VM reports it (`isolation::status::report::ViolationReport`).
#[derive(Debug, Deserialize)]
pub(in crate::bench) struct RolledBack {
    pub(in crate::bench) entry: String,
    at_ns: u64,
    phases: Phases,
    pub(in crate::bench) violation: Violated,
    pub(in crate::bench) stays: Option<String>,
    #[serde(default)]
    pub(in crate::bench) device_lost: Option<String>,
}

/// `isolation::domain::violation::Violation`
#[derive(Debug, Deserialize)]
pub(in crate::bench) struct Violated {
    pub(in crate::bench) spills: u32,
    #[serde(default)]
    pub(in crate::bench) reached_device: bool,
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
    pub(in crate::bench) fn run(&self) -> RecoveryRun {
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

pub(super) struct Bench<'a> {
    pub(super) guest: &'a mut Guest,
    pub(super) probe: &'a mut Probe,
    pub(super) control: ControlClient,
    /// Losses of the link that the other end of the wire saw in calls that failed after they had
    /// gone on in the guest.
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
    pub(super) fn collect(&mut self, entry: &str) -> anyhow::Result<RecoveryRun> {
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
    pub(super) fn carrier_changes(&mut self) -> anyhow::Result<u64> {
        let text = self
            .guest
            .run(&["cat", "/sys/class/net/eth0/carrier_changes"])?;
        text.trim().parse().context("carrier_changes")
    }
}
