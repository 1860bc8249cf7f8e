//! A `tokenizer.json`.

use tokenizers::{DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, TokenizerImpl};

use super::byte_pairs::BytePairs;
use super::{StreamDecoder, TextError};

type BytePairTokenizer =
    TokenizerImpl<BytePairs, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

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
        let (mut inner, largest) = match serde_json::from_slice::<BytePairTokenizer>(bytes) {
            Ok(tokenizer) => {
                let added = tokenizer.get_added_vocabulary().get_added_tokens_decoder();
                let largest = added.keys().copied().max().max(tokenizer.get_model().largest);
                (tokenizers::Tokenizer::from(tokenizer), largest)
            }
            // Another kind of model, or no tokenizer at all: this reader tells them apart, and what is wrong.
            Err(_) => {
                let inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| TextError::Tokenizer {
                    reason: error.to_string(),
                })?;
                let largest = inner.get_vocab(true).into_values().max();
                (inner, largest)
            }
        };
        // A file may ask for texts to be cut or padded to a length; a model's prompt is neither.
        let _ = inner.with_truncation(None);
        inner.with_padding(None);
        let vocabulary = largest.map_or(0, |id| id as usize + 1);
        Ok(Self { inner, vocabulary })
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
        self.inner.decode(ids, true).map_err(|error| TextError::Decode {
            reason: error.to_string(),
        })
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
        let encoding = self.inner.encode_fast(text, add_special_tokens);
        let encoding = encoding.map_err(|error| TextError::Encode {
            reason: error.to_string(),
        })?;
        Ok(encoding.get_ids().to_vec())
    }
}
