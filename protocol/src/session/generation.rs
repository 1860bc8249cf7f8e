//! A generation at its gateway: which seats there are, which tokens are certain, and what to do when a seat is lost.

use alloc::collections::BTreeSet;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use super::message::{FromSeat, SeatId, TOKENS_PER_MESSAGE_MAX, ToSeat, Wiring};
use crate::hash::NodeId;
use crate::layout::BlockRange;
use crate::route::Hop;
use crate::time::{Instant, Span};
use crate::work::Likely;

/// What is to be generated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The prompt, at least one token.
    pub prompt: Vec<u32>,
    /// New tokens at most.
    pub tokens_max: u32,
    /// Prompt and new tokens at most.
    pub context_tokens_max: u32,
    /// Tokens that end the text.
    pub end_tokens: Vec<u32>,
    /// Blocks of the model.
    pub blocks: u32,
    /// Whether the last stage must know the text before the token that it chooses.
    pub looks_back: bool,
    /// So many tokens of the prompt begin an earlier session, from which stages may go on.
    pub shared: u32,
}

/// How long to wait for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// After so long without a word, every seat is asked whether it is there.
    pub quiet: Span,
    /// A seat that does not answer within this is lost. A packet lost twice on a slow path costs about a second.
    pub pong: Span,
    /// A seat must be open after this: a dial with a handshake, and memory.
    pub opening: Span,
    /// How long a generation that has begun waits for somebody to take a lost seat.
    pub vacant: Span,
    /// How often it looks meanwhile.
    pub look_again: Span,
    /// So long without a token, and it gives up even if everybody is there: a long prompt on slow devices takes minutes.
    pub patience: Span,
    /// Lost seats after which it gives up.
    pub losses_max: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            quiet: Span::seconds(1),
            pong: Span::seconds(2),
            opening: Span::seconds(10),
            vacant: Span::seconds(30),
            look_again: Span::millis(500),
            patience: Span::seconds(600),
            losses_max: 32,
        }
    }
}

/// What happens to a generation.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// The answer to [`Effect::Choose`]; `None` where there is no chain.
    Chosen {
        /// The gap that was asked for.
        gap: BlockRange,
        /// Stages that cover it, in order.
        chain: Option<Vec<Hop>>,
    },
    /// A seat said something.
    Said {
        /// Which.
        seat: SeatId,
        /// What.
        message: FromSeat,
    },
    /// The stream to a seat ended.
    Lost {
        /// Which.
        seat: SeatId,
        /// For people.
        reason: String,
    },
    /// Time has passed.
    Wake,
}

/// What the driver of a generation must do.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Choose stages for these blocks, and answer with [`Input::Chosen`].
    Choose {
        /// Which blocks.
        gap: BlockRange,
        /// Nodes that were lost.
        excluded: BTreeSet<NodeId>,
    },
    /// Ask for a seat.
    Open {
        /// Its name.
        seat: SeatId,
        /// Where, of which blocks.
        hop: Hop,
        /// Ask it to go on from so many positions of the earlier session.
        shared: u32,
    },
    /// Tell a seat.
    Send {
        /// Which.
        seat: SeatId,
        /// What.
        message: ToSeat,
    },
    /// End the stream to a seat.
    Close {
        /// Which.
        seat: SeatId,
    },
    /// The next token of the text is certain.
    Emit {
        /// Which, and how likely it was.
        chosen: Likely,
        /// The likeliest, as the last stage says.
        alternatives: Vec<Likely>,
    },
    /// The generation has ended. All seats are to be closed.
    Done(Why),
}

/// Why a generation ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Why {
    /// The model ended the text.
    EndToken,
    /// As many tokens as were asked for, or as the context holds.
    Length,
    /// There is no way to go on.
    GaveUp {
        /// For people.
        reason: String,
    },
}

/// The gateway's side of a session.
///
/// The number of seats is at most that of the blocks, and tokens are at most the context.
#[derive(Debug)]
pub struct Generation {
    request: Request,
    limits: Limits,
    // Prompt and what was generated.
    tokens: Vec<u32>,
    // In the order of their blocks; with `gaps` they cover the model.
    seats: Vec<Seated>,
    gaps: Vec<Gap>,
    phase: Phase,
    attempt: u32,
    seats_opened: u16,
    excluded: BTreeSet<NodeId>,
    losses: u32,
    loss_last: String,
    // Positions of the prompt that were not computed.
    reused: u32,
    heard_at: Instant,
    token_at: Instant,
    asked_at: Option<Instant>,
}

