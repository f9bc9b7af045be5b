//! The ladder: what is tried, in which order, to get a driver back after calls of it failed.
//!
//! ```text
//!            fault: rolled back ─┬─ the caller gets an error ───────────────────► Running
//!  Running ─────────────────────┼─ run again, at most `retries` times ──────────► Running
//!                                ├─ error, and the device is resumed ─► Resuming ─┬─ done ───────► Running
//!                                │                                      failed │
//!                                ├─ error, and the driver is restarted ─► Restarting ─┬─ done ─► Running
//!                                │                                                    └─ failed
//!                                │        Resetting ◄── if that is allowed ────────────────┤
//!                                │            └─ back at a mark, or booted ─► Running      │
//!                                └─ stop, or too many faults in a minute ─► Stopped ◄──────┘
//! ```
//!
//! A function that fails again and again, with no call of it that ends well in between, is a
//! livelock: its caller calls it again at once, as the kernel does with a poll. After
//! `failures_in_a_row` of them the device is resumed whatever was chosen, after as many more the
//! driver is restarted, then stopped. A call that hangs counts for many. A function that goes on
//! failing as often while a rung is tried rests, so that the guest comes to do what the rung needs
//! of it.
//!
//! A fault that is rolled back leaves memory and device as they were before the call: that is the
//! first rung, and always taken. The machine is pure: it is told what happened and when, and says
//! what to do. A driver that is stopped stays so until it is isolated anew.

mod config;
mod rows;
mod times;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use config::{LadderConfig, MayReset, OnFault};
use rows::Row;
pub use times::{Rung, RungTimes};

/// Nanoseconds in the minute that recoveries are limited in.
const MINUTE_NS: u64 = 60_000_000_000;
/// How long it is remembered which rung was tried for a function that fails again and again.
const REMEMBERED_NS: u64 = 10 * MINUTE_NS;

/// Where a driver stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Its calls are run.
    #[default]
    Running,
    /// Its device is being resumed.
    Resuming,
    /// It is being restarted.
    Restarting,
    /// The guest is being reset, or goes back to a mark.
    Resetting,
    /// Its calls return errors without being run.
    Stopped,
    /// Its functions should be isolated and are not, because isolating them again failed: they run
    /// in the guest.
    Unisolated,
}

/// How often each rung was used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Rungs {
    /// Calls that were rolled back and returned an error.
    pub errors: u64,
    /// Calls that were rolled back and run again.
    pub retries: u64,
    /// Times that a function was not run any more until the device began anew, because it went on
    /// failing while a rung was tried.
    #[serde(default)]
    pub rests: u64,
    /// Resumes of the device that were begun.
    #[serde(default)]
    pub resumes: u64,
    /// Those of them that failed.
    #[serde(default)]
    pub failed_resumes: u64,
    /// Restarts of the driver that were begun.
    pub restarts: u64,
    /// Those of them that failed.
    pub failed_restarts: u64,
    /// Times that the guest was to go back to its last mark or snapshot.
    #[serde(default)]
    pub rewinds: u64,
    /// Resets of the guest that were begun.
    pub resets: u64,
    /// Times the driver was stopped.
    pub stops: u64,
}

/// A ladder as others see it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LadderStatus {
    /// Where the driver stands.
    pub state: State,
    /// How often each rung was used.
    pub rungs: Rungs,
    /// How long those took that take time.
    #[serde(default, skip_serializing_if = "RungTimes::is_empty")]
    pub times: RungTimes,
    /// Why the driver was stopped, or runs without being isolated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gave_up: Option<String>,
}

/// What to do about a call that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Return an error.
    Error,
    /// Run the call again.
    Retry,
    /// Return an error, and have no call of this function run until the device begins anew.
    Rest,
    /// Return an error, and have the driver resume its device.
    Resume,
    /// Return an error, and restart the driver.
    Restart,
    /// Return an error, and run no call any more.
    Stop,
}

