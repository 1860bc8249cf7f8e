//! A session: one generation through a chain of stages, and how it survives the loss of any of them.
//!
//! The gateway of the question opens a **seat** at each stage and keeps a stream to it. Hidden states go from stage to
//! stage; the last stage chooses a token and sends it to the first stage and to the gateway. Each stage keeps what it
//! sent ([`Journal`]). When a seat is lost, the gateway ([`Generation`]) begins a new **attempt**: whatever belongs to
//! an older one is dropped wherever it arrives; another node takes the seat, its upstream replays the journal to it as
//! one prefill, and the generation goes on after the last token that the gateway has.
//!
//! A session may go on from an earlier one of the same gateway whose text begins alike ([`Earlier`]): each seat says how
//! many positions it still has, and the text is computed from the least of these.

mod generation;
mod journal;
mod message;
mod seat;
#[cfg(test)]
mod tests;

pub use generation::{Effect, Generation, Input, Limits, Request, Why};
pub use journal::{Journal, JournalError};
pub use message::{
    Earlier, Feed, FromSeat, MESSAGE_BYTES_MAX, MessageError, Opening, REASON_BYTES_MAX, SeatId, SeatRequest,
    SessionId, TOKENS_PER_MESSAGE_MAX, ToSeat, Wiring, decode, encode, reason,
};
pub use seat::{CHUNK_ROWS, Computed, Seat, SeatEffect, SeatInput};