#[derive(Debug)]
struct Seated {
    id: SeatId,
    hop: Hop,
    state: State,
    // It lacks the positions that the others have.
    fresh: bool,
    // Positions that it has from the earlier session, and the first of them from which it can go on.
    shared: u32,
    earliest: u32,
    answered: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Opening { since: Instant },
    Open,
    Wired,
}

#[derive(Debug)]
struct Gap {
    range: BlockRange,
    since: Instant,
    look_at: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Seats are missing or not open yet.
    Assembling,
    /// All are open, and are told of each other.
    Wiring,
    /// One of them takes in what was computed before.
    Replaying,
    Running,
    Ended,
}

impl Generation {
    /// Begins: the first effect asks for a chain.
    pub fn begin(now: Instant, request: Request, limits: Limits, effects: &mut Vec<Effect>) -> Self {
        let mut generation = Self {
            tokens: request.prompt.clone(),
            request,
            limits,
            seats: Vec::new(),
            gaps: Vec::new(),
            phase: Phase::Assembling,
            attempt: 0,
            seats_opened: 0,
            excluded: BTreeSet::new(),
            losses: 0,
            loss_last: String::new(),
            reused: 0,
            heard_at: now,
            token_at: now,
            asked_at: None,
        };
        let prompt = u32::try_from(generation.tokens.len()).unwrap_or(u32::MAX);
        let context = generation.request.context_tokens_max;
        if prompt == 0 {
            generation.give_up("the prompt is empty", effects);
        } else if prompt >= context {
            let reason =
                format!("the prompt has {prompt} tokens, and with an answer at most {context} fit the context");
            generation.give_up(&reason, effects);
        } else if generation.request.tokens_max == 0 {
            generation.end(Why::Length, effects);
        } else {
            let whole = BlockRange::whole(generation.request.blocks);
            generation.open_gap(now, whole, effects);
        }
        generation
    }

    /// Who answers, in order.
    pub fn chain(&self) -> Vec<Hop> {
        self.seats.iter().map(|seat| seat.hop).collect()
    }

    /// Tokens that were generated so far, an end token not included.
    pub fn tokens_generated(&self) -> usize {
        self.tokens.len().saturating_sub(self.request.prompt.len())
    }

    /// How many tokens of the prompt no stage had to compute again.
    pub fn tokens_reused(&self) -> u32 {
        self.reused
    }

    /// How many seats were lost on the way.
    pub fn losses(&self) -> u32 {
        self.losses
    }

    /// When to step with [`Input::Wake`], if nothing else happens first.
    pub fn wake_at(&self) -> Option<Instant> {
        let looks = self.gaps.iter().filter_map(|gap| gap.look_at);
        let openings = self.seats.iter().filter_map(|seat| match seat.state {
            State::Opening { since } => Some(since + self.limits.opening),
            State::Open | State::Wired => None,
        });
        let silence = match self.asked_at {
            Some(asked_at) => asked_at + self.limits.pong,
            None => self.heard_at + self.limits.quiet,
        };
        let silence = match self.phase {
            Phase::Assembling => None,
            Phase::Wiring | Phase::Replaying | Phase::Running => Some(silence),
            Phase::Ended => return None,
        };
        looks
            .chain(openings)
            .chain(silence)
            .chain([self.token_at + self.limits.patience])
            .min()
    }

    /// Takes one input, and appends what the caller must now do, in order.
    pub fn step(&mut self, now: Instant, input: Input, effects: &mut Vec<Effect>) {
        if self.phase == Phase::Ended {
            return;
        }
        match input {
            Input::Chosen { gap, chain } => self.chosen(now, gap, chain, effects),
            Input::Said { seat, message } => self.said(now, seat, message, effects),
            Input::Lost { seat, reason } => self.lost(now, seat, &reason, effects),
            Input::Wake => self.wake(now, effects),
        }
    }

