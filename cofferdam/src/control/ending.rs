//! How a VM is made to end.

use std::time::{Duration, Instant};

use agent_protocol::Client;
use anyhow::{Context, ensure};

use super::client::{ANSWER_TIME, ControlClient};
use super::protocol::Request;
use crate::error_text::one_line;
use crate::process::Process;
use crate::runtime_dir::{RunningVm, RuntimeRoot};

/// How long a VM has to end by itself when it is to end at once.
const FORCE_TIME: Duration = Duration::from_secs(5);

/// How long to wait for the agent before the power button is pressed instead.
const AGENT_TIME: Duration = Duration::from_secs(3);

/// How often to look whether a VM has ended.
const END_POLL: Duration = Duration::from_millis(20);

/// How a VM that had to end did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Forced {
    /// By its own hand.
    Asked,
    /// It was killed, and why.
    Killed(String),
}

/// Asks a guest to shut down: by its agent, or else by the power button. One that has suspended
/// itself is woken first.
///
/// # Errors
/// The VM does not answer.
pub fn ask(vm: &RunningVm) -> anyhow::Result<()> {
    let mut control = ControlClient::to(vm, ANSWER_TIME)?;
    // A process that is stopped would have the agent waited for in vain.
    control.status()?;
    // One that has suspended itself hears neither its agent's channel nor the button. A VM of an
    // earlier version does not know of this, and is asked all the same.
    if let Err(error) = control.tell(&Request::Wake {}) {
        tracing::debug!("it was not woken: {error:#}");
    }
    let mut agent = Client::unix(vm.paths.agent_socket());
    let asked = agent.hello(AGENT_TIME).and_then(|_| agent.power_off());
    if let Err(error) = asked {
        tracing::info!("no agent ({error}): pressing the power button");
        control.tell(&Request::PowerButton {})?;
    }
    Ok(())
}

/// Ends a VM of `root` at once: by its own hand if it answers, otherwise by `SIGKILL`.
///
/// # Errors
/// It is still there.
pub fn force(root: &RuntimeRoot, vm: &RunningVm) -> anyhow::Result<Forced> {
    // Held from before it is asked, so that nobody else with its number is killed.
    let process = vm.pid.map(Process::open).transpose();
    let asked =
        ControlClient::to(vm, FORCE_TIME).and_then(|mut client| client.tell(&Request::Quit {}));
    let why = match asked {
        Ok(()) if ended(root, vm, FORCE_TIME)? => return Ok(Forced::Asked),
        Ok(()) => format!("{} does not end", vm.name),
        Err(error) => one_line(&error),
    };
    if !still_runs(root, vm)? {
        return Ok(Forced::Asked);
    }
    let process = process?.with_context(|| format!("{why}, and its process is not known"))?;
    process
        .kill()
        .with_context(|| format!("{why}, and its process cannot be killed"))?;
    ensure!(
        ended(root, vm, ANSWER_TIME)?,
        "{why}, and its process was killed but is still there"
    );
    // Its folder, which it could not remove any more.
    root.clear()?;
    Ok(Forced::Killed(why))
}

/// Waits for the end of a VM; whether it came in time.
///
/// # Errors
/// The runtime folder cannot be read.
pub fn ended(root: &RuntimeRoot, vm: &RunningVm, limit: Duration) -> anyhow::Result<bool> {
    let deadline = Instant::now() + limit;
    while still_runs(root, vm)? {
        if Instant::now() >= deadline {
            return Ok(false);
        }
        std::thread::sleep(END_POLL);
    }
    // The folder of one in a jail, which it cannot remove; the next VM clears it away as well.
    if let Err(error) = root.clear() {
        tracing::debug!("what {} left stays behind: {error:#}", vm.name);
    }
    Ok(true)
}

/// Whether the same process still has the VM's name.
fn still_runs(root: &RuntimeRoot, vm: &RunningVm) -> anyhow::Result<bool> {
    let running = root.running_as(&vm.name)?;
    Ok(running.is_some_and(|other| other.pid == vm.pid))
}
