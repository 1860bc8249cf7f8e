//! What the bytes of a model's files are put through. A target must neither panic nor take memory that its input does
//! not justify, whatever the bytes.

use std::fs;

use polder_kernels::model::{Config, layout};
use polder_kernels::text::{ChatTemplate, Tokenizer};
use polder_kernels::weights::{Gguf, PartFile, import};
use polder_protocol::work::Message;

/// A target.
type Target = fn(&[u8]);

/// Every target: its name, which is that of its folder in `corpus`, and what it does.
pub(crate) const ALL: [(&str, Target); 6] = [
    ("chat_template", chat_template),
    ("config", config),
    ("gguf", gguf),
    ("import_gguf", import_gguf),
    ("part_file", part_file),
    ("tokenizer", tokenizer),
];

fn chat_template(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(template) = ChatTemplate::new(Some(text), "<s>", "</s>") else {
        return;
    };
    let messages = [
        Message::new("system", "Be brief."),
        Message::new("user", "Wat is een polder?"),
    ];
    let tool = r#"{"type": "function", "function": {"name": "tide", "parameters": {}}}"#.to_owned();
    let _ = template.render(&messages, &[tool]);
}

fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(config) = Config::from_json(text) {
        assert!(layout(&config).parts.len() >= 3, "embedding, a block, head");
    }
}

fn gguf(bytes: &[u8]) {
    let Ok(file) = Gguf::parse(bytes) else { return };
    for tensor in file.tensors().values() {
        assert!(bytes.get(tensor.range.clone()).is_some());
    }
    for key in [
        "general.name",
        "general.architecture",
        "tokenizer.ggml.tokens",
        "llama.block_count",
    ] {
        let _ = (file.text(bytes, key), file.texts(bytes, key), file.whole(key));
        let _ = (file.number(key), file.numbers(bytes, key), file.flag(key));
    }
}

/// A whole import, tokenizer and all, from a file on disk.
fn import_gguf(bytes: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("model.gguf");
    fs::write(&file, bytes).expect("room for the input");
    let out = folder.path().join("out");
    let done = import(&file, &out, &mut |_| {});
    assert_eq!(done.is_ok(), out.exists(), "all or nothing");
}

fn part_file(bytes: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("part.safetensors");
    fs::write(&path, bytes).expect("room for the input");
    let Ok(file) = PartFile::open(&path) else { return };
    for name in file.names().map(str::to_owned).collect::<Vec<_>>() {
        if let Ok(tensor) = file.tensor(&name) {
            let _ = (tensor.to_f32(), tensor.packed());
        }
    }
}

fn tokenizer(bytes: &[u8]) {
    let Ok(tokenizer) = Tokenizer::from_bytes(bytes) else {
        return;
    };
    if let Ok(ids) = tokenizer.encode("Alle Menschen sind frei, ça va? 42 ")
        && let Ok(text) = tokenizer.decode(&ids)
    {
        assert!(text.len() < 1 << 20);
    }
    let mut stream = tokenizer.stream();
    for id in [0, 1, 2, u32::MAX] {
        let _ = stream.push(id);
    }
    let _ = stream.finish();
}
