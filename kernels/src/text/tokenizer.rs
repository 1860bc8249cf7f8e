//! A `tokenizer.json`.

use std::panic::{AssertUnwindSafe, catch_unwind};

use tokenizers::{DecoderWrapper, PostProcessorWrapper, PreTokenizerWrapper, TokenizerImpl};

use super::byte_pairs::{BytePairs, OtherModel};
use super::letter_table::CheckedNormalizer;
use super::{StreamDecoder, TextError};

/// A tokenizer as it is read, with checks before what the library would panic over.
type Read<M> = TokenizerImpl<M, CheckedNormalizer, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// Ids beyond the eightfold of the largest published vocabulary: a file could name one that takes all memory to list.
const VOCABULARY_MAX: usize = 1 << 21;

/// Turns text into token ids and back.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// One more than the largest id.
    vocabulary: usize,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer({} tokens)", self.vocabulary)
    }
}

impl Tokenizer {
    /// Reads the bytes of a `tokenizer.json`.
    ///
    /// # Errors
    ///
    /// [`TextError::Tokenizer`] says where the file is wrong.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TextError> {
        let refused = |reason: String| TextError::Tokenizer { reason };
        let (mut inner, largest) = contained(|| read(bytes)).map_err(refused)?;
        // A file may ask for texts to be cut or padded to a length; a model's prompt is neither.
        let _ = inner.with_truncation(None);
        inner.with_padding(None);
        let vocabulary = largest.map_or(0, |id| id as usize + 1);
        match vocabulary <= VOCABULARY_MAX {
            true => Ok(Self { inner, vocabulary }),
            false => Err(refused(format!("its largest id is not below {VOCABULARY_MAX}"))),
        }
    }

    /// One more than the largest id.
    pub const fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// The ids of a text that stands by itself: what the tokenizer adds, such as a beginning, is added. Special tokens
    /// that are written out in the text become their ids.
    ///
    /// # Errors
    ///
    /// [`TextError::Encode`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.ids(text, true)
    }

    /// The ids of a piece of text, or of a rendered conversation: nothing is added.
    ///
    /// # Errors
    ///
    /// [`TextError::Encode`].
    pub fn encode_bare(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.ids(text, false)
    }

    /// The text of some ids. Special tokens are left out, and ids that there are not.
    ///
    /// # Errors
    ///
    /// [`TextError::Decode`].
    pub fn decode(&self, ids: &[u32]) -> Result<String, TextError> {
        let decoded = contained(|| self.inner.decode(ids, true).map_err(|error| error.to_string()));
        decoded.map_err(|reason| TextError::Decode { reason })
    }

    /// Decodes tokens as they come.
    pub fn stream(&self) -> StreamDecoder<'_> {
        StreamDecoder::new(self)
    }

    /// The id of a token by its text in the vocabulary, such as `<|im_end|>`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// A token as the vocabulary has it.
    pub fn token_text(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Whether a token is special: a mark in the text and no part of it.
    pub(super) fn is_special(&self, id: u32) -> bool {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        added.get(&id).is_some_and(|token| token.special)
    }

    /// Whether a token was added to those of the model.
    pub(super) fn is_added(&self, id: u32) -> bool {
        self.inner
            .get_added_vocabulary()
            .get_added_tokens_decoder()
            .contains_key(&id)
    }

    /// The decoder as `tokenizer.json` has it.
    pub(super) fn decoder_json(&self) -> serde_json::Value {
        serde_json::to_value(self.inner.get_decoder()).unwrap_or_default()
    }

    fn ids(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TextError> {
        let encode = || self.inner.encode_fast(text, add_special_tokens);
        let encoding = contained(|| encode().map_err(|error| error.to_string()));
        let encoding = encoding.map_err(|reason| TextError::Encode { reason })?;
        Ok(encoding.get_ids().to_vec())
    }
}

/// Reads a tokenizer and its largest id.
fn read(bytes: &[u8]) -> Result<(tokenizers::Tokenizer, Option<u32>), String> {
    if let Ok(tokenizer) = serde_json::from_slice::<Read<BytePairs>>(bytes) {
        let added = tokenizer.get_added_vocabulary().get_added_tokens_decoder();
        let largest = added.keys().copied().max().max(tokenizer.get_model().largest);
        return Ok((tokenizers::Tokenizer::from(tokenizer), largest));
    }
    // Another kind of model, or no tokenizer at all: this reader tells them apart, and what is wrong.
    let other = serde_json::from_slice::<Read<OtherModel>>(bytes).map_err(|error| error.to_string())?;
    let other = tokenizers::Tokenizer::from(other);
    let largest = other.get_vocab(true).into_values().max();
    Ok((other, largest))
}

/// The library has been seen to panic over files that are wrong in ways it does not expect. They come from strangers, so
/// that is an error like others.
fn contained<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    // A tokenizer that panicked is not changed by it: what it keeps between texts is a cache behind a lock.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err("it is damaged, and cannot be used".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn tokenizer(model: &Value, pre_tokenizer: &Value) -> Result<Tokenizer, TextError> {
        let json = json!({"version": "1.0", "added_tokens": [], "pre_tokenizer": pre_tokenizer, "model": model});
        Tokenizer::from_bytes(json.to_string().as_bytes())
    }

    #[test]
    fn merges_that_make_nothing_known_are_refused() {
        let pairs = |prefix: Value| json!({"type": "BPE", "vocab": {"a": 0, "é": 1}, "merges": [["a", "é"]], "continuing_subword_prefix": prefix});
        for prefix in [Value::Null, json!("#"), json!("####")] {
            let mut model = pairs(prefix);
            assert!(tokenizer(&model, &Value::Null).is_err());
            // Files from before there were kinds.
            model.as_object_mut().unwrap().remove("type");
            assert!(tokenizer(&model, &Value::Null).is_err());
        }
    }

    #[test]
    fn an_id_that_takes_all_memory_to_list_is_refused() {
        let model = |id: usize| json!({"type": "BPE", "vocab": {"a": id}, "merges": []});
        assert!(tokenizer(&model(u32::MAX as usize), &Value::Null).is_err());
        assert!(tokenizer(&model(VOCABULARY_MAX), &Value::Null).is_err());
        assert_eq!(tokenizer(&model(300_000), &Value::Null).unwrap().vocabulary(), 300_001);
    }

    #[test]
    fn what_the_library_panics_over_is_an_error() {
        let model = json!({"type": "BPE", "vocab": {"a": 0}, "merges": []});
        let pieces_of_no_letters = json!({"type": "FixedLength", "length": 0});
        let tokenizer = tokenizer(&model, &pieces_of_no_letters).unwrap();
        assert!(matches!(tokenizer.encode("aa"), Err(TextError::Encode { .. })));
    }
}
