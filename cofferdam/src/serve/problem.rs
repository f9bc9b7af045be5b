//! What went wrong, as RFC 9457 has it: an answer of the type `application/problem+json`.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::control::client::AskError;
use crate::error_text::one_line;

/// What kind of problem it is. These names stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The request cannot be read: no JSON, a name or an option that cannot be, a body that ends
    /// too soon.
    Malformed,
    /// The body is JSON and not what is wanted: another type, an unknown field, a value that cannot
    /// be.
    WrongValues,
    /// The body is not said to be JSON.
    WrongType,
    /// The body is too long.
    TooLarge,
    /// The body did not come in time.
    SlowRequest,
    /// There is no such path.
    NoSuchPath,
    /// There is such a path, and nothing of that method is done there.
    WrongMethod,
    /// Who asks is not known.
    Unauthorized,
    /// Another user asks, or one who may only look.
    Forbidden,
    /// No guest of that name runs.
    NoSuchGuest,
    /// No device host of that name runs.
    NoSuchDevice,
    /// The guest has no mark of that name.
    NoSuchMark,
    /// There is no such job, or no more.
    NoSuchJob,
    /// The service has no campaign of that name.
    NoSuchCampaign,
    /// The campaign has no such trial, or no such plot.
    NoSuchTrial,
    /// Of that name there is a guest or a campaign already, and it was made of something else.
    OtherSpec,
    /// The guest did not start.
    CannotStart,
    /// The campaign could not begin or go on.
    CampaignFailed,
    /// The guest or the device host says no, or this service has not what it takes.
    Refused,
    /// The guest or the device host does not answer in time.
    NoAnswer,
    /// The guest or the device host ended before it answered, or it cannot be understood.
    BrokenOff,
    /// The job was given up.
    Cancelled,
    /// Too much is done at once.
    Busy,
    /// The service itself cannot do it.
    Internal,
}

impl Code {
    /// Its name, its HTTP status (RFC 9110, 15) and what it is in words.
    pub fn describe(self) -> (&'static str, StatusCode, &'static str) {
        use StatusCode as S;
        match self {
            Self::Malformed => ("malformed", S::BAD_REQUEST, "the request cannot be read"),
            Self::WrongValues => (
                "wrong_values",
                S::UNPROCESSABLE_ENTITY,
                "the body is not what is wanted",
            ),
            Self::WrongType => (
                "wrong_type",
                S::UNSUPPORTED_MEDIA_TYPE,
                "the body is not application/json",
            ),
            Self::TooLarge => ("too_large", S::PAYLOAD_TOO_LARGE, "the body is too long"),
            Self::SlowRequest => (
                "slow_request",
                S::REQUEST_TIMEOUT,
                "the body did not come in time",
            ),
            Self::NoSuchPath => ("no_such_path", S::NOT_FOUND, "there is no such path"),
            Self::WrongMethod => (
                "wrong_method",
                S::METHOD_NOT_ALLOWED,
                "that is not done at this path",
            ),
            Self::Unauthorized => ("unauthorized", S::UNAUTHORIZED, "who asks is not known"),
            Self::Forbidden => ("forbidden", S::FORBIDDEN, "who asks may not do that"),
            Self::NoSuchGuest => ("no_such_guest", S::NOT_FOUND, "no such guest runs"),
            Self::NoSuchDevice => ("no_such_device", S::NOT_FOUND, "no such device host runs"),
            Self::NoSuchMark => ("no_such_mark", S::NOT_FOUND, "there is no such mark"),
            Self::NoSuchJob => ("no_such_job", S::NOT_FOUND, "there is no such job"),
            Self::NoSuchCampaign => (
                "no_such_campaign",
                S::NOT_FOUND,
                "there is no such campaign",
            ),
            Self::NoSuchTrial => ("no_such_trial", S::NOT_FOUND, "there is no such trial"),
            Self::OtherSpec => (
                "other_spec",
                S::CONFLICT,
                "what has that name is another one",
            ),
            Self::CannotStart => (
                "cannot_start",
                S::UNPROCESSABLE_ENTITY,
                "the guest did not start",
            ),
            Self::CampaignFailed => (
                "campaign_failed",
                S::UNPROCESSABLE_ENTITY,
                "the campaign could not go on",
            ),
            Self::Refused => ("refused", S::CONFLICT, "it was refused"),
            Self::NoAnswer => ("no_answer", S::GATEWAY_TIMEOUT, "no answer in time"),
            Self::BrokenOff => ("broken_off", S::BAD_GATEWAY, "it ended before it answered"),
            Self::Cancelled => ("cancelled", S::CONFLICT, "the job was given up"),
            Self::Busy => ("busy", S::SERVICE_UNAVAILABLE, "too much is done at once"),
            Self::Internal => (
                "internal",
                S::INTERNAL_SERVER_ERROR,
                "the service cannot do it",
            ),
        }
    }
}

