//! How likely tokens were, in OpenAI's two shapes: that of chats and that of plain completions.

use serde_json::{Map, Value, json};

use crate::serve::Named;

/// Tokens with their alternatives, in order.
#[derive(Debug, Default)]
pub(super) struct Tokens(Vec<(Named, Vec<Named>)>);

impl Tokens {
    /// A single token.
    pub(super) fn one(chosen: Named, alternatives: Vec<Named>) -> Self {
        Self(vec![(chosen, alternatives)])
    }

    pub(super) fn push(&mut self, chosen: Named, alternatives: Vec<Named>) {
        self.0.push((chosen, alternatives));
    }

    /// `{"content": [{"token", "logprob", "bytes", "top_logprobs"}]}`.
    pub(super) fn of_chat(&self) -> Value {
        let content: Vec<Value> = self
            .0
            .iter()
            .map(|(chosen, alternatives)| {
                let mut token = likely(chosen);
                token.insert(
                    "top_logprobs".to_owned(),
                    alternatives.iter().map(likely).map(Value::Object).collect(),
                );
                Value::Object(token)
            })
            .collect();
        json!({ "content": content })
    }

    /// `{"tokens", "token_logprobs", "top_logprobs"}`, one element for each token.
    pub(super) fn of_text(&self) -> Value {
        let chosen = || self.0.iter().map(|(chosen, _)| chosen);
        let tokens: Vec<&str> = chosen().map(|named| named.text.as_str()).collect();
        let log_probabilities: Vec<f32> = chosen().map(|named| named.log_probability).collect();
        let alternatives: Vec<Map<String, Value>> = self
            .0
            .iter()
            .map(|(_, alternatives)| {
                alternatives
                    .iter()
                    .map(|named| (named.text.clone(), json!(named.log_probability)))
                    .collect()
            })
            .collect();
        json!({ "tokens": tokens, "token_logprobs": log_probabilities, "top_logprobs": alternatives })
    }
}

fn likely(named: &Named) -> Map<String, Value> {
    // A token that is a part of a letter has no text of its own, and so no bytes that could be told.
    let bytes = (!named.text.contains(char::REPLACEMENT_CHARACTER)).then_some(named.text.as_bytes());
    let mut map = Map::new();
    map.insert("token".to_owned(), named.text.clone().into());
    map.insert("logprob".to_owned(), json!(named.log_probability));
    map.insert("bytes".to_owned(), json!(bytes));
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_shapes_name_every_token() {
        let named = |text: &str, log_probability| Named {
            token: 1,
            log_probability,
            text: text.to_owned(),
        };
        let mut tokens = Tokens::one(named("Leid", -0.5), vec![named("Leid", -0.5), named("De", -1.0)]);
        tokens.push(named("\u{fffd}", -0.25), Vec::new());
        let chat = tokens.of_chat();
        assert_eq!(chat["content"][0]["top_logprobs"][1]["token"], "De");
        assert_eq!(chat["content"][0]["bytes"], json!([76, 101, 105, 100]));
        assert_eq!(chat["content"][1]["bytes"], Value::Null);
        let text = tokens.of_text();
        assert_eq!(text["token_logprobs"], json!([-0.5, -0.25]));
        assert_eq!(text["top_logprobs"][0]["De"], json!(-1.0));
    }
}
