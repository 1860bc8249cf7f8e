//! Normalizers of a `tokenizer.json`, with the compiled table of letters that some have (`precompiled_charsmap`) checked
//! before the tokenizers' own reader sees it: that one takes memory by a number in the table, and follows its places and
//! offsets wherever they point.
//!
//! The table is SentencePiece's: the bytes of a double array (`u32`, little-endian), its units of four bytes, then texts
//! that end with a zero byte. The array is a tree of bytes; a leaf says where the text begins that takes their place.

use serde::de::{Deserialize, Deserializer, Error};
use serde_json::Value;
use tokenizers::{NormalizedString, Normalizer, NormalizerWrapper, Result as TokenizersResult};

use super::base64;

/// The longest table of published tokenizers has half a million bytes.
const TABLE_BYTES_MAX: usize = 1 << 24;

/// A normalizer whose tables can be followed from any text.
pub(super) struct CheckedNormalizer(NormalizerWrapper);

impl From<CheckedNormalizer> for NormalizerWrapper {
    fn from(checked: CheckedNormalizer) -> Self {
        checked.0
    }
}

impl Normalizer for CheckedNormalizer {
    fn normalize(&self, text: &mut NormalizedString) -> TokenizersResult<()> {
        self.0.normalize(text)
    }
}

impl<'de> Deserialize<'de> for CheckedNormalizer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        match tables_are_sound(&value) {
            true => serde_json::from_value(value).map(Self).map_err(D::Error::custom),
            false => Err(D::Error::custom("the table of letters is damaged")),
        }
    }
}

/// Whether every table in a normalizer, or in those inside it, is one.
fn tables_are_sound(value: &Value) -> bool {
    match value {
        Value::Object(fields) => fields.iter().all(|(key, value)| match key.as_str() {
            "precompiled_charsmap" => {
                let table = value.as_str().filter(|text| text.len() <= TABLE_BYTES_MAX);
                table.and_then(base64::decode).is_some_and(|table| is_sound(&table))
            }
            // A tag of the kind promises a table; without one the reader panics.
            "type" if value == "Precompiled" => fields.contains_key("precompiled_charsmap"),
            _ => tables_are_sound(value),
        }),
        Value::Array(items) => items.iter().all(tables_are_sound),
        _ => true,
    }
}

/// Whether every place that a text can lead to is in the array, and every leaf's text in the texts.
fn is_sound(table: &[u8]) -> bool {
    let Some((size, rest)) = table.split_first_chunk::<4>() else {
        return false;
    };
    // As the reader has it: a size that is no multiple of four is cut.
    let units = u32::from_le_bytes(*size) as usize / 4;
    let Some((array, texts)) = rest.split_at_checked(units.saturating_mul(4)) else {
        return false;
    };
    let (Ok(texts), (array, _)) = (std::str::from_utf8(texts), array.as_chunks::<4>()) else {
        return false;
    };
    let array: Vec<usize> = array.iter().map(|unit| u32::from_le_bytes(*unit) as usize).collect();
    let Some(root) = array.first() else { return false };
    let mut seen = vec![false; array.len()];
    let mut open = vec![(0, *root)];
    while let Some((place, unit)) = open.pop() {
        let children = place ^ offset(unit);
        // A byte is laid over the place of the children; 0 ends a text.
        if children | 0xff >= array.len() {
            return false;
        }
        if place != 0 && has_leaf(unit) {
            let at = array.get(children).map_or(usize::MAX, |leaf| leaf & 0x7fff_ffff);
            if !texts.is_char_boundary(at) {
                return false;
            }
        }
        for byte in 1..=0xff {
            let child = children ^ byte;
            if let (Some(unit), Some(seen)) = (array.get(child), seen.get_mut(child))
                && label(*unit) == byte
                && !std::mem::replace(seen, true)
            {
                open.push((child, *unit));
            }
        }
    }
    true
}

/// Where a unit's children are, laid over its own place.
fn offset(unit: usize) -> usize {
    (unit >> 10) << ((unit & 1 << 9) >> 6)
}

/// The byte that leads to a unit; more than a byte for a leaf's value.
fn label(unit: usize) -> usize {
    unit & (1 << 31 | 0xff)
}

fn has_leaf(unit: usize) -> bool {
    unit >> 8 & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::super::Tokenizer;
    use super::*;
    use serde_json::json;

    /// A table that writes `b` for `a`, as units of the array at their places, and texts.
    fn table(changed: &[(usize, u32)], texts: &[u8]) -> Vec<u8> {
        let mut array = vec![0u32; 512];
        // The root's children are at 256; `a` has a leaf, whose value is laid over its own children's place.
        array[0] = 256 << 10;
        let place = 256 ^ 0x61;
        array[place] = u32::from(b'a') | 1 << 8 | (0x61 << 10);
        array[256] = 1 << 31;
        for (place, unit) in changed {
            array[*place] = *unit;
        }
        let bytes = array.iter().flat_map(|unit| unit.to_le_bytes());
        let size = 4 * array.len() as u32;
        size.to_le_bytes()
            .into_iter()
            .chain(bytes)
            .chain(texts.iter().copied())
            .collect()
    }

    fn tokenizer(normalizer: &Value) -> Result<Tokenizer, super::super::TextError> {
        let vocabulary = json!({"a": 0, "b": 1});
        let json = json!({
            "version": "1.0", "added_tokens": [], "normalizer": normalizer,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        });
        Tokenizer::from_bytes(json.to_string().as_bytes())
    }

    fn precompiled(table: &[u8]) -> Value {
        json!({"type": "Precompiled", "precompiled_charsmap": base64::encode(table)})
    }

    #[test]
    fn a_sound_table_is_followed() {
        let sound = tokenizer(&precompiled(&table(&[], b"b\0"))).unwrap();
        assert_eq!(sound.encode("ab").unwrap(), [1, 1]);
    }

    #[test]
    fn a_damaged_table_is_refused() {
        let beyond_the_array = (0, 0x3ff << 10);
        let beyond_the_texts = (256, 1 << 31 | 3);
        for (name, damaged) in [
            ("no size", vec![]),
            ("a size without an array", vec![0xff; 4]),
            ("an empty array", vec![0; 4]),
            ("children beyond the array", table(&[beyond_the_array], b"b\0")),
            ("a text beyond the texts", table(&[beyond_the_texts], b"b\0")),
            ("texts that are none", table(&[], &[0xff])),
        ] {
            assert!(tokenizer(&precompiled(&damaged)).is_err(), "{name}");
            let inside = json!({"type": "Sequence", "normalizers": [precompiled(&damaged)]});
            assert!(tokenizer(&inside).is_err(), "{name}, inside a sequence");
        }
        assert!(tokenizer(&json!({"type": "Precompiled"})).is_err());
        assert!(tokenizer(&json!({"type": "Precompiled", "precompiled_charsmap": "?"})).is_err());
    }
}
