//! Which path does what. The router and the OpenAPI document are made of the same list.

use std::sync::Arc;

use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::middleware::from_fn;
use axum::response::{IntoResponse, Response};
use utoipa::openapi::path::Operation;
use utoipa::openapi::{ContentBuilder, OpenApi, PathItem, RefOr, ResponseBuilder};
use utoipa::{OpenApi as _, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::app::App;
use super::problem::{Code, Problem};
use super::{
    campaigns, code_faults, console, create, devices, disturbances, events, exec, guests, inject,
    isolate, jobs, little, marks, metrics, nics, page, suspend, upgrade,
};

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "Cofferdam",
        description = "Guests, their drivers' isolation, and devices that they share. See docs/service.md.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    components(schemas(Problem, Code)),
    tags(
        (name = "guests", description = "Guests"),
        (name = "marks", description = "Marks of guests, and going back to them"),
        (name = "isolation", description = "Isolated modules, what their calls did wrong, faults"),
        (name = "disturbances", description = "NICs that fail as hardware does"),
        (name = "nics", description = "NICs that come and go while a guest runs"),
        (name = "devices", description = "NICs that guests share by turns"),
        (name = "campaigns", description = "Faults by the hundred, and what became of each"),
        (name = "jobs", description = "Work that takes long"),
        (name = "events", description = "What changes"),
        (name = "service", description = "The service itself")
    )
)]
struct Document;

/// All paths.
fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(guests::list_guests, create::create_guest))
        .routes(routes!(guests::get_guest, guests::end_guest))
        .routes(routes!(guests::pause_guest))
        .routes(routes!(guests::resume_guest))
        .routes(routes!(guests::reset_guest))
        .routes(routes!(guests::press_power_button))
        .routes(routes!(guests::wake_guest))
        .routes(routes!(guests::snapshot_guest))
        .routes(routes!(console::read_console, console::type_into_console))
        .routes(routes!(exec::exec_in_guest))
        .routes(routes!(marks::list_marks, marks::set_mark))
        .routes(routes!(marks::forget_mark))
        .routes(routes!(marks::rewind_guest))
        .routes(routes!(isolate::isolate_module, isolate::release_module))
        .routes(routes!(isolate::list_violations))
        .routes(routes!(
            isolate::get_faults,
            inject::inject_fault,
            isolate::undo_faults
        ))
        .routes(routes!(suspend::suspend_device))
        .routes(routes!(suspend::resume_device))
        .routes(routes!(upgrade::upgrade_module))
        .routes(routes!(
            code_faults::list_sites,
            code_faults::change_instruction
        ))
        .routes(routes!(nics::plug_nic))
        .routes(routes!(nics::unplug_nic))
        .routes(routes!(
            disturbances::list_disturbances,
            disturbances::disturb,
            disturbances::undisturb
        ))
        .routes(routes!(devices::list_devices))
        .routes(routes!(devices::get_device))
        .routes(routes!(devices::switch_device))
        .routes(routes!(
            campaigns::list_campaigns,
            campaigns::start_campaign
        ))
        .routes(routes!(campaigns::get_campaign))
        .routes(routes!(campaigns::get_plot))
        .routes(routes!(campaigns::get_trial))
        .routes(routes!(campaigns::replay_trial))
        .routes(routes!(jobs::list_jobs))
        .routes(routes!(jobs::get_job, jobs::cancel_job))
        .routes(routes!(events::listen_to_events))
        .routes(routes!(metrics::metrics))
        .routes(routes!(get_document))
        .routes(routes!(page::page))
        .routes(routes!(page::page_style))
        .routes(routes!(page::page_script))
        .routes(routes!(page::plot_script))
        .routes(routes!(page::campaigns_script))
}

/// The service's requests.
pub fn router(app: Arc<App>) -> Router {
    let (router, _) = routes().split_for_parts();
    router
        .fallback(|| async {
            Problem::new(Code::NoSuchPath, "see /openapi.json for what there is")
        })
        .method_not_allowed_fallback(|| async {
            Problem::new(Code::WrongMethod, "see /openapi.json for what there is")
        })
        .layer(from_fn(little::after))
        .with_state(app)
}

/// The OpenAPI 3.1 document, as JSON.
///
/// # Errors
/// It cannot be written as JSON.
pub fn document() -> anyhow::Result<String> {
    let (_, mut document) = routes().split_for_parts();
    add_answers(&mut document);
    one_line_summaries(&mut document);
    let mut text = document.to_pretty_json()?;
    text.push('\n');
    Ok(text)
}

/// What answers mean by their status, where nothing else is said: each needs a description (OpenAPI
/// 3.1.0, 4.8.17).
fn described(status: &str) -> &'static str {
    match status {
        "201" => "It was made.",
        "202" => "It goes on as a job.",
        "204" => "It is done.",
        _ => "What was asked for.",
    }
}

/// Says of each operation what its answers mean, and that it can end with a problem.
fn add_answers(document: &mut OpenApi) {
    let schema = RefOr::Ref(utoipa::openapi::Ref::from_schema_name(Problem::name()));
    let content = ContentBuilder::new().schema(Some(schema)).build();
    let response = ResponseBuilder::new()
        .description("What went wrong (RFC 9457)")
        .content("application/problem+json", content)
        .build();
    for item in document.paths.paths.values_mut() {
        for operation in operations(item) {
            let responses = &mut operation.responses.responses;
            for (status, response) in responses.iter_mut() {
                if let RefOr::T(response) = response
                    && response.description.is_empty()
                {
                    described(status).clone_into(&mut response.description);
                }
            }
            responses.insert("default".to_owned(), RefOr::T(response.clone()));
        }
    }
}

/// What is done at a path.
fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    let all = [
        &mut item.get,
        &mut item.put,
        &mut item.post,
        &mut item.delete,
    ];
    all.into_iter().flatten()
}

/// Makes the first sentence of each operation its summary, in one line, and the rest its
/// description (OpenAPI 3.1.0, 4.8.10: a short summary, a verbose explanation).
fn one_line_summaries(document: &mut OpenApi) {
    for item in document.paths.paths.values_mut() {
        for operation in operations(item) {
            let text = [&operation.summary, &operation.description]
                .into_iter()
                .flatten();
            let text: Vec<_> = text.flat_map(|text| text.split_whitespace()).collect();
            let text = text.join(" ");
            let (summary, rest) = text.split_once(". ").unwrap_or((&text, ""));
            operation.summary = Some(summary.trim_end_matches('.').to_owned());
            operation.description = (!rest.is_empty()).then(|| rest.to_owned());
        }
    }
}

/// Show what there is, as OpenAPI 3.1.
#[utoipa::path(get, path = "/openapi.json", tag = "service", responses((status = 200, body = Object)))]
async fn get_document() -> Result<Response, Problem> {
    match document() {
        Ok(text) => Ok(([(CONTENT_TYPE, "application/json")], text).into_response()),
        Err(error) => Err(Problem::new(Code::Internal, error.to_string())),
    }
}
