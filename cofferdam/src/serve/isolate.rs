//! Isolation of a guest's modules, what their calls did wrong, and faults that were put into them.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::Response;
use devices::hold::CheckpointBy;
use isolation::attach::plan::Wanted;
use isolation::attach::request::Contain;
use recovery::ladder::{LadderConfig, MayReset, OnFault};
use recovery::request::Spilling;
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::ToSchema;

use super::app::App;
use super::extract::{Body, ModuleName, Names, NoBody};
use super::jobs::JobView;
use super::problem::{Code, Problem};
use crate::control::protocol::{FaultsState, Reply, Request};
use crate::options::VmName;

/// Most processor time that a call may be given, in microseconds.
const MAX_BUDGET_US: u64 = 3_600_000_000;

/// Longest wait with the guest standing still, in microseconds: as the command line has it.
const MAX_WAIT_US: u64 = 1_000_000;

/// Which functions of a module.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Entries {
    /// All that can be isolated.
    #[default]
    All,
    /// These.
    Named(Vec<String>),
    /// All whose name fits a pattern as a shell's: `*`, `?`, `[a-z]`, `{open,close}`.
    Matching(String),
}

/// How a module is isolated. What is left out is as `cofferdam isolate` has it.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct IsolationSpec {
    /// Which functions.
    entries: Entries,
    /// Processor time of its own that a call may take, in microseconds, an hour at most.
    #[schema(maximum = 3_600_000_000_u64)]
    budget_us: Option<u64>,
    /// How the device's state is taken before a call reaches it: `exact` or `registers`.
    #[schema(value_type = String)]
    device_checkpoint: CheckpointBy,
    /// What is done about calls that fail.
    recovery: RecoverySpec,
    /// How long a call may wait with the guest standing still, in microseconds, a second at most.
    #[schema(maximum = 1_000_000)]
    wait_us: Option<u64>,
    /// Kernel functions that calls always go on in the guest for.
    guest_only: Vec<String>,
    /// How far calls have to be contained: `exact`, `full` or `none`.
    #[schema(value_type = String)]
    contain: Contain,
}

/// What is done about calls that fail. What is left out is as `cofferdam isolate` has it.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RecoverySpec {
    /// Of any function: `error`, `retry`, `resume`, `restart` or `stop`.
    #[schema(value_type = Option<String>)]
    on_fault: Option<OnFault>,
    /// Of single functions.
    #[schema(value_type = BTreeMap<String, String>)]
    per_entry: BTreeMap<String, OnFault>,
    /// Failed calls in one minute, above which the driver is stopped.
    recoveries_per_minute: Option<u32>,
    /// How often one call is run again.
    retries: Option<u32>,
    /// Failed calls of one function in a row, after which the next rung is tried; at least 1.
    #[schema(minimum = 1)]
    failures_in_a_row: Option<u32>,
    /// Whether the guest may be reset when the driver cannot be restarted: `no`, `boot` or
    /// `snapshot`: its last mark or, where it has none, its last snapshot in a directory.
    #[schema(value_type = String)]
    may_reset_guest: MayReset,
}

impl IsolationSpec {
    /// Looks whether the values can be.
    fn check(&self) -> Result<(), Problem> {
        let too_long = |value: Option<u64>, most: u64| value.is_some_and(|value| value > most);
        let why = if too_long(self.budget_us, MAX_BUDGET_US) {
            format!("budget_us is at most {MAX_BUDGET_US}")
        } else if too_long(self.wait_us, MAX_WAIT_US) {
            format!("wait_us is at most {MAX_WAIT_US}")
        } else if self.recovery.failures_in_a_row == Some(0) {
            "failures_in_a_row is at least 1".to_owned()
        } else {
            return Ok(());
        };
        Err(Problem::new(Code::WrongValues, why))
    }

    fn request(self, module: String) -> Request {
        let given = self.recovery;
        let standard = LadderConfig::default();
        Request::Isolate {
            module,
            entries: match self.entries {
                Entries::All => Wanted::All,
                Entries::Named(names) => Wanted::Named(names),
                Entries::Matching(pattern) => Wanted::Matching(pattern),
            },
            budget_us: self.budget_us,
            device_checkpoint: self.device_checkpoint,
            recovery: LadderConfig {
                on_fault: given.on_fault,
                per_entry: given.per_entry,
                recoveries_per_minute: given
                    .recoveries_per_minute
                    .unwrap_or(standard.recoveries_per_minute),
                retries: given.retries.unwrap_or(standard.retries),
                failures_in_a_row: given
                    .failures_in_a_row
                    .unwrap_or(standard.failures_in_a_row),
                may_reset_guest: given.may_reset_guest,
            },
            spilling: Spilling {
                wait_us: self.wait_us,
                guest_only: self.guest_only,
            },
            contain: self.contain,
            keep_faults: None,
        }
    }
}

