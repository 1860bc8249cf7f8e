//! The gateway of a question: turns words into tokens, drives the session, turns tokens into words as they come.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use futures::Stream;
use polder_protocol::epoch::Epoch;
use polder_protocol::hash::{EpochId, NodeId};
use polder_protocol::layout::BlockRange;
use polder_protocol::route::{self, Hop, Offer, RoutePolicy};
use polder_protocol::session::{
    Earlier, Effect, FromSeat, Generation, Input, Opening, Request, SeatId, SeatRequest, SessionId, ToSeat, Why,
    decode, encode,
};
use polder_protocol::time;
use polder_protocol::work::{Grammar, Likely, Prompt, Sampling};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tracing::{debug, info};

use super::past::Past;
use super::text::{Stops, Text, Words};
use super::{Inner, Owner, ServeError, ServeHandle};

/// Events that wait for a slow reader. The chain goes on without it for so many tokens.
const EVENTS_MAX: usize = 256;

/// What the seats of one generation said and nobody has read yet.
const SAID_MAX: usize = 256;

/// What is asked.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    /// Which model.
    pub epoch: EpochId,
    /// What to answer or to go on with.
    pub prompt: Prompt,
    /// New tokens at most; `None` for as many as the context holds.
    pub tokens_max: Option<u32>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// What the answer keeps to.
    pub grammar: Option<Grammar>,
    /// Whether each token is to be told with its own text, and its alternatives.
    pub names: bool,
    /// The text ends before the first of these.
    pub stop: Vec<String>,
    /// Whom to trust with it.
    pub policy: RoutePolicy,
    /// Whose it is: stages keep what they compute for the owner's next question. `None` keeps nothing.
    pub owner: Option<Owner>,
}

/// What comes of it.
#[derive(Debug, Clone)]
pub enum Event {
    /// More text.
    Token {
        /// The text; empty while a letter is incomplete.
        text: String,
        /// The token that brought it.
        chosen: Named,
        /// The likeliest tokens in its place, as many as were asked for.
        alternatives: Vec<Named>,
    },
    /// The end.
    Done {
        /// Text that was held back until it was certain that no stop string begins with it.
        text: String,
        /// Why it ended.
        reason: Reason,
        /// What it took.
        usage: Usage,
        /// Who answered.
        chain: Vec<Hop>,
    },
}

/// A token, how likely it was, and its text.
#[derive(Debug, Clone, PartialEq)]
pub struct Named {
    /// Its id.
    pub token: u32,
    /// Its natural log-probability before penalties, temperature and limits.
    pub log_probability: f32,
    /// Its text alone, where [`GenerateRequest::names`] asks for it; bytes that are not UTF-8 are U+FFFD.
    pub text: String,
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The model ended it, or a stop string came.
    Stop,
    /// As many tokens as were asked for, or as the context holds.
    Length,
}

/// What a generation took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Of these, such as an earlier session of the same owner had computed.
    pub reused_tokens: u32,
    /// Tokens that were generated.
    pub completion_tokens: u32,
    /// Stages that were lost and replaced on the way.
    pub losses: u32,
}

impl ServeHandle {
    /// Answers a question. The stream ends after [`Event::Done`] or an error; dropping it ends the generation
    /// everywhere.
    pub fn generate(&self, request: GenerateRequest) -> impl Stream<Item = Result<Event, ServeError>> + Send + 'static {
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let inner = Arc::clone(&self.inner);
        tokio::spawn(async move {
            let outcome = tokio::select! {
                () = events.closed() => return,
                outcome = answer(&inner, request, &events) => outcome,
            };
            if let Err(error) = outcome {
                // Whoever asked may have gone.
                let _ = events.send(Err(error)).await;
            }
        });
        ReceiverStream::new(receiver)
    }
}

type Events = mpsc::Sender<Result<Event, ServeError>>;

async fn answer(inner: &Arc<Inner>, request: GenerateRequest, events: &Events) -> Result<(), ServeError> {
    let busy = ServeError::Busy {
        limit: inner.config.generations_max,
    };
    let _permit = inner.generations.try_acquire().map_err(|_| busy)?;
    let epoch = inner.epoch(request.epoch)?;
    let text = Text::of(inner, request.epoch).await?;
    let prompt = text.encode(request.prompt.clone()).await?;
    if let Some(grammar) = &request.grammar {
        text.check(grammar).await?;
    }
    let asking = Asking::new(inner, &epoch, &request, &prompt)?;
    let mut effects = Vec::new();
    let machine = Generation::begin(
        asking.now(),
        Request {
            tokens_max: request.tokens_max.unwrap_or(u32::MAX),
            context_tokens_max: asking.context_tokens_max,
            end_tokens: epoch.end_tokens.clone(),
            blocks: epoch.blocks(),
            looks_back: request.sampling.looks_back() || request.grammar.is_some(),
            shared: asking.past.as_ref().map_or(0, |(_, shared)| *shared),
            prompt,
        },
        inner.config.limits,
        &mut effects,
    );
    asking
        .run(
            machine,
            effects,
            Words::new(text),
            Stops::new(request.stop.clone()),
            events,
        )
        .await
}

