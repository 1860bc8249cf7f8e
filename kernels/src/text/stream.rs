//! Text from tokens as they come, letter by whole letter.

use super::{TextError, Tokenizer};

/// What a decoder writes for bytes that are not (yet) UTF-8.
const REPLACEMENT: char = '\u{fffd}';
/// Bytes of a letter at most; a token has at least one.
const LETTER_BYTES_MAX: usize = 4;
/// Twice as many tokens as a letter can take: whoever waits longer waits in vain.
const WAIT_TOKENS_MAX: usize = 8;

/// Takes token ids one at a time and gives out the text that they complete.
///
/// Half a letter is never given out: it waits for the tokens with its other bytes.
#[derive(Debug)]
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    /// Tokens of the text that was given out last, for what decoders do between tokens, and those after.
    window: Vec<u32>,
    /// How many tokens of the window are given out.
    given: usize,
}

impl<'a> StreamDecoder<'a> {
    pub(super) const fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            window: Vec::new(),
            given: 0,
        }
    }

    /// Takes the next token. `None` while a letter is incomplete, and for tokens without text.
    ///
    /// # Errors
    ///
    /// [`TextError::Decode`].
    pub fn push(&mut self, id: u32) -> Result<Option<String>, TextError> {
        self.window.push(id);
        let waiting = self.window.len() - self.given;
        let text = self.pending()?;
        if text.ends_with(REPLACEMENT) && waiting < WAIT_TOKENS_MAX {
            return Ok(None);
        }
        if text.is_empty() && waiting < WAIT_TOKENS_MAX {
            return Ok(None);
        }
        if text.ends_with(REPLACEMENT)
            && let Some(whole) = self.give_whole_letters()?
        {
            return Ok(Some(whole));
        }
        self.window.drain(..self.given);
        self.given = self.window.len();
        Ok((!text.is_empty()).then_some(text))
    }

    /// Gives out all but the last tokens, where those may be half a letter behind replacement characters that were
    /// written as such. `None` where no place to part leaves the text as it is.
    fn give_whole_letters(&mut self) -> Result<Option<String>, TextError> {
        let all = self.tokenizer.decode(&self.window)?;
        let before = self.tokenizer.decode(&self.window[..self.given])?;
        for half in (1..LETTER_BYTES_MAX).rev() {
            let Some(end) = self.window.len().checked_sub(half).filter(|end| *end > self.given) else {
                continue;
            };
            let whole = self.tokenizer.decode(&self.window[..end])?;
            let new = whole.strip_prefix(&before).filter(|new| !new.is_empty());
            if let (Some(new), true) = (new, all.starts_with(&whole)) {
                let new = new.to_owned();
                self.window.drain(..self.given);
                self.given = end - self.given;
                return Ok(Some(new));
            }
        }
        Ok(None)
    }

    /// What is left when no more tokens come: half a letter becomes a replacement character.
    ///
    /// # Errors
    ///
    /// [`TextError::Decode`].
    pub fn finish(mut self) -> Result<Option<String>, TextError> {
        let text = self.pending()?;
        self.given = self.window.len();
        Ok((!text.is_empty()).then_some(text))
    }

    /// The text of the window beyond that of its given tokens.
    fn pending(&self) -> Result<String, TextError> {
        let before = self.tokenizer.decode(&self.window[..self.given])?;
        let all = self.tokenizer.decode(&self.window)?;
        if let Some(new) = all.strip_prefix(&before) {
            return Ok(new.to_owned());
        }
        // A decoder that rewrites what came before: go on from where the two part.
        let same = before.chars().zip(all.chars()).take_while(|(a, b)| a == b);
        Ok(all.chars().skip(same.count()).collect())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::bytes;
    use super::*;

    #[test]
    fn a_letter_of_three_tokens_comes_out_whole() {
        let tokenizer = Tokenizer::from_bytes(&bytes()).unwrap();
        let mut stream = tokenizer.stream();
        let pieces: Vec<_> = "a€b"
            .bytes()
            .map(|byte| stream.push(u32::from(byte)).unwrap())
            .collect();
        let expected = [Some("a"), None, None, Some("€"), Some("b")].map(|piece| piece.map(str::to_owned));
        assert_eq!(pieces, expected);
        assert_eq!(stream.finish().unwrap(), None);
    }

    #[test]
    fn a_letter_behind_written_replacement_characters_comes_out_whole() {
        let tokenizer = Tokenizer::from_bytes(&bytes()).unwrap();
        for text in [
            "\u{fffd}\u{fffd}\u{2190}",
            "\u{fffd}\u{fffd}a\u{fffd}\u{1f600}",
            "\u{fffd}\u{fffd}\u{fffd}é",
        ] {
            let mut stream = tokenizer.stream();
            let mut joined = String::new();
            for id in tokenizer.encode_bare(text).unwrap() {
                joined.extend(stream.push(id).unwrap());
            }
            joined.extend(stream.finish().unwrap());
            assert_eq!(joined, text);
        }
    }

    #[test]
    fn half_a_letter_at_the_end_is_marked() {
        let tokenizer = Tokenizer::from_bytes(&bytes()).unwrap();
        let mut stream = tokenizer.stream();
        assert_eq!(stream.push(0xe2).unwrap(), None);
        assert_eq!(stream.finish().unwrap(), Some("\u{fffd}".to_owned()));
    }

    proptest! {
        #[test]
        fn the_pieces_join_to_the_text(text: String) {
            let tokenizer = Tokenizer::from_bytes(&bytes()).unwrap();
            let mut stream = tokenizer.stream();
            let mut joined = String::new();
            for id in tokenizer.encode_bare(&text).unwrap() {
                joined.extend(stream.push(id).unwrap());
            }
            joined.extend(stream.finish().unwrap());
            prop_assert_eq!(joined, text);
        }

        #[test]
        fn arbitrary_bytes_are_given_out_as_a_lossy_text(raw in prop::collection::vec(any::<u8>(), 0..40)) {
            let tokenizer = Tokenizer::from_bytes(&bytes()).unwrap();
            let mut stream = tokenizer.stream();
            for byte in &raw {
                stream.push(u32::from(*byte)).unwrap();
            }
            stream.finish().unwrap();
        }
    }
}
