//! What clients ask, read into what the gateway takes. Fields that mean nothing here are ignored, as others do.

use std::collections::BTreeSet;

use polder_protocol::hash::{InstitutionId, NodeId, digest};
use polder_protocol::route::{RoutePolicy, Who};
use polder_protocol::work::{ALTERNATIVES_MAX, GRAMMAR_BYTES_MAX, Grammar, Message, Prompt, Sampling};
use serde::Deserialize;
use serde_json::Value;

use super::calls::Offered;
use super::failure::Failure;
use super::tools::{Called, Choice, Tools, name_answers};
use crate::serve::{GenerateRequest, Owner, ServeHandle};

/// OpenAI allows four; more are harmless.
const STOPS_MAX: usize = 16;

/// What one conversation holds at most; the context ends long before.
const MESSAGES_MAX: usize = 4_096;

/// Who speaks. A template would take any other word for one more speaker, and a misspelled role would not be noticed.
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];

/// What `/v1/completions` gives where nobody says, as OpenAI.
const TEXT_TOKENS_MAX: u32 = 16;

/// The body of `/v1/chat/completions`.
#[derive(Debug, Deserialize)]
pub(super) struct ChatQuestion {
    messages: Vec<ChatMessage>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Choice>,
    max_completion_tokens: Option<u32>,
    logprobs: Option<bool>,
    top_logprobs: Option<u8>,
    #[serde(flatten)]
    common: Common,
}

/// The body of `/v1/completions`.
#[derive(Debug, Deserialize)]
pub(super) struct TextQuestion {
    prompt: OneOrMany,
    logprobs: Option<u8>,
    #[serde(flatten)]
    common: Common,
}

#[derive(Debug, Deserialize)]
struct Common {
    model: Option<String>,
    max_tokens: Option<u32>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<u32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    seed: Option<i64>,
    stop: Option<OneOrMany>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    n: Option<u32>,
    response_format: Option<ResponseFormat>,
    route: Option<Route>,
    user: Option<String>,
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

/// What the answer keeps to, in OpenAI's words.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum ResponseFormat {
    Text,
    JsonObject,
    JsonSchema { json_schema: NamedSchema },
}

#[derive(Debug, Deserialize)]
struct NamedSchema {
    schema: Value,
}

/// Whom to trust with the question; ours, not OpenAI's.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Route {
    institutions: Option<Vec<String>>,
    nodes: Option<Vec<String>>,
    ends: Option<String>,
}

#[derive(Debug, Deserialize)]
struct ChatMessage {
    role: String,
    content: Option<Content>,
    tool_calls: Option<Vec<Called>>,
    tool_call_id: Option<String>,
    name: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// The key that came with a question. Any will do: it is asked of nobody, and tells those apart who have different ones.
#[derive(Debug, Clone, Copy)]
pub(super) struct Key<'a>(pub(super) Option<&'a [u8]>);

impl Key<'_> {
    /// Whose question it is, for keeping what was computed. Who sends no key could be anybody on this machine, and how soon
    /// an answer comes would tell him what others have asked.
    fn owner(self, user: Option<&str>) -> Option<Owner> {
        let key = self.0.filter(|key| !key.is_empty())?;
        let parts = [&digest(key).0[..], user.unwrap_or_default().as_bytes()].concat();
        Some(Owner(digest(&parts).0))
    }
}

/// How the answer is to look.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    pub(super) chat: bool,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) log_probabilities: bool,
    pub(super) model: String,
    /// Tools whose calls are looked for in the answer.
    pub(super) tools: Vec<Offered>,
}

