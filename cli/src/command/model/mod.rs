//! `polder model`: bring a published model into this home, and look at what is there.

mod convert;
mod pull;
mod tokenizer;
mod workplace;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use bytesize::ByteSize;
use indicatif::{ProgressBar, ProgressStyle};
use polder_node::data::{BlobStore, Keep};
use polder_node::epochs::{Epochs, model_name};
use polder_protocol::blob::blob_id;
use polder_protocol::epoch::Epoch;
use polder_protocol::hash::{BlobId, EpochId};
use polder_worker::Choice;
use polder_worker::models::{self, ImportedModel, PartFile, Report, Summary};
use serde::Serialize;

use crate::context::Context;
use crate::failure::Hint;
use workplace::Workplace;

/// Arguments of `polder model`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Bring in a model from a GGUF file or a Hugging Face folder
    Import {
        /// The file, or the folder with config.json, safetensors and tokenizer.json
        path: PathBuf,
        /// What to call the model [default: the name of the file or folder]
        #[arg(long, value_parser = model_name)]
        name: Option<String>,
    },
    /// Fetch a published model from Hugging Face and bring it in
    ///
    /// Only the files that are needed are fetched, and each is checked against the hash that the hub names. A download
    /// that breaks off goes on where it stopped when the command is run again. HF_ENDPOINT names another hub; HF_TOKEN
    /// opens private and gated models.
    Pull {
        /// hf:ORG/NAME, hf:ORG/NAME@REVISION, or hf:ORG/NAME/FILE.gguf
        model: String,
        /// What to call the model [default: the name of the repository or file]
        #[arg(long, value_parser = model_name)]
        name: Option<String>,
    },
    /// Write a model as a GGUF file or as a Hugging Face folder
    ///
    /// GGUF files are written of Llamas, Qwen 2 and Qwen 3, and what such a file could not say is refused. What is
    /// written is read again and compared before it gets its name.
    Convert {
        /// A Hugging Face folder, a GGUF file, or a model of this home
        model: String,
        /// The new file, ending with .gguf, or the new folder
        out: PathBuf,
    },
    /// Bring a model in with its matrices packed into another type
    ///
    /// Embedding and output projection take at least six bits; norms, biases and routers stay as they are. Rows that
    /// blocks of 256 do not divide take blocks of 32. Prints how far the packed values are from the former ones.
    Quantize {
        /// A model of this home, a Hugging Face folder, or a GGUF file
        model: String,
        /// q8_0, q6_k, q5_k, q5_1, q5_0, q4_k, q4_1, q4_0, iq4_nl, mxfp4, q3_k, q2_k, bf16, f16 or f32
        #[arg(long, value_name = "TYPE")]
        to: String,
        /// What to call the new model [default: the model's name and the type]
        #[arg(long, value_parser = model_name)]
        name: Option<String>,
    },
    /// Make a tokenizer
    #[command(subcommand)]
    Tokenizer(TokenizerVerb),
    /// List the models of this home
    List,
    /// Show one model's figures
    Show {
        /// The model's name, or the beginning of its id
        model: String,
    },
    /// Check a model of this home against its hashes, or a folder's model against the numbers recorded beside it
    ///
    /// Of a model of this home, every byte is read again. Of a Hugging Face folder with cases.safetensors and
    /// expected.json, both engines compute the recorded inputs, and every quantity is compared with what PyTorch gave.
    Verify {
        /// The model's name or the beginning of its id, or a folder with config.json
        model: String,
        /// Where both engines compute a folder's cases: auto, cpu or wgpu
        #[arg(long, default_value = "cpu")]
        device: Choice,
    },
}

#[derive(Debug, clap::Subcommand)]
enum TokenizerVerb {
    /// Learn byte pairs from texts; a run file may name the result as its tokenizer
    Train {
        /// Texts in UTF-8
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// The most tokens: the 256 bytes, two special tokens, and pairs
        #[arg(long, default_value_t = 32_768)]
        vocabulary: usize,
        /// The file to write
        #[arg(long, default_value = "tokenizer.json")]
        out: PathBuf,
    },
}

/// Does what was asked.
pub(crate) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<()> {
    match arguments.verb {
        Verb::Import { path, name } => import(context, &path, name),
        Verb::Pull { model, name } => pull::pull(context, &model, name),
        Verb::Convert { model, out } => convert::convert(context, &model, &out),
        Verb::Quantize { model, to, name } => convert::quantize(context, &model, &to, name),
        Verb::Tokenizer(TokenizerVerb::Train { files, vocabulary, out }) => {
            tokenizer::train(context, &files, vocabulary, &out)
        }
        Verb::List => list(context),
        Verb::Show { model } => show(context, &model),
        Verb::Verify { model, device } if is_folder(&model) => compare(context, Path::new(&model), device),
        Verb::Verify { model, .. } => verify(context, &model),
    }
}

