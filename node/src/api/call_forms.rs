//! The forms of calls that are not JSON: XML-like tags of Qwen 3 Coder and Nemotron 3, and lists of Python calls of
//! Llama 3.2 and 4. Both come from whatever a model wrote: nothing here nests deeper than [`DEPTH_MAX`] or reads a letter
//! more than a few times.

use serde_json::{Map, Number, Value};

/// Begins a call between tags.
pub(super) const FUNCTION: &str = "<function=";
const FUNCTION_END: &str = "</function>";
const PARAMETER: &str = "<parameter=";
const PARAMETER_END: &str = "</parameter>";

/// As deep as lists and objects may stand in each other.
const DEPTH_MAX: usize = 64;

/// A call, and what follows it.
pub(super) type Read<'t, T> = Option<(T, &'t str)>;

/// A function's name and its parameters as texts, in order: `<function=name><parameter=key>value</parameter></function>`.
pub(super) fn between_tags(text: &str) -> Read<'_, (&str, Vec<(&str, &str)>)> {
    let (name, mut rest) = text.strip_prefix(FUNCTION)?.split_once('>')?;
    let mut parameters = Vec::new();
    loop {
        rest = rest.trim_start();
        if let Some(after) = rest.strip_prefix(FUNCTION_END) {
            return Some(((name.trim(), parameters), after));
        }
        let (key, value) = rest.strip_prefix(PARAMETER)?.split_once('>')?;
        let (value, after) = value_of_parameter(value)?;
        parameters.push((key.trim(), value));
        rest = after;
    }
}

/// Up to the closing tag after which a parameter or the function's end comes: a value may speak of closing tags. The
/// line breaks next to the tags are not of the value.
fn value_of_parameter(text: &str) -> Read<'_, &str> {
    let mut ends = text.match_indices(PARAMETER_END);
    let (at, after) = ends.find_map(|(at, tag)| {
        let after = text.get(at + tag.len()..)?;
        let next = after.trim_start();
        (next.starts_with(PARAMETER) || next.starts_with(FUNCTION_END)).then_some((at, after))
    })?;
    let value = text.get(..at)?;
    let value = value.strip_prefix('\n').unwrap_or(value);
    Some((value.strip_suffix('\n').unwrap_or(value), after))
}

/// A value that a tag holds as a text, where the tool takes anything but a text.
pub(super) fn of_text(text: &str) -> Value {
    let trimmed = text.trim();
    match trimmed {
        "True" => return Value::Bool(true),
        "False" => return Value::Bool(false),
        "None" => return Value::Null,
        _ => {}
    }
    serde_json::from_str(trimmed).unwrap_or_else(|_| Value::String(text.to_owned()))
}

/// The calls of a list `[name(key=value, ...), ...]`, of functions that `known` knows.
pub(super) fn of_python<'t>(
    text: &'t str,
    known: impl Fn(&str) -> bool,
) -> Read<'t, Vec<(String, Map<String, Value>)>> {
    let mut python = Python { rest: text };
    python.take('[')?;
    let mut calls = Vec::new();
    while !python.next_is(']') {
        if !calls.is_empty() {
            python.take(',')?;
            if python.next_is(']') {
                break;
            }
        }
        let (name, after) = python.rest.trim_start().split_once('(')?;
        let name = name.trim_end();
        if !known(name) {
            return None;
        }
        python.rest = after;
        calls.push((name.to_owned(), python.arguments()?));
    }
    python.take(']')?;
    Some((calls, python.rest))
}

/// A cursor over Python's literals.
struct Python<'t> {
    rest: &'t str,
}

impl<'t> Python<'t> {
    fn next_is(&self, letter: char) -> bool {
        self.rest.trim_start().starts_with(letter)
    }

    fn take(&mut self, letter: char) -> Option<()> {
        self.rest = self.rest.trim_start().strip_prefix(letter)?;
        Some(())
    }

    /// Up to the closing parenthesis.
    fn arguments(&mut self) -> Option<Map<String, Value>> {
        let mut arguments = Map::new();
        while !self.next_is(')') {
            if !arguments.is_empty() {
                self.take(',')?;
                if self.next_is(')') {
                    break;
                }
            }
            let (key, after) = self.rest.split_once('=')?;
            let key = key.trim();
            let letters = |letter: char| letter.is_alphanumeric() || letter == '_';
            if key.is_empty() || !key.chars().all(letters) {
                return None;
            }
            self.rest = after;
            let value = self.value(0)?;
            // Which of two is meant, nobody can tell.
            if arguments.insert(key.to_owned(), value).is_some() {
                return None;
            }
        }
        self.take(')')?;
        Some(arguments)
    }

