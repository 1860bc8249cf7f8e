//! From a published model to part files.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;

use polder_protocol::layout::PartLayout;

use super::part_file::OUTPUT;
use super::part_writer::TIED_NOTE;
use super::{Exported, PartWriter, TensorSource, Vectors, WeightsError, gguf, hugging_face};
use crate::model::{Config, layout};
use crate::text::Tokenizer;

/// A model in part files.
#[derive(Debug, Clone, PartialEq)]
pub struct ImportedModel {
    /// The folder's name, or the file's without its ending.
    pub name: String,
    /// The Hugging Face `config.json`, as text.
    pub config_json: String,
    /// The `tokenizer.json` that was written.
    pub tokenizer_json: PathBuf,
    /// The Jinja template of a conversation, where the model has one.
    pub chat_template: Option<String>,
    /// Token ids that end a generation.
    pub end_tokens: Vec<u32>,
    /// The token that begins a text, where the tokenizer adds one.
    pub begin_token: Option<u32>,
    /// One file per part: embedding, blocks, head.
    pub part_files: Vec<PathBuf>,
    /// The longest context in tokens.
    pub context_tokens_max: u32,
}

impl ImportedModel {
    /// All of it, to be written in another form.
    pub fn exported(&self, vectors: Vectors) -> Exported<'_> {
        Exported {
            config_json: &self.config_json,
            tokenizer_json: &self.tokenizer_json,
            chat_template: self.chat_template.as_deref(),
            end_tokens: &self.end_tokens,
            begin_token: self.begin_token,
            part_files: &self.part_files,
            vectors,
        }
    }
}

/// How far an import is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Parts written.
    pub parts_done: usize,
    /// Parts in all.
    pub parts: usize,
}

/// A model as it was found, of either kind.
pub(crate) struct ModelSource {
    pub(super) name: String,
    /// What to name in errors about the configuration.
    pub(super) config_path: PathBuf,
    pub(crate) config_json: String,
    pub(crate) tokenizer_json: Vec<u8>,
    pub(super) chat_template: Option<String>,
    pub(super) end_tokens: Vec<u32>,
    pub(super) begin_token: Option<u32>,
    pub(crate) tensors: Box<dyn Tensors>,
}

/// Tensors by Hugging Face name.
pub(crate) trait Tensors {
    fn names(&self) -> Vec<String>;
    fn tensor(&self, name: &str) -> Result<TensorSource, WeightsError>;
    /// The file or folder, to name in errors.
    fn place(&self) -> &Path;
}

/// Reads the model at `source`, a Hugging Face folder or a GGUF file, and writes its part files and tokenizer into the
/// new folder `out`. Everything is checked before anything is written; a failed import leaves nothing behind.
///
/// Tensors keep their types, packed ones too. The head of a model whose output projection is the embedding gets a copy
/// of it, so that a stage needs no part but its own.
///
/// # Errors
///
/// [`WeightsError`] names the file and the tensor or key, and says what is wrong with it.
pub fn import(source: &Path, out: &Path, on_progress: &mut dyn FnMut(Progress)) -> Result<ImportedModel, WeightsError> {
    let already = || WeightsError::AlreadyThere { path: out.to_owned() };
    if out.exists() {
        return Err(already());
    }
    let model = open(source)?;
    let checked = CheckedModel::new(source, model)?;
    let partial = partial_folder(out);
    fs::create_dir_all(&partial).map_err(WeightsError::io("make", &partial))?;
    let written = checked.write(&partial, on_progress).and_then(|()| {
        // A rename onto a folder that is not empty fails, so two imports cannot mix.
        fs::rename(&partial, out).map_err(WeightsError::io("make", out))
    });
    if let Err(error) = written {
        let _ = fs::remove_dir_all(&partial); // The first error is the one to tell.
        return Err(error);
    }
    Ok(checked.into_imported(out))
}

/// Opens whatever kind of model is at `source`.
pub(crate) fn open(source: &Path) -> Result<ModelSource, WeightsError> {
    if source.is_dir() && source.join("config.json").exists() {
        return hugging_face::open(source);
    }
    if source.is_file() {
        return gguf::open(source);
    }
    match source.exists() {
        true => Err(WeightsError::NotAModel {
            path: source.to_owned(),
        }),
        false => Err(WeightsError::MissingFile {
            path: source.to_owned(),
            hint: "name a GGUF file or a folder with a config.json",
        }),
    }
}

