//! Models from one form to another and back: Hugging Face folders, GGUF files, packed types.

mod golden_folder;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use polder_kernels::model::Config;
use polder_kernels::quant::PackedType;
use polder_kernels::text::{Tokenizer, byte_level_bpe};
use polder_kernels::weights::{PartFile, PartWriter, Vectors, WeightsError, export, export_gguf, import, quantise};
use serde_json::{Value, json};

#[test]
fn a_model_comes_back_from_gguf_bit_for_bit() {
    for case in ["llama_rope_llama3", "llama_tied_sharded", "qwen2_bias", "qwen3_qknorm"] {
        for ty in [PackedType::F32, PackedType::F16, PackedType::BF16] {
            let places = tempfile::tempdir().unwrap();
            let place = |name: &str| places.path().join(name);
            let folder = folder_in(ty, case, &place("tiny"));
            let imported = import(&folder, &place("a"), &mut |_| {}).unwrap();
            export_gguf(&imported.exported(Vectors::AsStored), "tiny", &place("tiny.gguf")).unwrap();
            let from_gguf = import(&place("tiny.gguf"), &place("b"), &mut |_| {}).unwrap();
            export(&from_gguf.exported(Vectors::AsMatrices), &place("back")).unwrap();
            let (before, after) = (tensors(&folder), tensors(&place("back")));
            assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
            for (name, (ty, shape, bytes)) in &before {
                let (ty_after, shape_after, bytes_after) = &after[name];
                assert_eq!((ty, shape), (ty_after, shape_after), "{case} {name}");
                assert!(bytes == bytes_after, "{case} in {ty}: {name} differs");
            }
            let config =
                |path: &Path| Config::from_json(&fs::read_to_string(path.join("config.json")).unwrap()).unwrap();
            assert_eq!(config(&folder), config(&place("back")), "{case}");
            assert_eq!(from_gguf.end_tokens, imported.end_tokens);
        }
    }
}

#[test]
fn tokenizer_and_template_survive_gguf() {
    let places = tempfile::tempdir().unwrap();
    let place = |name: &str| places.path().join(name);
    let folder = folder_in(PackedType::F32, "llama_tied_sharded", &place("tiny"));
    let text = "the polder stays dry while the pumps turn, and the pumps turn while the wind blows\n".repeat(9);
    // The model's vocabulary is larger: ids beyond the tokenizer's are padding.
    let vocabulary = Config::from_json(&fs::read_to_string(folder.join("config.json")).unwrap())
        .unwrap()
        .vocabulary;
    let learnt = byte_level_bpe([text.as_str()].into_iter(), 262);
    let (tokenizer, text) = match learnt {
        Ok(json) if vocabulary >= 262 => (json, text.as_str()),
        _ => (tiny_tokenizer().to_string().into_bytes(), "aab"),
    };
    fs::write(folder.join("tokenizer.json"), &tokenizer).unwrap();
    fs::write(folder.join("chat_template.jinja"), "{{ messages[0].content }}").unwrap();
    let imported = import(&folder, &place("a"), &mut |_| {}).unwrap();
    export_gguf(&imported.exported(Vectors::AsStored), "tiny", &place("tiny.gguf")).unwrap();
    let back = import(&place("tiny.gguf"), &place("b"), &mut |_| {}).unwrap();
    assert_eq!(back.chat_template.as_deref(), Some("{{ messages[0].content }}"));
    let read = |path: &Path| Tokenizer::from_bytes(&fs::read(path).unwrap()).unwrap();
    let ids = read(&back.tokenizer_json).encode_bare(text).unwrap();
    assert_eq!(
        ids,
        Tokenizer::from_bytes(&tokenizer).unwrap().encode_bare(text).unwrap()
    );
    assert!(!ids.is_empty());
}

#[test]
fn what_gguf_has_no_word_for_is_refused() {
    let places = tempfile::tempdir().unwrap();
    let place = |name: &str| places.path().join(name);
    let refused = |case: &str, change: &dyn Fn(&Path)| {
        let folder = folder_in(PackedType::F32, case, &place(case));
        change(&folder);
        let imported = import(&folder, &place(&format!("{case}-parts")), &mut |_| {}).unwrap();
        let out = place(&format!("{case}.gguf"));
        let error = export_gguf(&imported.exported(Vectors::AsStored), "tiny", &out).unwrap_err();
        fs::remove_dir_all(&folder).unwrap();
        fs::remove_dir_all(place(&format!("{case}-parts"))).unwrap();
        assert_eq!(
            fs::read_dir(places.path()).unwrap().count(),
            0,
            "nothing is left behind"
        );
        error
    };
    let error = refused("mistral_sliding", &|_| {});
    assert!(matches!(error, WeightsError::Feature { .. }), "{error}");
    let error = refused("mistral4_mla", &|_| {});
    assert!(matches!(error, WeightsError::Architecture { .. }), "{error}");
    let error = refused("llama_rope_llama3", &|folder| {
        let mut tokenizer = tiny_tokenizer();
        tokenizer["pre_tokenizer"] = json!({"type": "Whitespace"});
        fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    });
    assert!(error.to_string().contains("cuts text"), "{error}");
}

