//! Tools in plain words, for models whose template knows none: what may be called is told in the system message, calls and
//! answers stand between tags, as in the template of Hermes.

use polder_protocol::work::Message;

/// Whether a template writes tools out by itself.
pub(super) fn knows_tools(template: &str) -> bool {
    template.contains("tools") || template.contains("tool_calls")
}

/// The conversation with tools in words. Roles are those that every template takes.
pub(super) fn in_words(messages: &[Message], tools: &[String]) -> Vec<Message> {
    let mut spoken: Vec<Message> = messages.iter().map(spoken).collect();
    if tools.is_empty() {
        return spoken;
    }
    let system = instruction(tools);
    match spoken.first_mut().filter(|first| first.role == "system") {
        Some(first) => first.content = format!("{}\n\n{system}", first.content),
        None => spoken.insert(0, Message::new("system", &system)),
    }
    spoken
}

fn instruction(tools: &[String]) -> String {
    let mut text = "You can call these tools, each described by a JSON object:\n<tools>\n".to_owned();
    for tool in tools {
        text.push_str(&format!("{tool}\n"));
    }
    text.push_str(
        "</tools>\nTo call one, write its name and its arguments as a JSON object between tags, and nothing after it:\n\
         <tool_call>{\"name\": \"...\", \"arguments\": {...}}</tool_call>",
    );
    text
}

fn spoken(message: &Message) -> Message {
    if message.role == "tool" {
        let content = format!("<tool_response>{}</tool_response>", message.content);
        return Message::new("user", &content);
    }
    let mut content = message.content.clone();
    for call in &message.tool_calls {
        if !content.is_empty() {
            content.push('\n');
        }
        let (name, arguments) = (serde_json::Value::from(call.name.as_str()), &call.arguments);
        content.push_str(&format!(
            "<tool_call>{{\"name\":{name},\"arguments\":{arguments}}}</tool_call>"
        ));
    }
    Message::new(&message.role, &content)
}
