//! Carries out what the ladder of an isolated driver decides.
//!
//! ```text
//!  vCPU's thread: fault ─► Ladder ─┬─► error or retry, at once
//!                                  └─► resume, restart ─► queue ─► this module's thread: suspend and resume;
//!                                      or read the configuration, remove, insert, put it back, isolate again
//!                                      ─► Ladder ─► reset, stop
//! ```
//!
//! Lock order: a ladder's lock is taken last, and nothing is called under it.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use devices::clock::monotonic_ns;
use devices::hold::CheckpointBy;
use isolation::dispatch::after_fault::{AfterFault, FailedCall, FaultPolicy};
use recovery::ladder::{Decision, Fault, Ladder, LadderConfig, LadderStatus, Next};

use super::interfaces;
use super::isolation::Isolation;
use super::suspend;
use crate::control::protocol::{EntrySelection, Spilling};

/// How long a step of a restart may take in the guest.
const STEP_TIME: Duration = Duration::from_secs(60);

/// How long a guest may take to boot after a reset.
const BOOT_TIME: Duration = Duration::from_secs(120);

/// Between two looks at something that will change.
const POLL: Duration = Duration::from_millis(20);

/// What was asked for when a module was isolated, to be asked for again after a restart.
#[derive(Debug, Clone)]
pub struct Wish {
    /// Name of the module.
    pub module: String,
    /// Which functions.
    pub entries: EntrySelection,
    /// Time that a call may take, in microseconds.
    pub budget_us: Option<u64>,
    /// How the device's state is taken.
    pub checkpoint: CheckpointBy,
    /// What calls go on in the guest for.
    pub spilling: Spilling,
}

struct Ward {
    wish: Wish,
    ladder: Arc<Mutex<Ladder>>,
}

/// What a module's ladder asks for beyond an error.
pub struct Asked {
    module: String,
    /// Resume its device; otherwise restart it.
    resume: bool,
}

/// The ladders of all isolated modules of a VM.
pub struct Recoveries {
    wards: Mutex<HashMap<String, Ward>>,
    asked: Sender<Asked>,
}

impl Recoveries {
    /// None yet. The receiver gets what is asked for.
    pub fn new() -> (Self, Receiver<Asked>) {
        let (asked, answered) = channel();
        let recoveries = Self {
            wards: Mutex::default(),
            asked,
        };
        (recoveries, answered)
    }

    /// A ladder for a module that is about to be isolated.
    pub fn policy(&self, module: &str, config: LadderConfig) -> LadderPolicy {
        LadderPolicy {
            module: module.to_owned(),
            ladder: Arc::new(Mutex::new(Ladder::new(config))),
            asked: self.asked.clone(),
        }
    }

    /// What was asked for when a module was isolated, if it is.
    pub fn wish(&self, module: &str) -> Option<Wish> {
        Some(self.wards().get(module)?.wish.clone())
    }

    /// The ladder that a module already has, for when it is isolated again.
    pub fn same_policy(&self, module: &str) -> Option<LadderPolicy> {
        let wards = self.wards();
        Some(LadderPolicy {
            module: module.to_owned(),
            ladder: wards.get(module)?.ladder.clone(),
            asked: self.asked.clone(),
        })
    }

    /// The module was isolated with this policy.
    pub fn isolated(&self, wish: Wish, ladder: Arc<Mutex<Ladder>>) {
        let module = wish.module.clone();
        self.wards().insert(module, Ward { wish, ladder });
    }

    /// The module is another build now: nothing that the old one did counts any more.
    pub fn begin_anew(&self, module: &str) {
        if let Some(ward) = self.wards().get_mut(module) {
            let config = lock(&ward.ladder).config().clone();
            ward.ladder = Arc::new(Mutex::new(Ladder::new(config)));
        }
    }

    /// The module was released.
    pub fn released(&self, module: &str) {
        self.wards().remove(module);
    }

    /// How each ladder stands.
    pub fn status(&self) -> Vec<(String, LadderStatus)> {
        let wards = self.wards();
        let status = |ladder: &Mutex<Ladder>| lock(ladder).status().clone();
        let all = wards
            .iter()
            .map(|(module, ward)| (module.clone(), status(&ward.ladder)));
        all.collect()
    }

