//! Faults that are put into calls of an isolated driver.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use recovery::fault::{FaultKind, Place};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::app::App;
use super::extract::{Body, ModuleName, Names};
use super::problem::{Code, Problem};
use crate::control::protocol::{Reply, Request};
use crate::options::VmName;

/// Which fault, and into which calls.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FaultSpec {
    /// The isolated function.
    function: String,
    /// Where in it: `first`, `middle` or `last`; `first` if neither this nor `offset` is given.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    place: Option<Place>,
    /// Where in it, in bytes from its start: an instruction begins there.
    #[serde(default)]
    offset: Option<u64>,
    /// What goes wrong: `null_dereference`, `undefined_instruction`, `division_by_zero`,
    /// `endless_loop` or `halt`.
    #[serde(default = "null_dereference")]
    #[schema(value_type = String)]
    fault: FaultKind,
    /// Into every how many calls, at least 1.
    #[serde(default = "one")]
    #[schema(minimum = 1)]
    every: u32,
    /// Into how many calls; 0 takes an earlier order back.
    #[serde(default = "one_call")]
    times: u64,
}

fn null_dereference() -> FaultKind {
    FaultKind::NullDereference
}

fn one() -> u32 {
    1
}

fn one_call() -> u64 {
    1
}

/// What was ordered.
#[derive(Debug, Serialize, ToSchema)]
pub struct OrderedFault {
    /// The function.
    function: String,
    /// Where in it, in bytes from its start.
    offset: u64,
    /// What goes wrong.
    fault: &'static str,
    /// Into every how many calls.
    every: u32,
    /// Into how many calls.
    times: u64,
}

/// Put a fault into calls of an isolated function: into the domain's copy of it, for single calls.
#[utoipa::path(post, path = "/v1/guests/{name}/isolation/{module}/faults", tag = "isolation",
    params(("name" = String, Path), ("module" = String, Path)), request_body = FaultSpec,
    responses((status = 200, body = OrderedFault)))]
pub async fn inject_fault(
    State(app): State<Arc<App>>,
    Names(name, ModuleName(module)): Names<VmName, ModuleName>,
    Body(spec): Body<FaultSpec>,
) -> Result<Json<OrderedFault>, Problem> {
    let wrong = |why: &str| Problem::new(Code::WrongValues, why);
    if spec.every == 0 {
        return Err(wrong("every is at least 1"));
    }
    if spec.place.is_some() && spec.offset.is_some() {
        return Err(wrong("give one of place and offset"));
    }
    let request = Request::Instructions {
        module: module.clone(),
        function: spec.function.clone(),
    };
    let Reply::Instructions { instructions } = app.asks.ask(&name, request).await? else {
        return Err(Problem::unexpected(&"no instructions"));
    };
    let place = spec.place.unwrap_or(Place::First);
    let offset = match spec.offset {
        None => place.candidates(&instructions).first().copied(),
        Some(offset) => instructions
            .iter()
            .map(|instruction| instruction.offset)
            .find(|start| *start == offset),
    };
    let offset = offset.ok_or_else(|| wrong("no instruction of the function begins there"))?;
    let request = Request::Inject {
        module,
        entry: spec.function.clone(),
        offset,
        fault: spec.fault,
        every: spec.every,
        times: spec.times,
    };
    app.asks.tell(&name, request).await?;
    Ok(Json(OrderedFault {
        function: spec.function,
        offset,
        fault: spec.fault.name(),
        every: spec.every,
        times: spec.times,
    }))
}
