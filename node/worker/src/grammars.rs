//! What answers keep to: the grammars of sessions, and the vocabularies that they are read with.

use std::collections::BTreeMap;
use std::fs;

use polder_kernels::text::{GrammarState, GrammarTokens, TokenSet, Tokenizer};
use polder_protocol::work::{Grammar, StageId, Written};

/// Vocabularies that are kept at once; each takes some tens of megabytes.
const VOCABULARIES_MAX: usize = 4;

/// The grammars of the sessions of one device.
#[derive(Debug, Default)]
pub(crate) struct Grammars {
    sessions: BTreeMap<(StageId, u64), GrammarState>,
    /// By file and end tokens, the latest last.
    vocabularies: Vec<((String, Vec<u32>), GrammarTokens)>,
}

impl Grammars {
    /// Binds a session to `grammar`.
    pub(crate) fn bind(
        &mut self,
        session: (StageId, u64),
        tokenizer_file: String,
        end_tokens: Vec<u32>,
        grammar: &Grammar,
    ) -> Result<(), String> {
        let state = self.vocabulary(tokenizer_file, end_tokens)?.begin(grammar);
        let state = state.map_err(|error| error.to_string())?;
        self.sessions.insert(session, state);
        Ok(())
    }

    /// The tokens that may follow `written`; `None` where the session may say anything.
    pub(crate) fn allowed(&mut self, session: (StageId, u64), written: &Written) -> Result<Option<TokenSet>, String> {
        let Some(state) = self.sessions.get_mut(&session) else {
            return Ok(None);
        };
        let prompt = usize::try_from(written.prompt_tokens).unwrap_or(usize::MAX);
        let answer = written.tokens.get(prompt..).unwrap_or_default();
        state.allowed(answer).map(Some).map_err(|error| error.to_string())
    }

    /// Forgets a session.
    pub(crate) fn forget(&mut self, session: (StageId, u64)) {
        self.sessions.remove(&session);
    }

    /// Forgets the sessions of a stage.
    pub(crate) fn forget_stage(&mut self, stage: StageId) {
        self.sessions.retain(|(known, _), _| *known != stage);
    }

    fn vocabulary(&mut self, file: String, end_tokens: Vec<u32>) -> Result<&GrammarTokens, String> {
        let key = (file, end_tokens);
        if let Some(place) = self.vocabularies.iter().position(|(known, _)| *known == key) {
            let found = self.vocabularies.remove(place);
            self.vocabularies.push(found);
        } else {
            let (file, end_tokens) = &key;
            let failed = |error: &dyn std::fmt::Display| format!("{file}: {error}");
            let bytes = fs::read(file).map_err(|error| failed(&error))?;
            let tokenizer = Tokenizer::from_bytes(&bytes).map_err(|error| failed(&error))?;
            let tokens = GrammarTokens::new(&tokenizer, end_tokens).map_err(|error| error.to_string())?;
            if self.vocabularies.len() >= VOCABULARIES_MAX {
                self.vocabularies.remove(0);
            }
            self.vocabularies.push((key, tokens));
        }
        let latest = self.vocabularies.last().map(|(_, tokens)| tokens);
        latest.ok_or_else(|| "no vocabulary is left".to_owned())
    }
}
