//! An epoch: one immutable, published version of a model.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::hash::{BlobId, EpochId, RunId, digest};

/// Everything that names a published model. Its hash is the [`EpochId`].
///
/// Weights are one blob per part (see [`crate::layout`]), so a node fetches no more than its own stage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Epoch {
    /// Format version, 1.
    pub version: u16,
    /// What people call it, such as `SmolLM2-135M-Instruct`.
    pub name: String,
    /// The Hugging Face `config.json`, as text.
    pub config_json: String,
    /// `tokenizer.json` bytes.
    pub tokenizer: BlobId,
    /// Hugging Face `chat_template` (Jinja), where the model has one.
    pub chat_template: Option<String>,
    /// Token ids that end a generation.
    pub end_tokens: Vec<u32>,
    /// The token that begins a text, where the tokenizer adds one.
    pub begin_token: Option<u32>,
    /// One part file per part: embedding, blocks, head.
    pub parts: Vec<BlobId>,
    /// Bytes of each part file.
    pub part_bytes: Vec<u64>,
    /// The longest context in tokens.
    pub context_tokens_max: u32,
    /// The epoch before this one.
    pub parent: Option<EpochId>,
    /// The run and the first and last round that made it, where a federation trained it.
    pub trained: Option<(RunId, u64, u64)>,
    /// What was measured, such as `bits_per_byte.de` in millionths.
    pub evaluation: BTreeMap<String, u64>,
}

impl Epoch {
    /// The number of blocks.
    pub fn blocks(&self) -> u32 {
        u32::try_from(self.parts.len()).unwrap_or(u32::MAX).saturating_sub(2)
    }

    /// The canonical bytes that are hashed and stored.
    pub fn to_bytes(&self) -> Vec<u8> {
        // A value of this type holds nothing that postcard cannot write.
        postcard::to_allocvec(self).unwrap_or_default()
    }

    /// Reads canonical bytes.
    ///
    /// # Errors
    ///
    /// What postcard says of malformed bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, postcard::Error> {
        postcard::from_bytes(bytes)
    }

    /// The id: the hash of the canonical bytes.
    pub fn id(&self) -> EpochId {
        EpochId(digest(&self.to_bytes()).0)
    }
}
