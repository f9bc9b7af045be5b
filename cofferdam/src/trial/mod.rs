//! A module's file tried in a guest of its own: booted for it, inserted, isolated, asked to do
//! something, looked at.
//!
//! ```text
//!   FILE.ko ─► candidate ─► image that fits ─► VM ─► insert ─► isolate ─► command ─► report
//!              name, kernel,                   boots   │         │           │
//!              what it needs                           └─ what the guest's kernel says of it
//!                                                                └─ functions that can be isolated
//!                                                                            └─ calls, commits, failures
//! ```
//!
//! The module is put where `depmod` would have put it, so that what it needs is loaded with it and
//! it can be restarted by its name. The file, the guest and what they say are hostile: what is
//! printed of them is cleaned and bounded.

pub mod candidate;
mod process;
pub mod report;
mod watch;

use std::time::Duration;

use agent_protocol::message::{Exec, ExecEnd, KmsgRecord};
use agent_protocol::{Client, ClientError};
use anyhow::{Context, anyhow, bail};
use guest_images::BuiltImage;
use isolation::attach::plan::Wanted;
use isolation::attach::request::Contain;

pub use process::{Machine, TrialVm};

use self::candidate::{Candidate, with_module};
use self::report::{NotIsolated, Ran, Report};
use self::watch::Watch;
use crate::control::protocol::{Reply, Request, Status};
use crate::top::text::clean;

/// How long inserting a module may take.
const INSERT_TIME: Duration = Duration::from_secs(60);

/// Most of a command's output that is kept for a report, in bytes, of each of its two streams.
const MAX_OUTPUT: usize = 1 << 20;

/// What is to be done in the guest.
#[derive(Debug)]
pub struct Trial {
    /// Parameters of the module.
    pub params: String,
    /// Which of its functions are isolated; the module runs natively otherwise.
    pub isolate: Option<Wanted>,
    /// How far calls have to be contained.
    pub contain: Contain,
    /// Time that a call may take, in microseconds.
    pub budget_us: Option<u64>,
    /// A shell command to run in the guest then.
    pub command: Option<String>,
    /// How long it may take, in seconds.
    pub limit_s: u64,
    /// Its output is kept for the report; written out as it comes otherwise.
    pub quiet: bool,
}

/// Tries the module in a guest that is up.
///
/// # Errors
/// A line that says what the guest's kernel or the isolation of functions did not take, and what to
/// do.
pub fn run(
    vm: &mut TrialVm,
    candidate: &Candidate,
    image: &BuiltImage,
    trial: &Trial,
    progress: &dyn Fn(&str),
) -> anyhow::Result<Report> {
    let module = &candidate.file.name;
    progress(&format!("inserting {module}"));
    insert(vm, candidate, &trial.params)?;
    let mut report = Report::new(candidate, image);
    if let Some(wanted) = &trial.isolate {
        progress("isolating its functions");
        report.not_isolated = isolate(vm, module, wanted, trial)?;
        report.isolated = true;
    }
    let mut last = None;
    if let Some(command) = &trial.command {
        progress(&format!("running `{command}` in the guest"));
        let watch = Watch::start(vm.paths(), module);
        report.command = Some(run_command(&mut vm.agent, command, trial, &watch));
        last = watch.stop();
    }
    let last = match last {
        Some(last) => last,
        None => watch::look(vm.paths(), module)?,
    };
    report.panicked = match (&last.status.guest_panic, last.status.resets) {
        (Some(line), _) => Some(clean(line)),
        (None, 0) => None,
        (None, _) => Some("it booted anew, and what it did before is not known".to_owned()),
    };
    report.count(&last.status, last.violations);
    Ok(report)
}

