//! The rungs of a ladder that take time, carried out one after the other until one holds.
//!
//! ```text
//!  resume the device ─► restart: read the configuration, take the gates out, remove, insert, put it back, isolate again
//!     ─► the guest goes back to its last mark or snapshot ─► reset the guest, isolate again ─► stop
//! ```

use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use anyhow::{Context, ensure};

use crate::asker::Nobody;
use crate::guest::{Agent, LiveGuest, POLL, WentBackTo};
use crate::interface::live;
use crate::ladder::{Ladder, Next, Rung, State};
use crate::lock::lock;
use crate::resume_device;
use crate::supervisor::{RungRequest, Supervisor};
use crate::turn::Taken;

/// How long a step of a restart may take in the guest.
const STEP_TIME: Duration = Duration::from_secs(60);

/// How long a guest may take to boot after a reset.
const BOOT_TIME: Duration = Duration::from_secs(120);

impl<G: LiveGuest> Supervisor<G> {
    /// Supervises `guest`, in which nothing is isolated yet, with a thread that climbs the ladders'
    /// rungs until the supervisor is dropped.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(guest: G) -> std::io::Result<Arc<Self>> {
        let (supervisor, asked) = Self::new(guest);
        let supervisor = Arc::new(supervisor);
        let weak = Arc::downgrade(&supervisor);
        std::thread::Builder::new()
            .name("recovery".to_owned())
            .spawn(move || serve(&asked, &weak))?;
        Ok(supervisor)
    }
}

/// Begins with the rung that a ladder asked for, or says that the module is given up, unless it was
/// released or exchanged meanwhile.
pub(crate) fn climb<G: LiveGuest>(supervisor: &Supervisor<G>, request: &RungRequest) {
    if let RungRequest::Tell { module } = request {
        return supervisor.tell_given_up(module);
    }
    // Nobody exchanges the driver meanwhile, and whoever is isolating it has entered its ladder.
    let alone = supervisor.change_driver();
    match request {
        RungRequest::Climb {
            module,
            ladder,
            resume,
        } => {
            let own = supervisor.ladder(module);
            if own.is_some_and(|own| Arc::ptr_eq(&own, ladder)) {
                recover(supervisor, module, *resume, ladder, &alone);
            }
        }
        RungRequest::GaveUp { module, ladder } => supervisor.give_up(module, ladder),
        RungRequest::Tell { .. } => {}
    }
    drop(alone);
}

/// Resumes devices and restarts modules as they are asked for, until the supervisor is gone.
fn serve<G: LiveGuest>(asked: &Receiver<RungRequest>, supervisor: &Weak<Supervisor<G>>) {
    while let Ok(request) = asked.recv() {
        let Some(supervisor) = supervisor.upgrade() else {
            return;
        };
        climb(&supervisor, &request);
    }
}

/// Begins with a resume or a restart, as the `ladder` of `module` decided, and goes on until
/// something holds. Nobody else may change the driver meanwhile.
fn recover<G: LiveGuest>(
    supervisor: &Supervisor<G>,
    module: &str,
    resume: bool,
    ladder: &Arc<Mutex<Ladder>>,
    turn: &Taken<'_>,
) {
    if resume {
        let (result, took) = timed(supervisor, || {
            resume_device::resume(supervisor, module).map(drop)
        });
        match &result {
            Ok(()) => tracing::warn!("{module} has resumed its device"),
            Err(error) => tracing::error!("{module} could not resume its device: {error}"),
        }
        if ended(ladder, Rung::Resume, &result, took) != Next::Restart {
            return;
        }
    }
    let (result, took) = timed(supervisor, || restart(supervisor, module));
    match &result {
        Ok(()) => tracing::warn!("{module} was restarted"),
        Err(error) => tracing::error!("{module} could not be restarted: {error}"),
    }
    let mut next = ended(ladder, Rung::Restart, &result, took);
    if next == Next::GoBack {
        let (result, took) = timed(supervisor, || go_back(supervisor, module, ladder, turn));
        match &result {
            Ok(()) => tracing::warn!("the guest went back for {module}"),
            Err(error) => tracing::error!("the guest does not go back: {error}"),
        }
        next = ended(ladder, Rung::Rewind, &result, took);
    }
    if next == Next::Reset {
        let (result, took) = timed(supervisor, || reset(supervisor, module));
        if let Err(error) = &result {
            tracing::error!("after the reset: {error}");
        }
        next = ended(ladder, Rung::Reset, &result, took);
    }
    if next == Next::Stop {
        match stop(supervisor, module) {
            Ok(()) => supervisor.give_up(module, ladder),
            Err(error) => {
                tracing::error!("{module} cannot be stopped: {error:#}");
                lock(ladder).not_isolated(&format!("{error:#}"));
            }
        }
    }
}

/// What came of a rung, and how long it took.
fn timed<G: LiveGuest>(
    supervisor: &Supervisor<G>,
    rung: impl FnOnce() -> anyhow::Result<()>,
) -> (Result<(), String>, Duration) {
    let begin = supervisor.guest().now();
    let result = rung().map_err(|error| format!("{error:#}"));
    (result, supervisor.guest().now().saturating_sub(begin))
}

/// Tells the ladder that a rung has ended; what comes next.
fn ended(ladder: &Mutex<Ladder>, rung: Rung, result: &Result<(), String>, took: Duration) -> Next {
    let (result, mut ladder) = (borrowed(result), lock(ladder));
    ladder.took(rung, result, took);
    match rung {
        Rung::Resume => ladder.resumed(result),
        Rung::Restart => ladder.restarted(result),
        Rung::Rewind => ladder.went_back(result),
        Rung::Reset => ladder.reset(result),
    }
}

