//! Calls of tools in an answer, in the forms in which models of the known families write them:
//!
//! - Hermes, Qwen, SmolLM3: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of times, after words;
//! - Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, later `[TOOL_CALLS]name[ARGS]{...}`;
//! - Llama: `{"name": ..., "parameters": {...}}`, several with `;` between;
//! - Apertus: `[{"name": {...}}]` between marks;
//! - Qwen 3 Coder, Nemotron 3: `<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`;
//! - Llama 3.2 and 4: `[name(key=value, ...), ...]`, in Python's words.
//!
//! Marks that are special tokens are not in the text of an answer, so they may be missing. A call is only what names a
//! tool that was offered: an answer in JSON about something else stays text.

use polder_protocol::hash::hex;
use serde_json::{Map, Value, json};

use super::call_forms::{self, FUNCTION};
use crate::serve::marks;

/// What calls begin with, wherever it stands.
const MARKS: [&str; 6] = [
    "<tool_call>",
    "[TOOL_CALLS]",
    "<|python_tag|>",
    "<|python_start|>",
    "<|tools_prefix|>",
    FUNCTION,
];

/// What may follow the name of a tool that is called without an object around it.
const ARGUMENTS: &str = "[ARGS]";

/// What may stand around and between calls.
const BETWEEN: [&str; 7] = [
    "</tool_call>",
    "<|python_end|>",
    "<|tools_suffix|>",
    "<tool_call>",
    "[TOOL_CALLS]",
    ";",
    ",",
];

/// Bytes of an id. Mistral's templates take nine letters and digits and nothing else; others take anything.
const ID_BYTES: usize = 9;

/// A tool that was offered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Offered {
    pub(super) name: String,
    /// The parameters that are texts: between tags, `3` may be one.
    pub(super) texts: Vec<String>,
}

/// One call.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Call {
    pub(super) name: String,
    pub(super) arguments: Map<String, Value>,
}

impl Call {
    /// In OpenAI's shape, with an id of its own.
    pub(super) fn value(&self) -> Value {
        let id = hex(&getrandom::u64().unwrap_or_default().to_le_bytes());
        let arguments = Value::Object(self.arguments.clone()).to_string();
        json!({
            "id": id.get(..ID_BYTES).unwrap_or(&id),
            "type": "function",
            "function": { "name": self.name, "arguments": arguments },
        })
    }
}

/// Looks for calls in an answer that comes piece by piece, and holds back what may be one.
#[derive(Debug)]
pub(super) struct Calls {
    tools: Vec<Offered>,
    state: State,
}

#[derive(Debug)]
enum State {
    /// The beginning, which may yet be one of a call.
    Beginning(String),
    /// Words; at the end of them may be the beginning of a mark.
    Words(String),
    /// From a call on all is held.
    Held(String),
}

impl Calls {
    /// Looks for calls of `tools`.
    pub(super) fn of(tools: Vec<Offered>) -> Self {
        Self {
            tools,
            state: State::Beginning(String::new()),
        }
    }

    /// The text that is surely none of a call.
    pub(super) fn push(&mut self, piece: &str) -> String {
        match std::mem::replace(&mut self.state, State::Words(String::new())) {
            State::Held(mut held) => {
                held.push_str(piece);
                self.state = State::Held(held);
                String::new()
            }
            State::Beginning(mut held) => {
                held.push_str(piece);
                match self.begins(held.trim_start()) {
                    None => {
                        self.state = State::Beginning(held);
                        String::new()
                    }
                    Some(true) => {
                        self.state = State::Held(held);
                        String::new()
                    }
                    Some(false) => self.words(held),
                }
            }
            State::Words(mut held) => {
                held.push_str(piece);
                self.words(held)
            }
        }
    }

    /// The text that is left and the calls, when no more comes.
    pub(super) fn finish(&mut self) -> (String, Vec<Call>) {
        let state = std::mem::replace(&mut self.state, State::Words(String::new()));
        let (State::Beginning(held) | State::Words(held) | State::Held(held)) = state;
        match self.read(&held) {
            Some(calls) => (String::new(), calls),
            None => (held, Vec::new()),
        }
    }

