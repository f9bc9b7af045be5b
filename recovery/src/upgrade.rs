//! Another build of a driver module in the place of the one that runs, with its interfaces'
//! configuration, its isolation and the link kept.
//!
//! ```text
//!   file checked ─► in the guest ─► configuration read ─► not isolated ─► link held
//!      ─► old one out ─► device checkpoint ─► new one in ─► configuration back, link there ─► isolated again
//!                              │                  └─ fails: out with it ─┐
//!                              └───────────────────► device restored ◄───┘ ─► old one in ─► configuration back
//! ```
//!
//! The checkpoint is taken when the old driver has shut the device down: it then moves no data, so
//! that restoring it cannot have it write into memory that was freed.

use std::time::Duration;

use agent_protocol::ClientError;
use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::asker::Asker;
use crate::guest::{Agent, LiveGuest};
use crate::interface::config::InterfaceConfig;
use crate::interface::live;
use crate::module_file::{ModuleFile, build_id};
use crate::supervisor::Supervisor;

/// Limits outside are refused. Each step has to end before whoever asked gives up.
const LIMITS: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(60);

/// How long the old driver may take to be back.
const OLD_TIME: Duration = Duration::from_secs(60);

/// Where new files are put in the guest.
const FOLDER: &str = "/run";

/// How an upgrade ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpgradeReport {
    /// Name of the module.
    pub module: String,
    /// Which one runs now.
    pub outcome: UpgradeOutcome,
    /// Build id of the one that ran before, in hexadecimal digits; empty where it has none.
    pub old_build: String,
    /// That of the new one.
    pub new_build: String,
    /// Interfaces that were given their configuration again.
    pub interfaces: Vec<String>,
    /// Functions that are isolated again.
    pub isolated: usize,
    /// From the removal of the old one to the configuration put back, in microseconds.
    pub outage_us: u64,
    /// What went wrong, one line each.
    pub problems: Vec<String>,
}

/// Which driver runs after an upgrade.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UpgradeOutcome {
    /// The new one.
    New,
    /// The old one: the new one failed and was taken out.
    Old,
    /// None, or one without its configuration.
    Neither,
}

/// A driver module's file in the guest.
struct DriverFile {
    path: String,
    build: Option<Vec<u8>>,
}

/// What the driver's interfaces are to have again.
struct Wanted {
    configs: Vec<InterfaceConfig>,
    linked: Vec<String>,
}

impl<G: LiveGuest> Supervisor<G> {
    /// Puts another build of a driver module in the place of the one that runs.
    ///
    /// # Errors
    /// Nothing was changed, and why.
    pub fn upgrade(
        &self,
        module: &str,
        file: &[u8],
        limit: Duration,
        asker: &dyn Asker,
    ) -> anyhow::Result<UpgradeReport> {
        let upgraded = upgrade(self, module, file, limit, asker);
        // Behind the turn to change drivers, which whoever hears of it may want here.
        self.tell_given_up(module);
        upgraded
    }
}

/// All that an exchange takes, known before anything is changed.
struct Exchange {
    module: String,
    old: DriverFile,
    new: DriverFile,
    wanted: Wanted,
    limit: Duration,
}

/// Puts the module in `file` in the place of `module`. An error means that nothing was changed.
fn upgrade<G: LiveGuest>(
    supervisor: &Supervisor<G>,
    module: &str,
    file: &[u8],
    limit: Duration,
    asker: &dyn Asker,
) -> anyhow::Result<UpgradeReport> {
    ensure!(
        LIMITS.contains(&limit),
        "a limit of {} ms is not sensible: choose one from {} to {} ms",
        limit.as_millis(),
        LIMITS.start().as_millis(),
        LIMITS.end().as_millis()
    );
    let new = ModuleFile::parse(file).context("the file cannot be used")?;
    new.is(module).context("the file cannot be used")?;
    let _alone = supervisor.change_driver_for(asker)?;
    let guest = supervisor.guest();
    let mut agent = guest.agent();
    let exchange = prepare(supervisor, &mut agent, (&new, file), limit, asker)?;
    let module = exchange.module.as_str();
    // From here on it is carried out to its end, even when nobody listens any more.
    let tell = |what: &str| {
        let _gone = asker.tell(what);
    };
    let isolated = supervisor.ladder(module).is_some();
    supervisor.take_out(module);
    let link = HeldLink::hold(guest, module);
    tell(&format!("removing the old {module}"));
    let begin = guest.now();
    if let Err(error) = agent.remove_module(module) {
        forget_file(&mut agent, &exchange.new.path);
        drop(agent);
        return Err(not_removed(supervisor, module, error));
    }
    let mut problems = Vec::new();
    let outcome = exchange.carry_out(guest, &mut agent, &tell, &mut problems);
    let outage = guest.now().saturating_sub(begin);
    drop(link);
    exchange.forget_the_other(supervisor, &mut agent, outcome);
    // The agent listens to one client at a time, and isolating asks it as well.
    drop(agent);
    let mut count = 0;
    if isolated && outcome != UpgradeOutcome::Neither {
        tell("isolating the same functions again");
        match supervisor.isolate_again(module) {
            Ok(functions) => count = functions,
            Err(error) => problems.push(format!("{module} is not isolated any more: {error:#}")),
        }
    }
    let configs = exchange.wanted.configs.into_iter();
    Ok(UpgradeReport {
        outcome,
        old_build: hex(&exchange.old.build),
        new_build: hex(&exchange.new.build),
        interfaces: configs.map(|one| one.name).collect(),
        isolated: count,
        outage_us: u64::try_from(outage.as_micros()).unwrap_or(u64::MAX),
        problems,
        module: exchange.module,
    })
}

