//! The OpenAI-compatible interface on the loopback address: `/v1/models`, `/v1/chat/completions`, `/v1/completions`,
//! and `/metrics`.

mod answer;
mod call_forms;
pub(crate) mod calls;
mod failure;
mod log_probabilities;
mod metrics;
mod question;
#[cfg(test)]
mod tests;
mod tools;

use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use polder_protocol::epoch::Epoch;
use polder_protocol::hash::EpochId;
use serde_json::{Value, json};
use tower_http::timeout::TimeoutLayer;

use crate::daemon::PeerStatus;
use crate::serve::{ServeError, ServeHandle};
use failure::Failure;
use metrics::Metrics;
use question::{ChatQuestion, Key, TextQuestion};

/// The longest request. A context of 128 Ki tokens is about half a MiB of text.
const BODY_BYTES_MAX: usize = 4 << 20;

/// How long an answer may take to begin, or, when it is not streamed, to be whole.
const ANSWER_MAX: Duration = Duration::from_secs(1_800);

/// Tells of the members that the node has met.
pub type Peers = Arc<dyn Fn() -> Vec<PeerStatus> + Send + Sync>;

struct Api {
    serve: ServeHandle,
    peers: Peers,
    metrics: Metrics,
}

/// The interface. Bind it to the loopback address: it asks nobody who they are.
pub fn router(serve: ServeHandle, peers: Peers) -> Router {
    let metrics = Metrics::new();
    let api = Arc::new(Api { serve, peers, metrics });
    Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(text))
        .route("/metrics", get(show_metrics))
        .fallback(nothing_here)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, ANSWER_MAX))
        .with_state(api)
}

async fn models(State(api): State<Arc<Api>>) -> Json<Value> {
    let models = api.serve.models();
    let data: Vec<Value> = models
        .iter()
        .map(|(id, epoch, served)| described(*id, epoch, *served))
        .collect();
    Json(json!({ "object": "list", "data": data }))
}

async fn model(State(api): State<Arc<Api>>, Path(name): Path<String>) -> Result<Json<Value>, Failure> {
    let id = api.serve.find(&name)?;
    let models = api.serve.models();
    let found = models.iter().find(|(known, ..)| *known == id);
    let (_, epoch, served) = found.ok_or(ServeError::UnknownEpoch { name })?;
    Ok(Json(described(id, epoch, *served)))
}

fn described(id: EpochId, epoch: &Epoch, served: bool) -> Value {
    json!({
        "id": epoch.name,
        "object": "model",
        "created": 0,
        "owned_by": "polder",
        "epoch": id.to_string(),
        "blocks": epoch.blocks(),
        "context_length": epoch.context_tokens_max,
        "served": served,
    })
}

async fn nothing_here(uri: Uri) -> Failure {
    Failure::absent(format!(
        "there is no {} here; there are /v1/models, /v1/chat/completions, /v1/completions and /metrics",
        uri.path()
    ))
}

async fn wrong_method(method: Method, uri: Uri) -> Failure {
    Failure::method(format!("{} does not take {method}", uri.path()))
}

async fn chat(
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
    body: Result<Json<ChatQuestion>, JsonRejection>,
) -> Result<Response, Failure> {
    let Json(question) = body?;
    let (request, shape) = question.read(&api.serve, key(&headers))?;
    answer::answer(&api.serve, &api.metrics, request, shape).await
}

async fn text(
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
    body: Result<Json<TextQuestion>, JsonRejection>,
) -> Result<Response, Failure> {
    let Json(question) = body?;
    let (request, shape) = question.read(&api.serve, key(&headers))?;
    answer::answer(&api.serve, &api.metrics, request, shape).await
}

fn key(headers: &HeaderMap) -> Key<'_> {
    Key(headers.get(AUTHORIZATION).map(|key| key.as_bytes()))
}

async fn show_metrics(State(api): State<Arc<Api>>) -> Response {
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    match api.metrics.text(&api.serve, &(api.peers)()) {
        Ok(text) => ([("content-type", content_type)], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