    /// Whether an answer that begins with `text` begins with a call; `None` where that is not to be seen yet.
    fn begins(&self, text: &str) -> Option<bool> {
        if text.is_empty() {
            return None;
        }
        if text.starts_with(['{', '[']) || MARKS.iter().any(|mark| text.starts_with(mark)) {
            return Some(true);
        }
        let mut may = MARKS.iter().any(|mark| mark.starts_with(text));
        for name in self.names() {
            if let Some(rest) = text.strip_prefix(name) {
                let rest = rest.trim_start();
                if rest.starts_with('{') || rest.starts_with(ARGUMENTS) {
                    return Some(true);
                }
                may |= ARGUMENTS.starts_with(rest);
            }
            may |= name.starts_with(text);
        }
        (!may).then_some(false)
    }

    /// Gives words out up to a mark, or to what may be the beginning of one.
    fn words(&mut self, mut text: String) -> String {
        if let Some(at) = marks::find(&text, MARKS) {
            self.state = State::Held(text.split_off(at));
            return text;
        }
        self.state = State::Words(text.split_off(marks::may_begin(&text, MARKS)));
        text
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.tools.iter().map(|tool| tool.name.as_str())
    }

    /// All of `text` as calls, or `None` if any of it is something else.
    fn read(&self, text: &str) -> Option<Vec<Call>> {
        let mut calls = Vec::new();
        let mut rest = text.trim();
        let opens = |rest: &str, mark: &str| mark != FUNCTION && rest.starts_with(mark);
        while let Some(mark) = MARKS.iter().find(|mark| opens(rest, mark)) {
            rest = rest.strip_prefix(mark)?.trim_start();
        }
        while !rest.is_empty() {
            let named = self.names().filter(|name| rest.starts_with(*name));
            // The longest: one name may begin another.
            if rest.starts_with(FUNCTION) {
                let ((name, parameters), after) = call_forms::between_tags(rest)?;
                calls.push(self.between_tags(name, parameters)?);
                rest = after.trim_start();
            } else if let Some(name) = named.max_by_key(|name| name.len()) {
                let after = rest.strip_prefix(name)?.trim_start();
                let after = after.strip_prefix(ARGUMENTS).unwrap_or(after);
                let (value, after) = value(after)?;
                let Value::Object(arguments) = value else { return None };
                calls.push(Call {
                    name: name.to_owned(),
                    arguments,
                });
                rest = after.trim_start();
            } else if let Some((found, after)) = call_forms::of_python(rest, |name| self.knows(name)) {
                calls.extend(found.into_iter().map(|(name, arguments)| Call { name, arguments }));
                rest = after.trim_start();
            } else {
                let (value, after) = value(rest)?;
                match value {
                    Value::Array(items) => {
                        for item in items {
                            calls.push(self.call(item)?);
                        }
                    }
                    item => calls.push(self.call(item)?),
                }
                rest = after.trim_start();
            }
            while let Some(mark) = BETWEEN.iter().find(|mark| rest.starts_with(**mark)) {
                rest = rest.strip_prefix(mark)?.trim_start();
            }
        }
        (!calls.is_empty()).then_some(calls)
    }

    fn knows(&self, name: &str) -> bool {
        self.names().any(|known| known == name)
    }

    /// A call whose parameters are texts, read as what the tool takes.
    fn between_tags(&self, name: &str, parameters: Vec<(&str, &str)>) -> Option<Call> {
        let tool = self.tools.iter().find(|tool| tool.name == name)?;
        let mut arguments = Map::new();
        for (key, text) in parameters {
            let value = match tool.texts.iter().any(|known| known == key) {
                true => Value::from(text),
                false => call_forms::of_text(text),
            };
            if arguments.insert(key.to_owned(), value).is_some() {
                return None;
            }
        }
        Some(Call {
            name: name.to_owned(),
            arguments,
        })
    }

    fn call(&self, item: Value) -> Option<Call> {
        let Value::Object(mut item) = item else { return None };
        let name = item.get("name").and_then(Value::as_str);
        if let Some(name) = name.filter(|name| self.knows(name)) {
            let name = name.to_owned();
            let arguments = match item.remove("arguments").or_else(|| item.remove("parameters")) {
                None | Some(Value::Null) => Map::new(),
                Some(Value::Object(arguments)) => arguments,
                Some(Value::String(text)) => serde_json::from_str(&text).ok()?,
                Some(_) => return None,
            };
            return Some(Call { name, arguments });
        }
        let mut fields = item.into_iter();
        match (fields.next(), fields.next()) {
            (Some((name, Value::Object(arguments))), None) if self.knows(&name) => Some(Call { name, arguments }),
            _ => None,
        }
    }
}