    fn value(&mut self, depth: usize) -> Option<Value> {
        if depth > DEPTH_MAX {
            return None;
        }
        self.rest = self.rest.trim_start();
        match self.rest.chars().next()? {
            quote @ ('"' | '\'') => self.text(quote).map(Value::String),
            '[' => self.list(depth),
            '{' => self.object(depth),
            _ => self.word(),
        }
    }

    fn list(&mut self, depth: usize) -> Option<Value> {
        self.take('[')?;
        let mut items = Vec::new();
        while !self.next_is(']') {
            if !items.is_empty() {
                self.take(',')?;
                if self.next_is(']') {
                    break;
                }
            }
            items.push(self.value(depth + 1)?);
        }
        self.take(']')?;
        Some(Value::Array(items))
    }

    fn object(&mut self, depth: usize) -> Option<Value> {
        self.take('{')?;
        let mut fields = Map::new();
        while !self.next_is('}') {
            if !fields.is_empty() {
                self.take(',')?;
                if self.next_is('}') {
                    break;
                }
            }
            let Value::String(key) = self.value(depth + 1)? else {
                return None;
            };
            self.take(':')?;
            if fields.insert(key, self.value(depth + 1)?).is_some() {
                return None;
            }
        }
        self.take('}')?;
        Some(Value::Object(fields))
    }

    /// A number or a constant, in JSON's spelling too.
    fn word(&mut self) -> Option<Value> {
        let letters = |letter: char| letter.is_ascii_alphanumeric() || "+-._".contains(letter);
        let end = self.rest.find(|letter| !letters(letter)).unwrap_or(self.rest.len());
        let (word, after) = self.rest.split_at_checked(end)?;
        let value = match word {
            "True" | "true" => Value::Bool(true),
            "False" | "false" => Value::Bool(false),
            "None" | "null" => Value::Null,
            _ => Value::Number(number(word)?),
        };
        self.rest = after;
        Some(value)
    }

    fn text(&mut self, quote: char) -> Option<String> {
        let mut letters = self.rest.strip_prefix(quote)?.chars();
        let mut text = String::new();
        loop {
            let letter = match letters.next()? {
                letter if letter == quote => break,
                '\n' => return None,
                '\\' => match letters.next()? {
                    'n' => '\n',
                    't' => '\t',
                    'r' => '\r',
                    'x' => code(&mut letters, 2)?,
                    'u' => code(&mut letters, 4)?,
                    'U' => code(&mut letters, 8)?,
                    same @ ('\\' | '\'' | '"') => same,
                    // Python keeps the backslash of what it does not know; octal digits it does know.
                    digit if digit.is_ascii_digit() => return None,
                    other => {
                        text.push('\\');
                        other
                    }
                },
                letter => letter,
            };
            text.push(letter);
        }
        self.rest = letters.as_str();
        Some(text)
    }
}

/// A letter from so many hexadecimal digits.
fn code(letters: &mut std::str::Chars<'_>, digits: usize) -> Option<char> {
    let mut value = 0u32;
    for _ in 0..digits {
        value = value.checked_mul(16)? + letters.next()?.to_digit(16)?;
    }
    char::from_u32(value)
}

