//! What guests are asked for that may take long: it is asked for in a job.

use std::sync::Arc;

use serde_json::Value;

use super::app::App;
use super::jobs::{GivingUp, Job};
use super::problem::Problem;
use crate::control::client::{ANSWER_TIME, ControlClient};
use crate::control::protocol::{Reply, Request};
use crate::options::VmName;

impl App {
    /// Asks the guest `name` for something that may take long; `result` makes of the reply what is
    /// shown.
    pub async fn ask_long(
        &self,
        name: &VmName,
        what: &'static str,
        request: Request,
        result: impl FnOnce(Reply) -> Result<Value, Problem> + Send + 'static,
    ) -> Result<Arc<Job>, Problem> {
        self.ask_at_length(name, what, move |mut guest| result(guest.ask(&request)?))
            .await
    }

    /// The same for `work` that asks more than once.
    pub async fn ask_at_length(
        &self,
        name: &VmName,
        what: &'static str,
        work: impl FnOnce(Asking<'_>) -> Result<Value, Problem> + Send + 'static,
    ) -> Result<Arc<Job>, Problem> {
        // Who is not there is said at once.
        let vm = self.asks.guest(name).await?;
        let giving_up = GivingUp::Closing(None);
        self.jobs.start(name, what, giving_up, move |job| {
            let client = ControlClient::to(&vm, ANSWER_TIME)?;
            job.is_done_over(client.stream().map_err(anyhow::Error::from)?);
            work(Asking { client, job })
        })
    }
}

/// The guest of a job, which is asked.
pub struct Asking<'a> {
    client: ControlClient,
    job: &'a Job,
}

impl Asking<'_> {
    /// Asks for something, and tells the job what is done meanwhile.
    pub fn ask(&mut self, request: &Request) -> Result<Reply, Problem> {
        let job = self.job;
        let mut tell = |what: &str| job.tell(what);
        Ok(self.client.ask_and_watch(request, &mut tell)?)
    }
}
