//! Pages of a stage's cache: a pool that makes them as they are needed, and the tables by which sessions hold them.
//!
//! A page holds [`PAGE_POSITIONS`] positions of all sublayers of a stage, one sublayer behind the other, so a session
//! takes one page at a time and not one for each block. Several sessions may hold the same page; whoever writes to it
//! takes a copy first (Kwon et al. 2023, PagedAttention).

use std::alloc::{Layout, alloc_zeroed};
use std::sync::Arc;

/// Positions of a page: what a session takes and does not use is half of it on average. It is a multiple of the 16
/// positions whose keys are turned together, and long enough that going from page to page does not show beside the
/// products within.
pub(in crate::stage) const PAGE_POSITIONS: usize = 64;

/// A line of the processor's cache: no vector of a page that begins at one lies across two.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Keys and values, or whatever else the sublayers of a stage keep of [`PAGE_POSITIONS`] positions.
#[derive(Debug)]
pub(super) struct Page(Box<[Line]>);

impl Page {
    /// A page of zeros that the system has yet to make; `None` where there is no memory for it.
    fn new(lines: usize) -> Option<Self> {
        let layout = Layout::array::<Line>(lines).ok()?;
        if layout.size() == 0 {
            return Some(Self(Box::new([])));
        }
        // SAFETY: the layout is not empty. Zeros are valid lines, and a boxed slice is freed with this very layout.
        unsafe {
            let start = alloc_zeroed(layout).cast::<Line>();
            (!start.is_null()).then(|| Self(Box::from_raw(std::ptr::slice_from_raw_parts_mut(start, lines))))
        }
    }

    /// All its numbers.
    pub(super) const fn floats(&self) -> &[f32] {
        let lines = &self.0;
        // SAFETY: a line is 16 numbers without anything between.
        unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * 16) }
    }

    const fn floats_mut(&mut self) -> &mut [f32] {
        let lines = &mut self.0;
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * 16) }
    }
}

/// Makes pages, and keeps those that nobody holds.
///
/// What a page held is not cleared: nobody reads a position that it has not written.
#[derive(Debug)]
pub(in crate::stage) struct Pool {
    lines: usize,
    // Nobody else holds these.
    free: Vec<Arc<Page>>,
    made: usize,
}

impl Pool {
    /// Of pages that keep `position_floats` numbers of each position.
    pub(super) const fn new(position_floats: usize) -> Self {
        Self {
            lines: position_floats * PAGE_POSITIONS / 16,
            free: Vec::new(),
            made: 0,
        }
    }

    /// Bytes of a page.
    pub(in crate::stage) const fn page_bytes(&self) -> u64 {
        self.lines as u64 * size_of::<Line>() as u64
    }

    /// Pages that are held.
    pub(in crate::stage) fn held(&self) -> usize {
        self.made - self.free.len()
    }

    /// Lets free pages go until there are `pages` in all, or no free one is left.
    pub(super) fn shrink(&mut self, pages: usize) {
        let excess = self.made.saturating_sub(pages).min(self.free.len());
        self.free.truncate(self.free.len() - excess);
        self.made -= excess;
    }

    fn take(&mut self) -> Option<Arc<Page>> {
        if let Some(page) = self.free.pop() {
            return Some(page);
        }
        let page = Arc::new(Page::new(self.lines)?);
        self.made += 1;
        Some(page)
    }

    fn give(&mut self, mut page: Arc<Page>) {
        // Whoever still holds it gives it back later.
        if Arc::get_mut(&mut page).is_some() {
            self.free.push(page);
        }
    }
}

/// The pages of one session, from position 0 on without a gap.
#[derive(Debug, Default)]
pub(in crate::stage) struct Table(Vec<Arc<Page>>);

impl Table {
    /// The pages, for reading and for writing where [`Table::ready`] was told so.
    pub(super) fn pages(&mut self) -> &mut [Arc<Page>] {
        &mut self.0
    }

