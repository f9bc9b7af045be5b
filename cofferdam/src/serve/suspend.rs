//! A driver's own suspend and resume functions, called in a live guest.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use serde_json::json;

use super::app::App;
use super::extract::{ModuleName, Names, NoBody};
use super::jobs::{JobView, shown};
use super::problem::Problem;
use crate::control::protocol::{Reply, Request};
use crate::options::VmName;

/// Have a driver suspend its devices with its own function, and leave them so. The module need not
/// be isolated.
#[utoipa::path(post, path = "/v1/guests/{name}/modules/{module}/suspend-device", tag = "isolation",
    params(("name" = String, Path), ("module" = String, Path)),
    responses((status = 200, body = Object), (status = 202, body = JobView)))]
pub async fn suspend_device(
    State(app): State<Arc<App>>,
    Names(name, module): Names<VmName, ModuleName>,
    _: NoBody,
) -> Result<Response, Problem> {
    let request = Request::SuspendDevice { module: module.0 };
    let job = app
        .ask_long(&name, "suspend-device", request, |reply| match reply {
            Reply::DeviceSuspended(phases) => shown(phases),
            other => Err(Problem::unexpected(&other)),
        })
        .await?;
    Ok(app.jobs.answer(job).await)
}

/// Have a driver resume its devices if they are suspended, else suspend and resume them, with its
/// own functions.
#[utoipa::path(post, path = "/v1/guests/{name}/modules/{module}/resume-device", tag = "isolation",
    params(("name" = String, Path), ("module" = String, Path)),
    responses((status = 200, body = Object), (status = 202, body = JobView)))]
pub async fn resume_device(
    State(app): State<Arc<App>>,
    Names(name, module): Names<VmName, ModuleName>,
    _: NoBody,
) -> Result<Response, Problem> {
    let request = Request::ResumeDevice { module: module.0 };
    let job = app
        .ask_long(&name, "resume-device", request, |reply| match reply {
            Reply::DeviceResumed(phases) => shown(phases),
            Reply::Resumed { times_us } => Ok(json!({ "times_us": times_us })),
            other => Err(Problem::unexpected(&other)),
        })
        .await?;
    Ok(app.jobs.answer(job).await)
}
