//! SentencePiece's pieces as a `tokenizer.json`.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value, json};

// Kinds of pieces, numbered alike in SentencePiece's files and in GGUF's.
pub(crate) const NORMAL: u8 = 1;
pub(crate) const UNKNOWN: u8 = 2;
pub(crate) const CONTROL: u8 = 3;
pub(crate) const USER_DEFINED: u8 = 4;

/// A hostile file could hold very long pieces; real ones have at most a few dozen letters.
const PIECE_BYTES_MAX: usize = 256;

/// A vocabulary whose order is that of ids.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pieces<'a> {
    /// Text, score and kind.
    pub(crate) pieces: Vec<(&'a str, f64, u8)>,
    /// What text goes through before it is cut, besides what spaces do.
    pub(crate) normalizers: Vec<Value>,
    /// Whether a space is put before a text.
    pub(crate) prefixed: bool,
    /// Whether letters that no piece has become the pieces of their bytes.
    pub(crate) byte_fallback: bool,
}

impl Pieces<'_> {
    /// Byte pair encoding: pieces have scores in place of merges. Every way to make a piece of two others is a merge, and
    /// merges into better pieces come first.
    pub(crate) fn byte_pairs(&self) -> Value {
        let ordinary: HashSet<&str> = self
            .pieces
            .iter()
            .filter(|(text, _, kind)| *kind == NORMAL && text.len() <= PIECE_BYTES_MAX)
            .map(|(text, ..)| *text)
            .collect();
        let ids: HashMap<&str, usize> = self
            .pieces
            .iter()
            .enumerate()
            .map(|(id, piece)| (piece.0, id))
            .collect();
        let mut merges = Vec::new();
        for (text, score, _) in self.pieces.iter().filter(|(text, ..)| ordinary.contains(text)) {
            for (at, _) in text.char_indices().skip(1) {
                let (left, right) = text.split_at(at);
                if let (true, true, Some(left_id), Some(right_id)) = (
                    ordinary.contains(left),
                    ordinary.contains(right),
                    ids.get(left),
                    ids.get(right),
                ) {
                    merges.push((*score, *left_id, *right_id, left, right));
                }
            }
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
        let merges: Vec<Value> = merges.into_iter().map(|merge| json!([merge.3, merge.4])).collect();
        let unknown = self.pieces.iter().find(|piece| piece.2 == UNKNOWN).map(|piece| piece.0);
        let vocabulary: Map<String, Value> = ids.iter().map(|(text, id)| ((*text).to_owned(), json!(id))).collect();
        self.tokenizer_json(json!({
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": self.byte_fallback, "ignore_merges": false,
            "vocab": vocabulary, "merges": merges,
        }))
    }

    /// The likeliest way to cut a text, where a piece's score is the logarithm of its probability.
    pub(crate) fn unigrams(&self) -> Value {
        let unknown = self.pieces.iter().position(|piece| piece.2 == UNKNOWN);
        let vocabulary: Vec<Value> = self
            .pieces
            .iter()
            .map(|(text, score, _)| json!([text, score]))
            .collect();
        self.tokenizer_json(json!({
            "type": "Unigram", "unk_id": unknown, "vocab": vocabulary, "byte_fallback": self.byte_fallback,
        }))
    }

    fn tokenizer_json(&self, model: Value) -> Value {
        let mut normalizers = self.normalizers.clone();
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if self.prefixed {
            normalizers.push(json!({"type": "Prepend", "prepend": "▁"}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        normalizers.push(json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}));
        let special = |kind: u8| [UNKNOWN, CONTROL].contains(&kind);
        let added: Vec<Value> = self
            .pieces
            .iter()
            .enumerate()
            .filter(|(_, (.., kind))| special(*kind) || *kind == USER_DEFINED)
            .map(|(id, (text, _, kind))| {
                json!({
                    "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": special(*kind),
                })
            })
            .collect();
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": normalizers}, "pre_tokenizer": null,
            "post_processor": null, "decoder": {"type": "Sequence", "decoders": decoders}, "model": model,
        })
    }
}

/// A post-processor that puts one token before a text.
pub(crate) fn beginning_with(id: u32, token: &str) -> Value {
    let begin = |type_id: u32| json!({"SpecialToken": {"id": token, "type_id": type_id}});
    let sequence = |id: &str, type_id: u32| json!({"Sequence": {"id": id, "type_id": type_id}});
    json!({
        "type": "TemplateProcessing",
        "single": [begin(0), sequence("A", 0)],
        "pair": [begin(0), sequence("A", 0), begin(1), sequence("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    })
}
