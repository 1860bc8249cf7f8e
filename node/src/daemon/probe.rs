//! How long a peer takes to send back what it is sent, and which way it went: for `polder bench net`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use polder_protocol::hash::NodeId;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::Shared;
use crate::data::{Class, DataError, Service};

/// What one echo carries at most, as the data plane allows.
const BYTES_MAX: usize = 4 << 20;

/// Echoes of one question.
const COUNT_MAX: u32 = 10_000;

/// What all of it may take.
const TIME_MAX: Duration = Duration::from_secs(60);

/// Whom to ask, and what for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EchoRequest {
    /// The peer's id, in full or its beginning.
    pub peer: String,
    /// Bytes of each echo.
    pub bytes: usize,
    /// How many, after the first.
    pub count: u32,
}

/// What was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EchoReport {
    /// The peer's id.
    pub peer: String,
    /// Which way the streams go: `direct`, `punched`, `tcp` or `relayed`.
    pub road: String,
    /// From the question to the end of the first echo, with whatever dialling it took.
    pub first_micros: u64,
    /// Echoes after the first, in the order of their time.
    pub micros: Vec<u64>,
}

pub(super) async fn echo(
    State(shared): State<Arc<Shared>>,
    Json(wanted): Json<EchoRequest>,
) -> Result<Json<EchoReport>, Response> {
    let failed =
        |code: StatusCode, reason: String| (code, Json(json!({ "error": { "message": reason } }))).into_response();
    let peer = shared.find_peer(&wanted.peer);
    let peer = peer.map_err(|reason| failed(StatusCode::NOT_FOUND, reason))?;
    let measured = tokio::time::timeout(TIME_MAX, measure(&shared, peer, &wanted)).await;
    match measured {
        Ok(Ok(report)) => Ok(Json(report)),
        Ok(Err(error)) => Err(failed(StatusCode::BAD_GATEWAY, error.to_string())),
        Err(_) => Err(failed(
            StatusCode::GATEWAY_TIMEOUT,
            format!("not done within {} s", TIME_MAX.as_secs()),
        )),
    }
}

impl Shared {
    /// The member that a person means: its id, or a beginning of it that no other has.
    fn find_peer(&self, text: &str) -> Result<NodeId, String> {
        if let Ok(node) = text.parse() {
            return Ok(node);
        }
        let peers = self.control.peers();
        let mut meant = peers
            .iter()
            .filter(|peer| !text.is_empty() && peer.node.to_string().starts_with(text));
        match (meant.next(), meant.next()) {
            (Some(peer), None) => Ok(peer.node),
            (None, _) => Err(format!("this node has met no peer `{text}`; `polder peers` lists them")),
            (Some(_), Some(_)) => Err(format!("several peers begin with `{text}`")),
        }
    }
}

async fn measure(shared: &Shared, peer: NodeId, wanted: &EchoRequest) -> Result<EchoReport, DataError> {
    let began = Instant::now();
    if let Err(error) = shared.control.dial(peer, &[]).await {
        let tried = error.to_string();
        return Err(DataError::Unreachable { peer, tried });
    }
    let (mut sender, mut receiver) = shared.data.open(peer, Class::Act, Service::Echo, Vec::new()).await?;
    let payload = Bytes::from(vec![1; wanted.bytes.min(BYTES_MAX)]);
    let mut first = None;
    let mut micros = Vec::new();
    for _ in 0..=wanted.count.min(COUNT_MAX) {
        let sent = Instant::now();
        sender.send(&[], payload.clone()).await?;
        receiver.next().await?;
        match first {
            None => first = Some(whole_micros(began.elapsed())),
            Some(_) => micros.push(whole_micros(sent.elapsed())),
        }
    }
    micros.sort_unstable();
    let road = shared.data.road(peer, Class::Act).map_or("lost", |road| road.name());
    Ok(EchoReport {
        peer: peer.to_string(),
        road: road.to_owned(),
        first_micros: first.unwrap_or_default(),
        micros,
    })
}

fn whole_micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