    fn chosen(&mut self, now: Instant, gap: BlockRange, chain: Option<Vec<Hop>>, effects: &mut Vec<Effect>) {
        let Some(place) = self.gaps.iter().position(|known| known.range == gap) else {
            return;
        };
        let Some(chain) = chain.filter(|chain| covers(chain, gap)) else {
            self.nobody(now, place, effects);
            return;
        };
        self.gaps.remove(place);
        // Who takes a seat later computes what is replayed to it.
        let shared = if self.attempt == 0 { self.shared_max() } else { 0 };
        for hop in chain {
            let id = SeatId(self.seats_opened);
            self.seats_opened = self.seats_opened.wrapping_add(1);
            self.seats.push(Seated {
                id,
                hop,
                state: State::Opening { since: now },
                fresh: true,
                shared: 0,
                earliest: 0,
                answered: true,
            });
            effects.push(Effect::Open { seat: id, hop, shared });
        }
        self.seats.sort_by_key(|seat| seat.hop.range.first);
    }

    /// Nobody takes a gap: wait for somebody, or give up.
    fn nobody(&mut self, now: Instant, place: usize, effects: &mut Vec<Effect>) {
        let begun = self.attempt > 0;
        let Some(gap) = self.gaps.get_mut(place) else { return };
        if begun && now < gap.since + self.limits.vacant {
            gap.look_at = Some(now + self.limits.look_again);
            return;
        }
        let BlockRange { first, end } = gap.range;
        let last = if self.loss_last.is_empty() {
            String::new()
        } else {
            format!("; last, {}", self.loss_last)
        };
        self.give_up(
            &format!("no chain of nodes serves the blocks {first} to {end}{last}"),
            effects,
        );
    }

    fn said(&mut self, now: Instant, id: SeatId, message: FromSeat, effects: &mut Vec<Effect>) {
        let Some(place) = self.seats.iter().position(|seat| seat.id == id) else {
            return;
        };
        let last = place + 1 == self.seats.len();
        let Some(seat) = self.seats.get_mut(place) else { return };
        seat.answered = true;
        self.heard_at = now;
        match message {
            FromSeat::Opened { positions, earliest } => {
                if matches!(seat.state, State::Opening { .. }) {
                    seat.state = State::Open;
                    (seat.shared, seat.earliest) = (positions, earliest);
                    self.assembled(now, effects);
                }
            }
            FromSeat::Wired { attempt } => {
                if attempt == self.attempt && self.phase == Phase::Wiring && seat.state == State::Open {
                    seat.state = State::Wired;
                    if self.seats.iter().all(|seat| seat.state == State::Wired) {
                        self.go_on(effects);
                    }
                }
            }
            FromSeat::Replayed { attempt } => {
                if attempt == self.attempt && self.phase == Phase::Replaying && seat.fresh {
                    seat.fresh = false;
                    self.go_on(effects);
                }
            }
            FromSeat::NextLost { attempt, reason } => {
                let next = (place + 1) % self.seats.len().max(1);
                if attempt == self.attempt
                    && let Some(next) = self.seats.get(next)
                {
                    let id = next.id;
                    self.lost(now, id, &reason, effects);
                }
            }
            FromSeat::Refused { reason } => self.lost(now, id, &reason, effects),
            FromSeat::Token {
                attempt,
                position,
                chosen,
                alternatives,
            } => {
                let expected = u32::try_from(self.tokens.len()) == Ok(position);
                if last && expected && attempt == self.attempt && self.phase == Phase::Running {
                    self.chose(now, chosen, alternatives, effects);
                }
            }
            FromSeat::Pong => {}
        }
    }

    fn chose(&mut self, now: Instant, chosen: Likely, alternatives: Vec<Likely>, effects: &mut Vec<Effect>) {
        self.token_at = now;
        if self.request.end_tokens.contains(&chosen.token) {
            self.end(Why::EndToken, effects);
            return;
        }
        self.tokens.push(chosen.token);
        effects.push(Effect::Emit { chosen, alternatives });
        let generated = u32::try_from(self.tokens_generated()).unwrap_or(u32::MAX);
        let total = u32::try_from(self.tokens.len()).unwrap_or(u32::MAX);
        if generated >= self.request.tokens_max || total >= self.request.context_tokens_max {
            self.end(Why::Length, effects);
        }
    }

