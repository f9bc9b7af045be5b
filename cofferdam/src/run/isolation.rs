//! The live guest as recovery sees it ([`LiveGuest`]): this VM with its isolator, its NICs and the
//! agent in its guest.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_protocol::Client;
use agent_protocol::message::Module;
use anyhow::{Context, anyhow, bail, ensure};
use devices::clock::monotonic_ns;
use devices::hold::{CheckpointBy, DeviceState, OutsideChanges};
use devices::pci::bus::PowerState;
use isolation::attach::request::{IsolateRequest, Isolated};
use isolation::attach::text_fault::{FunctionText, LoadedModule, TextChange};
use isolation::attach::{AttachError, DEFAULT_BUDGET, DEFAULT_SLEEP_LIMIT, Isolator};
use isolation::dispatch::after_fault::FaultPolicy;
use isolation::status::ModuleStatus;
use isolation::suspend_resume::DriverCalls;
use recovery::asker::Asker;
use recovery::guest::{LiveGuest, WentBackTo};
use recovery::model::Model;
use recovery::request::IsolationRequest;
use vmm::snapshot::{Chain, SnapshotId};
use vmm::{MarkError, RewindError, VmHandle};

use super::at_ports;
use super::elsewhere;
use super::known::{Knowledge, Known};
use super::nics::Nics;

/// How long the agent may take to list the guest's symbols.
const AGENT_TIME: Duration = Duration::from_secs(60);

/// How long a guest that has to go back to a mark may take to come to rest.
const REST_TIME: Duration = Duration::from_secs(5);

/// Longest that the guest may stand still because a call waits.
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// Budgets outside are refused, in microseconds.
const BUDGET_US: std::ops::RangeInclusive<u64> = 20_000..=60_000_000;

/// A VM, its guest and what isolates modules of it.
pub struct Isolation {
    isolator: Arc<Isolator>,
    agent_socket: PathBuf,
    nics: Nics,
    vm: VmHandle,
    knowledge: Knowledge,
    /// What the guest can go back to where it has no mark: the last snapshot of it.
    snapshot: Mutex<Option<LastSnapshot>>,
    /// Whether it has a disk that it writes.
    writes_disks: bool,
}

/// A snapshot that was taken, or gone on from.
struct LastSnapshot {
    /// Its whole path.
    dir: PathBuf,
    /// There may be another one in that place by now.
    id: SnapshotId,
}

impl Isolation {
    /// For `vm` with its `isolator`, whose agent is reached at `agent_socket`.
    pub fn new(
        vm: VmHandle,
        isolator: Arc<Isolator>,
        agent_socket: PathBuf,
        nics: Nics,
        writes_disks: bool,
    ) -> Self {
        Self {
            isolator,
            agent_socket,
            nics,
            vm,
            knowledge: Knowledge::default(),
            snapshot: Mutex::new(None),
            writes_disks,
        }
    }

    /// The snapshot in `dir`, a whole path, is the last one of the guest from now on.
    pub fn has_snapshot(&self, dir: PathBuf, id: SnapshotId) {
        *lock(&self.snapshot) = Some(LastSnapshot { dir, id });
    }

    /// Has the guest go back to its last snapshot; `false` if there is none.
    fn go_back_to_snapshot(&self) -> anyhow::Result<bool> {
        let last = lock(&self.snapshot);
        let Some(LastSnapshot { dir, id }) = &*last else {
            return Ok(false);
        };
        let (dir, id) = (dir.clone(), *id);
        drop(last);
        ensure!(
            !self.writes_disks,
            "a disk that the guest writes does not go back with it"
        );
        elsewhere::give_state(&self.nics, "taken back").map_err(|why| anyhow!(why))?;
        let chain = Chain::open(&dir)?;
        ensure!(
            chain.top().manifest().id == id,
            "{} is not the last snapshot any more",
            dir.display()
        );
        let pages = self.vm.go_back_to(&chain, REST_TIME, &mut |_| true)?;
        tracing::warn!(
            "the guest is back at its snapshot {}, with {pages} pages put back",
            dir.display()
        );
        Ok(true)
    }

    /// What isolates.
    pub fn isolator(&self) -> &Isolator {
        &self.isolator
    }

    /// What there is to know of the guest and of `module`.
    fn knowledge(
        &self,
        agent: &mut Client,
        module: &str,
        loaded: Vec<Module>,
    ) -> anyhow::Result<Arc<Known>> {
        let resets = self.vm.status().resets;
        self.knowledge
            .of(&self.isolator, resets, agent, module, loaded)
    }
}

