//! Another build of a driver module in the place of the one that runs, with its interfaces' configuration, its
//! isolation and the link kept.
//!
//! ```text
//!   file checked ─► in the guest ─► configuration read ─► not isolated ─► link held
//!      ─► old one out ─► device checkpoint ─► new one in ─► configuration back, link there ─► isolated again
//!                              │                  └─ fails: out with it ─┐
//!                              └───────────────────► device restored ◄───┘ ─► old one in ─► configuration back
//! ```
//!
//! The checkpoint is taken when the old driver has shut the device down: it then moves no data, so that restoring it
//! cannot have it write into memory that was freed.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use agent_protocol::Client;
use anyhow::{Context, bail, ensure};
use devices::e1000::{E1000, E1000State};
use devices::pci::config::offset::COMMAND;
use recovery::interface::InterfaceConfig;
use recovery::module_file::{ModuleFile, build_id};

use super::interfaces;
use super::isolation::Isolation;
use crate::control::protocol::{UpgradeOutcome, UpgradeReport};

/// Limits outside are refused, in milliseconds. Each step has to end before whoever asked gives up.
const LIMIT_MS: std::ops::RangeInclusive<u64> = 1000..=60_000;

/// How long the old driver may take to be back.
const OLD_TIME: Duration = Duration::from_secs(60);

/// Where new files are put in the guest.
const FOLDER: &str = "/run";

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

/// Puts the module in `file` in the place of `module`. An error means that nothing was changed.
pub fn upgrade(
    isolation: &Isolation,
    module: &str,
    file: &[u8],
    limit_ms: u64,
    progress: &mut dyn FnMut(&str),
) -> anyhow::Result<UpgradeReport> {
    ensure!(
        LIMIT_MS.contains(&limit_ms),
        "a limit of {limit_ms} ms is not sensible: choose one from {} to {} ms",
        LIMIT_MS.start(),
        LIMIT_MS.end()
    );
    let new = ModuleFile::parse(file).context("the file cannot be used")?;
    new.is(module).context("the file cannot be used")?;
    let module = new.name.as_str();
    let _alone = isolation.change_driver();
    let mut agent = isolation.agent();
    not_in_use(&mut agent, module)?;
    let (old, old_file) = running(&mut agent, isolation, module)?;
    new.fits(&old_file).context("the file cannot be used")?;
    progress("handing the new file to the guest");
    let new = DriverFile {
        path: new_path(module, &old.path),
        build: new.build_id.clone(),
    };
    agent
        .write_file(&new.path, file, 0o600)
        .context("the guest cannot store the file")?;
    let configs = interfaces::read(&mut agent, module)
        .context("the configuration of its interfaces cannot be read")?;
    let wanted = Wanted {
        linked: interfaces::linked(&mut agent, &configs)?,
        configs,
    };
    let isolated = isolation.recoveries().wish(module).is_some();
    isolation.take_out(module);
    let link = HeldLink::hold(isolation, module);
    progress(&format!("removing the old {module}"));
    let begin = Instant::now();
    if let Err(error) = agent.remove_module(module) {
        forget_file(&mut agent, &new.path);
        drop(agent);
        let again = isolation.isolate_again(module);
        let error = anyhow::Error::new(error).context(format!("{module} cannot be removed"));
        return match again {
            Ok(_) => Err(error),
            Err(other) => Err(error.context(format!("{module} is not isolated any more: {other}"))),
        };
    }
    let checkpoint = Checkpoint::take(isolation, module);
    progress(&format!("inserting the new {module}"));
    let mut problems = Vec::new();
    let limit = Duration::from_millis(limit_ms);
    let outcome = match insert(&mut agent, module, &new, &wanted, limit) {
        Ok(()) => UpgradeOutcome::New,
        Err(error) => {
            let problem = format!("the new {module} failed: {error:#}");
            progress(&format!("{problem}; putting the old one back"));
            problems.push(problem);
            match put_old_back(&mut agent, module, &old, &wanted, checkpoint) {
                Ok(()) => UpgradeOutcome::Old,
                Err(error) => {
                    problems.push(format!("the old {module} cannot be put back: {error:#}"));
                    UpgradeOutcome::Neither
                }
            }
        }
    };
    let outage = begin.elapsed();
    drop(link);
    match outcome {
        UpgradeOutcome::New => {
            isolation.driver_came_from(module, &new.path);
            isolation.recoveries().begin_anew(module);
            if old.path.starts_with(FOLDER) {
                forget_file(&mut agent, &old.path);
            }
        }
        _ => forget_file(&mut agent, &new.path),
    }
    // The agent listens to one client at a time, and isolating asks it as well.
    drop(agent);
    let mut count = 0;
    if isolated && outcome != UpgradeOutcome::Neither {
        progress("isolating the same functions again");
        match isolation.isolate_again(module) {
            Ok(functions) => count = functions,
            Err(error) => problems.push(format!("{module} is not isolated any more: {error}")),
        }
    }
    Ok(UpgradeReport {
        module: module.to_owned(),
        outcome,
        old_build: hex(&old.build),
        new_build: hex(&new.build),
        interfaces: wanted.configs.into_iter().map(|one| one.name).collect(),
        isolated: count,
        outage_us: u64::try_from(outage.as_micros()).unwrap_or(u64::MAX),
        problems,
    })
}

