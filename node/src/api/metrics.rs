//! Counts for Prometheus.

use std::fmt;
use std::sync::Mutex;
use std::sync::PoisonError;

use futures::{Stream, StreamExt};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::serve::{Event, ServeError, ServeHandle};

pub(super) struct Metrics {
    registry: Mutex<Registry>,
    questions: Counter,
    failures: Counter,
    tokens: Counter,
    losses: Counter,
    sessions: Gauge,
    stages: Gauge,
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

    pub(super) fn text(&self, serve: &ServeHandle) -> Result<String, fmt::Error> {
        let whole = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.sessions.set(whole(serve.sessions()));
        self.stages.set(whole(serve.held().len()));
        let mut text = String::new();
        encode(&mut text, &self.registry.lock().unwrap_or_else(PoisonError::into_inner))?;
        Ok(text)
    }
}
