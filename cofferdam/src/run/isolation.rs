//! Isolation as the VM process offers it on its control socket: what the guest's agent reports goes in,
//! counters and reports come out.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_protocol::Client;
use agent_protocol::message::{Module, SymbolFilter};
use devices::e1000::E1000;
use devices::e1000::HoldableE1000;
use devices::hold::{CheckpointBy, Holdable};
use isolation::attach::plan::Wanted;
use isolation::attach::{DEFAULT_BUDGET, DEFAULT_SLEEP_LIMIT, IsolateRequest, Isolator};
use isolation::dispatch::fault::FaultOrder;
use isolation::guest::btf::Btf;
use isolation::guest::symbols::{Line, SymbolTable, SymbolTableBuilder};
use isolation::status::ModuleStatus;

use recovery::ladder::{LadderConfig, LadderStatus};
use recovery::model::Model;
use vmm::VmHandle;

use super::recover::{self, LadderPolicy, Recoveries, Wish};
use super::{suspend, upgrade};
use crate::control::protocol::{EntrySelection, Reply};

/// How long the agent may take to list the guest's symbols.
const AGENT_TIME: Duration = Duration::from_secs(60);

/// Longest that the guest may stand still because a call waits.
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// Budgets outside are refused, in microseconds.
const BUDGET_US: std::ops::RangeInclusive<u64> = 100..=10_000_000;

/// The guest's NIC, which goes with the module `e1000`.
#[derive(Clone)]
pub struct IsolatedNic {
    /// The controller.
    pub nic: Arc<Mutex<E1000>>,
    /// Its PCI slot.
    pub slot: u8,
}

/// Isolates modules of this VM.
pub struct Isolation {
    isolator: Arc<Isolator>,
    agent_socket: PathBuf,
    nic: Option<IsolatedNic>,
    vm: VmHandle,
    recoveries: Recoveries,
    /// What the agent reported last: it takes seconds to transfer.
    known: Mutex<Option<Known>>,
    /// Held by whoever removes and inserts drivers.
    driver_change: Mutex<()>,
    /// Paths in the guest of the files of drivers that were upgraded.
    driver_files: Arc<Mutex<HashMap<String, String>>>,
}

/// What is known of a guest and a module, for as long as the same modules are loaded at the same places.
struct Known {
    module: String,
    loaded: Vec<Module>,
    symbols: Arc<SymbolTable>,
    types: Option<Arc<Btf>>,
}

impl Isolation {
    /// For `vm` with its `isolator`, whose agent is reached at `agent_socket`.
    pub fn start(
        vm: VmHandle,
        isolator: Arc<Isolator>,
        agent_socket: PathBuf,
        nic: Option<IsolatedNic>,
    ) -> std::io::Result<Arc<Self>> {
        let (recoveries, asked) = Recoveries::new();
        let isolation = Arc::new(Self {
            isolator,
            agent_socket,
            nic,
            vm,
            recoveries,
            known: Mutex::new(None),
            driver_change: Mutex::new(()),
            driver_files: Arc::default(),
        });
        // A guest that boots anew loads what is installed in it.
        let files = isolation.driver_files.clone();
        isolation.vm.on_reset(move || lock(&files).clear());
        let weak = Arc::downgrade(&isolation);
        std::thread::Builder::new()
            .name("recovery".to_owned())
            .spawn(move || recover::serve(&asked, &weak))?;
        Ok(isolation)
    }

    /// A client of the guest's agent.
    pub(super) fn agent(&self) -> Client {
        let mut agent = Client::unix(self.agent_socket.clone());
        agent.set_limit(AGENT_TIME);
        agent
    }

    /// What isolates.
    pub(super) fn isolator(&self) -> &Isolator {
        &self.isolator
    }

    /// The VM.
    pub(super) fn vm(&self) -> &VmHandle {
        &self.vm
    }

    /// The ladders of the isolated modules.
    pub(super) fn recoveries(&self) -> &Recoveries {
        &self.recoveries
    }

    /// Takes a module's gates out, if there are any, to put them in again later.
    pub(super) fn take_out(&self, module: &str) {
        if let Err(error) = self.isolator.release(module) {
            tracing::debug!("{error}");
        }
    }

    /// Isolates the same functions of a module again, unless it was released meanwhile; how many there are.
    pub(super) fn isolate_again(&self, module: &str) -> Result<usize, String> {
        let recoveries = &self.recoveries;
        let (Some(wish), Some(policy)) = (recoveries.wish(module), recoveries.same_policy(module))
        else {
            return Ok(0);
        };
        match self.isolate_with(&wish, policy)? {
            Reply::Isolated(isolated) => Ok(isolated["entries"].as_array().map_or(0, Vec::len)),
            other => Err(format!("isolating answered something else: {other:?}")),
        }
    }

