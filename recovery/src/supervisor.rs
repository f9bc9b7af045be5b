//! The isolated modules of a guest, each with what was asked for and with its ladder; and whoever
//! changes a driver, one at a time.
//!
//! ```text
//!  vCPU's thread: fault ─► Ladder ─┬─► error or retry, at once
//!                                  └─► resume, restart ─► queue ─► a thread of its own ([`crate::rungs`])
//! ```
//!
//! Lock order: who changes a driver takes the turn for that first; a ladder's lock is taken last,
//! and nothing is called under it.

use std::collections::{HashMap, HashSet};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};

use devices::clock::monotonic_ns;
use isolation::attach::request::Isolated;
use isolation::dispatch::after_fault::{AfterFault, FailedCall, FaultPolicy, Listener};
use isolation::status::ModuleStatus;

use crate::asker::{Asker, Gone, Nobody};
use crate::by_turns::HandedOver;
use crate::guest::LiveGuest;
use crate::ladder::{Decision, Fault, Ladder, LadderConfig, LadderStatus};
use crate::lock::lock;
use crate::request::IsolationRequest;
use crate::resting::Resting;
use crate::turn::{Taken, Turn};
use crate::violations::{ViolationLog, Violations};

pub(crate) struct SupervisedModule {
    pub request: IsolationRequest,
    pub ladder: Arc<Mutex<Ladder>>,
}

/// What a module's ladder asks for beyond an error, and what else is not for a vCPU's thread.
pub(crate) enum RungRequest {
    /// Resume a module's device, or restart the module.
    Climb {
        module: String,
        /// The ladder that asks.
        ladder: Arc<Mutex<Ladder>>,
        /// Resume its device; otherwise restart it.
        resume: bool,
    },
    /// The module is stopped for good.
    GaveUp {
        module: String,
        /// The ladder that says so.
        ladder: Arc<Mutex<Ladder>>,
    },
    /// Whether the module is given up has changed.
    Tell { module: String },
}

/// Supervises the isolated modules of a guest.
pub struct Supervisor<G: LiveGuest> {
    guest: G,
    modules: Mutex<HashMap<String, SupervisedModule>>,
    rungs: Sender<RungRequest>,
    violations: Arc<Mutex<ViolationLog>>,
    /// Whose turn it is to remove and insert drivers.
    pub(crate) turn: Turn,
    /// Paths in the guest of the files of drivers that were upgraded.
    pub(crate) driver_files: Mutex<HashMap<String, String>>,
    /// Devices that were suspended, by the name of the module that drives them.
    pub(crate) resting: Mutex<HashMap<String, Resting<G::DeviceState>>>,
    /// Devices that are another guest's just now, by their address, suspended by their drivers.
    pub(crate) handed_over: Mutex<HashMap<String, HandedOver>>,
    /// Modules that were given up.
    given_up: Mutex<HashSet<String>>,
    /// Held while the guest is told of one of them: it hears of changes in their order.
    telling: Mutex<()>,
}

impl<G: LiveGuest> Supervisor<G> {
    pub(crate) fn new(guest: G) -> (Self, Receiver<RungRequest>) {
        let (rungs, asked) = channel();
        let supervisor = Self {
            guest,
            modules: Mutex::default(),
            rungs,
            violations: Arc::default(),
            turn: Turn::default(),
            driver_files: Mutex::default(),
            resting: Mutex::default(),
            handed_over: Mutex::default(),
            given_up: Mutex::default(),
            telling: Mutex::default(),
        };
        (supervisor, asked)
    }

    /// The guest.
    pub fn guest(&self) -> &G {
        &self.guest
    }

    /// Isolates functions of a module; `config` says what is done about calls that fail.
    ///
    /// # Errors
    /// Why they cannot be isolated.
    pub fn isolate(
        &self,
        request: IsolationRequest,
        config: LadderConfig,
        asker: &dyn Asker,
    ) -> anyhow::Result<Isolated> {
        // A call that fails as soon as there are gates asks for a rung of a ladder that is entered
        // only then: who climbs it waits.
        let alone = self.change_driver_for(asker)?;
        let ladder = Arc::new(Mutex::new(Ladder::new(config)));
        let module = request.module.clone();
        let isolated = self.isolate_with(request, ladder, asker)?;
        // Who hears of it may have a driver here take its device over.
        drop(alone);
        self.take_back(&module);
        Ok(isolated)
    }