    fn lost(&mut self, now: Instant, id: SeatId, reason: &str, effects: &mut Vec<Effect>) {
        let Some(place) = self.seats.iter().position(|seat| seat.id == id) else {
            return;
        };
        let seat = self.seats.remove(place);
        effects.push(Effect::Close { seat: id });
        self.losses += 1;
        self.loss_last = format!("node {}: {reason}", seat.hop.node.short());
        if self.losses > self.limits.losses_max {
            let reason = format!("{} stages were lost; last, {}", self.losses, self.loss_last);
            self.give_up(&reason, effects);
            return;
        }
        self.excluded.insert(seat.hop.node);
        self.phase = Phase::Assembling;
        self.asked_at = None;
        self.open_gap(now, seat.hop.range, effects);
    }

    /// Adds a gap, joined with its neighbours, and asks for stages.
    fn open_gap(&mut self, now: Instant, range: BlockRange, effects: &mut Vec<Effect>) {
        let mut joined = range;
        let mut since = now;
        self.gaps.retain(|gap| {
            let touches = gap.range.end == joined.first || gap.range.first == joined.end;
            if touches {
                joined.first = joined.first.min(gap.range.first);
                joined.end = joined.end.max(gap.range.end);
                since = since.min(gap.since);
            }
            !touches
        });
        self.gaps.push(Gap {
            range: joined,
            since,
            look_at: None,
        });
        effects.push(Effect::Choose {
            gap: joined,
            excluded: self.excluded.clone(),
        });
    }

    /// Once every seat is open, tells each who sits beside it.
    fn assembled(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let opening = self
            .seats
            .iter()
            .any(|seat| matches!(seat.state, State::Opening { .. }));
        if self.phase != Phase::Assembling || opening || !self.gaps.is_empty() {
            return;
        }
        self.phase = Phase::Wiring;
        self.attempt = self.attempt.saturating_add(1);
        self.heard_at = now;
        self.asked_at = None;
        let positions = self.positions_certain();
        self.tell_text(effects);
        let nodes: Vec<(NodeId, SeatId)> = self.seats.iter().map(|seat| (seat.hop.node, seat.id)).collect();
        let previous = nodes.iter().cycle().skip(nodes.len().saturating_sub(1));
        let next = nodes.iter().cycle().skip(1);
        for ((seat, (previous, _)), (next, next_seat)) in self.seats.iter_mut().zip(previous).zip(next) {
            seat.state = State::Open;
            seat.shared = seat.shared.min(positions);
            let wiring = Wiring {
                attempt: self.attempt,
                positions,
                previous: *previous,
                next: *next,
                next_seat: *next_seat,
            };
            effects.push(Effect::Send {
                seat: seat.id,
                message: ToSeat::Wire(wiring),
            });
        }
    }

    /// Tells the last seat the text so far, before it is wired: the stream keeps the order, so it knows the text when
    /// the first hidden states come.
    fn tell_text(&self, effects: &mut Vec<Effect>) {
        let Some(seat) = self.seats.last().filter(|_| self.request.looks_back) else {
            return;
        };
        let mut position = 0u32;
        for chunk in self.tokens.chunks(TOKENS_PER_MESSAGE_MAX) {
            let tokens = chunk.to_vec();
            let message = ToSeat::Text { position, tokens };
            effects.push(Effect::Send { seat: seat.id, message });
            position = position.saturating_add(u32::try_from(chunk.len()).unwrap_or(u32::MAX));
        }
    }

    /// The most of the prompt that may be taken over: the last token is computed, so that another can be chosen.
    fn shared_max(&self) -> u32 {
        let prompt = u32::try_from(self.request.prompt.len()).unwrap_or(u32::MAX);
        self.request.shared.min(prompt.saturating_sub(1))
    }

    /// Positions of the earlier session that every seat has and can go on from.
    fn positions_shared(&self) -> u32 {
        let least = self.seats.iter().map(|seat| seat.shared).min().unwrap_or(0);
        let least = least.min(self.shared_max());
        match self.seats.iter().all(|seat| seat.earliest <= least) {
            true => least,
            false => 0,
        }
    }

    /// Positions that every stage has computed: the last token was chosen from the one before it.
    fn positions_certain(&self) -> u32 {
        match self.tokens_generated() {
            0 => self.positions_shared(),
            _ => u32::try_from(self.tokens.len()).unwrap_or(u32::MAX).saturating_sub(1),
        }
    }

