//! Device hosts: NICs that guests have by turns.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::app::App;
use super::extract::{Body, Name};
use super::problem::{Code, Problem};
use crate::control::listed::Listed;
use crate::device::protocol::{HostStatus, Reply, Request, SwitchRecord};
use crate::options::VmName;

/// The device hosts that run.
#[derive(Debug, Serialize, ToSchema)]
pub struct DeviceList {
    /// By name; with its status if it answers.
    devices: Vec<Listed<HostStatus>>,
}

/// Who gets the turn: one of the three.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SwitchSpec {
    /// The guest of this name.
    to: Option<String>,
    /// All that are attached, each for so many milliseconds.
    every_ms: Option<u64>,
    /// Who has it, if this is true: it is passed on by time no more.
    #[serde(default)]
    hold: bool,
}

impl SwitchSpec {
    fn request(self) -> Result<Request, Problem> {
        let wrong = |why: String| Problem::new(Code::WrongValues, why);
        match (self.to, self.every_ms, self.hold) {
            (Some(to), None, false) => {
                // What is wrong with it is known without the device host.
                let to = to
                    .parse::<VmName>()
                    .map_err(|error| wrong(error.to_string()))?;
                Ok(Request::Switch { to: to.to_string() })
            }
            (None, Some(ms), false) => Ok(Request::Every { ms }),
            (None, None, true) => Ok(Request::Hold {}),
            _ => Err(wrong("give one of to, every_ms and hold".to_owned())),
        }
    }
}

/// Who has the turn.
#[derive(Debug, Serialize, ToSchema)]
pub struct Turn {
    /// Name of a guest.
    turn: Option<String>,
}

/// List the device hosts. One that does not answer is listed without its status.
#[utoipa::path(get, path = "/v1/devices", tag = "devices", responses((status = 200, body = DeviceList)))]
pub async fn list_devices(State(app): State<Arc<App>>) -> Result<Json<DeviceList>, Problem> {
    let devices = app.looks.look().await?.devices.clone();
    Ok(Json(DeviceList { devices }))
}

/// Show how a device host is.
#[utoipa::path(get, path = "/v1/devices/{name}", tag = "devices", params(("name" = String, Path)),
    responses((status = 200, body = HostStatus)))]
pub async fn get_device(
    State(app): State<Arc<App>>,
    Name(name): Name<VmName>,
) -> Result<Json<HostStatus>, Problem> {
    match app.asks.ask_device(&name, Request::Status {}).await? {
        Reply::Status(status) => Ok(Json(*status)),
        other => Err(Problem::unexpected(&other)),
    }
}

/// Pass the turn at a device on: a record of the switch comes back, or who has the turn where it
/// goes by time.
#[utoipa::path(post, path = "/v1/devices/{name}/switch", tag = "devices", params(("name" = String, Path)),
    request_body = SwitchSpec, responses((status = 200, body = SwitchRecord)))]
pub async fn switch_device(
    State(app): State<Arc<App>>,
    Name(name): Name<VmName>,
    Body(spec): Body<SwitchSpec>,
) -> Result<Response, Problem> {
    match app.asks.ask_device(&name, spec.request()?).await? {
        Reply::Switched(record) => Ok(Json(*record).into_response()),
        Reply::Turn { turn } => Ok(Json(Turn { turn }).into_response()),
        other => Err(Problem::unexpected(&other)),
    }
}