/// Put functions of a guest's module into a domain of their own.
#[utoipa::path(put, path = "/v1/guests/{name}/isolation/{module}", tag = "isolation",
    params(("name" = String, Path), ("module" = String, Path)), request_body = IsolationSpec,
    responses((status = 200, body = Object), (status = 202, body = JobView)))]
pub async fn isolate_module(
    State(app): State<Arc<App>>,
    Names(name, module): Names<VmName, ModuleName>,
    Body(spec): Body<IsolationSpec>,
) -> Result<Response, Problem> {
    spec.check()?;
    let request = spec.request(module.0);
    let job = app
        .ask_long(&name, "isolate", request, |reply| match reply {
            Reply::Isolated(isolated) => Ok(isolated),
            other => Err(Problem::unexpected(&other)),
        })
        .await?;
    Ok(app.jobs.answer(job).await)
}

/// Take a module out of its domain; its last counters come back.
#[utoipa::path(delete, path = "/v1/guests/{name}/isolation/{module}", tag = "isolation",
    params(("name" = String, Path), ("module" = String, Path)),
    responses((status = 200, body = Object), (status = 202, body = JobView)))]
pub async fn release_module(
    State(app): State<Arc<App>>,
    Names(name, module): Names<VmName, ModuleName>,
    _: NoBody,
) -> Result<Response, Problem> {
    let request = Request::Release { module: module.0 };
    let job = app
        .ask_long(&name, "release", request, |reply| match reply {
            Reply::Released(status) => Ok(json!(status)),
            other => Err(Problem::unexpected(&other)),
        })
        .await?;
    Ok(app.jobs.answer(job).await)
}

/// What calls of a module did wrong.
#[derive(Debug, Serialize, ToSchema)]
pub struct ViolationList {
    /// Whether the module is isolated now.
    isolated: bool,
    /// All since the guest began, counted, the latest last.
    violations: Vec<Violation>,
    /// The last ones one by one, oldest first.
    #[schema(value_type = Object)]
    last_reports: serde_json::Value,
    /// The same for people, with names for addresses.
    last_texts: Vec<String>,
}

/// Violations of one function at one place.
#[derive(Debug, Serialize, ToSchema)]
pub struct Violation {
    /// The function.
    entry: String,
    /// How often.
    count: u64,
    /// When the first one happened, in nanoseconds of the host's `CLOCK_MONOTONIC`.
    first_ns: u64,
    /// When the last one did.
    last_ns: u64,
    /// The last one, for people.
    text: String,
}

/// Show what calls of a module did wrong.
#[utoipa::path(get, path = "/v1/guests/{name}/isolation/{module}/violations", tag = "isolation",
    params(("name" = String, Path), ("module" = String, Path)), responses((status = 200, body = ViolationList)))]
pub async fn list_violations(
    State(app): State<Arc<App>>,
    Names(name, module): Names<VmName, ModuleName>,
) -> Result<Json<ViolationList>, Problem> {
    let request = Request::Violations { module: module.0 };
    let Reply::Violations {
        isolated,
        all,
        reports,
        texts,
    } = app.asks.ask(&name, request).await?
    else {
        return Err(Problem::unexpected(&"no violations"));
    };
    let violations = all.into_iter().map(|one| Violation {
        entry: one.entry,
        count: one.count,
        first_ns: one.first_ns,
        last_ns: one.last_ns,
        text: one.text,
    });
    Ok(Json(ViolationList {
        isolated,
        violations: violations.collect(),
        last_reports: reports,
        last_texts: texts,
    }))
}

fn faults(reply: Reply) -> Result<Json<FaultsState>, Problem> {
    match reply {
        Reply::Faults(state) => Ok(Json(state)),
        other => Err(Problem::unexpected(&other)),
    }
}

/// Show what became of the faults of a module.
#[utoipa::path(get, path = "/v1/guests/{name}/isolation/{module}/faults", tag = "isolation",
    params(("name" = String, Path), ("module" = String, Path)), responses((status = 200, body = FaultsState)))]
pub async fn get_faults(
    State(app): State<Arc<App>>,
    Names(name, module): Names<VmName, ModuleName>,
) -> Result<Json<FaultsState>, Problem> {
    faults(
        app.asks
            .ask(&name, Request::Faults { module: module.0 })
            .await?,
    )
}

/// Take back what is not used up of the faults of a module.
#[utoipa::path(delete, path = "/v1/guests/{name}/isolation/{module}/faults", tag = "isolation",
    params(("name" = String, Path), ("module" = String, Path)), responses((status = 200, body = FaultsState)))]
pub async fn undo_faults(
    State(app): State<Arc<App>>,
    Names(name, module): Names<VmName, ModuleName>,
    _: NoBody,
) -> Result<Json<FaultsState>, Problem> {
    faults(
        app.asks
            .ask(&name, Request::UndoFaults { module: module.0 })
            .await?,
    )
}
