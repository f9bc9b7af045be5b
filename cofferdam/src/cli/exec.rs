//! `exec`: a command inside a guest.
//!
//! What the command writes and how it ends become this command's own, so that what went wrong with
//! running it needs statuses of its own: those of `timeout`, `env` and shells.

use std::io::{Read, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use agent_protocol::message::{Bytes, Exec, ExecEnd};
use agent_protocol::{Client, ClientError};
use anyhow::{Context, bail};
use serde::Serialize;

use super::control::VmOptions;
use super::{Ending, one_line, print_json};
use crate::control::client::{ANSWER_TIME, ControlClient};
use crate::control::protocol::{Status, VmState};
use crate::runtime_dir::RunningVm;

/// Status when the command was killed because its time was up.
const TIMED_OUT: u8 = 124;
/// Status when the command could not be asked for, or its end is not known.
const FAILED: u8 = 125;
/// Status when there is such a program, and it cannot be run.
const CANNOT_RUN: u8 = 126;
/// Status when there is no such program.
const NOT_FOUND: u8 = 127;

/// How long to wait for a guest's agent when its VM runs.
const AGENT_TIME: Duration = Duration::from_secs(20);

/// How long a guest that is said to have panicked has to show that it lives.
const PANIC_TIME: Duration = Duration::from_secs(2);

/// How often to look at a guest whose command runs.
const LOOK: Duration = Duration::from_secs(3);

/// Longest standard input that is passed on, in bytes.
const MAX_STDIN_BYTES: u64 = 32 << 10;

/// Most output that is collected for JSON, in bytes.
const MAX_COLLECTED: usize = 64 << 20;

/// `exec`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The command's output and exit status become this command's own; 124: killed because its time was up; 125: the guest
or its agent does not answer; 126: the program cannot be run; 127: there is no such program.

Examples:
  cofferdam exec -- ip addr
  cofferdam exec web -- sh -c 'dmesg | tail'
  cofferdam exec web --stdin -- sh -c 'cat > /tmp/file' < file")]
pub struct ExecOptions {
    #[command(flatten)]
    vm: VmOptions,
    /// Command and its arguments, after --
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<String>,
    /// Give the command what is on standard input, up to 32 KiB
    #[arg(long)]
    stdin: bool,
    /// Kill the command after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    timeout: u64,
    /// Output and end as JSON, when the command has ended
    #[arg(long)]
    json: bool,
}

/// How a command ended, as JSON.
#[derive(Debug, Default, Serialize)]
struct Ended {
    /// Its exit status.
    status: Option<i32>,
    /// The signal that killed it.
    signal: Option<i32>,
    /// Whether its time was up.
    timed_out: bool,
    stdout: String,
    stderr: String,
}

impl ExecOptions {
    /// `exec`
    pub fn run(&self) -> anyhow::Result<Ending> {
        self.exec().or_else(|error| {
            eprintln!("cofferdam: {}", one_line(&error));
            let status = error
                .downcast_ref::<ClientError>()
                .and_then(|error| error.errno());
            Ok(ending(match status {
                Some(libc::ENOENT) => NOT_FOUND,
                Some(libc::EACCES | libc::ENOEXEC | libc::EISDIR | libc::ENOTDIR) => CANNOT_RUN,
                _ => FAILED,
            }))
        })
    }

    fn exec(&self) -> anyhow::Result<Ending> {
        let vm = self.vm.find()?;
        let status = ControlClient::to(&vm, ANSWER_TIME)?.status()?;
        if status.state == VmState::Paused {
            bail!(
                "{0} is paused: `cofferdam resume {0}` lets it go on",
                vm.name
            );
        }
        let mut agent = Client::unix(vm.paths.agent_socket());
        agent
            .hello(match status.guest_panic {
                Some(_) => PANIC_TIME,
                None => AGENT_TIME,
            })
            .map_err(|error| silent(&vm, &status, &error))?;
        let exec = Exec {
            argv: self.command.clone(),
            stdin: Bytes(if self.stdin {
                read_stdin()?
            } else {
                Vec::new()
            }),
            limit_ms: Some(self.timeout.saturating_mul(1000)),
            ..Exec::default()
        };
        if status.guest_panic.is_some() {
            // It has shown that it lives.
            return self.follow(&mut agent, exec, &AtomicU64::new(0));
        }
        let heard = Arc::new(AtomicU64::new(0));
        let watched = heard.clone();
        std::thread::spawn(move || watch(&vm, &watched));
        self.follow(&mut agent, exec, &heard)
    }

    /// Runs the command, counting in `heard` what it writes.
    fn follow(&self, agent: &mut Client, exec: Exec, heard: &AtomicU64) -> anyhow::Result<Ending> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let (end, _) = agent.exec_streaming(exec, &mut |is_stderr, bytes| {
            heard.fetch_add(1, Ordering::Relaxed);
            if self.json {
                if stdout.len() + stderr.len() + bytes.len() > MAX_COLLECTED {
                    return Err(ClientError::TooMuch(MAX_COLLECTED));
                }
                let collected = if is_stderr { &mut stderr } else { &mut stdout };
                collected.extend(bytes);
                return Ok(());
            }
            let written = if is_stderr {
                std::io::stderr().write_all(&bytes)
            } else {
                let mut out = std::io::stdout();
                out.write_all(&bytes).and_then(|()| out.flush())
            };
            written.map_err(ClientError::Channel)
        })?;
        let mut ended = Ended {
            stdout: String::from_utf8_lossy(&stdout).into_owned(),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
            ..Ended::default()
        };
        let status = match end {
            ExecEnd::Exited(status) => {
                ended.status = Some(status);
                u8::try_from(status).unwrap_or(u8::MAX)
            }
            // As a shell says it.
            ExecEnd::Signaled(signal) => {
                ended.signal = Some(signal);
                u8::try_from(signal.saturating_add(128)).unwrap_or(u8::MAX)
            }
            ExecEnd::TimeLimit => {
                ended.timed_out = true;
                eprintln!("cofferdam: the command was killed after {} s", self.timeout);
                TIMED_OUT
            }
        };
        if self.json {
            print_json(&ended)?;
        }
        Ok(ending(status))
    }
}

