//! How much sooner a failed call is over than a restart of the driver, for one stock driver after
//! the other.
//!
//! ```text
//! restart    remove ─ insert ─ what it takes until it works again    natively
//! rollback   fault ─ detect ─ memory ─ device ─ the caller about to run
//!            one fault at a time, in each function at three places
//! ```
//!
//! Drivers, what they drive and what has the kernel call their functions is data: `drivers.toml`
//! beside this, with the shell functions of `shell.sh`. Each has a guest of its own.

mod faults;

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use devices::hold::CheckpointBy;
use isolation::attach::plan::Wanted;
use isolation::attach::request::Contain;
use recovery::ladder::{LadderConfig, OnFault};
use recovery::request::Spilling;
use recovery::sweep::loaded_name;
use serde::Deserialize;

use super::guest::{BOOT_TIME, Guest, GuestOptions, guest_facts};
use super::switch::Bound;
use crate::control::protocol::Request;
use crate::options::PciAddress;
use crate::report::drivers::DriverRecovery;
use crate::report::{Guest as GuestFacts, Stat};

const DRIVERS: &str = include_str!("drivers.toml");
const SHELL: &str = include_str!("shell.sh");

/// Time for a call in the domain, in microseconds: only a call that hangs should reach it.
const BUDGET_US: u64 = 10_000_000;

/// Bytes of the disk of those that have one.
const DISK_BYTES: u64 = 16 << 20;

/// How long a driver may take until it works again after a failed call.
const WORKS_TIME: Duration = Duration::from_secs(60);

/// A driver, and what is done with it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Driver {
    /// Its module.
    pub module: String,
    /// What it drives, for people.
    what: String,
    /// Its parameters.
    #[serde(default)]
    parameters: String,
    /// Modules that are loaded before.
    #[serde(default)]
    with: Vec<String>,
    /// Options of `run`.
    #[serde(default)]
    run: String,
    /// A function of the host that it drives.
    host: Option<String>,
    /// Its guest has a disk.
    #[serde(default)]
    disk: bool,
    /// It is in the image for drivers of hardware.
    #[serde(default)]
    hardware: bool,
    /// Shell: what it takes until it works, once it is inserted.
    up: String,
    /// Shell: what has to be done before it can be removed.
    #[serde(default)]
    down: String,
    /// Shell: succeeds where it works.
    works: String,
    functions: Vec<Function>,
}

/// A function, and what has the kernel call it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Function {
    name: String,
    /// Shell.
    by: String,
}

/// What to measure.
#[derive(Debug, Clone)]
pub struct DriversOptions {
    /// The guest.
    pub guest: GuestOptions,
    /// The drivers.
    pub drivers: Vec<Driver>,
    /// Restarts of each.
    pub restarts: usize,
    /// Failed calls of each function.
    pub rollbacks: usize,
}

/// What was measured.
#[derive(Debug, Default)]
pub struct Measured {
    /// Those that could be.
    pub drivers: Vec<DriverRecovery>,
    /// The last guest.
    pub guest: Option<GuestFacts>,
    /// Those that could not, and why.
    pub failed: Vec<String>,
}

/// The drivers that are known, or those of these names.
///
/// # Errors
/// One is not known.
pub fn known(names: &[String]) -> anyhow::Result<Vec<Driver>> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct File {
        drivers: Vec<Driver>,
    }
    let File { mut drivers } = toml::from_str(DRIVERS).context("the program's own drivers")?;
    for name in names {
        let all: Vec<&str> = drivers.iter().map(|one| one.module.as_str()).collect();
        ensure!(
            all.contains(&name.as_str()),
            "nothing is known of a driver {name}: there are {}",
            all.join(", ")
        );
    }
    drivers.retain(|one| names.is_empty() || names.contains(&one.module));
    Ok(drivers)
}

/// Measures, telling `progress` what is done.
pub fn measure(options: &DriversOptions, progress: &mut dyn FnMut(&str)) -> Measured {
    let mut measured = Measured::default();
    for driver in &options.drivers {
        match one(options, driver, &mut measured.guest, progress) {
            Ok(recovery) => measured.drivers.push(recovery),
            Err(error) => {
                let why = format!("{}: {error:#}", driver.module);
                progress(&why);
                measured.failed.push(why);
            }
        }
    }
    measured
}

