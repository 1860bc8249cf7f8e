//! A cursor over a GGUF file: every count and length is checked against what is left before memory is taken.

use std::ops::Range;

use super::GgufError;
use super::value::{Value, kind_of};
use crate::quant::PackedType;

pub(super) const TEXT_CODE: u32 = 8;
pub(super) const ARRAY_CODE: u32 = 9;
const DIMENSIONS_MAX: u32 = 4;
pub(super) const ALIGNMENT_DEFAULT: u64 = 32;
/// The least a metadata entry takes: a key's length, a type, and one byte.
pub(super) const ENTRY_BYTES_MIN: u64 = 13;
/// The least a tensor's entry takes: a name's length, dimensions, type and offset.
pub(super) const TENSOR_BYTES_MIN: u64 = 24;

/// A tensor as its entry describes it.
pub(super) struct Pending {
    pub(super) name: String,
    pub(super) ty: PackedType,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: usize,
}

/// What was read of a file, and where the next byte is.
pub(super) struct Reader<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) at: usize,
}

impl Reader<'_> {
    /// The range of the next `count` bytes.
    fn take(&mut self, field: &str, count: u64) -> Result<Range<usize>, GgufError> {
        let left = self.bytes.len() - self.at;
        match usize::try_from(count) {
            Ok(count) if count <= left => {
                let range = self.at..self.at + count;
                self.at = range.end;
                Ok(range)
            }
            _ => Err(GgufError::Truncated {
                field: field.to_owned(),
                at: self.at,
                needed: count,
                left,
            }),
        }
    }

    fn array<const N: usize>(&mut self, field: &str) -> Result<[u8; N], GgufError> {
        let range = self.take(field, N as u64)?;
        let mut array = [0; N];
        array.copy_from_slice(&self.bytes[range]);
        Ok(array)
    }

    pub(super) fn u32(&mut self, field: &str) -> Result<u32, GgufError> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, field: &str) -> Result<u64, GgufError> {
        self.array(field).map(u64::from_le_bytes)
    }

    /// Refuses a count of things of at least `each` bytes that the rest of the file cannot hold.
    pub(super) fn room(&self, field: &str, count: u64, each: u64) -> Result<(), GgufError> {
        let left = (self.bytes.len() - self.at) as u64;
        if count > left / each {
            return Err(GgufError::Count {
                field: field.to_owned(),
                count,
            });
        }
        Ok(())
    }

    fn text(&mut self, field: &str) -> Result<Range<usize>, GgufError> {
        let length = self.u64(field)?;
        self.take(field, length)
    }

    pub(super) fn owned_text(&mut self, field: &str) -> Result<String, GgufError> {
        let range = self.text(field)?;
        text_at(self.bytes, &range, field).map(str::to_owned)
    }

    pub(super) fn value(&mut self, key: &str) -> Result<Value, GgufError> {
        let field = format!("metadata `{key}`");
        match self.u32(&field)? {
            TEXT_CODE => self.text(&field).map(Value::Text),
            ARRAY_CODE => self.list(&field),
            code => {
                let kind = kind_of(&field, code)?;
                let range = self.take(&field, kind.bytes() as u64)?;
                Ok(Value::Number(kind.read(&self.bytes[range])))
            }
        }
    }

    fn list(&mut self, field: &str) -> Result<Value, GgufError> {
        let code = self.u32(field)?;
        let count = self.u64(field)?;
        if code == TEXT_CODE {
            self.room(field, count, size_of::<u64>() as u64)?;
            let texts = (0..count).map(|_| self.text(field));
            return texts.collect::<Result<_, _>>().map(Value::Texts);
        }
        let kind = kind_of(field, code)?;
        let bytes = count.saturating_mul(kind.bytes() as u64);
        let range = self.take(field, bytes)?;
        Ok(Value::Numbers { kind, range })
    }

    pub(super) fn tensor(&mut self, name: String) -> Result<(Pending, u64), GgufError> {
        let field = format!("tensor `{name}`");
        let dimensions = self.u32(&field)?;
        if !(1..=DIMENSIONS_MAX).contains(&dimensions) {
            return Err(GgufError::Dimensions {
                tensor: name,
                dimensions,
            });
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(self.u64(&field)?);
        }
        shape.reverse();
        let code = self.u32(&field)?;
        let offset = self.u64(&field)?;
        let Some(ty) = PackedType::from_ggml_code(code) else {
            return Err(GgufError::TensorType { tensor: name, code });
        };
        let sizes = shape
            .iter()
            .map(|size| usize::try_from(*size).ok())
            .collect::<Option<Vec<_>>>();
        let elements = sizes.as_ref().and_then(|sizes| product(sizes));
        let (Some(sizes), Some(_)) = (sizes, elements) else {
            return Err(GgufError::TooLarge { tensor: name, shape });
        };
        let [rows, cols] = crate::weights::part_file::rows_and_cols(&sizes);
        match ty.matrix_bytes(rows, cols) {
            Ok(bytes) => {
                let shape = sizes;
                Ok((Pending { name, ty, shape, bytes }, offset))
            }
            Err(source) => Err(GgufError::Shape {
                tensor: name,
                shape,
                source,
            }),
        }
    }
}
fn product(sizes: &[usize]) -> Option<usize> {
    sizes
        .iter()
        .try_fold(1usize, |product, size| product.checked_mul(*size))
}

pub(super) fn text_at<'a>(bytes: &'a [u8], range: &Range<usize>, field: &str) -> Result<&'a str, GgufError> {
    let raw = bytes.get(range.clone()).unwrap_or_default();
    std::str::from_utf8(raw).map_err(|_| GgufError::Text {
        field: field.to_owned(),
    })
}