/// A model whose every tensor is there in the shape that its configuration asks for.
struct CheckedModel {
    source: ModelSource,
    parts: Vec<PartLayout>,
    tied: bool,
    context_tokens_max: u32,
}

impl CheckedModel {
    fn new(path: &Path, source: ModelSource) -> Result<Self, WeightsError> {
        let config = Config::from_json(&source.config_json).map_err(|error| WeightsError::Config {
            path: source.config_path.clone(),
            source: error,
        })?;
        let tokenizer = Tokenizer::from_bytes(&source.tokenizer_json).map_err(|error| WeightsError::Tokenizer {
            path: path.to_owned(),
            reason: error.to_string(),
        })?;
        if tokenizer.vocabulary() > config.vocabulary {
            return Err(WeightsError::Tokenizer {
                path: path.to_owned(),
                reason: format!(
                    "it has {} tokens, the model {}",
                    tokenizer.vocabulary(),
                    config.vocabulary
                ),
            });
        }
        let parts = layout(&config).parts;
        for tensor in parts.iter().flat_map(|part| &part.tensors) {
            let found = source.tensors.tensor(&tensor.name)?.shape;
            let expected: Vec<usize> = tensor.shape.iter().map(|size| *size as usize).collect();
            if found != expected {
                return Err(WeightsError::Shape {
                    path: path.to_owned(),
                    tensor: tensor.name.clone(),
                    expected,
                    found,
                });
            }
        }
        let known = |name: &str| {
            parts
                .iter()
                .flat_map(|part| &part.tensors)
                .any(|tensor| tensor.name == name)
        };
        let ignored = |name: &str| config.ignores(name);
        let names = source.tensors.names();
        if let Some(name) = names.iter().find(|name| !ignored(name) && !known(name)) {
            return Err(WeightsError::UnknownTensor {
                path: path.to_owned(),
                tensor: name.clone(),
            });
        }
        Ok(Self {
            source,
            parts,
            tied: config.tied,
            context_tokens_max: config.context_tokens_max,
        })
    }

    fn write(&self, folder: &Path, on_progress: &mut dyn FnMut(Progress)) -> Result<(), WeightsError> {
        let parts = self.parts.len();
        for (index, part) in self.parts.iter().enumerate() {
            on_progress(Progress {
                parts_done: index,
                parts,
            });
            let sources = part
                .tensors
                .iter()
                .map(|tensor| Ok((tensor.name.as_str(), self.source.tensors.tensor(&tensor.name)?)));
            let mut sources = sources.collect::<Result<Vec<_>, WeightsError>>()?;
            let is_tied_head = self.tied && index + 1 == parts;
            if is_tied_head {
                let embedding = self.parts.first().and_then(|part| part.tensors.first());
                let embedding = embedding.map_or(TIED_NOTE.1, |tensor| tensor.name.as_str());
                sources.push((OUTPUT, self.source.tensors.tensor(embedding)?));
            }
            let mut writer = PartWriter::new();
            for (name, source) in &sources {
                writer.tensor(name, source.ty, &source.shape, &*source.bytes);
            }
            if is_tied_head {
                writer.note(TIED_NOTE.0, TIED_NOTE.1);
            }
            writer.write(&folder.join(part_name(index)))?;
        }
        on_progress(Progress {
            parts_done: parts,
            parts,
        });
        let tokenizer = folder.join(TOKENIZER);
        fs::write(&tokenizer, &self.source.tokenizer_json).map_err(WeightsError::io("write", &tokenizer))
    }

    fn into_imported(self, out: &Path) -> ImportedModel {
        ImportedModel {
            name: self.source.name,
            config_json: self.source.config_json,
            tokenizer_json: out.join(TOKENIZER),
            chat_template: self.source.chat_template,
            end_tokens: self.source.end_tokens,
            begin_token: self.source.begin_token,
            part_files: (0..self.parts.len()).map(|index| out.join(part_name(index))).collect(),
            context_tokens_max: self.context_tokens_max,
        }
    }
}

const TOKENIZER: &str = "tokenizer.json";

fn part_name(index: usize) -> String {
    format!("part-{index:05}.safetensors")
}

