//! Guests: which there are, how they are, and what is done to a whole one.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::{IntoParams, ToSchema};

use super::app::App;
use super::extract::{Body, Name, NoBody, Options};
use super::jobs::{GivingUp, JobView, accepted, shown};
use super::problem::{Code, Problem};
use super::spec::is_absolute;
use crate::control::ending::{self, Forced};
use crate::control::listed::Listed;
use crate::control::protocol::{Reply, Request, Status};
use crate::options::VmName;

/// How long a guest has to shut down.
const STOP_TIME: Duration = Duration::from_secs(60);

/// The guests that run.
#[derive(Debug, Serialize, ToSchema)]
pub struct GuestList {
    /// By name; with its status if it answers.
    guests: Vec<Listed<Status>>,
}

/// List the guests. One that does not answer is listed without its status.
#[utoipa::path(get, path = "/v1/guests", tag = "guests", responses((status = 200, body = GuestList)))]
pub async fn list_guests(State(app): State<Arc<App>>) -> Result<Json<GuestList>, Problem> {
    let guests = app.looks.look().await?.guests.clone();
    Ok(Json(GuestList { guests }))
}

/// Show how a guest is.
#[utoipa::path(get, path = "/v1/guests/{name}", tag = "guests", params(("name" = String, Path)),
    responses((status = 200, body = Status)))]
pub async fn get_guest(
    State(app): State<Arc<App>>,
    Name(name): Name<VmName>,
) -> Result<Json<Status>, Problem> {
    app.asks.status(&name).await.map(Json)
}

/// Hold a guest's processors; nothing happens if they are held already.
#[utoipa::path(post, path = "/v1/guests/{name}/pause", tag = "guests", params(("name" = String, Path)),
    responses((status = 204)))]
pub async fn pause_guest(
    State(app): State<Arc<App>>,
    Name(name): Name<VmName>,
    _: NoBody,
) -> Result<StatusCode, Problem> {
    app.asks.tell(&name, Request::Pause {}).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Let a guest's processors go on; nothing happens if they run already.
#[utoipa::path(post, path = "/v1/guests/{name}/resume", tag = "guests", params(("name" = String, Path)),
    responses((status = 204)))]
pub async fn resume_guest(
    State(app): State<Arc<App>>,
    Name(name): Name<VmName>,
    _: NoBody,
) -> Result<StatusCode, Problem> {
    app.asks.tell(&name, Request::Resume {}).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Reset a guest, as its reset button would.
#[utoipa::path(post, path = "/v1/guests/{name}/reset", tag = "guests", params(("name" = String, Path)),
    responses((status = 204)))]
pub async fn reset_guest(
    State(app): State<Arc<App>>,
    Name(name): Name<VmName>,
    _: NoBody,
) -> Result<StatusCode, Problem> {
    app.asks.tell(&name, Request::Reset {}).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Press a guest's power button: one that listens for it shuts down.
#[utoipa::path(post, path = "/v1/guests/{name}/power-button", tag = "guests", params(("name" = String, Path)),
    responses((status = 204)))]
pub async fn press_power_button(
    State(app): State<Arc<App>>,
    Name(name): Name<VmName>,
    _: NoBody,
) -> Result<StatusCode, Problem> {
    app.asks.tell(&name, Request::PowerButton {}).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Wake a guest that has suspended itself; one that is awake does not mind.
#[utoipa::path(post, path = "/v1/guests/{name}/wake", tag = "guests", params(("name" = String, Path)),
    responses((status = 204)))]
pub async fn wake_guest(
    State(app): State<Arc<App>>,
    Name(name): Name<VmName>,
    _: NoBody,
) -> Result<StatusCode, Problem> {
    app.asks.tell(&name, Request::Wake {}).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// How a guest is to end.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct EndOptions {
    /// At once, as if the power cord was pulled, also if it does not answer.
    #[serde(default)]
    force: bool,
}

/// How a guest has ended.
#[derive(Debug, Serialize, ToSchema)]
pub struct Ended {
    /// Why its process had to be killed, if it had to be.
    #[serde(skip_serializing_if = "Option::is_none")]
    killed: Option<String>,
}

/// Shut a guest down, and wait until it has ended.
#[utoipa::path(delete, path = "/v1/guests/{name}", tag = "guests", params(("name" = String, Path), EndOptions),
    responses((status = 200, body = Ended), (status = 202, body = JobView)))]
pub async fn end_guest(
    State(app): State<Arc<App>>,
    Name(name): Name<VmName>,
    Options(EndOptions { force }): Options<EndOptions>,
    _: NoBody,
) -> Result<Response, Problem> {
    let vm = app.asks.guest(&name).await?;
    let root = app.root.clone();
    let job = app.jobs.start(&name, "end", GivingUp::Never, move |job| {
        let killed = if force {
            match ending::force(&root, &vm)? {
                Forced::Asked => None,
                Forced::Killed(why) => Some(why),
            }
        } else {
            job.tell("asking the guest to shut down");
            ending::ask(&vm)?;
            job.tell("waiting for the guest to shut down");
            if !ending::ended(&root, &vm, STOP_TIME)? {
                let seconds = STOP_TIME.as_secs();
                let detail = format!(
                    "{} still runs after {seconds} s: end it with force",
                    vm.name
                );
                return Err(Problem::new(Code::Refused, detail));
            }
            None
        };
        shown(Ended { killed })
    })?;
    Ok(app.jobs.answer(job).await)
}

/// Where a snapshot is written.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotSpec {
    /// A directory that is not there yet, or an empty one: its absolute path.
    dir: String,
    /// The snapshot that it is to be a diff of: its absolute path.
    #[serde(default)]
    parent: Option<String>,
    /// Follow from now on what changes, so that the next diff takes little time.
    #[serde(default)]
    track: bool,
    /// End the guest where the snapshot is taken.
    #[serde(default)]
    stop: bool,
}

/// Write all of a guest's state to disk, as a job.
#[utoipa::path(post, path = "/v1/guests/{name}/snapshot", tag = "guests", params(("name" = String, Path)),
    request_body = SnapshotSpec,
    responses((status = 202, body = JobView, headers(("Location" = String, description = "The job")))))]
pub async fn snapshot_guest(
    State(app): State<Arc<App>>,
    Name(name): Name<VmName>,
    Body(spec): Body<SnapshotSpec>,
) -> Result<Response, Problem> {
    is_absolute("dir", Some(&spec.dir))?;
    is_absolute("parent", spec.parent.as_deref())?;
    let request = Request::Snapshot {
        dir: spec.dir.into(),
        parent: spec.parent.map(Into::into),
        track: spec.track,
        stop: spec.stop,
    };
    let job = app
        .ask_long(&name, "snapshot", request, |reply| match reply {
            Reply::Snapshot(taken) => Ok(json!(taken)),
            other => Err(Problem::unexpected(&other)),
        })
        .await?;
    Ok(accepted(&job))
}
