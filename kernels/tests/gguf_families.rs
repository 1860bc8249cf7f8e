//! Every family that GGUF has words for: from a folder to a GGUF file and back, and what each says of the other.
//!
//! Set `POLDER_GGUF_OUT` to a folder to keep the files, with the logits that the engine computes of them, for
//! `benches/peers/logits_beside_llama_cpp.py`; `POLDER_GGUF_FILES` names further files to compute, with `:` between.

mod golden_folder;

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use polder_kernels::device::Device;
use polder_kernels::model::Config;
use polder_kernels::quant::PackedType;
use polder_kernels::stage::{Input, Output, ServeStage, Want};
use polder_kernels::weights::{ImportedModel, PartFile, TensorSource, Vectors, export, export_gguf, import, quantise};
use polder_protocol::work::Weights;
use serde_json::{Value, json};

/// A golden case as GGUF can say it.
struct Variant {
    name: &'static str,
    golden: &'static str,
    /// What of the configuration is different.
    change: fn(&mut Value),
    /// Which block of the golden case each block is; empty for all of them.
    blocks: &'static [usize],
}

const ALL: [Variant; 16] = [
    plain("llama_tied_sharded"),
    // GGUF knows the scaling with the constants of the published models only.
    changed("llama_rope_llama3", |config| {
        config["rope_scaling"]["original_max_position_embeddings"] = json!(8192);
    }),
    // As published Qwen 2 models have it; windows are not read from GGUF.
    changed("qwen2_bias", |config| config["use_sliding_window"] = json!(false)),
    plain("qwen3_qknorm"),
    changed("mistral_sliding", |config| config["sliding_window"] = Value::Null),
    plain("ministral3_yarn"),
    plain("mixtral_moe"),
    // In GGUF all blocks have experts.
    Variant {
        name: "qwen3_moe",
        golden: "qwen3_moe",
        change: |config| config["mlp_only_layers"] = json!([]),
        blocks: &[0, 2],
    },
    // Every fourth block is without positions, as published.
    changed("smollm3_nope", |config| {
        config["no_rope_layers"] = json!([1, 1, 1, 0]);
        config["no_rope_layer_interval"] = json!(4);
    }),
    changed("gemma3_text", |config| config["query_pre_attn_scalar"] = json!(16)),
    changed("apertus_xielu", |config| {
        config["rope_scaling"]["original_max_position_embeddings"] = json!(8192);
    }),
    plain("nemotron_dense"),
    // llama.cpp tells models without a low rank of queries by their number of blocks.
    Variant {
        name: "deepseek_v2_lite",
        golden: "deepseek_v2_lite",
        change: |_| {},
        blocks: &[
            0, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2,
        ],
    },
    plain("deepseek_v3"),
    // Experts and perceptrons are not in one file.
    Variant {
        name: "nemotron_h_moe",
        golden: "nemotron_h_moe",
        change: |config| config["hybrid_override_pattern"] = json!("MEM*EM"),
        blocks: &[0, 1, 2, 3, 4, 6],
    },
    Variant {
        name: "nemotron_h_dense",
        golden: "nemotron_h_moe",
        change: |config| config["hybrid_override_pattern"] = json!("M*-M"),
        blocks: &[0, 3, 5, 6],
    },
];

#[test]
fn every_family_comes_back_from_gguf_bit_for_bit() {
    for variant in &ALL {
        for ty in [PackedType::F32, PackedType::BF16] {
            let places = tempfile::tempdir().unwrap();
            let place = |name: &str| places.path().join(name);
            let folder = variant.folder(ty, &place("tiny"));
            let model = imported(&folder, &place("a"));
            export_gguf(&model.exported(Vectors::AsStored), "tiny", &place("tiny.gguf"))
                .unwrap_or_else(|error| panic!("{}: {error:?}", variant.name));
            let from_gguf = imported(&place("tiny.gguf"), &place("b"));
            export(&from_gguf.exported(Vectors::AsMatrices), &place("back")).unwrap();
            let (before, after) = (tensors(&folder), tensors(&place("back")));
            assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
            for (name, before) in &before {
                same(variant, name, before, &after[name]);
            }
            let config =
                |path: &Path| Config::from_json(&fs::read_to_string(path.join("config.json")).unwrap()).unwrap();
            // What predicts further tokens is not in the file.
            let mut without: Value =
                serde_json::from_str(&fs::read_to_string(folder.join("config.json")).unwrap()).unwrap();
            without["num_nextn_predict_layers"] = json!(0);
            let mut back = config(&place("back"));
            let wanted = Config::from_json(&without.to_string()).unwrap();
            back.family = wanted.family; // A Mistral is a Llama there.
            assert_eq!(back, wanted, "{}", variant.name);
        }
    }
}