/// One generation under way.
struct Asking<'a> {
    inner: &'a Arc<Inner>,
    request: &'a GenerateRequest,
    epoch: &'a Epoch,
    session: SessionId,
    context_tokens_max: u32,
    prompt_tokens: u32,
    began: Instant,
    said: mpsc::Sender<(SeatId, Result<FromSeat, String>)>,
    saying: Option<mpsc::Receiver<(SeatId, Result<FromSeat, String>)>>,
    // Dropping one ends the stream to its seat.
    seats: BTreeMap<SeatId, mpsc::UnboundedSender<ToSeat>>,
    // From which it goes on, and how many tokens they share.
    past: Option<(Past, u32)>,
    // The prompt and what was generated, and who computed it, for the next question.
    tokens: Vec<u32>,
    chain: Vec<Hop>,
}

impl Drop for Asking<'_> {
    /// However it ends, also in the middle: stages keep what they have.
    fn drop(&mut self) {
        self.remember();
    }
}

impl Asking<'_> {
    /// Once: what is remembered is taken from here.
    fn remember(&mut self) {
        if let Some(owner) = self.request.owner
            && !self.chain.is_empty()
        {
            self.inner.pasts.remember(Past {
                owner,
                epoch: self.request.epoch,
                session: self.session,
                tokens: std::mem::take(&mut self.tokens),
                chain: std::mem::take(&mut self.chain),
                ended_at: Instant::now(),
            });
        }
    }
}

impl<'a> Asking<'a> {
    fn new(
        inner: &'a Arc<Inner>,
        epoch: &'a Epoch,
        request: &'a GenerateRequest,
        prompt: &[u32],
    ) -> Result<Self, ServeError> {
        let limit = epoch.context_tokens_max.min(inner.config.context_tokens_max);
        let prompt_tokens = u32::try_from(prompt.len()).unwrap_or(u32::MAX);
        if prompt_tokens >= limit {
            return Err(ServeError::Request {
                reason: format!("the prompt has {prompt_tokens} tokens, and the context holds {limit} with the answer"),
            });
        }
        let wanted = prompt_tokens.saturating_add(request.tokens_max.unwrap_or(u32::MAX));
        let mut session = [0; 16];
        getrandom::fill(&mut session).map_err(|error| ServeError::GaveUp {
            reason: format!("the system has no random numbers: {error}"),
        })?;
        let (said, saying) = mpsc::channel(SAID_MAX);
        let past = request
            .owner
            .and_then(|owner| inner.pasts.take(Instant::now(), owner, request.epoch, prompt));
        Ok(Self {
            past,
            tokens: prompt.to_vec(),
            chain: Vec::new(),
            inner,
            request,
            epoch,
            session: SessionId(session),
            context_tokens_max: wanted.min(limit),
            prompt_tokens,
            began: Instant::now(),
            said,
            saying: Some(saying),
            seats: BTreeMap::new(),
        })
    }

