//! Tokenizers and chat templates, on a thread of their own.

use std::collections::BTreeMap;
use std::fs;

use polder_kernels::text::{ChatTemplate, GrammarTokens, Tokenizer};
use polder_protocol::work::{Answer, Grammar, Prompt, Task, TextId};

use crate::host::Engine;

/// Tokenizers that are kept at once. One per epoch in use; the oldest goes first.
const TEXTS_MAX: usize = 16;

/// Turns words into tokens and back.
#[derive(Default)]
pub(crate) struct Words {
    texts: BTreeMap<TextId, Text>,
}

struct Text {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    begin_token: Option<u32>,
    end_tokens: Vec<u32>,
    /// Made for the first grammar.
    grammar_tokens: Option<GrammarTokens>,
}

impl Engine for Words {
    fn perform(&mut self, task: Task, _: Vec<u8>) -> Result<(Answer, Vec<u8>), String> {
        let answer = match task {
            Task::TextLoad {
                text,
                tokenizer_file,
                chat_template,
                begin_token,
                end_tokens,
            } => {
                let bytes = fs::read(&tokenizer_file).map_err(|error| format!("{tokenizer_file}: {error}"))?;
                let tokenizer = Tokenizer::from_bytes(&bytes).map_err(|error| error.to_string())?;
                let named = |token: Option<u32>| token.and_then(|id| tokenizer.token_text(id)).unwrap_or_default();
                let (begin, end) = (named(begin_token), named(end_tokens.first().copied()));
                let template = ChatTemplate::new(chat_template.as_deref(), &begin, &end);
                let template = template.map_err(|error| error.to_string())?;
                self.texts.insert(
                    text,
                    Text {
                        tokenizer,
                        template,
                        begin_token,
                        end_tokens,
                        grammar_tokens: None,
                    },
                );
                while self.texts.len() > TEXTS_MAX {
                    self.texts.pop_first();
                }
                Answer::Done
            }
            Task::TextUnload { text } => {
                self.texts.remove(&text);
                Answer::Done
            }
            Task::Encode { text, prompt } => Answer::Tokens {
                tokens: self.text(text)?.encode(prompt)?,
            },
            Task::CheckGrammar { text, grammar } => {
                self.text_mut(text)?.check(&grammar)?;
                Answer::Done
            }
            Task::Decode { text, tokens } => Answer::Text {
                text: self
                    .text(text)?
                    .tokenizer
                    .decode(&tokens)
                    .map_err(|error| error.to_string())?,
            },
            task => return Err(format!("{task:?} is not about text")),
        };
        Ok((answer, Vec::new()))
    }
}

impl Words {
    fn text(&self, id: TextId) -> Result<&Text, String> {
        self.texts
            .get(&id)
            .ok_or_else(|| format!("no tokenizer {id} is loaded"))
    }

    fn text_mut(&mut self, id: TextId) -> Result<&mut Text, String> {
        self.texts
            .get_mut(&id)
            .ok_or_else(|| format!("no tokenizer {id} is loaded"))
    }
}

impl Text {
    /// Whether an answer can keep to `grammar`.
    fn check(&mut self, grammar: &Grammar) -> Result<(), String> {
        let tokens = match self.grammar_tokens.take() {
            Some(tokens) => tokens,
            None => GrammarTokens::new(&self.tokenizer, &self.end_tokens).map_err(|error| error.to_string())?,
        };
        let begun = tokens.begin(grammar).map(drop).map_err(|error| error.to_string());
        self.grammar_tokens = Some(tokens);
        begun
    }

    fn encode(&self, prompt: Prompt) -> Result<Vec<u32>, String> {
        let tokens = match prompt {
            Prompt::Plain(text) => self.tokenizer.encode(&text).map_err(|error| error.to_string())?,
            Prompt::Chat { messages, tools } => {
                let text = self.template.render(&messages, &tools);
                let text = text.map_err(|error| error.to_string())?;
                // Templates write special tokens out.
                self.tokenizer.encode_bare(&text).map_err(|error| error.to_string())?
            }
        };
        // A model cannot go on from nothing.
        if tokens.is_empty() {
            return Ok(self.begin_token.into_iter().collect());
        }
        Ok(tokens)
    }
}
