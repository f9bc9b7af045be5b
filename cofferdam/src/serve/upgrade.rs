//! Another build of a driver in the place of the one that runs.

use std::path::Path;
use std::sync::Arc;

use agent_protocol::message::Bytes;
use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use utoipa::ToSchema;

use super::app::App;
use super::asked_at_length::Asking;
use super::extract::{Body, ModuleName, Names};
use super::jobs::{JobView, shown};
use super::problem::{Code, Problem};
use super::spec::is_absolute;
use crate::control::protocol::{Reply, Request};
use crate::error_text::one_line;
use crate::module_file::read;
use crate::options::VmName;

/// How long the new driver has where nobody says, in seconds.
const DEFAULT_SECONDS: u64 = 30;

/// The most, in seconds.
const MAX_SECONDS: u64 = 60;

/// What is put in the driver's place.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpgradeSpec {
    /// The new module, built for the guest's kernel and not compressed: its absolute path on the
    /// service's host.
    file: String,
    /// How long the new driver may take until its interfaces are as they were, in seconds, 1 to 60;
    /// 30 when not given.
    #[schema(minimum = 1, maximum = 60)]
    limit_s: Option<u64>,
}

/// Put another build of a driver in the place of the one that runs; the old one is put back if the
/// new one fails. The result says which one runs, also where that is the old one.
#[utoipa::path(post, path = "/v1/guests/{name}/modules/{module}/upgrade", tag = "isolation",
    params(("name" = String, Path), ("module" = String, Path)), request_body = UpgradeSpec,
    responses((status = 200, body = Object), (status = 202, body = JobView)))]
pub async fn upgrade_module(
    State(app): State<Arc<App>>,
    Names(name, ModuleName(module)): Names<VmName, ModuleName>,
    Body(spec): Body<UpgradeSpec>,
) -> Result<Response, Problem> {
    is_absolute("file", Some(&spec.file))?;
    let seconds = spec.limit_s.unwrap_or(DEFAULT_SECONDS);
    if !(1..=MAX_SECONDS).contains(&seconds) {
        let detail = format!("limit_s is 1 to {MAX_SECONDS}");
        return Err(Problem::new(Code::WrongValues, detail));
    }
    let work = move |mut guest: Asking<'_>| {
        let file = read(Path::new(&spec.file), &module)
            .map_err(|error| Problem::new(Code::WrongValues, one_line(&error)))?;
        let request = Request::Upgrade {
            module,
            file: Bytes(file),
            limit_ms: seconds * 1000,
        };
        match guest.ask(&request)? {
            Reply::Upgraded(report) => shown(report),
            other => Err(Problem::unexpected(&other)),
        }
    };
    let job = app.ask_at_length(&name, "upgrade", work).await?;
    Ok(app.jobs.answer(job).await)
}
