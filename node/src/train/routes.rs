//! Training over the local HTTP interface, for `polder run` and `polder data`. The daemon puts its own check of the
//! caller in front of it.

use std::path::PathBuf;

use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{NewRun, TrainError, TrainHandle};

/// The largest request: the facts of a run with the layout of a model of some thousand tensors, and held-out texts.
const BODY_BYTES_MAX: usize = 64 << 20;

/// `/train/runs`, `/train/runs/NAME`, `/train/runs/NAME/VERB` and `/train/data`.
pub fn routes(train: TrainHandle) -> Router {
    Router::new()
        .route("/train/runs", get(runs).post(new_run))
        .route("/train/runs/{name}", get(run))
        .route("/train/runs/{name}/export", post(export))
        .route("/train/runs/{name}/{verb}", post(verb))
        .route("/train/data", get(data).post(add_data))
        .route("/train/data/{name}/remove", post(remove_data))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(train)
}

impl IntoResponse for TrainError {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::Unknown { .. } => StatusCode::NOT_FOUND,
            Self::Taken { .. } | Self::NotStarted { .. } => StatusCode::CONFLICT,
            Self::Spec { .. } | Self::Data(_) | Self::Export(_) => StatusCode::BAD_REQUEST,
            Self::File { .. } | Self::Blob { .. } => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Stopped => StatusCode::SERVICE_UNAVAILABLE,
        };
        (status, Json(json!({ "error": { "message": self.to_string() } }))).into_response()
    }
}

async fn runs(State(train): State<TrainHandle>) -> Json<Value> {
    Json(json!({ "runs": train.status() }))
}

async fn run(State(train): State<TrainHandle>, Path(name): Path<String>) -> Result<Response, TrainError> {
    Ok(Json(train.status_of(&name)?).into_response())
}

async fn new_run(State(train): State<TrainHandle>, Json(new): Json<NewRun>) -> Result<Json<Value>, TrainError> {
    let name = new.spec.name.clone();
    let run = train.new_run(new).await?;
    Ok(Json(json!({ "run": run.to_string(), "name": name })))
}

async fn verb(
    State(train): State<TrainHandle>,
    Path((name, verb)): Path<(String, String)>,
) -> Result<Response, TrainError> {
    match verb.as_str() {
        "start" => drop(train.start_run(&name).await?),
        "pause" => train.pause_run(&name).await?,
        "stop" => train.stop_run(&name).await?,
        "join" => train.join_run(&name).await?,
        "leave" => train.leave_run(&name).await?,
        _ => return Ok(StatusCode::NOT_FOUND.into_response()),
    }
    Ok(Json(json!({ "name": name })).into_response())
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Export {
    folder: PathBuf,
    /// The adapters alone.
    #[serde(default)]
    adapter: bool,
}

async fn export(
    State(train): State<TrainHandle>,
    Path(name): Path<String>,
    Json(export): Json<Export>,
) -> Result<Json<Value>, TrainError> {
    if export.adapter {
        train.export_adapter(&name, &export.folder).await?;
    } else {
        train.export(&name, &export.folder).await?;
    }
    Ok(Json(json!({ "folder": export.folder })))
}

async fn data(State(train): State<TrainHandle>) -> Json<Value> {
    Json(json!({ "data": train.data() }))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct AddData {
    name: String,
    path: PathBuf,
    language: Option<String>,
}

async fn add_data(State(train): State<TrainHandle>, Json(add): Json<AddData>) -> Result<Json<Value>, TrainError> {
    train.add_data(&add.name, &add.path, add.language).await?;
    Ok(Json(json!({ "name": add.name })))
}

async fn remove_data(State(train): State<TrainHandle>, Path(name): Path<String>) -> Result<Json<Value>, TrainError> {
    train.remove_data(&name)?;
    Ok(Json(json!({ "name": name })))
}