    fn now(&self) -> time::Instant {
        time::Instant(u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX))
    }

    async fn run(
        mut self,
        mut machine: Generation,
        mut effects: Vec<Effect>,
        mut words: Words,
        mut stops: Stops,
        events: &Events,
    ) -> Result<(), ServeError> {
        let Some(mut saying) = self.saying.take() else {
            return Ok(());
        };
        loop {
            while !effects.is_empty() {
                for effect in std::mem::take(&mut effects) {
                    match effect {
                        Effect::Choose { gap, excluded } => {
                            let chain = self.choose(gap, &excluded);
                            machine.step(self.now(), Input::Chosen { gap, chain }, &mut effects);
                            self.chain = machine.chain();
                        }
                        Effect::Open { seat, hop, shared } => self.open(seat, hop, shared),
                        Effect::Send { seat, message } => {
                            if let Some(seat) = self.seats.get(&seat) {
                                // Where the stream has ended, its loss is on the way.
                                let _ = seat.send(message);
                            }
                        }
                        Effect::Close { seat } => {
                            info!(seat = seat.0, "a stage was lost in a generation");
                            self.seats.remove(&seat);
                        }
                        Effect::Emit { chosen, alternatives } => {
                            // Stages that were lost and replaced are not who answered last.
                            self.chain = machine.chain();
                            self.tokens.push(chosen.token);
                            let piece = words.push(chosen.token).await?;
                            let (text, stopped) = stops.push(&piece);
                            // No more than were asked for: the last stage may lie.
                            let asked = usize::from(self.request.sampling.alternatives);
                            let mut named = Vec::with_capacity(asked.min(alternatives.len()));
                            for likely in alternatives.into_iter().take(asked) {
                                named.push(self.name(&words, likely).await?);
                            }
                            let event = Event::Token {
                                text,
                                chosen: self.name(&words, chosen).await?,
                                alternatives: named,
                            };
                            if events.send(Ok(event)).await.is_err() {
                                return Ok(());
                            }
                            if stopped {
                                let usage = self.usage(&machine);
                                return self.done(String::new(), Reason::Stop, usage, events).await;
                            }
                        }
                        Effect::Done(Why::GaveUp { reason }) => return Err(ServeError::GaveUp { reason }),
                        Effect::Done(why) => {
                            let (mut text, stopped) = stops.push(&words.finish().await?);
                            if !stopped {
                                text.push_str(&stops.finish());
                            }
                            let reason = match why {
                                Why::Length if !stopped => Reason::Length,
                                _ => Reason::Stop,
                            };
                            let usage = self.usage(&machine);
                            return self.done(text, reason, usage, events).await;
                        }
                    }
                }
            }
            let wake_at = machine
                .wake_at()
                .map(|at| self.began + std::time::Duration::from_micros(at.0));
            let input = tokio::select! {
                () = tokio::time::sleep_until(wake_at.unwrap_or(self.began)), if wake_at.is_some() => Input::Wake,
                said = saying.recv() => match said {
                    Some((seat, Ok(message))) => Input::Said { seat, message },
                    Some((seat, Err(reason))) => Input::Lost { seat, reason },
                    None => return Ok(()),
                },
            };
            if let Input::Lost { seat, reason } = &input {
                debug!(seat = seat.0, reason, "a stream to a stage ended");
            }
            machine.step(self.now(), input, &mut effects);
        }
    }

    /// A token with its text, where that was asked for.
    async fn name(&self, words: &Words, likely: Likely) -> Result<Named, ServeError> {
        let Likely { token, log_probability } = likely;
        let text = match self.request.names {
            true => words.alone(token).await?,
            false => String::new(),
        };
        Ok(Named {
            token,
            log_probability,
            text,
        })
    }

    fn usage(&self, machine: &Generation) -> Usage {
        Usage {
            prompt_tokens: self.prompt_tokens,
            reused_tokens: machine.tokens_reused(),
            completion_tokens: u32::try_from(machine.tokens_generated()).unwrap_or(u32::MAX),
            losses: machine.losses(),
        }
    }

    async fn done(&mut self, text: String, reason: Reason, usage: Usage, events: &Events) -> Result<(), ServeError> {
        let done = Event::Done {
            text,
            reason,
            usage,
            chain: self.chain.clone(),
        };
        // Before whoever reads the end asks what comes next.
        self.remember();
        // Whoever asked may have gone.
        let _ = events.send(Ok(done)).await;
        Ok(())
    }

    /// Stages for a gap: those of the session from which this one goes on, if all of them are there, else the best.
    fn choose(&mut self, gap: BlockRange, excluded: &BTreeSet<NodeId>) -> Option<Vec<Hop>> {
        let offers = self.inner.offers(self.request.epoch);
        let (blocks, policy) = (self.epoch.blocks(), &self.request.policy);
        let again = self.past.as_ref().and_then(|(past, _)| {
            let sat = |offer: &Offer| {
                let mut hops = past.chain.iter();
                hops.any(|hop| hop.node == offer.node && hop.range == offer.range)
            };
            let same: Vec<Offer> = offers.iter().filter(|offer| sat(offer)).copied().collect();
            route::choose(&same, gap, blocks, policy, excluded)
        });
        if again.is_none() {
            // Others need not hear of that session.
            self.past = None;
        }
        again.or_else(|| route::choose(&offers, gap, blocks, policy, excluded))
    }

    /// Opens the stream to a seat, on a task of its own.
    fn open(&mut self, seat: SeatId, hop: Hop, shared: u32) {
        let (messages, mut outgoing) = mpsc::unbounded_channel();
        self.seats.insert(seat, messages);
        let opening = Opening::Seat(SeatRequest {
            session: self.session,
            seat,
            epoch: self.request.epoch,
            range: hop.range,
            context_tokens_max: self.context_tokens_max,
            sampling: self.request.sampling.clone(),
            grammar: self.request.grammar.clone(),
            prompt_tokens: self.prompt_tokens,
            end_tokens: self.epoch.end_tokens.clone(),
            earlier: self.past.as_ref().filter(|_| shared > 0).map(|(past, _)| Earlier {
                session: past.session,
                positions: shared,
            }),
            keep: self.request.owner.is_some(),
        });
        let inner = Arc::clone(self.inner);
        let said = self.said.clone();
        tokio::spawn(async move {
            let talked = async {
                let (mut sender, mut receiver) = inner.streams.open(hop.node, &opening).await?;
                loop {
                    tokio::select! {
                        message = outgoing.recv() => match message {
                            Some(message) => sender.send(encode(&message), Bytes::new()).await?,
                            None => return Ok(()),
                        },
                        frame = receiver.next() => {
                            let Some((header, _)) = frame? else {
                                return Err("its stream ended".to_owned());
                            };
                            let message = decode(&header).map_err(|error| error.to_string())?;
                            if said.send((seat, Ok(message))).await.is_err() {
                                return Ok(());
                            }
                        }
                    }
                }
            };
            if let Err(reason) = talked.await {
                // The generation may have ended meanwhile.
                let _ = said.send((seat, Err(reason))).await;
            }
        });
    }
}
