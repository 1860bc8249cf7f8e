//! Serving: stages that this node holds for others, and the gateway through which its own people ask.
//!
//! Both sides drive the machines of [`polder_protocol::session`] over streams of the data plane. A stage on this very
//! node is spoken to in the same way, over a channel instead of a connection.

mod gateway;
mod host;
mod kept;
pub(crate) mod marks;
mod past;
mod seat;
mod streams;
#[cfg(test)]
pub(crate) mod tests;
mod text;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use polder_protocol::epoch::Epoch;
use polder_protocol::hash::{EpochId, InstitutionId, NodeId};
use polder_protocol::layout::BlockRange;
use polder_protocol::route::Offer;
use polder_protocol::work::{StageId, TextId};
use thiserror::Error;
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::data::{BlobStore, DataPlane, FetchError};
use crate::device::{Device, DeviceError};
pub use gateway::{Event, GenerateRequest, Named, Reason, Usage};
use host::Seats;
use kept::Kept;
use past::Pasts;
use streams::Streams;

/// Who serves what. The daemon answers from the control plane's announcements.
pub trait Directory: Send + Sync + 'static {
    /// Stages of `epoch` that others announce. Latencies may be left at zero: the gateway knows its connections.
    fn offers(&self, epoch: EpochId) -> Vec<Offer>;

    /// Tells others what this node holds now, instead of what it held before. An empty list takes everything back.
    fn announce(&self, held: Vec<Held>);

    /// Nodes that may have the blobs of `epoch`; those that serve it by default.
    fn sources(&self, epoch: EpochId) -> Vec<NodeId> {
        self.offers(epoch).iter().map(|offer| offer.node).collect()
    }
}

/// Whose question it is, among those who may ask this node: a hash of whatever tells them apart. It does not leave the
/// process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner(pub [u8; 32]);

/// A stage that this node holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Of which epoch.
    pub epoch: EpochId,
    /// Which blocks.
    pub range: BlockRange,
    /// Measured time for one token.
    pub token_micros: u32,
    /// Room for so many more sessions.
    pub sessions_free: u32,
}

/// How serving is set up.
#[derive(Debug, Clone)]
pub struct ServeConfig {
    /// This node's institution.
    pub institution: InstitutionId,
    /// Sessions of others and of this node that its stages hold at once. Each takes KV cache for its whole context.
    pub sessions_max: u32,
    /// Generations that this node's people have under way at once.
    pub generations_max: usize,
    /// The longest context of one session, where the model allows more.
    pub context_tokens_max: u32,
    /// How long a generation waits for what.
    pub limits: polder_protocol::session::Limits,
}

impl ServeConfig {
    /// The defaults for a node of `institution`.
    pub fn new(institution: InstitutionId) -> Self {
        Self {
            institution,
            sessions_max: 16,
            generations_max: 16,
            // What an ordinary conversation needs; room for all of it is promised when it begins.
            context_tokens_max: 4_096,
            limits: polder_protocol::session::Limits::default(),
        }
    }
}

/// Why serving failed. The text is for people.
#[derive(Debug, Clone, Error)]
pub enum ServeError {
    /// A model that this node has not heard of.
    #[error("no model `{name}` is known here: `polder status` and /v1/models list those that are")]
    UnknownEpoch {
        /// What was asked for.
        name: String,
    },
    /// A range that the model does not have, or that is empty.
    #[error("blocks {} to {} are no stage of a model of {blocks} blocks", range.first, range.end)]
    Range {
        /// What was asked for.
        range: BlockRange,
        /// Blocks of the model.
        blocks: u32,
    },
    /// What was asked makes no sense.
    #[error("{reason}")]
    Request {
        /// Why.
        reason: String,
    },
    /// As many generations as are allowed are under way.
    #[error("{limit} generations are under way here, which is the limit")]
    Busy {
        /// The limit.
        limit: usize,
    },
    /// A blob could not be fetched.
    #[error("cannot fetch {what}: {source}")]
    Fetch {
        /// What it is.
        what: &'static str,
        /// Why.
        source: FetchError,
    },
    /// The worker could not.
    #[error("the worker could not {what}: {source}")]
    Device {
        /// What it was to do.
        what: &'static str,
        /// Why.
        source: DeviceError,
    },
    /// The generation could not go on.
    #[error("{reason}")]
    GaveUp {
        /// Why.
        reason: String,
    },
}

/// Serving on this node. Clones are the same.
#[derive(Clone)]
pub struct ServeHandle {
    inner: Arc<Inner>,
}

struct Inner {
    config: ServeConfig,
    data: DataPlane,
    blobs: BlobStore,
    device: Device,
    directory: Arc<dyn Directory>,
    streams: Streams,
    seats: Seats,
    // What ended sessions left at this node's stages, and what this node's people asked before.
    kept: Kept,
    pasts: Pasts,
    generations: Semaphore,
    // Wakes the task that loads stages.
    changed: Notify,
    state: Mutex<State>,
    stop: CancellationToken,
}

