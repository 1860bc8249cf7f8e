//! One part of a model as a safetensors file, some of whose tensors may be packed.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use polder_protocol::layout::PartLayout;
use safetensors::{Dtype, SafeTensors};

use super::import::Tensors;
use super::{WeightsError, source};
use crate::quant::{PackedBytes, PackedMatrix, PackedType, QuantError, widen};

/// Where metadata says how a tensor of bytes is packed.
pub(super) const PACKED_PREFIX: &str = "packed.";
/// The output projection: in the head of an untied model, and a copy of the embedding in the head of a tied one.
pub(super) const OUTPUT: &str = "lm_head.weight";

/// A memory-mapped safetensors file: a part file, or a shard of a Hugging Face model.
///
/// Every tensor lies within the file and has exactly the bytes that its type and shape say.
#[derive(Debug)]
pub struct PartFile {
    path: PathBuf,
    map: Arc<Mmap>,
    tensors: BTreeMap<String, Entry>,
    /// Tensors whose type has no meaning alone; only asking for one is an error.
    unread: BTreeMap<String, Raw>,
}

/// A tensor as it stands in the file.
#[derive(Debug, Clone)]
struct Raw {
    dtype: Dtype,
    shape: Vec<usize>,
    range: Range<usize>,
}

#[derive(Debug)]
struct Entry {
    ty: PackedType,
    shape: Vec<usize>,
    range: Range<usize>,
}

/// One tensor: its bytes stay in the file until they are asked for.
#[derive(Debug, Clone)]
pub struct TensorSource {
    /// How elements are stored.
    pub ty: PackedType,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Exactly the bytes of the elements.
    pub bytes: PackedBytes,
}

impl TensorSource {
    /// All elements as f32, row-major.
    ///
    /// # Errors
    ///
    /// [`QuantError`] where bytes and shape disagree, which [`PartFile::open`] has ruled out for its own.
    pub fn to_f32(&self) -> Result<Vec<f32>, QuantError> {
        let [rows, cols] = rows_and_cols(&self.shape);
        let expected = self.ty.matrix_bytes(rows, cols)?;
        if expected != self.bytes.len() {
            let (ty, found) = (self.ty, self.bytes.len());
            return Err(QuantError::Length {
                ty,
                rows,
                cols,
                expected,
                found,
            });
        }
        let mut values = vec![0.0; rows * cols];
        widen(self.ty, &self.bytes, &mut values)?;
        Ok(values)
    }

    /// Whether elements are in blocks, and not one by one as floats.
    pub const fn is_packed(&self) -> bool {
        !self.ty.is_float()
    }

    /// The tensor as a matrix of its last dimension by all others, multiplied as it is stored.
    ///
    /// # Errors
    ///
    /// As [`TensorSource::to_f32`].
    pub fn packed(&self) -> Result<PackedMatrix, QuantError> {
        let [rows, cols] = rows_and_cols(&self.shape);
        PackedMatrix::new(self.ty, rows, cols, self.bytes.clone())
    }
}

