//! What a VM process answers on its control socket.

mod bystanders;
mod drivers;
mod faults;
mod machine;
mod probe;
mod status;
mod traces;

use std::sync::Arc;
use std::time::Duration;

use isolation::attach::Isolator;
use isolation::dispatch::fault::{FaultOrder, UsedUpBy, WhichCalls};
use recovery::asker::Asker;
use recovery::guest::LiveGuest;
use recovery::request::IsolationRequest;
use recovery::supervisor::Supervisor;
use vmm::snapshot::SnapshotRequest;
use vmm::{Refused, VmHandle};

use faults::Code;

use super::RunConfig;
use super::isolation::Isolation;
use super::kept_console::KeptConsole;
use super::nics::Nics;
use super::panic_watch::GuestPanic;
use super::plugging::Plugging;
use bystanders::Learned;

use super::resident::Counter;
use super::saved::SavedVm;
use super::summary::summary;
use crate::control::protocol::{ConfigSummary, Reply, Request};
use crate::control::server::Handler;
use crate::error_text::chain;

/// How long who reads a console waits at most.
const CONSOLE_TIME: Duration = Duration::from_secs(1);

/// How long a guest that is said to have panicked has to show that it lives.
const PANIC_TIME: Duration = Duration::from_secs(2);

/// The VM as its control socket sees it.
pub struct VmService {
    vm: VmHandle,
    nics: Nics,
    plugging: Plugging,
    supervisor: Arc<Supervisor<Isolation>>,
    name: String,
    config: ConfigSummary,
    /// The same for a snapshot.
    saved: SavedVm,
    told: Told,
    resident: Counter,
    /// Memory that changes by itself.
    learned: Learned,
}

/// What is told of the guest besides.
pub struct Told {
    /// Whether its kernel has panicked.
    pub panic: GuestPanic,
    /// What it printed.
    pub console: KeptConsole,
    /// When its process began.
    pub started_ns: u64,
}

impl VmService {
    /// Serves the VM of `plugging`, which was made from `config`.
    ///
    /// # Errors
    /// What it was made from cannot be kept.
    pub fn new(
        config: &RunConfig,
        plugging: Plugging,
        supervisor: Arc<Supervisor<Isolation>>,
        told: Told,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            saved: SavedVm::new(config)?.with_models(&plugging.nics().all()),
            vm: plugging.vm().clone(),
            nics: plugging.nics().clone(),
            plugging,
            supervisor,
            name: config.name.to_string(),
            config: summary(config),
            told,
            resident: Counter::default(),
            learned: Learned::default(),
        })
    }

    fn isolator(&self) -> &Isolator {
        self.supervisor.guest().isolator()
    }

    /// Whether there is a guest that can answer: one that stands still is not waited for.
    fn guest_runs(&self) -> Result<(), String> {
        if self.vm.state() == vmm::VmState::Paused {
            return Err("the VM is paused: `cofferdam resume` lets it go on".to_owned());
        }
        let Some(line) = self.told.panic.line() else {
            return Ok(());
        };
        // A guest can print what it likes. One that has panicked does not answer.
        let answers = self.supervisor.guest().agent().hello(PANIC_TIME);
        answers.map(drop).map_err(|_| {
            format!("the guest has panicked ({line}): `cofferdam reset` boots it anew")
        })
    }

    fn console(&self, from: Option<u64>, wait: Duration) -> Reply {
        Reply::Console(self.told.console.read(from, wait.min(CONSOLE_TIME)))
    }

    fn has_small_pages(&self, done: &str) -> Result<(), String> {
        match self.vm.ram().has_large_pages() {
            true => Err(format!(
                "guest memory is in large pages: such a VM cannot be {done}; run it without --large-pages"
            )),
            false => Ok(()),
        }
    }
}

