//! SentencePiece's `tokenizer.model`: byte pair encoding and unigrams, as a `tokenizer.json`.
//!
//! The file is a protocol buffer (`sentencepiece_model.proto`); fields that are not named here change no token.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::pieces::{NORMAL, Pieces, beginning_with};
use super::{TextError, base64};

const UNIGRAM: u64 = 1;
const BYTE_PAIRS: u64 = 2;

/// Converts the bytes of a `tokenizer.model`. A text begins with the file's beginning token, as with Llama's tokenizers.
///
/// # Errors
///
/// [`TextError::Tokenizer`] says what is wrong with the file, or which of its kinds is not implemented.
pub fn from_sentencepiece(bytes: &[u8]) -> Result<Vec<u8>, TextError> {
    let model = Model::read(bytes).ok_or_else(|| refused("it is no SentencePiece model, or is cut off"))?;
    if model.pieces.is_empty() {
        return Err(refused("it has no pieces"));
    }
    let mut seen = HashSet::new();
    if let Some((twice, ..)) = model.pieces.iter().find(|(text, ..)| !seen.insert(*text)) {
        return Err(refused(&format!(
            "the piece `{}` is there twice",
            twice.chars().take(32).collect::<String>()
        )));
    }
    if model.spaces_at_the_end || !model.escapes_spaces {
        return Err(refused("spaces at the end of pieces are not implemented"));
    }
    let mut normalizers = Vec::new();
    if !model.letters.is_empty() {
        normalizers.push(json!({"type": "Precompiled", "precompiled_charsmap": base64::encode(model.letters)}));
    }
    if model.joins_spaces {
        normalizers.push(json!({"type": "Strip", "strip_left": true, "strip_right": true}));
        normalizers.push(json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}));
    }
    let begin = usize::try_from(model.begin)
        .ok()
        .and_then(|id| Some((id, model.pieces.get(id)?.0)));
    let pieces = Pieces {
        pieces: model.pieces,
        normalizers,
        prefixed: model.prefixed,
        byte_fallback: model.byte_fallback,
    };
    let mut json = match model.kind {
        UNIGRAM => pieces.unigrams(),
        BYTE_PAIRS => pieces.byte_pairs(),
        _ => return Err(refused("words and letters as pieces are not implemented")),
    };
    if let Some((id, text)) = begin.and_then(|(id, text)| Some((u32::try_from(id).ok()?, text))) {
        json["post_processor"] = beginning_with(id, text);
    }
    let json: Value = json;
    Ok(json.to_string().into_bytes())
}

fn refused(reason: &str) -> TextError {
    TextError::Tokenizer {
        reason: reason.to_owned(),
    }
}

/// What decides how text is cut, with the defaults of the format.
struct Model<'a> {
    pieces: Vec<(&'a str, f64, u8)>,
    kind: u64,
    byte_fallback: bool,
    /// Below zero where there is none.
    begin: i64,
    /// A compiled table of letters.
    letters: &'a [u8],
    prefixed: bool,
    joins_spaces: bool,
    escapes_spaces: bool,
    spaces_at_the_end: bool,
}

impl<'a> Model<'a> {
    fn read(bytes: &'a [u8]) -> Option<Self> {
        let mut model = Self {
            pieces: Vec::new(),
            kind: UNIGRAM,
            byte_fallback: false,
            begin: 1,
            letters: &[],
            prefixed: true,
            joins_spaces: true,
            escapes_spaces: true,
            spaces_at_the_end: false,
        };
        for field in Fields(bytes) {
            match field? {
                (1, Wire::Bytes(piece)) => model.pieces.push(read_piece(piece)?),
                (2, Wire::Bytes(training)) => {
                    for field in Fields(training) {
                        match field? {
                            (3, Wire::Whole(kind)) => model.kind = kind,
                            (24, Wire::Whole(flag)) => model.spaces_at_the_end = flag != 0,
                            (35, Wire::Whole(flag)) => model.byte_fallback = flag != 0,
                            // An int32, widened with its sign.
                            (41, Wire::Whole(id)) => model.begin = id.cast_signed(),
                            _ => {}
                        }
                    }
                }
                (3, Wire::Bytes(normalising)) => {
                    for field in Fields(normalising) {
                        match field? {
                            (2, Wire::Bytes(letters)) => model.letters = letters,
                            (3, Wire::Whole(flag)) => model.prefixed = flag != 0,
                            (4, Wire::Whole(flag)) => model.joins_spaces = flag != 0,
                            (5, Wire::Whole(flag)) => model.escapes_spaces = flag != 0,
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        Some(model)
    }
}

fn read_piece(bytes: &[u8]) -> Option<(&str, f64, u8)> {
    let mut piece = ("", 0.0, NORMAL);
    for field in Fields(bytes) {
        match field? {
            (1, Wire::Bytes(text)) => piece.0 = std::str::from_utf8(text).ok()?,
            (2, Wire::Four(score)) => piece.1 = f64::from(f32::from_le_bytes(score)),
            (3, Wire::Whole(kind)) => piece.2 = u8::try_from(kind).ok()?,
            _ => {}
        }
    }
    piece.1.is_finite().then_some(piece)
}

/// The fields of a message; `None` once where they are malformed.
struct Fields<'a>(&'a [u8]);

enum Wire<'a> {
    Whole(u64),
    Bytes(&'a [u8]),
    Four([u8; 4]),
    Eight,
}

impl<'a> Iterator for Fields<'a> {
    type Item = Option<(u64, Wire<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field)
    }
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Option<(u64, Wire<'a>)> {
        let key = self.varint()?;
        let wire = match key & 7 {
            0 => Wire::Whole(self.varint()?),
            1 => self.take(8).map(|_| Wire::Eight)?,
            2 => {
                let length = usize::try_from(self.varint()?).ok()?;
                Wire::Bytes(self.take(length)?)
            }
            5 => Wire::Four(self.take(4)?.try_into().ok()?),
            _ => return None,
        };
        Some((key >> 3, wire))
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(length)?;
        self.0 = tail;
        Some(head)
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = *self.take(1)?.first()?;
            value |= u64::from(byte & 127) << shift;
            if byte < 128 {
                return Some(value);
            }
        }
        None
    }
}
