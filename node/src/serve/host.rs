//! The stages that this node holds: loading them, announcing them, and taking the streams that are meant for them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use polder_protocol::hash::{EpochId, NodeId};
use polder_protocol::layout::BlockRange;
use polder_protocol::session::{Feed, FromSeat, Opening, SeatId, SeatInput, SessionId, decode, encode, reason};
use polder_protocol::work::{Answer, Sampling, StageId, Task, Weights, Written};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::streams::{Incoming, Receiver};
use super::{Inner, Loaded, ServeError, seat};
use crate::data::Service;
use crate::device::Life;

/// How long to wait before a stage that could not be loaded is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(5);

/// How often the announcement is refreshed: room for sessions changes.
const ANNOUNCE_EVERY: Duration = Duration::from_secs(15);

/// A seat ends when the stage has heard that its gateway left, and the worker has done what it was told before.
const ENDING_MAX: Duration = Duration::from_secs(2);

/// Inputs that wait for one seat. A neighbour that sends more waits.
pub(super) const INBOX_MAX: usize = 64;

/// The seats that are taken on this node.
#[derive(Debug, Default)]
pub(super) struct Seats {
    inboxes: Mutex<BTreeMap<(SessionId, SeatId), mpsc::Sender<SeatInput>>>,
    left: Notify,
}

impl Seats {
    pub(super) fn len(&self) -> usize {
        self.lock().len()
    }

    /// Takes a seat, unless it is taken or all `seats_max` are.
    pub(super) fn take(
        &self,
        key: (SessionId, SeatId),
        inbox: mpsc::Sender<SeatInput>,
        seats_max: u32,
    ) -> Result<(), String> {
        let mut inboxes = self.lock();
        if inboxes.contains_key(&key) {
            return Err("this seat is taken".to_owned());
        }
        if u32::try_from(inboxes.len()).unwrap_or(u32::MAX) >= seats_max {
            return Err(format!("all {seats_max} sessions of this node are in use"));
        }
        inboxes.insert(key, inbox);
        Ok(())
    }

    pub(super) fn leave(&self, key: (SessionId, SeatId)) {
        self.lock().remove(&key);
        self.left.notify_waiters();
    }

    /// Waits until a session has no seat here, at most for as long as a seat takes to end: whoever goes on from a session has
    /// just left it.
    pub(super) async fn ended(&self, session: SessionId) {
        let gone = async {
            loop {
                let left = self.left.notified();
                if !self.lock().keys().any(|(taken, _)| *taken == session) {
                    return;
                }
                left.await;
            }
        };
        // After that it is asked for what it has, and says that it has nothing.
        let _ = tokio::time::timeout(ENDING_MAX, gone).await;
    }

