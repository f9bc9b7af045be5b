//! Campaigns: faults by the hundred, each in a guest of the campaign's own.
//!
//! ```text
//!  POST ──► spec ──► job ──► child: `cofferdam campaign --stream`  ──► its VMs
//!                     ▲            │ lines of JSON: what is done, figures
//!                     └────────────┘ standard input ends: so does it, with its VMs
//!  GET ───► files: NAME.jsonl in the folder of `--campaigns`, a trial at a time
//! ```
//!
//! What a campaign came to is in its file, which the next service finds, and goes on with where it
//! was broken off.

mod child;
mod files;
mod spec;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, ensure};
use axum::Json;
use axum::extract::State;
use axum::http::HeaderValue;
use axum::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::app::App;
use super::ask::Asks;
use super::extract::{Body, Name, Names};
use super::jobs::{GivingUp, JobView, Subject, accepted, shown};
use super::problem::{Code, Problem};
use crate::error_text::one_line;
use crate::options::VmName;
use crate::report::campaign::plots;
use files::{CampaignList, CampaignView, Files};
use spec::{CampaignSpec, ReplaySpec};

/// Files that are read at one time: one may have hundreds of megabytes.
const MAX_READS: usize = 2;

/// Where guests of campaigns are, in the runtime folder: no guest's name begins like this.
const GUESTS: &str = ".campaigns";

/// Where campaigns of this service are.
#[derive(Debug, Clone)]
pub struct Campaigns {
    files: Files,
    /// Images for guests where nobody says.
    images: PathBuf,
    /// Where their guests' folders are.
    guests: PathBuf,
    reads: Arc<Semaphore>,
}

impl Campaigns {
    /// With files in `folder`, guests of `images`, for a service in the runtime folder `root`.
    ///
    /// # Errors
    /// The folder is none, or cannot be named.
    pub fn new(folder: &Path, images: &Path, root: &Path) -> anyhow::Result<Self> {
        let absolute = |path: &Path| {
            std::path::absolute(path).with_context(|| format!("cannot name {}", path.display()))
        };
        let folder = absolute(folder)?;
        ensure!(
            folder.is_dir(),
            "{} is no folder: make it, or name another one for campaigns",
            folder.display()
        );
        Ok(Self {
            files: Files::of(folder),
            images: absolute(images)?,
            guests: root.join(GUESTS),
            reads: Arc::new(Semaphore::new(MAX_READS)),
        })
    }

    /// Removes the folder of their guests, if there is nothing in it.
    pub fn leave(&self) {
        child::leave(&self.guests);
    }

    /// Looks at files in one of the threads of `asks`, when there is room for it. There is none
    /// before those that are read are read to their ends, whether anybody waits for that or not.
    async fn read<T: Send + 'static>(
        &self,
        asks: &Asks,
        read: impl FnOnce(&Files) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        let place = Self::room(Arc::clone(&self.reads)).await?;
        let files = self.files.clone();
        let work = move || {
            let read = read(&files);
            drop(place);
            read
        };
        asks.block(work).await
    }

    /// The same in a thread of a job.
    fn read_here<T>(&self, read: impl FnOnce(&Files) -> Result<T, Problem>) -> Result<T, Problem> {
        let room = Self::room(Arc::clone(&self.reads));
        let _place = tokio::runtime::Handle::current().block_on(room)?;
        read(&self.files)
    }

    async fn room(reads: Arc<Semaphore>) -> Result<OwnedSemaphorePermit, Problem> {
        let place = reads.acquire_owned().await;
        place.map_err(|error| Problem::new(Code::Internal, error.to_string()))
    }
}

impl App {
    fn campaigns(&self) -> Result<&Campaigns, Problem> {
        self.campaigns.as_ref().ok_or_else(|| {
            let detail = "this service has no folder for campaigns: start it with --campaigns DIR";
            Problem::new(Code::Refused, detail)
        })
    }

    /// Looks at files, when there is room for it.
    async fn read_campaigns<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Files) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        self.campaigns()?.read(&self.asks, read).await
    }

    /// Has a campaign's process do this as a job.
    async fn campaign_job(
        self: &Arc<Self>,
        name: &VmName,
        what: &'static str,
        words: Vec<String>,
    ) -> Result<Response, Problem> {
        let campaigns = self.campaigns()?.clone();
        let (app, file) = (Arc::clone(self), name.to_string());
        let of = Subject::Campaign(name.to_string(), words.clone());
        let job = self
            .jobs
            .start(of, what, GivingUp::Closing(None), move |job| {
                match child::run(&app.root, &campaigns.guests, job, &words)? {
                    Some(replayed) => Ok(replayed),
                    // The file says it, also of trials that were made before.
                    None => shown(campaigns.read_here(|files| files.figures(&file))?),
                }
            })?;
        let jobs = self.jobs.clone();
        Ok(match jobs.failed_early(&job).await {
            Some(problem) => problem.into_response(),
            None => accepted(&job),
        })
    }
}

/// List the campaigns: those whose files are there, and those under way.
#[utoipa::path(get, path = "/v1/campaigns", tag = "campaigns",
    responses((status = 200, body = CampaignList)))]
pub async fn list_campaigns(State(app): State<Arc<App>>) -> Result<Json<CampaignList>, Problem> {
    let jobs = app.jobs.clone();
    let list = app
        .read_campaigns(move |files| files.list(jobs.campaigns(), |name| jobs.of_campaign(name)))
        .await?;
    Ok(Json(list))
}