/// Finds out what the exchange takes, and hands the guest the new `file`.
fn prepare<G: LiveGuest>(
    supervisor: &Supervisor<G>,
    agent: &mut G::Agent,
    (new, file): (&ModuleFile, &[u8]),
    limit: Duration,
    asker: &dyn Asker,
) -> anyhow::Result<Exchange> {
    let module = new.name.as_str();
    supervisor.has_its_devices(module)?;
    ensure!(
        supervisor.suspended().iter().all(|one| one != module),
        "the devices of {module} are suspended: `cofferdam resume-device` brings them back"
    );
    not_in_use(agent, module)?;
    let (old, old_file) = running(agent, supervisor, module)?;
    new.fits(&old_file).context("the file cannot be used")?;
    asker.tell("handing the new file to the guest")?;
    let new = DriverFile {
        path: new_path(module, &old.path),
        build: new.build_id.clone(),
    };
    agent
        .write_file(&new.path, file, 0o600)
        .context("the guest cannot store the file")?;
    let configs =
        live::read(agent, module).context("the configuration of its interfaces cannot be read")?;
    let wanted = Wanted {
        linked: live::linked(agent, &configs)?,
        configs,
    };
    asker.tell("everything is there for the exchange")?;
    Ok(Exchange {
        module: module.to_owned(),
        old,
        new,
        wanted,
        limit,
    })
}

/// The old driver stays, isolated as it was.
fn not_removed<G: LiveGuest>(
    supervisor: &Supervisor<G>,
    module: &str,
    error: ClientError,
) -> anyhow::Error {
    let error = anyhow::Error::new(error).context(format!("{module} cannot be removed"));
    match supervisor.isolate_again(module) {
        Ok(_) => error,
        Err(other) => error.context(format!("{module} is not isolated any more: {other:#}")),
    }
}

impl Exchange {
    /// Inserts the new driver, or the old one again if that fails.
    fn carry_out<G: LiveGuest>(
        &self,
        guest: &G,
        agent: &mut G::Agent,
        tell: &dyn Fn(&str),
        problems: &mut Vec<String>,
    ) -> UpgradeOutcome {
        let module = self.module.as_str();
        let checkpoint = guest.save_device(module);
        tell(&format!("inserting the new {module}"));
        let inserted = insert(guest, agent, module, &self.new, &self.wanted, self.limit);
        let Err(error) = inserted else {
            return UpgradeOutcome::New;
        };
        let problem = format!("the new {module} failed: {error:#}");
        tell(&format!("{problem}; putting the old one back"));
        problems.push(problem);
        match put_old_back(guest, agent, module, &self.old, &self.wanted, checkpoint) {
            Ok(()) => UpgradeOutcome::Old,
            Err(error) => {
                problems.push(format!("the old {module} cannot be put back: {error:#}"));
                UpgradeOutcome::Neither
            }
        }
    }

    /// Removes the file in the guest that is not needed any more.
    fn forget_the_other<G: LiveGuest>(
        &self,
        supervisor: &Supervisor<G>,
        agent: &mut G::Agent,
        outcome: UpgradeOutcome,
    ) {
        match outcome {
            UpgradeOutcome::New => {
                supervisor.driver_came_from(&self.module, &self.new.path);
                if self.old.path.starts_with(FOLDER) {
                    forget_file(agent, &self.old.path);
                }
            }
            _ => forget_file(agent, &self.new.path),
        }
    }
}

/// A module that others use cannot be removed, which is better known before anything is done.
fn not_in_use(agent: &mut impl Agent, module: &str) -> anyhow::Result<()> {
    let loaded = agent.modules(None)?;
    let Some(own) = loaded.iter().find(|one| one.name == module) else {
        bail!("the guest has no module {module} loaded (see lsmod in it)");
    };
    ensure!(
        own.holders.is_empty(),
        "{module} is used by {}",
        own.holders.join(", ")
    );
    ensure!(
        own.refcnt.is_none_or(|count| count == 0),
        "{module} is in use in the guest"
    );
    Ok(())
}