impl PartFile {
    /// Maps a file and checks its header: types, shapes, lengths, no hole and no overlap.
    ///
    /// # Errors
    ///
    /// [`WeightsError`] names the file and the tensor.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let map = source::map(path)?;
        let broken = |error: safetensors::SafeTensorError| WeightsError::Safetensors {
            path: path.to_owned(),
            reason: error.to_string(),
        };
        let (header_bytes, header) = SafeTensors::read_metadata(&map).map_err(broken)?;
        let notes = header.metadata().clone().unwrap_or_default();
        let data_start = header_bytes + size_of::<u64>();
        let mut tensors = BTreeMap::new();
        let mut unread = BTreeMap::new();
        for (name, info) in header.tensors() {
            // The safetensors crate has checked that offsets are in order, without holes, and end with the file.
            let range = data_start + info.data_offsets.0..data_start + info.data_offsets.1;
            let key = format!("{PACKED_PREFIX}{name}");
            let (ty, shape) = match (info.dtype, notes.get(&key)) {
                (Dtype::U8, Some(note)) => {
                    parse_packed_note(note).ok_or_else(|| packed_note_error(path, &key, note))?
                }
                (_, Some(note)) => return Err(packed_note_error(path, &key, note)),
                (Dtype::F32, None) => (PackedType::F32, info.shape.clone()),
                (Dtype::F16, None) => (PackedType::F16, info.shape.clone()),
                (Dtype::BF16, None) => (PackedType::BF16, info.shape.clone()),
                (dtype, None) => {
                    let shape = info.shape.clone();
                    unread.insert(name, Raw { dtype, shape, range });
                    continue;
                }
            };
            check_bytes(ty, &shape, range.len()).map_err(WeightsError::quant(path, &name))?;
            tensors.insert(name, Entry { ty, shape, range });
        }
        Ok(Self {
            path: path.to_owned(),
            map,
            tensors,
            unread,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all tensors, those of types that are not read included.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().chain(self.unread.keys()).map(String::as_str)
    }

    /// One tensor.
    ///
    /// # Errors
    ///
    /// [`WeightsError::MissingTensor`], or [`WeightsError::ElementType`] for a type that is not read.
    pub fn tensor(&self, name: &str) -> Result<TensorSource, WeightsError> {
        let missing = || WeightsError::MissingTensor {
            path: self.path.clone(),
            tensor: name.to_owned(),
        };
        if let Some(raw) = self.unread.get(name) {
            return Err(WeightsError::ElementType {
                path: self.path.clone(),
                tensor: name.to_owned(),
                dtype: format!("{:?}", raw.dtype),
            });
        }
        let entry = self.tensors.get(name).ok_or_else(missing)?;
        let bytes = PackedBytes::mapped(Arc::clone(&self.map), entry.range.clone()).ok_or_else(missing)?;
        Ok(TensorSource {
            ty: entry.ty,
            shape: entry.shape.clone(),
            bytes,
        })
    }

    /// Type, shape and bytes of a tensor whose type [`PartFile::tensor`] refuses.
    pub(super) fn raw(&self, name: &str) -> Option<(Dtype, &[usize], &[u8])> {
        let raw = self.unread.get(name)?;
        Some((raw.dtype, &raw.shape, self.map.get(raw.range.clone())?))
    }

    /// Checks that the file holds exactly the tensors of a part, in their shapes. The head of a tied model may hold
    /// its copy of the embedding besides.
    ///
    /// # Errors
    ///
    /// [`WeightsError`] names the first tensor that is missing, unknown, or of another shape.
    pub fn check(&self, layout: &PartLayout) -> Result<(), WeightsError> {
        for tensor in &layout.tensors {
            let found = self.tensor(&tensor.name)?.shape;
            let expected: Vec<usize> = tensor.shape.iter().map(|size| *size as usize).collect();
            if found != expected {
                return Err(WeightsError::Shape {
                    path: self.path.clone(),
                    tensor: tensor.name.clone(),
                    expected,
                    found,
                });
            }
        }
        let known = |name: &str| name == OUTPUT || layout.tensors.iter().any(|tensor| tensor.name == name);
        match self.names().find(|name| !known(name)) {
            None => Ok(()),
            Some(name) => Err(WeightsError::UnknownTensor {
                path: self.path.clone(),
                tensor: name.to_owned(),
            }),
        }
    }
}

impl Tensors for PartFile {
    fn names(&self) -> Vec<String> {
        self.names().map(str::to_owned).collect()
    }

    fn tensor(&self, name: &str) -> Result<TensorSource, WeightsError> {
        self.tensor(name)
    }

