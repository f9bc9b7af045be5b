//! What every request has to keep to before anything is done for it.

use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use hyper::body::Body as _;

use super::problem::{Code, Problem};

/// Longest body of a request, in bytes.
pub const MAX_BODY_BYTES: usize = 64 << 10;

/// How long a client has for a request's body.
#[derive(Debug, Clone, Copy)]
pub struct ClientTime(pub Duration);

/// `router` behind the limits.
pub fn limited(router: Router, time: ClientTime) -> Router {
    router.layer(from_fn_with_state(time, whole_body))
}

/// Reads the whole body, so that nothing is begun for a request that never comes to its end.
async fn whole_body(State(time): State<ClientTime>, request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    let too_large = || {
        let detail = format!("a request's body has at most {MAX_BODY_BYTES} bytes");
        Problem::new(Code::TooLarge, detail).into_response()
    };
    // What is said to come is not waited for.
    if body.size_hint().lower() > MAX_BODY_BYTES as u64 {
        return too_large();
    }
    match tokio::time::timeout(time.0, to_bytes(body, MAX_BODY_BYTES)).await {
        Ok(Ok(bytes)) => {
            next.run(Request::from_parts(parts, Body::from(bytes)))
                .await
        }
        Ok(Err(error)) if is_length(&error) => too_large(),
        Ok(Err(_)) => {
            let detail = "the request's body ended too soon, or is no HTTP";
            Problem::new(Code::Malformed, detail).into_response()
        }
        Err(_) => {
            let detail = format!("the request's body was not there within {:?}", time.0);
            Problem::new(Code::SlowRequest, detail).into_response()
        }
    }
}

/// Whether a body could not be read because it is too long.
fn is_length(error: &axum::Error) -> bool {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = cause {
        if error.to_string() == "length limit exceeded" {
            return true;
        }
        cause = error.source();
    }
    false
}