/// A number that JSON can hold without loss; anything else is no number.
fn number(word: &str) -> Option<Number> {
    let digits = word.strip_prefix(['-', '+']).unwrap_or(word);
    if !digits.starts_with(|letter: char| letter.is_ascii_digit() || letter == '.') {
        return None;
    }
    if digits.bytes().all(|byte| byte.is_ascii_digit()) {
        let signed = word.strip_prefix('+').unwrap_or(word);
        let whole = signed.parse::<i64>().map(Number::from);
        return whole.or_else(|_| signed.parse::<u64>().map(Number::from)).ok();
    }
    Number::from_f64(word.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn python(text: &str) -> Option<Value> {
        let (calls, rest) = of_python(text, |name| name == "tide")?;
        let calls = calls.into_iter().map(|(_, arguments)| Value::Object(arguments));
        rest.is_empty().then(|| calls.collect())
    }

    #[test]
    fn literals_of_python_are_read() {
        for (text, expected) in [
            ("[tide()]", json!([{}])),
            (
                "[tide(town='Delfzijl'), tide(town = \"Ems\",)]",
                json!([{"town": "Delfzijl"}, {"town": "Ems"}]),
            ),
            (
                "[tide(a=-3, b=2.5e3, c=True, d=None, e=[1, 'x', [],], f={'k': {\"l\": False}})]",
                json!([{"a": -3, "b": 2500.0, "c": true, "d": null, "e": [1, "x", []], "f": {"k": {"l": false}}}]),
            ),
            (
                r#"[tide(a='it\'s \u00e9 \x41 \n \d', b="(])')]")]"#,
                json!([{"a": "it's é A \n \\d", "b": "(])')]"}]),
            ),
            ("[tide(a=18446744073709551615)]", json!([{"a": u64::MAX}])),
        ] {
            assert_eq!(python(text), Some(expected), "{text}");
        }
    }

    #[test]
    fn what_python_would_not_read_alike_is_no_call() {
        let deep = format!("[tide(a={}{})]", "[".repeat(100_000), "]".repeat(100_000));
        for text in [
            "[tide('Delfzijl')]",
            "[tide(a=1, a=2)]",
            "[tide(a={'k': 1, 'k': 2})]",
            "[tide(a=town)]",
            "[tide(a=1 b=2)]",
            "[tide(a=99999999999999999999)]",
            "[tide(a=1e999)]",
            "[tide(a='\\777')]",
            "[tide(a='\\ud800')]",
            "[tide(a='open)]",
            "[tide(a=inf)]",
            "[tide(a={1: 2})]",
            "[ebb(a=1)]",
            "[tide(a=1)",
            "[tide]",
            "[,]",
            &deep,
        ] {
            assert_eq!(python(text), None, "{}", text.get(..60).unwrap_or(text));
        }
    }

    #[test]
    fn tags_hold_texts() {
        let text = "<function=tide>\n<parameter=town>\nDelfzijl\n</parameter>\n<parameter=note>\na </parameter> b\n\n</parameter>\n</function>\n</tool_call>";
        let ((name, parameters), rest) = between_tags(text).unwrap();
        assert_eq!(name, "tide");
        assert_eq!(parameters, [("town", "Delfzijl"), ("note", "a </parameter> b\n")]);
        assert_eq!(rest, "\n</tool_call>");
        for text in [
            "<function=tide",
            "<function=tide><parameter=a>1</function>",
            "<function=tide>words</function>",
        ] {
            assert_eq!(between_tags(text), None, "{text}");
        }
        assert_eq!(of_text(" 3 "), json!(3));
        assert_eq!(of_text("True"), json!(true));
        assert_eq!(of_text("[1, \"a\"]"), json!([1, "a"]));
        assert_eq!(of_text("a [1"), json!("a [1"));
    }

    /// As Python prints a value.
    fn printed(value: &Value) -> String {
        match value {
            Value::Null => "None".to_owned(),
            Value::Bool(true) => "True".to_owned(),
            Value::Bool(false) => "False".to_owned(),
            Value::Array(items) => format!("[{}]", items.iter().map(printed).collect::<Vec<_>>().join(", ")),
            Value::Object(fields) => {
                let fields = fields
                    .iter()
                    .map(|(key, value)| format!("{}: {}", quoted(key), printed(value)));
                format!("{{{}}}", fields.collect::<Vec<_>>().join(", "))
            }
            Value::String(text) => quoted(text),
            number => number.to_string(),
        }
    }

    fn quoted(text: &str) -> String {
        let escaped = text.replace('\\', "\\\\").replace('\'', "\\'").replace('\n', "\\n");
        format!("'{escaped}'")
    }

    fn values() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            (-1e300..1e300f64).prop_map(Value::from),
            ".{0,8}".prop_map(Value::from),
            "[()\\[\\]{}'\",=\\\\]{0,6}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-z']{1,4}", inner, 0..4)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_python_prints_is_read(arguments in prop::collection::btree_map("[a-z_]{1,6}", values(), 0..4)) {
            let list: Vec<_> = arguments.iter().map(|(key, value)| format!("{key}={}", printed(value))).collect();
            let text = format!("[tide({})]", list.join(", "));
            let arguments: Map<String, Value> = arguments.into_iter().collect();
            prop_assert_eq!(python(&text), Some(json!([arguments])), "{}", text);
        }

        #[test]
        fn parameters_keep_their_texts(values in prop::collection::vec("[^<]{0,12}(</param)?", 0..4)) {
            let mut text = "<function=tide>\n".to_owned();
            for value in &values {
                text += &format!("<parameter=p>\n{value}\n</parameter>\n");
            }
            text += "</function>";
            let ((_, found), rest) = between_tags(&text).unwrap();
            prop_assert_eq!(found.into_iter().map(|(_, value)| value.to_owned()).collect::<Vec<_>>(), values);
            prop_assert_eq!(rest, "");
        }

        #[test]
        fn any_text_is_read_or_refused(text in "(\\[|\\]|\\(|\\)|\\{|\\}|tide|=|'|\"|\\\\|,|:|é|1|<function=|<parameter=|>|</parameter>|</function>|\n){0,40}") {
            let _ = of_python(&text, |_| true);
            let _ = between_tags(&text);
        }
    }
}
