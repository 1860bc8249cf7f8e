//! What this node's people have asked and been answered, as tokens: the next question that begins alike goes on from the
//! session in which that was computed.
//!
//! It stays in this process, and what one owner asked is looked up for no other.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use polder_protocol::hash::EpochId;
use polder_protocol::route::Hop;
use polder_protocol::session::SessionId;
use tokio::time::Instant;

use super::Owner;

/// Generations that are remembered, at most a context of tokens each.
const PASTS_MAX: usize = 64;

/// As long as stages keep what they computed.
const REMEMBERED_FOR: Duration = Duration::from_secs(15 * 60);

/// Fewer tokens are computed sooner than asked about.
const SHARED_MIN: usize = 16;

/// A generation that has ended.
#[derive(Debug)]
pub(super) struct Past {
    pub(super) owner: Owner,
    pub(super) epoch: EpochId,
    pub(super) session: SessionId,
    /// The prompt and what was generated.
    pub(super) tokens: Vec<u32>,
    /// Who computed it last.
    pub(super) chain: Vec<Hop>,
    pub(super) ended_at: Instant,
}

/// The latest of them.
#[derive(Debug, Default)]
pub(super) struct Pasts {
    // The oldest first.
    all: Mutex<Vec<Past>>,
}

impl Pasts {
    pub(super) fn remember(&self, past: Past) {
        let mut all = self.lock();
        if all.len() >= PASTS_MAX {
            all.remove(0);
        }
        all.push(past);
    }

    /// The generation of the same owner that shares most of its beginning with `prompt`, the latest of several, and how many
    /// tokens that is. It is forgotten: stages give what they have to one session, and no more than the shared beginning. So a
    /// long conversation is not taken for the few words of a template with which another one begins too.
    pub(super) fn take(&self, now: Instant, owner: Owner, epoch: EpochId, prompt: &[u32]) -> Option<(Past, u32)> {
        let mut all = self.lock();
        all.retain(|past| now < past.ended_at + REMEMBERED_FOR);
        let own = all.iter().enumerate();
        let own = own.filter(|(_, past)| past.owner == owner && past.epoch == epoch);
        let shared = |past: &Past| {
            past.tokens
                .iter()
                .zip(prompt)
                .take_while(|(own, asked)| own == asked)
                .count()
        };
        let worth = |(index, past): (usize, &Past)| {
            let shared = shared(past);
            let most = shared * 2 >= past.tokens.len() || shared + 1 >= prompt.len();
            (shared >= SHARED_MIN && most).then_some((shared, index))
        };
        let (shared, index) = own.filter_map(worth).max()?;
        let tokens = u32::try_from(shared).ok()?;
        Some((all.remove(index), tokens))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Past>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn past(owner: u8, session: u8, tokens: &[u32]) -> Past {
        Past {
            owner: Owner([owner; 32]),
            epoch: EpochId([1; 32]),
            session: SessionId([session; 16]),
            tokens: tokens.to_vec(),
            chain: Vec::new(),
            ended_at: Instant::now(),
        }
    }

    #[tokio::test]
    async fn the_longest_beginning_of_the_same_owner_is_found_once() {
        let text: Vec<u32> = (0..100).collect();
        let pasts = Pasts::default();
        pasts.remember(past(1, 1, &text[..40]));
        pasts.remember(past(1, 2, &text[..60]));
        pasts.remember(past(2, 3, &text));
        pasts.remember(past(1, 4, &text[..10]));
        let find = |owner| {
            let found = pasts.take(Instant::now(), Owner([owner; 32]), EpochId([1; 32]), &text);
            found.map(|(past, shared)| (past.session.0[0], shared))
        };
        assert_eq!(find(1), Some((2, 60)));
        assert_eq!(find(1), Some((1, 40)));
        assert_eq!(find(1), None, "ten tokens are too few");
        assert_eq!(find(3), None);
        assert_eq!(find(2), Some((3, 100)));
    }

    #[tokio::test]
    async fn a_long_conversation_is_not_given_for_a_few_words() {
        let text: Vec<u32> = (0..100).collect();
        let pasts = Pasts::default();
        pasts.remember(past(1, 1, &text));
        let other = [&text[..30], &[7; 40]].concat();
        let take = |prompt: &[u32]| pasts.take(Instant::now(), Owner([1; 32]), EpochId([1; 32]), prompt);
        assert!(take(&other).is_none());
        // The same question again, whatever it was answered.
        assert_eq!(take(&text[..30]).map(|(_, shared)| shared), Some(30));
    }

    #[tokio::test]
    async fn what_is_old_or_of_another_epoch_is_not_found() {
        let text: Vec<u32> = (0..100).collect();
        let pasts = Pasts::default();
        pasts.remember(past(1, 1, &text));
        let (now, owner) = (Instant::now(), Owner([1; 32]));
        assert!(pasts.take(now, owner, EpochId([2; 32]), &text).is_none());
        assert!(
            pasts
                .take(now + REMEMBERED_FOR * 2, owner, EpochId([1; 32]), &text)
                .is_none()
        );
        assert!(
            pasts.take(now, owner, EpochId([1; 32]), &text).is_none(),
            "it has been forgotten"
        );
        (0..100).for_each(|session| pasts.remember(past(1, session, &text)));
        assert_eq!(pasts.lock().len(), PASTS_MAX);
    }
}