/// Start a campaign, or go on with one, as a job.
///
/// What it comes to is in its file, and in `GET /v1/campaigns/{name}`. To ask again for one that is
/// under way gives its job. One that is given up is gone on with when it is started again.
#[utoipa::path(post, path = "/v1/campaigns", tag = "campaigns", request_body = CampaignSpec,
    responses((status = 202, body = JobView)))]
pub async fn start_campaign(
    State(app): State<Arc<App>>,
    Body(spec): Body<CampaignSpec>,
) -> Result<Response, Problem> {
    let campaigns = app.campaigns()?;
    let (name, mut words) = spec.words(&campaigns.files, &campaigns.images)?;
    if app.jail {
        words.push("--jail".to_owned());
    }
    app.campaign_job(&name, "campaign", words).await
}

/// Show a campaign: what it is, and its figures.
#[utoipa::path(get, path = "/v1/campaigns/{name}", tag = "campaigns", params(("name" = String, Path)),
    responses((status = 200, body = CampaignView)))]
pub async fn get_campaign(
    State(app): State<Arc<App>>,
    Name(name): Name<VmName>,
) -> Result<Json<CampaignView>, Problem> {
    let job = app.jobs.of_campaign(name.as_str());
    let view = app
        .read_campaigns(move |files| files.view(name.as_str(), job))
        .await?;
    Ok(Json(view))
}

/// Show a plot of a campaign, as SVG.
#[utoipa::path(get, path = "/v1/campaigns/{name}/plots/{plot}", tag = "campaigns",
    params(("name" = String, Path), ("plot" = String, Path)),
    responses((status = 200, body = String, content_type = "image/svg+xml")))]
pub async fn get_plot(
    State(app): State<Arc<App>>,
    Names(name, plot): Names<VmName, VmName>,
) -> Result<Response, Problem> {
    let drawn = app
        .read_campaigns(move |files| {
            let summary = files.summary(name.as_str())?;
            let mut all =
                plots(&summary).map_err(|error| Problem::new(Code::Internal, one_line(&error)))?;
            all.remove(plot.as_str()).ok_or_else(|| {
                let there: Vec<_> = all.into_keys().collect();
                let detail = format!("there are the plots {}", there.join(", "));
                Problem::new(Code::NoSuchTrial, detail)
            })
        })
        .await?;
    // Opened by itself it can do nothing.
    let headers = [
        (CONTENT_TYPE, "image/svg+xml"),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (
            CONTENT_SECURITY_POLICY,
            "default-src 'none'; style-src 'unsafe-inline'; sandbox",
        ),
    ];
    let headers = headers.map(|(name, value)| (name, HeaderValue::from_static(value)));
    Ok((headers, drawn).into_response())
}

/// Show a trial of a campaign: its fault, and all that was seen of each run.
#[utoipa::path(get, path = "/v1/campaigns/{name}/trials/{number}", tag = "campaigns",
    params(("name" = String, Path), ("number" = u32, Path)),
    responses((status = 200, body = Object)))]
pub async fn get_trial(
    State(app): State<Arc<App>>,
    Names(name, number): Names<VmName, u32>,
) -> Result<Json<Value>, Problem> {
    let record = app
        .read_campaigns(move |files| shown(files.trial(name.as_str(), number)?))
        .await?;
    Ok(Json(record))
}

/// Make a trial of a campaign once more, as a job.
///
/// The result has what was seen `then` and `now`. The campaign's file stays as it is.
#[utoipa::path(post, path = "/v1/campaigns/{name}/trials/{number}/replay", tag = "campaigns",
    params(("name" = String, Path), ("number" = u32, Path)), request_body = ReplaySpec,
    responses((status = 202, body = JobView)))]
pub async fn replay_trial(
    State(app): State<Arc<App>>,
    Names(name, number): Names<VmName, u32>,
    Body(spec): Body<ReplaySpec>,
) -> Result<Response, Problem> {
    let campaigns = app.campaigns()?;
    let mut words = spec.words(&name, number, &campaigns.files, &campaigns.images)?;
    if app.jail {
        words.push("--jail".to_owned());
    }
    let of = name.clone();
    app.read_campaigns(move |files| files.trial(of.as_str(), number))
        .await?;
    app.campaign_job(&name, "replay", words).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime_dir::RuntimeRoot;

    #[tokio::test]
    async fn a_read_that_nobody_waits_for_any_more_keeps_its_place_to_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let campaigns = Campaigns::new(folder.path(), folder.path(), folder.path()).unwrap();
        let asks = Asks::new(RuntimeRoot::new(folder.path()));
        let (begins, mut has_begun) = tokio::sync::mpsc::channel(MAX_READS);
        let (go, may_go) = std::sync::mpsc::channel::<()>();
        let may_go = Arc::new(std::sync::Mutex::new(may_go));
        for _ in 0..MAX_READS {
            let (of, asks, begins) = (campaigns.clone(), asks.clone(), begins.clone());
            let may_go = Arc::clone(&may_go);
            let asked = tokio::spawn(async move {
                let read = move |_: &Files| {
                    begins.blocking_send(()).unwrap();
                    let _ = may_go.lock().unwrap().recv();
                    Ok(())
                };
                of.read(&asks, read).await
            });
            has_begun.recv().await.unwrap();
            asked.abort();
            assert!(asked.await.unwrap_err().is_cancelled());
        }
        assert_eq!(campaigns.reads.available_permits(), 0);
        drop(go);
        campaigns.read(&asks, |_| Ok(())).await.unwrap();
        // That of a job counts with them.
        let of = campaigns.clone();
        let there = move || of.read_here(|_| Ok(of.reads.available_permits()));
        let there = tokio::task::spawn_blocking(there).await.unwrap();
        assert!(there.unwrap() < MAX_READS);
    }
}
