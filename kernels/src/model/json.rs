//! Reading JSON as Python writes it.

use serde_json::Value;

/// Words that Python writes and JSON does not have. Longer ones first.
const WORDS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

/// Reads a text, in which infinities and what is no number stand for null: configurations have them as limits that limit
/// nothing.
///
/// # Errors
///
/// What serde says of anything else.
pub(crate) fn parse(text: &str) -> Result<Value, serde_json::Error> {
    match serde_json::from_str(text) {
        Ok(value) => Ok(value),
        Err(error) => serde_json::from_str(&without_words(text)).map_err(|_| error),
    }
}

fn without_words(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let (mut rest, mut quoted) = (text, false);
    while let Some(next) = rest.chars().next() {
        let word = WORDS.iter().find(|word| !quoted && rest.starts_with(**word));
        let taken = match (next, word) {
            (_, Some(word)) => {
                out.push_str("null");
                word.len()
            }
            ('\\', _) if quoted => {
                // What is escaped neither ends a text nor begins a word.
                let taken = 1 + rest.chars().nth(1).map_or(0, char::len_utf8);
                out.push_str(&rest[..taken]);
                taken
            }
            _ => {
                quoted ^= next == '"';
                out.push(next);
                next.len_utf8()
            }
        };
        rest = &rest[taken..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn infinities_outside_texts_are_null() {
        let value = parse(r#"{"a": [0.0, Infinity, -Infinity], "b": "Infinity \" NaN", "c": NaN}"#).unwrap();
        assert!(value["a"][1].is_null() && value["a"][2].is_null() && value["c"].is_null());
        assert_eq!(value["b"], "Infinity \" NaN");
        assert!(parse("{\"a\": Infinit}").is_err());
        assert!(parse("\\").is_err());
    }
}