    /// Pages that [`Table::ready`] will take.
    pub(super) fn lacks(&mut self, position: usize, end: usize) -> usize {
        let (first, end) = (position / PAGE_POSITIONS, end.div_ceil(PAGE_POSITIONS));
        let held = self.0.iter_mut().take(end).skip(first);
        let shared = held.filter_map(|page| Arc::get_mut(page).is_none().then_some(()));
        shared.count() + end.saturating_sub(self.0.len())
    }

    /// Makes positions `position .. end` ready to be written; `None` where there is no memory for them.
    pub(in crate::stage) fn ready(&mut self, pool: &mut Pool, position: usize, end: usize) -> Option<()> {
        let first = position / PAGE_POSITIONS;
        for page in self.0.iter_mut().take(end.div_ceil(PAGE_POSITIONS)).skip(first) {
            if Arc::get_mut(page).is_none() {
                let mut own = pool.take()?;
                Arc::get_mut(&mut own)?.floats_mut().copy_from_slice(page.floats());
                pool.give(std::mem::replace(page, own));
            }
        }
        while self.0.len() < end.div_ceil(PAGE_POSITIONS) {
            self.0.push(pool.take()?);
        }
        Some(())
    }

    /// Gives back the pages that hold nothing before `position`.
    pub(in crate::stage) fn truncate(&mut self, pool: &mut Pool, position: usize) {
        let kept = position.div_ceil(PAGE_POSITIONS).min(self.0.len());
        self.0.drain(kept..).for_each(|page| pool.give(page));
    }

    /// A table of the same pages, as far as they hold positions before `end`.
    pub(in crate::stage) fn share(&self, end: usize) -> Self {
        let pages = self.0.iter().take(end.div_ceil(PAGE_POSITIONS));
        Self(pages.cloned().collect())
    }
}

/// The numbers of a page that are ready to be written.
pub(super) fn written(page: &mut Arc<Page>) -> &mut [f32] {
    match Arc::get_mut(page) {
        Some(page) => page.floats_mut(),
        // A forward makes its positions ready before it writes any.
        None => unreachable!("a page that somebody else holds is written"),
    }
}

/// Positions of one page among those of a forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// Which page of the table.
    pub(super) page: usize,
    /// The first position within the page.
    pub(super) at: usize,
    /// How many lie before it in the range that was asked for.
    pub(super) offset: usize,
    /// How many.
    pub(super) count: usize,
}

/// The positions `first .. end`, page by page.
pub(super) fn runs(first: usize, end: usize) -> impl Iterator<Item = Run> {
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
        let mut pool = Pool::new(16);
        let mut table = Table::default();
        assert_eq!(table.ready(&mut pool, 0, 1), Some(()));
        assert_eq!(pool.held(), 1);
        table.ready(&mut pool, 1, 3 * PAGE_POSITIONS + 1);
        assert_eq!(pool.held(), 4);
        table.truncate(&mut pool, PAGE_POSITIONS);
        assert_eq!(pool.held(), 1);
        table.ready(&mut pool, PAGE_POSITIONS, PAGE_POSITIONS + 1);
        assert_eq!((pool.held(), pool.made), (2, 4));
        table.truncate(&mut pool, 0);
        assert_eq!(pool.held(), 0);
    }

    #[test]
    fn who_writes_to_a_shared_page_takes_a_copy_of_it_alone() {
        let mut pool = Pool::new(16);
        let mut first = Table::default();
        first.ready(&mut pool, 0, 2 * PAGE_POSITIONS);
        written(&mut first.pages()[1])[5] = 7.0;
        let mut second = first.share(PAGE_POSITIONS + 3);
        assert_eq!(pool.held(), 2);
        second.ready(&mut pool, PAGE_POSITIONS + 3, PAGE_POSITIONS + 4);
        assert_eq!(pool.held(), 3);
        assert_eq!(second.pages()[1].floats()[5], 7.0);
        written(&mut second.pages()[1])[5] = 8.0;
        assert_eq!(first.pages()[1].floats()[5], 7.0);
        first.truncate(&mut pool, 0);
        assert_eq!(pool.held(), 2);
        second.truncate(&mut pool, 0);
        assert_eq!(pool.held(), 0);
    }
}
