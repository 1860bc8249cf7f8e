//! GGUF, versions 2 and 3: header, metadata, and the table of tensors.
//!
//! The format is ggml's (`docs/gguf.md` there). Nothing is copied while a file is read: values are ranges of it.

use std::collections::BTreeMap;
use std::ops::Range;

use thiserror::Error;

use crate::quant::{PackedType, QuantError};

/// Why bytes are not a GGUF file.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum GgufError {
    #[error("it does not begin with `GGUF`")]
    Magic,
    #[error("version {version} is not read, 2 and 3 are")]
    Version { version: u32 },
    #[error("it ends within {field}: {needed} bytes needed at {at}, {left} left")]
    Truncated {
        field: String,
        at: usize,
        needed: u64,
        left: usize,
    },
    #[error("{field} says {count}, which the file has no room for")]
    Count { field: String, count: u64 },
    #[error("{field} is not UTF-8")]
    Text { field: String },
    #[error("{field} has a value of unknown type {code}")]
    ValueType { field: String, code: u32 },
    #[error("{field} is there twice")]
    Repeated { field: String },
    #[error("metadata `{key}` is missing")]
    Missing { key: String },
    #[error("metadata `{key}` is not {must}")]
    Wrong { key: String, must: &'static str },
    #[error("tensor `{tensor}` has {dimensions} dimensions, 1 to 4 are allowed")]
    Dimensions { tensor: String, dimensions: u32 },
    #[error("tensor `{tensor}` is of ggml type {code}, which is not read")]
    TensorType { tensor: String, code: u32 },
    #[error("tensor `{tensor}` of shape {shape:?}")]
    Shape {
        tensor: String,
        shape: Vec<u64>,
        #[source]
        source: QuantError,
    },
    #[error("tensor `{tensor}` of shape {shape:?} is too large for this machine")]
    TooLarge { tensor: String, shape: Vec<u64> },
    #[error("tensor `{tensor}` lies at {start} to {end} of a file of {file_bytes} bytes")]
    Outside {
        tensor: String,
        start: u64,
        end: u64,
        file_bytes: usize,
    },
    #[error("tensor `{tensor}` begins at {start}, which is no multiple of {alignment}")]
    Alignment { tensor: String, start: u64, alignment: u64 },
    #[error("tensors `{first}` and `{second}` share bytes")]
    Overlap { first: String, second: String },
}

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

#[derive(Debug, Clone, PartialEq, Eq)]
enum Value {
    Number(Number),
    Text(Range<usize>),
    Texts(Vec<Range<usize>>),
    Numbers { kind: Kind, range: Range<usize> },
}

/// A number as its bits, so that files compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Number {
    Whole(i128),
    Float(u64),
    Flag(bool),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Flag,
    U64,
    I64,
    F64,
}

const TEXT_CODE: u32 = 8;
const ARRAY_CODE: u32 = 9;
const DIMENSIONS_MAX: u32 = 4;
const ALIGNMENT_DEFAULT: u64 = 32;
/// The least a metadata entry takes: a key's length, a type, and one byte.
const ENTRY_BYTES_MIN: u64 = 13;
/// The least a tensor's entry takes: a name's length, dimensions, type and offset.
const TENSOR_BYTES_MIN: u64 = 24;

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

struct Pending {
    name: String,
    ty: PackedType,
    shape: Vec<usize>,
    bytes: usize,
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
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

    fn u32(&mut self, field: &str) -> Result<u32, GgufError> {
        self.array(field).map(u32::from_le_bytes)
    }

    fn u64(&mut self, field: &str) -> Result<u64, GgufError> {
        self.array(field).map(u64::from_le_bytes)
    }

