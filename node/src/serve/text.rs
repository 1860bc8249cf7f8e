//! Words from tokens as they come: letters are never cut in half, and nothing of a stop string is given out.

use std::sync::Arc;

use bytes::Bytes;
use polder_protocol::hash::EpochId;
use polder_protocol::work::{Answer, Grammar, Prompt, Task, TextId};

use super::{Inner, ServeError, marks};
use crate::device::{DeviceError, Life};

/// What a decoder writes for bytes that are not (yet) UTF-8.
const REPLACEMENT: char = '\u{fffd}';

/// A letter has at most four bytes, and a token at least one: whoever waits longer waits in vain.
const UNFINISHED_TOKENS_MAX: usize = 4;

/// A tokenizer in this node's worker.
#[derive(Clone)]
pub(super) struct Text {
    inner: Arc<Inner>,
    id: TextId,
}

impl Text {
    /// Loads the tokenizer of an epoch, unless the present worker has it.
    pub(super) async fn of(inner: &Arc<Inner>, id: EpochId) -> Result<Self, ServeError> {
        let epoch = inner.epoch(id)?;
        let life = match *inner.device.life().borrow() {
            Life::Running(life) => life,
            Life::Down(_) => 0,
        };
        let known = inner.lock().texts.get(&id).copied();
        if let Some((text, loaded_in)) = known
            && loaded_in == life
        {
            return Ok(Self {
                inner: Arc::clone(inner),
                id: text,
            });
        }
        let tokenizer_file = inner.blob_file(id, epoch.tokenizer, "the tokenizer").await?;
        let text = inner.new_id();
        let task = Task::TextLoad {
            text,
            tokenizer_file,
            chat_template: epoch.chat_template.clone(),
            begin_token: epoch.begin_token,
            end_tokens: epoch.end_tokens.clone(),
        };
        let loaded = inner.device.order(task, Bytes::new()).await;
        loaded.map_err(|source| ServeError::Device {
            what: "load the tokenizer",
            source,
        })?;
        inner.lock().texts.insert(id, (text, life));
        Ok(Self {
            inner: Arc::clone(inner),
            id: text,
        })
    }

    pub(super) async fn encode(&self, prompt: Prompt) -> Result<Vec<u32>, ServeError> {
        let task = Task::Encode { text: self.id, prompt };
        let what = "turn the prompt into tokens";
        match self.inner.device.order(task, Bytes::new()).await {
            Ok((Answer::Tokens { tokens }, _)) => Ok(tokens),
            Ok((answer, _)) => Err(ServeError::Device {
                what,
                source: DeviceError::unexpected(&answer),
            }),
            Err(DeviceError::Failed { reason }) => Err(ServeError::Request { reason }),
            Err(source) => Err(ServeError::Device { what, source }),
        }
    }

    /// Whether answers can keep to `grammar`.
    pub(super) async fn check(&self, grammar: &Grammar) -> Result<(), ServeError> {
        let task = Task::CheckGrammar {
            text: self.id,
            grammar: grammar.clone(),
        };
        let what = "read the JSON schema";
        match self.inner.device.order(task, Bytes::new()).await {
            Ok(_) => Ok(()),
            Err(DeviceError::Failed { reason }) => Err(ServeError::Request { reason }),
            Err(source) => Err(ServeError::Device { what, source }),
        }
    }

    async fn decode(&self, tokens: &[u32]) -> Result<String, ServeError> {
        let task = Task::Decode {
            text: self.id,
            tokens: tokens.to_vec(),
        };
        let what = "turn tokens into text";
        match self.inner.device.order(task, Bytes::new()).await {
            Ok((Answer::Text { text }, _)) => Ok(text),
            Ok((answer, _)) => Err(ServeError::Device {
                what,
                source: DeviceError::unexpected(&answer),
            }),
            Err(source) => Err(ServeError::Device { what, source }),
        }
    }
}

/// Turns tokens into text piece by piece.
pub(super) struct Words {
    text: Text,
    // The tokens of the piece that was given out last, for what decoders do between tokens, and those after.
    window: Vec<u32>,
    given: usize,
    given_text: String,
}

impl Words {
    pub(super) fn new(text: Text) -> Self {
        Self {
            text,
            window: Vec::new(),
            given: 0,
            given_text: String::new(),
        }
    }

    /// The text that `token` completes; empty while a letter is incomplete.
    pub(super) async fn push(&mut self, token: u32) -> Result<String, ServeError> {
        self.window.push(token);
        let decoded = self.text.decode(&self.window).await?;
        let waits = decoded.ends_with(REPLACEMENT) && self.window.len() - self.given < UNFINISHED_TOKENS_MAX;
        if waits {
            return Ok(String::new());
        }
        self.take(&decoded).await
    }

    /// What `token` is by itself.
    pub(super) async fn alone(&self, token: u32) -> Result<String, ServeError> {
        self.text.decode(&[token]).await
    }

    /// What is left when no more tokens come.
    pub(super) async fn finish(&mut self) -> Result<String, ServeError> {
        if self.window.len() == self.given {
            return Ok(String::new());
        }
        let decoded = self.text.decode(&self.window).await?;
        self.take(&decoded).await
    }

    async fn take(&mut self, decoded: &str) -> Result<String, ServeError> {
        let piece = decoded
            .strip_prefix(self.given_text.as_str())
            .unwrap_or_default()
            .to_owned();
        self.window.drain(..self.given);
        self.given = self.window.len();
        self.given_text = self.text.decode(&self.window).await?;
        Ok(piece)
    }
}

/// Looks for stop strings, and holds back what may be the beginning of one.
#[derive(Debug)]
pub(super) struct Stops {
    stops: Vec<String>,
    held: String,
}

impl Stops {
    pub(super) fn new(stops: Vec<String>) -> Self {
        let stops = stops.into_iter().filter(|stop| !stop.is_empty()).collect();
        Self {
            stops,
            held: String::new(),
        }
    }

    /// The text that can be given out now, and whether a stop string ended it.
    pub(super) fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        let stops = self.stops.iter().map(String::as_str);
        if let Some(at) = marks::find(&self.held, stops.clone()) {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let kept = self.held.split_off(marks::may_begin(&self.held, stops));
        (std::mem::replace(&mut self.held, kept), false)
    }

    /// What was held back, when no more text comes.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_string_is_found_across_pieces_and_not_given_out() {
        let mut stops = Stops::new(vec!["END".to_owned(), String::new()]);
        assert_eq!(stops.push("say E"), ("say ".to_owned(), false));
        assert_eq!(stops.push("Nough E"), ("ENough ".to_owned(), false));
        assert_eq!(stops.push("ND and more"), (String::new(), true));
    }

    #[test]
    fn what_was_held_back_comes_at_the_end() {
        let mut stops = Stops::new(vec!["äöü".to_owned()]);
        assert_eq!(stops.push("xäö"), ("x".to_owned(), false));
        assert_eq!(stops.finish(), "äö");
    }
}
