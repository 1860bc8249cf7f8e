//! `polder model convert` and `polder model quantize`: models in other forms and types.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use bytesize::ByteSize;
use polder_node::data::BlobStore;
use polder_protocol::epoch::Epoch;
use polder_worker::models::{self, ImportedModel, PackedType, Vectors};
use serde::Serialize;

use super::workplace::Workplace;
use super::{find, progress_bar, save};
use crate::context::Context;
use crate::failure::Hint;

/// Writes a model as a GGUF file, where `out` ends with `.gguf`, or as a Hugging Face folder.
pub(super) fn convert(context: &Context, source: &str, out: &Path) -> anyhow::Result<()> {
    let workplace = Workplace::beside(out)?;
    let model = open(context, source, &workplace.0)?;
    // GGUF files keep norms in F32 whatever they were.
    let vectors = match source.ends_with(".gguf") {
        true => Vectors::AsMatrices,
        false => Vectors::AsStored,
    };
    let exported = model.exported(vectors);
    let written = match out.extension().is_some_and(|extension| extension == "gguf") {
        true => models::export_gguf(&exported, &model.name, out),
        false => models::export(&exported, out),
    };
    written.with_context(|| format!("cannot write {}", out.display()))?;
    context.show(&Converted {
        name: model.name,
        path: out.to_owned(),
        bytes: bytes_under(out)?,
    })
}

/// Brings a model in once more, with its matrices in another type.
pub(super) fn quantize(context: &Context, source: &str, to: &str, name: Option<String>) -> anyhow::Result<()> {
    let to: PackedType = to
        .to_ascii_uppercase()
        .parse()
        .hint("q8_0 and q6_k cost next to nothing in quality; q4_k and q5_k are the best of the small ones")?;
    fs::create_dir_all(context.home()).with_context(|| format!("cannot make {}", context.home().display()))?;
    let workplace = Workplace::beside(&context.home().join("model"))?;
    let model = open(context, source, &workplace.0)?;
    let bytes_before = sum_of(&model.part_files)?;
    let bar = progress_bar(context, "packing");
    let packed = workplace.0.join("packed");
    let found = models::quantise(&model.config_json, &model.part_files, to, &packed, &mut |progress| {
        bar.set_length(progress.parts as u64);
        bar.set_position(progress.parts_done as u64);
    });
    bar.finish_and_clear();
    let found = found.with_context(|| format!("cannot pack `{source}`"))?;
    let bytes = sum_of(&found.part_files)?;
    let name = name.unwrap_or_else(|| format!("{}-{}", model.name, to.name().to_ascii_lowercase()));
    // The tokenizer of a model that is here already is copied, since files move among the blobs.
    let tokenizer_json = workplace.0.join("tokenizer.json");
    if tokenizer_json != model.tokenizer_json {
        fs::copy(&model.tokenizer_json, &tokenizer_json).context("cannot copy the tokenizer")?;
    }
    let model = ImportedModel {
        part_files: found.part_files,
        tokenizer_json,
        ..model
    };
    let (id, epoch) = save(context, &model, Some(name))?;
    context.show(&Quantized {
        id: id.to_string(),
        name: epoch.name,
        bytes_before,
        bytes,
        packed: found
            .packed
            .iter()
            .map(|(ty, packed)| {
                let figures = Figures {
                    tensors: packed.tensors,
                    bytes: packed.bytes,
                    relative_error: packed.relative_error,
                };
                (ty.clone(), figures)
            })
            .collect(),
        kept: found.kept,
    })
}

/// A model from a path, or one of this home by its name. Files of a path are made in `workplace`.
fn open(context: &Context, source: &str, workplace: &Path) -> anyhow::Result<ImportedModel> {
    let path = Path::new(source);
    if path.exists() {
        let bar = progress_bar(context, "reading");
        let model = models::import(path, &workplace.join("read"), &mut |progress| {
            bar.set_length(progress.parts as u64);
            bar.set_position(progress.parts_done as u64);
        });
        bar.finish_and_clear();
        return model.with_context(|| format!("cannot read {}", path.display()));
    }
    let (_, epoch) = find(context, source)?;
    of_home(context, epoch)
}

fn of_home(context: &Context, epoch: Epoch) -> anyhow::Result<ImportedModel> {
    let blobs = BlobStore::open(context.home())?;
    let here = |blob, what: &str| {
        blobs
            .path(blob)
            .with_context(|| format!("{what} of `{}` is not here", epoch.name))
            .hint("fetch the model from a peer, or import it again")
    };
    let parts = epoch.parts.iter().enumerate();
    let part_files = parts.map(|(index, blob)| here(*blob, &format!("part {index}")));
    Ok(ImportedModel {
        part_files: part_files.collect::<anyhow::Result<_>>()?,
        tokenizer_json: here(epoch.tokenizer, "the tokenizer")?,
        name: epoch.name,
        config_json: epoch.config_json,
        chat_template: epoch.chat_template,
        end_tokens: epoch.end_tokens,
        begin_token: epoch.begin_token,
        context_tokens_max: epoch.context_tokens_max,
    })
}

fn sum_of(files: &[PathBuf]) -> anyhow::Result<u64> {
    let lengths = files.iter().map(|path| Ok(fs::metadata(path)?.len()));
    lengths.sum()
}

fn bytes_under(path: &Path) -> anyhow::Result<u64> {
    if path.is_file() {
        return Ok(fs::metadata(path)?.len());
    }
    let lengths = fs::read_dir(path)?.map(|entry| Ok(entry?.metadata()?.len()));
    lengths.sum()
}

#[derive(Serialize)]
struct Converted {
    name: String,
    path: PathBuf,
    bytes: u64,
}

impl fmt::Display for Converted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "`{}` is in {}: {}",
            self.name,
            self.path.display(),
            ByteSize(self.bytes)
        )
    }
}

#[derive(Serialize)]
struct Quantized {
    id: String,
    name: String,
    bytes_before: u64,
    bytes: u64,
    /// By type.
    packed: BTreeMap<String, Figures>,
    kept: u64,
}

#[derive(Serialize)]
struct Figures {
    tensors: u64,
    bytes: u64,
    relative_error: f64,
}

impl fmt::Display for Quantized {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (before, after) = (ByteSize(self.bytes_before), ByteSize(self.bytes));
        writeln!(
            f,
            "`{}` is here as {}: {after}, was {before}",
            self.name,
            super::short(&self.id)
        )?;
        for (ty, figures) in &self.packed {
            let (tensors, bytes, error) = (figures.tensors, ByteSize(figures.bytes), 100.0 * figures.relative_error);
            writeln!(
                f,
                "  {ty:6} {tensors:>5} tensors  {bytes:>10}  relative error {error:.2} %"
            )?;
        }
        write!(f, "  as before {:>3} tensors", self.kept)
    }
}