/// What went wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Problem {
    /// What kind of problem it is, as a URI: `urn:cofferdam:problem:` and its code.
    #[serde(rename = "type")]
    kind: String,
    /// What kind of problem it is, in words.
    title: &'static str,
    /// The HTTP status of the answer.
    status: u16,
    /// What kind of problem it is, for programs.
    code: Code,
    /// What went wrong this time, for people: one line.
    detail: String,
}

impl Problem {
    /// One of this kind.
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        let (name, status, title) = code.describe();
        Self {
            kind: format!("urn:cofferdam:problem:{name}"),
            title,
            status: status.as_u16(),
            code,
            detail: detail.into(),
        }
    }

    /// Whether it is of this kind.
    pub fn is(&self, code: Code) -> bool {
        self.code == code
    }

    /// What went wrong this time.
    pub fn detail(&self) -> &str {
        &self.detail
    }

    /// What a process answered that was not wanted.
    pub fn unexpected(reply: &dyn std::fmt::Debug) -> Self {
        let mut reply = format!("{reply:?}");
        reply.truncate(reply.floor_char_boundary(200));
        Self::new(
            Code::BrokenOff,
            format!("something else was answered: {reply}"),
        )
    }
}

/// Of a request to a VM or device host.
impl From<anyhow::Error> for Problem {
    fn from(error: anyhow::Error) -> Self {
        let code = match error.downcast_ref() {
            Some(AskError::Refused(_)) => Code::Refused,
            Some(AskError::Silent(_)) => Code::NoAnswer,
            Some(AskError::Ended(_)) | None => Code::BrokenOff,
        };
        Self::new(code, one_line(&error))
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.title, self.detail)
    }
}

impl std::error::Error for Problem {}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let (_, status, _) = self.code.describe();
        let kind = [("content-type", "application/problem+json")];
        (status, kind, Json(self)).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Code; 24] = [
        Code::Malformed,
        Code::WrongValues,
        Code::WrongType,
        Code::TooLarge,
        Code::SlowRequest,
        Code::NoSuchPath,
        Code::WrongMethod,
        Code::Unauthorized,
        Code::Forbidden,
        Code::NoSuchGuest,
        Code::NoSuchDevice,
        Code::NoSuchMark,
        Code::NoSuchJob,
        Code::NoSuchCampaign,
        Code::NoSuchTrial,
        Code::OtherSpec,
        Code::CannotStart,
        Code::CampaignFailed,
        Code::Refused,
        Code::NoAnswer,
        Code::BrokenOff,
        Code::Cancelled,
        Code::Busy,
        Code::Internal,
    ];

    #[test]
    fn the_name_of_a_code_is_what_is_sent() {
        for code in ALL {
            let (name, status, _) = code.describe();
            assert_eq!(serde_json::json!(code), name);
            let problem = serde_json::json!(Problem::new(code, "x"));
            assert_eq!(problem["type"], format!("urn:cofferdam:problem:{name}"));
            assert_eq!(problem["status"], status.as_u16());
        }
    }
}
