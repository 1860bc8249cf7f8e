//! Errors in the shape that OpenAI's clients read.

use std::error::Error;

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::serve::ServeError;

/// Why a request was not answered.
#[derive(Debug)]
pub(super) struct Failure {
    status: StatusCode,
    kind: &'static str,
    message: String,
}

impl Failure {
    /// The request makes no sense.
    pub(super) fn request(message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            kind: "invalid_request_error",
            message: message.into(),
        }
    }

    /// What was asked for is not here.
    pub(super) fn absent(message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::NOT_FOUND,
            ..Self::request(message)
        }
    }

    /// It is here, and is asked for in another way.
    pub(super) fn method(message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::METHOD_NOT_ALLOWED,
            ..Self::request(message)
        }
    }

    /// The body of the answer.
    pub(super) fn body(&self) -> Value {
        json!({ "error": {
            "message": self.message,
            "type": self.kind,
            "param": null,
            "code": null,
        }})
    }
}

impl From<ServeError> for Failure {
    fn from(error: ServeError) -> Self {
        let (status, kind) = match &error {
            ServeError::UnknownEpoch { .. } => (StatusCode::NOT_FOUND, "invalid_request_error"),
            ServeError::Range { .. } | ServeError::Request { .. } => (StatusCode::BAD_REQUEST, "invalid_request_error"),
            ServeError::Busy { .. } => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error"),
            ServeError::Fetch { .. } | ServeError::Device { .. } | ServeError::GaveUp { .. } => {
                (StatusCode::SERVICE_UNAVAILABLE, "server_error")
            }
        };
        Self {
            status,
            kind,
            message: error.to_string(),
        }
    }
}

impl From<JsonRejection> for Failure {
    fn from(rejection: JsonRejection) -> Self {
        let message = match &rejection {
            JsonRejection::MissingJsonContentType(_) => {
                "the body must be JSON and say so: add the header `content-type: application/json`".to_owned()
            }
            // The library's own words come first; what is wrong, and where, comes from below.
            JsonRejection::JsonDataError(error) => format!("the request does not fit: {}", cause(error)),
            JsonRejection::JsonSyntaxError(error) => format!("the body is no JSON: {}", cause(error)),
            other => other.body_text(),
        };
        let status = match rejection.status() {
            // OpenAI's clients know this one.
            StatusCode::UNPROCESSABLE_ENTITY => StatusCode::BAD_REQUEST,
            status => status,
        };
        Self {
            status,
            ..Self::request(message)
        }
    }
}

/// What is at the bottom of an error.
fn cause(error: &dyn Error) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.status, Json(self.body())).into_response()
    }
}