/// The file of the driver that runs, so that it can be inserted again.
fn running<G: LiveGuest>(
    agent: &mut G::Agent,
    supervisor: &Supervisor<G>,
    module: &str,
) -> anyhow::Result<(DriverFile, ModuleFile)> {
    let path = match supervisor.driver_file(module) {
        Some(path) => path,
        None => installed(agent, module)?,
    };
    let cannot = || format!("{path}, the file of the driver that runs, cannot be used");
    let bytes = agent.read_file(&path).with_context(cannot)?;
    let file = ModuleFile::parse(&bytes).with_context(cannot)?;
    file.is(module).with_context(cannot)?;
    ensure!(
        loaded_build(agent, module) == file.build_id,
        "{path} is not the build of {module} that runs, which could therefore not be put back"
    );
    let build = file.build_id.clone();
    Ok((DriverFile { path, build }, file))
}

/// Path of the module under the guest's `/lib/modules`.
fn installed(agent: &mut impl Agent, module: &str) -> anyhow::Result<String> {
    let release = agent
        .kernel_release()
        .context("the guest's agent does not tell its kernel")?;
    let folder = format!("/lib/modules/{release}");
    let list = agent.read_file(&format!("{folder}/modules.dep"))?;
    let list = String::from_utf8_lossy(&list);
    let path = list.lines().find_map(|line| {
        let (path, _) = line.split_once(':')?;
        let name = path.rsplit('/').next()?.strip_suffix(".ko")?;
        (name.replace('-', "_") == module).then_some(path)
    });
    let path = path.with_context(|| {
        format!("{folder} has no uncompressed {module}.ko, so that it could not be put back")
    })?;
    Ok(format!("{folder}/{path}"))
}

/// Build id of the module that is loaded.
fn loaded_build(agent: &mut impl Agent, module: &str) -> Option<Vec<u8>> {
    let path = format!("/sys/module/{module}/notes/.note.gnu.build-id");
    build_id(&agent.read_file(&path).ok()?)
}

/// Two paths, used in turn: the file of the driver that runs stays until the next one does.
fn new_path(module: &str, old: &str) -> String {
    let first = format!("{FOLDER}/cofferdam-{module}-a.ko");
    if first == old {
        return format!("{FOLDER}/cofferdam-{module}-b.ko");
    }
    first
}

fn forget_file(agent: &mut impl Agent, path: &str) {
    if let Err(error) = agent.run(&["rm", "-f", path]) {
        tracing::debug!("{path} stays in the guest: {error}");
    }
}

/// Inserts a driver and has its interfaces as they were.
fn insert<G: LiveGuest>(
    guest: &G,
    agent: &mut G::Agent,
    module: &str,
    file: &DriverFile,
    wanted: &Wanted,
    limit: Duration,
) -> anyhow::Result<()> {
    let deadline = guest.now() + limit;
    agent.set_limit(limit);
    agent
        .insert_file(&file.path)
        .context("it cannot be inserted")?;
    ensure!(
        loaded_build(agent, module) == file.build,
        "the guest loaded another build"
    );
    let lost = live::put_back(guest, agent, &wanted.configs, deadline)?;
    ensure!(lost.is_empty(), "not as before: {}", lost.join(", "));
    live::wait_for_link(guest, agent, &wanted.configs, &wanted.linked, deadline)
}

/// Takes out what there is of the new driver, and inserts the old one.
fn put_old_back<G: LiveGuest>(
    guest: &G,
    agent: &mut G::Agent,
    module: &str,
    old: &DriverFile,
    wanted: &Wanted,
    checkpoint: Option<G::DeviceState>,
) -> anyhow::Result<()> {
    agent.set_limit(OLD_TIME);
    if agent.modules(Some(module)).is_ok() {
        agent
            .remove_module(module)
            .context("the new one cannot be removed")?;
    }
    if let Some(checkpoint) = checkpoint {
        guest.restore_device(module, checkpoint)?;
    }
    insert(guest, agent, module, old, wanted, OLD_TIME)
}

/// The far end of the NIC's wire sees the link as it was.
struct HeldLink<'a, G: LiveGuest> {
    guest: &'a G,
    module: &'a str,
}

impl<'a, G: LiveGuest> HeldLink<'a, G> {
    fn hold(guest: &'a G, module: &'a str) -> Self {
        guest.hold_link(module, true);
        Self { guest, module }
    }
}

impl<G: LiveGuest> Drop for HeldLink<'_, G> {
    fn drop(&mut self) {
        self.guest.hold_link(self.module, false);
    }
}

fn hex(bytes: &Option<Vec<u8>>) -> String {
    let bytes = bytes.as_deref().unwrap_or_default();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
#[path = "upgrade_tests.rs"]
mod tests;
