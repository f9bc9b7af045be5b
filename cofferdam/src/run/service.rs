//! What a VM process answers on its control socket.

mod faults;
mod status;

use std::sync::Arc;
use std::time::Duration;

use devices::wire::gateway::{GatewayControl, GatewayEventKind};
use isolation::attach::Isolator;
use isolation::dispatch::fault::{FaultOrder, UsedUpBy, WhichCalls};
use recovery::asker::Asker;
use recovery::guest::LiveGuest;
use recovery::ladder::LadderConfig;
use recovery::model::Model;
use recovery::request::IsolationRequest;
use recovery::resume_device::Resumed;
use recovery::supervisor::Supervisor;
use vmm::snapshot::{Beside, SnapshotRequest};
use vmm::{Refused, VmHandle};

use faults::Code;

use super::isolation::Isolation;
use super::kept_console::KeptConsole;
use super::nics::Nics;
use super::panic_watch::GuestPanic;
use super::plugging::Plugging;
use super::saved::SavedVm;
use super::summary::{nic_status, summary};
use super::{RunConfig, disturbance, elsewhere, memory};
use crate::control::protocol::{ConfigSummary, ProbeReading, Reply, Request};
use crate::control::server::Handler;
use crate::error_text::chain;

/// Least time between two pings of the gateway, in microseconds.
const MIN_PROBE_INTERVAL_US: u64 = 1000;

/// Longest time between two pings, in microseconds.
const MAX_PROBE_INTERVAL_US: u64 = 3_600_000_000;

/// How long a guest may take to come to rest: calls that are open have to end.
const REST_TIME: Duration = Duration::from_secs(10);

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
            saved: SavedVm::new(config)?,
            vm: plugging.vm().clone(),
            nics: plugging.nics().clone(),
            plugging,
            supervisor,
            name: config.name.to_string(),
            config: summary(config),
            told,
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

    /// That nothing keeps the VM from being `done`: all of that works on single pages of memory
    /// that only this process writes.
    fn may_be(&self, done: &str) -> Result<(), String> {
        elsewhere::none(&self.nics, done)?;
        self.has_small_pages(done)
    }

    fn has_small_pages(&self, done: &str) -> Result<(), String> {
        match self.vm.ram().has_large_pages() {
            true => Err(format!(
                "guest memory is in large pages: such a VM cannot be {done}; run it without --large-pages"
            )),
            false => Ok(()),
        }
    }

    /// Isolates what was asked for, unless who asked has gone when all is known that it takes.
    fn isolate(
        &self,
        request: IsolationRequest,
        recovery: LadderConfig,
        asker: &dyn Asker,
    ) -> Result<Reply, String> {
        self.guest_runs()?;
        self.has_small_pages("isolated")?;
        let isolated = self
            .supervisor
            .isolate(request, recovery, asker)
            .map_err(chain);
        // The agent's lists are large, and what reads them is not needed soon.
        memory::give_back_unused();
        let isolated = isolated?;
        let mut reply = json(&isolated)?;
        let model = isolated.strength.model.as_deref();
        if let Some(model) = model
            .and_then(Model::for_release)
            .transpose()
            .map_err(text)?
        {
            reply["not_modelled"] = json(&not_modelled(&model, &isolated.imports))?;
        }
        Ok(Reply::Isolated(reply))
    }

    fn marks(&self) -> Reply {
        Reply::Marks {
            marks: self.vm.marks(),
        }
    }

    fn snapshot(&self, request: &SnapshotRequest<'_>, asker: &dyn Asker) -> Result<Reply, String> {
        self.may_be("saved")?;
        if self.nics.forget_gone(&self.vm) {
            return Err(
                "a VM with NICs that came while it ran cannot be saved yet: `cofferdam unplug` takes them out"
                    .to_owned(),
            );
        }
        let paths = std::iter::once(request.dir).chain(request.parent);
        if paths.into_iter().any(|path| !path.is_absolute()) {
            return Err("a snapshot's directory is named by its whole path".to_owned());
        }
        let mut tell = |what: &str| asker.tell(what).is_ok();
        let mut beside = || {
            if let Some(module) = self.supervisor.suspended().first() {
                return Err(format!(
                    "the devices of {module} are suspended: `cofferdam resume-device` brings them back"
                ));
            }
            let isolated = self.supervisor.isolated();
            let clean = self.isolator().clean_bytes().into_iter();
            Ok(Beside {
                vm: json(&self.saved.with_isolated(isolated))?,
                instead: clean.map(|clean| (clean.at, clean.bytes)).collect(),
            })
        };
        let taken = self.vm.snapshot(request, &mut tell, &mut beside);
        taken.map(Reply::Snapshot).map_err(text)
    }

    fn gateway(&self) -> Result<GatewayControl, String> {
        let nics = self.nics.all();
        let mut gateways = nics.into_iter().filter_map(|nic| nic.gateway);
        gateways
            .next()
            .ok_or_else(|| "this VM has no gateway: run it with --net user".to_owned())
    }

    fn probe_start(&self, interval_us: u64) -> Result<Reply, String> {
        if !(MIN_PROBE_INTERVAL_US..=MAX_PROBE_INTERVAL_US).contains(&interval_us) {
            return Err(format!(
                "pings come every {MIN_PROBE_INTERVAL_US} to {MAX_PROBE_INTERVAL_US} microseconds"
            ));
        }
        self.gateway()?
            .start_probe(Duration::from_micros(interval_us));
        Ok(Reply::Done {})
    }

    fn probe_read(&self, since_ns: u64) -> Result<Reply, String> {
        let log = self.gateway()?.log();
        let events = log.events_since(since_ns);
        let count = |wanted: fn(&GatewayEventKind) -> bool| {
            events.iter().filter(|event| wanted(&event.kind)).count() as u64
        };
        Ok(Reply::Probe(ProbeReading {
            first_reply_ns: log.first_reply_since(since_ns),
            last_reply_before_ns: log.last_reply_before(since_ns),
            first_frame_ns: events
                .iter()
                .find(|event| event.kind == GatewayEventKind::FrameAfterSilence)
                .map(|event| event.at_ns),
            first_round_trip_ns: log.first_round_trip_since(since_ns),
            first_tx_ns: log.first_frame_since(since_ns),
            first_interrupt_ns: self
                .nics
                .all()
                .iter()
                .find(|nic| nic.gateway.is_some())
                .and_then(|nic| nic.nic.interrupts.as_ref())
                .and_then(|taken| taken.first_since(since_ns)),
            sent: count(|kind| matches!(kind, GatewayEventKind::ProbeSent { .. })),
            replied: count(|kind| matches!(kind, GatewayEventKind::ProbeReplied { .. })),
        }))
    }
}

