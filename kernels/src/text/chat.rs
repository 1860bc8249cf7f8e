//! Conversations to prompts, by the model's own Jinja template.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, Value, context};
use polder_protocol::work::{Message, ToolCall};
use serde_json::Value as Json;

use super::{TextError, template_methods, tool_words};

/// Instructions that a template may take: hundreds of messages in the longest templates known take a tenth.
const FUEL: u64 = 2_000_000;
/// Bytes of a prompt: more than the longest context of any model in the longest tokens.
const PROMPT_BYTES_MAX: usize = 16 << 20;
const NAME: &str = "chat";

/// What a model without a template is asked with.
const FALLBACK: &str = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}\
    {% if add_generation_prompt %}assistant:{% endif %}";

/// A compiled template.
///
/// Templates come from strangers: they run in a language without access to anything, for a bounded number of
/// instructions.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    begin_text: String,
    end_text: String,
    knows_tools: bool,
}

impl ChatTemplate {
    /// Compiles a model's template, or the plain fallback (`role: content`) for a model without one. `begin_text` and
    /// `end_text` are the texts of the tokens that templates call `bos_token` and `eos_token`.
    ///
    /// # Errors
    ///
    /// [`TextError::Template`] with the place in the template.
    pub fn new(template: Option<&str>, begin_text: &str, end_text: &str) -> Result<Self, TextError> {
        let mut environment = Environment::new();
        // As transformers sets them.
        if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
            environment.set_syntax(syntax);
        }
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(template_methods::call);
        environment.add_filter("tojson", template_methods::to_json);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| strftime(&format, unix_seconds()));
        let source = template.unwrap_or(FALLBACK).to_owned();
        let knows_tools = tool_words::knows_tools(&source);
        environment
            .add_template_owned(NAME, source)
            .map_err(|error| TextError::Template {
                reason: describe(&error),
            })?;
        Ok(Self {
            environment,
            begin_text: begin_text.to_owned(),
            end_text: end_text.to_owned(),
            knows_tools,
        })
    }

    /// The prompt after which the assistant speaks. `tools` are JSON objects `{"type": "function", "function": {...}}`;
    /// for a template that knows none they are put into words. Encode it with [`super::Tokenizer::encode_bare`]: templates write
    /// special tokens out.
    ///
    /// # Errors
    ///
    /// [`TextError::Render`] with what the template says, such as that roles must alternate; [`TextError::Tool`].
    pub fn render(&self, messages: &[Message], tools: &[String]) -> Result<String, TextError> {
        let turns: Result<Vec<Value>, TextError> = if self.knows_tools {
            messages.iter().map(turn).collect()
        } else {
            tool_words::in_words(messages, tools).iter().map(turn).collect()
        };
        let turns = turns?;
        let tools = tools.iter().map(|tool| json(tool)).collect::<Result<Vec<_>, _>>()?;
        // As in transformers: none, and not undefined, where there are no tools.
        let tools = (!tools.is_empty()).then(|| Value::from(Serde(tools)));
        let refused = |error: Error| TextError::Render {
            reason: describe(&error),
        };
        let template = self.environment.get_template(NAME).map_err(refused)?;
        let prompt = template
            .render(context! {
                messages => turns,
                tools => tools,
                add_generation_prompt => true,
                bos_token => self.begin_text.as_str(),
                eos_token => self.end_text.as_str(),
            })
            .map_err(refused)?;
        if prompt.len() > PROMPT_BYTES_MAX {
            return Err(TextError::PromptTooLong {
                found: prompt.len(),
                limit: PROMPT_BYTES_MAX,
            });
        }
        Ok(prompt)
    }
}

/// A message as templates know it from transformers: fields that it does not have are not there.
fn turn(message: &Message) -> Result<Value, TextError> {
    let mut turn = vec![("role", Value::from(message.role.as_str()))];
    // Of an assistant that only called there is no content; templates ask so.
    let silent = message.content.is_empty() && !message.tool_calls.is_empty();
    let content = if silent {
        Value::from(())
    } else {
        Value::from(message.content.as_str())
    };
    turn.push(("content", content));
    if !message.tool_calls.is_empty() {
        let calls = message.tool_calls.iter().map(call).collect::<Result<Vec<_>, _>>()?;
        turn.push(("tool_calls", calls.into()));
    }
    turn.extend(
        message
            .tool_call_id
            .as_deref()
            .map(|id| ("tool_call_id", Value::from(id))),
    );
    turn.extend(message.name.as_deref().map(|name| ("name", Value::from(name))));
    Ok(Value::from_pairs(turn))
}