    fn place(&self) -> &Path {
        &self.path
    }
}

/// The last dimension, and the product of the others. The product cannot overflow in a checked tensor, save where a
/// dimension is zero; there it saturates and the matrix is empty all the same.
pub(super) fn rows_and_cols(shape: &[usize]) -> [usize; 2] {
    match shape.split_last() {
        None => [1, 1],
        Some((cols, outer)) => [
            outer.iter().fold(1, |rows: usize, size| rows.saturating_mul(*size)),
            *cols,
        ],
    }
}

fn check_bytes(ty: PackedType, shape: &[usize], found: usize) -> Result<(), QuantError> {
    let [rows, cols] = rows_and_cols(shape);
    let expected = ty.matrix_bytes(rows, cols)?;
    if found == expected && rows.checked_mul(cols).is_some() {
        return Ok(());
    }
    Err(QuantError::Length {
        ty,
        rows,
        cols,
        expected,
        found,
    })
}

/// `Q4_1 576 1536` is a type and dimensions.
fn parse_packed_note(note: &str) -> Option<(PackedType, Vec<usize>)> {
    let mut words = note.split(' ');
    let ty = words.next()?.parse().ok()?;
    let shape = words.map(|word| word.parse().ok()).collect::<Option<Vec<usize>>>()?;
    Some((ty, shape))
}

fn packed_note_error(path: &Path, key: &str, note: &str) -> WeightsError {
    WeightsError::PackedNote {
        path: path.to_owned(),
        key: key.to_owned(),
        value: note.chars().take(80).collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use polder_protocol::layout::TensorLayout;
    use proptest::prelude::*;

    use super::super::PartWriter;
    use super::*;
    use crate::quant::narrow;

    #[test]
    fn a_part_survives_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let part = open(&folder, &example()).unwrap();
        let plain = part.tensor("a.weight").unwrap();
        assert_eq!(plain.shape, [3]);
        assert_eq!(plain.to_f32().unwrap(), [1.0, 2.0, 3.0]);
        let packed = part.tensor("b.weight").unwrap();
        assert!(packed.is_packed());
        assert_eq!(packed.shape, [2, 32]);
        assert_eq!(packed.packed().unwrap().rows(), 2);
        assert!((packed.to_f32().unwrap()[0] + 31.0).abs() < 0.1);
    }

    #[test]
    fn a_part_of_another_layout_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let part = open(&folder, &example()).unwrap();
        let tensor = |name: &str, shape: &[u32]| TensorLayout {
            name: name.to_owned(),
            shape: shape.to_vec(),
        };
        let check = |tensors: Vec<TensorLayout>| part.check(&PartLayout { tensors });
        check(vec![tensor("a.weight", &[3]), tensor("b.weight", &[2, 32])]).unwrap();
        let shape = check(vec![tensor("a.weight", &[4]), tensor("b.weight", &[2, 32])]);
        assert!(matches!(shape, Err(WeightsError::Shape { tensor, .. }) if tensor == "a.weight"));
        let unknown = check(vec![tensor("a.weight", &[3])]);
        assert!(matches!(unknown, Err(WeightsError::UnknownTensor { tensor, .. }) if tensor == "b.weight"));
    }

    #[test]
    fn every_truncation_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = example();
        for length in 0..bytes.len() {
            assert!(open(&folder, &bytes[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn a_packed_note_that_lies_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let bytes = example();
        assert!(text(&bytes).contains("Q8_0 2 32"));
        for lie in ["Q8_0 9 32", "Q8_0 2 33", "Q4_0 2 32", "Q9_9 2 32", "Q8_0 2 -1"] {
            let at = bytes.windows(9).position(|window| window == b"Q8_0 2 32").unwrap();
            let mut bytes = bytes.clone();
            bytes[at..at + 9].copy_from_slice(lie.as_bytes().first_chunk::<9>().unwrap());
            assert!(open(&folder, &bytes).is_err(), "{lie}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn a_changed_file_never_panics(at in 0usize..400, byte: u8) {
            let folder = tempfile::tempdir().unwrap();
            let mut bytes = example();
            let at = at % bytes.len();
            bytes[at] = byte;
            if let Ok(part) = open(&folder, &bytes) {
                for name in part.names() {
                    let _ = part.tensor(name).map(|tensor| tensor.to_f32());
                }
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let folder = tempfile::tempdir().unwrap();
            let _ = open(&folder, &bytes);
        }
    }

    fn example() -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("example");
        let values: Vec<f32> = (0..64).map(|i| (i - 31) as f32).collect();
        let mut writer = PartWriter::new();
        writer.plain("a.weight", &[3], &[1.0, 2.0, 3.0]);
        writer.tensor(
            "b.weight",
            PackedType::Q8_0,
            &[2, 32],
            narrow(PackedType::Q8_0, &values).unwrap(),
        );
        writer.write(&path).unwrap();
        fs::read(path).unwrap()
    }

    fn open(folder: &tempfile::TempDir, bytes: &[u8]) -> Result<PartFile, WeightsError> {
        let path = folder.path().join("part");
        fs::write(&path, bytes).unwrap();
        PartFile::open(&path)
    }
}