#[test]
fn the_engine_computes_the_same_of_both_forms() {
    let keep = env::var_os("POLDER_GGUF_OUT").map(PathBuf::from);
    for variant in &ALL {
        let places = tempfile::tempdir().unwrap();
        let place = |name: &str| places.path().join(name);
        let folder = variant.folder(PackedType::F32, &place("tiny"));
        let model = imported(&folder, &place("a"));
        let file = place("tiny.gguf");
        export_gguf(&model.exported(Vectors::AsStored), variant.name, &file).unwrap();
        let (of_folder, of_file) = (logits(&folder), logits(&file));
        let largest = of_folder
            .iter()
            .zip(&of_file)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        // Gains and rates of decay alone were rounded.
        assert!(largest < 1e-5, "{}: {largest}", variant.name);
        if let Some(keep) = &keep {
            fs::create_dir_all(keep).unwrap();
            fs::copy(&file, keep.join(format!("{}.gguf", variant.name))).unwrap();
            let json = json!({"tokens": TOKENS, "logits": of_folder});
            fs::write(keep.join(format!("{}.json", variant.name)), json.to_string()).unwrap();
        }
    }
}

#[test]
fn published_files_are_computed_too() {
    let (Some(files), Some(keep)) = (env::var_os("POLDER_GGUF_FILES"), env::var_os("POLDER_GGUF_OUT")) else {
        eprintln!("skipped: POLDER_GGUF_FILES names no files, or POLDER_GGUF_OUT no folder");
        return;
    };
    for file in env::split_paths(&files) {
        let keep = Path::new(&keep).join(file.file_name().unwrap());
        fs::create_dir_all(keep.parent().unwrap()).unwrap();
        let tokens = &TOKENS[..4];
        let json = json!({"tokens": tokens, "logits": logits_of(&file, tokens)});
        fs::write(keep.with_extension("json"), json.to_string()).unwrap();
        fs::copy(&file, keep).unwrap();
    }
}

#[test]
fn experts_stay_packed_in_their_stacks() {
    for case in ["mixtral_moe", "nemotron_h_moe", "deepseek_v3"] {
        let variant = ALL.iter().find(|variant| variant.name == case).unwrap();
        let places = tempfile::tempdir().unwrap();
        let place = |name: &str| places.path().join(name);
        let folder = variant.folder(PackedType::F32, &place("tiny"));
        let model = imported(&folder, &place("a"));
        let packed = quantise(
            &model.config_json,
            &model.part_files,
            PackedType::Q8_0,
            &place("q"),
            &mut |_| {},
        )
        .unwrap();
        let model = ImportedModel {
            part_files: packed.part_files,
            ..model
        };
        export_gguf(&model.exported(Vectors::AsStored), "tiny", &place("tiny.gguf")).unwrap();
        let back = imported(&place("tiny.gguf"), &place("b"));
        let mut experts = 0;
        for (before, after) in model.part_files.iter().zip(&back.part_files) {
            let (before, after) = (PartFile::open(before).unwrap(), PartFile::open(after).unwrap());
            for name in before.names() {
                let (before, after) = (before.tensor(name).unwrap(), after.tensor(name).unwrap());
                if name.ends_with("kv_b_proj.weight") {
                    // Its keys are stored turned: the values are the same, the blocks cannot be.
                    assert_eq!((before.ty, after.ty), (PackedType::Q8_0, PackedType::F32));
                    assert_eq!(before.to_f32().unwrap(), after.to_f32().unwrap());
                    continue;
                }
                if before.is_packed() {
                    assert_eq!((before.ty, &before.shape), (after.ty, &after.shape), "{case} {name}");
                    assert!(*before.bytes == *after.bytes, "{case}: {name} differs");
                    experts += usize::from(name.contains(".experts."));
                }
            }
        }
        assert!(experts > 7, "{case}: {experts}");
    }
}

#[test]
fn what_an_architecture_has_no_word_for_is_refused() {
    for (name, change) in [
        (
            "qwen3_moe",
            (|config| config["norm_topk_prob"] = json!(false)) as fn(&mut Value),
        ),
        ("smollm3_nope", |config| config["no_rope_layers"] = json!([1, 0, 1, 0])),
        ("gemma3_text", |config| config["query_pre_attn_scalar"] = json!(24)),
        ("mixtral_moe", |config| config["sliding_window"] = json!(16)),
        ("deepseek_v3", |config| config["rope_scaling"]["mscale"] = json!(0.5)),
        ("ministral3_yarn", |config| {
            config["rope_parameters"]["truncate"] = json!(false)
        }),
        ("nemotron_h_moe", |config| config["mlp_hidden_act"] = json!("silu")),
    ] {
        let variant = ALL.iter().find(|variant| variant.name == name).unwrap();
        let places = tempfile::tempdir().unwrap();
        let place = |name: &str| places.path().join(name);
        let folder = variant.folder(PackedType::F32, &place("tiny"));
        let mut config: Value = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
        change(&mut config);
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        let model = imported(&folder, &place("a"));
        let error = export_gguf(&model.exported(Vectors::AsStored), "tiny", &place("tiny.gguf")).unwrap_err();
        assert!(error.to_string().contains("no word for"), "{name}: {error}");
        assert!(!place("tiny.gguf").exists());
    }
}

