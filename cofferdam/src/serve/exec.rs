//! A program inside a guest, run by its agent.

use std::sync::Arc;
use std::time::Duration;

use agent_protocol::message::{Bytes, Exec, ExecEnd};
use agent_protocol::{Client, ClientError};
use axum::extract::State;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::app::App;
use super::extract::{Body, Name};
use super::jobs::{GivingUp, JobView, shown};
use super::problem::{Code, Problem};
use crate::control::client::{ANSWER_TIME, ControlClient};
use crate::control::protocol::VmState;
use crate::options::VmName;
use crate::runtime_dir::RunningVm;

/// How long an agent may take to say that it is there.
const AGENT_TIME: Duration = Duration::from_secs(20);

/// Time that a program may take where nobody says, in seconds.
const DEFAULT_SECONDS: u64 = 60;

/// The most, in seconds.
const MAX_SECONDS: u64 = 3600;

/// Most output that is collected, in bytes: a job keeps it until it is forgotten.
const MAX_OUTPUT_BYTES: usize = 256 << 10;

/// A program and what it gets.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecSpec {
    /// Program and arguments. A program without `/` is looked for in the agent's `PATH`.
    argv: Vec<String>,
    /// Its standard input.
    #[serde(default)]
    stdin: String,
    /// It is killed after so many seconds, 1 to 3600; 60 when not given.
    limit_s: Option<u64>,
}

/// How it ended.
#[derive(Debug, Serialize, ToSchema)]
pub struct ExecResult {
    /// Its exit status.
    status: Option<i32>,
    /// The signal that killed it.
    signal: Option<i32>,
    /// Whether its time was up.
    timed_out: bool,
    /// What it wrote; bytes that are no UTF-8 are replaced.
    stdout: String,
    /// What it wrote to standard error, in the same way.
    stderr: String,
}

/// Run a program inside a guest, through its agent.
#[utoipa::path(post, path = "/v1/guests/{name}/exec", tag = "guests", params(("name" = String, Path)),
    request_body = ExecSpec, responses((status = 200, body = ExecResult), (status = 202, body = JobView)))]
pub async fn exec_in_guest(
    State(app): State<Arc<App>>,
    Name(name): Name<VmName>,
    Body(spec): Body<ExecSpec>,
) -> Result<Response, Problem> {
    let seconds = spec.limit_s.unwrap_or(DEFAULT_SECONDS);
    if spec.argv.is_empty() || !(1..=MAX_SECONDS).contains(&seconds) {
        let detail = format!("argv has at least the program, limit_s is 1 to {MAX_SECONDS}");
        return Err(Problem::new(Code::WrongValues, detail));
    }
    let exec = Exec {
        argv: spec.argv,
        stdin: Bytes(spec.stdin.into_bytes()),
        limit_ms: Some(seconds * 1000),
        ..Exec::default()
    };
    let vm = app.asks.guest(&name).await?;
    let job = app.jobs.start(&name, "exec", GivingUp::Never, move |job| {
        job.tell("waiting for the agent");
        let mut agent = agent(&vm)?;
        job.tell("running the program");
        let done = agent.exec(exec).map_err(problem)?;
        let (status, signal) = match done.end {
            ExecEnd::Exited(status) => (Some(status), None),
            ExecEnd::Signaled(signal) => (None, Some(signal)),
            ExecEnd::TimeLimit => (None, None),
        };
        shown(ExecResult {
            status,
            signal,
            timed_out: done.end == ExecEnd::TimeLimit,
            stdout: String::from_utf8_lossy(&done.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&done.stderr).into_owned(),
        })
    })?;
    Ok(app.jobs.answer(job).await)
}

/// The agent of a guest that runs.
fn agent(vm: &RunningVm) -> Result<Client, Problem> {
    let status = ControlClient::to(vm, ANSWER_TIME)?.status()?;
    let refused = |why: String| Err(Problem::new(Code::Refused, why));
    match (status.state, status.guest_panic) {
        (VmState::Paused, _) => return refused(format!("{} is paused: resume it", vm.name)),
        (_, Some(line)) => return refused(format!("the guest has panicked ({line}): reset it")),
        _ => {}
    }
    let mut agent = Client::unix(vm.paths.agent_socket());
    agent.set_collect_limit(MAX_OUTPUT_BYTES);
    agent.hello(AGENT_TIME).map_err(problem)?;
    Ok(agent)
}

fn problem(error: ClientError) -> Problem {
    let code = match &error {
        ClientError::Agent(_) | ClientError::TooMuch(_) => Code::Refused,
        ClientError::Time(..) => Code::NoAnswer,
        _ => Code::BrokenOff,
    };
    Problem::new(code, error.to_string())
}
