//! The bytes that tokens stand for.

use std::collections::HashMap;

use serde_json::Value;

use super::Tokenizer;
use super::make::byte_letter;

/// How a tokenizer writes bytes in the texts of its tokens.
enum Writing {
    /// Every byte is a letter of GPT-2's table.
    Letters(HashMap<char, u8>),
    /// Text with U+2581 for spaces, and `<0x0A>` for bytes that are no text: SentencePiece's.
    Pieces,
    /// Text as it is.
    Plain,
}

/// The space of SentencePiece.
const SPACE: char = '\u{2581}';

impl Tokenizer {
    /// The bytes of every token, by id: `None` for special tokens and for ids that there are not. Bytes are those in the
    /// middle of a text; some decoders leave out a space at the beginning of one.
    pub fn token_bytes(&self) -> Vec<Option<Vec<u8>>> {
        let writing = writing(&self.decoder_json());
        let bytes = |id: usize| {
            let id = u32::try_from(id).ok().filter(|id| !self.is_special(*id))?;
            let text = self.token_text(id)?;
            match self.is_added(id) {
                // Tokens that were added stand in the text as they are written.
                true => Some(text.into_bytes()),
                false => written(&writing, &text),
            }
        };
        (0..self.vocabulary()).map(bytes).collect()
    }
}

fn writing(decoder: &Value) -> Writing {
    let kinds = kinds(decoder);
    let has = |kind: &str| kinds.iter().any(|known| known == kind);
    if has("ByteLevel") {
        return Writing::Letters((0..=255u8).map(|byte| (byte_letter(byte), byte)).collect());
    }
    if has("ByteFallback") || has("Metaspace") || has("Replace") {
        return Writing::Pieces;
    }
    Writing::Plain
}

/// The types of a decoder and of those in it.
fn kinds(decoder: &Value) -> Vec<String> {
    let own = decoder.get("type").and_then(Value::as_str).map(str::to_owned);
    let inner = decoder.get("decoders").and_then(Value::as_array);
    let inner = inner.into_iter().flatten().flat_map(kinds);
    own.into_iter().chain(inner).collect()
}

fn written(writing: &Writing, text: &str) -> Option<Vec<u8>> {
    match writing {
        Writing::Letters(letters) => text.chars().map(|letter| letters.get(&letter).copied()).collect(),
        Writing::Pieces => match single_byte(text) {
            Some(byte) => Some(vec![byte]),
            None => Some(text.replace(SPACE, " ").into_bytes()),
        },
        Writing::Plain => Some(text.as_bytes().to_vec()),
    }
}

/// The byte of `<0x0A>`.
fn single_byte(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let two = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    two.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::bytes;

    #[test]
    fn letters_of_the_table_are_bytes() {
        let tokenizer = Tokenizer::from_bytes(&bytes()).unwrap();
        let tokens = tokenizer.token_bytes();
        assert_eq!(tokens.len(), 258);
        for (id, token) in tokens.iter().take(256).enumerate() {
            assert_eq!(token.as_deref(), Some([id as u8].as_slice()));
        }
        // Special tokens stand for no text.
        assert_eq!(&tokens[256..], [None, None]);
    }

    #[test]
    fn pieces_have_spaces_and_single_bytes() {
        let pieces = Writing::Pieces;
        assert_eq!(written(&pieces, "\u{2581}ja"), Some(b" ja".to_vec()));
        assert_eq!(written(&pieces, "<0xE2>"), Some(vec![0xe2]));
        assert_eq!(written(&pieces, "<0xE2"), Some(b"<0xE2".to_vec()));
        assert_eq!(written(&pieces, "<0x+2>"), Some(b"<0x+2>".to_vec()));
    }
}
