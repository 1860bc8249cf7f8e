//! Files in memory maps, and JSON files of bounded size.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;
use serde_json::Value;

use super::WeightsError;

/// The largest tokenizer files are about 35 MB; nothing that is read whole comes near this.
const JSON_BYTES_MAX: u64 = 256 << 20;

/// Maps a whole file for reading.
pub(super) fn map(path: &Path) -> Result<Arc<Mmap>, WeightsError> {
    let file = File::open(path).map_err(WeightsError::io("open", path))?;
    // SAFETY: the map is only read. Blobs and models are written under another name and renamed, never changed in
    // place; whoever truncates a mapped file ends the process that reads it, as with any other tool that maps.
    let map = unsafe { Mmap::map(&file) }.map_err(WeightsError::io("map", path))?;
    Ok(Arc::new(map))
}

/// Reads a text file of bounded size.
pub(super) fn read_text(path: &Path) -> Result<String, WeightsError> {
    let found = fs::metadata(path).map_err(WeightsError::io("read", path))?.len();
    if found > JSON_BYTES_MAX {
        return Err(WeightsError::Json {
            path: path.to_owned(),
            reason: format!("{found} bytes is over the limit of {JSON_BYTES_MAX}"),
        });
    }
    fs::read_to_string(path).map_err(WeightsError::io("read", path))
}

/// Reads a JSON file; `None` where there is no such file.
pub(super) fn read_json_if_there(path: &Path) -> Result<Option<Value>, WeightsError> {
    if !path.exists() {
        return Ok(None);
    }
    let text = read_text(path)?;
    serde_json::from_str(&text)
        .map(Some)
        .map_err(|error| WeightsError::Json {
            path: path.to_owned(),
            reason: error.to_string(),
        })
}
