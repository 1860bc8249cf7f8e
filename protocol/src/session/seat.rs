//! One seat of a session, at the node that holds the stage: what to compute next, what to send where, what to keep.

use alloc::collections::VecDeque;
use alloc::format;
use alloc::vec::Vec;

use super::journal::Journal;
use super::message::{Feed, FromSeat, SeatId, SeatRequest, ToSeat, Wiring, reason};
use crate::hash::NodeId;
use crate::work::Likely;

/// Rows that are computed and sent at once. Long prompts flow through the chain in such pieces, so that stages work at
/// the same time; 256 rows use a matrix product well.
pub const CHUNK_ROWS: usize = 256;

/// What a stage does in one session.
///
/// It computes one piece at a time, and holds at most the session's context in waiting pieces and in its journal.
#[derive(Debug)]
pub struct Seat {
    id: SeatId,
    has_embedding: bool,
    has_head: bool,
    context_tokens_max: u32,
    end_tokens: Vec<u32>,
    row_bytes: usize,
    wiring: Option<Wiring>,
    journal: Journal,
    // The next position that is taken; everything before it has been computed or waits in `pieces`.
    position_next: u32,
    pieces: VecDeque<Piece>,
    computing: Option<Piece>,
    // At the last seat, where its choice looks back; empty elsewhere.
    text: Vec<u32>,
    looks_back: bool,
}

/// What happens to a seat.
#[derive(Debug, Clone, PartialEq)]
pub enum SeatInput {
    /// The gateway said this.
    Told(ToSeat),
    /// A neighbour sent this.
    Fed {
        /// Which, as the connection proved.
        from: NodeId,
        /// What.
        feed: Feed,
        /// Hidden states.
        payload: Vec<u8>,
    },
    /// The device has computed the piece that it was given.
    Computed(Computed),
}

/// What the device answered.
#[derive(Debug, Clone, PartialEq)]
pub enum Computed {
    /// Rows of hidden states.
    Hidden(Vec<u8>),
    /// A token, at a stage with the head.
    Token {
        /// Which, and how likely it was.
        chosen: Likely,
        /// The likeliest, as many as were asked for.
        alternatives: Vec<Likely>,
    },
}

/// What the driver of a seat must do.
#[derive(Debug, Clone, PartialEq)]
pub enum SeatEffect {
    /// Let the device compute, and answer with [`SeatInput::Computed`].
    Compute {
        /// Position of the first row.
        position: u32,
        /// Tokens, at a stage with the embedding.
        tokens: Vec<u32>,
        /// Hidden states, at any other.
        payload: Vec<u8>,
        /// The text before the token that is chosen after these rows, as far as this seat was told.
        written: Vec<u32>,
    },
    /// Tell the gateway.
    Say(FromSeat),
    /// Send to a neighbour.
    Feed {
        /// Which node.
        to: NodeId,
        /// Which of its seats.
        seat: SeatId,
        /// In which attempt.
        attempt: u32,
        /// What.
        feed: Feed,
        /// Hidden states.
        payload: Vec<u8>,
    },
}

#[derive(Debug)]
struct Piece {
    attempt: u32,
    position: u32,
    rows: u32,
    tokens: Vec<u32>,
    payload: Vec<u8>,
    more: bool,
    replay: bool,
}

impl Seat {
    /// A seat as asked for, at a stage of a model of `blocks` blocks whose rows are `hidden` values wide.
    pub fn new(request: &SeatRequest, blocks: u32, hidden: u32) -> Self {
        let row_bytes = usize::try_from(hidden).unwrap_or(usize::MAX).saturating_mul(4);
        Self {
            id: request.seat,
            has_embedding: request.range.has_embedding(),
            has_head: request.range.has_head(blocks),
            context_tokens_max: request.context_tokens_max,
            end_tokens: request.end_tokens.clone(),
            row_bytes,
            wiring: None,
            journal: Journal::new(row_bytes, request.context_tokens_max),
            position_next: 0,
            pieces: VecDeque::new(),
            computing: None,
            text: Vec::new(),
            looks_back: request.range.has_head(blocks) && (request.sampling.looks_back() || request.grammar.is_some()),
        }
    }

    /// Begins after `positions` that an earlier session of the same stage computed, with what that one sent. A seat that
    /// sends its rows on and whose journal has fewer begins after those. Tells after how many.
    pub fn go_on_from(&mut self, journal: Journal, positions: u32) -> u32 {
        let journal = journal.into_start(positions, self.context_tokens_max);
        let sent = if self.has_head { positions } else { journal.positions() };
        self.position_next = positions.min(sent).min(self.context_tokens_max);
        self.journal = journal;
        self.position_next
    }

    /// What it sent, for a session that goes on from this one.
    pub fn into_journal(self) -> Journal {
        self.journal
    }

