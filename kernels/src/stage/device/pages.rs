//! Pages on a device: places in one buffer of keys and one of values for each attention, which grow.

use crate::device::Device;
use crate::device::cube::{CubeError, Cubes, Floats};
use crate::stage::StageError;
use crate::stage::pages::{PAGE_POSITIONS, Store};

/// Pages that are made first.
const PAGES_LEAST: usize = 8;

/// What a kernel can count the elements of.
const ELEMENTS_MAX: u64 = u32::MAX as u64;

/// Keys and values of one attention, `[pages, PAGE_POSITIONS, width]` each.
#[derive(Debug)]
pub(super) struct Cache {
    pub(super) keys: Floats,
    pub(super) values: Floats,
}

/// Of one attention, the elements that are kept of a position.
#[derive(Debug, Clone, Copy)]
pub(super) struct Widths {
    pub(super) keys: usize,
    /// Where keys are values too, those by which positions are chosen.
    pub(super) values: usize,
}

/// The number of a page in every attention's buffers.
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
    caches: Vec<Cache>,
    /// Of each cache.
    widths: Vec<Widths>,
    /// For which there is room.
    room: usize,
    /// Places from here on have never been given out.
    next: usize,
    /// Places that were taken back.
    spare: Vec<Place>,
}

impl Pages {
    /// None yet, for attentions that keep so much.
    pub(super) fn new(cubes: Cubes, device: Device, widths: Vec<Widths>) -> Self {
        let none = |_: &Widths| Cache {
            keys: cubes.room(0),
            values: cubes.room(0),
        };
        Self {
            caches: widths.iter().map(none).collect(),
            widths,
            cubes,
            device,
            room: 0,
            next: 0,
            spare: Vec::new(),
        }
    }

    pub(super) fn caches(&self) -> &[Cache] {
        &self.caches
    }

    /// Bytes that a session of so many positions takes.
    pub(in crate::stage) fn sequence_bytes(&self, positions: u64) -> u64 {
        positions
            .div_ceil(PAGE_POSITIONS as u64)
            .saturating_mul(self.page_bytes())
    }

    /// Bytes of as many pages as there can be: those of an attention are one buffer.
    pub(in crate::stage) fn bytes_most(&self) -> u64 {
        self.most() as u64 * self.page_bytes()
    }

    fn most(&self) -> usize {
        let elements = (self.device.buffer_bytes_max() / 4).min(ELEMENTS_MAX);
        let pages = elements / (PAGE_POSITIONS * self.widest()).max(1) as u64;
        usize::try_from(pages).unwrap_or(usize::MAX)
    }

    fn widest(&self) -> usize {
        let widths = self.widths.iter().map(|widths| widths.keys.max(widths.values));
        widths.max().unwrap_or(0)
    }

    /// Twice the room, so that what is moved in all stays below what is there in the end.
    fn grow(&mut self) -> Result<(), StageError> {
        let room = (2 * self.room).max(PAGES_LEAST).min(self.most());
        if room <= self.room {
            return Err(StageError::DeviceBuffer {
                what: "an attention's pages",
                bytes: (self.room as u64 + 1) * (PAGE_POSITIONS * self.widest() * 4) as u64,
                limit: self.device.buffer_bytes_max(),
            });
        }
        let bytes = (room - self.room) as u64 * self.page_bytes();
        if !self.device.has_room(bytes) {
            return Err(StageError::DeviceMemory { what: "pages", bytes });
        }
        let held = self.next;
        let wider = |old: &Floats, width: usize| -> Result<Floats, CubeError> {
            let new = self.cubes.room(room * PAGE_POSITIONS * width);
            self.cubes.copy(old, 0, &new, 0, held * PAGE_POSITIONS * width)?;
            Ok(new)
        };
        let caches = self.caches.iter().zip(&self.widths).map(|(cache, widths)| {
            Ok(Cache {
                keys: wider(&cache.keys, widths.keys)?,
                values: wider(&cache.values, widths.values)?,
            })
        });
        self.caches = caches.collect::<Result<_, CubeError>>()?;
        self.room = room;
        Ok(())
    }
}

impl Store for Pages {
    type Page = Place;

    fn page_bytes(&self) -> u64 {
        let elements: usize = self.widths.iter().map(|widths| widths.keys + widths.values).sum();
        (elements * PAGE_POSITIONS * 4) as u64
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
        let (from, to) = (from.0 as usize, to.0 as usize);
        for (cache, widths) in self.caches.iter().zip(&self.widths) {
            for (buffer, width) in [(&cache.keys, widths.keys), (&cache.values, widths.values)] {
                let page = PAGE_POSITIONS * width;
                let held = self.cubes.part(buffer, from * page, page)?;
                self.cubes.copy(&held, 0, buffer, to * page, page)?;
            }
        }
        Ok(())
    }

    fn unmake(&mut self, page: Place) {
        self.spare.push(page);
    }
}
