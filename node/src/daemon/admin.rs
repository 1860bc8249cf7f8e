//! The administration of a running node over the local interface: for whoever can read its `api.json`.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};

use super::{Finding, Shared, Status};
use crate::epochs::{Epochs, model_name};
use crate::train;

/// All administrative routes, behind the token.
pub(super) fn router(shared: Arc<Shared>, token: &str) -> Router {
    let training = train::routes(shared.train.clone());
    let expected: Arc<str> = format!("Bearer {token}").into();
    Router::new()
        .route("/polder/v1/status", get(status))
        .route("/polder/v1/doctor", get(doctor))
        .route("/polder/v1/pause", post(pause))
        .route("/polder/v1/resume", post(resume))
        .route("/polder/v1/leave", post(leave))
        .route("/polder/v1/publish", post(publish))
        .route("/polder/v1/echo", post(super::probe::echo))
        .with_state(shared)
        .merge(training)
        .layer(middleware::from_fn(move |request: Request, next: Next| {
            let expected = Arc::clone(&expected);
            async move { check(&expected, request, next).await }
        }))
}

async fn check(expected: &str, request: Request, next: Next) -> Response {
    let shown = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    // Compared by hash, so that the time it takes tells nothing of the token.
    if blake3::hash(shown.as_bytes()) == blake3::hash(expected.as_bytes()) {
        return next.run(request).await;
    }
    let error = json!({ "error": { "message": "administration needs the token in this node's api.json" } });
    (StatusCode::UNAUTHORIZED, Json(error)).into_response()
}

async fn status(State(shared): State<Arc<Shared>>) -> Json<Status> {
    Json(shared.status())
}

async fn doctor(State(shared): State<Arc<Shared>>) -> Json<Vec<Finding>> {
    Json(shared.examine().await)
}

async fn pause(State(shared): State<Arc<Shared>>) -> Json<Value> {
    shared.contribute.pause();
    Json(json!({ "works": false }))
}

async fn resume(State(shared): State<Arc<Shared>>) -> Json<Value> {
    shared.contribute.resume();
    Json(json!({ "works": true }))
}

async fn leave(State(shared): State<Arc<Shared>>) -> Json<Value> {
    let stop = shared.stop.clone();
    tokio::spawn(async move {
        // After the answer is on its way.
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        stop.cancel();
    });
    Json(json!({ "leaving": true }))
}

/// Which run is published, and as what.
#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Publish {
    run: String,
    name: String,
}

async fn publish(State(shared): State<Arc<Shared>>, Json(wanted): Json<Publish>) -> Result<Json<Value>, Response> {
    let name = model_name(&wanted.name).map_err(|reason| {
        let reason = json!({ "error": { "message": reason } });
        (StatusCode::BAD_REQUEST, Json(reason)).into_response()
    })?;
    let epoch = shared
        .train
        .publish(&wanted.run, &name, None)
        .await
        .map_err(IntoResponse::into_response)?;
    let saved = Epochs::of(shared.home.root()).save(&epoch).map_err(|error| {
        let reason = json!({ "error": { "message": error.to_string() } });
        (StatusCode::INTERNAL_SERVER_ERROR, Json(reason)).into_response()
    })?;
    Ok(Json(json!({ "epoch": saved.to_string(), "name": epoch.name })))
}
