//! How long a peer takes to send back what it is sent, how much the link carries, and which way it went: for
//! `polder bench net`.

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
use crate::data::{Class, DataError, FrameReceiver, FrameSender, Service};

/// What one echo carries at most, as the data plane allows.
const BYTES_MAX: usize = 4 << 20;

/// Echoes of one question.
const COUNT_MAX: u32 = 10_000;

/// Echoes beside a transfer leave it the link.
const BETWEEN_ECHOES: Duration = Duration::from_millis(20);

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
    /// Bytes of a transfer after that, with echoes beside it; 0 for none.
    #[serde(default)]
    pub bulk: u64,
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
    /// What the transfer showed, where one was asked for.
    #[serde(default)]
    pub bulk: Option<BulkReport>,
}

/// What a transfer showed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BulkReport {
    /// Bytes that came, without headers.
    pub bytes: u64,
    /// From the first byte until the peer said that all are there.
    pub micros: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// Those of them that were lost, and sent again.
    pub lost_packets: u64,
    /// What may be under way, in bytes, at the end.
    pub window_bytes: u64,
    /// The round trip at the end, with whatever queue there is.
    pub round_trip_micros: u64,
    /// Echoes beside it, in the order of their time.
    pub echo_micros: Vec<u64>,
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
    let bulk = match wanted.bulk {
        0 => None,
        bytes => Some(pour(shared, peer, bytes, (&mut sender, &mut receiver), &payload).await?),
    };
    let road = shared.data.road(peer, Class::Act).map_or("lost", |road| road.name());
    Ok(EchoReport {
        peer: peer.to_string(),
        road: road.to_owned(),
        first_micros: first.unwrap_or_default(),
        micros,
        bulk,
    })
}

/// A transfer, and echoes beside it until it ends.
async fn pour(
    shared: &Shared,
    peer: NodeId,
    bytes: u64,
    (sender, receiver): (&mut FrameSender, &mut FrameReceiver),
    payload: &Bytes,
) -> Result<BulkReport, DataError> {
    let mut echo_micros = Vec::new();
    let echoes = async {
        loop {
            let sent = Instant::now();
            sender.send(&[], payload.clone()).await?;
            receiver.next().await?;
            echo_micros.push(whole_micros(sent.elapsed()));
            tokio::time::sleep(BETWEEN_ECHOES).await;
        }
    };
    let poured = tokio::select! {
        poured = shared.data.pour(peer, bytes) => poured?,
        ended = echoes => {
            let ended: Result<std::convert::Infallible, DataError> = ended;
            match ended? {}
        }
    };
    echo_micros.sort_unstable();
    Ok(BulkReport {
        bytes: poured.bytes,
        micros: whole_micros(poured.time),
        sent_packets: poured.sent_packets,
        lost_packets: poured.lost_packets,
        window_bytes: poured.window_bytes,
        round_trip_micros: whole_micros(poured.round_trip),
        echo_micros,
    })
}

fn whole_micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
