//! Tools that a question brings, and whether the answer must call one.

use polder_protocol::work::{GRAMMAR_BYTES_MAX, Grammar, Message, TOOLS_BYTES_MAX, ToolCall};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::calls::Offered;
use super::failure::Failure;

/// As many as OpenAI takes.
const TOOLS_MAX: usize = 128;

/// As long as OpenAI takes.
const NAME_BYTES_MAX: usize = 64;

/// Where schemas keep what they refer to; a reference is from the root of the whole schema.
const DEFINITIONS: [&str; 2] = ["$defs", "definitions"];

/// `tool_choice`.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Choice {
    Word(String),
    Tool { function: Named },
}

#[derive(Debug, Deserialize)]
pub(super) struct Named {
    name: String,
}

/// A call in a message of the assistant, as the client sends it back.
#[derive(Debug, Deserialize)]
pub(super) struct Called {
    id: String,
    function: CalledFunction,
}

#[derive(Debug, Deserialize)]
struct CalledFunction {
    name: String,
    arguments: String,
}

impl Called {
    /// Templates write the arguments as an object, so they must be one.
    pub(super) fn read(self) -> Result<ToolCall, Failure> {
        let CalledFunction { name, arguments } = self.function;
        match serde_json::from_str(&arguments) {
            Ok(Value::Object(_)) => Ok(ToolCall {
                id: self.id,
                name,
                arguments,
            }),
            _ => Err(Failure::request(format!(
                "the `arguments` of the call of `{name}` are no JSON object"
            ))),
        }
    }
}

/// What a question may call.
#[derive(Debug, Default)]
pub(super) struct Tools {
    tools: Vec<Value>,
    /// The answer is a call, of this tool or, with `None`, of any.
    forced: Option<Option<String>>,
}

impl Tools {
    /// Reads `tools` and `tool_choice`.
    pub(super) fn read(tools: Option<Vec<Value>>, choice: Option<Choice>) -> Result<Self, Failure> {
        let tools = tools.unwrap_or_default();
        if tools.len() > TOOLS_MAX {
            return Err(Failure::request(format!("`tools` may hold at most {TOOLS_MAX} tools")));
        }
        for (index, tool) in tools.iter().enumerate() {
            check(tool).map_err(|what| Failure::request(format!("`tools[{index}]`: {what}")))?;
        }
        let mut read = Self { tools, forced: None };
        let bytes: usize = read.written().iter().map(String::len).sum();
        if bytes > TOOLS_BYTES_MAX {
            return Err(Failure::request(format!(
                "`tools` have {bytes} bytes, at most {TOOLS_BYTES_MAX} are allowed"
            )));
        }
        match choice {
            None => {}
            Some(Choice::Word(word)) => match word.as_str() {
                "auto" => {}
                "none" => read.tools.clear(),
                "required" => read.forced = Some(None),
                _ => {
                    return Err(Failure::request(
                        "`tool_choice` is `none`, `auto`, `required` or a tool of `tools`",
                    ));
                }
            },
            Some(Choice::Tool { function }) => read.forced = Some(Some(function.name)),
        }
        if let Some(forced) = &read.forced
            && !read
                .names()
                .any(|name| forced.as_deref().is_none_or(|forced| forced == name))
        {
            return Err(Failure::request(
                "`tool_choice` asks for a tool that `tools` does not have",
            ));
        }
        Ok(read)
    }

    /// The tools as JSON texts, for the template.
    pub(super) fn written(&self) -> Vec<String> {
        self.tools.iter().map(Value::to_string).collect()
    }

    /// What the tools are called.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tools
            .iter()
            .filter_map(|tool| tool.pointer("/function/name")?.as_str())
    }

    /// The tools as calls of them are looked for.
    pub(super) fn offered(&self) -> Vec<Offered> {
        let offered = self.tools.iter().filter_map(|tool| {
            let parameters = tool
                .pointer("/function/parameters/properties")
                .and_then(Value::as_object);
            let texts = parameters.into_iter().flatten().filter(|(_, schema)| is_text(schema));
            Some(Offered {
                name: tool.pointer("/function/name")?.as_str()?.to_owned(),
                texts: texts.map(|(name, _)| name.clone()).collect(),
            })
        });
        offered.collect()
    }

    /// What an answer that must be a call keeps to: `{"name": ..., "arguments": ...}`.
    pub(super) fn grammar(&self) -> Result<Option<Grammar>, Failure> {
        let Some(forced) = &self.forced else { return Ok(None) };
        let mut root = Map::new();
        let mut calls = Vec::new();
        for tool in &self.tools {
            let name = tool
                .pointer("/function/name")
                .and_then(Value::as_str)
                .unwrap_or_default();
            if forced.as_deref().is_some_and(|forced| forced != name) {
                continue;
            }
            let mut arguments = match tool.pointer("/function/parameters") {
                Some(Value::Object(schema)) => schema.clone(),
                _ => Map::new(),
            };
            for key in DEFINITIONS {
                let Some(Value::Object(own)) = arguments.remove(key) else {
                    continue;
                };
                let Value::Object(all) = root.entry(key).or_insert_with(|| json!({})) else {
                    continue;
                };
                for (definition, schema) in own {
                    if all.get(&definition).is_some_and(|known| *known != schema) {
                        return Err(Failure::request(format!(
                            "two tools define `{definition}` differently: rename it in one, or name the tool in `tool_choice`"
                        )));
                    }
                    all.insert(definition, schema);
                }
            }
            arguments.entry("type").or_insert_with(|| json!("object"));
            calls.push(json!({
                "type": "object",
                "properties": { "name": { "const": name }, "arguments": arguments },
                "required": ["name", "arguments"],
                "additionalProperties": false,
            }));
        }
        root.insert("anyOf".to_owned(), calls.into());
        let schema = Value::Object(root).to_string();
        if schema.len() > GRAMMAR_BYTES_MAX {
            return Err(Failure::request(format!(
                "the schemas of the tools have {} bytes, at most {GRAMMAR_BYTES_MAX} can be forced: name one tool in \
                 `tool_choice`, or let the model choose",
                schema.len()
            )));
        }
        Ok(Some(Grammar::JsonSchema(schema)))
    }
}

