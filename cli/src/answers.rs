//! Answers of the local daemon as they come: server-sent events read into pieces of text.

use std::borrow::Cow;
use std::io::{BufRead, BufReader, IsTerminal, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail};
use polder_node::home::Home;
use serde_json::{Value, json};

use crate::client::Client;
use crate::context::printable;
use crate::institutions;

/// The longest event; a piece of text is a few bytes, and the last one names the chain.
const EVENT_BYTES_MAX: u64 = 1 << 20;

/// How tokens are chosen, and when to stop: options of every verb that asks.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Choosing {
    /// Which model, where several are served
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// The longest answer in tokens [default: what the context holds]
    #[arg(long, value_name = "COUNT")]
    max_tokens: Option<u32>,
    /// How freely words are chosen, 0 to 2; 0 always takes the likeliest
    #[arg(long, value_name = "NUMBER", default_value_t = 0.7)]
    temperature: f32,
    /// Choose among so many of the likeliest tokens; 0 for all
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    top_k: u32,
    /// Choose among the likeliest tokens that together have this share, 0 to 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.95)]
    top_p: f32,
    /// Leave out tokens below this share of the likeliest one's probability, 0 to 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    min_p: f32,
    /// Make what is in the text already less likely: 1 changes nothing, 1.1 is usual
    #[arg(long, value_name = "NUMBER", default_value_t = 1.0)]
    repetition_penalty: f32,
    /// Take this from a token for each time that the answer has it, -2 to 2
    #[arg(long, value_name = "NUMBER", default_value_t = 0.0, allow_negative_numbers = true)]
    frequency_penalty: f32,
    /// Take this once from every token that the answer has, -2 to 2
    #[arg(long, value_name = "NUMBER", default_value_t = 0.0, allow_negative_numbers = true)]
    presence_penalty: f32,
    /// The same seed, question and model give the same answer
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u32>,
    /// End the answer before this text; may be given more than once
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Answer in JSON that keeps to the schema in this file; `any` for any JSON object
    #[arg(long, value_name = "FILE")]
    json_schema: Option<PathBuf>,
    /// Let only nodes of this institution compute: its name, its key, or `home` for your own; may be given more than once
    #[arg(long, value_name = "INSTITUTION")]
    trust: Vec<String>,
    /// Let only this institution hold the first and the last stage, which see the words
    #[arg(long, value_name = "INSTITUTION")]
    ends: Option<String>,
}

impl Choosing {
    /// The body of a request for an answer to a conversation, asked from `home`.
    ///
    /// # Errors
    ///
    /// An institution that the federation does not have, and what is no number.
    pub(crate) fn question(&self, home: &Path, messages: &[Value]) -> anyhow::Result<Value> {
        // JSON has no such number, and the node would take its own default.
        let numbers = [
            ("temperature", self.temperature),
            ("top-p", self.top_p),
            ("min-p", self.min_p),
            ("repetition-penalty", self.repetition_penalty),
            ("frequency-penalty", self.frequency_penalty),
            ("presence-penalty", self.presence_penalty),
        ];
        if let Some((name, number)) = numbers.iter().find(|(_, number)| !number.is_finite()) {
            bail!("--{name} {number} is no number to choose by");
        }
        let mut question = json!({
            "messages": messages,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        let optional = [
            ("model", self.model.clone().map(Value::from)),
            ("max_tokens", self.max_tokens.map(Value::from)),
            ("seed", self.seed.map(Value::from)),
            ("stop", (!self.stop.is_empty()).then(|| Value::from(self.stop.clone()))),
        ];
        for (name, value) in optional {
            if let Some(value) = value {
                question[name] = value;
            }
        }
        if let Some(file) = &self.json_schema {
            question["response_format"] = response_format(file)?;
        }
        if let Some(route) = self.route(home)? {
            question["route"] = route;
        }
        Ok(question)
    }

    fn route(&self, home: &Path) -> anyhow::Result<Option<Value>> {
        if self.trust.is_empty() && self.ends.is_none() {
            return Ok(None);
        }
        let home = Home::open(home)?;
        let charters = home.charters()?.context("this home is in no federation")?;
        let key = |text: &String| -> anyhow::Result<String> {
            if text == "home" {
                let certificate = home.certificate()?.context("this node has no certificate")?;
                return Ok(certificate.open()?.institution.to_string());
            }
            Ok(institutions::find(charters.current(), text)?.key.to_string())
        };
        let mut route = json!({});
        if !self.trust.is_empty() {
            route["institutions"] = Value::from(self.trust.iter().map(key).collect::<anyhow::Result<Vec<_>>>()?);
        }
        if let Some(ends) = &self.ends {
            route["ends"] = Value::from(key(ends)?);
        }
        Ok(Some(route))
    }
}

/// What the API calls an answer that keeps to the schema in `file`.
fn response_format(file: &Path) -> anyhow::Result<Value> {
    if file == Path::new("any") {
        return Ok(json!({ "type": "json_object" }));
    }
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let schema: Value =
        serde_json::from_str(&text).with_context(|| format!("{} is not a JSON schema", file.display()))?;
    Ok(json!({ "type": "json_schema", "json_schema": { "name": "answer", "schema": schema } }))
}

/// One message of a conversation.
pub(crate) fn message(role: &str, content: &str) -> Value {
    json!({ "role": role, "content": content })
}

/// What comes of a question.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Piece {
    /// More text.
    Text(String),
    /// Calls of tools, in OpenAI's shape.
    Calls(Vec<Value>),
    /// Why the text ended, and who answered.
    Ended {
        /// `stop`, `length` or `tool_calls`.
        reason: String,
        /// The daemon's `polder` object.
        polder: Value,
    },
    /// What it took.
    Usage(Value),
}

/// Asks, and gives the answer piece by piece. Dropping it ends the answer everywhere.
pub(crate) fn ask(
    client: &Client,
    question: &Value,
) -> anyhow::Result<impl Iterator<Item = anyhow::Result<Piece>> + Send + use<>> {
    let answer = client.post_stream("/v1/chat/completions", question)?;
    Ok(pieces(answer))
}

fn pieces(answer: impl Read + Send) -> impl Iterator<Item = anyhow::Result<Piece>> + Send {
    let mut answer = BufReader::new(answer);
    let mut ended = false;
    std::iter::from_fn(move || {
        while !ended {
            let mut line = String::new();
            match answer.by_ref().take(EVENT_BYTES_MAX).read_line(&mut line) {
                Ok(0) => {
                    ended = true;
                    return Some(Err(anyhow!("the answer broke off")));
                }
                Ok(_) => {}
                Err(error) => {
                    ended = true;
                    return Some(Err(error).context("the answer broke off"));
                }
            }
            let Some(data) = line.trim_end().strip_prefix("data:") else {
                continue;
            };
            let data = data.trim_start();
            if data == "[DONE]" {
                ended = true;
                break;
            }
            match piece(data) {
                Ok(None) => {}
                Ok(Some(piece)) => return Some(Ok(piece)),
                Err(error) => {
                    ended = true;
                    return Some(Err(error));
                }
            }
        }
        None
    })
}

/// One event; `None` for one that says nothing.
fn piece(data: &str) -> anyhow::Result<Option<Piece>> {
    let event: Value = serde_json::from_str(data).context("the node sent what is no event")?;
    if let Some(error) = event.pointer("/error/message").and_then(Value::as_str) {
        return Err(anyhow!("{error}"));
    }
    if let Some(usage) = event.get("usage") {
        return Ok(Some(Piece::Usage(usage.clone())));
    }
    if let Some(reason) = event.pointer("/choices/0/finish_reason").and_then(Value::as_str) {
        return Ok(Some(Piece::Ended {
            reason: reason.to_owned(),
            polder: event.get("polder").cloned().unwrap_or_default(),
        }));
    }
    if let Some(calls) = event.pointer("/choices/0/delta/tool_calls").and_then(Value::as_array) {
        return Ok(Some(Piece::Calls(calls.clone())));
    }
    let text = event
        .pointer("/choices/0/delta/content")
        .and_then(Value::as_str)
        .unwrap_or_default();
    Ok((!text.is_empty()).then(|| Piece::Text(text.to_owned())))
}

/// A piece of an answer as it goes to standard output: whoever computed it is not to steer a terminal with it. A file or a
/// pipe gets what came.
pub(crate) fn shown(text: &str) -> Cow<'_, str> {
    if std::io::stdout().is_terminal() {
        Cow::Owned(printable(text))
    } else {
        Cow::Borrowed(text)
    }
}