/// A name beside `out`, on the same disk.
fn partial_folder(out: &Path) -> PathBuf {
    let mut name = out.file_name().unwrap_or_default().to_owned();
    name.push(format!(".partial-{}", process::id()));
    out.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::gguf::builder::Builder;
    use super::super::{Exported, Gguf, PartFile, Vectors, export, inspect};
    use super::*;
    use crate::quant::{PackedType, narrow};

    #[test]
    fn a_folder_becomes_one_file_per_part() {
        let places = tempfile::tempdir().unwrap();
        let source = folder(places.path(), true);
        let out = places.path().join("imported");
        let mut seen = Vec::new();
        let model = import(&source, &out, &mut |progress| seen.push(progress.parts_done)).unwrap();
        assert_eq!(seen, [0, 1, 2, 3]);
        assert_eq!(model.context_tokens_max, 64);
        assert_eq!(model.end_tokens, [257]);
        assert_eq!(model.name, "tiny");
        let files: Vec<_> = model
            .part_files
            .iter()
            .map(|path| PartFile::open(path).unwrap())
            .collect();
        let layout = layout(&Config::from_json(&model.config_json).unwrap());
        for (file, part) in files.iter().zip(&layout.parts) {
            file.check(part).unwrap();
        }
        let embedding = files[0].tensor("model.embed_tokens.weight").unwrap().to_f32().unwrap();
        assert_eq!(files[2].tensor(OUTPUT).unwrap().to_f32().unwrap(), embedding);
        assert!(!places.path().join("imported.partial").exists());
    }

    #[test]
    fn the_same_model_always_gives_the_same_bytes() {
        let places = tempfile::tempdir().unwrap();
        let source = folder(places.path(), false);
        let once = import(&source, &places.path().join("a"), &mut |_| {}).unwrap();
        let twice = import(&source, &places.path().join("b"), &mut |_| {}).unwrap();
        for (a, b) in once.part_files.iter().zip(&twice.part_files) {
            assert_eq!(fs::read(a).unwrap(), fs::read(b).unwrap());
        }
    }

    #[test]
    fn what_was_imported_is_exported_the_same() {
        let places = tempfile::tempdir().unwrap();
        let source = folder(places.path(), true);
        let model = import(&source, &places.path().join("a"), &mut |_| {}).unwrap();
        let out = places.path().join("exported");
        let exported = Exported {
            chat_template: Some("{{ messages }}"),
            ..model.exported(Vectors::AsStored)
        };
        export(&exported, &out).unwrap();
        let again = import(&out, &places.path().join("b"), &mut |_| {}).unwrap();
        assert_eq!(again.chat_template.as_deref(), Some("{{ messages }}"));
        assert_eq!(again.end_tokens, model.end_tokens);
        for (a, b) in model.part_files.iter().zip(&again.part_files) {
            assert_eq!(fs::read(a).unwrap(), fs::read(b).unwrap());
        }
    }

    #[test]
    fn a_failed_import_leaves_nothing_behind() {
        let places = tempfile::tempdir().unwrap();
        let source = folder(places.path(), true);
        let weights = source.join("model.safetensors");
        let bytes = fs::read(&weights).unwrap();
        fs::write(&weights, &bytes[..bytes.len() - 1]).unwrap();
        let error = import(&source, &places.path().join("out"), &mut |_| {}).unwrap_err();
        assert!(matches!(error, WeightsError::Safetensors { .. }), "{error}");
        assert_eq!(fs::read_dir(places.path()).unwrap().count(), 1);
    }

    #[test]
    fn errors_name_what_is_wrong() {
        let places = tempfile::tempdir().unwrap();
        let out = places.path().join("out");
        let fails = |source: &Path, words: &[&str]| {
            let error = import(source, &out, &mut |_| {}).unwrap_err();
            let mut text = error.to_string();
            let mut cause = std::error::Error::source(&error);
            while let Some(inner) = cause {
                text = format!("{text}: {inner}");
                cause = inner.source();
            }
            assert!(words.iter().all(|word| text.contains(word)), "{text}");
        };
        fails(&places.path().join("nothing"), &["nothing", "missing"]);

        let source = folder(places.path(), true);
        fs::remove_file(source.join("tokenizer.json")).unwrap();
        fails(&source, &["tokenizer.json", "missing"]);

        let source = folder(places.path(), true);
        let text = fs::read_to_string(source.join("config.json")).unwrap();
        fs::write(source.join("config.json"), text.replace("\"llama\"", "\"mamba\"")).unwrap();
        fails(&source, &["config.json", "mamba", "llama"]);

        let source = folder(places.path(), true);
        fs::write(
            source.join("config.json"),
            text.replace("\"hidden_size\":32", "\"hidden_size\":64"),
        )
        .unwrap();
        fails(&source, &["model.embed_tokens.weight", "[258, 32]", "[258, 64]"]);

        let file = places.path().join("other.gguf");
        fs::write(&file, Builder::new().text("general.architecture", "rwkv").finish()).unwrap();
        fails(&file, &["other.gguf", "rwkv", "llama"]);
        fs::write(&file, b"GGUF\x03\0\0").unwrap();
        fails(&file, &["other.gguf", "version"]);
    }

    #[test]
    fn a_gguf_file_becomes_the_same_model_as_its_folder() {
        let places = tempfile::tempdir().unwrap();
        let file = places.path().join("tiny.gguf");
        let bytes = gguf();
        fs::write(&file, &bytes).unwrap();
        let model = import(&file, &places.path().join("out"), &mut |_| {}).unwrap();
        assert_eq!(model.name, "tiny");
        assert_eq!(model.end_tokens, [257]);
        assert_eq!(model.begin_token, Some(256));
        assert_eq!(model.chat_template.as_deref(), Some("{{ messages }}"));
        let config: Value = serde_json::from_str(&model.config_json).unwrap();
        assert_eq!(config["rms_norm_eps"], 1e-5);
        assert_eq!(config["tie_word_embeddings"], true);
        let tokenizer = Tokenizer::from_bytes(&fs::read(&model.tokenizer_json).unwrap()).unwrap();
        assert_eq!(tokenizer.encode("hé<|end|>").unwrap(), [256, 104, 195, 169, 257]);
        let block = PartFile::open(&model.part_files[1]).unwrap();
        let q = block.tensor("model.layers.0.self_attn.q_proj.weight").unwrap();
        assert_eq!(q.ty, PackedType::Q8_0);
        // Row r of the file is filled with r; halves of a head of 16 were interleaved there.
        let values = q.to_f32().unwrap();
        let rows: Vec<f32> = values.chunks(32).map(|row| (row[0]).round()).collect();
        assert_eq!(rows[..4], [0.0, 2.0, 4.0, 6.0]);
        assert_eq!(rows[8..12], [1.0, 3.0, 5.0, 7.0]);
        let summary = inspect(&file).unwrap();
        assert_eq!(
            (summary.blocks, summary.vocabulary, summary.types["Q8_0"].tensors),
            (1, 258, 7)
        );
    }

    #[test]
    fn no_truncated_gguf_file_is_imported() {
        let places = tempfile::tempdir().unwrap();
        let bytes = gguf();
        let header = Gguf::parse(&bytes).unwrap();
        let last = header.tensors().values().map(|tensor| tensor.range.end).max().unwrap();
        for length in (0..last).step_by(97) {
            let file = places.path().join("cut.gguf");
            fs::write(&file, &bytes[..length]).unwrap();
            assert!(
                import(&file, &places.path().join("out"), &mut |_| {}).is_err(),
                "{length} bytes"
            );
        }
    }

    /// Shapes of a block of 32 with two query heads, one key-value head and 64 between.
    const BLOCK: [(&str, &str, &[usize]); 9] = [
        ("input_layernorm", "attn_norm", &[32]),
        ("self_attn.q_proj", "attn_q", &[32, 32]),
        ("self_attn.k_proj", "attn_k", &[16, 32]),
        ("self_attn.v_proj", "attn_v", &[16, 32]),
        ("self_attn.o_proj", "attn_output", &[32, 32]),
        ("post_attention_layernorm", "ffn_norm", &[32]),
        ("mlp.gate_proj", "ffn_gate", &[64, 32]),
        ("mlp.up_proj", "ffn_up", &[64, 32]),
        ("mlp.down_proj", "ffn_down", &[32, 64]),
    ];

    fn rows_of_their_number(shape: &[usize]) -> Vec<f32> {
        let cols = shape.last().copied().unwrap_or(1);
        (0..shape.iter().product()).map(|i: usize| (i / cols) as f32).collect()
    }

    fn folder(places: &Path, tied: bool) -> PathBuf {
        let source = places.join("tiny");
        let _ = fs::remove_dir_all(&source);
        fs::create_dir(&source).unwrap();
        let mut writer = PartWriter::new();
        let mut add = |name: &str, shape: &[usize]| writer.plain(name, shape, &rows_of_their_number(shape));
        add("model.embed_tokens.weight", &[258, 32]);
        for (name, _, shape) in BLOCK {
            add(&format!("model.layers.0.{name}.weight"), shape);
        }
        add("model.norm.weight", &[32]);
        if !tied {
            add(OUTPUT, &[258, 32]);
        }
        writer.write(&source.join("model.safetensors")).unwrap();
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
            "vocab_size": 258, "max_position_embeddings": 64, "tie_word_embeddings": tied, "eos_token_id": 257,
        });
        fs::write(source.join("config.json"), config.to_string()).unwrap();
        fs::write(source.join("tokenizer.json"), crate::text::bytes()).unwrap();
        source
    }

    #[test]
    fn a_qwen_3_in_gguf_keeps_its_rows_and_has_its_norms() {
        let places = tempfile::tempdir().unwrap();
        let file = places.path().join("tiny.gguf");
        fs::write(&file, gguf_of("qwen3", true)).unwrap();
        let model = import(&file, &places.path().join("out"), &mut |_| {}).unwrap();
        let config: Value = serde_json::from_str(&model.config_json).unwrap();
        assert_eq!(config["model_type"], "qwen3");
        let block = PartFile::open(&model.part_files[1]).unwrap();
        let q = block
            .tensor("model.layers.0.self_attn.q_proj.weight")
            .unwrap()
            .to_f32()
            .unwrap();
        let rows: Vec<f32> = q.chunks(32).map(|row| row[0].round()).collect();
        assert_eq!(rows[..4], [0.0, 1.0, 2.0, 3.0]);
        assert_eq!(
            block.tensor("model.layers.0.self_attn.k_norm.weight").unwrap().shape,
            [16]
        );

        // Without its norms it is no Qwen 3.
        fs::write(&file, gguf_of("qwen3", false)).unwrap();
        let error = import(&file, &places.path().join("other"), &mut |_| {}).unwrap_err();
        assert!(matches!(error, WeightsError::MissingTensor { .. }), "{error}");
    }

    fn gguf() -> Vec<u8> {
        gguf_of("llama", false)
    }

    fn gguf_of(architecture: &str, head_norms: bool) -> Vec<u8> {
        let tokenizer: Value = serde_json::from_slice(&crate::text::bytes()).unwrap();
        let mut tokens = vec![""; 258];
        for (token, id) in tokenizer["model"]["vocab"].as_object().unwrap() {
            tokens[id.as_u64().unwrap() as usize] = token;
        }
        (tokens[256], tokens[257]) = (crate::text::BEGIN_TEXT, crate::text::END_TEXT);
        let mut kinds = vec![1; 258];
        kinds[256..].fill(3);
        let key = |name: &str| format!("{architecture}.{name}");
        let mut file = Builder::new()
            .text("general.architecture", architecture)
            .u32(&key("block_count"), 1)
            .u32(&key("context_length"), 64)
            .u32(&key("embedding_length"), 32)
            .u32(&key("feed_forward_length"), 64)
            .u32(&key("attention.head_count"), 2)
            .u32(&key("attention.head_count_kv"), 1)
            .f32(&key("attention.layer_norm_rms_epsilon"), 1e-5)
            .text("tokenizer.ggml.model", "gpt2")
            .text("tokenizer.ggml.pre", "smollm")
            .texts("tokenizer.ggml.tokens", &tokens)
            .texts("tokenizer.ggml.merges", &[])
            .whole_numbers("tokenizer.ggml.token_type", &kinds)
            .u32("tokenizer.ggml.bos_token_id", 256)
            .u32("tokenizer.ggml.eos_token_id", 257)
            .flag("tokenizer.ggml.add_bos_token", true)
            .text("tokenizer.chat_template", "{{ messages }}");
        let f32_tensor = |file: Builder, name: &str, shape: &[usize]| {
            let bytes = narrow(PackedType::F32, &rows_of_their_number(shape)).unwrap();
            let shape: Vec<u64> = shape.iter().map(|size| *size as u64).collect();
            file.tensor(name, &shape, 0, &bytes)
        };
        file = f32_tensor(file, "token_embd.weight", &[258, 32]);
        file = f32_tensor(file, "output_norm.weight", &[32]);
        if head_norms {
            file = f32_tensor(file, "blk.0.attn_q_norm.weight", &[16]);
            file = f32_tensor(file, "blk.0.attn_k_norm.weight", &[16]);
        }
        for (_, name, shape) in BLOCK {
            let name = format!("blk.0.{name}.weight");
            file = match shape {
                [_] => f32_tensor(file, &name, shape),
                _ => {
                    let bytes = narrow(PackedType::Q8_0, &rows_of_their_number(shape)).unwrap();
                    let shape: Vec<u64> = shape.iter().map(|size| *size as u64).collect();
                    file.tensor(&name, &shape, 8, &bytes)
                }
            };
        }
        file.finish()
    }
}
