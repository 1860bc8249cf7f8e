//! Drives one seat: the machine decides, this waits for the device, the gateway and the neighbours.

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use polder_protocol::hash::NodeId;
use polder_protocol::session::{
    Computed, Feed, FromSeat, Opening, Seat, SeatEffect, SeatId, SeatInput, SeatRequest, SessionId, ToSeat, decode,
    encode, reason,
};
use polder_protocol::work::{Answer, Task, Written};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::host::INBOX_MAX;
use super::kept::Left;
use super::streams::{Receiver, Sender};
use super::{Inner, Loaded};
use crate::device::DeviceError;

/// A seat in which nothing happens for so long is given up. The gateway asks every second while it waits for anything;
/// only one that is gone without a word is so silent.
const IDLE_MAX: Duration = Duration::from_secs(120);

/// What is said to the gateway and not yet sent.
const SAYING_MAX: usize = 256;

/// Session numbers in the worker.
static SESSIONS: AtomicU64 = AtomicU64::new(1);

/// Takes a seat and keeps it until the gateway's stream ends. An error says why it was refused or ended, for people.
pub(super) async fn sit(
    inner: &Arc<Inner>,
    peer: NodeId,
    request: &SeatRequest,
    sender: &mut Sender,
    receiver: Receiver,
) -> Result<(), String> {
    let loaded = stage(inner, request)?;
    let (inbox, inputs) = mpsc::channel(INBOX_MAX);
    let key = (request.session, request.seat);
    inner.seats.take(key, inbox.clone(), inner.config.sessions_max)?;
    let mut taken = Taken {
        inner: Arc::clone(inner),
        key,
        worker_session: None,
    };
    let session = SESSIONS.fetch_add(1, Ordering::Relaxed);
    let mut machine = Seat::new(request, loaded.blocks, loaded.hidden);
    let earlier = match request.earlier.filter(|earlier| earlier.positions > 0) {
        Some(earlier) => {
            inner.seats.ended(earlier.session).await;
            let left = inner.kept.take((peer, earlier.session), loaded.stage, loaded.life);
            left.map(|left| (left, earlier.positions))
        }
        None => None,
    };
    let has_head = request.range.has_head(loaded.blocks);
    let open = Task::OpenSession {
        stage: loaded.stage,
        session,
        context_tokens_max: request.context_tokens_max,
        earlier: earlier.as_ref().map(|(left, positions)| {
            // Rows that were not sent on could not be replayed.
            let sent = if has_head { u32::MAX } else { left.journal.positions() };
            (left.session, sent.min(*positions))
        }),
    };
    taken.worker_session = Some((loaded, session));
    let (positions, earliest) = match inner.device.order(open, Bytes::new()).await {
        Ok((Answer::Opened { positions, earliest }, _)) => (positions, earliest),
        Ok((answer, _)) => return Err(DeviceError::unexpected(&answer).to_string()),
        Err(error) => return Err(error.to_string()),
    };
    let positions = match earlier {
        Some((left, _)) => machine.go_on_from(left.journal, positions),
        None => 0,
    };
    if let Some(grammar) = request
        .grammar
        .clone()
        .filter(|_| request.range.has_head(loaded.blocks))
    {
        let epoch = inner.epoch(request.epoch).map_err(|error| error.to_string())?;
        let file = inner.blob_file(request.epoch, epoch.tokenizer, "the tokenizer").await;
        let constrain = Task::Constrain {
            stage: loaded.stage,
            session,
            tokenizer_file: file.map_err(|error| error.to_string())?,
            end_tokens: epoch.end_tokens.clone(),
            grammar,
        };
        let bound = inner.device.order(constrain, Bytes::new()).await;
        bound.map_err(|error| error.to_string())?;
    }
    let opened = FromSeat::Opened { positions, earliest };
    sender.send(encode(&opened), Bytes::new()).await?;
    let mut seated = Seated {
        inner: Arc::clone(inner),
        machine,
        request: request.clone(),
        loaded,
        session,
        feeds: None,
    };
    let (saying, said) = mpsc::channel(SAYING_MAX);
    let (ended, sound) = tokio::select! {
        // The device or the machine is at fault.
        ended = seated.run(inputs, saying.clone()) => (ended, false),
        ended = listen(receiver, inbox, saying) => (ended, true),
        ended = speak(sender, said) => (ended, true),
    };
    if request.keep && sound {
        let end = Task::EndSession {
            stage: loaded.stage,
            session,
        };
        if inner.device.order(end, Bytes::new()).await.is_ok() {
            taken.worker_session = None;
            let left = Left {
                stage: loaded.stage,
                session,
                life: loaded.life,
                journal: seated.machine.into_journal(),
            };
            for left in inner.kept.keep(Instant::now(), (peer, request.session), left) {
                close(inner, &left).await;
            }
        }
    }
    drop(taken);
    ended
}

