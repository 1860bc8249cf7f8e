//! Text to tokens and back, and conversations to prompts.

mod base64;
mod byte_pairs;
mod chat;
mod grammar;
mod letter_table;
mod make;
pub(crate) mod named_templates;
pub(crate) mod pieces;
mod sentencepiece;
mod stream;
mod tekken;
mod template_methods;
mod tokenizer;
mod tool_words;
mod vocabulary;

pub use chat::ChatTemplate;
pub use grammar::{GrammarState, GrammarTokens, TokenSet};
pub use make::{BEGIN_TEXT, END_TEXT, byte_level_bpe, bytes};
pub use sentencepiece::from_sentencepiece;
pub use stream::StreamDecoder;
pub use tekken::from_tekken;
pub use tokenizer::Tokenizer;

use thiserror::Error;

/// What can be wrong with a tokenizer or a template, which come from whoever made the model.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum TextError {
    #[error("not a tokenizer.json: {reason}")]
    Tokenizer { reason: String },
    #[error("the tokenizer cannot read this text: {reason}")]
    Encode { reason: String },
    #[error("the tokenizer cannot turn tokens into text: {reason}")]
    Decode { reason: String },
    #[error("a vocabulary of {asked} tokens is too small: 256 bytes and 2 special tokens are needed")]
    VocabularySize { asked: usize },
    #[error("the model's chat template is not valid: {reason}")]
    Template { reason: String },
    #[error("the model's chat template refuses this conversation: {reason}")]
    Render { reason: String },
    #[error("a tool, or a call of one, is not in JSON: {reason}")]
    Tool { reason: String },
    #[error("the answer cannot keep to this JSON schema: {reason}")]
    Grammar { reason: String },
    #[error("the prompt is {found} bytes long, over the limit of {limit}")]
    PromptTooLong { found: usize, limit: usize },
}
