//! Answers in OpenAI's shapes: whole, or as server-sent events.

use std::convert::Infallible;
use std::time::Duration;

use axum::Json;
use axum::response::sse::{Event as Sent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt, stream};
use polder_protocol::hash::hex;
use polder_protocol::route::Hop;
use serde_json::{Map, Value, json};

use super::calls::{Call, Calls};
use super::failure::Failure;
use super::log_probabilities::Tokens;
use super::metrics::Metrics;
use super::question::Shape;
use crate::serve::{Event, GenerateRequest, Reason, ServeError, ServeHandle, Usage};

/// Proxies forget a silent connection after half a minute.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// The frame of an answer: what all its chunks have in common.
#[derive(Debug)]
struct Frame {
    id: String,
    created: u64,
    shape: Shape,
    /// Looks for calls where tools were offered.
    calls: Option<Calls>,
}

pub(super) async fn answer(
    serve: &ServeHandle,
    metrics: &Metrics,
    request: GenerateRequest,
    shape: Shape,
) -> Result<Response, Failure> {
    metrics.asked();
    let frame = Frame::new(shape);
    let mut events = Box::pin(metrics.count(serve.generate(request)));
    // An error before the first token has a status of its own.
    let first = match events.next().await {
        Some(Err(error)) => return Err(error.into()),
        first => first,
    };
    let events = stream::iter(first).chain(events);
    if frame.shape.stream {
        return Ok(frame.stream(events).into_response());
    }
    frame.whole(events).await.map(IntoResponse::into_response)
}

