//! Work that may take long: it goes on while nobody waits for it, and can be looked at and given
//! up.

use std::collections::VecDeque;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::LOCATION;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::Value;
use tokio::sync::watch;
use utoipa::ToSchema;

use super::extract::{Name, NoBody};
use super::problem::{Code, Problem};
use crate::options::VmName;

/// Jobs under way at one time.
pub const MAX_RUNNING: usize = 16;

/// Those of one guest: each takes one of the connections that its process serves at one time, and
/// others want to look at it meanwhile.
const MAX_OF_ONE: usize = 8;

/// Campaigns: each has guests of its own, and processors to work on.
pub const MAX_CAMPAIGNS: usize = 2;

/// Jobs that have ended and can still be looked at; the oldest goes first.
const MAX_ENDED: usize = 64;

/// Words of progress that are kept of a job, the last ones.
const MAX_PROGRESS: usize = 64;

/// How long who asked is kept waiting for the result before it is told of the job instead.
const PATIENCE: Duration = Duration::from_secs(5);

/// All jobs, oldest first.
#[derive(Debug, Clone, Default)]
pub struct Jobs(Arc<Mutex<VecDeque<Arc<Job>>>>);

/// One of them.
#[derive(Debug)]
pub struct Job {
    id: String,
    of: Subject,
    what: &'static str,
    state: watch::Sender<JobState>,
    giving_up: Mutex<GivingUp>,
}

/// What a job is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    /// The guest of this name.
    Guest(String),
    /// The campaign of this name, which is made by a process with these words.
    Campaign(String, Vec<String>),
}

impl Subject {
    fn name(&self) -> &str {
        match self {
            Self::Guest(name) | Self::Campaign(name, _) => name,
        }
    }

    /// How many of it there may be at one time: of one guest, or campaigns at all.
    fn most(&self) -> usize {
        match self {
            Self::Guest(_) => MAX_OF_ONE,
            Self::Campaign(..) => MAX_CAMPAIGNS,
        }
    }

    /// Whether `other` counts with it.
    fn counts_with(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Guest(one), Self::Guest(other)) => one == other,
            (Self::Campaign(..), Self::Campaign(..)) => true,
            _ => false,
        }
    }
}

impl From<&VmName> for Subject {
    fn from(guest: &VmName) -> Self {
        Self::Guest(guest.to_string())
    }
}

/// How a job is given up.
#[derive(Debug)]
pub enum GivingUp {
    /// Not at all.
    Never,
    /// By closing the connection over which it is done. There is none before it was made.
    Closing(Option<UnixStream>),
}

#[derive(Debug, Default)]
struct JobState {
    progress: VecDeque<String>,
    figures: Option<Value>,
    cancelled: bool,
    result: Option<Result<Value, Problem>>,
}

/// How a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobStage {
    /// It is being done.
    Running,
    /// It was done.
    Done,
    /// It was not.
    Failed,
}

/// A job as it is shown.
#[derive(Debug, Serialize, ToSchema)]
pub struct JobView {
    /// Which.
    id: String,
    /// Name of the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    guest: Option<String>,
    /// Name of the campaign.
    #[serde(skip_serializing_if = "Option::is_none")]
    campaign: Option<String>,
    /// What is done.
    what: &'static str,
    /// How it stands.
    stage: JobStage,
    /// What was done so far, as far as it was told: the last 64 lines.
    progress: Vec<String>,
    /// Of a campaign: how many trials are made (`trials` of `of`), how long the rest takes
    /// (`left_s`), verdicts by way (`ways`; of the faults that harm natively `of_harm`), and how
    /// many trials are to be looked at (`to_look_at`).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    figures: Option<Value>,
    /// What it brought: what the request answers where it does not take long.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    result: Option<Value>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<Problem>,
}

/// All jobs that can be looked at.
#[derive(Debug, Serialize, ToSchema)]
pub struct JobList {
    /// Oldest first.
    jobs: Vec<JobView>,
}

impl Job {
    /// Tells what is done.
    pub fn tell(&self, what: &str) {
        self.state.send_modify(|state| {
            if state.progress.len() >= MAX_PROGRESS {
                state.progress.pop_front();
            }
            state.progress.push_back(what.to_owned());
        });
    }

    /// Tells how far it is, in figures.
    pub fn counts(&self, figures: Value) {
        self.state
            .send_modify(|state| state.figures = Some(figures));
    }

    /// Whether it was given up.
    pub fn is_given_up(&self) -> bool {
        self.state.borrow().cancelled
    }

