//! The block formats and their sizes.

use std::fmt;
use std::str::FromStr;

use super::QuantError;

/// How the elements of a row are stored. Layouts are those of ggml.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PackedType {
    /// Four bytes an element.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    BF16,
    /// 32 elements: f16 scale `d`, 32 int8 `q`; value `d·q`.
    Q8_0,
    /// 32 elements: f16 `d`, 16 bytes of nibbles; value `d·(q − 8)`.
    Q4_0,
    /// 32 elements: f16 `d`, f16 `m`, 16 bytes of nibbles; value `d·q + m`.
    Q4_1,
    /// 32 elements: f16 `d`, 4 bytes of fifth bits, 16 bytes of nibbles; value `d·(q − 16)`.
    Q5_0,
    /// 32 elements: f16 `d`, f16 `m`, 4 bytes of fifth bits, 16 bytes of nibbles; value `d·q + m`.
    Q5_1,
    /// 32 elements: f16 `d`, 16 bytes of nibbles; value `d·c[q]`, `c` being sixteen unevenly spaced whole numbers.
    Iq4Nl,
    /// 32 elements: one byte, the exponent `e`, 16 bytes of nibbles, E2M1 floats; value `2^(e − 128)·c[q]`, `c` being
    /// twice the floats (OCP Microscaling Formats 1.0).
    Mxfp4,
    /// 256 elements: 16 bytes of 4-bit scales and minima, 64 bytes of 2 bits each, f16 `d`, f16 `dmin`; value
    /// `d·s·q − dmin·m`.
    Q2K,
    /// 256 elements: 32 bytes of upper bits, 64 bytes of 2 bits each, 12 bytes of sixteen 6-bit scales, f16 `d`; value
    /// `d·(s − 32)·(q − 4)`.
    Q3K,
    /// 256 elements: f16 `d`, f16 `dmin`, 12 bytes of eight 6-bit scales and minima, 128 bytes of nibbles.
    Q4K,
    /// 256 elements: as [`PackedType::Q4K`], with 32 bytes of fifth bits before the nibbles.
    Q5K,
    /// 256 elements: 128 bytes of nibbles, 64 bytes of upper 2 bits, 16 int8 scales, f16 `d`; value `d·s·(q − 32)`.
    Q6K,
}

impl PackedType {
    /// Every type.
    pub const ALL: [Self; 15] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Iq4Nl,
        Self::Mxfp4,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// Elements of one block.
    pub const fn block_elements(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Iq4Nl | Self::Mxfp4 => 32,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q8_0 => 34,
            Self::Q4_0 | Self::Iq4Nl => 18,
            Self::Mxfp4 => 17,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Whether elements are stored one by one, as floats.
    pub const fn is_float(self) -> bool {
        self.block_elements() == 1
    }

    /// Bytes of a row of `cols` elements.
    ///
    /// # Errors
    ///
    /// [`QuantError::PartialBlock`] where `cols` is not a whole number of blocks, [`QuantError::TooLarge`] on overflow.
    pub fn row_bytes(self, cols: usize) -> Result<usize, QuantError> {
        self.matrix_bytes(1, cols)
    }

    /// Bytes of `rows` rows of `cols` elements.
    ///
    /// # Errors
    ///
    /// As [`PackedType::row_bytes`].
    pub fn matrix_bytes(self, rows: usize, cols: usize) -> Result<usize, QuantError> {
        if !cols.is_multiple_of(self.block_elements()) {
            return Err(QuantError::PartialBlock {
                ty: self,
                elements: cols,
                block: self.block_elements(),
            });
        }
        (cols / self.block_elements())
            .checked_mul(self.block_bytes())
            .and_then(|row| row.checked_mul(rows))
            .ok_or(QuantError::TooLarge { ty: self, rows, cols })
    }

    /// The type that ggml numbers so.
    pub const fn from_ggml_code(code: u32) -> Option<Self> {
        Some(match code {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            10 => Self::Q2K,
            11 => Self::Q3K,
            12 => Self::Q4K,
            13 => Self::Q5K,
            14 => Self::Q6K,
            20 => Self::Iq4Nl,
            30 => Self::BF16,
            39 => Self::Mxfp4,
            _ => return None,
        })
    }

    /// ggml's number.
    pub const fn ggml_code(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q2K => 10,
            Self::Q3K => 11,
            Self::Q4K => 12,
            Self::Q5K => 13,
            Self::Q6K => 14,
            Self::Iq4Nl => 20,
            Self::BF16 => 30,
            Self::Mxfp4 => 39,
        }
    }

    /// ggml's name, such as `Q4_K`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Iq4Nl => "IQ4_NL",
            Self::Mxfp4 => "MXFP4",
            Self::Q2K => "Q2_K",
            Self::Q3K => "Q3_K",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        }
    }
}

impl fmt::Display for PackedType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for PackedType {
    type Err = QuantError;

    fn from_str(text: &str) -> Result<Self, QuantError> {
        Self::ALL
            .into_iter()
            .find(|ty| ty.name() == text)
            .ok_or_else(|| QuantError::UnknownType {
                text: text.chars().take(32).collect(),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_survives_its_name() {
        for ty in PackedType::ALL {
            assert_eq!(ty.name().parse(), Ok(ty));
            assert_eq!(PackedType::from_ggml_code(ty.ggml_code()), Some(ty));
        }
        assert!("Q7_K".parse::<PackedType>().is_err());
    }

    #[test]
    fn a_row_that_ends_inside_a_block_is_refused() {
        assert_eq!(PackedType::Q4_1.row_bytes(576), Ok(360));
        assert!(PackedType::Q4_1.row_bytes(577).is_err());
        assert!(PackedType::Q6K.row_bytes(576).is_err());
        assert!(PackedType::F32.matrix_bytes(usize::MAX, 2).is_err());
    }
}