fn ending(status: u8) -> Ending {
    Ending::Status(ExitCode::from(status))
}

/// Why the agent does not answer.
fn silent(vm: &RunningVm, status: &Status, error: &ClientError) -> anyhow::Error {
    match &status.guest_panic {
        Some(line) => anyhow::anyhow!(
            "the guest has panicked ({line}): `cofferdam reset {}` boots it anew",
            vm.name
        ),
        None => anyhow::anyhow!(
            "the agent of {} does not answer: does its initramfs have one? {error}",
            vm.name
        ),
    }
}

/// Ends this process when the guest panics and its command is heard of no more: it would be waited
/// for in vain.
fn watch(vm: &RunningVm, heard: &AtomicU64) {
    let mut silent_since = None;
    loop {
        std::thread::sleep(LOOK);
        let status = ControlClient::to(vm, ANSWER_TIME).and_then(|mut client| client.status());
        // One that is stopped may go on; when it has ended the agent's channel ends as well.
        let Some(line) = status.ok().and_then(|status| status.guest_panic) else {
            silent_since = None;
            continue;
        };
        // A guest can print what it likes: only one that says nothing more is taken at its word.
        let now = heard.load(Ordering::Relaxed);
        if silent_since == Some(now) {
            eprintln!(
                "cofferdam: the guest has panicked ({line}) while the command ran: `cofferdam reset {}` boots it anew",
                vm.name
            );
            std::process::exit(FAILED.into());
        }
        silent_since = Some(now);
    }
}

/// All of standard input.
fn read_stdin() -> anyhow::Result<Vec<u8>> {
    let mut input = Vec::new();
    std::io::stdin()
        .take(MAX_STDIN_BYTES + 1)
        .read_to_end(&mut input)
        .context("cannot read standard input")?;
    if input.len() as u64 > MAX_STDIN_BYTES {
        bail!("standard input has more than {MAX_STDIN_BYTES} bytes: pass it another way");
    }
    Ok(input)
}