const fn plain(name: &'static str) -> Variant {
    changed(name, |_| {})
}

const fn changed(name: &'static str, change: fn(&mut Value)) -> Variant {
    Variant {
        name,
        golden: name,
        change,
        blocks: &[],
    }
}

impl Variant {
    /// The case's folder with all its tensors in one type.
    fn folder(&self, ty: PackedType, folder: &Path) -> PathBuf {
        let mut config = golden_folder::config(self.golden);
        (self.change)(&mut config);
        let all = config["num_hidden_layers"].as_u64().unwrap();
        let all: Vec<usize> = (0..usize::try_from(all).unwrap()).collect();
        let blocks = if self.blocks.is_empty() { &all } else { self.blocks };
        config["num_hidden_layers"] = json!(blocks.len());
        let tokenizer = polder_kernels::text::bytes();
        let names = |name: &str| names_in(blocks, name);
        golden_folder::write(self.golden, ty, &config, tokenizer.as_ref(), names, folder);
        folder.to_owned()
    }
}

/// What a tensor of the golden case is called where `blocks` says which block each block is.
fn names_in(blocks: &[usize], name: &str) -> Vec<String> {
    let Some((prefix, rest)) = ["model.layers.", "backbone.layers."]
        .into_iter()
        .find_map(|prefix| Some((prefix, name.strip_prefix(prefix)?)))
    else {
        return vec![name.to_owned()];
    };
    let (block, rest) = rest.split_once('.').unwrap();
    let block: usize = block.parse().unwrap();
    let places = blocks.iter().enumerate().filter(|(_, source)| **source == block);
    places.map(|(place, _)| format!("{prefix}{place}.{rest}")).collect()
}

/// That a tensor came back: bit for bit, but where GGUF stores another number than the folder.
fn same(variant: &Variant, name: &str, before: &TensorSource, after: &TensorSource) {
    let (a, b) = (before.to_f32().unwrap(), after.to_f32().unwrap());
    assert_eq!(before.shape, after.shape, "{} {name}", variant.name);
    let gains = ["gemma3_text", "nemotron_dense"].contains(&variant.name) && name.ends_with("norm.weight");
    if gains {
        // The file has one more; what norms multiply by is the same to the bit.
        let whole = |gains: &[f32]| gains.iter().map(|gain| gain + 1.0).collect::<Vec<_>>();
        assert_eq!(whole(&a), whole(&b), "{} {name}", variant.name);
    } else if name.ends_with("A_log") {
        // The file has its exponential.
        let largest = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(largest < 2e-7, "{} {name}: {largest}", variant.name);
    } else {
        assert!(a == b, "{}: {name} differs", variant.name);
        // llama.cpp wants what Mamba convolves with in F32, and then vectors stay so.
        if !variant.golden.starts_with("nemotron_h") {
            assert_eq!(before.ty, after.ty, "{} {name}", variant.name);
            assert!(*before.bytes == *after.bytes, "{}: {name} differs", variant.name);
        }
    }
}

const TOKENS: [u32; 21] = [
    5, 42, 79, 116, 153, 190, 227, 8, 45, 82, 119, 156, 193, 230, 11, 48, 85, 122, 159, 196, 233,
];

fn logits(model: &Path) -> Vec<f32> {
    logits_of(model, &TOKENS)
}

fn logits_of(model: &Path, tokens: &[u32]) -> Vec<f32> {
    let (mut stage, _) = ServeStage::open(model, Weights::Packed, &Device::cpu()).unwrap();
    stage.open_session(1, 64).unwrap();
    match stage.forward(1, 0, Input::Tokens(tokens), Want::AllLogits).unwrap() {
        Output::Logits(logits) => logits,
        Output::Hidden(_) => panic!("a whole model gives logits"),
    }
}

fn imported(folder: &Path, out: &Path) -> ImportedModel {
    import(folder, out, &mut |_| {}).unwrap_or_else(|error| panic!("{}: {error:?}", folder.display()))
}

fn tensors(folder: &Path) -> BTreeMap<String, TensorSource> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let file = PartFile::open(&path).unwrap();
            for name in file.names() {
                found.insert(name.to_owned(), file.tensor(name).unwrap());
            }
        }
    }
    found
}
