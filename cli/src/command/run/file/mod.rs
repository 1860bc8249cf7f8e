//! The run file: what a person writes about a training run, in TOML. Every key but a few has a default with a reason; an
//! unknown key is refused by name, since a misspelled one would silently train something else.

mod inner;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use polder_protocol::run::{Boundary, Closing, Codec, Outer};
use polder_protocol::time::Span;
use serde::Deserialize;

use inner::InnerTable;

/// A run file.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RunFile {
    /// What people call the run.
    pub(crate) name: String,
    /// Outer steps in all.
    pub(crate) rounds: u64,
    /// Names of data sets; nodes train on those that they have. Empty: on whatever they have.
    #[serde(default)]
    pub(crate) data: Vec<String>,
    /// Seeds the initial parameters and every batch.
    #[serde(default)]
    pub(crate) seed: u64,
    /// How activations cross between the stages of a chain: `f32`, `bf16` or `int8`.
    #[serde(default = "bf16")]
    boundary: String,
    /// The model, where the run makes a new one.
    pub(crate) model: Option<Model>,
    /// Adapters for a model that there is, in place of `model`.
    pub(crate) adapters: Option<AdaptersTable>,
    /// The steps between two exchanges.
    #[serde(default)]
    inner: InnerTable,
    /// The exchange.
    #[serde(default)]
    outer: OuterTable,
    /// When a round closes.
    #[serde(default)]
    closing: ClosingTable,
    /// Held-out texts.
    #[serde(default)]
    pub(crate) evaluation: Option<EvaluationTable>,
}

/// The model's dimensions: a Llama.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Model {
    /// Width of the activations.
    pub(crate) hidden: u32,
    /// Transformer blocks.
    pub(crate) blocks: u32,
    /// Attention heads.
    pub(crate) heads: u32,
    /// Heads of keys and values; as many as `heads` by default.
    pub(crate) kv_heads: Option<u32>,
    /// Width inside the MLP; by default 8/3 of `hidden`, rounded up to a multiple of 8.
    pub(crate) intermediate: Option<u32>,
    /// `bytes`, or the path of a `tokenizer.json`.
    #[serde(default = "bytes")]
    pub(crate) tokenizer: String,
    /// The longest context in tokens; the sequence length of training by default.
    pub(crate) context: Option<u32>,
    /// Use the embedding as the output projection. Off by default: such a model cannot be split into stages, since the
    /// first and the last would share a tensor.
    #[serde(default)]
    pub(crate) tie_embeddings: bool,
    /// Base of the rotary positions.
    #[serde(default = "ten_thousand")]
    pub(crate) rope_theta: f64,
}

/// Low-rank adapters.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct AdaptersTable {
    /// The Hugging Face folder of the model, which stays as it is: `config.json`, safetensors, `tokenizer.json`.
    pub(crate) base: PathBuf,
    /// Rows of every A, columns of every B.
    #[serde(default = "sixteen")]
    pub(crate) rank: u32,
    /// B · A counts alpha / rank times; twice the rank by default.
    pub(crate) alpha: Option<f32>,
    /// Projections, by the names that they have in the folder.
    #[serde(default = "query_and_value")]
    pub(crate) targets: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct OuterTable {
    /// `raw`, `int8`, `e3m0` or `topk_q2`. Four bits lose nothing that can be measured, so `e3m0` by default.
    codec: String,
    /// `topk_q2`: values kept of each 4,096.
    k: Option<u16>,
    /// `topk_q2`: what the error buffer keeps from round to round.
    error_decay: Option<f32>,
    /// `topk_q2`: dense rounds before the sparse ones.
    warm_start_rounds: Option<u64>,
    /// η: .7, or 1 with `topk_q2`.
    learning_rate: Option<f32>,
    /// μ: .9, and none with `topk_q2`.
    momentum: Option<f32>,
}

