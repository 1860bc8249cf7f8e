//! Serving: what gateways, stages and directories hear.

use polder_protocol::charter::Capabilities;
use polder_protocol::directory::{Announcement, Directory, Page, PageRequest, Standing};
use polder_protocol::epoch::Epoch;
use polder_protocol::hash::{EpochId, FederationId, InstitutionId, NodeId};
use polder_protocol::identity::Signed;
use polder_protocol::layout::BlockRange;
use polder_protocol::route::Hop;
use polder_protocol::session::{
    self, Computed, Effect, Feed, FromSeat, Generation, Input, Limits, Opening, Request, Seat, SeatEffect, SeatId,
    SeatInput, SeatRequest, SessionId, ToSeat,
};
use polder_protocol::time::{Instant, Span, UnixSeconds};
use polder_protocol::work::{Likely, Sampling};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{byte, each};

const BLOCKS: u32 = 4;
const HIDDEN: u32 = 2;
const CONTEXT_TOKENS: u32 = 600;

/// The kind of message, then its bytes.
pub(crate) fn session_messages(bytes: &[u8]) {
    let (kind, bytes) = byte(bytes);
    match kind % 5 {
        0 => reads_what_it_writes::<Opening>(bytes),
        1 => reads_what_it_writes::<ToSeat>(bytes),
        2 => reads_what_it_writes::<FromSeat>(bytes),
        3 => reads_what_it_writes::<Feed>(bytes),
        _ => {
            let _ = Epoch::from_bytes(bytes);
        }
    }
}

// Bytes are compared, since a message may hold a number that is not equal to itself.
fn reads_what_it_writes<T: Serialize + DeserializeOwned>(bytes: &[u8]) {
    if let Ok(message) = session::decode::<T>(bytes) {
        let written = session::encode(&message);
        let again: T = session::decode(&written).expect("what is written can be read");
        assert_eq!(session::encode(&again), written);
    }
}

/// What happens to the seat of [`seat`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum SeatEvent {
    /// Its gateway says this.
    Told(ToSeat),
    /// A peer sends this, with so many bytes.
    Fed(u8, Feed, u16),
    /// The device has computed what it was given.
    Computed,
}

/// The kind of stage, then what its gateway and its neighbours say.
pub(crate) fn seat(bytes: &[u8]) {
    let (kind, bytes) = byte(bytes);
    let ranges = [(0, BLOCKS), (0, 2), (1, 3), (2, BLOCKS)];
    let (first, end) = ranges[usize::from(kind) % ranges.len()];
    let range = BlockRange { first, end };
    let request = SeatRequest {
        session: SessionId([1; 16]),
        seat: SeatId(1),
        epoch: EpochId([2; 32]),
        range,
        context_tokens_max: CONTEXT_TOKENS,
        sampling: Sampling {
            presence_penalty: 0.5,
            ..Sampling::GREEDY
        },
        grammar: None,
        prompt_tokens: 3,
        end_tokens: vec![3],
        earlier: None,
        keep: false,
    };
    let mut seat = Seat::new(&request, BLOCKS, HIDDEN);
    let mut computing = None;
    each(bytes, |event: SeatEvent| {
        let input = match event {
            SeatEvent::Told(message) => SeatInput::Told(message),
            SeatEvent::Fed(from, feed, payload_bytes) => SeatInput::Fed {
                from: node(from),
                feed,
                payload: vec![1; payload_bytes.into()],
            },
            SeatEvent::Computed => match computing.take() {
                Some(rows) if !range.has_head(BLOCKS) => {
                    SeatInput::Computed(Computed::Hidden(vec![1; rows * HIDDEN as usize * 4]))
                }
                Some(_) => SeatInput::Computed(Computed::Token {
                    chosen: Likely {
                        token: 5,
                        log_probability: -1.0,
                    },
                    alternatives: Vec::new(),
                }),
                None => return,
            },
        };
        let mut effects = Vec::new();
        seat.step(input, &mut effects);
        for effect in effects {
            if let SeatEffect::Compute {
                position,
                tokens,
                payload,
                written,
            } = effect
            {
                assert!(written.len() <= CONTEXT_TOKENS as usize);
                let rows = tokens.len() + payload.len() / (HIDDEN as usize * 4);
                assert!(computing.is_none(), "one piece at a time");
                assert!(rows > 0 && position as usize + rows <= CONTEXT_TOKENS as usize);
                computing = Some(rows);
            }
        }
    });
}

