//! The sessions of a stage in pages, those that have ended and may yet be gone on from, and the room of all.

use std::collections::BTreeMap;
use std::fmt::Debug;

use super::StageError;
use super::pages::{Pool, Store, Table};

/// What one session keeps of a stage.
pub(in crate::stage) trait Sequence: Debug + Sized {
    /// Where its pages are made.
    type Store: Store;

    /// Its pages.
    fn table(&mut self) -> &mut Table<<Self::Store as Store>::Page>;

    /// A sequence that goes on from the first `end` positions of this one, and shares their pages.
    fn fork(&self, end: usize) -> Self;

    /// The earliest position, besides zero, from which the session can go on.
    fn earliest(&self) -> usize;
}

/// Rows of one session in a batch.
#[derive(Debug)]
pub(in crate::stage) struct Span<'a, Q> {
    /// What the session keeps.
    pub(in crate::stage) sequence: &'a mut Q,
    /// Of the first row.
    pub(in crate::stage) position: usize,
    /// How many.
    pub(in crate::stage) rows: usize,
}

/// The sequences of a stage, in one pool of pages.
///
/// Open sessions are sure of their pages: the stage opens none whose context would not fit beside the contexts of the
/// others. What they have not taken yet is lent to ended ones, of which the one that was left longest goes first.
#[derive(Debug)]
pub(in crate::stage) struct Sessions<Q: Sequence> {
    pool: Pool<Q::Store>,
    state_bytes: u64,
    bytes_max: u64,
    open: BTreeMap<u64, Q>,
    ended: BTreeMap<u64, Ended<Q>>,
    /// Counts endings and resumptions.
    clock: u64,
}

#[derive(Debug)]
struct Ended<Q> {
    sequence: Q,
    reached: usize,
    /// When it was used last.
    used: u64,
}

impl<Q: Sequence> Sessions<Q> {
    /// None yet, with pages of `pool` and so many bytes of state besides, however long a session is.
    pub(in crate::stage) fn new(pool: Pool<Q::Store>, state_bytes: u64) -> Self {
        Self {
            pool,
            state_bytes,
            bytes_max: u64::MAX,
            open: BTreeMap::new(),
            ended: BTreeMap::new(),
            clock: 0,
        }
    }

    /// Sets how many bytes all sequences may take together.
    pub(in crate::stage) fn set_bytes_max(&mut self, bytes: u64) {
        self.bytes_max = bytes;
        self.make_room(0, 0);
    }

    /// Bytes that are taken now, those of ended sessions included.
    pub(in crate::stage) fn bytes(&self) -> u64 {
        self.pool.held() as u64 * self.pool.page_bytes() + self.states()
    }

    /// Where the pages are.
    #[cfg(feature = "gpu")]
    pub(in crate::stage) const fn store(&self) -> &Q::Store {
        self.pool.store()
    }

    /// Opens a session that is not open, with what it keeps before its first position.
    pub(in crate::stage) fn open(&mut self, session: u64, first: Q) {
        self.make_room(0, self.state_bytes);
        self.open.insert(session, first);
    }

    /// Opens a session that is not open, and goes on from another that is open or has ended: from its first `positions`
    /// positions, or as many as it has. Tells how many; zero where that session is gone or cannot go back so far.
    pub(in crate::stage) fn open_from(
        &mut self,
        session: u64,
        from: u64,
        reached: usize,
        positions: usize,
        first: impl FnOnce() -> Q,
    ) -> usize {
        self.clock += 1;
        // Used now, so room is made at the cost of others first.
        if let Some(ended) = self.ended.get_mut(&from) {
            ended.used = self.clock;
        }
        self.make_room(0, self.state_bytes);
        let (source, reached) = match (self.open.get(&from), self.ended.get(&from)) {
            (Some(open), _) => (Some(open), reached),
            (None, Some(ended)) => (Some(&ended.sequence), ended.reached),
            (None, None) => (None, 0),
        };
        let positions = positions.min(reached);
        let (sequence, taken) = match source.filter(|source| positions > 0 && source.earliest() <= positions) {
            Some(source) => (source.fork(positions), positions),
            None => (first(), 0),
        };
        self.open.insert(session, sequence);
        taken
    }

