//! Parts of memory, copied on the device.

use cubecl::prelude::*;

use super::memory::{one_unit_each, size, small, units};
use super::{CubeError, Cubes, Floats};

/// Copies `count` elements from `from` on to `to` on.
#[cube(launch)]
fn copy(source: &[f32], target: &mut [f32], from: u32, to: u32, count: u32) {
    if ABSOLUTE_POS < count as usize {
        target[ABSOLUTE_POS + to as usize] = source[ABSOLUTE_POS + from as usize];
    }
}

impl Cubes {
    /// Copies `count` elements of `source` from `from` on into `target` from `to` on, which is other memory.
    ///
    /// # Errors
    ///
    /// [`CubeError`] where either has fewer.
    pub fn copy(
        &self,
        source: &Floats,
        from: usize,
        target: &Floats,
        to: usize,
        count: usize,
    ) -> Result<(), CubeError> {
        for (what, held, first) in [("a copy's source", source, from), ("a copy's target", target, to)] {
            size(what, &[held.len()])?;
            if first.checked_add(count).is_none_or(|end| end > held.len()) {
                return Err(CubeError::Length {
                    what,
                    found: held.len(),
                    expected: first.saturating_add(count),
                });
            }
        }
        if count > 0 {
            copy::launch(
                self.client(),
                one_unit_each(count),
                units(),
                source.argument(),
                target.argument(),
                small(from),
                small(to),
                small(count),
            );
        }
        Ok(())
    }

    /// `count` elements from `first` on, as memory of their own.
    ///
    /// # Errors
    ///
    /// [`CubeError`] where there are fewer.
    pub fn part(&self, values: &Floats, first: usize, count: usize) -> Result<Floats, CubeError> {
        if first.checked_add(count).is_none_or(|end| end > values.len()) {
            return Err(CubeError::Length {
                what: "a part's whole",
                found: values.len(),
                expected: first.saturating_add(count),
            });
        }
        let out = self.room(count);
        self.copy(values, first, &out, 0, count)?;
        Ok(out)
    }
}