/// A module that others use cannot be removed, which is better known before anything is done.
fn not_in_use(agent: &mut Client, module: &str) -> anyhow::Result<()> {
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
fn running(
    agent: &mut Client,
    isolation: &Isolation,
    module: &str,
) -> anyhow::Result<(DriverFile, ModuleFile)> {
    let path = match isolation.driver_file(module) {
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
fn installed(agent: &mut Client, module: &str) -> anyhow::Result<String> {
    let release = match agent.agent() {
        Some(agent) => agent.kernel.clone(),
        None => bail!("the guest's agent does not tell its kernel"),
    };
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
fn loaded_build(agent: &mut Client, module: &str) -> Option<Vec<u8>> {
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

fn forget_file(agent: &mut Client, path: &str) {
    if let Err(error) = agent.run(&["rm", "-f", path]) {
        tracing::debug!("{path} stays in the guest: {error}");
    }
}

/// Inserts a driver and has its interfaces as they were.
fn insert(
    agent: &mut Client,
    module: &str,
    file: &DriverFile,
    wanted: &Wanted,
    limit: Duration,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + limit;
    agent.set_limit(limit);
    agent
        .load_module_file(&file.path, "")
        .context("it cannot be inserted")?;
    ensure!(
        loaded_build(agent, module) == file.build,
        "the guest loaded another build"
    );
    let lost = interfaces::put_back(agent, &wanted.configs, deadline)?;
    ensure!(lost.is_empty(), "not as before: {}", lost.join(", "));
    interfaces::wait_for_link(agent, &wanted.configs, &wanted.linked, deadline)
}

/// Takes out what there is of the new driver, and inserts the old one.
fn put_old_back(
    agent: &mut Client,
    module: &str,
    old: &DriverFile,
    wanted: &Wanted,
    checkpoint: Option<Checkpoint<'_>>,
) -> anyhow::Result<()> {
    agent.set_limit(OLD_TIME);
    if agent.modules(Some(module)).is_ok() {
        agent
            .remove_module(module)
            .context("the new one cannot be removed")?;
    }
    if let Some(checkpoint) = checkpoint {
        checkpoint.restore()?;
    }
    insert(agent, module, old, wanted, OLD_TIME)
}

/// The far end of the NIC's wire sees the link as it was.
struct HeldLink(Option<Arc<Mutex<E1000>>>);

impl HeldLink {
    fn hold(isolation: &Isolation, module: &str) -> Self {
        let nic = isolation.nic_of(module).map(|nic| nic.nic.clone());
        let held = Self(nic);
        held.set(true);
        held
    }

    fn set(&self, hold: bool) {
        if let Some(nic) = &self.0 {
            let mut nic = nic.lock().unwrap_or_else(PoisonError::into_inner);
            match hold {
                true => nic.hold_link(),
                false => nic.let_link_go(false),
            }
        }
    }
}

impl Drop for HeldLink {
    fn drop(&mut self) {
        self.set(false);
    }
}

/// The device as the old driver left it.
struct Checkpoint<'a> {
    isolation: &'a Isolation,
    nic: Arc<Mutex<E1000>>,
    slot: u8,
    state: E1000State,
}

impl<'a> Checkpoint<'a> {
    fn take(isolation: &'a Isolation, module: &str) -> Option<Self> {
        let own = isolation.nic_of(module)?;
        let nic = own.nic.clone();
        let state = nic.lock().unwrap_or_else(PoisonError::into_inner).save();
        Some(Self {
            isolation,
            nic,
            slot: own.slot,
            state,
        })
    }

    fn restore(self) -> anyhow::Result<()> {
        let mut nic = self.nic.lock().unwrap_or_else(PoisonError::into_inner);
        nic.restore(self.state)?;
        drop(nic);
        // Written through the bus, so that it decodes what the function decodes now.
        let bus = self.isolation.vm().pci_bus();
        let mut command = [0; 2];
        bus.config_read(self.slot, COMMAND, &mut command);
        bus.config_write(self.slot, COMMAND, &command);
        Ok(())
    }
}

fn hex(bytes: &Option<Vec<u8>>) -> String {
    let bytes = bytes.as_deref().unwrap_or_default();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_new_file_never_lies_where_the_old_one_does() {
        let first = new_path("e1000", "/lib/modules/6.1/e1000.ko");
        let second = new_path("e1000", &first);
        assert_ne!(first, second);
        assert_eq!(new_path("e1000", &second), first);
    }
}
