//! The second wall: what a process of ours gives up once it is set up, so that a guest that has
//! taken it over can do little with it.
//!
//! ```text
//!               files opened        ┌──────────── enter ────────────┐   first request answered, guest code runs
//!  start ──► taps, VFIO, memory ──► │ limits ─► each thread: no new │ ─► each vCPU's thread: a filter more
//!               sockets made        │ privileges, capabilities,     │
//!                                   │ Landlock ─► seccomp, for all  │
//!                                   └───────────────────────────────┘
//! ```
//!
//! | wall | what it takes | by what |
//! | --- | --- | --- |
//! | `seccomp` | system calls that the process does not make | seccomp(2), a filter for all threads and one more for vCPUs |
//! | `files` | files and folders that it has no business with | landlock(7) |
//! | `jail` | the same, other processes in `/proc` and all rights outside, where that is asked for | user and mount namespaces |
//! | `group` | memory, tasks and processor time without end, where it is asked for or `jail` finds one | control groups, cgroup v2 |
//! | `privileges` | capabilities, new privileges, core dumps, descriptors without end | capabilities(7), prctl(2), setrlimit(2) |
//!
//! Nothing of it can be taken back. Where the host's kernel lacks a wall the others stand, and a
//! line of the log says so; with `--sandbox on` the process does not start. The threads of a
//! process share its memory: walls that differ by thread stop mistakes, and only those of all
//! threads stop who has taken the process over.

mod calls;
mod files;
mod group;
mod jail;
mod privileges;
mod refusal;
mod seccomp;

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

pub use calls::FORBIDDEN;
pub use files::landlock_version;
pub use group::{Group, GroupOptions, controllers, delegated, divide, divide_delegated, keeper};
pub use jail::{Namespaces, can_jail};

use files::Places;
use seccomp::Filters;

use crate::runtime_dir::RuntimeRoot;

/// What becomes of the walls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// All of them stand, or the process does not start
    On,
    /// None stands; what the filter of system calls would refuse goes to the kernel's log
    Log,
    /// None stands
    Off,
}

/// How the guests of the service are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guests {
    /// In jails.
    Jailed,
    /// In none.
    Free,
}

/// What a process gives up.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct SandboxOptions {
    /// What this process gives up when it is set up, so that a guest that takes it over gains
    /// little: all of it (on), nothing (off), or nothing but the kernel's log tells which system
    /// calls would be refused (log). As much as this host can when not given
    #[arg(long, value_enum, value_name = "MODE")]
    pub sandbox: Option<Mode>,
}

/// The same of a process that runs a VM or has a device.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct MachineSandbox {
    #[command(flatten)]
    options: SandboxOptions,
    /// With the sandbox, let snapshots, kept faults and sockets be written in this folder and in no
    /// other but the runtime folder; everywhere but in folders of the system when not given (may be
    /// given again)
    #[arg(long, value_name = "DIR")]
    allow_dir: Vec<PathBuf>,
}

/// The jail of a process that is to be in one.
#[derive(Debug, Clone)]
pub struct Jail {
    /// What it was put into at its start.
    pub namespaces: Namespaces,
    /// Folders that it uses besides those that a person named: its own of sockets, and where it
    /// finds device hosts.
    pub folders: Vec<PathBuf>,
}

impl MachineSandbox {
    /// Looks whether this process can be in a jail, at the end of which it removes `sockets`, and
    /// puts it into namespaces. It has one thread, and has opened nothing.
    ///
    /// # Errors
    /// The host cannot, or it would leave something behind.
    pub fn begin_jail(&self, sockets: &[PathBuf]) -> anyhow::Result<Namespaces> {
        if self.options.mode() != Mode::On {
            bail!("--jail is a wall of the sandbox: leave --sandbox away, or say --sandbox on");
        }
        let absolute = |path: &Path| std::path::absolute(path);
        for socket in sockets {
            let path = absolute(socket).context("cannot name a socket")?;
            let folders = self.allow_dir.iter();
            let mut folders = folders.filter_map(|folder| absolute(folder).ok());
            if !folders.any(|folder| path.starts_with(folder)) {
                return Err(jail::outside(socket));
            }
        }
        Namespaces::begin()
    }

    /// Gives up what can be given up before anything is opened, and before there is a second
    /// thread.
    pub fn begin(&self) {
        if self.options.mode() == Mode::On {
            privileges::bound_before_threads(privileges::KEPT);
        }
    }

