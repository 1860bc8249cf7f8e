//! Where the rows of a batch lie in a cache of pages.

use cubecl::prelude::*;

use super::memory::{one_unit_each, size, small, units};
use super::{Cost, CubeError, Cubes, Floats, Words};

/// Rows of one session, and the pages that it holds.
#[derive(Debug, Clone, Copy)]
pub struct PagedRows<'a> {
    /// The numbers of the session's pages, from its first position on.
    pub pages: &'a [u32],
    /// Of the first row.
    pub position: usize,
    /// How many.
    pub rows: usize,
}

/// The rows of several sessions, one behind the other, and what each of them sees.
#[derive(Debug)]
pub struct Places {
    page_positions: usize,
    /// Of each row, how many positions it sees.
    visible: Vec<usize>,
    /// Pages up to here are named.
    pages_end: usize,
    /// All sessions' pages.
    tables: Words,
    /// Of each row, the positions that it sees and where its session's pages begin: `[rows, 2]`.
    seen: Words,
    /// Where each row lies among all positions of all pages: `[rows]`.
    own: Words,
}

impl Places {
    /// How many rows.
    pub const fn rows(&self) -> usize {
        self.visible.len()
    }

    pub(super) fn visible(&self) -> &[usize] {
        &self.visible
    }

    pub(super) const fn page_positions(&self) -> usize {
        self.page_positions
    }

    pub(super) const fn tables(&self) -> &Words {
        &self.tables
    }

    pub(super) const fn seen(&self) -> &Words {
        &self.seen
    }

    /// Whether a cache of positions of this width has all pages that are named.
    pub(super) fn check(&self, cache: &Floats, width: usize) -> Result<(), CubeError> {
        size("a cache", &[cache.len()])?;
        let expected = size("pages", &[self.pages_end, self.page_positions, width])?;
        match cache.len() >= expected {
            true => Ok(()),
            false => Err(CubeError::Length {
                what: "a cache",
                found: cache.len(),
                expected,
            }),
        }
    }
}

/// One unit for each element.
#[cube(launch)]
fn append(new: &[f32], own: &[u32], cache: &mut [f32], width: u32, count: u32) {
    let index = ABSOLUTE_POS as u32;
    if index < count {
        let place = own[(index / width) as usize];
        cache[(place * width + index % width) as usize] = new[index as usize];
    }
}

impl Cubes {
    /// Brings to the device where these rows lie, in pages of `page_positions`.
    ///
    /// # Errors
    ///
    /// [`CubeError`] where a session has fewer pages than its rows need.
    pub fn place(&self, page_positions: usize, sessions: &[PagedRows<'_>]) -> Result<Places, CubeError> {
        if page_positions == 0 {
            return Err(CubeError::Range {
                what: "a page",
                value: 0,
                limit: "a position or more",
            });
        }
        let (mut tables, mut seen, mut own, mut visible) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for session in sessions {
            let PagedRows { pages, position, rows } = *session;
            let end = position.saturating_add(rows);
            let Some(pages) = pages.get(..end.div_ceil(page_positions)) else {
                return Err(CubeError::Length {
                    what: "a table of pages",
                    found: pages.len(),
                    expected: end.div_ceil(page_positions),
                });
            };
            let table = small(size("tables", &[tables.len()])?);
            for position in position..end {
                let page = pages.get(position / page_positions).copied().unwrap_or_default();
                let first = size("a place", &[page as usize, page_positions])?;
                own.push(small(size("a place", &[first + position % page_positions])?));
                visible.push(position + 1);
                seen.extend([small(size("a position", &[position + 1])?), table]);
            }
            tables.extend_from_slice(pages);
        }
        let pages_end = tables.iter().max().map_or(0, |page| *page as usize + 1);
        Ok(Places {
            page_positions,
            visible,
            pages_end,
            tables: self.upload(&tables),
            seen: self.upload(&seen),
            own: self.upload(&own),
        })
    }

    /// Writes keys or values of rows where they belong.
    ///
    /// # Shapes
    ///
    /// - `new`: `[rows, width]`; `cache`: `[pages, positions of a page, width]`
    ///
    /// # Errors
    ///
    /// [`CubeError`] where the cache has no such pages, or `new` has not these rows.
    pub fn append(&self, new: &Floats, cache: &Floats, places: &Places, width: usize) -> Result<(), CubeError> {
        new.check("new rows", size("new rows", &[places.rows(), width])?)?;
        places.check(cache, width)?;
        if !new.is_empty() {
            append::launch(
                self.client(),
                one_unit_each(new.len()),
                units(),
                new.argument(),
                places.own.argument(),
                cache.argument(),
                small(width),
                small(new.len()),
            );
        }
        Ok(())
    }
}

impl Cost {
    /// Of [`Cubes::append`].
    pub const fn append(rows: usize, width: usize) -> Self {
        let count = rows * width;
        Self::new(4 * count + 4 * rows, 4 * count, 0)
    }
}
