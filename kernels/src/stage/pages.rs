//! Pages of a stage's cache: a pool that has them made as they are needed, and the tables by which sessions hold them.
//!
//! A page holds [`PAGE_POSITIONS`] positions of all sublayers of a stage, so a session takes one page at a time and not one
//! for each block. Several sessions may hold the same page; whoever writes to it takes a copy first (Kwon et al. 2023,
//! PagedAttention). What a page is, memory of the machine or a place on a device, is its [`Store`]'s.

use std::fmt::Debug;
use std::sync::Arc;

use super::StageError;

/// Positions of a page: what a session takes and does not use is half of it on average. It is a multiple of the 16
/// positions whose keys are turned together, and long enough that going from page to page does not show beside the
/// products within.
pub(in crate::stage) const PAGE_POSITIONS: usize = 64;

/// Where pages are made.
pub(in crate::stage) trait Store: Debug {
    /// A page, which one session or several hold.
    type Page: Debug;

    /// Bytes of a page.
    fn page_bytes(&self) -> u64;

    /// A page more. What it holds does not matter: nobody reads a position that it has not written.
    ///
    /// # Errors
    ///
    /// [`StageError`] where there is no room for it.
    fn make(&mut self) -> Result<Self::Page, StageError>;

    /// Makes `to` what `from` is.
    ///
    /// # Errors
    ///
    /// [`StageError`] where the device failed.
    fn copy(&mut self, from: &Self::Page, to: &mut Self::Page) -> Result<(), StageError>;

    /// Takes back a page that nobody will use.
    fn unmake(&mut self, page: Self::Page);
}

/// Has pages made, and keeps those that nobody holds.
#[derive(Debug)]
pub(in crate::stage) struct Pool<S: Store> {
    store: S,
    // Nobody else holds these.
    free: Vec<Arc<S::Page>>,
    made: usize,
}

impl<S: Store> Pool<S> {
    /// Of a store that has made none.
    pub(in crate::stage) const fn new(store: S) -> Self {
        Self {
            store,
            free: Vec::new(),
            made: 0,
        }
    }

    /// Where the pages are.
    pub(in crate::stage) const fn store(&self) -> &S {
        &self.store
    }

    /// Bytes of a page.
    pub(in crate::stage) fn page_bytes(&self) -> u64 {
        self.store.page_bytes()
    }

    /// Pages that are held.
    pub(in crate::stage) fn held(&self) -> usize {
        self.made - self.free.len()
    }

    /// Lets free pages go until there are `pages` in all, or no free one is left.
    pub(super) fn shrink(&mut self, pages: usize) {
        let excess = self.made.saturating_sub(pages).min(self.free.len());
        for page in self.free.split_off(self.free.len() - excess) {
            if let Ok(page) = Arc::try_unwrap(page) {
                self.store.unmake(page);
            }
        }
        self.made -= excess;
    }

    fn take(&mut self) -> Result<Arc<S::Page>, StageError> {
        if let Some(page) = self.free.pop() {
            return Ok(page);
        }
        let page = Arc::new(self.store.make()?);
        self.made += 1;
        Ok(page)
    }

    fn give(&mut self, mut page: Arc<S::Page>) {
        // Whoever still holds it gives it back later.
        if Arc::get_mut(&mut page).is_some() {
            self.free.push(page);
        }
    }
}

/// The pages of one session, from position 0 on without a gap.
#[derive(Debug)]
pub(in crate::stage) struct Table<P>(Vec<Arc<P>>);

impl<P> Default for Table<P> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<P: Debug> Table<P> {
    /// The pages, for reading and for writing where [`Table::ready`] was told so.
    pub(in crate::stage) fn pages(&mut self) -> &mut [Arc<P>] {
        &mut self.0
    }

    /// Pages that [`Table::ready`] will take.
    pub(super) fn lacks(&mut self, position: usize, end: usize) -> usize {
        let (first, end) = (position / PAGE_POSITIONS, end.div_ceil(PAGE_POSITIONS));
        let held = self.0.iter_mut().take(end).skip(first);
        let shared = held.filter_map(|page| Arc::get_mut(page).is_none().then_some(()));
        shared.count() + end.saturating_sub(self.0.len())
    }

    /// Makes positions `position .. end` ready to be written.
    ///
    /// # Errors
    ///
    /// [`StageError`] where there is no room for them; what the session holds is as before.
    pub(in crate::stage) fn ready<S: Store<Page = P>>(
        &mut self,
        pool: &mut Pool<S>,
        position: usize,
        end: usize,
    ) -> Result<(), StageError> {
        let first = position / PAGE_POSITIONS;
        for page in self.0.iter_mut().take(end.div_ceil(PAGE_POSITIONS)).skip(first) {
            if Arc::get_mut(page).is_none() {
                let mut own = pool.take()?;
                if let Some(own) = Arc::get_mut(&mut own) {
                    pool.store.copy(page, own)?;
                }
                pool.give(std::mem::replace(page, own));
            }
        }
        while self.0.len() < end.div_ceil(PAGE_POSITIONS) {
            self.0.push(pool.take()?);
        }
        Ok(())
    }

