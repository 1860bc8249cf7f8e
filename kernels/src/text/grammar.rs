//! Answers that keep to a JSON schema: which tokens may come next.
//!
//! The grammar and its masks are llguidance's; here is what a model's tokenizer means to it, and a state that follows
//! the tokens of an answer, forwards and back.

use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use polder_protocol::work::{GRAMMAR_BYTES_MAX, Grammar};
use serde_json::{Value, json};

use super::{TextError, Tokenizer};

/// Tokens longer than this are never allowed: the tree of tokens is no deeper.
const TOKEN_BYTES_MAX: usize = 1_000;
/// Nodes of the tree of tokens, at most one for each byte: four times what the largest vocabularies take.
const TREE_BYTES_MAX: usize = 1 << 22;
/// Ids of tokens are kept in 24 bits there.
const VOCABULARY_MAX: usize = 1 << 23;

/// A model's tokens as grammars see them.
pub struct GrammarTokens {
    factory: ParserFactory,
}

impl std::fmt::Debug for GrammarTokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let tokens = self.factory.tok_env().tok_trie().vocab_size();
        write!(f, "GrammarTokens({tokens} tokens)")
    }
}

impl GrammarTokens {
    /// Reads a tokenizer's vocabulary. `end_tokens` are those that end an answer; they may come when it is whole.
    ///
    /// # Errors
    ///
    /// [`TextError::Grammar`] for a model without a known end token, or with a vocabulary beyond all that are known.
    pub fn new(tokenizer: &Tokenizer, end_tokens: &[u32]) -> Result<Self, TextError> {
        let refused = |reason: &str| TextError::Grammar {
            reason: reason.to_owned(),
        };
        let bytes = tokenizer.token_bytes();
        let size = u32::try_from(bytes.len())
            .ok()
            .filter(|_| bytes.len() <= VOCABULARY_MAX);
        let size = size.ok_or_else(|| refused("the vocabulary is too large"))?;
        let ends: Vec<u32> = end_tokens.iter().copied().filter(|token| *token < size).collect();
        let first = *ends
            .first()
            .ok_or_else(|| refused("the model has no token that ends an answer"))?;
        // A token without bytes is in no answer.
        let words: Vec<Vec<u8>> = bytes
            .into_iter()
            .map(|bytes| bytes.filter(|bytes| bytes.len() <= TOKEN_BYTES_MAX).unwrap_or_default())
            .collect();
        if words.iter().map(Vec::len).sum::<usize>() > TREE_BYTES_MAX {
            return Err(refused("the vocabulary's tokens are too long"));
        }
        let tree = TokTrie::from(&TokRxInfo::new(size, first), &words).with_eos_tokens(&ends);
        let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(tree));
        let mut factory = ParserFactory::new_simple(&tokens).map_err(|error| refused(&error.to_string()))?;
        factory.quiet();
        Ok(Self { factory })
    }

    /// Begins an answer that keeps to `grammar`.
    ///
    /// # Errors
    ///
    /// [`TextError::Grammar`] says what is wrong with a schema, or what of it is not supported.
    pub fn begin(&self, grammar: &Grammar) -> Result<GrammarState, TextError> {
        let schema = match grammar {
            Grammar::JsonObject => json!({ "type": "object" }),
            Grammar::JsonSchema(text) => schema(text)?,
        };
        let parser = self.factory.create_parser(TopLevelGrammar::from_json_schema(schema));
        let matcher = Matcher::new(parser);
        match matcher.get_error() {
            Some(reason) => Err(TextError::Grammar {
                reason: first_line(&reason),
            }),
            None => Ok(GrammarState {
                matcher,
                taken: Vec::new(),
            }),
        }
    }
}

fn schema(text: &str) -> Result<Value, TextError> {
    if text.len() > GRAMMAR_BYTES_MAX {
        return Err(TextError::Grammar {
            reason: format!("it has {} bytes, at most {GRAMMAR_BYTES_MAX} are allowed", text.len()),
        });
    }
    serde_json::from_str(text).map_err(|error| TextError::Grammar {
        reason: error.to_string(),
    })
}

/// Further lines are the inner state of the parser, and of no use to whoever wrote the schema.
fn first_line(reason: &str) -> String {
    reason.lines().next().unwrap_or_default().to_owned()
}

/// Where an answer is in its grammar.
pub struct GrammarState {
    matcher: Matcher,
    /// The tokens of the answer that it has followed.
    taken: Vec<u32>,
}

impl std::fmt::Debug for GrammarState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GrammarState(after {} tokens)", self.taken.len())
    }
}

/// A set of token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenSet(Vec<u32>);

impl TokenSet {
    /// The set of these tokens.
    #[cfg(test)]
    pub(crate) fn of(tokens: &[usize]) -> Self {
        let mut words = vec![0; tokens.iter().max().map_or(0, |largest| largest / 32 + 1)];
        for token in tokens {
            words[token / 32] |= 1 << (token % 32);
        }
        Self(words)
    }