    /// Says what closing ends the job. It is closed at once if the job was given up before.
    pub fn is_done_over(&self, connection: UnixStream) {
        let mut giving_up = self.giving_up();
        if self.state.borrow().cancelled {
            // It fails where the other side has closed it.
            let _ = connection.shutdown(Shutdown::Both);
        }
        if let GivingUp::Closing(closed) = &mut *giving_up {
            *closed = Some(connection);
        }
    }

    /// Gives it up; whether that can be done. What has only just begun ends as soon as there is
    /// something to close.
    fn give_up(&self) -> bool {
        // Locked until it is known to be given up: a connection that is made meanwhile is closed
        // too.
        let giving_up = self.giving_up();
        let GivingUp::Closing(connection) = &*giving_up else {
            return false;
        };
        self.state.send_modify(|state| state.cancelled = true);
        if let Some(connection) = connection {
            // It fails where the other side has closed it.
            let _ = connection.shutdown(Shutdown::Both);
        }
        true
    }

    fn giving_up(&self) -> MutexGuard<'_, GivingUp> {
        self.giving_up
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn is_campaign(&self, name: &str) -> bool {
        let is_of = matches!(&self.of, Subject::Campaign(other, _) if other == name);
        is_of && !self.has_ended()
    }

    fn has_ended(&self) -> bool {
        self.state.borrow().result.is_some()
    }

    fn view(&self) -> JobView {
        let state = self.state.borrow();
        let (stage, result, problem) = match &state.result {
            None => (JobStage::Running, None, None),
            Some(Ok(result)) => (JobStage::Done, Some(result.clone()), None),
            Some(Err(problem)) => (JobStage::Failed, None, Some(problem.clone())),
        };
        JobView {
            id: self.id.clone(),
            guest: matches!(self.of, Subject::Guest(_)).then(|| self.of.name().to_owned()),
            campaign: matches!(self.of, Subject::Campaign(..)).then(|| self.of.name().to_owned()),
            what: self.what,
            stage,
            progress: state.progress.iter().cloned().collect(),
            figures: state.figures.clone(),
            result,
            problem,
        }
    }
}

impl Jobs {
    fn all(&self) -> MutexGuard<'_, VecDeque<Arc<Job>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, id: &str) -> Result<Arc<Job>, Problem> {
        let all = self.all();
        let job = all.iter().find(|job| job.id == id);
        job.cloned().ok_or_else(|| {
            let detail = "there is no such job: it was long ago, or before the service began";
            Problem::new(Code::NoSuchJob, detail)
        })
    }

    /// The campaign of this name that is under way, as a job.
    pub fn of_campaign(&self, name: &str) -> Option<String> {
        let all = self.all();
        let job = all.iter().find(|job| job.is_campaign(name));
        job.map(|job| job.id.clone())
    }

    /// Names of the campaigns that are under way.
    pub fn campaigns(&self) -> Vec<String> {
        let all = self.all();
        let under_way = all.iter().filter(|job| !job.has_ended());
        let campaigns = under_way.filter(|job| matches!(job.of, Subject::Campaign(..)));
        campaigns.map(|job| job.of.name().to_owned()).collect()
    }

    /// Does `work` of this in a thread of its own. Of a campaign that is under way the job is the
    /// one that there is; while it is being given up there can be no other.
    pub fn start(
        &self,
        of: impl Into<Subject>,
        what: &'static str,
        giving_up: GivingUp,
        work: impl FnOnce(&Job) -> Result<Value, Problem> + Send + 'static,
    ) -> Result<Arc<Job>, Problem> {
        let of = of.into();
        let mut all = self.all();
        if let Subject::Campaign(name, _) = &of
            && let Some(there) = all.iter().find(|job| job.is_campaign(name))
        {
            if there.is_given_up() {
                let detail = format!("{name} is ending: try again when its job has ended");
                return Err(Problem::new(Code::Busy, detail));
            }
            return match there.of == of {
                true => Ok(Arc::clone(there)),
                false => {
                    let detail = format!("{name} is under way and was begun as something else");
                    Err(Problem::new(Code::OtherSpec, detail))
                }
            };
        }
        let running = all.iter().filter(|job| !job.has_ended()).count();
        if running >= MAX_RUNNING {
            let detail = format!("{MAX_RUNNING} jobs are under way already: try again later");
            return Err(Problem::new(Code::Busy, detail));
        }
        let is_of_this = |job: &&Arc<Job>| job.of.counts_with(&of) && !job.has_ended();
        let most = of.most();
        if all.iter().filter(is_of_this).count() >= most {
            let whose = match &of {
                Subject::Guest(name) => format!("jobs of {name}"),
                Subject::Campaign(..) => "campaigns".to_owned(),
            };
            let detail = format!("{most} {whose} are under way already: try again later");
            return Err(Problem::new(Code::Busy, detail));
        }
        if all.len() - running >= MAX_ENDED
            && let Some(oldest) = all.iter().position(|job| job.has_ended())
        {
            all.remove(oldest);
        }
        let job = Arc::new(Job {
            id: random_id()?,
            of,
            what,
            state: watch::Sender::default(),
            giving_up: Mutex::new(giving_up),
        });
        all.push_back(Arc::clone(&job));
        let worker = Arc::clone(&job);
        let done = tokio::task::spawn_blocking(move || work(&worker));
        let ended = Arc::clone(&job);
        tokio::spawn(async move {
            let result = done
                .await
                .unwrap_or_else(|error| Err(Problem::new(Code::Internal, error.to_string())));
            *ended.giving_up() = GivingUp::Never;
            ended.state.send_modify(|state| {
                state.result = Some(match result {
                    Err(_) if state.cancelled => {
                        Err(Problem::new(Code::Cancelled, "the job was given up"))
                    }
                    other => other,
                });
            });
        });
        Ok(job)
    }

    /// What is answered to who asked for a job: its result, or after a while where it can be looked
    /// at.
    pub async fn answer(&self, job: Arc<Job>) -> Response {
        let mut state = job.state.subscribe();
        let ended = state.wait_for(|state| state.result.is_some());
        if let Ok(Ok(state)) = tokio::time::timeout(PATIENCE, ended).await
            && let Some(result) = &state.result
        {
            self.all().retain(|other| !Arc::ptr_eq(other, &job));
            return match result {
                Ok(value) => Json(value).into_response(),
                Err(problem) => problem.clone().into_response(),
            };
        }
        accepted(&job)
    }
}