    /// Replays to the first seat that needs it; if none does, runs.
    fn go_on(&mut self, effects: &mut Vec<Effect>) {
        let certain = self.positions_certain();
        if self.tokens_generated() == 0 {
            // What one lacks, none of them uses.
            self.seats.iter_mut().for_each(|seat| seat.fresh = false);
            self.reused = certain;
        }
        let attempt = self.attempt;
        let fresh = self.seats.iter().position(|seat| seat.fresh);
        self.phase = if fresh.is_some() {
            Phase::Replaying
        } else {
            Phase::Running
        };
        match fresh {
            None => self.send_tokens(certain, None, false, effects),
            Some(0) => self.send_tokens(0, Some(certain), true, effects),
            Some(place) => {
                if let Some(upstream) = place.checked_sub(1).and_then(|place| self.seats.get(place)) {
                    effects.push(Effect::Send {
                        seat: upstream.id,
                        message: ToSeat::Replay {
                            attempt,
                            positions: certain,
                        },
                    });
                }
            }
        }
    }

    /// Sends the tokens of the positions `[first, end)` to the first seat.
    fn send_tokens(&self, first: u32, end: Option<u32>, replay: bool, effects: &mut Vec<Effect>) {
        let Some(seat) = self.seats.first().map(|seat| seat.id) else {
            return;
        };
        let start = usize::try_from(first).unwrap_or(usize::MAX);
        let end = end
            .and_then(|end| usize::try_from(end).ok())
            .unwrap_or(self.tokens.len());
        let tokens = self.tokens.get(start..end).unwrap_or_default();
        let mut position = first;
        let mut chunks = tokens.chunks(TOKENS_PER_MESSAGE_MAX).peekable();
        while let Some(chunk) = chunks.next() {
            let message = ToSeat::Tokens {
                attempt: self.attempt,
                position,
                tokens: chunk.to_vec(),
                more: chunks.peek().is_some(),
                replay,
            };
            effects.push(Effect::Send { seat, message });
            position = position.saturating_add(u32::try_from(chunk.len()).unwrap_or(u32::MAX));
        }
    }

    fn wake(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        if now >= self.token_at + self.limits.patience {
            self.give_up("no token came for too long", effects);
            return;
        }
        let mut look = Vec::new();
        for gap in &mut self.gaps {
            if gap.look_at.is_some_and(|at| now >= at) {
                gap.look_at = None;
                look.push(gap.range);
            }
        }
        if !look.is_empty() {
            // Whoever was lost may be back.
            self.excluded.clear();
        }
        let excluded = BTreeSet::new();
        effects.extend(look.into_iter().map(|gap| Effect::Choose {
            gap,
            excluded: excluded.clone(),
        }));
        let mut silent: Vec<SeatId> = Vec::new();
        for seat in &self.seats {
            if matches!(seat.state, State::Opening { since } if now >= since + self.limits.opening) {
                silent.push(seat.id);
            }
        }
        match (self.phase, self.asked_at) {
            (Phase::Assembling | Phase::Ended, _) => {}
            (_, Some(asked_at)) if now >= asked_at + self.limits.pong => {
                self.asked_at = None;
                self.heard_at = now;
                silent.extend(self.seats.iter().filter(|seat| !seat.answered).map(|seat| seat.id));
            }
            (_, None) if now >= self.heard_at + self.limits.quiet => {
                self.asked_at = Some(now);
                for seat in &mut self.seats {
                    seat.answered = false;
                    effects.push(Effect::Send {
                        seat: seat.id,
                        message: ToSeat::Ping,
                    });
                }
            }
            (_, Some(_) | None) => {}
        }
        for id in silent {
            self.lost(now, id, "it does not answer", effects);
        }
    }

    fn give_up(&mut self, reason: &str, effects: &mut Vec<Effect>) {
        let reason = reason.into();
        self.end(Why::GaveUp { reason }, effects);
    }

    fn end(&mut self, why: Why, effects: &mut Vec<Effect>) {
        if self.phase != Phase::Ended {
            self.phase = Phase::Ended;
            effects.push(Effect::Done(why));
        }
    }
}

/// Whether `chain` leads from the first block of `gap` to its end.
fn covers(chain: &[Hop], gap: BlockRange) -> bool {
    let mut at = gap.first;
    for hop in chain {
        if hop.range.first != at || hop.range.end <= at {
            return false;
        }
        at = hop.range.end;
    }
    at == gap.end
}