fn one(
    options: &DriversOptions,
    driver: &Driver,
    facts: &mut Option<GuestFacts>,
    progress: &mut dyn FnMut(&str),
) -> anyhow::Result<DriverRecovery> {
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let address = driver.host.as_deref().map(str::parse::<PciAddress>);
    let address = address.transpose()?;
    let _bound = Bound::new(address, true)?;
    let mut guest = options
        .guest
        .clone()
        .with("--memory 256M")
        .with(&driver.run);
    if driver.hardware {
        guest = guest.initrd("initrd-hardware.cpio");
    }
    if let Some(address) = address {
        guest = guest.with(&format!("--nic vfio={address}"));
    }
    if driver.disk {
        let disk = folder.path().join("disk");
        std::fs::File::create(&disk)?.set_len(DISK_BYTES)?;
        let disk = disk.to_str().context("a path that is no text")?.to_owned();
        guest.arguments.extend(["--disk".to_owned(), disk]);
    }
    progress(&format!("{}: booting a guest", driver.module));
    let mut guest = Guest::boot(&guest, BOOT_TIME)?;
    *facts = Some(guest_facts(&mut guest)?);
    for module in &driver.with {
        insert(&mut guest, module, "")?;
    }
    insert(&mut guest, &driver.module, &driver.parameters)?;
    shell(&mut guest, &driver.up)?;
    let mut restarts_us = Vec::new();
    for _ in 0..options.restarts {
        let took = restart(&mut guest, driver)?.as_secs_f64() * 1e6;
        restarts_us.push(took);
    }
    let restart_us = Stat::from_samples(&restarts_us).context("no restart was measured")?;
    let median = restart_us.p50 / 1e3;
    progress(&format!(
        "{}: a restart takes {median:.0} ms",
        driver.module
    ));
    let mut recovery = DriverRecovery {
        driver: driver.module.clone(),
        what: driver.what.clone(),
        restart_us,
        restarts_us,
        functions: Vec::new(),
    };
    isolate(&mut guest, driver)?;
    let mut bench = faults::Bench::new(guest, driver)?;
    for function in &driver.functions {
        bench.works().context("with its functions isolated")?;
        let measured = bench.function(function, options.rollbacks);
        progress(&faults::line(driver, &measured));
        recovery.functions.push(measured);
    }
    Ok(recovery)
}

/// Removes the driver and inserts it, until it works again.
fn restart(guest: &mut Guest, driver: &Driver) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    if !driver.down.is_empty() {
        shell(guest, &driver.down)?;
    }
    guest
        .agent()
        .remove_module(&loaded_name(&driver.module))
        .with_context(|| format!("cannot remove {}", driver.module))?;
    insert(guest, &driver.module, &driver.parameters)?;
    shell(guest, &driver.up)?;
    Ok(begun.elapsed())
}

fn insert(guest: &mut Guest, module: &str, parameters: &str) -> anyhow::Result<()> {
    let loaded = guest.agent().load_module(module, parameters);
    loaded
        .map(drop)
        .with_context(|| format!("cannot insert {module}"))
}

fn shell(guest: &mut Guest, script: &str) -> anyhow::Result<()> {
    guest.shell(&with_functions(script)).map(drop)
}

fn with_functions(script: &str) -> String {
    format!("{SHELL}\n{script}")
}

/// Isolates the functions. A failed call returns an error, once: another try takes as long as the
/// call does.
fn isolate(guest: &mut Guest, driver: &Driver) -> anyhow::Result<()> {
    let names = driver.functions.iter().map(|one| one.name.clone());
    let isolate = Request::Isolate {
        module: loaded_name(&driver.module),
        entries: Wanted::Named(names.collect()),
        budget_us: Some(BUDGET_US),
        device_checkpoint: CheckpointBy::Exact,
        recovery: LadderConfig {
            on_fault: Some(OnFault::Error),
            recoveries_per_minute: u32::MAX,
            failures_in_a_row: u32::MAX,
            ..LadderConfig::default()
        },
        spilling: Spilling::default(),
        contain: Contain::Full,
        keep_faults: None,
    };
    // The VM asks the agent itself, which listens to one client at a time.
    guest.agent().disconnect();
    guest.control()?.ask(&isolate)?;
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn there_are_twelve_drivers_and_more_each_one_once_and_others_are_refused() {
        let all = known(&[]).unwrap();
        let names: BTreeSet<_> = all.iter().map(|one| one.module.clone()).collect();
        assert!(names.len() >= 12 && names.len() == all.len());
        let one = known(&["nvme".to_owned()]).unwrap();
        assert_eq!(one.len(), 1);
        assert!(one.iter().all(|one| !one.functions.is_empty()));
        let refused = known(&["e1001".to_owned()]).unwrap_err().to_string();
        assert!(refused.contains("there are e1000, "), "{refused}");
    }

    #[test]
    fn what_is_done_is_shell_and_what_is_passed_through_has_an_address() {
        for driver in known(&[]).unwrap() {
            if let Some(host) = &driver.host {
                host.parse::<PciAddress>().unwrap();
            }
            let by = driver.functions.iter().map(|one| &one.by);
            for script in by.chain([&driver.up, &driver.down, &driver.works]) {
                let script = with_functions(script);
                let output = std::process::Command::new("sh")
                    .args(["-n", "-c", &script])
                    .output()
                    .unwrap();
                assert!(output.status.success(), "{}: {output:?}", driver.module);
            }
        }
    }

    #[test]
    fn the_images_have_all_drivers() {
        let set = guest_images::images_of(guest_images::kernels::DEFAULT);
        for driver in known(&[]).unwrap() {
            let file = match driver.hardware {
                true => "initrd-hardware.cpio",
                false => "initrd.cpio",
            };
            let mut images = set.images.iter();
            let image = images.find(|image| image.file == file).unwrap();
            let there: Vec<_> = image.modules.iter().map(|name| loaded_name(name)).collect();
            for module in driver.with.iter().chain([&driver.module]) {
                assert!(there.contains(&loaded_name(module)), "{module}");
            }
        }
    }
}