    /// Waits until nobody else removes or inserts a driver.
    pub(super) fn change_driver(&self) -> MutexGuard<'_, ()> {
        lock(&self.driver_change)
    }

    /// Path in the guest of the file that the driver `module` came from, if it was upgraded.
    pub(super) fn driver_file(&self, module: &str) -> Option<String> {
        lock(&self.driver_files).get(module).cloned()
    }

    /// The driver `module` is another build now, of the file at `path` in the guest.
    pub(super) fn driver_came_from(&self, module: &str, path: &str) {
        lock(&self.driver_files).insert(module.to_owned(), path.to_owned());
        // Even at the same addresses it may have other functions and types.
        *lock(&self.known) = None;
    }

    /// The NIC that `module` drives.
    pub(super) fn nic_of(&self, module: &str) -> Option<&IsolatedNic> {
        self.nic.as_ref().filter(|_| module == "e1000")
    }

    /// Puts another build of a driver module in the place of the one that runs.
    pub fn upgrade(
        &self,
        module: &str,
        file: &[u8],
        limit_ms: u64,
        progress: &mut dyn FnMut(&str),
    ) -> Result<Reply, String> {
        upgrade::upgrade(self, module, file, limit_ms, progress)
            .map(|report| Reply::Upgraded(Box::new(report)))
            .map_err(|error| format!("{error:#}"))
    }

    /// Has a driver suspend and resume its devices.
    pub fn resume_device(&self, module: &str) -> Result<Reply, String> {
        let _alone = self.change_driver();
        suspend::suspend_and_resume(self, module)
            .map(|times| Reply::Resumed {
                times_us: times
                    .iter()
                    .map(|time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX))
                    .collect(),
            })
            .map_err(|error| format!("{error:#}"))
    }

    /// Stops a module that is isolated.
    pub(super) fn stop(&self, module: &str) {
        if let Err(error) = self.isolator.stop(module) {
            tracing::warn!("{module} cannot be stopped: {error}");
        }
    }

    /// Puts functions of `module` into a domain.
    pub fn isolate(&self, wish: Wish, recovery: LadderConfig) -> Result<Reply, String> {
        let policy = self.recoveries.policy(&wish.module, recovery);
        self.isolate_with(&wish, policy)
    }

    /// Puts functions of a module into a domain, with a ladder that is there already.
    pub(super) fn isolate_with(&self, wish: &Wish, policy: LadderPolicy) -> Result<Reply, String> {
        let Wish {
            module,
            entries,
            budget_us,
            checkpoint,
            spilling,
        } = wish.clone();
        let (module, ladder) = (module.as_str(), policy.ladder());
        if let Some(budget) = budget_us.filter(|budget| !BUDGET_US.contains(budget)) {
            return Err(format!(
                "a budget of {budget} us is not sensible: choose one from {} to {} us",
                BUDGET_US.start(),
                BUDGET_US.end()
            ));
        }
        let mut agent = self.agent();
        let loaded = agent.modules(None).map_err(|error| error.to_string())?;
        let Some(own) = loaded.iter().find(|loaded| loaded.name == module) else {
            return Err(format!(
                "the guest has no module {module} loaded (see lsmod in it)"
            ));
        };
        let sections = own.sections.clone();
        let text = sections
            .iter()
            .find(|(name, _)| name == ".text")
            .map(|(_, at)| *at);
        self.isolator.forget_stale(module, text);
        let (symbols, types) = self
            .knowledge(&mut agent, module, loaded)
            .map_err(|error| error.to_string())?;
        let nic = self.nic_of(module);
        if nic.is_none() && checkpoint != CheckpointBy::Exact {
            return Err(format!(
                "there is no description of the registers of {module}'s device"
            ));
        }
        let device = nic
            .map(|nic| HoldableE1000::new(nic.nic.clone(), checkpoint))
            .transpose()
            .map_err(|error| error.to_string())?
            .map(|device| -> Arc<dyn Holdable> { Arc::new(device) });
        let isolated = self
            .isolator
            .isolate(IsolateRequest {
                module: module.to_owned(),
                sections,
                symbols,
                types,
                wanted: match entries {
                    EntrySelection::All => Wanted::All,
                    EntrySelection::Named(names) => Wanted::Named(names),
                    EntrySelection::Matching(pattern) => Wanted::Matching(pattern),
                },
                model: Model::linux_6_1()
                    .inspect_err(|error| tracing::error!("{error}"))
                    .ok()
                    .map(|model| model.for_isolation()),
                guest_only: spilling.guest_only,
                device,
                device_slot: nic.map(|nic| nic.slot),
                sleep_limit: spilling.wait_us.map_or(DEFAULT_SLEEP_LIMIT, |us| {
                    Duration::from_micros(us).min(LONGEST_WAIT)
                }),
                budget: budget_us.map_or(DEFAULT_BUDGET, Duration::from_micros),
                policy: Box::new(policy),
            })
            .map_err(|error| error.to_string())?;
        self.recoveries.isolated(wish.clone(), ladder);
        let mut reply = json(&isolated)?;
        reply["not_modelled"] = json(&not_modelled(&isolated.imports))?;
        Ok(Reply::Isolated(reply))
    }

    /// The guest's symbols, and the types of its kernel and of `module` if it has them.
    pub(super) fn knowledge(
        &self,
        agent: &mut Client,
        module: &str,
        loaded: Vec<Module>,
    ) -> anyhow::Result<(Arc<SymbolTable>, Option<Arc<Btf>>)> {
        let mut known = lock(&self.known);
        if let Some(known) = known
            .as_ref()
            .filter(|known| known.module == module && known.loaded == loaded)
        {
            return Ok((known.symbols.clone(), known.types.clone()));
        }
        let symbols = Arc::new(guest_symbols(agent)?);
        let types = guest_types(agent, module)
            .inspect_err(|error| {
                tracing::warn!("calls of {module} may write to all of the guest's heap: {error:#}")
            })
            .ok();
        *known = Some(Known {
            module: module.to_owned(),
            loaded,
            symbols: symbols.clone(),
            types: types.clone(),
        });
        Ok((symbols, types))
    }

    /// Takes `module` out of its domain.
    pub fn release(&self, module: &str) -> Result<Reply, String> {
        let status = self
            .isolator
            .release(module)
            .map_err(|error| error.to_string())?;
        self.recoveries.released(module);
        Ok(Reply::Released(Box::new(status)))
    }

    /// The last violations of `module`'s calls.
    pub fn reports(&self, module: &str) -> Result<Reply, String> {
        let reports = self
            .isolator
            .reports(module)
            .map_err(|error| error.to_string())?;
        let texts = reports.iter().map(ToString::to_string).collect();
        Ok(Reply::Violations {
            reports: json(&reports)?,
            texts,
        })
    }

    /// The instructions of a function of an isolated module.
    pub fn instructions(&self, module: &str, function: &str) -> Result<Reply, String> {
        let instructions = self.isolator.instructions(module, function);
        instructions
            .map(|instructions| Reply::Instructions { instructions })
            .map_err(|error| error.to_string())
    }

    /// Puts a fault into calls of an isolated function.
    pub fn inject(&self, module: &str, order: FaultOrder) -> Result<Reply, String> {
        if order.every == 0 {
            return Err("every 0th call is none: choose 1 for every call".to_owned());
        }
        let ordered = self.isolator.order_fault(module, order);
        ordered
            .map(|()| Reply::Done {})
            .map_err(|error| error.to_string())
    }

    /// What became of that fault.
    pub fn fault_count(&self, module: &str) -> Result<Reply, String> {
        let count = self.isolator.fault_count(module);
        count
            .map(Reply::FaultCount)
            .map_err(|error| error.to_string())
    }

    /// How recovery of each isolated module stands.
    pub fn recovery_status(&self) -> BTreeMap<String, LadderStatus> {
        self.recoveries.status().into_iter().collect()
    }

    /// Counters of all isolated modules.
    pub fn status(&self) -> Vec<ModuleStatus> {
        self.isolator.status()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change under these locks is whole when it can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All symbols of the guest.
fn guest_symbols(agent: &mut Client) -> anyhow::Result<SymbolTable> {
    let mut table = SymbolTableBuilder::default();
    for symbol in agent.symbols(SymbolFilter::default())? {
        table.add(&Line {
            address: symbol.address,
            kind: symbol.kind,
            name: &symbol.name,
            module: symbol.module.as_deref(),
        })?;
    }
    Ok(table.finish())
}

/// Types of the guest's kernel and of `module`.
fn guest_types(agent: &mut Client, module: &str) -> anyhow::Result<Arc<Btf>> {
    let kernel = Btf::parse(&agent.read_file("/sys/kernel/btf/vmlinux")?, None)?;
    let own = agent.read_file(&format!("/sys/kernel/btf/{module}"))?;
    Ok(Arc::new(Btf::parse(&own, Some(Arc::new(kernel)))?))
}

/// Imports of which the model of kernel functions knows nothing: a call that spills and reaches one cannot be
/// taken back as a whole.
fn not_modelled(imports: &[Vec<String>]) -> Vec<&str> {
    let model = Model::linux_6_1()
        .inspect_err(|error| tracing::error!("{error}"))
        .ok();
    let known = |name: &String| {
        model
            .as_ref()
            .is_some_and(|model| model.get(name).is_some())
    };
    let unknown = imports.iter().filter(|names| !names.iter().any(known));
    unknown
        .filter_map(|names| names.first())
        .map(String::as_str)
        .collect()
}

fn json(value: &impl serde::Serialize) -> Result<serde_json::Value, String> {
    serde_json::to_value(value).map_err(|error| format!("cannot be shown as JSON: {error}"))
}