/// What happens to the generation of [`generation`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum GenerationEvent {
    /// A seat says this.
    Said(u16, FromSeat),
    /// A stream ends.
    Lost(u16),
    /// So many milliseconds pass.
    Wait(u16),
}

/// A gateway whose seats say whatever the input makes them say.
pub(crate) fn generation(bytes: &[u8]) {
    let request = Request {
        prompt: vec![1, 2, 3],
        tokens_max: 8,
        context_tokens_max: 64,
        end_tokens: vec![7],
        blocks: BLOCKS,
        looks_back: true,
        shared: 2,
    };
    let mut now = Instant(0);
    let mut effects = Vec::new();
    let mut generation = Generation::begin(now, request, Limits::default(), &mut effects);
    let mut stages = 0;
    serve(&mut generation, now, effects, &mut stages);
    each(bytes, |event: GenerationEvent| {
        let input = match event {
            GenerationEvent::Said(seat, message) => Input::Said {
                seat: SeatId(seat),
                message,
            },
            GenerationEvent::Lost(seat) => Input::Lost {
                seat: SeatId(seat),
                reason: "fuzz".into(),
            },
            GenerationEvent::Wait(milliseconds) => {
                now = now + Span::millis(milliseconds.into());
                Input::Wake
            }
        };
        let mut effects = Vec::new();
        generation.step(now, input, &mut effects);
        serve(&mut generation, now, effects, &mut stages);
        assert!(generation.tokens_generated() <= 8, "no more than was asked for");
    });
}

/// Answers every wish for a chain with two stages.
fn serve(generation: &mut Generation, now: Instant, effects: Vec<Effect>, stages: &mut u8) {
    for effect in effects {
        let Effect::Choose { gap, .. } = effect else { continue };
        let middle = gap.first.midpoint(gap.end);
        let halves = [(gap.first, middle), (middle, gap.end)];
        let chain = halves
            .into_iter()
            .filter(|(first, end)| first < end)
            .map(|(first, end)| {
                *stages = stages.wrapping_add(1);
                Hop {
                    node: node(*stages),
                    range: BlockRange { first, end },
                }
            });
        let chain = Some(chain.collect());
        let mut more = Vec::new();
        generation.step(now, Input::Chosen { gap, chain }, &mut more);
        serve(generation, now, more, stages);
    }
}

/// Announcements, each with its length before it, then questions for pages.
pub(crate) fn directory(bytes: &[u8]) {
    let federation = FederationId([7; 32]);
    let mut directory = Directory::new(federation);
    let mut now = UnixSeconds(1_800_000_000);
    let standing = Standing {
        institution: InstitutionId([1; 32]),
        capabilities: Capabilities::ALL,
    };
    each(bytes, |announced: Vec<u8>| {
        now = UnixSeconds(now.0 + 1);
        if let Ok(request) = session::decode::<PageRequest>(&announced) {
            let _ = directory.page(request);
        }
        if let Ok(page) = session::decode::<Page>(&announced) {
            assert_eq!(session::decode(&session::encode(&page)), Ok(page));
        }
        if let Ok(signed) = Signed::<Announcement>::from_bytes(&announced) {
            // Nobody can forge a signature, so the claim is signed anew.
            let claim = signed.claim();
            let _ = directory.insert(now, signed, |_, _| Some(standing));
            if let Some(mut claim) = claim {
                let key = polder_protocol::identity::KeyPair::from_seed(&[claim.node.0[0]; 32]);
                claim.node = key.node();
                claim.federation = federation;
                claim.version = 1;
                let _ = directory.insert(now, Signed::new(&key, &claim), |_, _| Some(standing));
            }
        }
        let epochs = directory.epochs();
        assert!(epochs.iter().all(|known| !known.holders.is_empty()));
        directory.expire(now);
    });
}

fn node(number: u8) -> NodeId {
    NodeId([number; 32])
}
