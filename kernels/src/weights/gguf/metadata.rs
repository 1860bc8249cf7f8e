//! The metadata of an architecture, of which nothing is passed over: a key that nobody asked for is refused by name,
//! unless it is known to change no number, or says that something is not there.

use std::cell::RefCell;
use std::collections::BTreeSet;

use super::architecture::Architecture;
use super::{GgufError, GgufFile};
use crate::weights::WeightsError;

/// Keys that change no number: facts for people, and what follows from the tensors.
const WITHOUT_EFFECT: [&str; 3] = ["vocab_size", "rope.scaling.finetuned", "tensor_data_layout"];

/// The keys of a file that begin with its architecture's name.
pub(super) struct Metadata<'a> {
    pub(super) file: &'a GgufFile,
    pub(super) architecture: Architecture,
    asked: RefCell<BTreeSet<String>>,
}

impl<'a> Metadata<'a> {
    pub(super) fn of(file: &'a GgufFile) -> Result<Self, WeightsError> {
        let architecture = file.architecture()?;
        Ok(Self {
            file,
            architecture,
            asked: RefCell::default(),
        })
    }

    /// The whole key; it counts as asked for.
    pub(super) fn key(&self, name: &str) -> String {
        let key = format!("{}.{name}", self.architecture.name);
        self.asked.borrow_mut().insert(key.clone());
        key
    }

    pub(super) fn text(&self, name: &str) -> Result<Option<&'a str>, WeightsError> {
        self.file.text(&self.key(name))
    }

    pub(super) fn number(&self, name: &str) -> Result<Option<f64>, WeightsError> {
        self.file.number(&self.key(name))
    }

    pub(super) fn flag(&self, name: &str) -> Result<Option<bool>, WeightsError> {
        self.file.flag(&self.key(name))
    }

    pub(super) fn required_number(&self, name: &str) -> Result<f64, WeightsError> {
        self.number(name)?.ok_or_else(|| self.file.missing(&self.key(name)))
    }

    /// A whole number; where the file has a list with one for each block, all must be equal.
    pub(super) fn whole(&self, name: &str) -> Result<Option<u64>, WeightsError> {
        let key = self.key(name);
        if !self.file.header.is_list(&key) {
            return self.file.whole(&key);
        }
        let list = self.list(&key)?;
        match list.split_first() {
            Some((first, rest)) if rest.iter().all(|value| value == first) => Ok(Some(*first)),
            _ => Err(self.feature(name)),
        }
    }

    pub(super) fn required(&self, name: &str) -> Result<u64, WeightsError> {
        self.whole(name)?.ok_or_else(|| self.file.missing(&self.key(name)))
    }

    /// One whole number for each of `blocks` blocks, be it one for all in the file. Numbers of blocks behind them, which
    /// predict further tokens, may follow.
    pub(super) fn per_block(&self, name: &str, blocks: usize) -> Result<Vec<u64>, WeightsError> {
        let key = self.key(name);
        if !self.file.header.is_list(&key) {
            let one = self.file.whole(&key)?.ok_or_else(|| self.file.missing(&key))?;
            return Ok(vec![one; blocks]);
        }
        let mut list = self.list(&key)?;
        if list.len() < blocks {
            return Err(self.file.wrong(GgufError::Wrong {
                key,
                must: "a list with a number for each block",
            }));
        }
        list.truncate(blocks);
        Ok(list)
    }

    fn list(&self, key: &str) -> Result<Vec<u64>, WeightsError> {
        let numbers = self.file.numbers(key)?.unwrap_or_default();
        let whole = |number: f64| ((0.0..1e15).contains(&number) && number.fract() == 0.0).then_some(number as u64);
        let list = numbers.into_iter().map(whole).collect::<Option<Vec<_>>>();
        list.ok_or_else(|| {
            self.file.wrong(GgufError::Wrong {
                key: key.to_owned(),
                must: "a list of whole numbers from 0",
            })
        })
    }

    /// Whether there is a tensor of that name.
    pub(super) fn has_tensor(&self, ggml: &str) -> bool {
        self.file.header.tensors().contains_key(ggml)
    }

    /// Whether any block has a tensor of that name.
    pub(super) fn a_block_has(&self, name: &str) -> bool {
        let tensors = self.file.header.tensors().keys();
        let mut blocks = tensors.filter_map(|key| key.strip_prefix("blk.")?.split_once('.'));
        blocks.any(|(_, rest)| rest == name)
    }

    /// That a key's value is not one that is computed.
    pub(super) fn feature(&self, name: &str) -> WeightsError {
        self.file.feature(format!("the value of `{}`", self.key(name)))
    }

    /// Refuses a key whose value is not `must`; absent is well.
    pub(super) fn must_be(&self, name: &str, must: f64) -> Result<(), WeightsError> {
        match self.number(name)? {
            Some(found) if (found - must).abs() > 1e-6 * must.abs() => Err(self.feature(name)),
            _ => Ok(()),
        }
    }

    /// Refuses what nobody asked for.
    pub(super) fn nothing_left(&self) -> Result<(), WeightsError> {
        let prefix = format!("{}.", self.architecture.name);
        let asked = self.asked.borrow();
        for key in self.file.header.keys() {
            let Some(name) = key.strip_prefix(&prefix) else {
                continue;
            };
            if !asked.contains(key) && !WITHOUT_EFFECT.contains(&name) && !self.file.header.is_nothing(key) {
                let key: String = key.chars().take(80).collect();
                return Err(self.file.feature(format!("`{key}`")));
            }
        }
        Ok(())
    }
}