/// Puts the module's file into the guest and has it loaded, with what it needs.
fn insert(vm: &mut TrialVm, candidate: &Candidate, params: &str) -> anyhow::Result<()> {
    let module = &candidate.file.name;
    let path = format!("updates/{module}.ko");
    let directory = format!("/lib/modules/{}", candidate.release());
    let list = format!("{directory}/modules.dep");
    vm.agent.set_limit(INSERT_TIME);
    if !vm
        .agent
        .modules(Some(module))
        .unwrap_or_default()
        .is_empty()
    {
        bail!(
            "the guest loads a module {module} itself when it boots: that one cannot be tried so"
        );
    }
    let known = vm
        .agent
        .read_file(&list)
        .context("the guest has no list of its modules")?;
    let known = with_module(&String::from_utf8_lossy(&known), &path, &candidate.depends).map_err(
        |missing| {
            let options: String = missing
                .iter()
                .map(|name| format!(" --module {name}"))
                .collect();
            anyhow!(
                "{module} needs {}, which the guest's image has not: make one with `cofferdam image build --kernel \
                 {}{options}`",
                missing.join(", "),
                candidate.release()
            )
        },
    )?;
    let made = vm
        .agent
        .run(&["mkdir", "-p", &format!("{directory}/updates")])?;
    if !made.success() {
        bail!("the guest has no room for the module");
    }
    vm.agent
        .write_file(&format!("{directory}/{path}"), &candidate.content, 0o644)?;
    vm.agent.write_file(&list, known.as_bytes(), 0o644)?;
    let since = vm.agent.kmsg(0).map_or(0, |(_, next)| next);
    let Err(error) = vm.agent.load_module(module, params) else {
        return Ok(());
    };
    if let Some(line) = vm.panic_line() {
        bail!("the guest's kernel has panicked while {module} was inserted: {line}");
    }
    let said = vm.agent.kmsg(since).map(|(records, _)| records);
    Err(refused(module, &error, &said.unwrap_or_default()))
}

/// Why the guest's kernel did not take a module, by its error number and its last words, and what
/// to do.
fn refused(module: &str, error: &ClientError, said: &[KmsgRecord]) -> anyhow::Error {
    let begin = format!("{module}:");
    let about = |record: &&KmsgRecord| record.text.starts_with(&begin);
    let line = said
        .iter()
        .rev()
        .find(about)
        .map(|record| clean(&record.text));
    let why = match (&line, error) {
        (Some(line), _) => format!(" ({line})"),
        (None, ClientError::Agent(_)) => String::new(),
        (None, other) => format!(" ({other})"),
    };
    let what = match error.errno() {
        Some(libc::ENOEXEC) => {
            "the guest's kernel does not take its file: build it with the headers of that kernel"
        }
        Some(libc::ENOENT) => {
            "it uses something that neither the kernel nor the modules it names have: is it built for this kernel, and does it name \
             what it depends on?"
        }
        Some(libc::EINVAL) => "it refuses its parameters, or its file is damaged: look at --params",
        Some(libc::ENODEV | libc::ENXIO) => {
            "it finds no device: give the guest one (--net, --nic, --disk)"
        }
        Some(libc::EEXIST) => "the guest has one of that name already",
        Some(libc::ENOMEM) => "the guest has too little memory for it: give it more with --memory",
        Some(libc::EKEYREJECTED | libc::EBADMSG) => {
            "its signature does not fit it: the file is damaged, or was changed since it was signed"
        }
        Some(_) => "its own start has failed",
        None => "it does not come back from its start",
    };
    match error.errno() {
        Some(number) => anyhow!(
            "{module} cannot be inserted: {what}{why}, {}",
            std::io::Error::from_raw_os_error(number)
        ),
        None => anyhow!("{module} cannot be inserted: {what}{why}"),
    }
}