/// Functions of modules, isolated or not.
impl Isolation {
    /// The bytes of a function of `module`.
    pub fn function_text(&self, module: &str, function: &str) -> anyhow::Result<FunctionText> {
        self.with_loaded(module, |isolator, module| {
            isolator.function_text(module, function)
        })
    }

    /// Puts a fault into the guest's own text; `at` gets the address of `function`.
    pub fn set_text_fault(
        &self,
        module: &str,
        function: &str,
        change: impl Fn(u64) -> TextChange,
    ) -> anyhow::Result<()> {
        let put = |isolator: &Isolator, module: LoadedModule<'_>| {
            let start = isolator.function_text(module, function)?.start;
            isolator.set_text_fault(module, change(start))
        };
        // What was known of the module is still so where the code there is what the change says, as
        // it is after a rewind. The guest's agent is not asked for all of its modules then.
        if let Some(known) = self.knowledge.last()
            && let Some(sections) = known.sections_of(module)
        {
            let loaded = LoadedModule {
                name: module,
                sections,
                symbols: &known.symbols,
            };
            let done = put(&self.isolator, loaded);
            known.cool();
            if done.is_ok() {
                return Ok(());
            }
        }
        self.with_loaded(module, put)
    }

    fn with_loaded<T>(
        &self,
        module: &str,
        look: impl FnOnce(&Isolator, LoadedModule<'_>) -> Result<T, AttachError>,
    ) -> anyhow::Result<T> {
        let mut agent = self.agent();
        let loaded = agent.modules(None)?;
        let own = loaded.iter().find(|one| one.name == module);
        let own = own.with_context(|| format!("the guest has no module {module} loaded"))?;
        let sections = own.sections.clone();
        let known = self.knowledge(&mut agent, module, loaded)?;
        let loaded = LoadedModule {
            name: module,
            sections: &sections,
            symbols: &known.symbols,
        };
        let result = look(&self.isolator, loaded);
        known.cool();
        Ok(result?)
    }
}

impl LiveGuest for Isolation {
    type Agent = Client;
    type DeviceState = DeviceState;
    type Learnt = Option<Arc<Known>>;

    fn agent(&self) -> Client {
        let mut agent = Client::unix(self.agent_socket.clone());
        agent.set_limit(AGENT_TIME);
        agent
    }

    fn isolate(
        &self,
        request: &IsolationRequest,
        policy: Box<dyn FaultPolicy>,
        asker: &dyn Asker,
    ) -> anyhow::Result<Isolated> {
        let module = request.module.as_str();
        if let Some(budget) = request.budget_us.filter(|us| !BUDGET_US.contains(us)) {
            bail!(
                "a budget of {budget} us is not sensible: choose one from {} to {} us",
                BUDGET_US.start(),
                BUDGET_US.end()
            );
        }
        asker.tell("waiting for the guest's agent")?;
        let mut agent = self.agent();
        let loaded = agent.modules(None)?;
        let Some(own) = loaded.iter().find(|loaded| loaded.name == module) else {
            bail!("the guest has no module {module} loaded (see lsmod in it)");
        };
        let sections = own.sections.clone();
        let text = sections
            .iter()
            .find(|(name, _)| name == ".text")
            .map(|(_, at)| *at);
        self.isolator.forget_stale(module, text);
        asker.tell("reading the symbols and types of the guest")?;
        let known = self.knowledge(&mut agent, module, loaded)?;
        if let (Err(missing), true) = (&known.types, request.contain.is_needed()) {
            return Err(AttachError::NotContained(missing.clone()).into());
        }
        self.nics.look(&mut agent, module)?;
        let at_ports = at_ports::driven_by(module, &self.vm, &mut agent)?;
        let kernel = agent.agent().map_or("", |agent| agent.kernel.as_str());
        let driven = self.nics.of(module, request.checkpoint)?;
        let (device, device_slots) = match driven {
            Some(driven) => (Some(driven.device), driven.slots),
            None => (None, Vec::new()),
        };
        let device = at_ports::together(device, at_ports);
        asker.tell("making the domain")?;
        let isolated = self.isolator.isolate(IsolateRequest {
            module: module.to_owned(),
            sections,
            symbols: known.symbols.clone(),
            types: known.types.as_ref().ok().cloned(),
            contain: request.contain,
            kernel: kernel.to_owned(),
            wanted: request.entries.clone(),
            model: Model::for_release(kernel)
                .transpose()?
                .map(|model| model.for_isolation()),
            guest_only: request.spilling.guest_only.clone(),
            device,
            device_slots,
            memory_moves: self.nics.elsewhere().is_some(),
            sleep_limit: request.spilling.wait_us.map_or(DEFAULT_SLEEP_LIMIT, |us| {
                Duration::from_micros(us).min(LONGEST_WAIT)
            }),
            budget: request
                .budget_us
                .map_or(DEFAULT_BUDGET, Duration::from_micros),
            policy,
            keep_faults: request.keep_faults.clone(),
        });
        // All of that was looked at on the way.
        known.cool();
        Ok(isolated?)
    }

