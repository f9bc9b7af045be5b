//! A guest is made: by `cofferdam run`, in a process of its own that the service may outlive or
//! not.
//!
//! Which guest a name is of is asked of the process that has the name: the words that it was
//! started with. So that there is nothing to keep, and asking again for the same guest finds the
//! one that is there, whoever asked first.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::LOCATION;
use axum::response::{IntoResponse, Response};
use tokio::process::{Child, Command};
use tokio::time::sleep;

use super::app::App;
use super::extract::Body;
use super::problem::{Code, Problem};
use super::spec::{Checked, GuestSpec};
use crate::control::client::ControlClient;
use crate::control::protocol::{Status, VmState};
use crate::runtime_dir::{ROOT_VARIABLE, RunningVm, RuntimeRoot};

/// How long a guest may take to run.
const START_TIME: Duration = Duration::from_secs(60);

/// Between two looks at it.
const START_POLL: Duration = Duration::from_millis(10);

/// How long it may take to answer one of them.
const ANSWER_TIME: Duration = Duration::from_secs(2);

/// Most of what a guest's process said that is read, from the end, in bytes.
const MAX_SAID_BYTES: u64 = 4096;

/// Make a guest, and wait until it runs. If it is there already, and of the same spec, nothing is
/// done.
#[utoipa::path(post, path = "/v1/guests", tag = "guests", request_body = GuestSpec,
    responses((status = 201, body = Status, description = "It was made"),
        (status = 200, body = Status, description = "It is there already")))]
pub async fn create_guest(
    State(app): State<Arc<App>>,
    Body(spec): Body<GuestSpec>,
) -> Result<Response, Problem> {
    let mut spec = spec.check()?;
    if app.jail {
        spec.words.push("--jail".to_owned());
    }
    if let Some(group) = &app.cgroup {
        spec.words.push(format!("--cgroup={group}"));
    }
    let location = [(LOCATION, format!("/v1/guests/{}", spec.name))];
    if let Some(vm) = app.asks.find(&spec.name).await? {
        is_of(&vm, &spec)?;
        let status = app.wait_for(&spec, None).await?;
        return Ok((StatusCode::OK, location, Json(status)).into_response());
    }
    let said = said_file_in(&app.root)?;
    let mut child = start(&app, &spec, &said)?;
    match app.wait_for(&spec, Some(&mut child)).await {
        Ok(status) => Ok((StatusCode::CREATED, location, Json(status)).into_response()),
        // Somebody else may have made it at the same time.
        Err(problem) => match app.asks.find(&spec.name).await? {
            Some(vm) if vm.pid != child.id() => {
                is_of(&vm, &spec)?;
                let status = app.wait_for(&spec, None).await?;
                Ok((StatusCode::OK, location, Json(status)).into_response())
            }
            Some(_) => Err(problem),
            None => Err(match last_line(said) {
                Some(line) => Problem::new(Code::CannotStart, line),
                None => problem,
            }),
        },
    }
}

impl App {
    /// Waits until the guest runs, or `child`, which is to be it, has ended.
    async fn wait_for(
        &self,
        spec: &Checked,
        mut child: Option<&mut Child>,
    ) -> Result<Status, Problem> {
        let deadline = Instant::now() + START_TIME;
        let pid = child.as_ref().and_then(|child| child.id());
        loop {
            let found = self.asks.find(&spec.name).await?;
            let found = found.filter(|vm| pid.is_none() || vm.pid == pid);
            let is_there = found.is_some();
            if let Some(vm) = found {
                let status = self.asks.block(move || {
                    Ok(ControlClient::to(&vm, ANSWER_TIME).and_then(|mut client| client.status()))
                });
                match status.await? {
                    Ok(status) if status.state != VmState::Starting => return Ok(status),
                    // Its socket comes after its name.
                    _ => {}
                }
            }
            let ended = match &mut child {
                Some(child) => child
                    .try_wait()
                    .map_err(|error| Problem::new(Code::Internal, error.to_string()))?
                    .map(|status| status.to_string()),
                None => (!is_there).then(|| "it is gone".to_owned()),
            };
            if let Some(how) = ended {
                let detail = format!("{} ended before it ran: {how}", spec.name);
                return Err(Problem::new(Code::CannotStart, detail));
            }
            if Instant::now() >= deadline {
                let seconds = START_TIME.as_secs();
                let detail = format!("{} does not run after {seconds} s", spec.name);
                return Err(Problem::new(Code::NoAnswer, detail));
            }
            sleep(START_POLL).await;
        }
    }
}

/// Whether the process was started for this spec.
fn is_of(vm: &RunningVm, spec: &Checked) -> Result<(), Problem> {
    let internal = |error: std::io::Error| Problem::new(Code::Internal, error.to_string());
    let Some(pid) = vm.pid else {
        let detail = format!("{} is just being made: ask again", vm.name);
        return Err(Problem::new(Code::Busy, detail));
    };
    let words = std::fs::read(format!("/proc/{pid}/cmdline")).map_err(internal)?;
    // Each word ends with a NUL; the first is the program (proc_pid_cmdline(5)).
    let mut words = words.split(|byte| *byte == 0).skip(1);
    let same = spec
        .words
        .iter()
        .all(|word| words.next() == Some(word.as_bytes()));
    if same && words.next() == Some(b"") && words.next().is_none() {
        return Ok(());
    }
    let detail = format!("{} runs and was made of something else", vm.name);
    Err(Problem::new(Code::OtherSpec, detail))
}

/// Where a process says what is wrong. Nobody else sees it, and it is gone with the process; a pipe
/// would end with the service.
pub fn said_file_in(root: &RuntimeRoot) -> Result<File, Problem> {
    crate::runtime_dir::create_dir(root.path())
        .and_then(|()| tempfile::tempfile_in(root.path()))
        .map_err(|error| Problem::new(Code::Internal, error.to_string()))
}

fn start(app: &App, spec: &Checked, said: &File) -> Result<Child, Problem> {
    let internal = |error: std::io::Error| Problem::new(Code::Internal, error.to_string());
    // This program itself, also when another was put in its place.
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("cofferdam")
        .args(&spec.words)
        .env(ROOT_VARIABLE, app.root.path())
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(said.try_clone().map_err(internal)?);
    // SAFETY: `setsid` is a plain system call, which may be made between fork and exec
    // (signal-safety(7)).
    unsafe {
        command.pre_exec(|| {
            // Signals of the service's terminal are not for the guest.
            rustix::process::setsid()?;
            Ok(())
        });
    }
    command.spawn().map_err(internal)
}

/// The last line that a guest's process said.
pub fn last_line(mut said: File) -> Option<String> {
    let end = said.seek(SeekFrom::End(0)).ok()?;
    let from = end.saturating_sub(MAX_SAID_BYTES);
    said.seek(SeekFrom::Start(from)).ok()?;
    let mut bytes = Vec::new();
    said.take(MAX_SAID_BYTES).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let line = text.lines().rev().find(|line| !line.trim().is_empty())?;
    Some(line.strip_prefix("cofferdam: ").unwrap_or(line).to_owned())
}
