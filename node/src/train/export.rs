//! A run's state as a Hugging Face folder or as the part files of an epoch.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use polder_protocol::layout::{Layout, PartLayout};
use serde_json::{Map, Value, json};
use thiserror::Error;

use super::durable;

/// Why a state could not be exported.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum ExportError {
    #[error("{path} exists and is not empty", path = path.display())]
    NotEmpty { path: PathBuf },
    #[error("the state holds {found} of {expected} parts")]
    Incomplete { found: usize, expected: usize },
    #[error("{path} is shorter than its part: {found_bytes} of {expected_bytes} bytes", path = path.display())]
    Short {
        path: PathBuf,
        found_bytes: u64,
        expected_bytes: u64,
    },
    #[error("the layout does not fit this machine's addresses")]
    TooLarge,
    #[error("cannot read or write {path}: {source}", path = path.display())]
    File { path: PathBuf, source: io::Error },
}

/// Writes `config.json`, `model.safetensors` and `tokenizer.json` into `folder`, which must be empty or not be there.
/// `states` are one state file per part; what follows the parameters in them is ignored.
///
/// # Errors
///
/// [`ExportError`]; files are put in place whole or not at all.
pub(super) fn write_folder(
    folder: &Path,
    config_json: &str,
    tokenizer: &Path,
    layout: &Layout,
    states: &[PathBuf],
) -> Result<(), ExportError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| ExportError::File { path, source }
    };
    if fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(ExportError::NotEmpty {
            path: folder.to_owned(),
        });
    }
    if states.len() != layout.parts.len() {
        return Err(ExportError::Incomplete {
            found: states.len(),
            expected: layout.parts.len(),
        });
    }
    fs::create_dir_all(folder).map_err(failed(folder))?;
    let parts: Vec<(&PartLayout, &Path)> = layout.parts.iter().zip(states.iter().map(PathBuf::as_path)).collect();
    write_safetensors(&folder.join("model.safetensors"), &parts)?;
    let tokenizer_bytes = fs::read(tokenizer).map_err(failed(tokenizer))?;
    for (name, bytes) in [
        ("tokenizer.json", tokenizer_bytes.as_slice()),
        ("config.json", config_json.as_bytes()),
    ] {
        let path = folder.join(name);
        durable::write(&path, bytes).map_err(failed(&path))?;
    }
    Ok(())
}

/// Writes one safetensors file with the tensors of `parts` in order, each part read from its state file.
///
/// # Errors
///
/// [`ExportError`]; the file is put in place whole or not at all.
pub(super) fn write_safetensors(path: &Path, parts: &[(&PartLayout, &Path)]) -> Result<(), ExportError> {
    let header = header(parts)?;
    for (layout, state) in parts {
        let expected_bytes = part_bytes(layout)?;
        let metadata = fs::metadata(state).map_err(|source| ExportError::File {
            path: state.to_path_buf(),
            source,
        })?;
        if metadata.len() < expected_bytes {
            return Err(ExportError::Short {
                path: state.to_path_buf(),
                found_bytes: metadata.len(),
                expected_bytes,
            });
        }
    }
    let written = durable::write_with(path, |file| {
        let mut out = BufWriter::new(file);
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for (layout, state) in parts {
            let bytes = part_bytes(layout).map_err(io::Error::other)?;
            // Both formats are little-endian f32 in layout order.
            io::copy(&mut BufReader::new(File::open(state)?).take(bytes), &mut out)?;
        }
        out.flush()
    });
    written.map_err(|source| ExportError::File {
        path: path.to_owned(),
        source,
    })
}

fn part_bytes(layout: &PartLayout) -> Result<u64, ExportError> {
    let bytes = layout.elements().and_then(|elements| elements.checked_mul(4));
    bytes
        .and_then(|bytes| u64::try_from(bytes).ok())
        .ok_or(ExportError::TooLarge)
}

/// The JSON header, padded to 8 bytes so that tensors are aligned.
fn header(parts: &[(&PartLayout, &Path)]) -> Result<Vec<u8>, ExportError> {
    let mut entries = Map::new();
    // `transformers` refuses a file that does not say for which library it is.
    entries.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut begin = 0usize;
    for tensor in parts.iter().flat_map(|(layout, _)| &layout.tensors) {
        let bytes = tensor.elements().and_then(|elements| elements.checked_mul(4));
        let end = bytes
            .and_then(|bytes| begin.checked_add(bytes))
            .ok_or(ExportError::TooLarge)?;
        let entry: Value = json!({ "dtype": "F32", "shape": tensor.shape, "data_offsets": [begin, end] });
        entries.insert(tensor.name.clone(), entry);
        begin = end;
    }
    let mut bytes = Value::Object(entries).to_string().into_bytes();
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use polder_protocol::layout::TensorLayout;

    #[test]
    fn a_part_file_has_the_tensors_at_the_offsets_that_it_names() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        // Three parameters and three of momentum.
        let values: Vec<u8> = [1.0f32, 2.0, 3.0, 9.0, 9.0, 9.0]
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect();
        fs::write(&state, values).unwrap();
        let layout = layout(&[("a", &[2]), ("b", &[1, 1])]);
        let out = folder.path().join("part.safetensors");
        write_safetensors(&out, &[(&layout, &state)]).unwrap();

        let bytes = fs::read(&out).unwrap();
        let header_bytes = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        assert_eq!((8 + header_bytes) % 8, 0);
        let header: Value = serde_json::from_slice(&bytes[8..8 + header_bytes]).unwrap();
        assert_eq!(
            header["b"],
            json!({ "dtype": "F32", "shape": [1, 1], "data_offsets": [8, 12] })
        );
        assert_eq!(bytes[8 + header_bytes..], [0, 0, 128, 63, 0, 0, 0, 64, 0, 0, 64, 64]);
    }

    #[test]
    fn a_state_that_is_cut_short_or_a_folder_in_use_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        fs::write(&state, [0; 7]).unwrap();
        let layout = Layout {
            parts: vec![layout(&[("a", &[2])])],
        };
        let error = write_folder(folder.path(), "{}", &state, &layout, std::slice::from_ref(&state)).unwrap_err();
        assert!(matches!(error, ExportError::NotEmpty { .. }));
        let error = write_folder(
            &folder.path().join("new"),
            "{}",
            &state,
            &layout,
            std::slice::from_ref(&state),
        )
        .unwrap_err();
        assert!(matches!(error, ExportError::Short { found_bytes: 7, .. }));
    }

    fn layout(tensors: &[(&str, &[u32])]) -> PartLayout {
        let tensor = |(name, shape): &(&str, &[u32])| TensorLayout {
            name: (*name).to_owned(),
            shape: shape.to_vec(),
        };
        PartLayout {
            tensors: tensors.iter().map(tensor).collect(),
        }
    }
}
