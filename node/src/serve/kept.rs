//! Sessions that have ended at this node's stages, and what their seats sent: whoever asked them may go on from them.
//!
//! Nobody else may, and nobody else can tell: a session is found by its random name and by the node that asked, as its
//! connection proved. What somebody else has asked before makes no answer quicker.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use polder_protocol::hash::NodeId;
use polder_protocol::session::{Journal, SessionId};
use polder_protocol::work::StageId;
use tokio::time::Instant;

/// Sessions that are kept. The worker holds fewer where it needs the room.
const KEPT_MAX: usize = 64;

/// Of one gateway: its people's conversations, and not everybody else's places.
const KEPT_OF_ONE_MAX: usize = 16;

/// What the kept sessions have sent, in all: 8,192 positions of a model 8,192 wide.
const JOURNAL_BYTES_MAX: usize = 256 << 20;

/// Longer than somebody thinks about an answer; what nobody comes back to is not kept for ever.
const KEPT_FOR: Duration = Duration::from_secs(15 * 60);

/// Whose, and which.
pub(super) type Key = (NodeId, SessionId);

/// What is left of a seat.
#[derive(Debug)]
pub(super) struct Left {
    /// In the worker.
    pub(super) stage: StageId,
    pub(super) session: u64,
    /// The worker's life.
    pub(super) life: u64,
    pub(super) journal: Journal,
}

/// At most so many as the limits above say.
#[derive(Debug, Default)]
pub(super) struct Kept {
    sessions: Mutex<BTreeMap<Key, (Instant, Left)>>,
}

impl Kept {
    /// Keeps a session. Answers with those that are not kept any longer.
    pub(super) fn keep(&self, now: Instant, key: Key, left: Left) -> Vec<Left> {
        let mut sessions = self.lock();
        let replaced = sessions.insert(key, (now, left)).map(|(_, left)| left);
        let mut gone: Vec<Left> = replaced.into_iter().collect();
        loop {
            let own = sessions.keys().filter(|(owner, _)| *owner == key.0).count();
            let bytes: usize = sessions.values().map(|(_, left)| left.journal.bytes()).sum();
            let of_all = sessions.len() > KEPT_MAX || bytes > JOURNAL_BYTES_MAX;
            if !of_all && own <= KEPT_OF_ONE_MAX {
                return gone;
            }
            // Who has too many gives one of his own.
            let may_go = sessions
                .iter()
                .filter(|((owner, _), _)| own <= KEPT_OF_ONE_MAX || *owner == key.0);
            let oldest = may_go.min_by_key(|(_, (since, _))| *since).map(|(key, _)| *key);
            match oldest.and_then(|oldest| sessions.remove(&oldest)) {
                Some((_, left)) => gone.push(left),
                None => return gone,
            }
        }
    }

    /// Takes a session that was kept for whoever asks, in this stage of this life of the worker.
    pub(super) fn take(&self, key: Key, stage: StageId, life: u64) -> Option<Left> {
        let (_, left) = self.lock().remove(&key)?;
        (left.stage == stage && left.life == life).then_some(left)
    }

    /// Those that nobody came back to, or that an earlier worker had.
    pub(super) fn expire(&self, now: Instant, life: u64) -> Vec<Left> {
        let mut sessions = self.lock();
        let expired = |(since, left): &(Instant, Left)| now >= *since + KEPT_FOR || left.life != life;
        let gone = sessions.iter().filter(|(_, kept)| expired(kept));
        let gone: Vec<Key> = gone.map(|(key, _)| *key).collect();
        gone.iter()
            .filter_map(|key| sessions.remove(key))
            .map(|(_, left)| left)
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, (Instant, Left)>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left(session: u64) -> Left {
        Left {
            stage: 1,
            session,
            life: 1,
            journal: Journal::new(4, 8),
        }
    }

    fn key(owner: u8, session: u8) -> Key {
        (NodeId([owner; 32]), SessionId([session; 16]))
    }

    #[tokio::test]
    async fn a_session_is_its_owners_alone_and_taken_once() {
        let kept = Kept::default();
        assert!(kept.keep(Instant::now(), key(1, 1), left(7)).is_empty());
        assert!(kept.take(key(2, 1), 1, 1).is_none());
        assert_eq!(kept.take(key(1, 1), 1, 1).map(|left| left.session), Some(7));
        assert!(kept.take(key(1, 1), 1, 1).is_none());
        kept.keep(Instant::now(), key(1, 1), left(7));
        assert!(kept.take(key(1, 1), 1, 2).is_none(), "the worker is another");
    }

    #[tokio::test]
    async fn who_has_many_gives_his_own_and_age_ends_all() {
        let kept = Kept::default();
        let now = Instant::now();
        kept.keep(now, key(1, 0), left(100));
        let gone: Vec<u64> = (0..=KEPT_OF_ONE_MAX as u8)
            .flat_map(|session| {
                kept.keep(
                    now + Duration::from_secs(session.into()),
                    key(2, session),
                    left(session.into()),
                )
            })
            .map(|left| left.session)
            .collect();
        assert_eq!(gone, [0]);
        for owner in 3..8 {
            for session in 0..KEPT_OF_ONE_MAX as u8 {
                kept.keep(now + Duration::from_secs(60), key(owner, session), left(0));
            }
        }
        assert_eq!(kept.lock().len(), KEPT_MAX);
        assert!(kept.take(key(1, 0), 1, 1).is_none(), "the oldest of all is gone");
        assert_eq!(kept.expire(now + Duration::from_secs(61) + KEPT_FOR, 1).len(), KEPT_MAX);
        assert!(kept.lock().is_empty());
    }
}