/// A JSON value at the beginning of `text`, and what follows it.
fn value(text: &str) -> Option<(Value, &str)> {
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<Value>();
    let value = values.next()?.ok()?;
    Some((value, text.get(values.byte_offset()..)?))
}

/// What a model writes, in pieces of so many letters as the first byte says; as fuzz targets see it.
pub(crate) fn untrusted(bytes: &[u8]) {
    let Some((size, text)) = bytes.split_first() else {
        return;
    };
    let Ok(text) = std::str::from_utf8(text) else { return };
    let offered = |name: &str| Offered {
        name: name.to_owned(),
        texts: vec!["town".to_owned()],
    };
    let mut calls = Calls::of(vec![offered("tide"), offered("tide_table")]);
    let letters: Vec<char> = text.chars().collect();
    let mut words = String::new();
    for piece in letters.chunks(usize::from(*size).max(1)) {
        words.push_str(&calls.push(&piece.iter().collect::<String>()));
    }
    let (rest, found) = calls.finish();
    words.push_str(&rest);
    assert!(text.starts_with(&words), "words are given out once, and in order");
    assert!(
        !found.is_empty() || words == text,
        "nothing is lost unless it became a call"
    );
    for call in found {
        assert!(calls.knows(&call.name), "only what was offered is called");
        let _ = call.value();
    }
}

