//! Requests to VM processes and device hosts. They are waited for in threads of their own, of which
//! there are not many.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use super::kept::{Asked, Kept};
use super::problem::{Code, Problem};
use crate::control::client::{ANSWER_TIME, AskError, Connection, ControlClient};
use crate::control::protocol::{Reply, Request, Status};
use crate::device::protocol::{DeviceProtocol, Reply as DeviceReply, Request as DeviceRequest};
use crate::options::VmName;
use crate::runtime_dir::{RunningVm, RuntimeRoot};

/// Requests that are waited for at one time.
pub const MAX_REQUESTS: usize = 64;

/// Whom requests go to, and the threads in which answers are waited for.
#[derive(Debug, Clone)]
pub struct Asks {
    root: RuntimeRoot,
    threads: Arc<Semaphore>,
    kept: Kept,
}

impl Asks {
    /// To what runs in `root`.
    pub fn new(root: RuntimeRoot) -> Self {
        Self {
            root,
            threads: Arc::new(Semaphore::new(MAX_REQUESTS)),
            kept: Kept::default(),
        }
    }

    /// Does what blocks a thread. It is done to its end, also when nobody waits for it any more.
    pub async fn block<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        let Ok(place) = Arc::clone(&self.threads).try_acquire_owned() else {
            let detail =
                format!("{MAX_REQUESTS} requests wait for answers already: try again later");
            return Err(Problem::new(Code::Busy, detail));
        };
        let done = tokio::task::spawn_blocking(move || {
            let result = work();
            drop(place);
            result
        });
        done.await
            .unwrap_or_else(|error| Err(Problem::new(Code::Internal, error.to_string())))
    }

    /// The guest `name`, if it runs.
    pub async fn guest(&self, name: &VmName) -> Result<RunningVm, Problem> {
        let (root, name) = (self.root.clone(), name.clone());
        self.block(move || guest(&root, &name)).await
    }

    /// The same; `None` if it does not run.
    pub async fn find(&self, name: &VmName) -> Result<Option<RunningVm>, Problem> {
        let (root, name) = (self.root.clone(), name.clone());
        self.block(move || find(&root, &name)).await
    }

    /// Asks the guest `name` for something.
    pub async fn ask(&self, name: &VmName, request: Request) -> Result<Reply, Problem> {
        let (root, name) = (self.root.clone(), name.clone());
        self.block(move || {
            let vm = guest(&root, &name)?;
            Ok(ControlClient::to(&vm, ANSWER_TIME)?.ask(&request)?)
        })
        .await
    }

    /// Asks the guest `name` how it is, over a connection that is kept for the next time.
    pub async fn status(&self, name: &VmName) -> Result<Status, Problem> {
        let request = Request::Status {};
        let begun = match self.kept.ask(name, &request).await {
            Asked::Answered(reply) => return status_of(reply),
            Asked::Refused(why) => return Err(anyhow::Error::from(AskError::Refused(why)).into()),
            Asked::Begun(client, line) => Some((client, line)),
            Asked::Nobody => None,
        };
        let (root, asked) = (self.root.clone(), name.clone());
        let ask = move || {
            let mut client = match begun {
                Some((mut client, line)) => match client.go_on(&request, line) {
                    Ok(reply) => return Ok((reply, client)),
                    Err(error) if is_answer_enough(&error) => return Err(error.into()),
                    // Its process has ended meanwhile: who has the name now?
                    Err(_) => ControlClient::to(&guest(&root, &asked)?, ANSWER_TIME)?,
                },
                None => ControlClient::to(&guest(&root, &asked)?, ANSWER_TIME)?,
            };
            let reply = client.ask(&request)?;
            Ok((reply, client))
        };
        let (reply, client) = self.block(ask).await?;
        self.kept.keep(name, client);
        status_of(reply)
    }

    /// Closes connections that have not been used for `age`.
    pub fn close_idle(&self, age: Duration) {
        self.kept.close_idle(age);
    }

    /// Asks it for what brings nothing back but that it was done.
    pub async fn tell(&self, name: &VmName, request: Request) -> Result<(), Problem> {
        match self.ask(name, request).await? {
            Reply::Done {} => Ok(()),
            other => Err(Problem::unexpected(&other)),
        }
    }

    /// Asks the device host `name` for something.
    pub async fn ask_device(
        &self,
        name: &VmName,
        request: DeviceRequest,
    ) -> Result<DeviceReply, Problem> {
        let (root, name) = (self.root.devices(), name.clone());
        self.block(move || {
            let Some(host) = find(&root, &name)? else {
                let detail = format!("no device host named {name} runs");
                return Err(Problem::new(Code::NoSuchDevice, detail));
            };
            Ok(Connection::<DeviceProtocol>::to(&host, ANSWER_TIME)?.ask(&request)?)
        })
        .await
    }
}

fn status_of(reply: Reply) -> Result<Status, Problem> {
    match reply {
        Reply::Status(status) => Ok(*status),
        other => Err(Problem::unexpected(&other)),
    }
}

/// Whether the guest's process is there, so that another connection would change nothing.
fn is_answer_enough(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref(),
        Some(AskError::Refused(_) | AskError::Silent(_))
    )
}

/// The guest `name`, if it runs.
fn guest(root: &RuntimeRoot, name: &VmName) -> Result<RunningVm, Problem> {
    find(root, name)?.ok_or_else(|| {
        let detail = format!("no guest named {name} runs");
        Problem::new(Code::NoSuchGuest, detail)
    })
}

/// The process that has this name now.
fn find(root: &RuntimeRoot, name: &VmName) -> Result<Option<RunningVm>, Problem> {
    root.running_as(name)
        .map_err(|error| Problem::new(Code::Internal, crate::error_text::one_line(&error)))
}
