//! A byte-pair model of a `tokenizer.json`, read straight into its tables.
//!
//! The tokenizers' own reader takes every model through two trees of values, because any of four kinds may stand there:
//! a third of the time to the first token. This one knows one kind, and whoever calls it asks the other for the rest.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use tokenizers::models::bpe::{BPE, BpeBuilder, Vocab};
use tokenizers::{Model, ModelWrapper, Result as TokenizersResult, Token};

/// A model of another kind, since the other reader panics over byte pairs that do not fit together.
pub(super) struct OtherModel(ModelWrapper);

impl<'de> Deserialize<'de> for OtherModel {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let model = serde_json::Value::deserialize(deserializer)?;
        let read = match model.get("merges") {
            Some(_) => BytePairs::deserialize(model).map(ModelWrapper::from),
            None => ModelWrapper::deserialize(model),
        };
        read.map(Self).map_err(D::Error::custom)
    }
}

impl From<OtherModel> for ModelWrapper {
    fn from(other: OtherModel) -> Self {
        other.0
    }
}

/// A model, and the largest id of its vocabulary.
pub(super) struct BytePairs {
    model: BPE,
    pub(super) largest: Option<u32>,
}

impl From<BytePairs> for ModelWrapper {
    fn from(pairs: BytePairs) -> Self {
        Self::BPE(pairs.model)
    }
}

impl<'de> Deserialize<'de> for BytePairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ModelVisitor)
    }
}

struct ModelVisitor;

impl<'de> Visitor<'de> for ModelVisitor {
    type Value = BytePairs;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a byte-pair model")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<BytePairs, M::Error> {
        let mut builder = BpeBuilder::new();
        let (mut vocabulary, mut merges) = (None, None);
        let mut prefix_bytes = 0;
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "type" => {
                    let kind: String = map.next_value()?;
                    if kind != "BPE" {
                        return Err(Error::custom("the model is of another kind"));
                    }
                }
                "vocab" => vocabulary = Some(map.next_value::<Vocabulary>()?),
                "merges" => merges = Some(map.next_value::<Vec<Merge>>()?),
                "dropout" => builder = given(map.next_value()?, builder, BpeBuilder::dropout),
                "unk_token" => builder = given(map.next_value()?, builder, BpeBuilder::unk_token),
                "continuing_subword_prefix" => {
                    let prefix: Option<String> = map.next_value()?;
                    prefix_bytes = prefix.as_ref().map_or(0, String::len);
                    builder = given(prefix, builder, BpeBuilder::continuing_subword_prefix);
                }
                "end_of_word_suffix" => builder = given(map.next_value()?, builder, BpeBuilder::end_of_word_suffix),
                "fuse_unk" => builder = given(map.next_value()?, builder, BpeBuilder::fuse_unk),
                "byte_fallback" => builder = given(map.next_value()?, builder, BpeBuilder::byte_fallback),
                "ignore_merges" => builder = given(map.next_value()?, builder, BpeBuilder::ignore_merges),
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        let Vocabulary {
            ids,
            largest,
            bytes_max,
        } = vocabulary.ok_or_else(|| Error::missing_field("vocab"))?;
        let merges = merges.ok_or_else(|| Error::missing_field("merges"))?;
        // What two texts make has room in the longest text, or the builder writes beyond it.
        let has_room = |Merge(left, right): &Merge| {
            right.is_char_boundary(prefix_bytes) && left.len() + right.len() - prefix_bytes <= bytes_max
        };
        if !merges.iter().all(has_room) {
            return Err(Error::custom("a merge makes what is not in the vocabulary"));
        }
        let merges = merges.into_iter().map(|Merge(left, right)| (left, right)).collect();
        let model = builder.vocab_and_merges(ids, merges).build().map_err(Error::custom)?;
        Ok(BytePairs { model, largest })
    }
}

fn given<T>(value: Option<T>, builder: BpeBuilder, set: impl Fn(BpeBuilder, T) -> BpeBuilder) -> BpeBuilder {
    match value {
        Some(value) => set(builder, value),
        None => builder,
    }
}

/// Texts and their ids.
struct Vocabulary {
    ids: Vocab,
    largest: Option<u32>,
    /// The longest text.
    bytes_max: usize,
}

impl<'de> Deserialize<'de> for Vocabulary {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(VocabularyVisitor)
    }
}

struct VocabularyVisitor;

impl<'de> Visitor<'de> for VocabularyVisitor {
    type Value = Vocabulary;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("texts and their ids")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Vocabulary, M::Error> {
        let mut ids = Vocab::default();
        let (mut largest, mut bytes_max) = (None, 0);
        while let Some((text, id)) = map.next_entry::<String, u32>()? {
            largest = largest.max(Some(id));
            bytes_max = bytes_max.max(text.len());
            ids.insert(text, id);
        }
        Ok(Vocabulary {
            ids,
            largest,
            bytes_max,
        })
    }
}

/// Two texts that become one: a pair, or one text with a space between.
struct Merge(String, String);

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(MergeVisitor)
    }
}

struct MergeVisitor;

impl<'de> Visitor<'de> for MergeVisitor {
    type Value = Merge;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("two texts")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Merge, E> {
        match text.split_once(' ') {
            Some((left, right)) if !right.contains(' ') => Ok(Merge(left.to_owned(), right.to_owned())),
            _ => Err(E::custom("a merge is not two texts")),
        }
    }

    fn visit_seq<S: SeqAccess<'de>>(self, mut pair: S) -> Result<Merge, S::Error> {
        let short = || S::Error::custom("a merge is not two texts");
        let merge = Merge(
            pair.next_element()?.ok_or_else(short)?,
            pair.next_element()?.ok_or_else(short)?,
        );
        match pair.next_element::<IgnoredAny>()? {
            None => Ok(merge),
            Some(_) => Err(short()),
        }
    }
}

impl Model for BytePairs {
    type Trainer = <BPE as Model>::Trainer;

    fn tokenize(&self, text: &str) -> TokenizersResult<Vec<Token>> {
        self.model.tokenize(text)
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.model.token_to_id(token)
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.model.id_to_token(id)
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        self.model.get_vocab()
    }

    fn get_vocab_size(&self) -> usize {
        self.model.get_vocab_size()
    }

    fn save(&self, folder: &Path, prefix: Option<&str>) -> TokenizersResult<Vec<PathBuf>> {
        self.model.save(folder, prefix)
    }

    fn get_trainer(&self) -> Self::Trainer {
        self.model.get_trainer()
    }
}

impl Model for OtherModel {
    type Trainer = <ModelWrapper as Model>::Trainer;

    fn tokenize(&self, text: &str) -> TokenizersResult<Vec<Token>> {
        self.0.tokenize(text)
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.0.token_to_id(token)
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.0.id_to_token(id)
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        self.0.get_vocab()
    }

    fn get_vocab_size(&self) -> usize {
        self.0.get_vocab_size()
    }

    fn save(&self, folder: &Path, prefix: Option<&str>) -> TokenizersResult<Vec<PathBuf>> {
        self.0.save(folder, prefix)
    }

    fn get_trainer(&self) -> Self::Trainer {
        self.0.get_trainer()
    }
}
