//! The directory as serving sees it.

use polder_protocol::directory::StageOffer;
use polder_protocol::hash::{EpochId, NodeId};
use polder_protocol::route::Offer;

use super::DirectoryHandle;
use crate::serve::{Directory, Held};

impl Directory for DirectoryHandle {
    fn offers(&self, epoch: EpochId) -> Vec<Offer> {
        Self::offers(self, epoch)
    }

    fn announce(&self, held: Vec<Held>) {
        let stages = held.into_iter().map(|held| StageOffer {
            epoch: held.epoch,
            range: held.range,
            token_micros: held.token_micros,
            sessions_free: held.sessions_free,
            // A session that asks for more is told so when it reserves its seat.
            context_tokens_max: 0,
        });
        Self::announce(self, stages.collect());
    }

    /// Those who tell of the epoch have its bytes; those who serve it have at least their stage's.
    fn sources(&self, epoch: EpochId) -> Vec<NodeId> {
        let own = self.inner.control.node();
        let tell = self.epochs().into_iter().filter(|known| known.notice.epoch == epoch);
        let serve = Self::offers(self, epoch).into_iter().map(|offer| offer.node);
        let mut nodes: Vec<NodeId> = tell.flat_map(|known| known.holders).chain(serve).collect();
        nodes.sort_unstable();
        nodes.dedup();
        nodes.retain(|node| *node != own);
        nodes
    }
}