/// Who answered, for people: which node computed which blocks.
pub(crate) fn who_answered(polder: &Value) -> String {
    let hops = polder
        .get("chain")
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default();
    let mut text = String::new();
    for hop in &hops {
        let node = hop.get("node").and_then(Value::as_str).unwrap_or("?");
        let number = |name: &str| hop.get(name).and_then(Value::as_u64).unwrap_or(0);
        let short = node.get(..8).unwrap_or(node);
        text.push_str(&format!(
            "  node {short}: blocks {} to {}\n",
            number("first"),
            number("end")
        ));
    }
    if let Some(losses @ 1..) = polder.get("stages_lost").and_then(Value::as_u64) {
        text.push_str(&format!("  {losses} stages were lost and replaced on the way\n"));
    }
    if hops.len() > 1 {
        text.push_str("  Splitting a model hides nothing from those who hold its stages.\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_become_text_an_end_and_a_count() {
        let stream = concat!(
            "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}\n\n",
            ": keep-alive\n\n",
            "data: {\"choices\":[{\"delta\":{\"content\":\"Grüße\"},\"finish_reason\":null}]}\n\n",
            "data: {\"choices\":[{\"delta\":{\"tool_calls\":[{\"index\":0}]},\"finish_reason\":null}]}\n\n",
            "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}],\"polder\":{\"chain\":[]}}\n\n",
            "data: {\"choices\":[],\"usage\":{\"total_tokens\":3}}\n\n",
            "data: [DONE]\n\n",
        );
        let pieces: Vec<Piece> = pieces(stream.as_bytes()).map(Result::unwrap).collect();
        assert_eq!(
            pieces,
            [
                Piece::Text("Grüße".to_owned()),
                Piece::Calls(vec![json!({ "index": 0 })]),
                Piece::Ended {
                    reason: "stop".to_owned(),
                    polder: json!({ "chain": [] })
                },
                Piece::Usage(json!({ "total_tokens": 3 })),
            ]
        );
    }

    #[test]
    fn an_error_in_the_middle_and_a_broken_connection_are_told() {
        let stream = "data: {\"error\":{\"message\":\"no chain\"}}\n\n";
        let error = pieces(stream.as_bytes()).next().unwrap().unwrap_err();
        assert_eq!(error.to_string(), "no chain");
        let error = pieces(&b""[..]).next().unwrap().unwrap_err();
        assert_eq!(error.to_string(), "the answer broke off");
    }
}
