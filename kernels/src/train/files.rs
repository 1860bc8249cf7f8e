//! Parameters as files: little-endian f32 in layout order, one file per part.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::Path;

use super::TrainError;

/// Reads the first `elements` numbers of a file; what follows them is the state's own.
pub(super) fn read(file: &Path, elements: usize) -> Result<Vec<f32>, TrainError> {
    let wrong = |reason: String| TrainError::File {
        file: file.display().to_string(),
        reason,
    };
    let open = File::open(file).map_err(|error| wrong(error.to_string()))?;
    let length = open.metadata().map_err(|error| wrong(error.to_string()))?.len();
    let bytes = elements as u64 * 4;
    if length < bytes {
        return Err(wrong(format!("holds {length} bytes, and its parameters take {bytes}")));
    }
    let mut values = vec![0.0f32; elements];
    let mut reader = open.take(bytes);
    reader
        .read_exact(bytemuck::cast_slice_mut(&mut values))
        .map_err(|error| wrong(error.to_string()))?;
    if cfg!(target_endian = "big") {
        for value in &mut values {
            *value = f32::from_bits(value.to_bits().swap_bytes());
        }
    }
    match values.iter().all(|value| value.is_finite()) {
        true => Ok(values),
        false => Err(wrong("holds numbers that are not finite".to_owned())),
    }
}

/// Writes parameters to a file, and flushes it to the disk.
pub(super) fn write(file: &Path, values: &[f32]) -> Result<(), TrainError> {
    let write = || {
        let mut out = BufWriter::with_capacity(1 << 20, File::create(file)?);
        for value in values {
            out.write_all(&value.to_le_bytes())?;
        }
        out.into_inner().map_err(|error| error.into_error())?.sync_all()
    };
    write().map_err(|error: std::io::Error| TrainError::File {
        file: file.display().to_string(),
        reason: error.to_string(),
    })
}