/// What to do after a rung did not hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Nothing: the driver runs, or was stopped meanwhile.
    Nothing,
    /// Restart the driver.
    Restart,
    /// Have the guest go back to its last mark or snapshot.
    GoBack,
    /// Reset the guest.
    Reset,
    /// Run no call of the driver any more.
    Stop,
}

/// A call that failed.
#[derive(Debug, Clone, Copy)]
pub struct Fault<'a> {
    /// The entry point.
    pub entry: &'a str,
    /// How often this call was run by now, at least 1.
    pub attempts: u32,
    /// Whether its caller cannot know that it failed, or goes on all the same.
    pub unheard: bool,
    /// Whether something of the failed call is left in the guest or the device, so that they are
    /// half-way through something: it had gone on in the guest and could not be taken back, or the
    /// device could not be put back. Or whether the domain itself failed, so that the driver's
    /// calls are not isolated any more.
    pub half_done: bool,
    /// Whether the device could not be put back: the driver is as before the call, and its device
    /// is not.
    pub device_lost: bool,
    /// Whether it used up the time that it may take over all runs, so that it cannot be run again.
    pub out_of_time: bool,
    /// Whether the call of this function before it failed, too.
    pub in_a_row: bool,
    /// When, on a clock that does not run backwards.
    pub now_ns: u64,
}

/// The ladder of one driver.
#[derive(Debug, Clone, Default)]
pub struct Ladder {
    config: LadderConfig,
    status: LadderStatus,
    /// Faults of the last minute, oldest first; never more than the limit.
    lately: VecDeque<u64>,
    /// When the device was last lost.
    lost_ns: Option<u64>,
    /// By function.
    rows: BTreeMap<String, Row>,
    /// A function rests, and the device has not begun anew since.
    rested: bool,
    /// When the last call failed, and when the guest last had to go back to a mark for this driver.
    failed_ns: u64,
    went_back_ns: Option<u64>,
}

impl Ladder {
    /// A ladder with nothing behind it.
    pub fn new(config: LadderConfig) -> Self {
        Self {
            config,
            ..Self::default()
        }
    }

    /// One that was made anew for a driver that was stopped, and why it was.
    pub fn stopped(config: LadderConfig, why: String) -> Self {
        let mut ladder = Self::new(config);
        ladder.status.state = State::Stopped;
        ladder.status.gave_up = Some(why);
        ladder
    }

    /// What it was made with.
    pub fn config(&self) -> &LadderConfig {
        &self.config
    }

    /// How it stands.
    pub fn status(&self) -> &LadderStatus {
        &self.status
    }

    /// A call failed and was rolled back.
    pub fn fault(&mut self, fault: &Fault<'_>) -> Decision {
        self.failed_ns = fault.now_ns;
        if self.status.state == State::Stopped {
            return Decision::Stop;
        }
        if self.too_many(fault.now_ns) {
            let limit = self.config.recoveries_per_minute;
            self.stop(format!(
                "{} failed, and more than {limit} calls did within a minute",
                fault.entry
            ));
            return Decision::Stop;
        }
        let keeps_failing = self.keeps_failing(fault);
        let livelock = self.livelock(fault);
        let wanted = self.wanted(fault, livelock);
        if fault.device_lost {
            self.lost_ns = Some(fault.now_ns);
        }
        let state = self.status.state;
        let on_fault = match wanted {
            // The driver that fails is on its way out already, or its device on its way back.
            OnFault::Resume if state != State::Running => OnFault::Error,
            OnFault::Restart if !matches!(state, State::Running | State::Resuming) => {
                OnFault::Error
            }
            OnFault::Retry if fault.attempts > self.config.retries || fault.out_of_time => {
                OnFault::Error
            }
            other => other,
        };
        let rungs = &mut self.status.rungs;
        match on_fault {
            OnFault::Error | OnFault::Retry if keeps_failing => {
                rungs.errors += 1;
                rungs.rests += 1;
                self.rested = true;
                Decision::Rest
            }
            OnFault::Error => {
                rungs.errors += 1;
                Decision::Error
            }
            OnFault::Retry => {
                rungs.retries += 1;
                Decision::Retry
            }
            OnFault::Resume => {
                rungs.errors += 1;
                rungs.resumes += 1;
                self.status.state = State::Resuming;
                Decision::Resume
            }
            OnFault::Restart => {
                rungs.errors += 1;
                rungs.restarts += 1;
                self.status.state = State::Restarting;
                Decision::Restart
            }
            OnFault::Stop => {
                let why = match livelock {
                    Some(OnFault::Stop) => {
                        " fails again and again, and what was tried has not helped"
                    }
                    _ => " failed",
                };
                self.stop(format!("{}{why}", fault.entry));
                Decision::Stop
            }
        }
    }