    /// Whether `token` is in it.
    pub fn contains(&self, token: usize) -> bool {
        let word = self.0.get(token / 32).copied().unwrap_or(0);
        word >> (token % 32) & 1 == 1
    }
}

impl GrammarState {
    /// The tokens that may follow `answer`, the tokens of the answer so far. Whatever was asked before, only what
    /// differs is read anew.
    ///
    /// # Errors
    ///
    /// [`TextError::Grammar`] where `answer` does not keep to the grammar, or the grammar is too much work.
    pub fn allowed(&mut self, answer: &[u32]) -> Result<TokenSet, TextError> {
        self.follow(answer).map_err(|error| TextError::Grammar {
            reason: first_line(&error),
        })
    }

    fn follow(&mut self, answer: &[u32]) -> Result<TokenSet, String> {
        let same = self
            .taken
            .iter()
            .zip(answer)
            .take_while(|(taken, token)| taken == token)
            .count();
        if same < self.taken.len() {
            // A lost stage was replaced, and the text goes on from earlier.
            self.matcher.reset().map_err(|error| error.to_string())?;
            self.taken.clear();
        }
        for token in answer.get(self.taken.len()..).unwrap_or_default() {
            self.matcher.consume_token(*token).map_err(|error| error.to_string())?;
            self.taken.push(*token);
        }
        let mask = self.matcher.compute_mask_or_eos().map_err(|error| error.to_string())?;
        Ok(TokenSet(mask.as_slice().to_vec()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::bytes;

    const END: u32 = 257;

    fn tokens() -> GrammarTokens {
        GrammarTokens::new(&Tokenizer::from_bytes(&bytes()).unwrap(), &[END]).unwrap()
    }

    fn ids(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    /// Whether every byte of `text` is allowed after those before it, and whether the end is then.
    fn keeps(state: &mut GrammarState, text: &str) -> (bool, bool) {
        let answer = ids(text);
        for (place, token) in answer.iter().enumerate() {
            if !state.allowed(&answer[..place]).unwrap().contains(*token as usize) {
                return (false, false);
            }
        }
        (true, state.allowed(&answer).unwrap().contains(END as usize))
    }

    #[test]
    fn an_answer_keeps_to_its_schema() {
        let schema = r##"{
            "type": "object", "additionalProperties": false, "required": ["stad", "inwoners"],
            "properties": { "stad": { "$ref": "#/$defs/naam" }, "inwoners": { "type": "integer" } },
            "$defs": { "naam": { "enum": ["Delft", "Gouda"] } }
        }"##;
        let tokens = tokens();
        let mut state = tokens.begin(&Grammar::JsonSchema(schema.to_owned())).unwrap();
        assert_eq!(
            keeps(&mut state, r#"{"stad": "Delft", "inwoners": 103000}"#),
            (true, true)
        );
        assert_eq!(keeps(&mut state, r#"{"stad": "Delft", "inwoners": 1"#), (true, false));
        assert!(!keeps(&mut state, r#"{"stad": "Leiden""#).0);
        assert!(!keeps(&mut state, r#"{"stad": "Gouda"}"#).0);
        assert!(!keeps(&mut state, "Een stad").0);
    }

    #[test]
    fn any_object_is_allowed_where_there_is_no_schema() {
        let tokens = tokens();
        let mut state = tokens.begin(&Grammar::JsonObject).unwrap();
        assert_eq!(keeps(&mut state, r#"{"é": [1, 2.5, null, {"a": true}]}"#), (true, true));
        assert!(!keeps(&mut state, "[1]").0);
    }

    #[test]
    fn what_is_no_schema_is_refused() {
        let tokens = tokens();
        for wrong in [
            "{".to_owned(),
            r#"{"type": "stad"}"#.to_owned(),
            r##"{"$ref": "https://example.org/schema"}"##.to_owned(),
            format!(r#"{{"const": "{}"}}"#, "a".repeat(GRAMMAR_BYTES_MAX)),
        ] {
            let refused = tokens.begin(&Grammar::JsonSchema(wrong.clone()));
            assert!(
                matches!(refused, Err(TextError::Grammar { .. })),
                "{}",
                &wrong[..20.min(wrong.len())]
            );
        }
        let mut state = tokens.begin(&Grammar::JsonObject).unwrap();
        assert!(state.allowed(&ids("no object")).is_err());
    }

    #[test]
    fn a_model_without_an_end_is_refused() {
        let tokenizer = Tokenizer::from_bytes(&bytes()).unwrap();
        assert!(GrammarTokens::new(&tokenizer, &[]).is_err());
        assert!(GrammarTokens::new(&tokenizer, &[9_999]).is_err());
    }
}
