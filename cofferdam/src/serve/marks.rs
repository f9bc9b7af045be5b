//! Marks: where a guest was, and going back there.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::ToSchema;
use vmm::MarkInfo;

use super::app::App;
use super::extract::{Body, MarkName, Name, Names, NoBody};
use super::jobs::{JobView, shown};
use super::problem::{Code, Problem};
use crate::control::protocol::{Reply, Request};
use crate::options::VmName;

/// A mark.
#[derive(Debug, Serialize, ToSchema)]
pub struct Mark {
    /// Its name.
    name: String,
    /// The mark that it follows.
    parent: Option<String>,
    /// Pages that are kept for it.
    pages: u64,
    /// Bytes of memory that they take.
    bytes: u64,
    /// The guest is at it, or has gone on from it.
    current: bool,
}

impl From<MarkInfo> for Mark {
    fn from(info: MarkInfo) -> Self {
        Self {
            name: info.name,
            parent: info.parent,
            pages: info.pages,
            bytes: info.bytes,
            current: info.current,
        }
    }
}

/// The marks of a guest.
#[derive(Debug, Serialize, ToSchema)]
pub struct MarkList {
    /// Parents before those that follow them.
    marks: Vec<Mark>,
}

/// Which mark is set.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MarkSpec {
    /// Its name.
    name: String,
}

/// Where a guest goes back to.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RewindSpec {
    /// Name of a mark; the one that the guest has gone on from last otherwise.
    #[serde(default)]
    name: Option<String>,
}

fn list(reply: Reply) -> Result<Json<MarkList>, Problem> {
    match reply {
        Reply::Marks { marks } => Ok(Json(MarkList {
            marks: marks.into_iter().map(Mark::from).collect(),
        })),
        other => Err(Problem::unexpected(&other)),
    }
}

/// A mark's name in a body.
fn checked(name: &str) -> Result<String, Problem> {
    match name.parse::<MarkName>() {
        Ok(name) => Ok(name.0),
        Err(why) => Err(Problem::new(Code::WrongValues, why)),
    }
}

/// List a guest's marks.
#[utoipa::path(get, path = "/v1/guests/{name}/marks", tag = "marks", params(("name" = String, Path)),
    responses((status = 200, body = MarkList)))]
pub async fn list_marks(
    State(app): State<Arc<App>>,
    Name(name): Name<VmName>,
) -> Result<Json<MarkList>, Problem> {
    list(app.asks.ask(&name, Request::Marks {}).await?)
}

/// Set a mark where a guest is.
#[utoipa::path(post, path = "/v1/guests/{name}/marks", tag = "marks", params(("name" = String, Path)),
    request_body = MarkSpec, responses((status = 200, body = Mark), (status = 202, body = JobView)))]
pub async fn set_mark(
    State(app): State<Arc<App>>,
    Name(name): Name<VmName>,
    Body(spec): Body<MarkSpec>,
) -> Result<Response, Problem> {
    let request = Request::Mark {
        name: checked(&spec.name)?,
    };
    let job = app
        .ask_long(&name, "mark", request, |reply| match reply {
            Reply::Marked(info) => shown(Mark::from(info)),
            other => Err(Problem::unexpected(&other)),
        })
        .await?;
    Ok(app.jobs.answer(job).await)
}

/// Forget a mark; others stay.
#[utoipa::path(delete, path = "/v1/guests/{name}/marks/{mark}", tag = "marks",
    params(("name" = String, Path), ("mark" = String, Path)), responses((status = 200, body = MarkList)))]
pub async fn forget_mark(
    State(app): State<Arc<App>>,
    Names(name, mark): Names<VmName, MarkName>,
    _: NoBody,
) -> Result<Json<MarkList>, Problem> {
    let Json(MarkList { marks }) = list(app.asks.ask(&name, Request::Marks {}).await?)?;
    if !marks.iter().any(|other| other.name == mark.0) {
        let detail = format!("{name} has no mark {}", mark.0);
        return Err(Problem::new(Code::NoSuchMark, detail));
    }
    list(
        app.asks
            .ask(&name, Request::ForgetMark { name: mark.0 })
            .await?,
    )
}

/// Take a guest back to a mark, in place and at once.
#[utoipa::path(post, path = "/v1/guests/{name}/rewind", tag = "marks", params(("name" = String, Path)),
    request_body = RewindSpec, responses((status = 200, body = Object), (status = 202, body = JobView)))]
pub async fn rewind_guest(
    State(app): State<Arc<App>>,
    Name(name): Name<VmName>,
    Body(spec): Body<RewindSpec>,
) -> Result<Response, Problem> {
    let request = Request::Rewind {
        name: spec.name.as_deref().map(checked).transpose()?,
    };
    let job = app
        .ask_long(&name, "rewind", request, |reply| match reply {
            Reply::Rewound(rewound) => Ok(json!(rewound)),
            other => Err(Problem::unexpected(&other)),
        })
        .await?;
    Ok(app.jobs.answer(job).await)
}
