//! Faults in calls of one driver's functions, one at a time.

use std::time::{Duration, Instant};

use agent_protocol::message::Exec;
use anyhow::{Context, bail, ensure};
use isolation::dispatch::fault::{FaultCount, InstructionAt};
use recovery::fault::{FaultKind, Place};
use recovery::ladder::State;
use recovery::sweep::loaded_name;

use super::{Driver, Function, WORKS_TIME, with_functions};
use crate::bench::guest::Guest;
use crate::bench::rollback::RolledBack;
use crate::control::client::ControlClient;
use crate::control::protocol::{Reply, Request};
use crate::report::Stat;
use crate::report::drivers::FunctionRecovery;

/// Instructions tried at most to find one at a place that calls come to.
const CANDIDATES: usize = 24;
/// Faults ordered at most for one failed call, at a place that calls do not always come by.
const TRIES: usize = 8;
/// Calls that may miss an instruction before it counts as one that they do not come to.
const MISSES: u64 = 2;
/// How long a call may be in coming.
const CALL_TIME: Duration = Duration::from_secs(10);
/// Limit of what has it called, in milliseconds.
const COMMAND_MS: u64 = 10_000;
/// Between two looks at something that will change.
const POLL: Duration = Duration::from_millis(20);

pub(super) struct Bench<'a> {
    guest: Guest,
    control: ControlClient,
    driver: &'a Driver,
    module: String,
}

/// How an order of one fault ended.
enum Fired {
    /// A call failed.
    Yes(Box<RolledBack>),
    /// Calls came, and did not come to the instruction.
    Missed,
    /// None came.
    NoCall,
}

impl<'a> Bench<'a> {
    pub(super) fn new(guest: Guest, driver: &'a Driver) -> anyhow::Result<Self> {
        Ok(Self {
            control: guest.control()?,
            guest,
            driver,
            module: loaded_name(&driver.module),
        })
    }

    /// Waits until the driver works, and is not being begun anew.
    pub(super) fn works(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + WORKS_TIME;
        loop {
            let recovery = self.control.status()?.recovery;
            let ladder = recovery.get(&self.module);
            let is_running = ladder.is_none_or(|ladder| ladder.state == State::Running);
            let script = with_functions(&self.driver.works);
            let worked = match is_running {
                true => self.guest.shell(&script).map(drop),
                false => Err(anyhow::anyhow!("it is being begun anew")),
            };
            self.guest.agent().disconnect();
            match worked {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() >= deadline => {
                    return Err(error.context("it does not work"));
                }
                Err(_) => std::thread::sleep(POLL),
            }
        }
    }

    /// So many failed calls of a function, in turn at each place.
    pub(super) fn function(&mut self, function: &Function, rollbacks: usize) -> FunctionRecovery {
        let mut measured = FunctionRecovery {
            function: function.name.clone(),
            offsets: Vec::new(),
            atomic: Vec::new(),
            spilled: Vec::new(),
            reached_device: 0,
            begun_anew: 0,
            ended: None,
        };
        for (index, place) in Place::ALL.into_iter().enumerate() {
            // The first places take what does not divide evenly.
            let share = (rollbacks + Place::ALL.len() - 1 - index) / Place::ALL.len();
            if let Err(error) = self.at(function, place, share, &mut measured) {
                let error = error.context(format!("{} instruction", place.name()));
                measured.ended = Some(format!("{error:#}"));
            }
        }
        measured
    }

    fn at(
        &mut self,
        function: &Function,
        place: Place,
        share: usize,
        measured: &mut FunctionRecovery,
    ) -> anyhow::Result<()> {
        let fault = match place {
            Place::Middle => FaultKind::UndefinedInstruction,
            Place::First | Place::Last => FaultKind::NullDereference,
        };
        let instructions = self.instructions(&function.name)?;
        let mut candidates = place.candidates(&instructions).into_iter();
        let mut left = CANDIDATES;
        // The first one is not counted: symbols and types are looked at for the first time.
        let offset = loop {
            let offset = candidates.next().filter(|_| left > 0);
            left = left.saturating_sub(1);
            let Some(offset) = offset else {
                bail!("none of the instructions tried is come to");
            };
            match self.order(function, offset, fault)? {
                Fired::Yes(_) => break offset,
                Fired::Missed => {}
                Fired::NoCall => bail!("it is not called"),
            }
        };
        self.works()?;
        measured.offsets.push(offset);
        let mut done = 0;
        for _ in 0..share.saturating_mul(TRIES) {
            if done == share {
                break;
            }
            match self.order(function, offset, fault)? {
                Fired::Yes(call) => {
                    done += 1;
                    count(measured, &call);
                    self.works()?;
                }
                // Another way through the function this time.
                Fired::Missed => {}
                Fired::NoCall => bail!("it is not called any more"),
            }
        }
        Ok(())
    }

