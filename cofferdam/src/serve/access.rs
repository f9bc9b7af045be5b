//! Who may do what: the role of who asks, by the peer of the unix socket or by a token over TCP.
//!
//! A token is sent with each request (`Authorization: Bearer …`). There are no cookies: a browser
//! adds nothing on its own to a request that another site's page has it make.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, HOST, ORIGIN, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, Method};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};

use super::page;
use super::problem::{Code, Problem};
use super::role::Role;
use super::tokens::Tokens;

/// How a door knows who asks.
#[derive(Debug, Clone)]
pub enum Access {
    /// Whoever comes through it is known, and may do this.
    Known(Role),
    /// By the token in each request.
    Token(Arc<Tokens>),
}

impl Access {
    /// The role of who sent these headers.
    fn role(&self, headers: &HeaderMap) -> Option<Role> {
        match self {
            Self::Known(role) => Some(*role),
            Self::Token(tokens) => tokens.role_of(bearer(headers)?),
        }
    }
}

/// `router` for those whom `access` knows.
pub fn guarded(router: Router, access: Access) -> Router {
    router.layer(from_fn_with_state(access, check))
}

async fn check(State(access): State<Access>, mut request: Request, next: Next) -> Response {
    if !is_own_origin(request.headers()) {
        let detail = "a page of another site has made this request";
        return Problem::new(Code::Forbidden, detail).into_response();
    }
    // It has nothing of any guest, and asks for the token.
    let is_page = request.method() == Method::GET && page::PATHS.contains(&request.uri().path());
    if !is_page {
        let Some(role) = access.role(request.headers()) else {
            let detail = "send a token of this service: authorization: Bearer TOKEN";
            let problem = Problem::new(Code::Unauthorized, detail);
            return ([(WWW_AUTHENTICATE, "Bearer")], problem).into_response();
        };
        if !role.may(request.method()) {
            let detail = format!("the role {} may only GET", role.name());
            return Problem::new(Code::Forbidden, detail).into_response();
        }
    }
    // Nobody behind this has a use for it.
    request.headers_mut().remove(AUTHORIZATION);
    next.run(request).await
}

/// The token in these headers, if there is exactly one.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let mut all = headers.get_all(AUTHORIZATION).iter();
    let (Some(value), None) = (all.next(), all.next()) else {
        return None;
    };
    let (scheme, token) = value.as_bytes().split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then_some(token)
}

/// Whether no page has made this request, or the service's own.
fn is_own_origin(headers: &HeaderMap) -> bool {
    let mut origins = headers.get_all(ORIGIN).iter();
    let (origin, None) = (origins.next(), origins.next()) else {
        return false;
    };
    let Some(origin) = origin else { return true };
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    let origin = origin.to_str().ok();
    let authority = origin.and_then(|origin| origin.split_once("://"));
    matches!((authority, host), (Some((_, one)), Some(other)) if one.eq_ignore_ascii_case(other))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn who_may_only_look_may_change_nothing() {
        for method in [Method::GET, Method::HEAD] {
            assert!(Role::Look.may(&method) && Role::Do.may(&method));
        }
        let brew = Method::from_bytes(b"BREW").unwrap();
        for method in [
            Method::POST,
            Method::PUT,
            Method::DELETE,
            Method::PATCH,
            brew,
        ] {
            assert!(!Role::Look.may(&method), "{method}");
            assert!(Role::Do.may(&method), "{method}");
        }
    }

    #[test]
    fn a_token_is_taken_from_one_header_of_the_right_scheme() {
        let bearer =
            |lines: &[(&'static str, &'static str)]| bearer(&headers(lines)).map(<[u8]>::to_vec);
        assert_eq!(bearer(&[("authorization", "Bearer x")]), Some(b"x".into()));
        assert_eq!(bearer(&[("authorization", "bearer x")]), Some(b"x".into()));
        let twice = [("authorization", "Bearer x"), ("authorization", "Bearer x")];
        for none in [
            &[][..],
            &twice,
            &[("authorization", "Basic eDp4")],
            &[("authorization", "Bearer")],
        ] {
            assert_eq!(bearer(none), None, "{none:?}");
        }
    }

    #[test]
    fn a_page_of_another_site_is_told_from_the_services_own() {
        let own = |lines: &[(&'static str, &'static str)]| is_own_origin(&headers(lines));
        assert!(own(&[("host", "a:1")]));
        assert!(own(&[("host", "a:1"), ("origin", "https://a:1")]));
        for other in ["https://b:1", "https://a:2", "https://a", "null", ""] {
            assert!(!own(&[("host", "a:1"), ("origin", other)]), "{other}");
        }
        assert!(!own(&[("origin", "https://a:1")]));
        let two = [
            ("host", "a:1"),
            ("origin", "https://a:1"),
            ("origin", "https://b:1"),
        ];
        assert!(!own(&two));
    }
}
