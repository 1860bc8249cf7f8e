//! Where the stages of a chain find each other: streams that came before the job which needs them wait here.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use polder_protocol::hash::{NodeId, RunId};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use super::world::Link;

/// Streams that wait. The oldest goes when another comes: a node is in one chain at a time.
const WAITING_MAX: usize = 16;

/// What the opener of a stream says: which round of which replica, and which stage it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Opening {
    pub(super) run: RunId,
    pub(super) round: u64,
    pub(super) replica: u64,
    pub(super) stage: u32,
}

/// A stream that waits: who opened it, what for.
type Waiting = (NodeId, Opening, Box<dyn Link>);

/// Streams that wait for their job.
#[derive(Default)]
pub(super) struct Meeting {
    waiting: Mutex<VecDeque<Waiting>>,
    came: Notify,
}

impl Meeting {
    /// Takes a stream that a peer opened. A newer one for the same purpose replaces an older one.
    pub(super) fn offer(&self, from: NodeId, opening: Opening, link: Box<dyn Link>) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.retain(|(peer, other, _)| (peer, other) != (&from, &opening));
        if waiting.len() >= WAITING_MAX {
            waiting.pop_front();
        }
        waiting.push_back((from, opening, link));
        drop(waiting);
        self.came.notify_waiters();
    }

    /// Waits for the stream that `from` opens; `None` when it does not come in time.
    pub(super) async fn wait(&self, from: NodeId, opening: Opening, patience: Duration) -> Option<Box<dyn Link>> {
        let meet = async {
            loop {
                let came = self.came.notified();
                tokio::pin!(came);
                // From here on a call of `offer` wakes it, so none is missed after the look.
                came.as_mut().enable();
                if let Some(link) = self.take(from, opening) {
                    return link;
                }
                came.await;
            }
        };
        tokio::time::timeout(patience, meet).await.ok()
    }

    fn take(&self, from: NodeId, opening: Opening) -> Option<Box<dyn Link>> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let place = waiting
            .iter()
            .position(|(peer, other, _)| (*peer, *other) == (from, opening))?;
        waiting.remove(place).map(|(_, _, link)| link)
    }
}