impl Default for OuterTable {
    fn default() -> Self {
        Self {
            codec: "e3m0".into(),
            k: None,
            error_decay: None,
            warm_start_rounds: None,
            learning_rate: None,
            momentum: None,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ClosingTable {
    /// Contributions without which a round stays open until the deadline.
    quorum: u32,
    /// How long to wait for the others after the quorum, such as `"5s"`.
    grace: String,
    /// After so long a round closes with what is there, such as `"10m"`.
    deadline: String,
    /// Rounds for which a late contribution still counts, at half its weight per round.
    late_rounds: u32,
}

impl Default for ClosingTable {
    fn default() -> Self {
        Self {
            quorum: 1,
            grace: "10s".into(),
            deadline: "10m".into(),
            late_rounds: 2,
        }
    }
}

/// Held-out texts.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct EvaluationTable {
    /// A folder with `LANG.txt` and, to prime the compressor of the baseline, `LANG.train.txt`.
    pub(crate) folder: PathBuf,
    /// Evaluate after every so many rounds, and after the last.
    #[serde(default = "one")]
    pub(crate) every_rounds: u64,
}

fn bf16() -> String {
    "bf16".into()
}

fn bytes() -> String {
    "bytes".into()
}

const fn sixteen() -> u32 {
    16
}

/// As in the paper.
fn query_and_value() -> Vec<String> {
    vec!["q_proj".into(), "v_proj".into()]
}

const fn ten_thousand() -> f64 {
    10_000.0
}

const fn one() -> u64 {
    1
}

impl Model {
    fn check(&self) -> anyhow::Result<()> {
        ensure!(
            self.hidden > 0 && self.blocks > 0 && self.heads > 0,
            "`hidden`, `blocks` and `heads` of [model] must be at least 1"
        );
        ensure!(
            self.hidden.is_multiple_of(self.heads) && (self.hidden / self.heads).is_multiple_of(2),
            "`hidden` must be an even multiple of `heads`"
        );
        let kv_heads = self.kv_heads.unwrap_or(self.heads);
        ensure!(
            kv_heads > 0 && self.heads.is_multiple_of(kv_heads),
            "`heads` must be a multiple of `kv_heads`"
        );
        Ok(())
    }
}

impl RunFile {
    /// Reads a run file; paths in it are relative to its folder, and absolute afterwards.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut file = Self::parse(&text).with_context(|| format!("{} is not a run file", path.display()))?;
        let folder = std::path::absolute(path)?
            .parent()
            .map(Path::to_owned)
            .unwrap_or_default();
        if let Some(evaluation) = &mut file.evaluation {
            evaluation.folder = folder.join(&evaluation.folder);
        }
        if let Some(model) = file.model.as_mut().filter(|model| model.tokenizer != "bytes") {
            let joined = folder.join(&model.tokenizer);
            model.tokenizer = joined.to_str().context("the tokenizer's path is no UTF-8")?.to_owned();
        }
        if let Some(adapters) = &mut file.adapters {
            adapters.base = folder.join(&adapters.base);
        }
        Ok(file)
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let file: Self = toml::from_str(text)?;
        ensure!(file.rounds > 0, "`rounds` must be at least 1");
        match (&file.model, &file.adapters) {
            (Some(model), None) => model.check()?,
            (None, Some(_)) => {}
            (Some(_), Some(_)) => bail!("[model] makes a new model and [adapters] keeps one: give one of them"),
            (None, None) => bail!("[model] is missing, or [adapters] for a model that there is"),
        }
        file.inner()?;
        file.outer()?;
        file.closing()?;
        file.boundary()?;
        Ok(file)
    }

    /// The exchange.
    pub(crate) fn outer(&self) -> anyhow::Result<Outer> {
        let table = &self.outer;
        let codec = match table.codec.as_str() {
            "raw" => Codec::Raw,
            "int8" => Codec::Int8,
            "e3m0" => Codec::E3m0,
            "topk_q2" => Codec::TopkQ2 {
                k: table.k.unwrap_or(64),
                error_decay: table.error_decay.unwrap_or(0.95),
            },
            other => bail!("`codec` = \"{other}\" is none of \"raw\", \"int8\", \"e3m0\", \"topk_q2\""),
        };
        let sparse = matches!(codec, Codec::TopkQ2 { .. });
        if let Codec::TopkQ2 { k, error_decay } = codec {
            ensure!((1..=4096).contains(&k), "`k` of [outer] is 1 to 4096");
            ensure!(
                (0.0..=1.0).contains(&error_decay),
                "`error_decay` of [outer] is between 0 and 1"
            );
            ensure!(
                table.momentum.unwrap_or(0.0) == 0.0,
                "`momentum` does not go with `topk_q2`: error feedback plays its part"
            );
        } else {
            let only_sparse = table.k.is_some() || table.error_decay.is_some() || table.warm_start_rounds.is_some();
            ensure!(
                !only_sparse,
                "`k`, `error_decay` and `warm_start_rounds` of [outer] belong to `topk_q2`"
            );
        }
        let momentum = table.momentum.unwrap_or(if sparse { 0.0 } else { 0.9 });
        ensure!(
            (0.0..1.0).contains(&momentum),
            "`momentum` of [outer] is at least 0 and below 1"
        );
        Ok(Outer {
            codec,
            learning_rate: positive(
                "learning_rate",
                table.learning_rate.unwrap_or(if sparse { 1.0 } else { 0.7 }),
            )?,
            momentum,
            warm_start_rounds: table.warm_start_rounds.unwrap_or(0),
        })
    }

    /// When a round closes.
    pub(crate) fn closing(&self) -> anyhow::Result<Closing> {
        let table = &self.closing;
        ensure!(table.quorum > 0, "`quorum` of [closing] must be at least 1");
        let (grace, deadline) = (span("grace", &table.grace)?, span("deadline", &table.deadline)?);
        ensure!(
            deadline > Span(0) && deadline >= grace,
            "`deadline` of [closing] must be longer than nothing, and not shorter than `grace`"
        );
        Ok(Closing {
            quorum: table.quorum,
            grace,
            deadline,
            late_rounds_max: table.late_rounds,
        })
    }

    /// How activations cross.
    pub(crate) fn boundary(&self) -> anyhow::Result<Boundary> {
        match self.boundary.as_str() {
            "f32" => Ok(Boundary::F32),
            "bf16" => Ok(Boundary::Bf16),
            "int8" => Ok(Boundary::Int8),
            other => bail!("`boundary` = \"{other}\" is none of \"f32\", \"bf16\", \"int8\""),
        }
    }
}

fn positive(key: &str, value: f32) -> anyhow::Result<f32> {
    ensure!(value.is_finite() && value > 0.0, "`{key}` must be above zero");
    Ok(value)
}

fn span(key: &str, text: &str) -> anyhow::Result<Span> {
    let duration: jiff::SignedDuration = text
        .parse()
        .with_context(|| format!("`{key}` = \"{text}\" is no duration such as \"90s\""))?;
    let micros = u64::try_from(duration.as_micros()).with_context(|| format!("`{key}` is below zero"))?;
    Ok(Span(micros))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "name = \"small\"\nrounds = 3\n[model]\nhidden = 64\nblocks = 2\nheads = 4\n";

    fn refused(text: &str) -> String {
        format!("{:#}", RunFile::parse(text).unwrap_err())
    }

    #[test]
    fn what_is_left_out_has_its_default() {
        let file = RunFile::parse(SMALL).unwrap();
        let outer = file.outer().unwrap();
        assert_eq!(
            (outer.codec, outer.learning_rate, outer.momentum),
            (Codec::E3m0, 0.7, 0.9)
        );
        assert_eq!(file.closing().unwrap().deadline, Span::seconds(600));
        assert_eq!(file.inner().unwrap().decay_ppm, 200_000);
        assert_eq!(file.boundary().unwrap(), Boundary::Bf16);
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        assert!(refused(&format!("{SMALL}head_dims = 3\n")).contains("head_dims"));
        assert!(refused(&format!("{SMALL}[outer]\ncodek = \"raw\"\n")).contains("codek"));
    }

    #[test]
    fn adapters_stand_in_place_of_a_model() {
        let small = "name = \"small\"\nrounds = 3\n";
        let adapters = "[adapters]\nbase = \"folder\"\n";
        let file = RunFile::parse(&format!("{small}{adapters}")).unwrap().adapters.unwrap();
        assert_eq!((file.rank, file.alpha), (16, None));
        assert_eq!(file.targets, ["q_proj", "v_proj"]);
        assert!(refused(&format!("{SMALL}{adapters}")).contains("one of them"));
        assert!(refused(small).contains("[model]"));
        assert!(refused(&format!("{small}{adapters}rang = 3\n")).contains("rang"));
    }

    #[test]
    fn what_does_not_fit_together_is_refused_with_a_reason() {
        let inner = |text: &str| refused(&format!("{SMALL}[inner]\n{text}\n"));
        assert!(inner("optimiser = \"lion\"").contains("ademamix"));
        assert!(inner("[inner.muon]\nmomentum = 0.9").contains("[inner.muon]"));
        assert!(inner("optimiser = \"muon\"\n[inner.muon]\nmomentum = 1.0").contains("`momentum`"));
        assert!(inner("precision = \"fp8\"").contains("`precision`"));
        assert!(inner("[inner.goldfish]\nevery = 1").contains("goldfish"));
        assert!(inner("schedule = \"cosine\"\ndecay = 0.1").contains("`decay`"));
        assert!(refused(&SMALL.replace("heads = 4", "heads = 5")).contains("`heads`"));
        assert!(refused(&format!("{SMALL}[outer]\nk = 64\n")).contains("topk_q2"));
        assert!(refused(&format!("{SMALL}[outer]\ncodec = \"topk_q2\"\nmomentum = 0.9\n")).contains("momentum"));
        assert!(refused(&format!("{SMALL}[closing]\ngrace = \"soon\"\n")).contains("grace"));
        assert!(refused(&format!("{SMALL}[inner]\nlearning_rate = 0.0\n")).contains("learning_rate"));
    }
}
