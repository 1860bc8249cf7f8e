//! Values of a GGUF file's metadata.

use std::ops::Range;

use super::GgufError;

/// A value: numbers as they are, the rest where it stands in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    Number(Number),
    Text(Range<usize>),
    Texts(Vec<Range<usize>>),
    Numbers { kind: Kind, range: Range<usize> },
}

/// A number as its bits, so that files compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Number {
    Whole(i128),
    Float(u64),
    Flag(bool),
}

/// A type of number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
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

impl Number {
    pub(super) fn as_f64(self) -> Option<f64> {
        match self {
            Self::Whole(number) => Some(number as f64),
            Self::Float(bits) => Some(f64::from_bits(bits)),
            Self::Flag(_) => None,
        }
    }
}

impl Kind {
    pub(super) const fn bytes(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Flag => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }

    /// `raw` has [`Kind::bytes`] bytes.
    pub(super) fn read(self, raw: &[u8]) -> Number {
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

pub(super) fn kind_of(field: &str, code: u32) -> Result<Kind, GgufError> {
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
