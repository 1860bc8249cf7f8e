//! Tokenizers that we make: bytes, and byte pairs learnt from texts.

use serde_json::{Map, Value, json};
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer, TokenizerImpl};

use super::TextError;

/// The token before every text.
pub const BEGIN_TEXT: &str = "<|begin|>";
/// The token after every text.
pub const END_TEXT: &str = "<|end|>";
const BYTES: u32 = 256;

/// The `tokenizer.json` of single bytes: ids 0 to 255 are the bytes, then [`BEGIN_TEXT`] and [`END_TEXT`].
pub fn bytes() -> Vec<u8> {
    let letters = (0..=255u8).map(|byte| (byte_letter(byte).to_string(), json!(byte)));
    let vocabulary: Map<String, Value> = letters.collect();
    let special = |id: u32, content: &str| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    };
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [special(BYTES, BEGIN_TEXT), special(BYTES + 1, END_TEXT)],
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": [],
        },
    });
    json.to_string().into_bytes()
}

/// Learns byte pairs from `texts` and returns a `tokenizer.json` of at most `vocabulary` tokens: [`BEGIN_TEXT`],
/// [`END_TEXT`], the bytes, and pairs. The same texts always give the same tokenizer.
///
/// # Errors
///
/// [`TextError::VocabularySize`] where the bytes do not fit, [`TextError::Tokenizer`] from the training.
pub fn byte_level_bpe<'a>(
    texts: impl Iterator<Item = &'a str> + Send,
    vocabulary: usize,
) -> Result<Vec<u8>, TextError> {
    if vocabulary < BYTES as usize + 2 {
        return Err(TextError::VocabularySize { asked: vocabulary });
    }
    let failed = |error: tokenizers::Error| TextError::Tokenizer {
        reason: error.to_string(),
    };
    let mut trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(vocabulary)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![
            AddedToken::from(BEGIN_TEXT, true),
            AddedToken::from(END_TEXT, true),
        ])
        .build();
    let cut = ByteLevel::new(false, true, true);
    let mut tokenizer: TokenizerImpl<BPE, tokenizers::NormalizerWrapper, ByteLevel, ByteLevel, ByteLevel> =
        TokenizerImpl::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(cut));
    tokenizer.with_decoder(Some(cut));
    // Parts of a text that the expression cuts anyway may be fed apart; lines keep memory small.
    let lines = texts.flat_map(|text| text.split_inclusive('\n'));
    tokenizer.train(&mut trainer, lines).map_err(failed)?;
    let json = serde_json::to_vec(&tokenizer).map_err(|error| failed(Box::new(error)))?;
    Tokenizer::from_bytes(&json).map_err(failed)?;
    Ok(json)
}

/// The letter by which byte-level tokenizers write a byte: printable ones stand for themselves, the rest are moved
/// beyond 255 in order (GPT-2's table).
pub(super) fn byte_letter(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|other| !printable(*other)).count() as u32; // Below 256.
    char::from_u32(BYTES + rank).unwrap_or(char::REPLACEMENT_CHARACTER)
}

#[cfg(test)]
mod tests {
    use super::super::Tokenizer;
    use super::*;

    #[test]
    fn byte_ids_are_bytes() {
        let tokenizer = Tokenizer::from_bytes(&bytes()).unwrap();
        let text = "Ça va?\n\tžluťoučký 語 🙂";
        let ids: Vec<u32> = text.bytes().map(u32::from).collect();
        assert_eq!(tokenizer.encode_bare(text).unwrap(), ids);
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        assert_eq!(tokenizer.vocabulary(), 258);
        assert_eq!(tokenizer.encode_bare("a<|end|>").unwrap(), [97, 257]);
    }

    #[test]
    fn learnt_pairs_shorten_the_texts_they_were_learnt_from() {
        let text = "the polder stays dry while the pumps turn, and the pumps turn while the wind blows\n".repeat(20);
        let json = byte_level_bpe([text.as_str()].into_iter(), 300).unwrap();
        let again = byte_level_bpe([text.as_str()].into_iter(), 300).unwrap();
        assert_eq!(json.len(), again.len());
        let tokenizer = Tokenizer::from_bytes(&json).unwrap();
        let ids = tokenizer.encode_bare(&text).unwrap();
        assert!(
            ids.len() < text.len() / 2,
            "{} tokens for {} bytes",
            ids.len(),
            text.len()
        );
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        assert!(tokenizer.vocabulary() <= 300);
        let other = "Łódź 語 🙂";
        assert_eq!(tokenizer.decode(&tokenizer.encode_bare(other).unwrap()).unwrap(), other);
    }

    #[test]
    fn a_vocabulary_without_room_for_bytes_is_refused() {
        assert!(matches!(
            byte_level_bpe(["a"].into_iter(), 257),
            Err(TextError::VocabularySize { asked: 257 })
        ));
    }
}