impl ChatQuestion {
    pub(super) fn read(self, serve: &ServeHandle, key: Key<'_>) -> Result<(GenerateRequest, Shape), Failure> {
        if self.messages.is_empty() || self.messages.len() > MESSAGES_MAX {
            return Err(Failure::request(format!(
                "`messages` must hold 1 to {MESSAGES_MAX} messages"
            )));
        }
        let messages: Result<Vec<Message>, Failure> = self.messages.into_iter().map(ChatMessage::read).collect();
        let tokens_max = self.max_completion_tokens.or(self.common.max_tokens);
        let alternatives = match (self.logprobs.unwrap_or(false), self.top_logprobs) {
            (true, count) => Some(count.unwrap_or(0)),
            (false, None | Some(0)) => None,
            (false, Some(_)) => return Err(Failure::request("`top_logprobs` needs `logprobs`: true")),
        };
        let mut messages = messages?;
        name_answers(&mut messages);
        let tools = Tools::read(self.tools, self.tool_choice)?;
        let call = tools.grammar()?;
        let prompt = Prompt::Chat {
            messages,
            tools: tools.written(),
        };
        let (mut request, mut shape) = self.common.read(serve, key, prompt, tokens_max, alternatives, true)?;
        if call.is_some() && request.grammar.is_some() {
            return Err(Failure::request(
                "`response_format` and a `tool_choice` that forces a call exclude each other",
            ));
        }
        request.grammar = request.grammar.or(call);
        shape.tools = tools.offered();
        Ok((request, shape))
    }
}

impl TextQuestion {
    pub(super) fn read(self, serve: &ServeHandle, key: Key<'_>) -> Result<(GenerateRequest, Shape), Failure> {
        let mut prompts = self.prompt.list();
        let (Some(prompt), true) = (prompts.pop(), prompts.is_empty()) else {
            return Err(Failure::request("`prompt` must be one text"));
        };
        let tokens_max = self.common.max_tokens.unwrap_or(TEXT_TOKENS_MAX);
        self.common.read(
            serve,
            key,
            Prompt::Plain(prompt),
            Some(tokens_max),
            self.logprobs,
            false,
        )
    }
}

impl ChatMessage {
    fn read(self) -> Result<Message, Failure> {
        if !ROLES.contains(&self.role.as_str()) {
            return Err(Failure::request(format!(
                "`{}` is no role of a message; there are {}",
                self.role,
                ROLES.join(", ")
            )));
        }
        let calls = self.tool_calls.unwrap_or_default();
        let content = match self.content {
            // An assistant that only calls says nothing.
            None if !calls.is_empty() => String::new(),
            None => {
                return Err(Failure::request(format!(
                    "a message of `{}` has no `content`",
                    self.role
                )));
            }
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => {
                let mut all = String::new();
                for part in parts {
                    let (true, Some(text)) = (part.kind == "text", part.text) else {
                        return Err(Failure::request(format!(
                            "a message part of type `{}` cannot be read",
                            part.kind
                        )));
                    };
                    all.push_str(&text);
                }
                all
            }
        };
        Ok(Message {
            role: self.role,
            content,
            tool_calls: calls.into_iter().map(Called::read).collect::<Result<_, _>>()?,
            tool_call_id: self.tool_call_id,
            name: self.name,
        })
    }
}

impl OneOrMany {
    fn list(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Many(texts) => texts,
        }
    }
}

impl Common {
    fn read(
        self,
        serve: &ServeHandle,
        key: Key<'_>,
        prompt: Prompt,
        tokens_max: Option<u32>,
        alternatives: Option<u8>,
        chat: bool,
    ) -> Result<(GenerateRequest, Shape), Failure> {
        if self.n.is_some_and(|count| count != 1) {
            return Err(Failure::request("`n` must be 1: ask again for another answer"));
        }
        if tokens_max == Some(0) {
            return Err(Failure::request("`max_tokens` must be at least 1"));
        }
        let temperature = within("temperature", self.temperature.unwrap_or(1.0), 0.0, 2.0)?;
        let top_p = within("top_p", self.top_p.unwrap_or(1.0), 0.0, 1.0)?;
        let min_p = within("min_p", self.min_p.unwrap_or(0.0), 0.0, 1.0)?;
        let repetition_penalty = within("repetition_penalty", self.repetition_penalty.unwrap_or(1.0), 0.1, 10.0)?;
        let frequency_penalty = within("frequency_penalty", self.frequency_penalty.unwrap_or(0.0), -2.0, 2.0)?;
        let presence_penalty = within("presence_penalty", self.presence_penalty.unwrap_or(0.0), -2.0, 2.0)?;
        if alternatives.is_some_and(|count| count > ALTERNATIVES_MAX) {
            let name = if chat { "top_logprobs" } else { "logprobs" };
            return Err(Failure::request(format!(
                "`{name}` must be from 0 to {ALTERNATIVES_MAX}"
            )));
        }
        let stop = self.stop.map(OneOrMany::list).unwrap_or_default();
        if stop.len() > STOPS_MAX {
            return Err(Failure::request(format!("`stop` may hold at most {STOPS_MAX} texts")));
        }
        let seed = match self.seed {
            Some(seed) => seed.cast_unsigned(),
            None => getrandom::u64().unwrap_or_default(),
        };
        let epoch = match &self.model {
            Some(name) => serve.find(name)?,
            None => the_only_model(serve)?,
        };
        let model = serve.models().into_iter().find(|(id, ..)| *id == epoch);
        let request = GenerateRequest {
            epoch,
            prompt,
            tokens_max,
            sampling: Sampling {
                temperature,
                top_k: self.top_k.unwrap_or(0),
                top_p,
                min_p,
                repetition_penalty,
                frequency_penalty,
                presence_penalty,
                seed,
                alternatives: alternatives.unwrap_or(0),
            },
            grammar: self.response_format.map(ResponseFormat::read).transpose()?.flatten(),
            names: alternatives.is_some(),
            stop,
            policy: self.route.map(Route::read).transpose()?.unwrap_or_default(),
            owner: key.owner(self.user.as_deref()),
        };
        let shape = Shape {
            chat,
            stream: self.stream.unwrap_or(false),
            include_usage: self
                .stream_options
                .and_then(|options| options.include_usage)
                .unwrap_or(false),
            log_probabilities: alternatives.is_some(),
            model: model.map(|(_, epoch, _)| epoch.name.clone()).unwrap_or_default(),
            tools: Vec::new(),
        };
        Ok((request, shape))
    }
}

