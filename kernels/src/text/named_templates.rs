//! Models with several chat templates: one for conversations, one for conversations with tools. They become one text, so
//! that a model has one template wherever it goes.

/// A template that is `with_tools` where a question brings tools, else `default`.
///
/// Jinja takes the line break after a block's tag and the last one of a text away; an empty expression next to the tags
/// keeps what the templates begin and end with.
pub(crate) fn joined(default: &str, with_tools: &str) -> String {
    let inner = |template: &str| template.strip_suffix('\n').unwrap_or(template).to_owned();
    let (default, with_tools) = (inner(default), inner(with_tools));
    let nothing = "{{ '' }}";
    format!("{{% if tools %}}{nothing}{with_tools}{nothing}{{% else %}}{nothing}{default}{nothing}{{% endif %}}")
}

#[cfg(test)]
mod tests {
    use polder_protocol::work::Message;

    use super::super::ChatTemplate;
    use super::joined;

    const DEFAULT: &str = "\n{% macro said(m) %}{{ m.role }}={{ m.content }}{% endmacro %}\n\
                           {% for m in messages %}\n  {{ said(m) }}\n{% endfor %}\nend \n";
    const WITH_TOOLS: &str =
        "{% set n = 2 %}\n{{ tools | length * n }}:{% for m in messages %}{{ m.content }}{% endfor %}\n";

    #[test]
    fn each_conversation_gets_its_template() {
        let both = ChatTemplate::new(Some(&joined(DEFAULT, WITH_TOOLS)), "<s>", "</s>").unwrap();
        let messages = [Message::new("user", "high water?")];
        let tools = [r#"{"type": "function", "function": {"name": "tide"}}"#.to_owned()];
        for tools in [&[][..], &tools] {
            let alone = if tools.is_empty() { DEFAULT } else { WITH_TOOLS };
            let alone = ChatTemplate::new(Some(alone), "<s>", "</s>").unwrap();
            let expected = alone.render(&messages, tools).unwrap();
            assert_eq!(both.render(&messages, tools).unwrap(), expected);
        }
        assert!(ChatTemplate::new(Some(&joined("{% endif %}", "x")), "", "").is_err());
    }
}