fn import(context: &Context, path: &Path, name: Option<String>) -> anyhow::Result<()> {
    let home = context.home();
    fs::create_dir_all(home).with_context(|| format!("cannot make {}", home.display()))?;
    // Beside the blobs, so that part files move in without a copy.
    let workplace = Workplace::beside(&home.join("import"))?;
    let imported = import_within(context, path, name, &workplace.0);
    let (id, epoch) = imported.with_context(|| format!("cannot import {}", path.display()))?;
    context.show(&Imported {
        id: id.to_string(),
        name: epoch.name.clone(),
        parts: epoch.parts.len(),
        bytes: epoch.part_bytes.iter().sum(),
    })
}

fn import_within(
    context: &Context,
    path: &Path,
    name: Option<String>,
    workplace: &Path,
) -> anyhow::Result<(EpochId, Epoch)> {
    let bar = progress_bar(context, "converting");
    let model = models::import(path, &workplace.join("model"), &mut |progress| {
        bar.set_length(progress.parts as u64);
        bar.set_position(progress.parts_done as u64);
    })?;
    bar.finish_and_clear();
    save(context, &model, name)
}

/// Keeps a model's files in this home, by moving them.
fn save(context: &Context, model: &ImportedModel, name: Option<String>) -> anyhow::Result<(EpochId, Epoch)> {
    let blobs = BlobStore::open(context.home())?;
    let epochs = Epochs::of(context.home());
    let mut added = Vec::new();
    let kept = keep(context, &blobs, model, name, &mut added).and_then(|epoch| Ok((epochs.save(&epoch)?, epoch)));
    if kept.is_err() {
        // Such as a disk that is full half-way: what this import brought is taken away again.
        for blob in added {
            let _ = blobs.remove(blob);
        }
    }
    kept
}