    /// Puts this process behind its walls: all threads that there are and will be. Of what was
    /// opened before it may go on to use all, and at its end it removes `sockets`.
    ///
    /// # Errors
    /// A wall that this host has cannot be put up, or one that was asked for is not there.
    pub fn enter(&self, sockets: Vec<PathBuf>, jail: Option<&Jail>) -> anyhow::Result<Entered> {
        if let Some(jail) = jail {
            let folders = [jail.folders.as_slice(), &self.allow_dir].concat();
            jail.namespaces.close(&folders)?;
        }
        self.options.enter(&Places {
            runtime: RuntimeRoot::from_environment().path().to_owned(),
            allowed: self.allow_dir.clone(),
            sockets,
            jailed: jail.is_some(),
        })
    }
}

/// A process behind its walls.
#[derive(Debug, Clone)]
pub struct Entered {
    vcpu: Option<seccomp::Program>,
}

impl Entered {
    /// Adds what only the thread of a vCPU gives up, to the calling thread.
    ///
    /// # Errors
    /// The kernel refuses the filter.
    pub fn enter_vcpu(&self) -> std::io::Result<()> {
        match &self.vcpu {
            Some(program) => program.apply_to_this_thread(),
            None => Ok(()),
        }
    }
}

impl SandboxOptions {
    fn mode(&self) -> Mode {
        self.sandbox.unwrap_or(Mode::On)
    }

    /// What is to be done where this host lacks a wall, for the reason `why`.
    fn lacks(&self, wall: &str, why: impl std::fmt::Display) -> anyhow::Result<()> {
        if self.sandbox == Some(Mode::On) {
            bail!("this host cannot do all of the sandbox, {wall}: {why}; see `cofferdam doctor`");
        }
        tracing::warn!("no {wall} around this process: {why}");
        Ok(())
    }

    /// Puts this process, which runs a VM or has a device, behind its walls. It may do with files
    /// what `places` says.
    fn enter(&self, places: &Places) -> anyhow::Result<Entered> {
        refusal::watch().context("cannot set up the sandbox")?;
        if self.mode() == Mode::Off {
            return Ok(Entered { vcpu: None });
        }
        if self.mode() == Mode::On {
            privileges::limit_resources().context("cannot limit what the process may use")?;
            let ruleset = places.ruleset().context("cannot limit access to files")?;
            if ruleset.is_none() {
                self.lacks("Landlock", "its kernel has none, or it is not turned on")?;
            }
            privileges::drop_in_each_thread(privileges::KEPT, ruleset.as_ref())
                .context("cannot give up privileges")?;
        }
        self.filtered(Filters::of_a_machine(self.mode()))
    }

    /// Puts the service behind its walls, which the guests that it starts inherit: it may run no
    /// program but this one. They put up their own besides, so that it keeps the capabilities that
    /// they begin with. Who is behind Landlock makes no mounts: where guests are jailed it does not
    /// stand, and calls for namespaces and mounts go through.
    ///
    /// # Errors
    /// As [`MachineSandbox::enter`].
    pub fn enter_service(&self, guests: Guests) -> anyhow::Result<()> {
        refusal::watch().context("cannot set up the sandbox")?;
        if self.mode() == Mode::Off {
            return Ok(());
        }
        if self.mode() == Mode::On {
            let ruleset = match guests {
                Guests::Jailed => None,
                Guests::Free => {
                    let ruleset = files::only_this_program();
                    let ruleset = ruleset.context("cannot limit what may be run")?;
                    if ruleset.is_none() {
                        self.lacks("Landlock", "its kernel has none, or it is not turned on")?;
                    }
                    ruleset
                }
            };
            privileges::drop_in_each_thread(privileges::ALL, ruleset.as_ref())
                .context("cannot give up privileges")?;
        }
        self.filtered(Filters::of_the_service(self.mode(), guests))
            .map(drop)
    }

    fn filtered(&self, filters: Result<Filters, seccomp::Error>) -> anyhow::Result<Entered> {
        let filters = filters.context("cannot make the filter of system calls")?;
        match filters.apply_to_all_threads() {
            Ok(vcpu) => Ok(Entered { vcpu }),
            Err(seccomp::Error::Missing(why)) => {
                self.lacks("seccomp", why)?;
                Ok(Entered { vcpu: None })
            }
            Err(error) => Err(error).context("cannot filter system calls"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wall_that_is_missing_matters_to_who_asked_for_all() {
        let options = |sandbox| SandboxOptions { sandbox };
        options(None).lacks("Landlock", "it is old").unwrap();
        let asked = options(Some(Mode::On)).lacks("Landlock", "it is old");
        let error = format!("{:#}", asked.unwrap_err());
        assert!(error.contains("Landlock: it is old"), "{error}");
        assert_eq!(error.lines().count(), 1);
    }
}
