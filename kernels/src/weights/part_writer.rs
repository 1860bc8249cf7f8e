//! Writes part files. The same tensors always give the same bytes, and so the same blob.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use polder_protocol::layout::PartLayout;
use serde_json::{Map, Value, json};

use super::WeightsError;
use super::part_file::{OUTPUT, PACKED_PREFIX};
use crate::quant::PackedType;

/// Tensors on their way into one safetensors file.
#[derive(Debug, Default)]
pub struct PartWriter<'a> {
    tensors: BTreeMap<String, Pending<'a>>,
    notes: BTreeMap<String, String>,
}

#[derive(Debug)]
struct Pending<'a> {
    ty: PackedType,
    shape: Vec<usize>,
    bytes: Cow<'a, [u8]>,
}

impl<'a> PartWriter<'a> {
    /// A file without tensors.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a tensor of f32 values.
    pub fn plain(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.tensor(name, PackedType::F32, shape, bytes);
    }

    /// Adds a tensor of any type by its bytes, which the caller has checked.
    pub fn tensor(&mut self, name: &str, ty: PackedType, shape: &[usize], bytes: impl Into<Cow<'a, [u8]>>) {
        let (shape, bytes) = (shape.to_vec(), bytes.into());
        self.tensors.insert(name.to_owned(), Pending { ty, shape, bytes });
    }

    /// Adds a line of metadata.
    pub fn note(&mut self, key: &str, value: &str) {
        self.notes.insert(key.to_owned(), value.to_owned());
    }

    /// Writes the file and waits until the disk has it.
    ///
    /// # Errors
    ///
    /// [`WeightsError::Io`], such as of a full disk.
    pub fn write(self, path: &Path) -> Result<(), WeightsError> {
        let failed = || WeightsError::io("write", path);
        let header = self.header();
        let mut file = BufWriter::new(File::create(path).map_err(failed())?);
        file.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed())?;
        file.write_all(&header).map_err(failed())?;
        for (_, tensor) in self.in_order() {
            file.write_all(&tensor.bytes).map_err(failed())?;
        }
        let file = file
            .into_inner()
            .map_err(|error| error.into_error())
            .map_err(failed())?;
        file.sync_all().map_err(failed())
    }

    /// Wider elements first, so that every element is aligned to its size; then by name.
    fn in_order(&self) -> Vec<(&String, &Pending<'a>)> {
        let mut tensors: Vec<_> = self.tensors.iter().collect();
        tensors.sort_by_key(|(_, tensor)| std::cmp::Reverse(alignment(tensor.ty)));
        tensors
    }

    fn header(&self) -> Vec<u8> {
        let mut notes = self.notes.clone();
        let mut entries = Map::new();
        let mut end = 0;
        for (name, tensor) in self.in_order() {
            let start = end;
            end += tensor.bytes.len();
            let (dtype, shape) = match tensor.ty {
                PackedType::F32 | PackedType::F16 | PackedType::BF16 => (tensor.ty.name(), tensor.shape.clone()),
                packed => {
                    let dimensions = tensor.shape.iter().map(|size| format!(" {size}")).collect::<String>();
                    notes.insert(format!("{PACKED_PREFIX}{name}"), format!("{packed}{dimensions}"));
                    ("U8", vec![tensor.bytes.len()])
                }
            };
            let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
            entries.insert(name.clone(), entry);
        }
        if !notes.is_empty() {
            entries.insert("__metadata__".to_owned(), json!(notes));
        }
        let mut header = Value::Object(entries).to_string().into_bytes();
        // Spaces are the padding that the format knows; data then begins at a multiple of eight.
        header.resize(header.len().next_multiple_of(8), b' ');
        header
    }
}

const fn alignment(ty: PackedType) -> usize {
    if ty.is_float() { ty.block_bytes() } else { 1 }
}

/// Writes a part file of f32 tensors from a part's parameters as a state blob holds them: end to end, in layout order.
///
/// `tied` is the embedding of a tied model, `[vocabulary, hidden]`, for its head: the head's file carries a copy, so
/// that a stage needs no part but its own.
///
/// # Errors
///
/// [`WeightsError::Shape`] where there are fewer values than the layout says, [`WeightsError::Io`].
pub fn write_state_part(
    path: &Path,
    layout: &PartLayout,
    values: &[f32],
    tied: Option<(&[usize], &[f32])>,
) -> Result<(), WeightsError> {
    let mut writer = PartWriter::new();
    let mut rest = values;
    for tensor in &layout.tensors {
        let shape: Vec<usize> = tensor.shape.iter().map(|size| *size as usize).collect();
        let split = tensor.elements().and_then(|elements| rest.split_at_checked(elements));
        let Some((head, tail)) = split else {
            return Err(WeightsError::Shape {
                path: path.to_owned(),
                tensor: tensor.name.clone(),
                expected: shape,
                found: vec![rest.len()],
            });
        };
        writer.plain(&tensor.name, &shape, head);
        rest = tail;
    }
    if let Some((shape, embedding)) = tied {
        writer.plain(OUTPUT, shape, embedding);
        writer.note(TIED_NOTE.0, TIED_NOTE.1);
    }
    writer.write(path)
}

/// Says of a head's output projection that it is a copy.
pub(super) const TIED_NOTE: (&str, &str) = ("tied.lm_head.weight", "model.embed_tokens.weight");

#[cfg(test)]
mod tests {
    use super::super::PartFile;
    use super::*;
    use polder_protocol::layout::TensorLayout;

    #[test]
    fn a_state_becomes_a_part() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("part");
        let layout = PartLayout {
            tensors: vec![TensorLayout {
                name: "model.norm.weight".to_owned(),
                shape: vec![2],
            }],
        };
        write_state_part(&path, &layout, &[1.0, 2.0], Some((&[1, 2], &[3.0, 4.0]))).unwrap();
        let part = PartFile::open(&path).unwrap();
        part.check(&layout).unwrap();
        assert_eq!(part.tensor(OUTPUT).unwrap().to_f32().unwrap(), [3.0, 4.0]);
        assert!(write_state_part(&path, &layout, &[1.0], None).is_err());
    }
}