    /// Isolates the same functions of a module again, with the ladder that it has, unless it was
    /// released meanwhile; how many there are.
    pub(crate) fn isolate_again(&self, module: &str) -> anyhow::Result<usize> {
        let supervised = self
            .modules()
            .get(module)
            .map(|one| (one.request.clone(), one.ladder.clone()));
        let Some((request, ladder)) = supervised else {
            return Ok(0);
        };
        let isolated = self.isolate_with(request, ladder.clone(), &Nobody);
        match &isolated {
            Ok(_) => lock(&ladder).isolated_again(),
            Err(error) => lock(&ladder).not_isolated(&format!("{error:#}")),
        }
        Ok(isolated?.entries.len())
    }

    pub(crate) fn isolate_with(
        &self,
        request: IsolationRequest,
        ladder: Arc<Mutex<Ladder>>,
        asker: &dyn Asker,
    ) -> anyhow::Result<Isolated> {
        let policy = LadderPolicy {
            module: request.module.clone(),
            ladder: ladder.clone(),
            rungs: self.rungs.clone(),
            violations: self.violations.clone(),
        };
        let isolated = self.guest.isolate(&request, Box::new(policy), asker)?;
        let module = request.module.clone();
        let supervised = SupervisedModule { request, ladder };
        self.modules().insert(module, supervised);
        Ok(isolated)
    }

    /// Has the guest run a module's functions itself again; their final counters.
    ///
    /// # Errors
    /// It is not isolated.
    pub fn release(&self, module: &str) -> anyhow::Result<ModuleStatus> {
        let status = self.guest.release(module);
        // Also of one that could not be isolated again, and has nothing but a ladder.
        self.modules().remove(module);
        self.take_back(module);
        status
    }

    /// The module of this ladder is stopped for good, unless it was released or exchanged
    /// meanwhile.
    pub(crate) fn give_up(&self, module: &str, ladder: &Arc<Mutex<Ladder>>) {
        let modules = self.modules();
        let own = modules.get(module).map(|one| &one.ladder);
        // Under that lock: whoever releases the module now takes it back afterwards.
        let is_new = own.is_some_and(|own| Arc::ptr_eq(own, ladder))
            && lock(&self.given_up).insert(module.to_owned());
        drop(modules);
        if is_new {
            self.tell_given_up(module);
        }
    }

    /// The module is not given up any more.
    fn take_back(&self, module: &str) {
        if lock(&self.given_up).remove(module) {
            self.tell_given_up(module);
        }
    }

    pub(crate) fn tell_given_up(&self, module: &str) {
        let _alone = lock(&self.telling);
        let given_up = lock(&self.given_up).contains(module);
        self.guest.set_given_up(module, given_up);
    }

    /// Modules whose devices are suspended.
    pub fn suspended(&self) -> Vec<String> {
        let mut all: Vec<String> = lock(&self.resting).keys().cloned().collect();
        all.sort_unstable();
        all
    }

    /// How each ladder stands, by the module's name.
    pub fn status(&self) -> Vec<(String, LadderStatus)> {
        let modules = self.modules();
        let status = |ladder: &Mutex<Ladder>| lock(ladder).status().clone();
        let all = modules
            .iter()
            .map(|(module, one)| (module.clone(), status(&one.ladder)));
        all.collect()
    }

    /// What calls of `module` did wrong since the VM began, the latest last; also of one that is
    /// not isolated any more.
    pub fn violations(&self, module: &str) -> Vec<Violations> {
        self.guest.settle_reports();
        lock(&self.violations).of(module)
    }

    /// The guest boots anew, and loads what is installed in it.
    pub fn guest_was_reset(&self) {
        lock(&self.driver_files).clear();
        lock(&self.resting).clear();
        lock(&self.handed_over).clear();
        for module in std::mem::take(&mut *lock(&self.given_up)) {
            // Who says so may be a vCPU's thread. The other one lives as long as the VM.
            let _ = self.rungs.send(RungRequest::Tell { module });
        }
    }

    /// The ladder of a module that is isolated.
    pub(crate) fn ladder(&self, module: &str) -> Option<Arc<Mutex<Ladder>>> {
        Some(self.modules().get(module)?.ladder.clone())
    }