impl Handler for VmService {
    // A flat table: an arm only gives the parts of its request to what answers it.
    #[expect(
        clippy::too_many_lines,
        reason = "a flat table: an arm for each request"
    )]
    fn handle(&self, request: Request, asker: &dyn Asker) -> Result<Reply, String> {
        match request {
            Request::Status {} => self.status(),
            Request::Pause {} => self.pause(),
            Request::Resume {} => self.resume(),
            Request::Reset {} => done(self.vm.reset(), None),
            Request::PowerButton {} => done(self.vm.press_power_button(), None),
            Request::Wake {} => done(self.vm.wake(), None),
            Request::Quit {} => done(self.vm.power_off(), Some(Refused::Stopped)),
            Request::Snapshot {
                dir,
                parent,
                track,
                stop,
            } => {
                let request = SnapshotRequest {
                    dir: &dir,
                    parent: parent.as_deref(),
                    program: concat!("cofferdam ", env!("CARGO_PKG_VERSION")),
                    track,
                    stop,
                    limit: machine::REST_TIME,
                };
                self.snapshot(&request, asker)
            }
            Request::Plug { net, nic } => self.plug(net.as_deref(), nic.as_deref()),
            Request::Unplug { address } => {
                self.plugging.unplug(&address, asker).map_err(chain)?;
                self.supervisor.device_gone(&address);
                Ok(Reply::Done {})
            }
            Request::Mark { name } => self.mark(&name, asker),
            Request::Rewind { name } => self.rewind(name.as_deref(), asker),
            Request::Marks {} => Ok(self.marks()),
            Request::ForgetMark { name } => self.forget_mark(&name),
            Request::Bystanders {
                module,
                mark,
                learn,
            } => self.bystanders(&module, &mark, learn),
            Request::Isolate {
                module,
                entries,
                budget_us,
                device_checkpoint,
                recovery,
                spilling,
                contain,
                keep_faults,
            } => self.isolate(
                IsolationRequest {
                    module,
                    entries,
                    budget_us,
                    checkpoint: device_checkpoint,
                    spilling,
                    contain,
                    keep_faults,
                },
                recovery,
                asker,
            ),
            Request::Release { module } => self.release(&module, asker),
            Request::Upgrade {
                module,
                file,
                limit_ms,
            } => self.upgrade(&module, &file.0, Duration::from_millis(limit_ms), asker),
            Request::SuspendDevice { module } => self.suspend_device(&module, asker),
            Request::ResumeDevice { module } => self.resume_device(&module, asker),
            Request::HandOver { device } => self.hand_over(&device, asker),
            Request::TakeOver { device } => self.take_over(&device, asker),
            Request::Violations { module } => self.violations(&module),
            Request::BeginTrace { module, wanted } => self.begin_trace(&module, wanted),
            Request::TakeTrace { module, id } => self.take_trace(&module, id),
            Request::EndTrace { module, id } => self.end_trace(&module, id),
            Request::Instructions { module, function } => self.instructions(&module, &function),
            Request::Inject {
                module,
                entry,
                offset,
                fault,
                every,
                times,
            } => self.inject(
                &module,
                FaultOrder {
                    function: entry,
                    offset,
                    code: fault.code().to_vec(),
                    which: WhichCalls::Every(every.into()),
                    times,
                    used_up_by: UsedUpBy::Failing,
                },
            ),
            Request::FunctionText { module, function } => self.function_text(&module, &function),
            Request::InjectCode {
                module,
                function,
                offset,
                old,
                new,
                replaces_whole,
                calls,
            } => {
                let code = Code {
                    function,
                    offset,
                    old: old.0,
                    new: new.0,
                    replaces_whole,
                };
                self.inject_code(&module, code, calls)
            }
            Request::Faults { module } => Ok(self.faults(&module)),
            Request::UndoFaults { module } => self.undo_faults(&module),
            Request::FaultCount { module } => self.fault_count(&module),
            Request::Disturb { nic, order } => self.disturb(nic.as_deref(), order),
            Request::Undisturb { nic, number } => self.undisturb(nic.as_deref(), number),
            Request::Disturbances { nic } => self.disturbances(nic.as_deref()),
            Request::Console { from, wait_ms } => {
                Ok(self.console(from, Duration::from_millis(wait_ms)))
            }
            Request::Type { bytes } => {
                self.told.console.type_in(&bytes.0)?;
                Ok(Reply::Done {})
            }
            Request::Mouse { event } => self.mouse(event),
            Request::ProbeStart { interval_us } => self.probe_start(interval_us),
            Request::ProbeStop {} => {
                self.gateway()?.stop_probe();
                Ok(Reply::Done {})
            }
            Request::ProbeRead { since_ns } => self.probe_read(since_ns),
        }
    }
}

/// An answer that says no more than whether it was done; `as_good` is no failure.
fn done(result: Result<(), Refused>, as_good: Option<Refused>) -> Result<Reply, String> {
    match result {
        Err(error) if Some(error) != as_good => Err(error.to_string()),
        _ => Ok(Reply::Done {}),
    }
}

fn json(value: &impl serde::Serialize) -> Result<serde_json::Value, String> {
    serde_json::to_value(value).map_err(|error| format!("cannot be shown as JSON: {error}"))
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