    fn inbox(&self, key: (SessionId, SeatId)) -> Option<mpsc::Sender<SeatInput>> {
        self.lock().get(&key).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(SessionId, SeatId), mpsc::Sender<SeatInput>>> {
        self.inboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes streams until serving stops.
pub(super) async fn accept(inner: Arc<Inner>, mut here: mpsc::Receiver<Incoming>) {
    let mut wire = inner.data.serve(Service::Session);
    loop {
        let incoming = tokio::select! {
            () = inner.stop.cancelled() => return,
            Some(incoming) = here.recv() => incoming,
            Some(incoming) = wire.recv() => Incoming {
                peer: incoming.peer.node,
                header: incoming.header,
                sender: super::streams::Sender::Wire(incoming.sender),
                receiver: Receiver::Wire(Box::new(incoming.receiver)),
            },
            else => return,
        };
        let inner = Arc::clone(&inner);
        tokio::spawn(async move {
            let stop = inner.stop.clone();
            tokio::select! {
                () = stop.cancelled() => {}
                () = take(inner, incoming) => {}
            }
        });
    }
}

async fn take(inner: Arc<Inner>, incoming: Incoming) {
    let Incoming {
        peer,
        header,
        mut sender,
        receiver,
    } = incoming;
    match decode(&header) {
        Ok(Opening::Seat(request)) => {
            if let Err(error) = seat::sit(&inner, peer, &request, &mut sender, receiver).await {
                debug!(peer = %peer.short(), seat = request.seat.0, error, "seat refused or ended");
                let refused = FromSeat::Refused { reason: reason(&error) };
                // Whoever asked may have gone.
                let _ = sender.send(encode(&refused), Bytes::new()).await;
            }
        }
        Ok(Opening::Feed { session, seat }) => {
            if let Some(inbox) = inner.seats.inbox((session, seat)) {
                feed(peer, receiver, inbox).await;
            }
        }
        Err(error) => debug!(peer = %peer.short(), %error, "stream without an opening"),
    }
}

/// Passes on what a neighbour sends, until one side ends.
async fn feed(from: NodeId, mut receiver: Receiver, inbox: mpsc::Sender<SeatInput>) {
    while let Ok(Some((header, payload))) = receiver.next().await {
        let Ok(feed) = decode::<Feed>(&header) else { return };
        let payload = payload.to_vec();
        if inbox.send(SeatInput::Fed { from, feed, payload }).await.is_err() {
            return;
        }
    }
}

/// Keeps what is wanted loaded while the worker runs, and the announcement true.
pub(super) async fn keep_loaded(inner: Arc<Inner>) {
    let mut life = inner.device.life();
    let mut announced = None;
    loop {
        let alive = life.borrow_and_update().clone();
        let complete = load_wanted(&inner, &alive).await;
        let held = inner.held();
        if announced.as_ref() != Some(&held) {
            inner.directory.announce(held.clone());
            announced = Some(held);
        }
        let pause = if complete { ANNOUNCE_EVERY } else { TRY_AGAIN };
        tokio::select! {
            () = inner.stop.cancelled() => return,
            () = inner.changed.notified() => {}
            changed = life.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Whether everything wanted is loaded.
async fn load_wanted(inner: &Arc<Inner>, life: &Life) -> bool {
    let number = match *life {
        Life::Running(number) => number,
        Life::Down(_) => 0,
    };
    for left in inner.kept.expire(Instant::now(), number) {
        seat::close(inner, &left).await;
    }
    let Life::Running(life) = *life else {
        inner.lock().loaded.clear();
        return inner.lock().wanted.is_empty();
    };
    let (wanted, stale) = {
        let mut state = inner.lock();
        // What an earlier worker held is gone.
        state.loaded.retain(|_, loaded| loaded.life == life);
        let wanted = state.wanted.clone();
        let stale: Vec<(EpochId, StageId)> = state
            .loaded
            .iter()
            .filter(|(epoch, loaded)| wanted.get(epoch) != Some(&loaded.range))
            .map(|(epoch, loaded)| (*epoch, loaded.stage))
            .collect();
        for (epoch, _) in &stale {
            state.loaded.remove(epoch);
        }
        (wanted, stale)
    };
    for (_, stage) in stale {
        // A worker that died meanwhile has forgotten it too.
        let _ = inner.device.order(Task::Unload { stage }, Bytes::new()).await;
    }
    let mut complete = true;
    for (epoch, range) in wanted {
        if inner.lock().loaded.contains_key(&epoch) {
            continue;
        }
        match load(inner, epoch, range, life).await {
            Ok(loaded) => {
                info!(epoch = %epoch.short(), first = range.first, end = range.end,
                    token_micros = loaded.token_micros, "stage loaded");
                inner.lock().loaded.insert(epoch, loaded);
            }
            Err(error) => {
                complete = false;
                warn!(epoch = %epoch.short(), first = range.first, end = range.end, %error, "stage not loaded");
            }
        }
    }
    complete
}

async fn load(inner: &Inner, id: EpochId, range: BlockRange, life: u64) -> Result<Loaded, ServeError> {
    let epoch = inner.epoch(id)?;
    let blocks = epoch.blocks();
    let mut part_files = Vec::new();
    for part in range.parts(blocks) {
        let part = usize::try_from(part).unwrap_or(usize::MAX);
        let blob = epoch
            .parts
            .get(part)
            .copied()
            .ok_or(ServeError::Range { range, blocks })?;
        part_files.push(inner.blob_file(id, blob, "a part of the model").await?);
    }
    let stage = inner.new_id();
    let task = Task::Load {
        stage,
        config_json: epoch.config_json.clone(),
        range,
        part_files,
        weights: Weights::Packed,
    };
    let device = |what| move |source| ServeError::Device { what, source };
    let (answer, _) = inner
        .device
        .order(task, Bytes::new())
        .await
        .map_err(device("load a stage"))?;
    let Answer::Loaded { hidden, .. } = answer else {
        let source = crate::device::DeviceError::unexpected(&answer);
        return Err(ServeError::Device {
            what: "load a stage",
            source,
        });
    };
    let token_micros = measure(inner, stage, range, hidden)
        .await
        .map_err(device("run a stage"))?;
    Ok(Loaded {
        stage,
        range,
        blocks,
        hidden,
        token_micros,
        life,
    })
}

/// How long one token takes. The first warms up caches, the second counts.
async fn measure(
    inner: &Inner,
    stage: StageId,
    range: BlockRange,
    hidden: u32,
) -> Result<u32, crate::device::DeviceError> {
    let session = u64::MAX;
    let open = Task::OpenSession {
        stage,
        session,
        context_tokens_max: 2,
        earlier: None,
    };
    inner.device.order(open, Bytes::new()).await?;
    let mut micros = 0;
    for position in 0..2 {
        let (tokens, payload) = if range.has_embedding() {
            (vec![0], Bytes::new())
        } else {
            let bytes = usize::try_from(hidden).unwrap_or(0).saturating_mul(4);
            (Vec::new(), Bytes::from(vec![0; bytes]))
        };
        let forward = Task::Forward {
            stage,
            session,
            position,
            tokens,
            sample: Some(Sampling::GREEDY),
            written: Written::default(),
        };
        let began = Instant::now();
        inner.device.order(forward, payload).await?;
        micros = u32::try_from(began.elapsed().as_micros()).unwrap_or(u32::MAX);
    }
    inner
        .device
        .order(Task::CloseSession { stage, session }, Bytes::new())
        .await?;
    Ok(micros)
}
