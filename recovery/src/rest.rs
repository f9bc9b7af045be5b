//! The supervisor at rest with its machine, and what it has again after a rewind.
//!
//! A driver that is being exchanged or restarted is half in the guest and half in this process: no
//! state is taken then. Ladders go back with the guest, for what happened since a mark has not
//! happened to this driver; only their counters go on.

use std::any::Any;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use vmm::{Kept, Participant, PausedVcpus, RestFor, Unsettled};

use crate::asker::Asker;
use crate::guest::LiveGuest;
use crate::ladder::{Ladder, State};
use crate::lock::lock;
use crate::request::{IsolatedModule, IsolationRequest};
use crate::resting::Resting;
use crate::supervisor::{SupervisedModule, Supervisor};

/// What has to be put back.
struct KeptSupervisor<G: LiveGuest> {
    modules: HashMap<String, KeptLadder>,
    driver_files: HashMap<String, String>,
    resting: HashMap<String, Resting<G::DeviceState>>,
    learnt: G::Learnt,
}

/// A ladder as it was.
struct KeptLadder {
    request: IsolationRequest,
    /// Which one it is: whoever decides about faults of the module has the same.
    ladder: Arc<Mutex<Ladder>>,
    was: Ladder,
}

impl<G: LiveGuest> Supervisor<G> {
    /// Has nobody begin to change a driver until [`Supervisor::end_rest`].
    pub(crate) fn come_to_rest(&self) -> Result<(), Unsettled> {
        let refused = |reason: String| Unsettled { reason, soon: true };
        if !self.turn.rest() {
            return Err(refused(
                "a driver is being isolated, resumed, restarted or exchanged".to_owned(),
            ));
        }
        match self.climbing() {
            Some(unsettled) if !self.turn.is_lent() => {
                self.turn.go_on();
                Err(unsettled)
            }
            _ => Ok(()),
        }
    }

    /// What is said of a module whose ladder has asked for a rung that was not climbed yet, if
    /// there is one.
    fn climbing(&self) -> Option<Unsettled> {
        let is_climbing = |state: State| {
            matches!(
                state,
                State::Resuming | State::Restarting | State::Resetting
            )
        };
        let status = self.status();
        let mut climbing = status.iter().filter(|(_, one)| is_climbing(one.state));
        climbing.next().map(|(module, _)| Unsettled {
            reason: format!("`{module}` is about to be restarted"),
            soon: true,
        })
    }

    /// What is isolated, to be asked at rest.
    pub fn isolated(&self) -> Vec<IsolatedModule> {
        let modules = self.modules();
        let mut all: Vec<_> = modules
            .values()
            .map(|one| {
                let ladder = lock(&one.ladder);
                let status = ladder.status();
                let is_stopped = status.state == State::Stopped;
                IsolatedModule {
                    request: one.request.clone(),
                    recovery: ladder.config().clone(),
                    stopped: status.gave_up.clone().filter(|_| is_stopped),
                }
            })
            .collect();
        all.sort_by(|a, b| a.request.module.cmp(&b.request.module));
        all
    }

    /// Isolates what was [`Supervisor::isolated`] in a guest that was restored since; why it does
    /// not work, for each module of which it does not. Those are said to run unisolated.
    pub fn isolate_as_told(
        &self,
        modules: Vec<IsolatedModule>,
        asker: &dyn Asker,
    ) -> Vec<(String, anyhow::Error)> {
        let mut failed = Vec::new();
        for told in modules {
            let request = told.request.clone();
            let (module, config) = (request.module.clone(), told.recovery.clone());
            if let Err(error) = self.isolate_one_as_told(told, asker) {
                let mut ladder = Ladder::new(config);
                ladder.not_isolated(&format!("{error:#}"));
                let ladder = Arc::new(Mutex::new(ladder));
                let unisolated = SupervisedModule { request, ladder };
                // Somebody may have isolated it otherwise meanwhile.
                self.modules().entry(module.clone()).or_insert(unisolated);
                failed.push((module, error));
            }
        }
        failed
    }

    fn isolate_one_as_told(&self, told: IsolatedModule, asker: &dyn Asker) -> anyhow::Result<()> {
        let _alone = self.change_driver_for(asker)?;
        let module = told.request.module.clone();
        let is_stopped = told.stopped.is_some();
        let ladder = match told.stopped {
            Some(why) => Ladder::stopped(told.recovery, why),
            None => Ladder::new(told.recovery),
        };
        let ladder = Arc::new(Mutex::new(ladder));
        self.isolate_with(told.request, ladder.clone(), asker)?;
        if is_stopped {
            self.guest().stop(&module)?;
            self.give_up(&module, &ladder);
        }
        Ok(())
    }

    pub(crate) fn end_rest(&self) {
        self.turn.go_on();
    }

    /// What has to be as it is now when the guest is.
    pub(crate) fn keep_ladders(&self) -> Kept {
        let modules = self.modules();
        let kept = modules.iter().map(|(module, one)| {
            let kept = KeptLadder {
                request: one.request.clone(),
                ladder: one.ladder.clone(),
                was: lock(&one.ladder).clone(),
            };
            (module.clone(), kept)
        });
        let kept: Arc<dyn Any + Send + Sync> = Arc::new(KeptSupervisor::<G> {
            modules: kept.collect(),
            driver_files: lock(&self.driver_files).clone(),
            resting: lock(&self.resting).clone(),
            learnt: self.guest().learnt(),
        });
        Some(kept)
    }

    /// The guest is as it was when `kept` was.
    pub(crate) fn put_ladders_back(&self, kept: &Kept) -> Result<(), String> {
        let kept = kept
            .as_ref()
            .and_then(|kept| kept.downcast_ref::<KeptSupervisor<G>>())
            .ok_or("what was kept of ladders is something else")?;
        let mut modules = self.modules();
        modules.clear();
        for (module, then) in &kept.modules {
            lock(&then.ladder).put_back(&then.was);
            let supervised = SupervisedModule {
                request: then.request.clone(),
                ladder: then.ladder.clone(),
            };
            modules.insert(module.clone(), supervised);
        }
        lock(&self.driver_files).clone_from(&kept.driver_files);
        lock(&self.resting).clone_from(&kept.resting);
        self.guest().put_learnt_back(&kept.learnt);
        Ok(())
    }
}

impl<G: LiveGuest> Participant for Supervisor<G> {
    fn name(&self) -> String {
        "recovery".to_owned()
    }

    fn settle(&self, _rest: RestFor, _vcpus: &mut PausedVcpus<'_>) -> Result<(), Unsettled> {
        self.come_to_rest()
    }

    fn go_on(&self) {
        self.end_rest();
    }

    fn keep(&self) -> Result<Kept, Unsettled> {
        // Who has the guest go back for a ladder may be let through; no mark is made meanwhile.
        match self.climbing() {
            Some(unsettled) => Err(unsettled),
            None => Ok(self.keep_ladders()),
        }
    }

    fn put_back(&self, kept: &Kept) -> Result<(), String> {
        self.put_ladders_back(kept)
    }
}

#[cfg(test)]
#[path = "rest_tests.rs"]
mod tests;