#[test]
fn a_packed_model_is_near_and_smaller_and_packing_again_changes_nothing() {
    let places = tempfile::tempdir().unwrap();
    let place = |name: &str| places.path().join(name);
    let folder = folder_in(PackedType::BF16, "llama_tied_sharded", &place("tiny"));
    let imported = import(&folder, &place("a"), &mut |_| {}).unwrap();
    let bytes = |files: &[PathBuf]| files.iter().map(|path| fs::metadata(path).unwrap().len()).sum::<u64>();
    let config = &imported.config_json;
    for (to, most) in [
        (PackedType::Q8_0, 0.01),
        (PackedType::Q5_1, 0.06),
        (PackedType::Q4K, 0.12),
    ] {
        let out = place(to.name());
        let found = quantise(config, &imported.part_files, to, &out, &mut |_| {}).unwrap();
        assert!(bytes(&found.part_files) < bytes(&imported.part_files), "{to}");
        assert!(found.kept > 0 && !found.packed.is_empty());
        for (ty, packed) in &found.packed {
            assert!(packed.relative_error < most, "{ty}: {}", packed.relative_error);
        }
        let again = quantise(config, &found.part_files, to, &place("again"), &mut |_| {}).unwrap();
        for (once, twice) in found.part_files.iter().zip(&again.part_files) {
            assert_eq!(fs::read(once).unwrap(), fs::read(twice).unwrap());
        }
        assert!(again.packed.is_empty());
        fs::remove_dir_all(place("again")).unwrap();
    }
    // Embedding and its copy in the head stay the same bytes.
    let head = PartFile::open(&place("Q4_K").join("part-00004.safetensors")).unwrap();
    let embedding = PartFile::open(&place("Q4_K").join("part-00000.safetensors")).unwrap();
    let copy = head.tensor("lm_head.weight").unwrap();
    assert_eq!(
        *copy.bytes,
        *embedding.tensor("model.embed_tokens.weight").unwrap().bytes
    );
    // Rows of 64 have no blocks of 256.
    assert_eq!(copy.ty, PackedType::Q8_0);
}

#[test]
fn weights_that_are_not_numbers_are_not_packed() {
    let places = tempfile::tempdir().unwrap();
    let folder = folder_in(PackedType::F32, "llama_tied_sharded", &places.path().join("tiny"));
    let imported = import(&folder, &places.path().join("a"), &mut |_| {}).unwrap();
    let block = &imported.part_files[1];
    let file = PartFile::open(block).unwrap();
    let mut writer = PartWriter::new();
    for name in file.names() {
        let tensor = file.tensor(name).unwrap();
        let mut values = tensor.to_f32().unwrap();
        if name.ends_with("up_proj.weight") {
            values[3] = 1e30; // Beyond F16.
        }
        writer.plain(name, &tensor.shape, &values);
    }
    let spoilt = places.path().join("spoilt");
    writer.write(&spoilt).unwrap();
    let mut files = imported.part_files.clone();
    files[1] = spoilt;
    let out = places.path().join("out");
    let error = quantise(&imported.config_json, &files, PackedType::Q8_0, &out, &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("not finite"), "{error}");
    assert!(!out.exists());
}

/// A golden case's folder with all its tensors in one type.
fn folder_in(ty: PackedType, case: &str, folder: &Path) -> PathBuf {
    let mut config = golden_folder::config(case);
    match case {
        // GGUF knows the scaling with the constants of the published models only.
        "llama_rope_llama3" => config["rope_scaling"]["original_max_position_embeddings"] = json!(8192),
        // As published Qwen 2 models have it; windows are not read from GGUF.
        "qwen2_bias" => config["use_sliding_window"] = json!(false),
        _ => {}
    }
    let tokenizer = tiny_tokenizer().to_string();
    golden_folder::write(
        case,
        ty,
        &config,
        tokenizer.as_bytes(),
        |name| vec![name.to_owned()],
        folder,
    );
    folder.to_owned()
}

fn tiny_tokenizer() -> Value {
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": {"a": 0, "b": 1, "aa": 2}, "merges": [["a", "a"]],
        },
    })
}

type Found = BTreeMap<String, (PackedType, Vec<usize>, Vec<u8>)>;

fn tensors(folder: &Path) -> Found {
    let mut found = Found::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let file = PartFile::open(&path).unwrap();
            for name in file.names() {
                let tensor = file.tensor(name).unwrap();
                found.insert(name.to_owned(), (tensor.ty, tensor.shape, tensor.bytes.to_vec()));
            }
        }
    }
    found
}
