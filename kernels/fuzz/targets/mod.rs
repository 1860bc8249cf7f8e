//! What the bytes of a model's files are put through. A target must neither panic nor take memory that its input does
//! not justify, whatever the bytes.

use std::fs;

use polder_kernels::model::{Config, layout};
use polder_kernels::text::{ChatTemplate, GrammarTokens, Tokenizer, bytes, from_sentencepiece, from_tekken};
use polder_kernels::weights::{Gguf, PartFile, import};
use polder_protocol::work::{Grammar, Message};

/// A target.
type Target = fn(&[u8]);

/// Every target: its name, which is that of its folder in `corpus`, and what it does.
pub(crate) const ALL: [(&str, Target); 10] = [
    ("chat_template", chat_template),
    ("config", config),
    ("gguf", gguf),
    ("grammar", grammar),
    ("import_folder", import_folder),
    ("import_gguf", import_gguf),
    ("part_file", part_file),
    ("sentencepiece", sentencepiece),
    ("tekken", tekken),
    ("tokenizer", tokenizer),
];

/// The token that ends an answer, of the tokenizer of bytes.
const END: u32 = 257;
/// What may be asked of a grammar: each token costs a mask.
const ANSWER_TOKENS_MAX: usize = 64;
/// Stands between the files of a folder.
const BETWEEN_FILES: &[u8] = b"\n----\n";

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

/// A JSON schema, which a stranger's question may bring, then after a zero byte an answer, byte by byte.
fn grammar(input: &[u8]) {
    let (schema, answer) = match input.iter().position(|byte| *byte == 0) {
        Some(end) => (&input[..end], &input[end + 1..]),
        None => (input, &[][..]),
    };
    let Ok(schema) = std::str::from_utf8(schema) else {
        return;
    };
    thread_local! {
        static TOKENS: GrammarTokens = {
            let tokenizer = Tokenizer::from_bytes(&bytes()).expect("a tokenizer of our own");
            GrammarTokens::new(&tokenizer, &[END]).expect("it has an end")
        };
    }
    TOKENS.with(|tokens| {
        let Ok(mut state) = tokens.begin(&Grammar::JsonSchema(schema.to_owned())) else {
            return;
        };
        let answer: Vec<u32> = answer
            .iter()
            .take(ANSWER_TOKENS_MAX)
            .map(|byte| (*byte).into())
            .collect();
        for end in 0..=answer.len() {
            let Ok(allowed) = state.allowed(&answer[..end]) else {
                return;
            };
            if let Some(next) = answer.get(end)
                && !allowed.contains(*next as usize)
            {
                assert!(
                    state.allowed(&answer[..=end]).is_err(),
                    "what is not allowed is refused"
                );
                return;
            }
        }
    });
}

/// A whole import of a Hugging Face folder: its files one after the other, the weights last.
fn import_folder(input: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder");
    let source = folder.path().join("model");
    fs::create_dir(&source).expect("a folder");
    let mut rest = Some(input);
    for name in [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "model.safetensors",
    ] {
        let Some(left) = rest else { break };
        let end = left
            .windows(BETWEEN_FILES.len())
            .position(|window| window == BETWEEN_FILES);
        let (file, after) = match end.filter(|_| name != "model.safetensors") {
            Some(end) => (&left[..end], Some(&left[end + BETWEEN_FILES.len()..])),
            None => (left, None),
        };
        if !file.is_empty() {
            fs::write(source.join(name), file).expect("room for the input");
        }
        rest = after;
    }
    let out = folder.path().join("out");
    let done = import(&source, &out, &mut |_| {});
    assert_eq!(done.is_ok(), out.exists(), "all or nothing");
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

fn sentencepiece(bytes: &[u8]) {
    if let Ok(json) = from_sentencepiece(bytes) {
        tokenizer(&json);
    }
}

fn tekken(bytes: &[u8]) {
    if let Ok(json) = from_tekken(bytes) {
        tokenizer(&json);
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
    let _ = tokenizer.encode_bare("ﬁ\u{200d}<s>é\t\n");
    let mut stream = tokenizer.stream();
    for id in [0, 1, 2, u32::MAX] {
        let _ = stream.push(id);
    }
    let _ = stream.finish();
    assert_eq!(tokenizer.token_bytes().len(), tokenizer.vocabulary());
}