/// Moves a model's files among the blobs. `added` are those that were not there before.
fn keep(
    context: &Context,
    blobs: &BlobStore,
    model: &ImportedModel,
    name: Option<String>,
    added: &mut Vec<BlobId>,
) -> anyhow::Result<Epoch> {
    let before = blobs.list()?;
    let mut put = |path: &Path| -> anyhow::Result<BlobId> {
        if !before.is_empty() {
            // A blob that is here but damaged is replaced, so that importing again repairs a model.
            let id = blob_id(&fs::read(path)?);
            if before.contains(&id) && blobs.read(id).is_err() {
                blobs.remove(id)?;
            }
        }
        let id = blobs.put_file(path, Keep::Move)?;
        if !before.contains(&id) {
            added.push(id);
        }
        Ok(id)
    };
    let bar = progress_bar(context, "hashing");
    bar.set_length(model.part_files.len() as u64);
    let mut parts = Vec::new();
    let mut part_bytes = Vec::new();
    for file in &model.part_files {
        part_bytes.push(fs::metadata(file)?.len());
        parts.push(put(file)?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(Epoch {
        version: 1,
        name: name.unwrap_or_else(|| model.name.clone()),
        config_json: model.config_json.clone(),
        tokenizer: put(&model.tokenizer_json)?,
        chat_template: model.chat_template.clone(),
        end_tokens: model.end_tokens.clone(),
        begin_token: model.begin_token,
        parts,
        part_bytes,
        context_tokens_max: model.context_tokens_max,
        parent: None,
        trained: None,
        evaluation: BTreeMap::new(),
    })
}

fn list(context: &Context) -> anyhow::Result<()> {
    let epochs = Epochs::of(context.home()).list()?;
    let models = epochs.iter().map(|(id, epoch)| Listed {
        id: id.to_string(),
        name: epoch.name.clone(),
        blocks: epoch.blocks(),
        bytes: epoch.part_bytes.iter().sum(),
        context_tokens_max: epoch.context_tokens_max,
    });
    context.show(&List {
        models: models.collect(),
    })
}

fn show(context: &Context, wanted: &str) -> anyhow::Result<()> {
    let (id, epoch) = find(context, wanted)?;
    let blobs = BlobStore::open(context.home())?;
    let here: Vec<PathBuf> = epoch.parts.iter().filter_map(|blob| blobs.path(*blob)).collect();
    let files = here
        .iter()
        .map(|path| PartFile::open(path))
        .collect::<Result<Vec<_>, _>>()?;
    let summary = Summary::of_parts(&epoch.name, &epoch.config_json, &files)?;
    context.show(&Shown {
        id: id.to_string(),
        name: epoch.name.clone(),
        architecture: summary.architecture,
        parameters: summary.parameters,
        types: summary
            .types
            .iter()
            .map(|(name, total)| (name.clone(), total.bytes))
            .collect(),
        blocks: summary.blocks,
        hidden: summary.hidden,
        vocabulary: summary.vocabulary,
        context_tokens_max: epoch.context_tokens_max,
        bytes: epoch.part_bytes.iter().sum(),
        parts: epoch.parts.len(),
        parts_here: here.len(),
        begin_token: epoch.begin_token,
        end_tokens: epoch.end_tokens.clone(),
        chat_template: epoch.chat_template.is_some(),
        parent: epoch.parent.map(|parent| parent.to_string()),
        run: epoch.trained.map(|(run, _, _)| run.to_string()),
        evaluation: epoch.evaluation,
    })
}

fn verify(context: &Context, wanted: &str) -> anyhow::Result<()> {
    let (id, epoch) = find(context, wanted)?;
    let blobs = BlobStore::open(context.home())?;
    let layout = models::layout_of(&epoch.config_json)?;
    if layout.parts.len() != epoch.parts.len() || epoch.part_bytes.len() != epoch.parts.len() {
        bail!(
            "{} parts are listed, the configuration has {}",
            epoch.parts.len(),
            layout.parts.len()
        );
    }
    let bar = progress_bar(context, "verifying");
    bar.set_length(epoch.parts.len() as u64);
    let mut bytes = 0;
    for (index, (blob, part)) in epoch.parts.iter().zip(&layout.parts).enumerate() {
        let what = || format!("part {index} of `{}`", epoch.name);
        let read = blobs
            .read(*blob)
            .with_context(what)
            .hint("import the model again, or fetch it from a peer")?;
        bytes += read.len() as u64;
        let path = blobs.path(*blob).with_context(what)?;
        PartFile::open(&path)
            .and_then(|file| file.check(part))
            .with_context(what)?;
        bar.inc(1);
    }
    let tokenizer = blobs
        .read(epoch.tokenizer)
        .with_context(|| format!("tokenizer of `{}`", epoch.name))?;
    models::check_tokenizer(&tokenizer).with_context(|| format!("tokenizer of `{}`", epoch.name))?;
    bar.finish_and_clear();
    context.show(&Verified {
        id: id.to_string(),
        name: epoch.name,
        parts: epoch.parts.len(),
        bytes,
    })
}

/// Prints every quantity, and fails where one is outside its tolerance.
fn compare(context: &Context, folder: &Path, device: Choice) -> anyhow::Result<()> {
    let report = models::verify(folder, device)
        .with_context(|| format!("cannot verify {}", folder.display()))
        .hint("a folder to verify holds config.json, safetensors, cases.safetensors and expected.json")?;
    let outside = report.quantities.iter().filter(|quantity| !quantity.passed).count();
    let (case, of) = (report.case.clone(), report.quantities.len());
    context.show(&Compared { report })?;
    match outside {
        0 => Ok(()),
        _ => bail!("`{case}`: {outside} of {of} quantities are outside their tolerance"),
    }
}

/// Whether a text means a folder rather than a model's name, which may be that of some folder here.
fn is_folder(text: &str) -> bool {
    text.contains(std::path::MAIN_SEPARATOR) || Path::new(text).join("config.json").is_file()
}

fn find(context: &Context, wanted: &str) -> anyhow::Result<(EpochId, Epoch)> {
    Epochs::of(context.home())
        .find(wanted)
        .hint("`polder model list` shows what is here; `polder model import PATH` and `polder model pull hf:ORG/NAME` bring a model in")
}

/// On standard error, so that answers stay clean; hidden where nobody watches.
fn progress_bar(context: &Context, what: &'static str) -> ProgressBar {
    if context.json() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0).with_message(what);
    if let Ok(style) = ProgressStyle::with_template("{msg:>12} {wide_bar} {pos}/{len} parts") {
        bar.set_style(style);
    }
    bar
}

#[derive(Serialize)]
struct Imported {
    id: String,
    name: String,
    parts: usize,
    bytes: u64,
}

impl fmt::Display for Imported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (short, size) = (short(&self.id), ByteSize(self.bytes));
        write!(f, "`{}` is here as {short}: {} parts, {size}", self.name, self.parts)
    }
}

#[derive(Serialize)]
struct Verified {
    id: String,
    name: String,
    parts: usize,
    bytes: u64,
}

