//! Counts for Prometheus.

use std::fmt;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;

use futures::{Stream, StreamExt};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::daemon::PeerStatus;
use crate::serve::{Event, ServeError, ServeHandle};

pub(super) struct Metrics {
    registry: Mutex<Registry>,
    questions: Counter,
    failures: Counter,
    tokens: Counter,
    losses: Counter,
    sessions: Gauge,
    stages: Gauge,
    peers: PeerGauges,
}

/// Which member, and which way its data goes: `direct`, `punched`, `relayed`, or `none`.
type Labels = Vec<(&'static str, String)>;

/// What is known of each member, as in `polder peers`.
#[derive(Default)]
struct PeerGauges {
    rtt: Family<Labels, Gauge<f64, AtomicU64>>,
    loss: Family<Labels, Gauge<f64, AtomicU64>>,
    sent: Family<Labels, Gauge>,
    received: Family<Labels, Gauge>,
    score: Family<Labels, Gauge>,
}

impl PeerGauges {
    fn register(&self, registry: &mut Registry) {
        let (rtt, loss) = (self.rtt.clone(), self.loss.clone());
        registry.register("peer_rtt_seconds", "Smoothed round trip to a member", rtt);
        registry.register(
            "peer_loss_ratio",
            "Share of the packets to a member that were lost",
            loss,
        );
        let (sent, received) = (self.sent.clone(), self.received.clone());
        registry.register(
            "peer_sent_bytes_per_second",
            "Data to a member over the last seconds",
            sent,
        );
        registry.register(
            "peer_received_bytes_per_second",
            "Data from a member over the last seconds",
            received,
        );
        registry.register(
            "peer_score",
            "What a member's gossip was worth; below zero is bad",
            self.score.clone(),
        );
    }

    /// Those that are connected, and nobody else.
    fn set(&self, peers: &[PeerStatus]) {
        self.rtt.clear();
        self.loss.clear();
        self.sent.clear();
        self.received.clear();
        self.score.clear();
        let whole = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        for peer in peers.iter().filter(|peer| peer.path != "lost") {
            let data = peer.data_path.as_ref();
            let road = data.map_or("none", |data| data.road.as_str());
            let labels: Labels = vec![
                ("peer", peer.node.chars().take(16).collect()),
                ("institution", peer.institution.clone()),
                ("control", peer.path.clone()),
                ("data", road.to_owned()),
            ];
            if let Some(micros) = data.map(|data| data.rtt_micros).or(peer.rtt_micros) {
                self.rtt.get_or_create(&labels).set(micros as f64 / 1e6);
            }
            if let Some(data) = data {
                self.loss.get_or_create(&labels).set(data.loss_ppm as f64 / 1e6);
            }
            self.sent.get_or_create(&labels).set(whole(peer.sent_bytes_per_second));
            self.received
                .get_or_create(&labels)
                .set(whole(peer.received_bytes_per_second));
            self.score.get_or_create(&labels).set(peer.score.into());
        }
    }
}

impl Metrics {
    pub(super) fn new() -> Self {
        let metrics = Self {
            registry: Mutex::new(Registry::with_prefix("polder")),
            questions: Counter::default(),
            failures: Counter::default(),
            tokens: Counter::default(),
            losses: Counter::default(),
            sessions: Gauge::default(),
            stages: Gauge::default(),
            peers: PeerGauges::default(),
        };
        let mut registry = metrics.registry.lock().unwrap_or_else(PoisonError::into_inner);
        registry.register(
            "questions",
            "Questions asked through this node",
            metrics.questions.clone(),
        );
        registry.register(
            "questions_failed",
            "Questions asked through this node that ended with an error",
            metrics.failures.clone(),
        );
        registry.register(
            "tokens_generated",
            "Tokens of answers through this node",
            metrics.tokens.clone(),
        );
        registry.register(
            "stages_lost",
            "Stages lost and replaced in mid-generation",
            metrics.losses.clone(),
        );
        registry.register(
            "sessions_held",
            "Sessions that stages of this node hold",
            metrics.sessions.clone(),
        );
        registry.register("stages_held", "Stages that this node holds", metrics.stages.clone());
        metrics.peers.register(&mut registry);
        drop(registry);
        metrics
    }

    pub(super) fn asked(&self) {
        self.questions.inc();
    }

    /// Passes events on and counts them.
    pub(super) fn count<S: Stream<Item = Result<Event, ServeError>>>(
        &self,
        events: S,
    ) -> impl Stream<Item = Result<Event, ServeError>> + use<S> {
        let (failures, tokens, losses) = (self.failures.clone(), self.tokens.clone(), self.losses.clone());
        events.inspect(move |event| match event {
            Ok(Event::Token { .. }) => {
                tokens.inc();
            }
            Ok(Event::Done { usage, .. }) => {
                losses.inc_by(usage.losses.into());
            }
            Err(_) => {
                failures.inc();
            }
        })
    }

    pub(super) fn text(&self, serve: &ServeHandle, peers: &[PeerStatus]) -> Result<String, fmt::Error> {
        let whole = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.sessions.set(whole(serve.sessions()));
        self.stages.set(whole(serve.held().len()));
        self.peers.set(peers);
        let mut text = String::new();
        encode(&mut text, &self.registry.lock().unwrap_or_else(PoisonError::into_inner))?;
        Ok(text)
    }
}
