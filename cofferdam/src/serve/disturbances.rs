//! NICs that fail as hardware does.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use devices::edge::EdgeOrder;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::app::App;
use super::extract::{Body, Name, NoBody, Options};
use super::problem::{Code, Problem};
use crate::control::protocol::{Disturbance, Reply, Request};
use crate::options::VmName;

/// What is to go wrong.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DisturbanceSpec {
    /// At which NIC: its number from 0 or its PCI address in the guest. May be left out where there
    /// is one.
    #[serde(default)]
    nic: Option<String>,
    /// What, where and when: `kind`, and perhaps `direction`, `bar`, `offsets`, `width`, `when`,
    /// `seed`, `mask`, `value`, `span`, as `cofferdam disturb` shows them with `--list --json`.
    #[schema(value_type = Object)]
    order: EdgeOrder,
}

/// Which disturbances.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct WhichNic {
    /// Those of this NIC, all otherwise.
    nic: Option<String>,
}

/// Which disturbances are to end.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct WhichDisturbances {
    /// Those of this NIC, all otherwise.
    nic: Option<String>,
    /// The one of this number, all otherwise.
    number: Option<u64>,
}

/// What goes wrong, or went wrong until now.
#[derive(Debug, Serialize, ToSchema)]
pub struct DisturbanceList {
    /// By NIC, in the order in which they were ordered.
    disturbances: Vec<Disturbance>,
}

fn list(reply: Reply) -> Result<Json<DisturbanceList>, Problem> {
    match reply {
        Reply::Disturbances { disturbances } => Ok(Json(DisturbanceList { disturbances })),
        other => Err(Problem::unexpected(&other)),
    }
}

/// List what goes wrong at the edges of a guest's NICs.
#[utoipa::path(get, path = "/v1/guests/{name}/disturbances", tag = "disturbances",
    params(("name" = String, Path), WhichNic), responses((status = 200, body = DisturbanceList)))]
pub async fn list_disturbances(
    State(app): State<Arc<App>>,
    Name(name): Name<VmName>,
    Options(WhichNic { nic }): Options<WhichNic>,
) -> Result<Json<DisturbanceList>, Problem> {
    list(app.asks.ask(&name, Request::Disturbances { nic }).await?)
}

/// Have something go wrong at the edge of a NIC from now on.
#[utoipa::path(post, path = "/v1/guests/{name}/disturbances", tag = "disturbances", params(("name" = String, Path)),
    request_body = DisturbanceSpec, responses((status = 200, body = Disturbance)))]
pub async fn disturb(
    State(app): State<Arc<App>>,
    Name(name): Name<VmName>,
    Body(DisturbanceSpec { nic, order }): Body<DisturbanceSpec>,
) -> Result<Json<Disturbance>, Problem> {
    order
        .check()
        .map_err(|error| Problem::new(Code::WrongValues, error.to_string()))?;
    match app.asks.ask(&name, Request::Disturb { nic, order }).await? {
        Reply::Disturbed(disturbance) => Ok(Json(disturbance)),
        other => Err(Problem::unexpected(&other)),
    }
}

/// Have it go right again: those that were taken back come back.
#[utoipa::path(delete, path = "/v1/guests/{name}/disturbances", tag = "disturbances",
    params(("name" = String, Path), WhichDisturbances), responses((status = 200, body = DisturbanceList)))]
pub async fn undisturb(
    State(app): State<Arc<App>>,
    Name(name): Name<VmName>,
    Options(WhichDisturbances { nic, number }): Options<WhichDisturbances>,
    _: NoBody,
) -> Result<Json<DisturbanceList>, Problem> {
    list(
        app.asks
            .ask(&name, Request::Undisturb { nic, number })
            .await?,
    )
}