    /// Refuses a count of things of at least `each` bytes that the rest of the file cannot hold.
    fn room(&self, field: &str, count: u64, each: u64) -> Result<(), GgufError> {
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

    fn owned_text(&mut self, field: &str) -> Result<String, GgufError> {
        let range = self.text(field)?;
        text_at(self.bytes, &range, field).map(str::to_owned)
    }

    fn value(&mut self, key: &str) -> Result<Value, GgufError> {
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

    fn tensor(&mut self, name: String) -> Result<(Pending, u64), GgufError> {
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
        let [rows, cols] = super::part_file::rows_and_cols(&sizes);
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

impl Number {
    fn as_f64(self) -> Option<f64> {
        match self {
            Self::Whole(number) => Some(number as f64),
            Self::Float(bits) => Some(f64::from_bits(bits)),
            Self::Flag(_) => None,
        }
    }
}

impl Kind {
    const fn bytes(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Flag => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }

    /// `raw` has [`Kind::bytes`] bytes.
    fn read(self, raw: &[u8]) -> Number {
        let mut wide = [0; 8];
        for (to, from) in wide.iter_mut().zip(raw) {
            *to = *from;
        }
        let unsigned = u64::from_le_bytes(wide);
        match self {
            Self::U8 | Self::U16 | Self::U32 | Self::U64 => Number::Whole(i128::from(unsigned)),
            // Truncation keeps exactly the bytes that were read.
            Self::I8 => Number::Whole(i128::from(unsigned as i8)),
            Self::I16 => Number::Whole(i128::from(unsigned as i16)),
            Self::I32 => Number::Whole(i128::from(unsigned as i32)),
            Self::I64 => Number::Whole(i128::from(unsigned as i64)),
            Self::F32 => Number::Float(decimal(f32::from_bits(unsigned as u32)).to_bits()),
            Self::F64 => Number::Float(unsigned),
            Self::Flag => Number::Flag(unsigned != 0),
        }
    }
}

/// The f64 that is written as the f32 is: 1e-5 and not 0.00000999999974737875.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

fn kind_of(field: &str, code: u32) -> Result<Kind, GgufError> {
    Ok(match code {
        0 => Kind::U8,
        1 => Kind::I8,
        2 => Kind::U16,
        3 => Kind::I16,
        4 => Kind::U32,
        5 => Kind::I32,
        6 => Kind::F32,
        7 => Kind::Flag,
        10 => Kind::U64,
        11 => Kind::I64,
        12 => Kind::F64,
        _ => {
            return Err(GgufError::ValueType {
                field: field.to_owned(),
                code,
            });
        }
    })
}

fn text_at<'a>(bytes: &'a [u8], range: &Range<usize>, field: &str) -> Result<&'a str, GgufError> {
    let raw = bytes.get(range.clone()).unwrap_or_default();
    std::str::from_utf8(raw).map_err(|_| GgufError::Text {
        field: field.to_owned(),
    })
}

fn wrong(key: &str, must: &'static str) -> GgufError {
    GgufError::Wrong {
        key: key.to_owned(),
        must,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

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

    /// Writes small files for tests.
    pub(in super::super) struct Builder {
        entries: u64,
        metadata: Vec<u8>,
        tensors: u64,
        table: Vec<u8>,
        data: Vec<u8>,
    }

    impl Builder {
        pub(in super::super) fn new() -> Self {
            Self {
                entries: 0,
                metadata: Vec::new(),
                tensors: 0,
                table: Vec::new(),
                data: Vec::new(),
            }
        }

        fn entry(mut self, key: &str, code: u32, value: &[u8]) -> Self {
            self.entries += 1;
            push_text(&mut self.metadata, key);
            self.metadata.extend(code.to_le_bytes());
            self.metadata.extend(value);
            self
        }

        pub(in super::super) fn text(self, key: &str, value: &str) -> Self {
            let mut bytes = Vec::new();
            push_text(&mut bytes, value);
            self.entry(key, TEXT_CODE, &bytes)
        }

        pub(in super::super) fn u32(self, key: &str, value: u32) -> Self {
            self.entry(key, 4, &value.to_le_bytes())
        }

        pub(in super::super) fn f32(self, key: &str, value: f32) -> Self {
            self.entry(key, 6, &value.to_le_bytes())
        }

        pub(in super::super) fn flag(self, key: &str, value: bool) -> Self {
            self.entry(key, 7, &[u8::from(value)])
        }

        pub(in super::super) fn texts(self, key: &str, values: &[&str]) -> Self {
            let mut bytes = Vec::new();
            for value in values {
                push_text(&mut bytes, value);
            }
            self.list(key, TEXT_CODE, values.len() as u64, &bytes)
        }

        pub(in super::super) fn floats(self, key: &str, values: &[f32]) -> Self {
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            self.list(key, 6, values.len() as u64, &bytes)
        }

        pub(in super::super) fn whole_numbers(self, key: &str, values: &[i32]) -> Self {
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            self.list(key, 5, values.len() as u64, &bytes)
        }

        fn list(self, key: &str, code: u32, count: u64, items: &[u8]) -> Self {
            let mut bytes = code.to_le_bytes().to_vec();
            bytes.extend(count.to_le_bytes());
            bytes.extend(items);
            self.entry(key, ARRAY_CODE, &bytes)
        }

        /// `shape` is outermost first.
        pub(in super::super) fn tensor(self, name: &str, shape: &[u64], code: u32, bytes: &[u8]) -> Self {
            let offset = self.data.len().next_multiple_of(32);
            let mut builder = self.tensor_at(name, shape, code, offset as u64);
            builder.data.resize(offset, 0);
            builder.data.extend(bytes);
            builder
        }

        fn tensor_at(mut self, name: &str, shape: &[u64], code: u32, offset: u64) -> Self {
            self.tensors += 1;
            push_text(&mut self.table, name);
            self.table.extend((shape.len() as u32).to_le_bytes());
            for size in shape.iter().rev() {
                self.table.extend(size.to_le_bytes());
            }
            self.table.extend(code.to_le_bytes());
            self.table.extend(offset.to_le_bytes());
            self
        }

        fn data(mut self, bytes: &[u8]) -> Self {
            self.data.extend(bytes);
            self
        }

        pub(in super::super) fn finish(self) -> Vec<u8> {
            let mut bytes = b"GGUF".to_vec();
            bytes.extend(3u32.to_le_bytes());
            bytes.extend(self.tensors.to_le_bytes());
            bytes.extend(self.entries.to_le_bytes());
            bytes.extend(self.metadata);
            bytes.extend(self.table);
            bytes.resize(bytes.len().next_multiple_of(32), 0);
            bytes.extend(self.data);
            bytes
        }
    }

    fn push_text(bytes: &mut Vec<u8>, text: &str) {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
    }
}
