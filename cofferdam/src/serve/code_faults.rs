//! Faults of kinds in a driver's code: one instruction changed.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::Response;
use devices::edge::When;
use isolation::mutation::{Kind, Site};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::app::App;
use super::asked_at_length::Asking;
use super::extract::{Body, ModuleName, Names, Options};
use super::jobs::{JobView, shown};
use super::problem::{Code, Problem};
use crate::code_fault::{CodeFault, fitting_sites, text_request};
use crate::control::protocol::{FunctionBytes, Reply};
use crate::error_text::one_line;
use crate::options::VmName;

/// Of which function.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct WhichSites {
    /// The function.
    function: String,
    /// Only where this kind fits, such as `missing_call`: `cofferdam campaign kinds` lists them.
    #[param(value_type = Option<String>)]
    kind: Option<Kind>,
}

/// The instructions of a function that faults fit.
#[derive(Debug, Serialize, ToSchema)]
pub struct SiteList {
    /// By offset.
    #[schema(value_type = Vec<Object>)]
    sites: Vec<Site>,
    /// Whether functions of the module are isolated: else a fault goes into the guest's own text.
    isolated: bool,
}

/// List the instructions of a function that faults of kinds fit. The module need not be isolated.
#[utoipa::path(get, path = "/v1/guests/{name}/modules/{module}/code-faults", tag = "isolation",
    params(("name" = String, Path), ("module" = String, Path), WhichSites), responses((status = 200, body = SiteList)))]
pub async fn list_sites(
    State(app): State<Arc<App>>,
    Names(name, ModuleName(module)): Names<VmName, ModuleName>,
    Options(WhichSites { function, kind }): Options<WhichSites>,
) -> Result<Json<SiteList>, Problem> {
    let text = text(
        app.asks
            .ask(&name, text_request(&module, &function))
            .await?,
    )?;
    Ok(Json(SiteList {
        sites: fitting_sites(&function, &text, kind),
        isolated: text.isolated,
    }))
}

fn text(reply: Reply) -> Result<FunctionBytes, Problem> {
    match reply {
        Reply::FunctionText(text) => Ok(text),
        other => Err(Problem::unexpected(&other)),
    }
}

/// Which instruction is changed, and how.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CodeFaultSpec {
    /// The function.
    function: String,
    /// What kind of mistake, such as `missing_call`: `cofferdam campaign kinds` lists them.
    #[schema(value_type = String)]
    kind: Kind,
    /// Where in it, in bytes from its start; where the seed says when not given.
    offset: Option<u64>,
    /// Into which calls of an isolated function: `"once"`, the first that comes to it, which it is
    /// when not given, `"always"`, `{"nth": N}` or `{"chance": MILLIONTHS}`.
    #[serde(default = "once")]
    #[schema(value_type = Object)]
    when: When,
    /// What chooses among places and ways, and by chance; 1 when not given.
    #[serde(default = "first_seed")]
    seed: u64,
    /// Where the module is not isolated, change the guest's own text: nothing takes back what that
    /// breaks.
    #[serde(default)]
    own_text: bool,
}

fn once() -> When {
    When::Once
}

fn first_seed() -> u64 {
    1
}

/// Change one instruction of a driver: for calls of an isolated function in the domain's copy, else
/// in the guest's own text, if that is asked for.
#[utoipa::path(post, path = "/v1/guests/{name}/modules/{module}/code-faults", tag = "isolation",
    params(("name" = String, Path), ("module" = String, Path)), request_body = CodeFaultSpec,
    responses((status = 200, body = Object), (status = 202, body = JobView)))]
pub async fn change_instruction(
    State(app): State<Arc<App>>,
    Names(name, ModuleName(module)): Names<VmName, ModuleName>,
    Body(spec): Body<CodeFaultSpec>,
) -> Result<Response, Problem> {
    let own_text = spec.own_text;
    let fault = CodeFault {
        module,
        function: spec.function,
        kind: spec.kind,
        offset: spec.offset,
        when: spec.when,
        seed: spec.seed,
    };
    let work = move |mut guest: Asking<'_>| {
        let text = text(guest.ask(&text_request(&fault.module, &fault.function))?)?;
        if !text.isolated && !own_text {
            let detail = format!(
                "{} is not isolated: isolate it, or ask for own_text, of which nothing is taken back",
                fault.module
            );
            return Err(Problem::new(Code::Refused, detail));
        }
        let (request, injected) = fault
            .order(&text)
            .map_err(|error| Problem::new(Code::WrongValues, one_line(&error)))?;
        match guest.ask(&request)? {
            Reply::Done {} => shown(injected),
            other => Err(Problem::unexpected(&other)),
        }
    };
    let job = app.ask_at_length(&name, "change-instruction", work).await?;
    Ok(app.jobs.answer(job).await)
}