    fn instructions(&mut self, function: &str) -> anyhow::Result<Vec<InstructionAt>> {
        let request = Request::Instructions {
            module: self.module.clone(),
            function: function.to_owned(),
        };
        let Reply::Instructions { instructions } = self.control.ask(&request)? else {
            bail!("the VM answered something else");
        };
        Ok(instructions)
    }

    /// Puts one fault in and has the call made.
    fn order(
        &mut self,
        function: &Function,
        offset: u64,
        fault: FaultKind,
    ) -> anyhow::Result<Fired> {
        self.inject(&function.name, offset, fault, 1)?;
        let deadline = Instant::now() + CALL_TIME;
        loop {
            // It may fail: its call did.
            let ended = self.guest.agent().exec(Exec {
                argv: ["sh", "-c", &with_functions(&function.by)]
                    .map(str::to_owned)
                    .into(),
                limit_ms: Some(COMMAND_MS),
                ..Exec::default()
            });
            ended.context("the guest's agent does not answer")?;
            self.guest.agent().disconnect();
            let count = self.count()?;
            if count.failed > 0 {
                return Ok(Fired::Yes(Box::new(self.last(&function.name)?)));
            }
            let is_late = Instant::now() >= deadline;
            if count.tried >= MISSES || is_late {
                self.inject(&function.name, offset, fault, 0)?;
                return Ok(match count.tried {
                    0 => Fired::NoCall,
                    _ => Fired::Missed,
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
            module: self.module.clone(),
            entry: entry.to_owned(),
            offset,
            fault,
            every: 1,
            times,
        })
    }

    fn count(&mut self) -> anyhow::Result<FaultCount> {
        let request = Request::FaultCount {
            module: self.module.clone(),
        };
        match self.control.ask(&request)? {
            Reply::FaultCount(count) => Ok(count),
            other => bail!("the VM answered something else: {other:?}"),
        }
    }

    /// The call that failed last.
    fn last(&mut self, function: &str) -> anyhow::Result<RolledBack> {
        let request = Request::Violations {
            module: self.module.clone(),
        };
        let Reply::Violations { reports, texts, .. } = self.control.ask(&request)? else {
            bail!("the VM answered something else");
        };
        let last = reports.as_array().and_then(|all| all.last()).cloned();
        let last = last.context("a call failed and no report of it is there")?;
        let last: RolledBack = serde_json::from_value(last).context("the report")?;
        ensure!(
            last.entry == function,
            "another call than the one with the fault failed: {}",
            texts.last().map_or("", String::as_str)
        );
        Ok(last)
    }
}

/// Adds a failed call.
fn count(measured: &mut FunctionRecovery, call: &RolledBack) {
    let runs = match call.violation.spills {
        0 => &mut measured.atomic,
        _ => &mut measured.spilled,
    };
    runs.push(call.run());
    measured.reached_device += u64::from(call.violation.reached_device);
    let anew = call.stays.is_some() || call.device_lost.is_some();
    measured.begun_anew += u64::from(anew);
}

/// What came of a function, for people.
pub(super) fn line(driver: &Driver, measured: &FunctionRecovery) -> String {
    let returned = Stat::from_samples(&measured.returned_us());
    let median = returned.map_or_else(String::new, |stat| format!(", {:.0} us", stat.p50));
    let ended = measured.ended.as_deref().unwrap_or_default();
    format!(
        "{}: {}: {} atomic, {} had gone on in the guest{median} {ended}",
        driver.module,
        measured.function,
        measured.atomic.len(),
        measured.spilled.len(),
    )
}