fn call(call: &ToolCall) -> Result<Value, TextError> {
    let arguments = Value::from(Serde(json(&call.arguments)?));
    let function = Value::from_pairs([("name", Value::from(call.name.as_str())), ("arguments", arguments)]);
    Ok(Value::from_pairs([
        ("id", Value::from(call.id.as_str())),
        ("type", Value::from("function")),
        ("function", function),
    ]))
}

fn json(text: &str) -> Result<Json, TextError> {
    serde_json::from_str(text).map_err(|error| TextError::Tool {
        reason: error.to_string(),
    })
}

fn describe(error: &Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{what} (line {line})"),
        None => what,
    }
}

fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// The parts of C's `strftime` that templates use, in UTC: `%d %m %Y %y %b %B %H %M %S`.
fn strftime(format: &str, unix_seconds: u64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let (year, month, day) = civil_date(unix_seconds / 86_400);
    let name = MONTHS.get(month as usize - 1).copied().unwrap_or_default();
    let mut text = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            text.push(letter);
            continue;
        }
        match letters.next() {
            Some('d') => text.push_str(&format!("{day:02}")),
            Some('m') => text.push_str(&format!("{month:02}")),
            Some('Y') => text.push_str(&year.to_string()),
            Some('y') => text.push_str(&format!("{:02}", year % 100)),
            Some('b') => text.extend(name.chars().take(3)),
            Some('B') => text.push_str(name),
            Some('H') => text.push_str(&format!("{:02}", unix_seconds / 3_600 % 24)),
            Some('M') => text.push_str(&format!("{:02}", unix_seconds / 60 % 60)),
            Some('S') => text.push_str(&format!("{:02}", unix_seconds % 60)),
            Some(other) => text.extend(['%', other]),
            None => text.push('%'),
        }
    }
    text
}