    /// Takes one input, and appends what the driver must now do, in order.
    pub fn step(&mut self, input: SeatInput, effects: &mut Vec<SeatEffect>) {
        match input {
            SeatInput::Told(ToSeat::Text { position, tokens }) => self.learn(position, &tokens),
            SeatInput::Told(ToSeat::Wire(wiring)) => self.wire(wiring, effects),
            SeatInput::Told(ToSeat::Replay { attempt, positions }) => self.replay(attempt, positions, effects),
            SeatInput::Told(ToSeat::Tokens {
                attempt,
                position,
                tokens,
                more,
                replay,
            }) if self.has_embedding => self.take_tokens(attempt, position, &tokens, more, replay, effects),
            // The driver answers pings without waiting for the machine.
            SeatInput::Told(ToSeat::Tokens { .. } | ToSeat::Ping) => {}
            SeatInput::Fed { from, feed, payload } => self.fed(from, feed, payload, effects),
            SeatInput::Computed(computed) => self.computed(computed, effects),
        }
        if self.computing.is_none()
            && let Some(piece) = self.pieces.pop_front()
        {
            effects.push(SeatEffect::Compute {
                position: piece.position,
                tokens: piece.tokens.clone(),
                payload: piece.payload.clone(),
                written: self.before(piece.position.saturating_add(piece.rows)),
            });
            self.computing = Some(Piece {
                tokens: Vec::new(),
                payload: Vec::new(),
                ..piece
            });
        }
    }

    /// Takes the text from `position` on; what would leave a gap, or be longer than the context, is not taken.
    fn learn(&mut self, position: u32, tokens: &[u32]) {
        let position = usize::try_from(position).unwrap_or(usize::MAX);
        let limit = usize::try_from(self.context_tokens_max).unwrap_or(usize::MAX);
        let end = position.saturating_add(tokens.len());
        if self.looks_back && position <= self.text.len() && end <= limit.saturating_add(1) {
            self.text.truncate(position);
            self.text.extend_from_slice(tokens);
        }
    }

    /// The text before `position`.
    fn before(&self, position: u32) -> Vec<u32> {
        let position = usize::try_from(position).unwrap_or(usize::MAX);
        let known = self.text.get(..position).unwrap_or(&self.text);
        known.to_vec()
    }

    fn wire(&mut self, wiring: Wiring, effects: &mut Vec<SeatEffect>) {
        if self.wiring.is_some_and(|known| wiring.attempt <= known.attempt) {
            return;
        }
        self.wiring = Some(wiring);
        // What is under way belongs to the attempt before: its rows are not kept, so they are to come again.
        let undone = self
            .computing
            .iter()
            .chain(&self.pieces)
            .map(|piece| piece.position)
            .min();
        let done = undone.map_or(self.position_next, |undone| undone.min(self.position_next));
        self.pieces.clear();
        self.position_next = done.min(wiring.positions);
        self.journal.forget_from(wiring.positions);
        let attempt = wiring.attempt;
        effects.push(SeatEffect::Say(FromSeat::Wired { attempt }));
    }

    /// Sends what was sent before to whoever sits next now.
    fn replay(&mut self, attempt: u32, positions: u32, effects: &mut Vec<SeatEffect>) {
        let Some(wiring) = self.wiring_of(attempt) else { return };
        let Some(rows) = self.journal.rows(0, positions) else {
            let held = self.journal.positions();
            effects.push(refused(&format!(
                "the journal holds {held} positions, {positions} are asked for"
            )));
            return;
        };
        let chunk_bytes = CHUNK_ROWS.saturating_mul(self.row_bytes).max(1);
        let mut chunks = rows.chunks(chunk_bytes).peekable();
        let mut position = 0u32;
        while let Some(chunk) = chunks.next() {
            let feed = Feed::Hidden {
                attempt,
                position,
                more: chunks.peek().is_some(),
                replay: true,
            };
            effects.push(SeatEffect::Feed {
                to: wiring.next,
                seat: wiring.next_seat,
                attempt,
                feed,
                payload: chunk.to_vec(),
            });
            position = position.saturating_add(u32::try_from(CHUNK_ROWS).unwrap_or(u32::MAX));
        }
    }

    fn fed(&mut self, from: NodeId, feed: Feed, payload: Vec<u8>, effects: &mut Vec<SeatEffect>) {
        let attempt = match feed {
            Feed::Hidden { attempt, .. } | Feed::Token { attempt, .. } => attempt,
        };
        // What an earlier attempt left behind, or somebody who does not sit before this seat, costs nothing.
        if self.wiring_of(attempt).is_none_or(|wiring| wiring.previous != from) {
            return;
        }
        match feed {
            Feed::Token { position, token, .. } if self.has_embedding => {
                self.take_tokens(attempt, position, &[token], false, false, effects);
            }
            Feed::Hidden {
                position, more, replay, ..
            } if !self.has_embedding => {
                let rows = payload.len().checked_div(self.row_bytes).unwrap_or(0);
                if rows == 0 || rows > CHUNK_ROWS || !payload.len().is_multiple_of(self.row_bytes) {
                    let bytes = payload.len();
                    let row_bytes = self.row_bytes;
                    effects.push(refused(&format!(
                        "{bytes} bytes came where 1 to {CHUNK_ROWS} rows of {row_bytes} bytes belong"
                    )));
                    return;
                }
                let piece = Piece {
                    attempt,
                    position,
                    rows: u32::try_from(rows).unwrap_or(u32::MAX),
                    tokens: Vec::new(),
                    payload,
                    more,
                    replay,
                };
                self.take(piece, effects);
            }
            Feed::Token { .. } | Feed::Hidden { .. } => {}
        }
    }

