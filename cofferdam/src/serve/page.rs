//! The page for browsers: what there is, as it changes. Its files are in this program, and nothing
//! else is loaded.
//!
//! It holds nothing of any guest, so that it is given without a token. It asks for one and keeps it
//! in memory alone.

use axum::http::HeaderValue;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS,
};
use axum::response::{IntoResponse, Response};

/// Paths that are given without a token.
pub const PATHS: [&str; 5] = ["/", "/page.css", "/page.js", "/plot.js", "/campaigns.js"];

/// What the page may do: run and show its own files, and ask this service.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
    img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
    require-trusted-types-for 'script'; trusted-types 'none'";

fn file(kind: &'static str, text: &'static str) -> Response {
    let headers: [(HeaderName, HeaderValue); 5] = [
        (CONTENT_TYPE, HeaderValue::from_static(kind)),
        (CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
        (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        (CACHE_CONTROL, HeaderValue::from_static("no-store")),
    ];
    (headers, text).into_response()
}

/// Show the page for browsers.
#[utoipa::path(get, path = "/", tag = "service",
    responses((status = 200, body = String, content_type = "text/html")))]
pub async fn page() -> Response {
    file("text/html; charset=utf-8", include_str!("page/page.html"))
}

/// Show how the page looks.
#[utoipa::path(get, path = "/page.css", tag = "service",
    responses((status = 200, body = String, content_type = "text/css")))]
pub async fn page_style() -> Response {
    file("text/css; charset=utf-8", include_str!("page/page.css"))
}

/// Show what the page does.
#[utoipa::path(get, path = "/page.js", tag = "service",
    responses((status = 200, body = String, content_type = "text/javascript")))]
pub async fn page_script() -> Response {
    file(
        "text/javascript; charset=utf-8",
        include_str!("page/page.js"),
    )
}

/// Show what draws the page's plots.
#[utoipa::path(get, path = "/plot.js", tag = "service",
    responses((status = 200, body = String, content_type = "text/javascript")))]
pub async fn plot_script() -> Response {
    file(
        "text/javascript; charset=utf-8",
        include_str!("page/plot.js"),
    )
}

/// Show what shows campaigns, jobs and reports.
#[utoipa::path(get, path = "/campaigns.js", tag = "service",
    responses((status = 200, body = String, content_type = "text/javascript")))]
pub async fn campaigns_script() -> Response {
    file(
        "text/javascript; charset=utf-8",
        include_str!("page/campaigns.js"),
    )
}
