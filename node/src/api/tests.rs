//! Requests over real HTTP, to a node that answers itself.

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::serve::tests::Town;

#[tokio::test(flavor = "multi_thread")]
async fn a_text_is_completed_whole_or_in_events() {
    let (address, _town) = api().await;
    let question = json!({ "model": "hashes", "prompt": "hello", "max_tokens": 8, "temperature": 0 });
    let (status, body) = post(&address, "/v1/completions", &question).await;
    assert_eq!(status, 200, "{body}");
    let body: Value = serde_json::from_str(&body).unwrap();
    let text = body["choices"][0]["text"].as_str().unwrap();
    assert_eq!(text.len(), 8);
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    assert_eq!(body["usage"]["total_tokens"], 13);
    assert_eq!(body["polder"]["chain"].as_array().unwrap().len(), 1);

    let mut question = question;
    question["stream"] = true.into();
    let (_, events) = post(&address, "/v1/completions", &question).await;
    let data: Vec<&str> = events.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    let (last, chunks) = data.split_last().unwrap();
    assert_eq!(*last, "[DONE]");
    let pieces = chunks.iter().map(|chunk| {
        let chunk: Value = serde_json::from_str(chunk).unwrap();
        chunk["choices"][0]["text"].as_str().unwrap().to_owned()
    });
    assert_eq!(pieces.collect::<String>(), text);
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_come_with_every_token() {
    let (address, _town) = api().await;
    let question = json!({ "prompt": "hello", "max_tokens": 4, "temperature": 0, "logprobs": 2 });
    let (status, body) = post(&address, "/v1/completions", &question).await;
    assert_eq!(status, 200, "{body}");
    let body: Value = serde_json::from_str(&body).unwrap();
    let told = &body["choices"][0]["logprobs"];
    let tokens: String = told["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|token| token.as_str().unwrap())
        .collect();
    assert_eq!(tokens, body["choices"][0]["text"].as_str().unwrap());
    assert_eq!(told["token_logprobs"], json!([-0.5, -0.5, -0.5, -0.5]));
    // The last stage tells three; two were asked for.
    let alternatives = told["top_logprobs"].as_array().unwrap();
    assert!(alternatives.iter().all(|token| token.as_object().unwrap().len() == 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_said_in_the_shape_that_clients_read() {
    let (address, _town) = api().await;
    for (path, question, status, words) in [
        (
            "/v1/completions",
            json!({ "model": "nobody", "prompt": "x" }),
            404,
            "nobody",
        ),
        (
            "/v1/completions",
            json!({ "prompt": "x", "temperature": 9 }),
            400,
            "temperature",
        ),
        (
            "/v1/completions",
            json!({ "prompt": "x".repeat(300) }),
            400,
            "300 tokens",
        ),
        ("/v1/completions", json!({ "prompt": ["a", "b"] }), 400, "one text"),
        (
            "/v1/completions",
            json!({ "prompt": "x", "logprobs": 21 }),
            400,
            "logprobs",
        ),
        ("/v1/completions", json!({ "prompt": "x", "min_p": 1.5 }), 400, "min_p"),
        (
            "/v1/chat/completions",
            json!({ "messages": [{ "role": "user", "content": "x" }], "top_logprobs": 2 }),
            400,
            "logprobs",
        ),
        ("/v1/chat/completions", json!({ "messages": [] }), 400, "messages"),
        (
            "/v1/chat/completions",
            json!({ "messages": [{ "role": "assistant" }] }),
            400,
            "no `content`",
        ),
        (
            "/v1/chat/completions",
            json!({ "messages": [{ "role": "user", "content": "x" }], "tools": [{ "type": "web" }] }),
            400,
            "`tools[0]`",
        ),
        (
            "/v1/chat/completions",
            json!({ "messages": [{ "role": "user", "content": "x" }], "tool_choice": "required" }),
            400,
            "tool_choice",
        ),
        ("/v1/chat/completions", json!({ "messages": 3 }), 400, "does not fit"),
        (
            "/v1/chat/completions",
            json!({ "messages": [{ "role": "wizard", "content": "x" }] }),
            400,
            "`wizard`",
        ),
        (
            "/v1/chat/completions",
            json!({ "messages": [{ "role": "user", "content": "x" }], "max_tokens": 0 }),
            400,
            "max_tokens",
        ),
        ("/v1/embeddings", json!({}), 404, "/v1/completions"),
        ("/v1/models", json!({}), 405, "POST"),
    ] {
        let (found, body) = post(&address, path, &question).await;
        assert_eq!(found, status, "{body}");
        let body: Value = serde_json::from_str(&body).unwrap();
        let message = body["error"]["message"].as_str().unwrap();
        assert!(message.contains(words), "{message}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn models_and_metrics_are_listed() {
    let (address, _town) = api().await;
    let (status, body) = http(&address, "GET /v1/models", "").await;
    assert_eq!(status, 200);
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(body["data"][0]["id"], "hashes");
    assert_eq!(body["data"][0]["served"], true);
    let (status, body) = http(&address, "GET /v1/models/hashes", "").await;
    assert_eq!(status, 200);
    assert_eq!(serde_json::from_str::<Value>(&body).unwrap()["id"], "hashes");
    let (status, body) = http(&address, "GET /v1/models/nobody", "").await;
    assert!(status == 404 && body.contains("`nobody`"), "{body}");
    let (_, text) = http(&address, "GET /metrics", "").await;
    assert!(text.contains("polder_stages_held 1"), "{text}");
}

async fn api() -> (String, Town) {
    let town = Town::new();
    let node = town.node(1).await;
    node.hold(0, 6).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let router = super::router(node.serve.clone(), std::sync::Arc::new(Vec::new));
    tokio::spawn(async move {
        let _node = node;
        axum::serve(listener, router).await
    });
    (address, town)
}

async fn post(address: &str, path: &str, body: &Value) -> (u16, String) {
    http(address, &format!("POST {path}"), &body.to_string()).await
}

/// HTTP/1.0, so that the answer ends with the connection and is not cut into chunks.
async fn http(address: &str, what: &str, body: &str) -> (u16, String) {
    let length = body.len();
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!(
        "{what} HTTP/1.0\r\nhost: {address}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, body.to_owned())
}