/// Frees what an ended session left in the worker.
pub(super) async fn close(inner: &Inner, left: &Left) {
    let Left { stage, session, .. } = *left;
    // A worker that died has freed it already.
    let close = Task::CloseSession { stage, session };
    let _ = inner.device.order(close, Bytes::new()).await;
}

/// The loaded stage that the request means.
fn stage(inner: &Inner, request: &SeatRequest) -> Result<Loaded, String> {
    let epoch = inner.epoch(request.epoch).map_err(|error| error.to_string())?;
    let held = inner.lock().loaded.get(&request.epoch).copied();
    let loaded = held.filter(|loaded| loaded.range == request.range).ok_or_else(|| {
        let polder_protocol::layout::BlockRange { first, end } = request.range;
        format!("this node does not hold the blocks {first} to {end} of {}", epoch.name)
    })?;
    let limit = epoch.context_tokens_max.min(inner.config.context_tokens_max);
    if request.context_tokens_max > limit {
        let wanted = request.context_tokens_max;
        return Err(format!(
            "a context of {wanted} tokens is longer than this node's {limit}"
        ));
    }
    Ok(loaded)
}

/// Frees a seat, however it ends.
struct Taken {
    inner: Arc<Inner>,
    key: (SessionId, SeatId),
    worker_session: Option<(Loaded, u64)>,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.inner.seats.leave(self.key);
        if let Some((loaded, session)) = self.worker_session {
            let device = self.inner.device.clone();
            tokio::spawn(async move {
                let stage = loaded.stage;
                // A worker that died has freed it already.
                let _ = device.order(Task::CloseSession { stage, session }, Bytes::new()).await;
            });
        }
    }
}

/// Hears the gateway. Pings are answered here, so that a busy device does not look like a dead node.
async fn listen(
    mut receiver: Receiver,
    inbox: mpsc::Sender<SeatInput>,
    saying: mpsc::Sender<FromSeat>,
) -> Result<(), String> {
    loop {
        let next = tokio::time::timeout(IDLE_MAX, receiver.next()).await;
        let next = next.map_err(|_| format!("the gateway has said nothing for {IDLE_MAX:?}"))?;
        let Some((header, _)) = next? else { return Ok(()) };
        let gone = match decode::<ToSeat>(&header).map_err(|error| error.to_string())? {
            ToSeat::Ping => saying.send(FromSeat::Pong).await.is_err(),
            message => inbox.send(SeatInput::Told(message)).await.is_err(),
        };
        if gone {
            return Ok(());
        }
    }
}

async fn speak(sender: &mut Sender, mut said: mpsc::Receiver<FromSeat>) -> Result<(), String> {
    while let Some(message) = said.recv().await {
        let ends = matches!(message, FromSeat::Refused { .. });
        sender.send(encode(&message), Bytes::new()).await?;
        if ends {
            return Ok(());
        }
    }
    Ok(())
}