    /// The device is about to begin anew, by its driver's own functions or with the driver: what
    /// rests is run again.
    pub fn device_begins_anew(&mut self) {
        self.rested = false;
    }

    /// A rung took so long. To be said at its end, before what became of it.
    pub fn took(&mut self, rung: Rung, result: Result<(), &str>, time: Duration) {
        let goes_on_failing = self.rested && matches!(rung, Rung::Resume | Rung::Restart);
        let failed = result.is_err() || goes_on_failing;
        self.status.times.add(rung, failed, time);
    }

    /// The resume that was asked for has ended. It has failed if a function had to rest again since
    /// the device began anew.
    pub fn resumed(&mut self, result: Result<(), &str>) -> Next {
        let failed = result.is_err() || self.rested;
        self.status.rungs.failed_resumes += u64::from(failed);
        if self.status.state != State::Resuming {
            // A restart was asked for meanwhile, or the driver was stopped.
            return Next::Nothing;
        }
        if !failed {
            self.status.state = State::Running;
            return Next::Nothing;
        }
        self.status.rungs.restarts += 1;
        self.status.state = State::Restarting;
        Next::Restart
    }

    /// The restart that was asked for has ended. It has failed if a function had to rest again
    /// behind it.
    pub fn restarted(&mut self, result: Result<(), &str>) -> Next {
        if self.status.state != State::Restarting {
            return Next::Nothing;
        }
        let result = match (result, self.rested) {
            (Ok(()), true) => Err("a function of it goes on failing"),
            (result, _) => result,
        };
        let Err(error) = result else {
            self.status.state = State::Running;
            return Next::Nothing;
        };
        self.status.rungs.failed_restarts += 1;
        match self.config.may_reset_guest {
            MayReset::No => {
                self.stop(format!("the driver could not be restarted: {error}"));
                Next::Stop
            }
            MayReset::Snapshot if !self.went_back_lately() => {
                self.status.rungs.rewinds += 1;
                self.status.state = State::Resetting;
                self.went_back_ns = Some(self.failed_ns);
                Next::GoBack
            }
            MayReset::Boot | MayReset::Snapshot => self.begin_reset(),
        }
    }

    fn begin_reset(&mut self) -> Next {
        self.status.rungs.resets += 1;
        self.status.state = State::Resetting;
        Next::Reset
    }

    /// Whether the guest had to go back to a mark for this driver not long before the last failure.
    fn went_back_lately(&self) -> bool {
        self.went_back_ns
            .is_some_and(|back| self.failed_ns.saturating_sub(back) < REMEMBERED_NS)
    }

    /// The guest has gone back to its mark with the driver isolated, or could not.
    pub fn went_back(&mut self, result: Result<(), &str>) -> Next {
        // A ladder that went back with the guest runs.
        match (self.status.state, result) {
            (State::Resetting | State::Running, Err(_)) => return self.begin_reset(),
            (State::Resetting, Ok(())) => {
                self.status.state = State::Running;
                self.rested = false;
                self.lately.clear();
            }
            _ => {}
        }
        Next::Nothing
    }