impl Jobs {
    /// Why a job has failed that fails soon; it is forgotten then.
    pub async fn failed_early(&self, job: &Arc<Job>) -> Option<Problem> {
        let mut state = job.state.subscribe();
        let ended = state.wait_for(|state| state.result.is_some());
        let problem = match tokio::time::timeout(PATIENCE, ended).await {
            Ok(Ok(state)) => match &state.result {
                Some(Err(problem)) => Some(problem.clone()),
                _ => None,
            },
            _ => None,
        }?;
        self.all().retain(|other| !Arc::ptr_eq(other, job));
        Some(problem)
    }
}

/// The answer that a job has begun.
pub fn accepted(job: &Job) -> Response {
    let location = [(LOCATION, format!("/v1/jobs/{}", job.id))];
    (StatusCode::ACCEPTED, location, Json(job.view())).into_response()
}

/// Nobody takes a job of this service for one of an earlier one.
fn random_id() -> Result<String, Problem> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| Problem::new(Code::Internal, error.to_string()))?;
    Ok(format!("{:016x}", u64::from_ne_bytes(bytes)))
}

/// A value as it is shown in a job.
pub fn shown(value: impl Serialize) -> Result<Value, Problem> {
    serde_json::to_value(value).map_err(|error| Problem::new(Code::Internal, error.to_string()))
}

/// List the jobs: those under way, and the last that have ended.
#[utoipa::path(get, path = "/v1/jobs", tag = "jobs", responses((status = 200, body = JobList)))]
pub async fn list_jobs(State(jobs): State<Jobs>) -> Json<JobList> {
    let jobs = jobs.all().iter().map(|job| job.view()).collect();
    Json(JobList { jobs })
}

/// Show a job.
#[utoipa::path(get, path = "/v1/jobs/{id}", tag = "jobs", params(("id" = String, Path)),
    responses((status = 200, body = JobView)))]
pub async fn get_job(
    State(jobs): State<Jobs>,
    Name(id): Name<String>,
) -> Result<Json<JobView>, Problem> {
    Ok(Json(jobs.find(&id)?.view()))
}

/// Give a job up that is under way. What was done of it is undone by the guest's process.
#[utoipa::path(delete, path = "/v1/jobs/{id}", tag = "jobs", params(("id" = String, Path)),
    responses((status = 202, body = JobView)))]
pub async fn cancel_job(
    State(jobs): State<Jobs>,
    Name(id): Name<String>,
    _: NoBody,
) -> Result<Response, Problem> {
    let job = jobs.find(&id)?;
    if job.has_ended() {
        return Err(Problem::new(Code::Refused, "the job has ended already"));
    }
    if !job.give_up() {
        return Err(Problem::new(Code::Refused, "this job cannot be given up"));
    }
    Ok(accepted(&job))
}

#[cfg(test)]
mod tests;