    /// Frees what a session has, open or ended.
    pub(in crate::stage) fn close(&mut self, session: u64) {
        let ended = self.ended.remove(&session).map(|ended| ended.sequence);
        for mut sequence in ended.into_iter().chain(self.open.remove(&session)) {
            sequence.table().truncate(&mut self.pool, 0);
        }
    }

    /// Ends a session that has `reached` positions, and keeps them until there is need of the room.
    pub(in crate::stage) fn end(&mut self, session: u64, reached: usize) {
        let Some(mut sequence) = self.open.remove(&session) else {
            return;
        };
        sequence.table().truncate(&mut self.pool, reached);
        if reached == 0 {
            return;
        }
        self.clock += 1;
        let used = self.clock;
        let ended = Ended {
            sequence,
            reached,
            used,
        };
        self.ended.insert(session, ended);
        self.make_room(0, 0);
    }

    /// Frees what a session holds from `position` on.
    pub(in crate::stage) fn truncate(&mut self, session: u64, position: usize) {
        if let Some(sequence) = self.open.get_mut(&session) {
            sequence.table().truncate(&mut self.pool, position);
        }
    }

    /// The earliest position, besides zero, from which a session can go on.
    pub(in crate::stage) fn earliest(&self, session: u64) -> usize {
        self.open.get(&session).map_or(0, Q::earliest)
    }

    /// A session whose positions `position .. end` are ready to be written.
    ///
    /// # Errors
    ///
    /// [`StageError`] where there is no room; what the session holds is as before.
    pub(in crate::stage) fn ready(&mut self, session: u64, position: usize, end: usize) -> Result<&mut Q, StageError> {
        let closed = StageError::NoSession { session };
        let pages = self
            .open
            .get_mut(&session)
            .map_or(0, |open| open.table().lacks(position, end));
        if pages > 0 {
            self.make_room(pages, 0);
        }
        let sequence = self.open.get_mut(&session).ok_or(closed)?;
        sequence.table().ready(&mut self.pool, position, end)?;
        Ok(sequence)
    }

    /// Runs `work` over rows of several sessions at once, `(session, position, rows)` each, all of which are open.
    ///
    /// # Errors
    ///
    /// As [`Sessions::ready`]; no session has changed then.
    pub(in crate::stage) fn together<T>(
        &mut self,
        steps: &[(u64, usize, usize)],
        work: impl FnOnce(&Q::Store, &mut [Span<'_, Q>]) -> T,
    ) -> Result<T, StageError> {
        for (session, position, rows) in steps {
            self.ready(*session, *position, position + rows)?;
        }
        let mut taken = Vec::with_capacity(steps.len());
        for (session, position, rows) in steps {
            let Some(sequence) = self.open.remove(session) else {
                break;
            };
            taken.push((*session, *position, *rows, sequence));
        }
        let spans = taken.iter_mut().map(|(_, position, rows, sequence)| Span {
            sequence,
            position: *position,
            rows: *rows,
        });
        let mut spans: Vec<_> = spans.collect();
        let done = match steps.get(spans.len()) {
            None => Ok(work(self.pool.store(), &mut spans)),
            // It comes twice.
            Some((session, ..)) => Err(StageError::NoSession { session: *session }),
        };
        self.open
            .extend(taken.into_iter().map(|(session, _, _, sequence)| (session, sequence)));
        done
    }

    fn states(&self) -> u64 {
        (self.open.len() + self.ended.len()) as u64 * self.state_bytes
    }

    /// Lets ended sessions go until so many more pages and bytes of states fit, or none is left.
    fn make_room(&mut self, pages: usize, state_bytes: u64) {
        let page_bytes = self.pool.page_bytes().max(1);
        loop {
            let wanted = (self.pool.held() + pages) as u64 * page_bytes + self.states() + state_bytes;
            let oldest = self.ended.iter().min_by_key(|(_, ended)| ended.used);
            let Some(oldest) = oldest.map(|(session, _)| *session) else {
                break;
            };
            if wanted <= self.bytes_max {
                break;
            }
            self.close(oldest);
        }
        let rest = self.bytes_max.saturating_sub(self.states() + state_bytes);
        self.pool
            .shrink(usize::try_from(rest / page_bytes).unwrap_or(usize::MAX));
    }
}