    /// The guest was rewound to where this ladder was `kept`. What was counted, and that the guest
    /// had to go back for this driver, stays known.
    pub fn put_back(&mut self, kept: &Self) {
        let (rungs, times) = (self.status.rungs, std::mem::take(&mut self.status.times));
        let (failed_ns, went_back_ns) = (self.failed_ns, self.went_back_ns);
        self.clone_from(kept);
        (self.status.rungs, self.status.times) = (rungs, times);
        (self.failed_ns, self.went_back_ns) = (failed_ns, went_back_ns);
    }

    /// The reset that was asked for has ended: the guest boots, or could not be reset.
    pub fn reset(&mut self, result: Result<(), &str>) -> Next {
        if self.status.state != State::Resetting {
            return Next::Nothing;
        }
        match result {
            Ok(()) => {
                self.status.state = State::Running;
                self.rested = false;
                self.lately.clear();
                Next::Nothing
            }
            Err(error) => {
                self.stop(format!("the guest could not be reset: {error}"));
                Next::Stop
            }
        }
    }

    /// The driver's functions could not be isolated again. While a rung is being tried its end
    /// decides what comes next.
    pub fn not_isolated(&mut self, why: &str) {
        if matches!(self.status.state, State::Running | State::Stopped) {
            self.status.state = State::Unisolated;
            self.status.gave_up = Some(why.to_owned());
        }
    }

    /// The driver's functions are isolated again after all.
    pub fn isolated_again(&mut self) {
        if self.status.state == State::Unisolated {
            self.status.state = State::Running;
            self.status.gave_up = None;
        }
    }

    fn on_fault(&self, fault: &Fault<'_>) -> OnFault {
        let named = self.config.per_entry.get(fault.entry).copied();
        named.or(self.config.on_fault).unwrap_or(if fault.unheard {
            OnFault::Retry
        } else {
            OnFault::Error
        })
    }

    /// What is to be done about a fault, were there nothing else under way.
    fn wanted(&self, fault: &Fault<'_>, livelock: Option<OnFault>) -> OnFault {
        let wanted = match self.on_fault(fault) {
            // Neither an error nor another try makes good what was begun.
            OnFault::Error | OnFault::Retry | OnFault::Resume if fault.half_done => {
                OnFault::Restart
            }
            // A device that is lost again at once needs more.
            OnFault::Error | OnFault::Retry | OnFault::Resume
                if fault.device_lost && self.was_lost_lately(fault.now_ns) =>
            {
                OnFault::Restart
            }
            OnFault::Error | OnFault::Retry if fault.device_lost => OnFault::Resume,
            other => other,
        };
        match (wanted, livelock) {
            (_, Some(OnFault::Stop)) => OnFault::Stop,
            (OnFault::Error | OnFault::Retry, Some(rung)) => rung,
            (OnFault::Resume, Some(OnFault::Restart)) => OnFault::Restart,
            (wanted, _) => wanted,
        }
    }

    /// Whether the device was lost less than a minute ago.
    fn was_lost_lately(&self, now_ns: u64) -> bool {
        self.lost_ns
            .is_some_and(|lost| now_ns.saturating_sub(lost) < MINUTE_NS)
    }

    /// Counts a fault at `now_ns`; whether there were too many in the last minute.
    fn too_many(&mut self, now_ns: u64) -> bool {
        while let Some(oldest) = self.lately.front()
            && now_ns.saturating_sub(*oldest) >= MINUTE_NS
        {
            self.lately.pop_front();
        }
        if self.lately.len() >= self.config.recoveries_per_minute as usize {
            return true;
        }
        self.lately.push_back(now_ns);
        false
    }

    fn stop(&mut self, why: String) {
        self.status.state = State::Stopped;
        self.status.rungs.stops += 1;
        self.status.gave_up = Some(why);
    }
}

#[cfg(test)]
mod tests;