#[derive(Default)]
struct State {
    epochs: BTreeMap<EpochId, Arc<Epoch>>,
    wanted: BTreeMap<EpochId, BlockRange>,
    loaded: BTreeMap<EpochId, Loaded>,
    texts: BTreeMap<EpochId, (TextId, u64)>,
    ids: u32,
}

/// A stage in the worker.
#[derive(Debug, Clone, Copy)]
struct Loaded {
    stage: StageId,
    range: BlockRange,
    blocks: u32,
    hidden: u32,
    token_micros: u32,
    // The worker's life in which it was loaded.
    life: u64,
}

/// Starts to serve. Call it within a tokio runtime.
pub fn start(
    config: ServeConfig,
    directory: Arc<dyn Directory>,
    data: DataPlane,
    blobs: BlobStore,
    device: Device,
) -> ServeHandle {
    let (streams, incoming_here) = Streams::new(data.clone());
    let inner = Arc::new(Inner {
        generations: Semaphore::new(config.generations_max),
        config,
        data,
        blobs,
        device,
        directory,
        streams,
        seats: Seats::default(),
        kept: Kept::default(),
        pasts: Pasts::default(),
        changed: Notify::new(),
        state: Mutex::default(),
        stop: CancellationToken::new(),
    });
    tokio::spawn(host::accept(Arc::clone(&inner), incoming_here));
    tokio::spawn(host::keep_loaded(Arc::clone(&inner)));
    ServeHandle { inner }
}

impl std::fmt::Debug for ServeHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServeHandle")
            .field("held", &self.held())
            .finish_non_exhaustive()
    }
}

impl ServeHandle {
    /// Makes an epoch known, so that it can be held and asked.
    pub fn learn(&self, epoch: Epoch) -> EpochId {
        let id = epoch.id();
        self.inner.lock().epochs.entry(id).or_insert_with(|| Arc::new(epoch));
        id
    }

    /// Whether an epoch is known.
    pub fn knows(&self, epoch: EpochId) -> bool {
        self.inner.lock().epochs.contains_key(&epoch)
    }

    /// Whether this node holds a stage of an epoch, or is about to.
    pub fn wants(&self, epoch: EpochId) -> bool {
        self.inner.lock().wanted.contains_key(&epoch)
    }

    /// The epochs that are known, with whether a chain for them is there now.
    pub fn models(&self) -> Vec<(EpochId, Arc<Epoch>, bool)> {
        let epochs: Vec<_> = self
            .inner
            .lock()
            .epochs
            .iter()
            .map(|(id, epoch)| (*id, Arc::clone(epoch)))
            .collect();
        let served = |(id, epoch): (EpochId, Arc<Epoch>)| {
            let is_served = self.inner.has_chain(id, epoch.blocks());
            (id, epoch, is_served)
        };
        epochs.into_iter().map(served).collect()
    }

    /// Finds an epoch by its id or by its name. Of several of one name, one that is served wins, then the latest child.
    ///
    /// # Errors
    ///
    /// [`ServeError::UnknownEpoch`].
    pub fn find(&self, name: &str) -> Result<EpochId, ServeError> {
        let models = self.models();
        let named = models
            .iter()
            .filter(|(id, epoch, _)| epoch.name == name || id.to_string() == name);
        let is_parent = |of: EpochId| models.iter().any(|(_, epoch, _)| epoch.parent == Some(of));
        let best = named.max_by_key(|(id, _, served)| (*served, !is_parent(*id), *id));
        best.map(|(id, ..)| *id)
            .ok_or_else(|| ServeError::UnknownEpoch { name: name.to_owned() })
    }

    /// Holds a stage of a known epoch from now on: fetches its parts, loads it whenever the worker runs, and announces
    /// it. Another range of the same epoch takes its place.
    ///
    /// # Errors
    ///
    /// [`ServeError::UnknownEpoch`], [`ServeError::Range`]. Later failures are logged and tried again.
    pub fn hold(&self, epoch: EpochId, range: BlockRange) -> Result<(), ServeError> {
        let blocks = self.inner.epoch(epoch)?.blocks();
        if !range.fits(blocks) {
            return Err(ServeError::Range { range, blocks });
        }
        self.inner.lock().wanted.insert(epoch, range);
        self.inner.changed.notify_one();
        Ok(())
    }

    /// Holds whatever stage of `epoch` is needed most, of at most `capacity_blocks` blocks. `None` where there is no
    /// room for one block.
    ///
    /// # Errors
    ///
    /// As [`ServeHandle::hold`].
    pub fn hold_most_needed(&self, epoch: EpochId, capacity_blocks: u32) -> Result<Option<BlockRange>, ServeError> {
        let blocks = self.inner.epoch(epoch)?.blocks();
        let own = self.inner.data.node();
        let offers = self.inner.directory.offers(epoch);
        let held: Vec<BlockRange> = offers
            .iter()
            .filter(|offer| offer.node != own)
            .map(|offer| offer.range)
            .collect();
        let Some(range) = polder_protocol::placement::place(blocks, &held, capacity_blocks) else {
            return Ok(None);
        };
        self.hold(epoch, range)?;
        Ok(Some(range))
    }