impl Frame {
    fn new(mut shape: Shape) -> Self {
        let tools = std::mem::take(&mut shape.tools);
        let prefix = if shape.chat { "chatcmpl" } else { "cmpl" };
        let number = getrandom::u64().unwrap_or_default();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            id: format!("{prefix}-{}", hex(&number.to_le_bytes())),
            created: now.map_or(0, |since| since.as_secs()),
            calls: (!tools.is_empty()).then(|| Calls::of(tools)),
            shape,
        }
    }

    async fn whole(mut self, events: impl Stream<Item = Result<Event, ServeError>>) -> Result<Json<Value>, Failure> {
        let mut events = std::pin::pin!(events);
        let mut all = String::new();
        let mut tokens = self.shape.log_probabilities.then(Tokens::default);
        while let Some(event) = events.next().await {
            match event? {
                Event::Token {
                    text,
                    chosen,
                    alternatives,
                } => {
                    if let Some(tokens) = &mut tokens {
                        tokens.push(chosen, alternatives);
                    }
                    all.push_str(&self.words(text));
                }
                Event::Done {
                    text,
                    reason,
                    usage,
                    chain,
                } => {
                    let (text, calls) = self.rest(text);
                    all.push_str(&text);
                    let content = if self.shape.chat {
                        ("message", message(all, &calls))
                    } else {
                        ("text", Value::from(all))
                    };
                    let mut body = self.body(content, Some(said(reason, &calls)), self.told(tokens));
                    body.insert("usage".to_owned(), usage_value(usage));
                    body.insert("polder".to_owned(), chain_value(&chain, usage));
                    return Ok(Json(Value::Object(body)));
                }
            }
        }
        Err(Failure::from(ServeError::GaveUp {
            reason: "the answer broke off".to_owned(),
        }))
    }

    fn stream(mut self, events: impl Stream<Item = Result<Event, ServeError>> + Send + 'static) -> impl IntoResponse {
        let opening = self.shape.chat.then(|| {
            let role = json!({ "role": "assistant", "content": "" });
            self.sent(self.body(("delta", role), None, Value::Null))
        });
        let chunks = events.flat_map(move |event| stream::iter(self.chunks(event)));
        let end = stream::iter([Sent::default().data("[DONE]")]);
        let sent = stream::iter(opening).chain(chunks).chain(end).map(Ok::<_, Infallible>);
        Sse::new(sent).keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
    }

    /// What goes out for one event.
    fn chunks(&mut self, event: Result<Event, ServeError>) -> Vec<Sent> {
        match event {
            Ok(Event::Token {
                text,
                chosen,
                alternatives,
            }) => {
                let text = self.words(text);
                if text.is_empty() && !self.shape.log_probabilities {
                    return Vec::new();
                }
                let tokens = self.shape.log_probabilities.then(|| Tokens::one(chosen, alternatives));
                vec![self.sent(self.body(self.piece(text), None, self.told(tokens)))]
            }
            Ok(Event::Done {
                text,
                reason,
                usage,
                chain,
            }) => {
                let mut chunks = Vec::new();
                let (text, calls) = self.rest(text);
                if !text.is_empty() {
                    chunks.push(self.sent(self.body(self.piece(text), None, Value::Null)));
                }
                for (index, call) in calls.iter().enumerate() {
                    let mut call = call.value();
                    call["index"] = index.into();
                    let delta = ("delta", json!({ "tool_calls": [call] }));
                    chunks.push(self.sent(self.body(delta, None, Value::Null)));
                }
                let nothing = if self.shape.chat {
                    ("delta", json!({}))
                } else {
                    ("text", Value::from(""))
                };
                let mut last = self.body(nothing, Some(said(reason, &calls)), Value::Null);
                last.insert("polder".to_owned(), chain_value(&chain, usage));
                chunks.push(self.sent(last));
                if self.shape.include_usage {
                    let mut body = self.head();
                    body.insert("choices".to_owned(), json!([]));
                    body.insert("usage".to_owned(), usage_value(usage));
                    chunks.push(self.sent(body));
                }
                chunks
            }
            // The status has gone out, so the error is an event.
            Err(error) => vec![Sent::default().data(Failure::from(error).body().to_string())],
        }
    }

    /// What of `text` can go out.
    fn words(&mut self, text: String) -> String {
        match &mut self.calls {
            Some(calls) => calls.push(&text),
            None => text,
        }
    }

    /// What is left with the last `text`, and the calls.
    fn rest(&mut self, text: String) -> (String, Vec<Call>) {
        match &mut self.calls {
            Some(calls) => {
                let text = calls.push(&text);
                let (rest, found) = calls.finish();
                (text + &rest, found)
            }
            None => (text, Vec::new()),
        }
    }

    fn piece(&self, text: String) -> (&'static str, Value) {
        if self.shape.chat {
            ("delta", json!({ "content": text }))
        } else {
            ("text", Value::from(text))
        }
    }

    fn told(&self, tokens: Option<Tokens>) -> Value {
        match tokens {
            Some(tokens) if self.shape.chat => tokens.of_chat(),
            Some(tokens) => tokens.of_text(),
            None => Value::Null,
        }
    }

    fn body(&self, (name, content): (&str, Value), reason: Option<&str>, tokens: Value) -> Map<String, Value> {
        let mut body = self.head();
        let choice = json!({ "index": 0, name: content, "logprobs": tokens, "finish_reason": reason });
        body.insert("choices".to_owned(), json!([choice]));
        body
    }

    fn head(&self) -> Map<String, Value> {
        let object = match (self.shape.chat, self.shape.stream) {
            (true, true) => "chat.completion.chunk",
            (true, false) => "chat.completion",
            (false, _) => "text_completion",
        };
        let mut head = Map::new();
        head.insert("id".to_owned(), self.id.clone().into());
        head.insert("object".to_owned(), object.into());
        head.insert("created".to_owned(), self.created.into());
        head.insert("model".to_owned(), self.shape.model.clone().into());
        head
    }

    fn sent(&self, body: Map<String, Value>) -> Sent {
        Sent::default().data(Value::Object(body).to_string())
    }
}

/// Why an answer ended, in OpenAI's words.
fn said(reason: Reason, calls: &[Call]) -> &'static str {
    match reason {
        _ if !calls.is_empty() => "tool_calls",
        Reason::Stop => "stop",
        Reason::Length => "length",
    }
}

/// A whole answer to a conversation.
fn message(text: String, calls: &[Call]) -> Value {
    if calls.is_empty() {
        return json!({ "role": "assistant", "content": text });
    }
    let content = (!text.is_empty()).then_some(text);
    let calls: Vec<Value> = calls.iter().map(Call::value).collect();
    json!({ "role": "assistant", "content": content, "tool_calls": calls })
}

fn usage_value(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens.saturating_add(usage.completion_tokens),
        "prompt_tokens_details": { "cached_tokens": usage.reused_tokens },
    })
}

/// Who answered: ours, not OpenAI's.
fn chain_value(chain: &[Hop], usage: Usage) -> Value {
    let hops: Vec<Value> = chain
        .iter()
        .map(|hop| json!({ "node": hop.node.to_string(), "first": hop.range.first, "end": hop.range.end }))
        .collect();
    json!({ "chain": hops, "stages_lost": usage.losses })
}
