//! The header of a GGUF file, versions 2 and 3: metadata, and the table of tensors.
//!
//! The format is ggml's (`docs/gguf.md` there). Nothing is copied while a file is read: values are ranges of it.

use std::collections::BTreeMap;
use std::ops::Range;

use super::GgufError;
use super::error::wrong;
use super::reader::{ALIGNMENT_DEFAULT, ENTRY_BYTES_MIN, Pending, Reader, TENSOR_BYTES_MIN, text_at};
use super::value::{Number, Value};
use crate::quant::PackedType;

/// A file's header: all ranges lie within the bytes that it was parsed from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gguf {
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, GgufTensor>,
}

/// An entry of the table of tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    /// How elements are stored.
    pub ty: PackedType,
    /// Dimensions, outermost first (the file has them innermost first).
    pub shape: Vec<usize>,
    /// Where in the file.
    pub range: Range<usize>,
}

impl Gguf {
    /// Reads a whole file's header and checks every tensor's place.
    ///
    /// # Errors
    ///
    /// [`GgufError`] names the field or the tensor.
    pub fn parse(bytes: &[u8]) -> Result<Self, GgufError> {
        let mut reader = Reader { bytes, at: 0 };
        if bytes.get(..4) != Some(b"GGUF") {
            return Err(GgufError::Magic);
        }
        reader.at = 4;
        let version = reader.u32("the version")?;
        if !(2..=3).contains(&version) {
            return Err(GgufError::Version { version });
        }
        let tensors = reader.u64("the number of tensors")?;
        let entries = reader.u64("the number of metadata entries")?;
        reader.room("the number of tensors", tensors, TENSOR_BYTES_MIN)?;
        reader.room("the number of metadata entries", entries, ENTRY_BYTES_MIN)?;
        let mut metadata = BTreeMap::new();
        for index in 0..entries {
            let key = reader.owned_text(&format!("the key of metadata entry {index}"))?;
            let value = reader.value(&key)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(GgufError::Repeated {
                    field: format!("metadata `{key}`"),
                });
            }
        }
        let mut file = Self {
            metadata,
            tensors: BTreeMap::new(),
        };
        file.read_tensors(&mut reader, tensors)?;
        Ok(file)
    }

    /// All tensors by ggml name.
    pub fn tensors(&self) -> &BTreeMap<String, GgufTensor> {
        &self.tensors
    }

    /// A text; `None` where the key is absent. `bytes` is the file.
    ///
    /// # Errors
    ///
    /// [`GgufError::Wrong`] where the key has another kind of value.
    pub fn text<'a>(&self, bytes: &'a [u8], key: &str) -> Result<Option<&'a str>, GgufError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Text(range)) => text_at(bytes, range, key).map(Some),
            Some(_) => Err(wrong(key, "a text")),
        }
    }

    /// A list of texts; `None` where the key is absent.
    ///
    /// # Errors
    ///
    /// As [`Gguf::text`].
    pub fn texts<'a>(&self, bytes: &'a [u8], key: &str) -> Result<Option<Vec<&'a str>>, GgufError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Texts(ranges)) => ranges
                .iter()
                .map(|range| text_at(bytes, range, key))
                .collect::<Result<_, _>>()
                .map(Some),
            Some(_) => Err(wrong(key, "a list of texts")),
        }
    }

    /// A whole number that is not negative; `None` where the key is absent.
    ///
    /// # Errors
    ///
    /// As [`Gguf::text`].
    pub fn whole(&self, key: &str) -> Result<Option<u64>, GgufError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Number(Number::Whole(number))) => u64::try_from(*number)
                .map(Some)
                .map_err(|_| wrong(key, "a whole number from 0")),
            Some(_) => Err(wrong(key, "a whole number from 0")),
        }
    }

    /// A finite number; `None` where the key is absent.
    ///
    /// # Errors
    ///
    /// As [`Gguf::text`].
    pub fn number(&self, key: &str) -> Result<Option<f64>, GgufError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Number(number)) => match number.as_f64() {
                Some(number) if number.is_finite() => Ok(Some(number)),
                _ => Err(wrong(key, "a finite number")),
            },
            Some(_) => Err(wrong(key, "a finite number")),
        }
    }

    /// A flag; `None` where the key is absent.
    ///
    /// # Errors
    ///
    /// As [`Gguf::text`].
    pub fn flag(&self, key: &str) -> Result<Option<bool>, GgufError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Number(Number::Flag(flag))) => Ok(Some(*flag)),
            Some(_) => Err(wrong(key, "true or false")),
        }
    }

    /// A list of numbers; `None` where the key is absent.
    ///
    /// # Errors
    ///
    /// As [`Gguf::text`].
    pub fn numbers(&self, bytes: &[u8], key: &str) -> Result<Option<Vec<f64>>, GgufError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Numbers { kind, range }) => {
                let raw = bytes.get(range.clone()).unwrap_or_default();
                let numbers = raw.chunks_exact(kind.bytes()).map(|raw| kind.read(raw).as_f64());
                let numbers = numbers.collect::<Option<Vec<_>>>();
                numbers.map(Some).ok_or_else(|| wrong(key, "a list of numbers"))
            }
            Some(_) => Err(wrong(key, "a list of numbers")),
        }
    }

    /// Whether there is such a key.
    pub fn has(&self, key: &str) -> bool {
        self.metadata.contains_key(key)
    }

    /// All keys, in order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.keys().map(String::as_str)
    }

    /// Whether a key's value is a list of numbers or flags.
    pub(super) fn is_list(&self, key: &str) -> bool {
        matches!(self.metadata.get(key), Some(Value::Numbers { .. }))
    }

    /// Whether a key's value is 0 or false, which is how files say of a feature that it is not there.
    pub(super) fn is_nothing(&self, key: &str) -> bool {
        let Some(Value::Number(number)) = self.metadata.get(key) else {
            return false;
        };
        matches!(number, Number::Flag(false)) || number.as_f64() == Some(0.0)
    }

    fn read_tensors(&mut self, reader: &mut Reader<'_>, count: u64) -> Result<(), GgufError> {
        let alignment = self.whole("general.alignment")?.unwrap_or(ALIGNMENT_DEFAULT);
        if !alignment.is_power_of_two() || alignment > 1 << 20 {
            return Err(wrong("general.alignment", "a power of two up to 2^20"));
        }
        let mut pending = Vec::new();
        for index in 0..count {
            let name = reader.owned_text(&format!("the name of tensor {index}"))?;
            pending.push(reader.tensor(name)?);
        }
        let file_bytes = reader.bytes.len();
        // A tensor's offset counts from the first aligned byte after the table.
        let data_start = (reader.at as u64).next_multiple_of(alignment);
        let mut places = Vec::with_capacity(pending.len());
        for (tensor, offset) in pending {
            let Pending { name, ty, shape, bytes } = tensor;
            if offset % alignment != 0 {
                return Err(GgufError::Alignment {
                    tensor: name,
                    start: offset,
                    alignment,
                });
            }
            let start = data_start.saturating_add(offset);
            let end = start.saturating_add(bytes as u64);
            if end > file_bytes as u64 {
                return Err(GgufError::Outside {
                    tensor: name,
                    start,
                    end,
                    file_bytes,
                });
            }
            // Both are at most the file's length, which is a `usize`.
            let range = start as usize..end as usize;
            places.push((range.clone(), name.clone()));
            if self
                .tensors
                .insert(name.clone(), GgufTensor { ty, shape, range })
                .is_some()
            {
                return Err(GgufError::Repeated {
                    field: format!("tensor `{name}`"),
                });
            }
        }
        places.sort_by_key(|(range, _)| (range.start, range.end));
        for pair in places.windows(2) {
            if let [(first, first_name), (second, second_name)] = pair
                && second.start < first.end
            {
                return Err(GgufError::Overlap {
                    first: first_name.clone(),
                    second: second_name.clone(),
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::builder::Builder;
    use super::super::reader::TEXT_CODE;
    use super::*;

    #[test]
    fn reads_metadata_and_tensors() {
        let bytes = example();
        let file = Gguf::parse(&bytes).unwrap();
        assert_eq!(file.text(&bytes, "general.name"), Ok(Some("example")));
        assert_eq!(file.whole("llama.block_count"), Ok(Some(2)));
        assert_eq!(file.number("epsilon"), Ok(Some(1e-5)));
        assert_eq!(file.texts(&bytes, "tokens"), Ok(Some(vec!["a", "b"])));
        assert_eq!(file.numbers(&bytes, "scores"), Ok(Some(vec![0.5, -1.0])));
        assert_eq!(
            file.whole("general.name"),
            Err(wrong("general.name", "a whole number from 0"))
        );
        let tensor = &file.tensors()["w"];
        assert_eq!(tensor.shape, [2, 32]);
        assert_eq!(tensor.ty, PackedType::Q8_0);
        assert_eq!(bytes[tensor.range.clone()], [7; 68]);
    }

    #[test]
    fn every_truncation_is_refused() {
        let bytes = example();
        for length in 0..bytes.len() {
            assert!(
                Gguf::parse(&bytes[..length]).is_err(),
                "{length} bytes of {}",
                bytes.len()
            );
        }
    }

    #[test]
    fn absurd_counts_are_refused_before_memory_is_taken() {
        let mut bytes = example();
        bytes[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(
            Gguf::parse(&bytes),
            Err(GgufError::Count { count: u64::MAX, .. })
        ));
        let list = Builder::new().list("tokens", TEXT_CODE, u64::MAX / 8, &[]).finish();
        assert!(matches!(Gguf::parse(&list), Err(GgufError::Count { .. })));
        let list = Builder::new().list("scores", 6, u64::MAX / 2, &[]).finish();
        assert!(matches!(Gguf::parse(&list), Err(GgufError::Truncated { .. })));
    }

    #[test]
    fn shapes_that_lie_are_refused() {
        let parse = |shape: &[u64], bytes: usize| {
            let file = Builder::new().tensor("w", shape, 8, &vec![0; bytes]).finish();
            Gguf::parse(&file)
        };
        parse(&[2, 32], 68).unwrap();
        assert!(matches!(parse(&[4, 32], 68), Err(GgufError::Outside { tensor, .. }) if tensor == "w"));
        assert!(matches!(parse(&[2, 33], 68), Err(GgufError::Shape { .. })));
        assert!(matches!(parse(&[u64::MAX, 32], 68), Err(GgufError::TooLarge { .. })));
        assert!(matches!(
            parse(&[1, 1, 1, 1, 32], 34),
            Err(GgufError::Dimensions { .. })
        ));
    }

    #[test]
    fn tensors_that_share_bytes_are_refused() {
        let file = Builder::new()
            .tensor_at("a", &[32], 8, 0)
            .tensor_at("b", &[32], 8, 32)
            .data(&[0; 128])
            .finish();
        assert!(matches!(Gguf::parse(&file), Err(GgufError::Overlap { .. })));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Gguf::parse(&bytes);
        }

        #[test]
        fn changed_bytes_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
            let mut bytes = example();
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if let Ok(file) = Gguf::parse(&bytes) {
                for tensor in file.tensors().values() {
                    assert!(bytes.get(tensor.range.clone()).is_some());
                }
                let _ = (file.texts(&bytes, "tokens"), file.numbers(&bytes, "scores"));
            }
        }
    }

    fn example() -> Vec<u8> {
        Builder::new()
            .text("general.name", "example")
            .u32("llama.block_count", 2)
            .f32("epsilon", 1e-5)
            .texts("tokens", &["a", "b"])
            .floats("scores", &[0.5, -1.0])
            .tensor("w", &[2, 32], 8, &[7; 68])
            .finish()
    }
}