    /// Gives back the pages that hold nothing before `position`.
    pub(in crate::stage) fn truncate<S: Store<Page = P>>(&mut self, pool: &mut Pool<S>, position: usize) {
        let kept = position.div_ceil(PAGE_POSITIONS).min(self.0.len());
        self.0.drain(kept..).for_each(|page| pool.give(page));
    }

    /// A table of the same pages, as far as they hold positions before `end`.
    pub(in crate::stage) fn share(&self, end: usize) -> Self {
        let pages = self.0.iter().take(end.div_ceil(PAGE_POSITIONS));
        Self(pages.cloned().collect())
    }
}

/// Positions of one page among those of a forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::stage) struct Run {
    /// Which page of the table.
    pub(in crate::stage) page: usize,
    /// The first position within the page.
    pub(in crate::stage) at: usize,
    /// How many lie before it in the range that was asked for.
    pub(in crate::stage) offset: usize,
    /// How many.
    pub(in crate::stage) count: usize,
}

/// The positions `first .. end`, page by page.
pub(in crate::stage) fn runs(first: usize, end: usize) -> impl Iterator<Item = Run> {
    let pages = first / PAGE_POSITIONS..end.div_ceil(PAGE_POSITIONS).max(first / PAGE_POSITIONS);
    pages.map(move |page| {
        let start = (page * PAGE_POSITIONS).max(first);
        Run {
            page,
            at: start - page * PAGE_POSITIONS,
            offset: start - first,
            count: ((page + 1) * PAGE_POSITIONS).min(end) - start,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages of one number.
    #[derive(Debug)]
    struct Numbers;

    impl Store for Numbers {
        type Page = u8;

        fn page_bytes(&self) -> u64 {
            1
        }

        fn make(&mut self) -> Result<u8, StageError> {
            Ok(0)
        }

        fn copy(&mut self, from: &u8, to: &mut u8) -> Result<(), StageError> {
            *to = *from;
            Ok(())
        }

        fn unmake(&mut self, _page: u8) {}
    }

    #[test]
    fn runs_cover_a_range_without_a_gap() {
        for (first, end) in [(0, 0), (0, 1), (3, 64), (64, 65), (63, 200), (70, 70), (128, 192)] {
            let mut next = first;
            for run in runs(first, end) {
                assert_eq!(run.page * PAGE_POSITIONS + run.at, next);
                assert_eq!((run.offset, run.at + run.count <= PAGE_POSITIONS), (next - first, true));
                next += run.count;
            }
            assert_eq!(next, end);
        }
    }

    #[test]
    fn a_table_takes_what_it_uses_and_gives_it_back() {
        let mut pool = Pool::new(Numbers);
        let mut table = Table::default();
        assert_eq!(table.ready(&mut pool, 0, 1), Ok(()));
        assert_eq!(pool.held(), 1);
        table.ready(&mut pool, 1, 3 * PAGE_POSITIONS + 1).unwrap();
        assert_eq!(pool.held(), 4);
        table.truncate(&mut pool, PAGE_POSITIONS);
        assert_eq!(pool.held(), 1);
        table.ready(&mut pool, PAGE_POSITIONS, PAGE_POSITIONS + 1).unwrap();
        assert_eq!((pool.held(), pool.made), (2, 4));
        table.truncate(&mut pool, 0);
        assert_eq!(pool.held(), 0);
    }

    #[test]
    fn who_writes_to_a_shared_page_takes_a_copy_of_it_alone() {
        let mut pool = Pool::new(Numbers);
        let mut first = Table::default();
        first.ready(&mut pool, 0, 2 * PAGE_POSITIONS).unwrap();
        *Arc::get_mut(&mut first.pages()[1]).unwrap() = 7;
        let mut second = first.share(PAGE_POSITIONS + 3);
        assert_eq!(pool.held(), 2);
        second.ready(&mut pool, PAGE_POSITIONS + 3, PAGE_POSITIONS + 4).unwrap();
        assert_eq!(pool.held(), 3);
        assert_eq!(*second.pages()[1], 7);
        *Arc::get_mut(&mut second.pages()[1]).unwrap() = 8;
        assert_eq!(*first.pages()[1], 7);
        first.truncate(&mut pool, 0);
        assert_eq!(pool.held(), 2);
        second.truncate(&mut pool, 0);
        assert_eq!(pool.held(), 0);
    }
}