/// Gives tools' answers the names of the tools, which some templates write; clients send the calls' ids alone.
pub(super) fn name_answers(messages: &mut [Message]) {
    let calls: Vec<ToolCall> = messages.iter().flat_map(|message| message.tool_calls.clone()).collect();
    for message in messages.iter_mut().filter(|message| message.name.is_none()) {
        // The latest call of this id: models number anew with each answer.
        let call = calls
            .iter()
            .rev()
            .find(|call| Some(&call.id) == message.tool_call_id.as_ref());
        message.name = call.map(|call| call.name.clone());
    }
}

/// Whether a schema takes texts and, but for null, nothing else.
fn is_text(schema: &Value) -> bool {
    match (schema.get("type"), schema.get("enum")) {
        (Some(Value::String(kind)), _) => kind == "string",
        (Some(Value::Array(kinds)), _) => {
            let mut kinds = kinds.iter().filter(|kind| *kind != "null").peekable();
            kinds.peek().is_some() && kinds.all(|kind| kind == "string")
        }
        (None, Some(Value::Array(values))) => values.iter().all(Value::is_string),
        _ => false,
    }
}

fn check(tool: &Value) -> Result<(), String> {
    if tool.get("type").and_then(Value::as_str) != Some("function") {
        return Err("its `type` must be `function`".to_owned());
    }
    let Some(name) = tool.pointer("/function/name").and_then(Value::as_str) else {
        return Err("its `function` must have a `name`".to_owned());
    };
    let letters = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(letters) {
        return Err(format!(
            "its name must have 1 to {NAME_BYTES_MAX} letters, digits, `_`, `-` or `.`"
        ));
    }
    match tool.pointer("/function/parameters") {
        None | Some(Value::Object(_) | Value::Null) => Ok(()),
        Some(_) => Err("its `parameters` must be a JSON schema".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_tool_is_refused() {
        for (tools, choice, words) in [
            (json!([{ "type": "web" }]), Value::Null, "tools[0]"),
            (json!([{ "type": "function", "function": {} }]), Value::Null, "name"),
            (
                json!([{ "type": "function", "function": { "name": "a b" } }]),
                Value::Null,
                "letters",
            ),
            (json!([tide(json!(3))]), Value::Null, "JSON schema"),
            (json!([tide(json!({}))]), json!("sometimes"), "tool_choice"),
            (
                json!([tide(json!({}))]),
                json!({ "type": "function", "function": { "name": "ebb" } }),
                "does not have",
            ),
            (json!([]), json!("required"), "does not have"),
            (
                json!([tide(json!({ "description": "x".repeat(TOOLS_BYTES_MAX) }))]),
                Value::Null,
                "bytes",
            ),
        ] {
            let refused = read(&tools, &choice).unwrap_err();
            assert!(refused.body().to_string().contains(words), "{}", refused.body());
        }
    }

    #[test]
    fn a_forced_call_has_a_schema_with_definitions_at_its_root() {
        let parameters =
            json!({ "properties": { "town": { "$ref": "#/$defs/Town" } }, "$defs": { "Town": { "type": "string" } } });
        let tools = read(&json!([tide(parameters)]), &json!("required")).unwrap();
        let Some(Grammar::JsonSchema(schema)) = tools.grammar().unwrap() else {
            panic!("no schema")
        };
        let schema: Value = serde_json::from_str(&schema).unwrap();
        assert_eq!(schema["$defs"]["Town"]["type"], "string");
        assert_eq!(schema["anyOf"][0]["properties"]["name"]["const"], "tide");
        assert_eq!(schema["anyOf"][0]["properties"]["arguments"]["type"], "object");
        assert!(schema["anyOf"][0]["properties"]["arguments"].get("$defs").is_none());
        assert!(
            read(&json!([tide(json!({}))]), &json!("auto"))
                .unwrap()
                .grammar()
                .unwrap()
                .is_none()
        );
    }

    fn tide(parameters: Value) -> Value {
        json!({ "type": "function", "function": { "name": "tide", "parameters": parameters } })
    }

    fn read(tools: &Value, choice: &Value) -> Result<Tools, Failure> {
        let choice: Option<Choice> = serde_json::from_value(choice.clone()).unwrap();
        Tools::read(serde_json::from_value(tools.clone()).unwrap(), choice)
    }
}