/// Year, month and day of a day since 1970, by counting years from the 1st of March, so that the leap day is the last.
fn civil_date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468; // Since the 1st of March of year 0.
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day_of_month = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + u64::from(month <= 2), month, day_of_month)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
        {{ '<|im_start|>system\\nBe kind<|im_end|>\\n' }}{% endif %}\
        {{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

    #[test]
    fn a_conversation_becomes_a_prompt() {
        let template = ChatTemplate::new(Some(CHATML), "", "<|im_end|>").unwrap();
        let prompt = template.render(&[Message::new("user", "Hi")], &[]).unwrap();
        assert_eq!(
            prompt,
            "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn a_model_without_a_template_is_asked_plainly() {
        let template = ChatTemplate::new(None, "", "").unwrap();
        let prompt = template
            .render(&[Message::new("user", "Hi"), Message::new("assistant", "Hello")], &[])
            .unwrap();
        assert_eq!(prompt, "user: Hi\nassistant: Hello\nassistant:");
    }

    #[test]
    fn a_template_may_refuse() {
        let source = "{% if messages|length > 1 %}{{ raise_exception('one message at most') }}{% endif %}ok";
        let template = ChatTemplate::new(Some(source), "", "").unwrap();
        assert_eq!(template.render(&[Message::new("user", "Hi")], &[]).unwrap(), "ok");
        let refused = template.render(&[Message::new("user", "Hi"), Message::new("user", "Hi")], &[]);
        assert!(matches!(refused, Err(TextError::Render { reason }) if reason.contains("one message at most")));
    }

    #[test]
    fn a_template_that_does_not_end_is_stopped() {
        let source = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
        let template = ChatTemplate::new(Some(source), "", "").unwrap();
        assert!(matches!(template.render(&[], &[]), Err(TextError::Render { .. })));
        assert!(matches!(
            ChatTemplate::new(Some("{% for %}"), "", ""),
            Err(TextError::Template { .. })
        ));
    }

    #[test]
    fn methods_of_python_work() {
        let source = "{{ messages[0].content.strip().upper() }}|{{ messages[0].content.split('b')[1].lstrip() }}|\
            {% if messages[0].role.startswith('us') %}yes{% endif %}|{% for k, v in messages[0].items() %}{{ k }};{% endfor %}|\
            {{ messages[0].get('tool', 'none') }}|{{ messages[0]|tojson }}|{{ messages[0].content.replace('a', 'c') }}";
        let template = ChatTemplate::new(Some(source), "", "").unwrap();
        let prompt = template.render(&[Message::new("user", " a b \"")], &[]).unwrap();
        let expected = " A B \"".trim().to_owned()
            + "|\"|yes|role;content;|none|{\"role\": \"user\", \"content\": \" a b \\\"\"}| c b \"";
        assert_eq!(prompt, expected);
    }

    #[test]
    fn dates_are_right_around_leap_days() {
        assert_eq!(strftime("%d %b %Y", 0), "01 Jan 1970");
        assert_eq!(strftime("%Y-%m-%d %H:%M:%S", 1_709_210_096), "2024-02-29 12:34:56");
        assert_eq!(strftime("%d %B %y %%", 1_709_251_200), "01 March 24 %%");
    }

    /// As in the templates of Qwen, Hermes and SmolLM3: tools before the question, calls and answers in tags.
    #[test]
    fn tools_calls_and_their_answers_are_written_by_the_template() {
        let source = "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools>{% endif %}\
            {% for message in messages %}<{{ message.role }}>{% if message.content %}{{ message.content }}{% endif %}\
            {% if message.tool_calls %}{% for call in message.tool_calls %}{% set call = call.function %}\
            <tool_call>{\"name\": \"{{ call.name }}\", \"arguments\": {{ call.arguments | tojson }}}</tool_call>\
            {% endfor %}{% endif %}{% if message.tool_call_id is defined %} of {{ message.tool_call_id }}{% endif %}{% endfor %}\
            {% if tools is none %}no tools{% endif %}";
        let template = ChatTemplate::new(Some(source), "", "").unwrap();
        let tool = r#"{"type": "function", "function": {"name": "tide", "description": "High water", "parameters":
            {"type": "object", "properties": {"town": {"type": "string"}, "day": {"type": "integer"}}}}}"#
            .to_owned();
        let mut called = Message::new("assistant", "");
        called.tool_calls.push(ToolCall {
            id: "call_1".to_owned(),
            name: "tide".to_owned(),
            arguments: r#"{"town": "Delfzijl", "day": 3}"#.to_owned(),
        });
        let mut answer = Message::new("tool", "14:05");
        answer.tool_call_id = Some("call_1".to_owned());
        let prompt = template
            .render(&[Message::new("user", "When?"), called, answer], &[tool])
            .unwrap();
        assert_eq!(
            prompt,
            "<tools>{\"type\": \"function\", \"function\": {\"name\": \"tide\", \"description\": \"High water\", \
             \"parameters\": {\"type\": \"object\", \"properties\": {\"town\": {\"type\": \"string\"}, \"day\": {\"type\": \
             \"integer\"}}}}}\n</tools><user>When?<assistant><tool_call>{\"name\": \"tide\", \"arguments\": {\"town\": \
             \"Delfzijl\", \"day\": 3}}</tool_call><tool>14:05 of call_1"
        );
        let prompt = template.render(&[Message::new("user", "When?")], &[]).unwrap();
        assert_eq!(prompt, "<user>When?no tools");
    }

    #[test]
    fn a_template_without_tools_is_told_of_them_in_words() {
        let template = ChatTemplate::new(Some(CHATML), "", "").unwrap();
        let mut called = Message::new("assistant", "");
        called.tool_calls.push(ToolCall {
            id: "1".to_owned(),
            name: "tide".to_owned(),
            arguments: r#"{"town":"Delfzijl"}"#.to_owned(),
        });
        let turns = [Message::new("user", "When?"), called, Message::new("tool", "14:05")];
        let tool = r#"{"type": "function", "function": {"name": "tide"}}"#.to_owned();
        let prompt = template.render(&turns, std::slice::from_ref(&tool)).unwrap();
        assert!(
            prompt.starts_with("<|im_start|>system\nYou can call these tools"),
            "{prompt}"
        );
        assert!(prompt.contains(&format!("<tools>\n{tool}\n</tools>")), "{prompt}");
        let rest = "<|im_start|>user\nWhen?<|im_end|>\n<|im_start|>assistant\n<tool_call>{\"name\":\"tide\",\"arguments\":\
                    {\"town\":\"Delfzijl\"}}</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>14:05</tool_response>\
                    <|im_end|>\n<|im_start|>assistant\n";
        assert!(prompt.ends_with(rest), "{prompt}");
    }
}
