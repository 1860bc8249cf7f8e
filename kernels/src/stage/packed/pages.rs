//! Pages on a device: places in one buffer of keys and one of values for each block, which grow.

use crate::device::Device;
use crate::device::cube::{CubeError, Cubes, Floats};
use crate::stage::StageError;
use crate::stage::pages::{PAGE_POSITIONS, Store};

/// Pages that are made first.
const PAGES_LEAST: usize = 8;

/// What a kernel can count the elements of.
const ELEMENTS_MAX: u64 = u32::MAX as u64;

/// Keys and values of one block, `[pages, PAGE_POSITIONS, width]` each.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) keys: Floats,
    pub(super) values: Floats,
}

/// The number of a page in every block's buffers.
#[derive(Debug)]
pub(in crate::stage) struct Place(u32);

impl Place {
    pub(super) const fn number(&self) -> u32 {
        self.0
    }
}

/// The pages of a stage.
#[derive(Debug)]
pub(in crate::stage) struct Pages {
    cubes: Cubes,
    device: Device,
    blocks: Vec<Block>,
    /// Of a position's keys, in elements.
    width: usize,
    /// For which there is room.
    room: usize,
    /// Places from here on have never been given out.
    next: usize,
    /// Places that were taken back.
    spare: Vec<Place>,
}

impl Pages {
    /// None yet, for so many blocks, with `width` elements of keys for each position, and as many of values.
    pub(super) fn new(cubes: Cubes, device: Device, blocks: usize, width: usize) -> Self {
        let none = || cubes.room(0);
        let blocks = (0..blocks).map(|_| Block {
            keys: none(),
            values: none(),
        });
        Self {
            blocks: blocks.collect(),
            cubes,
            device,
            width,
            room: 0,
            next: 0,
            spare: Vec::new(),
        }
    }

    pub(super) fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Bytes that a session of so many positions takes.
    pub(in crate::stage) fn sequence_bytes(&self, positions: u64) -> u64 {
        positions
            .div_ceil(PAGE_POSITIONS as u64)
            .saturating_mul(self.page_bytes())
    }

    /// Bytes of as many pages as there can be: those of a block are one buffer.
    pub(in crate::stage) fn bytes_most(&self) -> u64 {
        self.most() as u64 * self.page_bytes()
    }

    fn most(&self) -> usize {
        let elements = (self.device.buffer_bytes_max() / 4).min(ELEMENTS_MAX);
        let pages = elements / (PAGE_POSITIONS * self.width).max(1) as u64;
        usize::try_from(pages).unwrap_or(usize::MAX)
    }

    /// Twice the room, so that what is moved in all stays below what is there in the end.
    fn grow(&mut self) -> Result<(), StageError> {
        let room = (2 * self.room).max(PAGES_LEAST).min(self.most());
        if room <= self.room {
            return Err(StageError::DeviceBuffer {
                what: "a block's pages",
                bytes: (self.room as u64 + 1) * (PAGE_POSITIONS * self.width * 4) as u64,
                limit: self.device.buffer_bytes_max(),
            });
        }
        let bytes = (room - self.room) as u64 * self.page_bytes();
        if !self.device.has_room(bytes) {
            return Err(StageError::DeviceMemory { what: "pages", bytes });
        }
        let count = self.next * PAGE_POSITIONS * self.width;
        let wider = |old: &Floats| -> Result<Floats, CubeError> {
            let new = self.cubes.room(room * PAGE_POSITIONS * self.width);
            self.cubes.copy(old, 0, &new, 0, count)?;
            Ok(new)
        };
        let blocks = self.blocks.iter().map(|block| {
            Ok(Block {
                keys: wider(&block.keys)?,
                values: wider(&block.values)?,
            })
        });
        self.blocks = blocks.collect::<Result<_, CubeError>>()?;
        self.room = room;
        Ok(())
    }
}

impl Store for Pages {
    type Page = Place;

    fn page_bytes(&self) -> u64 {
        (self.blocks.len() * 2 * PAGE_POSITIONS * self.width * 4) as u64
    }

    fn make(&mut self) -> Result<Place, StageError> {
        if let Some(place) = self.spare.pop() {
            return Ok(place);
        }
        if self.next >= self.room {
            self.grow()?;
        }
        let place = Place(self.next as u32); // Elements are counted in 32 bits, so pages are too.
        self.next += 1;
        Ok(place)
    }

    fn copy(&mut self, from: &Place, to: &mut Place) -> Result<(), StageError> {
        let page = PAGE_POSITIONS * self.width;
        let (from, to) = (from.0 as usize * page, to.0 as usize * page);
        for block in &self.blocks {
            for buffer in [&block.keys, &block.values] {
                let held = self.cubes.part(buffer, from, page)?;
                self.cubes.copy(&held, 0, buffer, to, page)?;
            }
        }
        Ok(())
    }

    fn unmake(&mut self, page: Place) {
        self.spare.push(page);
    }
}