    fn take_tokens(
        &mut self,
        attempt: u32,
        position: u32,
        tokens: &[u32],
        more: bool,
        replay: bool,
        effects: &mut Vec<SeatEffect>,
    ) {
        if self.wiring_of(attempt).is_none() {
            return;
        }
        let mut position = position;
        let mut chunks = tokens.chunks(CHUNK_ROWS).peekable();
        while let Some(chunk) = chunks.next() {
            let rows = u32::try_from(chunk.len()).unwrap_or(u32::MAX);
            let piece = Piece {
                attempt,
                position,
                rows,
                tokens: chunk.to_vec(),
                payload: Vec::new(),
                more: more || chunks.peek().is_some(),
                replay,
            };
            self.take(piece, effects);
            position = position.saturating_add(rows);
        }
    }

    /// Queues a piece that comes next. One that was taken before, or comes after a gap, is dropped.
    fn take(&mut self, piece: Piece, effects: &mut Vec<SeatEffect>) {
        let end = piece.position.saturating_add(piece.rows);
        if piece.position == self.position_next && end <= self.context_tokens_max {
            self.position_next = end;
            self.pieces.push_back(piece);
            return;
        }
        let attempt = piece.attempt;
        let waits = self
            .computing
            .iter()
            .chain(&self.pieces)
            .any(|other| other.attempt == attempt);
        if piece.replay && !piece.more && end <= self.position_next && !waits {
            // All of it came in an attempt before, of whose end the gateway has not heard.
            effects.push(SeatEffect::Say(FromSeat::Replayed { attempt }));
        }
    }

    fn computed(&mut self, computed: Computed, effects: &mut Vec<SeatEffect>) {
        let Some(piece) = self.computing.take() else { return };
        let Some(wiring) = self.wiring_of(piece.attempt) else {
            return;
        };
        let Piece {
            attempt, more, replay, ..
        } = piece;
        match computed {
            Computed::Hidden(rows) if !self.has_head => {
                if let Err(error) = self.journal.keep(piece.position, &rows) {
                    effects.push(refused(&format!("{error}")));
                    return;
                }
                if !replay {
                    effects.push(SeatEffect::Feed {
                        to: wiring.next,
                        seat: wiring.next_seat,
                        attempt,
                        feed: Feed::Hidden {
                            attempt,
                            position: piece.position,
                            more,
                            replay,
                        },
                        payload: rows,
                    });
                }
            }
            Computed::Token { chosen, alternatives } if self.has_head => {
                if !more && !replay {
                    let position = piece.position.saturating_add(piece.rows);
                    self.chose(wiring, position, chosen, alternatives, effects);
                }
            }
            Computed::Hidden(_) | Computed::Token { .. } => {
                effects.push(refused("the device answered what does not belong to its stage"));
                return;
            }
        }
        if replay && !more {
            effects.push(SeatEffect::Say(FromSeat::Replayed { attempt }));
        }
    }

    fn chose(
        &mut self,
        wiring: Wiring,
        position: u32,
        chosen: Likely,
        alternatives: Vec<Likely>,
        effects: &mut Vec<SeatEffect>,
    ) {
        let (attempt, token) = (wiring.attempt, chosen.token);
        self.learn(position, &[token]);
        let feed = Feed::Token {
            attempt,
            position,
            token,
        };
        let goes_on = !self.end_tokens.contains(&token) && position < self.context_tokens_max;
        if goes_on && wiring.next_seat == self.id {
            self.take_tokens(attempt, position, &[token], false, false, effects);
        } else if goes_on {
            effects.push(SeatEffect::Feed {
                to: wiring.next,
                seat: wiring.next_seat,
                attempt,
                feed,
                payload: Vec::new(),
            });
        }
        effects.push(SeatEffect::Say(FromSeat::Token {
            attempt,
            position,
            chosen,
            alternatives,
        }));
    }

    fn wiring_of(&self, attempt: u32) -> Option<Wiring> {
        self.wiring.filter(|wiring| wiring.attempt == attempt)
    }
}

fn refused(text: &str) -> SeatEffect {
    SeatEffect::Say(FromSeat::Refused { reason: reason(text) })
}