impl ResponseFormat {
    fn read(self) -> Result<Option<Grammar>, Failure> {
        match self {
            Self::Text => Ok(None),
            Self::JsonObject => Ok(Some(Grammar::JsonObject)),
            Self::JsonSchema { json_schema } => {
                let schema = json_schema.schema.to_string();
                if schema.len() > GRAMMAR_BYTES_MAX {
                    let bytes = schema.len();
                    return Err(Failure::request(format!(
                        "`json_schema` has {bytes} bytes, at most {GRAMMAR_BYTES_MAX} are allowed"
                    )));
                }
                Ok(Some(Grammar::JsonSchema(schema)))
            }
        }
    }
}

impl Route {
    fn read(self) -> Result<RoutePolicy, Failure> {
        let who = match (self.institutions, self.nodes) {
            (None, None) => Who::Any,
            (Some(institutions), None) => Who::Institutions(ids(&institutions, InstitutionId)?),
            (None, Some(nodes)) => Who::Nodes(ids(&nodes, NodeId)?),
            (Some(_), Some(_)) => return Err(Failure::request("`route` takes `institutions` or `nodes`, not both")),
        };
        let ends = self.ends.map(|text| id(&text)).transpose()?.map(InstitutionId);
        Ok(RoutePolicy { who, ends })
    }
}

fn ids<T: Ord>(texts: &[String], make: fn([u8; 32]) -> T) -> Result<BTreeSet<T>, Failure> {
    texts.iter().map(|text| Ok(make(id(text)?))).collect()
}

fn id(text: &str) -> Result<[u8; 32], Failure> {
    polder_protocol::hash::parse_hex_32(text).map_err(|error| Failure::request(format!("`{text}`: {error}")))
}

fn the_only_model(serve: &ServeHandle) -> Result<polder_protocol::hash::EpochId, Failure> {
    let models = serve.models();
    let served: Vec<_> = models.iter().filter(|(.., served)| *served).collect();
    match served.as_slice() {
        [(id, ..)] => Ok(*id),
        [] => Err(Failure::request(
            "no model is served now: `polder model import` and `polder model pull` bring one in",
        )),
        several => {
            let names: Vec<&str> = several.iter().map(|(_, epoch, _)| epoch.name.as_str()).collect();
            Err(Failure::request(format!(
                "several models are served: name one as `model` (with `polder ask`: --model): {}",
                names.join(", ")
            )))
        }
    }
}

fn within(name: &str, value: f32, least: f32, most: f32) -> Result<f32, Failure> {
    // Written so that what is no number is refused too.
    if (least..=most).contains(&value) {
        Ok(value)
    } else {
        Err(Failure::request(format!("`{name}` must be from {least} to {most}")))
    }
}