    fn settle_reports(&self) {
        self.isolator.settle_reports();
    }

    fn release(&self, module: &str) -> anyhow::Result<ModuleStatus> {
        Ok(self.isolator.release(module)?)
    }

    fn stop(&self, module: &str) -> anyhow::Result<()> {
        Ok(self.isolator.stop(module)?)
    }

    fn set_given_up(&self, module: &str, given_up: bool) {
        self.nics.set_given_up(module, given_up);
    }

    fn driver_changed(&self, _module: &str) {
        // Even at the same addresses it may have other functions and types.
        self.knowledge.forget();
    }

    fn begin_suspend_resume(
        &self,
        agent: &mut Client,
        calls: DriverCalls,
        module: &str,
        word: &[u8],
    ) -> anyhow::Result<()> {
        let loaded = agent.modules(None)?;
        let own = loaded.iter().find(|one| one.name == module);
        let own = own.with_context(|| format!("the guest has no module {module} loaded"))?;
        let sections = own.sections.clone();
        // Which devices it drives is not known yet of a module that was never isolated.
        self.nics.look(agent, module)?;
        let known = self.knowledge(agent, module, loaded)?;
        let types = known
            .types
            .as_ref()
            .map_err(|why| anyhow!("not known: {why}"))?;
        self.isolator.begin_suspend_resume(
            calls,
            module,
            &sections,
            &known.symbols,
            types,
            word,
        )?;
        // Which devices it drives is not known yet of a module that is not isolated.
        self.nics.look(agent, module)
    }

    fn end_suspend_resume(&self) -> anyhow::Result<Duration> {
        Ok(self.isolator.end_suspend_resume()?)
    }

    fn reset(&self) -> anyhow::Result<()> {
        Ok(self.vm.reset()?)
    }

    fn go_back(&self) -> anyhow::Result<WentBackTo> {
        let rewound = match self.vm.rewind(None, REST_TIME) {
            Err(RewindError::Refused(MarkError::NoMark)) => {
                let went = self.go_back_to_snapshot()?;
                ensure!(went, "the guest has no mark and no snapshot");
                return Ok(WentBackTo::Snapshot);
            }
            rewound => rewound?,
        };
        tracing::warn!(
            "the guest is back at its mark {}, with {} pages put back",
            rewound.mark,
            rewound.pages
        );
        Ok(WentBackTo::Mark)
    }

    fn learnt(&self) -> Self::Learnt {
        self.knowledge.last()
    }

    fn put_learnt_back(&self, learnt: &Self::Learnt) {
        self.knowledge.put_back(learnt.clone());
    }

    fn hold_link(&self, module: &str, hold: bool) {
        let driven = self.nics.of(module, CheckpointBy::Exact);
        let Ok(Some(driven)) = driven else { return };
        let held = driven.device.hold(&mut |held| match hold {
            true => held.keep_outside(),
            false => held.show_outside(OutsideChanges::Forgotten),
        });
        if let Err(lost) = held {
            tracing::warn!("what is outside sees what becomes of {module}'s device: {lost}");
        }
    }

    fn save_device(&self, module: &str) -> Option<DeviceState> {
        self.nics.save(module)
    }

    fn restore_device(&self, module: &str, state: DeviceState) -> anyhow::Result<()> {
        // Not while the machine is at rest: it writes the rings in the guest's memory.
        self.vm
            .with_devices(|| self.nics.put_back(&self.vm, module, &state))
    }

    fn set_power(&self, module: &str, awake: bool) -> bool {
        let state = match awake {
            true => PowerState::D0,
            false => PowerState::D3Hot,
        };
        self.nics.set_power(&self.vm, module, state)
    }

    fn now(&self) -> Duration {
        Duration::from_nanos(monotonic_ns())
    }

    fn wait(&self, time: Duration) {
        std::thread::sleep(time);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change under these locks is whole when it can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
