//! Pages in the machine's memory.

use std::alloc::{Layout, alloc_zeroed};
use std::sync::Arc;

use crate::stage::StageError;
use crate::stage::pages::{PAGE_POSITIONS, Store};

/// A line of the processor's cache: no vector of a page that begins at one lies across two.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Keys and values, or whatever else the sublayers of a stage keep of [`PAGE_POSITIONS`] positions.
#[derive(Debug)]
pub(in crate::stage) struct Page(Box<[Line]>);

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

/// Makes pages of one size, one sublayer behind the other in each.
#[derive(Debug)]
pub(in crate::stage) struct Memory {
    lines: usize,
}

impl Memory {
    /// Of pages that keep `position_floats` numbers of each position.
    pub(super) const fn new(position_floats: usize) -> Self {
        Self {
            lines: position_floats * PAGE_POSITIONS / 16,
        }
    }
}

impl Store for Memory {
    type Page = Page;

    fn page_bytes(&self) -> u64 {
        self.lines as u64 * size_of::<Line>() as u64
    }

    fn make(&mut self) -> Result<Page, StageError> {
        let bytes = self.page_bytes();
        Page::new(self.lines).ok_or(StageError::Memory { bytes, free: 0 })
    }

    fn copy(&mut self, from: &Page, to: &mut Page) -> Result<(), StageError> {
        to.floats_mut().copy_from_slice(from.floats());
        Ok(())
    }

    fn unmake(&mut self, _page: Page) {}
}

/// The numbers of a page that are ready to be written.
pub(super) fn written(page: &mut Arc<Page>) -> &mut [f32] {
    match Arc::get_mut(page) {
        Some(page) => page.floats_mut(),
        // A forward makes its positions ready before it writes any.
        None => unreachable!("a page that somebody else holds is written"),
    }
}