    /// What was asked for of a module that is isolated.
    pub(crate) fn request(&self, module: &str) -> Option<IsolationRequest> {
        Some(self.modules().get(module)?.request.clone())
    }

    /// Takes a module's gates out, if there are any, to put them in again later.
    pub(crate) fn take_out(&self, module: &str) {
        self.device_begins_anew(module);
        if let Err(error) = self.guest.release(module) {
            tracing::debug!("{error:#}");
        }
    }

    /// The device of a module is about to begin anew. To be said before it does: what rests after
    /// this does so again.
    pub(crate) fn device_begins_anew(&self, module: &str) {
        if let Some(ladder) = self.ladder(module) {
            lock(&ladder).device_begins_anew();
        }
    }

    /// Waits until nobody else removes or inserts a driver.
    pub(crate) fn change_driver(&self) -> Taken<'_> {
        self.turn.take()
    }

    /// The same for `asker`, who is told of the wait and may be gone after it.
    pub(crate) fn change_driver_for(&self, asker: &dyn Asker) -> Result<Taken<'_>, Gone> {
        if let Some(alone) = self.turn.try_take() {
            return Ok(alone);
        }
        asker.tell("waiting for another change of a driver to end")?;
        let alone = self.change_driver();
        asker.tell("it has ended")?;
        Ok(alone)
    }

    /// Path in the guest of the file that the driver `module` came from, if it was upgraded.
    pub(crate) fn driver_file(&self, module: &str) -> Option<String> {
        lock(&self.driver_files).get(module).cloned()
    }

    /// The driver `module` is another build now, of the file at `path` in the guest: nothing that
    /// the old one did counts any more. The guest is not told yet that it is not given up: that
    /// may take a turn ([`Self::tell_given_up`]).
    pub(crate) fn driver_came_from(&self, module: &str, path: &str) {
        lock(&self.driver_files).insert(module.to_owned(), path.to_owned());
        self.guest.driver_changed(module);
        if let Some(supervised) = self.modules().get_mut(module) {
            let config = lock(&supervised.ladder).config().clone();
            supervised.ladder = Arc::new(Mutex::new(Ladder::new(config)));
        }
        lock(&self.given_up).remove(module);
    }

    pub(crate) fn modules(&self) -> MutexGuard<'_, HashMap<String, SupervisedModule>> {
        lock(&self.modules)
    }
}

/// Asks the ladder of a module after each fault.
struct LadderPolicy {
    module: String,
    ladder: Arc<Mutex<Ladder>>,
    rungs: Sender<RungRequest>,
    violations: Arc<Mutex<ViolationLog>>,
}

impl FaultPolicy for LadderPolicy {
    fn after_fault(&mut self, call: &FailedCall<'_>) -> AfterFault {
        let decision = lock(&self.ladder).fault(&Fault {
            entry: call.entry,
            attempts: call.attempts,
            unheard: call.unheard,
            half_done: call.violation.stays() || call.domain_failed(),
            device_lost: call.device_lost,
            out_of_time: call.out_of_time,
            in_a_row: call.in_a_row,
            now_ns: monotonic_ns(),
        });
        match decision {
            Decision::Error => AfterFault::ReturnError,
            Decision::Retry => AfterFault::Retry,
            Decision::Rest => {
                let entry = call.entry;
                tracing::warn!(
                    "{entry} goes on failing: it is not run until the device begins anew"
                );
                AfterFault::Rest
            }
            Decision::Resume | Decision::Restart => {
                // The thread that climbs lives as long as the VM.
                let _ = self.rungs.send(RungRequest::Climb {
                    module: self.module.clone(),
                    ladder: self.ladder.clone(),
                    resume: decision == Decision::Resume,
                });
                AfterFault::ReturnError
            }
            Decision::Stop => {
                tracing::error!("{} is stopped: its calls return errors", self.module);
                let _ = self.rungs.send(RungRequest::GaveUp {
                    module: self.module.clone(),
                    ladder: self.ladder.clone(),
                });
                AfterFault::Stop
            }
        }
    }

    fn listener(&self) -> Option<Listener> {
        let (module, violations) = (self.module.clone(), self.violations.clone());
        Some(Box::new(move |report| {
            lock(&violations).add(&module, report);
        }))
    }
}

#[cfg(test)]
#[path = "supervisor_tests.rs"]
mod tests;