impl Handler for VmService {
    fn handle(&self, request: Request, asker: &dyn Asker) -> Result<Reply, String> {
        match request {
            Request::Status {} => self.status(),
            // Asked for twice is as good as once.
            Request::Pause {} => {
                let paused = elsewhere::pause(&self.vm, &self.nics);
                done(paused, Some(Refused::AlreadyPaused))
            }
            Request::Resume {} => {
                let resumed = elsewhere::resume(&self.vm, &self.nics);
                done(resumed, Some(Refused::NotPaused))
            }
            Request::Reset {} => done(self.vm.reset(), None),
            Request::PowerButton {} => done(self.vm.press_power_button(), None),
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
                    limit: REST_TIME,
                };
                self.snapshot(&request, asker)
            }
            Request::Plug { net, nic } => {
                let plugged = match (net, nic) {
                    (Some(net), None) => self.plugging.plug_net(net.parse().map_err(text)?),
                    (None, Some(nic)) => {
                        let nic = nic.parse().map_err(text)?;
                        elsewhere::may_come(&self.vm, self.isolator())?;
                        self.plugging.plug_nic(nic)
                    }
                    _ => return Err("give one NIC: either --net or --nic".to_owned()),
                };
                Ok(Reply::Plugged(nic_status(&plugged.map_err(chain)?)))
            }
            Request::Unplug { address } => {
                self.plugging.unplug(&address, asker).map_err(chain)?;
                Ok(Reply::Done {})
            }
            Request::Mark { name } => {
                self.may_be("marked")?;
                asker.tell("setting a mark").map_err(text)?;
                let marked = self.vm.mark(&name, REST_TIME);
                marked.map(Reply::Marked).map_err(text)
            }
            Request::Rewind { name } => {
                asker.tell("going back").map_err(text)?;
                let rewound = self.vm.rewind(name.as_deref(), REST_TIME);
                rewound.map(Reply::Rewound).map_err(text)
            }
            Request::Marks {} => Ok(self.marks()),
            Request::ForgetMark { name } => {
                self.vm.forget_mark(&name).map_err(text)?;
                Ok(self.marks())
            }
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
            Request::Release { module } => {
                asker
                    .tell(&format!("waiting for calls of {module} to end"))
                    .map_err(text)?;
                let status = self.supervisor.release(&module).map_err(chain)?;
                Ok(Reply::Released(Box::new(status)))
            }
            Request::Upgrade {
                module,
                file,
                limit_ms,
            } => {
                self.guest_runs()?;
                let limit = Duration::from_millis(limit_ms);
                let upgraded = self.supervisor.upgrade(&module, &file.0, limit, asker);
                Ok(Reply::Upgraded(Box::new(upgraded.map_err(chain)?)))
            }
            Request::SuspendDevice { module } => {
                self.guest_runs()?;
                let phases = self.supervisor.suspend_device(&module, asker);
                phases.map(Reply::DeviceSuspended).map_err(chain)
            }
            Request::ResumeDevice { module } => {
                self.guest_runs()?;
                let us = |time: &Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
                match self
                    .supervisor
                    .resume_device(&module, asker)
                    .map_err(chain)?
                {
                    Resumed::FromRest(phases) => Ok(Reply::DeviceResumed(phases)),
                    Resumed::Anew(times) => Ok(Reply::Resumed {
                        times_us: times.iter().map(us).collect(),
                    }),
                }
            }
            Request::Violations { module } => {
                let all = self.supervisor.violations(&module);
                let reports = self.isolator().reports(&module);
                let isolated = reports.is_ok();
                // Of one that was released what it did is still known.
                let reports = match reports {
                    Err(error) if all.is_empty() => return Err(error.to_string()),
                    reports => reports.unwrap_or_default(),
                };
                Ok(Reply::Violations {
                    isolated,
                    all,
                    texts: reports.iter().map(ToString::to_string).collect(),
                    reports: json(&reports)?,
                })
            }
            Request::Instructions { module, function } => {
                let instructions = self.isolator().instructions(&module, &function);
                Ok(Reply::Instructions {
                    instructions: instructions.map_err(text)?,
                })
            }
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
            Request::FaultCount { module } => {
                let count = self.isolator().fault_count(&module).map_err(text)?;
                Ok(Reply::FaultCount(count))
            }
            Request::Disturb { nic, order } => {
                self.nics.forget_gone(&self.vm);
                let begin = || disturbance::begin(&self.nics, nic.as_deref(), order);
                self.vm.with_devices(begin).map(Reply::Disturbed)
            }
            Request::Undisturb { nic, number } => {
                let end = || disturbance::end(&self.nics, nic.as_deref(), number);
                let disturbances = self.vm.with_devices(end)?;
                Ok(Reply::Disturbances { disturbances })
            }
            Request::Disturbances { nic } => {
                let disturbances = disturbance::all(&self.nics, nic.as_deref())?;
                Ok(Reply::Disturbances { disturbances })
            }
            Request::Console { from, wait_ms } => {
                let wait = Duration::from_millis(wait_ms).min(CONSOLE_TIME);
                Ok(Reply::Console(self.told.console.read(from, wait)))
            }
            Request::Type { bytes } => {
                self.told.console.type_in(&bytes.0)?;
                Ok(Reply::Done {})
            }
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

/// Imports of which the model of kernel functions knows nothing: a call that spills and reaches one
/// cannot be taken back as a whole.
fn not_modelled<'a>(model: &Model, imports: &'a [Vec<String>]) -> Vec<&'a str> {
    let known = |name: &String| model.get(name).is_some();
    let unknown = imports.iter().filter(|names| !names.iter().any(known));
    unknown
        .filter_map(|names| names.first())
        .map(String::as_str)
        .collect()
}

fn json(value: &impl serde::Serialize) -> Result<serde_json::Value, String> {
    serde_json::to_value(value).map_err(|error| format!("cannot be shown as JSON: {error}"))
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
