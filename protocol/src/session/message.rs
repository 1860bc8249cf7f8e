//! What the gateway, the stages of a session and their neighbours say to each other: postcard headers of data frames.

use alloc::string::String;
use alloc::vec::Vec;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::hash::{EpochId, NodeId};
use crate::layout::BlockRange;
use crate::work::{Grammar, Likely, Sampling};

/// The longest message, which is also what the header of a data frame holds.
pub const MESSAGE_BYTES_MAX: usize = 60_000;

/// The most tokens in one message; a longer prompt is sent in several. Each takes at most five bytes.
pub const TOKENS_PER_MESSAGE_MAX: usize = 8_192;

/// The longest reason that is passed on.
pub const REASON_BYTES_MAX: usize = 1_000;

/// A session, named at random by its gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SessionId(pub [u8; 16]);

/// A seat of a session: each that its gateway opens has a new number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SeatId(pub u16);

/// The first message of a stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Opening {
    /// A gateway asks for a seat. The stream lives as long as the seat; [`ToSeat`] and [`FromSeat`] follow.
    Seat(SeatRequest),
    /// The neighbour before a seat will send [`Feed`]s to it.
    Feed {
        /// Which session.
        session: SessionId,
        /// Which seat of it.
        seat: SeatId,
    },
}

/// What a gateway asks of a stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SeatRequest {
    /// Which session.
    pub session: SessionId,
    /// Names the seat.
    pub seat: SeatId,
    /// Of which epoch.
    pub epoch: EpochId,
    /// Which blocks: exactly those of a stage that the node holds.
    pub range: BlockRange,
    /// Room for so many tokens.
    pub context_tokens_max: u32,
    /// How the last stage chooses.
    pub sampling: Sampling,
    /// What the answer keeps to, for the last stage.
    pub grammar: Option<Grammar>,
    /// How many tokens of the text are the prompt.
    pub prompt_tokens: u32,
    /// After these the last stage sends no token to the first.
    pub end_tokens: Vec<u32>,
    /// Go on from an earlier session, where its stage still has what it computed.
    pub earlier: Option<Earlier>,
    /// After the end, keep what was computed as long as nobody needs the room: a later session of this gateway may go on
    /// from it.
    pub keep: bool,
}

/// An earlier session whose text begins with the same tokens.
///
/// A stage knows it by its name and by who asks: the gateway of both, as its connection proved. The name is random and
/// known to those who sat in that session; nothing here tells a stage tokens that it did not compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Earlier {
    /// Which.
    pub session: SessionId,
    /// So many tokens are the same.
    pub positions: u32,
}

/// How a seat is connected in one attempt. Everything from `positions` on is forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wiring {
    /// From now on only what belongs to this attempt counts.
    pub attempt: u32,
    /// Positions that all stages have, or will have after the replays.
    pub positions: u32,
    /// From whom feeds come. For the first seat this is the last.
    pub previous: NodeId,
    /// To whom feeds go. For the last seat this is the first.
    pub next: NodeId,
    /// The seat there.
    pub next_seat: SeatId,
}

/// From the gateway to a seat.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ToSeat {
    /// To the last seat, before [`ToSeat::Wire`], where its choice looks back: the text from `position` on. It adds the
    /// tokens that it chooses itself.
    Text {
        /// Position of the first.
        position: u32,
        /// The ids, at most [`TOKENS_PER_MESSAGE_MAX`].
        tokens: Vec<u32>,
    },
    /// Connect anew. Answered with [`FromSeat::Wired`].
    Wire(Wiring),
    /// Send the journal up to `positions` to the next seat, which answers [`FromSeat::Replayed`] when it has it.
    Replay {
        /// The attempt.
        attempt: u32,
        /// How many.
        positions: u32,
    },
    /// To the first seat: tokens from `position` on.
    Tokens {
        /// The attempt.
        attempt: u32,
        /// Position of the first.
        position: u32,
        /// The ids, at most [`TOKENS_PER_MESSAGE_MAX`].
        tokens: Vec<u32>,
        /// More of the same prompt follow.
        more: bool,
        /// They were computed before: keep what comes of them, and send it nowhere.
        replay: bool,
    },
    /// Answered with [`FromSeat::Pong`] at once, also while the device computes.
    Ping,
}

/// From a seat to the gateway.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum FromSeat {
    /// The seat is taken and memory reserved.
    Opened {
        /// So many positions it has from the earlier session, of those that were asked for.
        positions: u32,
        /// It can go on from no earlier one of these, except from none: a recurrent state cannot be unwound.
        earliest: u32,
    },
    /// It is not, or no longer.
    Refused {
        /// For people.
        reason: String,
    },
    /// The seat is connected.
    Wired {
        /// In this attempt.
        attempt: u32,
    },
    /// The seat has computed what was replayed to it.
    Replayed {
        /// In this attempt.
        attempt: u32,
    },
    /// The next seat cannot be reached from here.
    NextLost {
        /// In this attempt.
        attempt: u32,
        /// For people.
        reason: String,
    },
    /// The last seat chose a token.
    Token {
        /// In this attempt.
        attempt: u32,
        /// Where it stands in the text.
        position: u32,
        /// Which, and how likely it was.
        chosen: Likely,
        /// The likeliest, as many as were asked for.
        alternatives: Vec<Likely>,
    },
    /// Still there.
    Pong,
}

/// From a seat to the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Feed {
    /// The payload is `[seq, hidden]` f32, little-endian.
    Hidden {
        /// The attempt.
        attempt: u32,
        /// Position of the first row.
        position: u32,
        /// More of the same prompt or replay follow.
        more: bool,
        /// It was computed before: keep what comes of it, and send it nowhere.
        replay: bool,
    },
    /// From the last seat to the first.
    Token {
        /// The attempt.
        attempt: u32,
        /// Where it stands in the text.
        position: u32,
        /// Its id.
        token: u32,
    },
}

/// Why bytes are no message.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum MessageError {
    /// Over the limit.
    #[error("a message of {bytes} bytes, at most {MESSAGE_BYTES_MAX} are allowed")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// Not what was expected.
    #[error("a malformed message")]
    Malformed,
}

/// Writes a message.
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    // Messages hold only what postcard can write; the fallback is a message that every reader refuses.
    postcard::to_allocvec(message).unwrap_or_default()
}

/// Reads a message.
///
/// # Errors
///
/// [`MessageError`], also for bytes left over.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, MessageError> {
    if bytes.len() > MESSAGE_BYTES_MAX {
        return Err(MessageError::TooLong { bytes: bytes.len() });
    }
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Ok(message),
        Ok(_) | Err(_) => Err(MessageError::Malformed),
    }
}

/// A reason, cut to what may be passed on.
pub fn reason(text: &str) -> String {
    text.get(..text.floor_char_boundary(REASON_BYTES_MAX))
        .unwrap_or_default()
        .into()
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_longest_tokens_fit_a_message() {
        let message = ToSeat::Tokens {
            attempt: u32::MAX,
            position: u32::MAX,
            tokens: vec![u32::MAX; TOKENS_PER_MESSAGE_MAX],
            more: true,
            replay: true,
        };
        assert_eq!(decode(&encode(&message)), Ok(message));
    }

    proptest! {
        #[test]
        fn garbage_is_an_error_or_a_message_but_no_panic(bytes: Vec<u8>) {
            let _ = decode::<Opening>(&bytes);
            let _ = decode::<ToSeat>(&bytes);
            let _ = decode::<FromSeat>(&bytes);
            let _ = decode::<Feed>(&bytes);
        }
    }
}