/// Has no call of the driver run any more. A restart takes the gates out, so that they may have to
/// go in again first.
fn stop<G: LiveGuest>(supervisor: &Supervisor<G>, module: &str) -> anyhow::Result<()> {
    let guest = supervisor.guest();
    if guest.stop(module).is_ok() {
        return Ok(());
    }
    let loaded = guest.agent().modules(None);
    if loaded.is_ok_and(|modules| modules.iter().all(|one| one.name != module)) {
        // Of a driver that is not there no call can be run.
        return Ok(());
    }
    isolate_again(supervisor, module)?;
    guest.stop(module)
}

fn borrowed(result: &Result<(), String>) -> Result<(), &str> {
    result.as_ref().map(drop).map_err(String::as_str)
}

/// Removes and inserts the driver, gives its interfaces the configuration that they had, and
/// isolates the same functions again.
fn restart<G: LiveGuest>(supervisor: &Supervisor<G>, module: &str) -> anyhow::Result<()> {
    let guest = supervisor.guest();
    supervisor.has_its_devices(module)?;
    if supervisor.suspended().iter().any(|one| one == module) {
        // A driver waits for ever for the end of what it has ended already when it was suspended.
        let resumed = resume_device::resume(supervisor, module);
        resumed.context("its devices are suspended and cannot be resumed")?;
    }
    let mut agent = guest.agent();
    let configs = live::read(&mut agent, module).context("its configuration cannot be read")?;
    supervisor.take_out(module);
    agent
        .remove_module(module)
        .context("it cannot be removed")?;
    match supervisor.driver_file(module) {
        Some(path) => agent.insert_file(&path),
        None => agent.insert_installed(module),
    }
    .context("it cannot be inserted")?;
    let deadline = guest.now() + STEP_TIME;
    let lost = live::put_back(guest, &mut agent, &configs, deadline)?;
    if !lost.is_empty() {
        tracing::warn!(
            "{module} was restarted but is not as before: {}",
            lost.join(", ")
        );
    }
    // The agent listens to one client at a time, and isolating asks it as well.
    drop(agent);
    isolate_again(supervisor, module)
}

/// Has the guest go back to its last mark or snapshot, and the module isolated in it also if it was
/// not at the mark.
fn go_back<G: LiveGuest>(
    supervisor: &Supervisor<G>,
    module: &str,
    ladder: &Arc<Mutex<Ladder>>,
    turn: &Taken<'_>,
) -> anyhow::Result<()> {
    let request = supervisor.request(module);
    match turn.lend(|| supervisor.guest().go_back())? {
        WentBackTo::Snapshot => return all_again(supervisor, module),
        WentBackTo::Mark if supervisor.ladder(module).is_some() => return Ok(()),
        WentBackTo::Mark => {}
    }
    let request = request.context("it is not isolated any more")?;
    let isolated = supervisor.isolate_with(request, ladder.clone(), &Nobody);
    isolated
        .map(drop)
        .context("it cannot be isolated in the guest as it was at the mark")
}

/// Isolates again in a guest that is back at its snapshot what was isolated before. Only that it
/// does not work for `module` is an error.
fn all_again<G: LiveGuest>(supervisor: &Supervisor<G>, module: &str) -> anyhow::Result<()> {
    let guest = supervisor.guest();
    guest.agent().wait_until_it_answers(STEP_TIME)?;
    // The driver that failed is not left to run as it is for longer than it has to.
    isolate_again(supervisor, module)?;
    for (other, status) in supervisor.status() {
        if other == module {
            continue;
        }
        let is_stopped = status.state == State::Stopped;
        if let Err(error) = isolate_other(supervisor, &other, is_stopped) {
            tracing::error!("{other} is not isolated any more: {error:#}");
        }
    }
    Ok(())
}

fn isolate_other<G: LiveGuest>(
    supervisor: &Supervisor<G>,
    module: &str,
    is_stopped: bool,
) -> anyhow::Result<()> {
    isolate_again(supervisor, module)?;
    if is_stopped {
        supervisor.guest().stop(module)?;
        if let Some(ladder) = supervisor.ladder(module) {
            supervisor.give_up(module, &ladder);
        }
    }
    Ok(())
}

/// Resets the guest, and isolates the same functions again once it has booted.
fn reset<G: LiveGuest>(supervisor: &Supervisor<G>, module: &str) -> anyhow::Result<()> {
    let guest = supervisor.guest();
    guest.reset().context("the guest cannot be reset")?;
    guest.agent().wait_until_it_answers(BOOT_TIME)?;
    let deadline = guest.now() + STEP_TIME;
    let loaded = || guest.agent().modules(Some(module));
    while !loaded().is_ok_and(|modules| !modules.is_empty()) {
        ensure!(
            guest.now() < deadline,
            "the guest does not load {module} at boot"
        );
        guest.wait(POLL);
    }
    isolate_again(supervisor, module)
}

fn isolate_again<G: LiveGuest>(supervisor: &Supervisor<G>, module: &str) -> anyhow::Result<()> {
    supervisor
        .isolate_again(module)
        .map(drop)
        .context("it cannot be isolated again")
}

#[cfg(test)]
#[path = "rungs_tests.rs"]
mod tests;