impl fmt::Display for Verified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (short, size) = (short(&self.id), ByteSize(self.bytes));
        write!(
            f,
            "`{}` ({short}) is whole: {} parts, {size}, tokenizer",
            self.name, self.parts
        )
    }
}

#[derive(Serialize)]
struct Compared {
    #[serde(flatten)]
    report: Report,
}

impl fmt::Display for Compared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self
            .report
            .quantities
            .iter()
            .map(|quantity| quantity.name.chars().count());
        let width = width.max().unwrap_or(0).max(8);
        let Report {
            case,
            family,
            served_on,
            ..
        } = &self.report;
        writeln!(f, "`{case}`, family {family}, served on {served_on}")?;
        writeln!(
            f,
            "  {:width$}  {:>9}  {:>9}  {:>9}",
            "QUANTITY", "LARGEST", "MEAN", "TOLERANCE"
        )?;
        for quantity in &self.report.quantities {
            let (name, words) = (&quantity.name, quantity.measure.words());
            let mark = if quantity.passed { "" } else { "  OUTSIDE" };
            let (largest, mean, tolerance) = (quantity.largest, quantity.mean, quantity.tolerance);
            writeln!(
                f,
                "  {name:width$}  {largest:9.2e}  {mean:9.2e}  {tolerance:9.1e}  {words}{mark}"
            )?;
        }
        Ok(())
    }
}

#[derive(Serialize)]
struct List {
    models: Vec<Listed>,
}

#[derive(Serialize)]
struct Listed {
    id: String,
    name: String,
    blocks: u32,
    bytes: u64,
    context_tokens_max: u32,
}

impl fmt::Display for List {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.models.is_empty() {
            return write!(f, "no models here; `polder model import PATH` brings one in");
        }
        let width = self
            .models
            .iter()
            .map(|model| model.name.chars().count())
            .max()
            .unwrap_or(0);
        writeln!(
            f,
            "{:8}  {:width$}  {:>6}  {:>10}  {:>7}",
            "ID", "NAME", "BLOCKS", "SIZE", "CONTEXT"
        )?;
        for model in &self.models {
            let (short, size) = (short(&model.id), ByteSize(model.bytes).to_string());
            let (name, blocks, context) = (&model.name, model.blocks, model.context_tokens_max);
            writeln!(f, "{short:8}  {name:width$}  {blocks:>6}  {size:>10}  {context:>7}")?;
        }
        Ok(())
    }
}

#[derive(Serialize)]
struct Shown {
    id: String,
    name: String,
    architecture: String,
    parameters: u64,
    /// Bytes by type of element.
    types: BTreeMap<String, u64>,
    blocks: u32,
    hidden: usize,
    vocabulary: usize,
    context_tokens_max: u32,
    bytes: u64,
    parts: usize,
    parts_here: usize,
    begin_token: Option<u32>,
    end_tokens: Vec<u32>,
    chat_template: bool,
    parent: Option<String>,
    run: Option<String>,
    evaluation: BTreeMap<String, u64>,
}

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let types = self
            .types
            .iter()
            .map(|(name, bytes)| format!("{name} {}", ByteSize(*bytes)));
        writeln!(f, "{}", self.name)?;
        writeln!(f, "  id            {}", self.id)?;
        writeln!(f, "  architecture  {}", self.architecture)?;
        writeln!(f, "  parameters    {:.1} million", self.parameters as f64 / 1e6)?;
        writeln!(f, "  shape         {} blocks of width {}", self.blocks, self.hidden)?;
        writeln!(f, "  vocabulary    {} tokens", self.vocabulary)?;
        writeln!(f, "  context       {} tokens", self.context_tokens_max)?;
        writeln!(f, "  weights       {}", types.collect::<Vec<_>>().join(", "))?;
        writeln!(
            f,
            "  parts         {} of {} here, {} in all",
            self.parts_here,
            self.parts,
            ByteSize(self.bytes)
        )?;
        writeln!(
            f,
            "  chat template {}",
            if self.chat_template {
                "its own"
            } else {
                "none: the plain one"
            }
        )?;
        if let Some(parent) = &self.parent {
            writeln!(f, "  parent        {}", short(parent))?;
        }
        if let Some(run) = &self.run {
            writeln!(f, "  trained by    run {}", short(run))?;
        }
        for (what, millionths) in &self.evaluation {
            writeln!(f, "  {what} {:.3}", *millionths as f64 / 1e6)?;
        }
        Ok(())
    }
}

/// The first eight digits of an id.
fn short(id: &str) -> &str {
    id.get(..8).unwrap_or(id)
}