    fn wards(&self) -> MutexGuard<'_, HashMap<String, Ward>> {
        lock(&self.wards)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change under these locks is whole when it can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Asks the ladder of a module after each fault.
pub struct LadderPolicy {
    module: String,
    ladder: Arc<Mutex<Ladder>>,
    asked: Sender<Asked>,
}

impl LadderPolicy {
    /// Its ladder.
    pub fn ladder(&self) -> Arc<Mutex<Ladder>> {
        self.ladder.clone()
    }
}

impl FaultPolicy for LadderPolicy {
    fn after_fault(&mut self, call: &FailedCall<'_>) -> AfterFault {
        let decision = lock(&self.ladder).fault(&Fault {
            entry: &call.report.entry,
            attempts: call.attempts,
            returns_nothing: call.returns_nothing,
            half_done: call.report.violation.stays(),
            device_lost: call.report.device_lost.is_some(),
            now_ns: monotonic_ns(),
        });
        match decision {
            Decision::Error => AfterFault::ReturnError,
            Decision::Retry => AfterFault::Retry,
            Decision::Resume | Decision::Restart => {
                let resume = decision == Decision::Resume;
                // The thread that restarts lives as long as the VM.
                let _ = self.asked.send(Asked {
                    module: self.module.clone(),
                    resume,
                });
                AfterFault::ReturnError
            }
            Decision::Stop => {
                tracing::error!("{} is stopped: its calls return errors", self.module);
                AfterFault::Stop
            }
        }
    }
}

/// Resumes devices and restarts modules as they are asked for, until the VM ends.
pub fn serve(asked: &Receiver<Asked>, isolation: &Weak<Isolation>) {
    while let Ok(Asked { module, resume }) = asked.recv() {
        let Some(isolation) = isolation.upgrade() else {
            return;
        };
        recover(&isolation, &module, resume);
    }
}

/// Climbs down from a resume or a restart until something holds.
fn recover(isolation: &Isolation, module: &str, resume: bool) {
    let (wish, ladder) = match isolation.recoveries().wards().get(module) {
        Some(ward) => (ward.wish.clone(), ward.ladder.clone()),
        // Released meanwhile.
        None => return,
    };
    // Nobody exchanges the driver meanwhile.
    let _alone = isolation.change_driver();
    if resume {
        let result = suspend::suspend_and_resume(isolation, module);
        let result = result.map_err(|error| format!("{error:#}")).map(drop);
        match &result {
            Ok(()) => tracing::warn!("{module} has resumed its device"),
            Err(error) => tracing::error!("{module} could not resume its device: {error}"),
        }
        if lock(&ladder).resumed(borrowed(&result)) != Next::Restart {
            return;
        }
    }
    let result = restart(isolation, &wish).map_err(|error| format!("{error:#}"));
    match &result {
        Ok(()) => tracing::warn!("{module} was restarted"),
        Err(error) => tracing::error!("{module} could not be restarted: {error}"),
    }
    let mut next = lock(&ladder).restarted(borrowed(&result));
    if next == Next::Reset {
        let result = reset(isolation, &wish).map_err(|error| format!("{error:#}"));
        if let Err(error) = &result {
            tracing::error!("after the reset: {error}");
        }
        next = lock(&ladder).reset(borrowed(&result));
    }
    if next == Next::Stop {
        isolation.stop(module);
    }
}

fn borrowed(result: &Result<(), String>) -> Result<(), &str> {
    result.as_ref().map(drop).map_err(String::as_str)
}

/// Removes and inserts the driver, gives its interfaces the configuration that they had, and isolates the
/// same functions again.
fn restart(isolation: &Isolation, wish: &Wish) -> anyhow::Result<()> {
    let module = wish.module.as_str();
    let mut agent = isolation.agent();
    let configs =
        interfaces::read(&mut agent, module).context("its configuration cannot be read")?;
    isolation.take_out(module);
    agent
        .remove_module(module)
        .context("it cannot be removed")?;
    match isolation.driver_file(module) {
        Some(path) => agent.load_module_file(&path, ""),
        None => agent.load_module(module, ""),
    }
    .context("it cannot be inserted")?;
    let lost = interfaces::put_back(&mut agent, &configs, Instant::now() + STEP_TIME)?;
    if !lost.is_empty() {
        tracing::warn!(
            "{module} was restarted but is not as before: {}",
            lost.join(", ")
        );
    }
    // The agent listens to one client at a time, and isolating asks it as well.
    drop(agent);
    isolate_again(isolation, wish)
}

/// Resets the guest, and isolates the same functions again once it has booted.
fn reset(isolation: &Isolation, wish: &Wish) -> anyhow::Result<()> {
    isolation
        .vm()
        .reset()
        .context("the guest cannot be reset")?;
    isolation.agent().hello(BOOT_TIME)?;
    let deadline = Instant::now() + STEP_TIME;
    let loaded = || isolation.agent().modules(Some(&wish.module));
    while !loaded().is_ok_and(|modules| !modules.is_empty()) {
        ensure!(
            Instant::now() < deadline,
            "the guest does not load {} at boot",
            wish.module
        );
        std::thread::sleep(POLL);
    }
    isolate_again(isolation, wish)
}

fn isolate_again(isolation: &Isolation, wish: &Wish) -> anyhow::Result<()> {
    isolation
        .isolate_again(&wish.module)
        .map(drop)
        .map_err(|error| anyhow::anyhow!(error))
        .context("it cannot be isolated again")
}