/// Where its fuzzing begins.
pub(crate) fn honest() -> Vec<Vec<u8>> {
    let answers = [
        "Let me see.\n<tool_call>\n{\"name\": \"tide\", \"arguments\": {\"town\": \"Delfzijl\"}}\n</tool_call>",
        "[TOOL_CALLS] [{\"name\": \"tide\", \"arguments\": {}}]",
        "[TOOL_CALLS]tide[ARGS]{\"town\": \"Delfzijl\"}[TOOL_CALLS]tide_table[ARGS]{}",
        "{\"name\": \"tide\", \"parameters\": {}}; {\"name\": \"tide_table\"}",
        "<|tools_prefix|>[{\"tide\": {\"town\": \"Delfzijl\"}}]<|tools_suffix|>",
        "{\"name\": \"tide\", \"arguments\": \"{\\\"town\\\": 1}\"}",
        "<tool_call>\n<function=tide>\n<parameter=town>\nDelfzijl\n</parameter>\n</function>\n</tool_call>",
        "[tide(town='Delfzijl', days=[1, 2]), tide_table()]",
    ];
    answers
        .iter()
        .map(|answer| [&[3], answer.as_bytes()].concat())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn calls() -> Calls {
        let offered = |name: &str| Offered {
            name: name.to_owned(),
            texts: vec!["town".to_owned()],
        };
        Calls::of(vec![offered("tide"), offered("tide_table")])
    }

    fn call(name: &str, arguments: Value) -> Call {
        let Value::Object(arguments) = arguments else {
            panic!("an object")
        };
        Call {
            name: name.to_owned(),
            arguments,
        }
    }

    /// What comes of an answer in pieces of `size` letters.
    fn of(answer: &str, size: usize) -> (String, Vec<Call>) {
        let mut calls = calls();
        let letters: Vec<char> = answer.chars().collect();
        let mut text = String::new();
        for piece in letters.chunks(size) {
            text.push_str(&calls.push(&piece.iter().collect::<String>()));
        }
        let (rest, found) = calls.finish();
        (text + &rest, found)
    }

    #[test]
    fn every_familys_form_is_read() {
        let delfzijl = || call("tide", json!({ "town": "Delfzijl" }));
        for (answer, words, expected) in [
            (
                "Let me see.\n<tool_call>\n{\"name\": \"tide\", \"arguments\": {\"town\": \"Delfzijl\"}}\n</tool_call>",
                "Let me see.\n",
                vec![delfzijl()],
            ),
            (
                "<tool_call>{\"name\":\"tide\",\"arguments\":{\"town\":\"Delfzijl\"}}</tool_call>\n\
                 <tool_call>{\"name\":\"tide_table\",\"arguments\":{}}</tool_call>",
                "",
                vec![delfzijl(), call("tide_table", json!({}))],
            ),
            (
                "[TOOL_CALLS] [{\"name\": \"tide\", \"arguments\": {\"town\": \"Delfzijl\"}}]",
                "",
                vec![delfzijl()],
            ),
            (
                " [{\"name\": \"tide\", \"arguments\": {\"town\": \"Delfzijl\"}}]",
                "",
                vec![delfzijl()],
            ),
            ("tide{\"town\": \"Delfzijl\"}", "", vec![delfzijl()]),
            (
                "[TOOL_CALLS]tide[ARGS]{\"town\": \"Delfzijl\"}[TOOL_CALLS]tide_table[ARGS]{}",
                "",
                vec![delfzijl(), call("tide_table", json!({}))],
            ),
            (
                "{\"name\": \"tide\", \"parameters\": {\"town\": \"Delfzijl\"}}; {\"name\": \"tide_table\"}",
                "",
                vec![delfzijl(), call("tide_table", json!({}))],
            ),
            (
                "<|tools_prefix|>[{\"tide\": {\"town\": \"Delfzijl\"}}]<|tools_suffix|>",
                "",
                vec![delfzijl()],
            ),
            (
                "{\"name\": \"tide\", \"arguments\": \"{\\\"town\\\": \\\"Delfzijl\\\"}\"}",
                "",
                vec![delfzijl()],
            ),
            (
                "I look.\n<tool_call>\n<function=tide>\n<parameter=town>\n12\n</parameter>\n<parameter=days>\n3\n</parameter>\n\
                 </function>\n</tool_call>\n<tool_call>\n<function=tide_table>\n</function>\n</tool_call>",
                "I look.\n",
                vec![
                    call("tide", json!({ "town": "12", "days": 3 })),
                    call("tide_table", json!({})),
                ],
            ),
            (
                "Now.<function=tide>\n<parameter=town>Delfzijl</parameter></function>",
                "Now.",
                vec![delfzijl()],
            ),
            (
                "[tide(town='Delfzijl'), tide_table()]",
                "",
                vec![delfzijl(), call("tide_table", json!({}))],
            ),
            (
                "<|python_start|>[tide(town=\"Delfzijl\")]<|python_end|>",
                "",
                vec![delfzijl()],
            ),
        ] {
            for size in [1, 3, 1_000] {
                assert_eq!(of(answer, size), (words.to_owned(), expected.clone()), "{answer}");
            }
        }
    }

    #[test]
    fn what_calls_nothing_that_was_offered_stays_text() {
        for answer in [
            "",
            "High water is at two.",
            "tide tables are printed",
            "tid",
            "{\"name\": \"Delfzijl\", \"arguments\": {}}",
            "[1, 2]",
            "<tool_call>not JSON</tool_call>",
            "{\"name\": \"tide\", \"arguments\": 3}",
            "a < b and <tool",
            "{\"name\": \"tide\", \"arguments\": {}} is how one asks",
            "[tide(town='Delfzijl'), ebb()]",
            "[tide('Delfzijl')] is how one asks",
            "<function=ebb></function>",
            "<function=tide><parameter=town>a</parameter><parameter=town>b</parameter></function>",
            "a <function=tide> without an end",
        ] {
            for size in [1, 3, 1_000] {
                assert_eq!(of(answer, size), (answer.to_owned(), Vec::new()));
            }
        }
    }

    #[test]
    fn words_come_at_once() {
        let mut calls = calls();
        assert_eq!(calls.push("High"), "High");
        assert_eq!(calls.push(" water <"), " water ");
        assert_eq!(calls.push("b"), "<b");
    }

    proptest! {
        /// Whatever a model writes: nothing is lost unless it became a call.
        #[test]
        fn text_is_kept(answer in "(<tool_call>|\\[TOOL_CALLS\\]|<function=tide>|</function>|<parameter=town>|</parameter>|\\(|\\)|'|=|tide|\\[ARGS\\]|\\{|\\}|\\[|\\]|\"name\"|:|,|é| |;){0,24}", size in 1_usize..9) {
            let (text, found) = of(&answer, size);
            if found.is_empty() {
                prop_assert_eq!(text, answer);
            }
        }
    }
}