/// Isolates functions of the module; those that cannot be, of all that were wanted.
fn isolate(
    vm: &mut TrialVm,
    module: &str,
    wanted: &Wanted,
    trial: &Trial,
) -> anyhow::Result<Vec<NotIsolated>> {
    // The VM asks the agent itself, which listens to one client at a time.
    vm.agent.disconnect();
    let request = Request::Isolate {
        module: module.to_owned(),
        entries: wanted.clone(),
        budget_us: trial.budget_us,
        device_checkpoint: Default::default(),
        recovery: Default::default(),
        spilling: Default::default(),
        contain: trial.contain,
        keep_faults: None,
    };
    let Reply::Isolated(isolated) = vm.control()?.ask(&request)? else {
        bail!("the VM answered something else");
    };
    let refused = isolated.get("refused").cloned().unwrap_or_default();
    // Of a version with other words nothing is said.
    Ok(serde_json::from_value(refused).unwrap_or_default())
}

/// Runs the command, and says how it ended.
fn run_command(agent: &mut Client, command: &str, trial: &Trial, watch: &Watch) -> Ran {
    use std::io::Write;
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let exec = Exec {
        argv: ["sh", "-c", command].map(str::to_owned).into(),
        limit_ms: Some(trial.limit_s.saturating_mul(1000)),
        ..Exec::default()
    };
    let ended = agent.exec_streaming(exec, &mut |is_stderr, bytes| {
        watch.heard();
        if !trial.quiet {
            // A reader that has gone away does not end the trial.
            let _gone = match is_stderr {
                true => std::io::stderr().write_all(&bytes),
                false => std::io::stdout().write_all(&bytes),
            };
            return Ok(());
        }
        let into = match is_stderr {
            true => &mut stderr,
            false => &mut stdout,
        };
        let room = MAX_OUTPUT.saturating_sub(into.len());
        into.extend_from_slice(bytes.get(..room).unwrap_or(&bytes));
        Ok(())
    });
    let mut ran = Ran {
        stdout: String::from_utf8_lossy(&stdout).into_owned(),
        stderr: String::from_utf8_lossy(&stderr).into_owned(),
        ..Ran::new(command)
    };
    match ended.map(|(end, _)| end) {
        Ok(ExecEnd::Exited(status)) => ran.status = Some(status),
        Ok(ExecEnd::Signaled(signal)) => ran.signal = Some(signal),
        Ok(ExecEnd::TimeLimit) => ran.timed_out = true,
        Err(error) => ran.problem = Some(clean(&error.to_string())),
    }
    ran
}

/// How a VM is and what calls of its module did wrong.
#[derive(Debug)]
pub struct Seen {
    status: Box<Status>,
    violations: Vec<recovery::violations::Violations>,
}

#[cfg(test)]
mod tests {
    use agent_protocol::message::AgentError;

    use super::*;

    fn says(errno: Option<i32>, said: &[&str]) -> String {
        let error = ClientError::Agent(AgentError {
            message: "load /lib/modules/x: no".to_owned(),
            errno,
        });
        let records: Vec<KmsgRecord> = said
            .iter()
            .map(|text| KmsgRecord {
                seq: 0,
                priority: 3,
                time_us: 0,
                text: (*text).to_owned(),
            })
            .collect();
        refused("mine", &error, &records).to_string()
    }

    #[test]
    fn a_module_that_is_not_taken_is_explained_by_what_the_kernel_says() {
        let said = says(
            Some(libc::ENOENT),
            &["eth0: up", "mine: Unknown symbol foo (err -2)", "other: x"],
        );
        assert!(said.contains("Unknown symbol foo"), "{said}");
        assert!(said.contains("depends on"), "{said}");
        let said = says(Some(libc::ENOEXEC), &["mine: bad \x1b[31mthing\n"]);
        assert!(said.contains("headers") && !said.contains('\x1b'), "{said}");
        assert_eq!(said.lines().count(), 1);
        for (errno, word) in [
            (libc::ENODEV, "--net"),
            (libc::EINVAL, "--params"),
            (libc::ENOMEM, "--memory"),
            (libc::EIO, "its own start"),
            (libc::EKEYREJECTED, "damaged"),
        ] {
            let said = says(Some(errno), &[]);
            assert!(said.contains(word), "{said}");
        }
    }
}
