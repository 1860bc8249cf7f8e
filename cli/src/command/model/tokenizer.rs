//! `polder model tokenizer train`: a byte-level tokenizer learnt from texts.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use polder_worker::models;
use serde::Serialize;

use crate::context::Context;
use crate::failure::Hint;

/// Beyond any published vocabulary.
const VOCABULARY_MAX: usize = 1 << 20;

/// Learns byte pairs from `files` and writes a `tokenizer.json`.
pub(super) fn train(context: &Context, files: &[PathBuf], vocabulary: usize, out: &Path) -> anyhow::Result<()> {
    if out.exists() {
        bail!("{} is already there", out.display());
    }
    if vocabulary > VOCABULARY_MAX {
        bail!("a vocabulary of {vocabulary} tokens is over the limit of {VOCABULARY_MAX}");
    }
    let texts = files.iter().map(|path| {
        fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))
            .hint("texts are files in UTF-8")
    });
    let texts = texts.collect::<anyhow::Result<Vec<String>>>()?;
    let json = models::byte_level_bpe(texts.iter().map(String::as_str), vocabulary)?;
    let learnt = models::tokens_of(&json, &texts)?;
    fs::write(out, &json).with_context(|| format!("cannot write {}", out.display()))?;
    context.show(&Trained {
        path: out.to_owned(),
        vocabulary: learnt.vocabulary,
        tokens: learnt.tokens,
        bytes: texts.iter().map(|text| text.len() as u64).sum(),
    })
}

#[derive(Serialize)]
struct Trained {
    path: PathBuf,
    vocabulary: usize,
    /// That the texts are cut into.
    tokens: u64,
    bytes: u64,
}

impl fmt::Display for Trained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (path, vocabulary) = (self.path.display(), self.vocabulary);
        let each = self.bytes as f64 / self.tokens.max(1) as f64;
        write!(f, "{path}: {vocabulary} tokens, {each:.2} bytes of these texts a token")
    }
}
