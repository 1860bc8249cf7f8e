//! Tokenizers of other kinds against the programs that define them. `golden/tokenizers/make.py` made what is expected.

use std::fs;
use std::path::{Path, PathBuf};

use polder_kernels::text::{TextError, Tokenizer, from_sentencepiece, from_tekken};
use serde_json::Value;

#[test]
fn small_sentencepiece_models_cut_as_sentencepiece_does() {
    let expected = expected();
    for (name, case) in expected["small"].as_object().unwrap() {
        let json = from_sentencepiece(&fs::read(golden().join(name)).unwrap()).unwrap();
        let tokenizer = Tokenizer::from_bytes(&json).unwrap();
        compare(name, &tokenizer, case, &expected["texts"]);
        for (ids, text) in case["ids"]
            .as_array()
            .unwrap()
            .iter()
            .zip(case["texts"].as_array().unwrap())
        {
            let text = text.as_str().unwrap();
            if !text.contains('⁇') {
                assert_eq!(tokenizer.decode(&numbers(ids)).unwrap(), text, "{name}");
            }
        }
    }
}

/// Needs the folder `data` of the package `mistral-common` from PyPI.
#[test]
fn published_tokenizers_cut_as_their_makers_do() {
    let Some(data) = std::env::var_os("POLDER_TOKENIZERS").map(PathBuf::from) else {
        println!("skipped: POLDER_TOKENIZERS does not name the folder `data` of the package mistral-common");
        return;
    };
    let expected = expected();
    for (name, case) in expected["published"].as_object().unwrap() {
        let bytes = fs::read(data.join(name)).unwrap();
        let json = match name.ends_with(".json") {
            true => from_tekken(&bytes),
            false => from_sentencepiece(&bytes),
        };
        let tokenizer = Tokenizer::from_bytes(&json.unwrap()).unwrap();
        compare(name, &tokenizer, case, &expected["texts"]);
        // A text by itself begins with `<s>`.
        assert_eq!(tokenizer.encode("a").unwrap()[0], 1, "{name}");
    }
}

#[test]
fn broken_files_are_refused() {
    let bytes = fs::read(golden().join("bpe.model")).unwrap();
    for length in (0..bytes.len()).step_by(211) {
        // Some pieces may be whole; nothing panics.
        let _ = from_sentencepiece(&bytes[..length]);
    }
    assert!(matches!(from_sentencepiece(b""), Err(TextError::Tokenizer { .. })));
    assert!(from_sentencepiece(&bytes[..bytes.len() - 1]).is_err());
    assert!(from_sentencepiece(&[0xff; 64]).is_err());
    for text in [
        "",
        "{}",
        r#"{"config": {"pattern": "a", "default_vocab_size": 300, "default_num_special_tokens": 10}, "vocab": []}"#,
        r#"{"config": {"pattern": "a", "default_vocab_size": 3, "default_num_special_tokens": 10}, "vocab": []}"#,
    ] {
        assert!(from_tekken(text.as_bytes()).is_err(), "{text}");
    }
}

fn compare(name: &str, tokenizer: &Tokenizer, case: &Value, texts: &Value) {
    for (text, ids) in texts.as_array().unwrap().iter().zip(case["ids"].as_array().unwrap()) {
        let text = text.as_str().unwrap();
        assert_eq!(tokenizer.encode_bare(text).unwrap(), numbers(ids), "{name}: {text:?}");
    }
}

fn numbers(ids: &Value) -> Vec<u32> {
    ids.as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_u64().unwrap() as u32)
        .collect()
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizers")
}

fn expected() -> Value {
    serde_json::from_slice(&fs::read(golden().join("expected.json")).unwrap()).unwrap()
}
