//! What is in a request: names in its path, options behind it, its body.

use std::str::FromStr;

use axum::body::to_bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use serde::de::{DeserializeOwned, IgnoredAny};

use super::limits::MAX_BODY_BYTES;
use super::problem::{Code, Problem};
use crate::options::{BadValue, VmName};

/// Longest name of a kernel module, in bytes (`MODULE_NAME_LEN`, Linux `include/linux/module.h`).
const MAX_MODULE_NAME: usize = 55;

/// Name of a kernel module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleName(pub String);

impl FromStr for ModuleName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
        match !text.is_empty() && text.len() <= MAX_MODULE_NAME && text.bytes().all(fits) {
            true => Ok(Self(text.to_owned())),
            false => Err(format!(
                "a module's name has 1 to {MAX_MODULE_NAME} letters, digits, '_' or '-'"
            )),
        }
    }
}

/// Name of a mark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MarkName(pub String);

impl FromStr for MarkName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // The same letters; what is wrong with it is said of a name.
        let name = text
            .parse::<VmName>()
            .map_err(|error: BadValue| error.to_string())?;
        Ok(Self(name.to_string()))
    }
}

/// The one name in a path.
#[derive(Debug)]
pub struct Name<T>(pub T);

/// The two names in a path.
#[derive(Debug)]
pub struct Names<A, B>(pub A, pub B);

fn name<T: FromStr<Err: ToString>>(text: &str) -> Result<T, Problem> {
    text.parse()
        .map_err(|error: T::Err| Problem::new(Code::Malformed, error.to_string()))
}

fn no_names(rejection: impl std::fmt::Display) -> Problem {
    Problem::new(Code::Malformed, rejection.to_string())
}

impl<S: Send + Sync, T: FromStr<Err: ToString>> FromRequestParts<S> for Name<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Path(text) = Path::<String>::from_request_parts(parts, state)
            .await
            .map_err(no_names)?;
        Ok(Self(name(&text)?))
    }
}

impl<S, A, B> FromRequestParts<S> for Names<A, B>
where
    S: Send + Sync,
    A: FromStr<Err: ToString>,
    B: FromStr<Err: ToString>,
{
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Path((first, second)) = Path::<(String, String)>::from_request_parts(parts, state)
            .await
            .map_err(no_names)?;
        Ok(Self(name(&first)?, name(&second)?))
    }
}

/// The options behind a path.
#[derive(Debug)]
pub struct Options<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Options<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Query(options) = Query::from_request_parts(parts, state)
            .await
            .map_err(no_names)?;
        Ok(Self(options))
    }
}

/// A body of JSON.
#[derive(Debug)]
pub struct Body<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let kind = request.headers().get(CONTENT_TYPE);
        let kind = kind.and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default().trim();
        if !kind.eq_ignore_ascii_case("application/json") {
            let detail = "say that the body is JSON: content-type: application/json";
            return Err(Problem::new(Code::WrongType, detail));
        }
        let bytes = bytes(request).await?;
        let syntax = serde_json::from_slice::<IgnoredAny>(&bytes);
        syntax.map_err(|error| Problem::new(Code::Malformed, error.to_string()))?;
        // A list would be taken for the fields in their order.
        if !bytes.trim_ascii_start().starts_with(b"{") {
            return Err(Problem::new(Code::WrongValues, "an object is wanted"));
        }
        serde_json::from_slice(&bytes)
            .map(Self)
            .map_err(|error| Problem::new(Code::WrongValues, error.to_string()))
    }
}

/// No body: a request that needs none and has one was meant for something else.
#[derive(Debug)]
pub struct NoBody;

impl<S: Send + Sync> FromRequest<S> for NoBody {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        match bytes(request).await?.is_empty() {
            true => Ok(Self),
            false => Err(Problem::new(Code::WrongValues, "no body is wanted here")),
        }
    }
}

async fn bytes(request: Request) -> Result<axum::body::Bytes, Problem> {
    // It was read already.
    to_bytes(request.into_body(), MAX_BODY_BYTES)
        .await
        .map_err(|error| Problem::new(Code::Malformed, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_be_paths_are_none() {
        for bad in [
            "", ".", "..", "../x", "a/b", "/etc", "a\0", "a b", "-x", "é",
        ] {
            assert!(bad.parse::<VmName>().is_err(), "{bad:?}");
            assert!(bad.parse::<MarkName>().is_err(), "{bad:?}");
        }
        for bad in ["", ".", "..", "a/b", "a.ko", "a\n", &"x".repeat(56)] {
            assert!(bad.parse::<ModuleName>().is_err(), "{bad:?}");
        }
        assert!("snd_hda-intel".parse::<ModuleName>().is_ok());
    }
}
