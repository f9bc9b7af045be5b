//! Isolation as the VM process offers it on its control socket: what the guest's agent reports goes in,
//! counters and reports come out.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent_protocol::Client;
use agent_protocol::message::SymbolFilter;
use devices::e1000::E1000;
use isolation::attach::after_fault::ReturnErrors;
use isolation::attach::device::IsolatedDevice;
use isolation::attach::e1000::E1000Device;
use isolation::attach::plan::Wanted;
use isolation::attach::status::ModuleStatus;
use isolation::attach::{DEFAULT_BUDGET, DEFAULT_SLEEP_LIMIT, IsolateRequest, Isolator};
use isolation::guest::btf::Btf;
use isolation::guest::symbols::{Line, SymbolTable, SymbolTableBuilder};

use crate::control::protocol::{EntrySelection, Reply};

/// How long the agent may take to list the guest's symbols.
const AGENT_TIME: Duration = Duration::from_secs(60);

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
}

impl Isolation {
    /// For the VM of `isolator`, whose agent is reached at `agent_socket`.
    pub fn new(isolator: Arc<Isolator>, agent_socket: PathBuf, nic: Option<IsolatedNic>) -> Self {
        Self {
            isolator,
            agent_socket,
            nic,
        }
    }

    /// Puts functions of `module` into a domain.
    pub fn isolate(
        &self,
        module: &str,
        entries: EntrySelection,
        budget_us: Option<u64>,
    ) -> Result<Reply, String> {
        if let Some(budget) = budget_us.filter(|budget| !BUDGET_US.contains(budget)) {
            return Err(format!(
                "a budget of {budget} us is not sensible: choose one from {} to {} us",
                BUDGET_US.start(),
                BUDGET_US.end()
            ));
        }
        let mut agent = Client::unix(self.agent_socket.clone());
        agent.set_limit(AGENT_TIME);
        let (sections, symbols) = guest_knowledge(&mut agent, module).map_err(|e| e.to_string())?;
        let Some(sections) = sections else {
            return Err(format!(
                "the guest has no module {module} loaded (see lsmod in it)"
            ));
        };
        let text = sections
            .iter()
            .find(|(name, _)| name == ".text")
            .map(|(_, at)| *at);
        self.isolator.forget_stale(module, text);
        let types = guest_types(&mut agent, module)
            .inspect_err(|error| {
                tracing::warn!("calls of {module} may write to all of the guest's heap: {error:#}")
            })
            .ok();
        let nic = self.nic.as_ref().filter(|_| module == "e1000");
        let device =
            nic.map(|nic| -> Arc<dyn IsolatedDevice> { Arc::new(E1000Device(nic.nic.clone())) });
        let isolated = self
            .isolator
            .isolate(IsolateRequest {
                module: module.to_owned(),
                sections,
                symbols: Arc::new(symbols),
                types,
                wanted: match entries {
                    EntrySelection::All => Wanted::All,
                    EntrySelection::Named(names) => Wanted::Named(names),
                    EntrySelection::Matching(pattern) => Wanted::Matching(pattern),
                },
                device,
                device_slot: nic.map(|nic| nic.slot),
                sleep_limit: DEFAULT_SLEEP_LIMIT,
                budget: budget_us.map_or(DEFAULT_BUDGET, Duration::from_micros),
                policy: Box::new(ReturnErrors),
            })
            .map_err(|error| error.to_string())?;
        json(&isolated).map(Reply::Isolated)
    }

    /// Takes `module` out of its domain.
    pub fn release(&self, module: &str) -> Result<Reply, String> {
        let status = self
            .isolator
            .release(module)
            .map_err(|error| error.to_string())?;
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

    /// Counters of all isolated modules.
    pub fn status(&self) -> Vec<ModuleStatus> {
        self.isolator.status()
    }
}

type Sections = Vec<(String, u64)>;

/// Sections of `module`, if it is loaded, and all symbols of the guest.
fn guest_knowledge(
    agent: &mut Client,
    module: &str,
) -> anyhow::Result<(Option<Sections>, SymbolTable)> {
    let loaded = agent
        .modules(None)?
        .into_iter()
        .find(|loaded| loaded.name == module);
    let Some(loaded) = loaded else {
        return Ok((None, SymbolTable::default()));
    };
    let mut table = SymbolTableBuilder::default();
    for symbol in agent.symbols(SymbolFilter::default())? {
        table.add(&Line {
            address: symbol.address,
            kind: symbol.kind,
            name: &symbol.name,
            module: symbol.module.as_deref(),
        })?;
    }
    Ok((Some(loaded.sections), table.finish()))
}

/// Types of the guest's kernel and of `module`.
fn guest_types(agent: &mut Client, module: &str) -> anyhow::Result<Arc<Btf>> {
    let kernel = Btf::parse(&agent.read_file("/sys/kernel/btf/vmlinux")?, None)?;
    let own = agent.read_file(&format!("/sys/kernel/btf/{module}"))?;
    Ok(Arc::new(Btf::parse(&own, Some(Arc::new(kernel)))?))
}

fn json(value: &impl serde::Serialize) -> Result<serde_json::Value, String> {
    serde_json::to_value(value).map_err(|error| format!("cannot be shown as JSON: {error}"))
}
