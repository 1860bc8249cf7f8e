//! Writes GGUF files, version 3: header, metadata, table of tensors, then their bytes, each aligned.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use crate::quant::{PackedBytes, PackedType};
use crate::weights::WeightsError;

const VERSION: u32 = 3;
/// What readers assume where the file does not say.
const ALIGNMENT: usize = 32;

// Codes of values' types.
const I32: u32 = 5;
const U32: u32 = 4;
const F32: u32 = 6;
const FLAG: u32 = 7;
const TEXT: u32 = 8;
const LIST: u32 = 9;

/// A file on its way. Metadata and tensors are written in the order in which they came.
#[derive(Default)]
pub(super) struct GgufWriter<'a> {
    entries: u64,
    metadata: Vec<u8>,
    tensors: Vec<Pending<'a>>,
}

/// What makes the bytes of a tensor, one piece after the other, when they are written: models are larger than memory.
pub(super) type Pieces<'a> = Box<dyn Iterator<Item = Result<PackedBytes, WeightsError>> + 'a>;

struct Pending<'a> {
    name: String,
    ty: PackedType,
    shape: Vec<usize>,
    length: usize,
    pieces: Pieces<'a>,
}

impl<'a> GgufWriter<'a> {
    pub(super) fn text(&mut self, key: &str, value: &str) {
        let mut bytes = Vec::new();
        push_text(&mut bytes, value);
        self.entry(key, TEXT, &bytes);
    }

    pub(super) fn whole(&mut self, key: &str, value: u32) {
        self.entry(key, U32, &value.to_le_bytes());
    }

    pub(super) fn number(&mut self, key: &str, value: f32) {
        self.entry(key, F32, &value.to_le_bytes());
    }

    pub(super) fn flag(&mut self, key: &str, value: bool) {
        self.entry(key, FLAG, &[u8::from(value)]);
    }

    pub(super) fn texts<'t>(&mut self, key: &str, values: impl ExactSizeIterator<Item = &'t str>) {
        let count = values.len();
        let mut items = Vec::new();
        for value in values {
            push_text(&mut items, value);
        }
        self.list(key, TEXT, count, &items);
    }

    pub(super) fn numbers(&mut self, key: &str, values: &[f32]) {
        let items: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.list(key, F32, values.len(), &items);
    }

    pub(super) fn whole_numbers(&mut self, key: &str, values: &[i32]) {
        let items: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.list(key, I32, values.len(), &items);
    }

    /// Adds a tensor by its bytes, which the caller has checked. `shape` is outermost first.
    pub(super) fn tensor(&mut self, name: String, ty: PackedType, shape: Vec<usize>, bytes: PackedBytes) {
        let length = bytes.len();
        self.pieces(name, ty, shape, length, Box::new(std::iter::once(Ok(bytes))));
    }

    /// Adds a tensor of `length` bytes that are made when they are written.
    pub(super) fn pieces(
        &mut self,
        name: String,
        ty: PackedType,
        shape: Vec<usize>,
        length: usize,
        pieces: Pieces<'a>,
    ) {
        self.tensors.push(Pending {
            name,
            ty,
            shape,
            length,
            pieces,
        });
    }

    /// Writes the file and waits until the disk has it.
    ///
    /// # Errors
    ///
    /// [`WeightsError::Io`], such as of a full disk.
    pub(super) fn write(self, path: &Path) -> Result<(), WeightsError> {
        let failed = || WeightsError::io("write", path);
        let mut header = b"GGUF".to_vec();
        header.extend(VERSION.to_le_bytes());
        header.extend((self.tensors.len() as u64).to_le_bytes());
        header.extend(self.entries.to_le_bytes());
        header.extend(&self.metadata);
        let mut offset = 0;
        for tensor in &self.tensors {
            push_text(&mut header, &tensor.name);
            header.extend((tensor.shape.len() as u32).to_le_bytes());
            for size in tensor.shape.iter().rev() {
                header.extend((*size as u64).to_le_bytes());
            }
            header.extend(tensor.ty.ggml_code().to_le_bytes());
            header.extend((offset as u64).to_le_bytes());
            offset += tensor.length.next_multiple_of(ALIGNMENT);
        }
        header.resize(header.len().next_multiple_of(ALIGNMENT), 0);
        let mut file = BufWriter::new(File::create(path).map_err(failed())?);
        file.write_all(&header).map_err(failed())?;
        for tensor in self.tensors {
            let length = tensor.length;
            let mut written = 0;
            for piece in tensor.pieces {
                let piece = piece?;
                file.write_all(&piece).map_err(failed())?;
                written += piece.len();
            }
            assert!(written == length, "the pieces of {} are the tensor", tensor.name);
            let padding = length.next_multiple_of(ALIGNMENT) - length;
            file.write_all([0; ALIGNMENT].get(..padding).unwrap_or_default())
                .map_err(failed())?;
        }
        let file = file.into_inner().map_err(|error| error.into_error());
        file.map_err(failed())?.sync_all().map_err(failed())
    }

    fn entry(&mut self, key: &str, code: u32, value: &[u8]) {
        self.entries += 1;
        push_text(&mut self.metadata, key);
        self.metadata.extend(code.to_le_bytes());
        self.metadata.extend(value);
    }

    fn list(&mut self, key: &str, code: u32, count: usize, items: &[u8]) {
        let mut bytes = code.to_le_bytes().to_vec();
        bytes.extend((count as u64).to_le_bytes());
        bytes.extend(items);
        self.entry(key, LIST, &bytes);
    }
}

fn push_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}