struct Seated {
    inner: Arc<Inner>,
    machine: Seat,
    request: SeatRequest,
    loaded: Loaded,
    session: u64,
    // The way to the next seat in the present attempt.
    feeds: Option<Feeds>,
}

struct Feeds {
    attempt: u32,
    seat: SeatId,
    // Unbounded, because the machine has never more than a session's context under way.
    outgoing: mpsc::UnboundedSender<(Feed, Vec<u8>)>,
}

type Computing = BoxFuture<'static, Result<(Answer, Bytes), DeviceError>>;

impl Seated {
    async fn run(
        &mut self,
        mut inputs: mpsc::Receiver<SeatInput>,
        saying: mpsc::Sender<FromSeat>,
    ) -> Result<(), String> {
        let mut computing: Computing = Box::pin(pending());
        loop {
            let input = tokio::select! {
                answer = &mut computing => {
                    computing = Box::pin(pending());
                    SeatInput::Computed(computed(answer)?)
                }
                input = inputs.recv() => match input {
                    Some(input) => input,
                    None => return Ok(()),
                },
            };
            let mut effects = Vec::new();
            self.machine.step(input, &mut effects);
            for effect in effects {
                match effect {
                    SeatEffect::Compute {
                        position,
                        tokens,
                        payload,
                        written,
                    } => computing = self.compute(position, tokens, payload, written),
                    SeatEffect::Say(message) => {
                        if saying.send(message).await.is_err() {
                            return Ok(());
                        }
                    }
                    SeatEffect::Feed {
                        to,
                        seat,
                        attempt,
                        feed,
                        payload,
                    } => {
                        let feeds = match self.feeds.take() {
                            Some(feeds) if feeds.attempt == attempt && feeds.seat == seat => feeds,
                            _ => self.open_feeds(to, seat, attempt, saying.clone()),
                        };
                        // Where the way has ended, the gateway has been told.
                        let _ = feeds.outgoing.send((feed, payload));
                        self.feeds = Some(feeds);
                    }
                }
            }
        }
    }

    fn compute(&self, position: u32, tokens: Vec<u32>, payload: Vec<u8>, written: Vec<u32>) -> Computing {
        let task = Task::Forward {
            stage: self.loaded.stage,
            session: self.session,
            position,
            tokens,
            sample: Some(self.request.sampling.clone()),
            written: Written {
                tokens: written,
                prompt_tokens: self.request.prompt_tokens,
            },
        };
        let device = self.inner.device.clone();
        Box::pin(async move { device.order(task, Bytes::from(payload)).await })
    }

    fn open_feeds(&self, to: NodeId, seat: SeatId, attempt: u32, saying: mpsc::Sender<FromSeat>) -> Feeds {
        let (outgoing, mut feeds) = mpsc::unbounded_channel::<(Feed, Vec<u8>)>();
        let inner = Arc::clone(&self.inner);
        let session = self.request.session;
        tokio::spawn(async move {
            let carried = async {
                let (mut sender, _receiver) = inner.streams.open(to, &Opening::Feed { session, seat }).await?;
                while let Some((feed, payload)) = feeds.recv().await {
                    sender.send(encode(&feed), Bytes::from(payload)).await?;
                }
                Ok::<(), String>(())
            };
            if let Err(error) = carried.await {
                let reason = reason(&error);
                // The seat may have ended meanwhile.
                let _ = saying.send(FromSeat::NextLost { attempt, reason }).await;
            }
        });
        Feeds {
            attempt,
            seat,
            outgoing,
        }
    }
}

fn computed(answer: Result<(Answer, Bytes), DeviceError>) -> Result<Computed, String> {
    match answer {
        Ok((Answer::Hidden, payload)) => Ok(Computed::Hidden(payload.into())),
        Ok((Answer::Sampled { chosen, alternatives }, _)) => Ok(Computed::Token { chosen, alternatives }),
        Ok((answer, _)) => Err(DeviceError::unexpected(&answer).to_string()),
        Err(error) => Err(error.to_string()),
    }
}
