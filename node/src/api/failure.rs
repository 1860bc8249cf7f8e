//! Errors in the shape that OpenAI's clients read.

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
        Self {
            status: rejection.status(),
            ..Self::request(rejection.body_text())
        }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.status, Json(self.body())).into_response()
    }
}