    /// Whether this node should choose its stage of `epoch` anew, as [`polder_protocol::placement::should_move`] says.
    /// While sessions sit on its stages it stays, unless a chain lacks a stage altogether.
    pub fn should_move(&self, epoch: EpochId) -> bool {
        let Ok(blocks) = self.inner.epoch(epoch).map(|epoch| epoch.blocks()) else {
            return false;
        };
        let Some(own) = self.inner.lock().wanted.get(&epoch).copied() else {
            return false;
        };
        if self.sessions() > 0 && self.inner.has_chain(epoch, blocks) {
            return false;
        }
        let offers = self.inner.directory.offers(epoch);
        let offers: Vec<_> = offers.iter().map(|offer| (offer.node, offer.range)).collect();
        polder_protocol::placement::should_move(blocks, self.inner.data.node(), own, &offers)
    }

    /// Holds a stage of `epoch` no longer. Its sessions end.
    pub fn release(&self, epoch: EpochId) {
        self.inner.lock().wanted.remove(&epoch);
        self.inner.changed.notify_one();
    }

    /// What is loaded and announced now.
    pub fn held(&self) -> Vec<Held> {
        self.inner.held()
    }

    /// By how many nodes the least held block of an epoch is held, this one included. From two on, the loss of any one
    /// node loses no generation.
    pub fn holders_min(&self, epoch: EpochId, blocks: u32) -> usize {
        let offers = self.inner.offers(epoch);
        let holders = |block: u32| {
            let holds = |offer: &&Offer| offer.range.first <= block && block < offer.range.end;
            offers.iter().filter(holds).count()
        };
        (0..blocks).map(holders).min().unwrap_or(0)
    }

    /// Sessions that the stages of this node hold now.
    pub fn sessions(&self) -> usize {
        self.inner.seats.len()
    }

    /// Takes everything back: announces nothing, and ends all sessions.
    pub fn stop(&self) {
        self.inner.stop.cancel();
        self.inner.directory.announce(Vec::new());
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn epoch(&self, id: EpochId) -> Result<Arc<Epoch>, ServeError> {
        let found = self.lock().epochs.get(&id).cloned();
        found.ok_or_else(|| ServeError::UnknownEpoch { name: id.to_string() })
    }

    fn held(&self) -> Vec<Held> {
        let taken = u32::try_from(self.seats.len()).unwrap_or(u32::MAX);
        let sessions_free = self.config.sessions_max.saturating_sub(taken);
        let loaded = self.lock().loaded.clone();
        let held = |(epoch, loaded): (EpochId, Loaded)| Held {
            epoch,
            range: loaded.range,
            token_micros: loaded.token_micros,
            sessions_free,
        };
        loaded.into_iter().map(held).collect()
    }

    /// What others and this node offer, with latencies as far as known.
    fn offers(&self, epoch: EpochId) -> Vec<Offer> {
        let own = self.data.node();
        let mut offers = self.directory.offers(epoch);
        offers.retain(|offer| offer.node != own);
        for offer in &mut offers {
            if let Some(round_trip) = self.data.round_trip(offer.node, crate::data::Class::Act) {
                offer.latency_micros = u32::try_from(round_trip.as_micros() / 2).unwrap_or(u32::MAX);
            }
        }
        let held = self.held();
        offers.extend(held.iter().filter(|held| held.epoch == epoch).map(|held| Offer {
            node: own,
            institution: self.config.institution,
            range: held.range,
            token_micros: held.token_micros,
            latency_micros: 0,
            sessions_free: held.sessions_free,
        }));
        offers
    }

    fn has_chain(&self, epoch: EpochId, blocks: u32) -> bool {
        use polder_protocol::route::{RoutePolicy, choose};
        let nobody = std::collections::BTreeSet::new();
        let whole = BlockRange::whole(blocks);
        choose(&self.offers(epoch), whole, blocks, &RoutePolicy::default(), &nobody).is_some()
    }

    /// The file of a blob, fetched from those who serve the epoch where this node lacks it.
    async fn blob_file(
        &self,
        epoch: EpochId,
        blob: polder_protocol::hash::BlobId,
        what: &'static str,
    ) -> Result<String, ServeError> {
        let path = match self.blobs.path(blob) {
            Some(path) => path,
            None => {
                let sources = self.directory.sources(epoch);
                let fetched = self.data.fetch(blob, &sources).await;
                fetched.map_err(|source| ServeError::Fetch { what, source })?
            }
        };
        let text = path.into_os_string().into_string();
        text.map_err(|path| ServeError::Request {
            reason: format!("the path of a blob is not UTF-8: {}", path.display()),
        })
    }

    fn new_id(&self) -> u32 {
        let mut state = self.lock();
        state.ids = state.ids.wrapping_add(1);
        // Training numbers its stages from 0 on; serving keeps to the upper half.
        state.ids | 1 << 31
    }
}
