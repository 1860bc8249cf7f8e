//! Whole sessions in memory: seats that compute a hash of everything before, a gateway, and losses at any moment.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec;
use alloc::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::hash::{EpochId, InstitutionId, NodeId, digest};
use crate::layout::BlockRange;
use crate::rng::Random;
use crate::route::{self, Hop, Offer, RoutePolicy};
use crate::time::{Instant, Span};
use crate::work::{Likely, Sampling};

const BLOCKS: u32 = 6;
const NEW_TOKENS: u32 = 24;

#[test]
fn a_chain_of_one_gives_the_same_text_as_a_chain_of_three() {
    let one = World::new(vec![offer(1, 0, 6)], 1).run();
    let three = World::new(vec![offer(1, 0, 2), offer(2, 2, 4), offer(3, 4, 6)], 1).run();
    assert_eq!(one.len(), 24);
    assert_eq!(one, three);
}

#[test]
fn a_prompt_longer_than_the_context_is_refused_at_once() {
    let mut effects = Vec::new();
    let request = Request {
        prompt: vec![1; 10],
        tokens_max: 4,
        context_tokens_max: 10,
        end_tokens: Vec::new(),
        blocks: 2,
        looks_back: false,
        shared: 0,
    };
    Generation::begin(Instant(0), request, Limits::default(), &mut effects);
    assert!(matches!(&effects[..], [Effect::Done(Why::GaveUp { reason })] if reason.contains("10 tokens")));
}

#[test]
fn without_a_chain_it_gives_up_and_names_the_blocks() {
    let mut world = World::new(vec![offer(1, 0, 2), offer(3, 4, 6)], 1);
    world.run();
    assert!(matches!(&world.done, Some(Why::GaveUp { reason }) if reason.contains("blocks 0 to 6")));
}

#[test]
fn a_lost_stage_that_comes_back_takes_its_seat_again() {
    let mut world = World::new(vec![offer(1, 0, 3), offer(2, 3, 6)], 1);
    let undisturbed = World::new(vec![offer(1, 0, 6)], 1).run();
    world.losses = vec![(40, 2)];
    world.returns = true;
    assert_eq!(world.run(), undisturbed);
    assert!(world.lost > 0);
}

#[test]
fn a_second_turn_computes_only_what_is_new() {
    let mut world = World::new(vec![offer(1, 0, 2), offer(2, 2, 4), offer(3, 4, 6)], 1);
    let (first, second) = world.two_turns(|_| ());
    assert_eq!((first.reused, second.reused), (0, 28));
    assert_eq!(second.text, second.alone);
}

#[test]
fn what_one_stage_has_lost_none_of_them_uses() {
    for lost in 1..=3 {
        let mut world = World::new(vec![offer(1, 0, 2), offer(2, 2, 4), offer(3, 4, 6)], 1);
        let (_, second) = world.two_turns(|world| world.kept.retain(|(node, _), _| *node != NodeId([lost; 32])));
        assert_eq!((second.reused, second.text), (0, second.alone), "without {lost}");
    }
}

#[test]
fn the_least_that_a_stage_has_is_what_all_use() {
    for (kept, earliest, reused) in [(9, 0, 9), (9, 4, 9), (9, 20, 0), (0, 0, 0)] {
        let mut world = World::new(vec![offer(1, 0, 2), offer(2, 2, 4), offer(3, 4, 6)], 1);
        world.earliest = earliest;
        let (_, second) = world.two_turns(|world| {
            let past = world.kept.iter_mut().find(|((node, _), _)| *node == NodeId([2; 32]));
            past.unwrap().1.1.truncate(kept);
        });
        assert_eq!(
            (second.reused, second.text),
            (reused, second.alone),
            "{kept} {earliest}"
        );
    }
}

/// What came of a replay is not heard of any more, since the stage before is lost at that moment.
#[test]
fn a_stage_that_was_replayed_to_says_so_again_when_the_one_before_it_is_lost_meanwhile() {
    let offers = vec![
        offer(1, 0, 2),
        offer(2, 2, 4),
        offer(3, 4, 6),
        offer(4, 0, 2),
        offer(5, 2, 4),
        offer(6, 4, 6),
    ];
    let mut world = World::new(offers, 0);
    world.returns = true;
    let (_, second) = world.two_turns(|world| world.losses = vec![(20, 2), (34, 1)]);
    assert_eq!(second.text, second.alone);
    assert_eq!(world.lost, 2);
}

proptest! {
    #[test]
    fn a_second_turn_is_the_same_whatever_was_lost_before_and_meanwhile(
        seed: u64,
        forgotten in proptest::collection::vec((1u8..10, 0usize..40), 0..4),
        losses in proptest::collection::vec((0u64..400, 1u8..10), 0..4),
    ) {
        let offers = vec![
            offer(1, 0, 2), offer(2, 2, 4), offer(3, 4, 6),
            offer(4, 0, 2), offer(5, 2, 4), offer(6, 4, 6),
        ];
        let mut world = World::new(offers, seed);
        world.returns = true;
        let (_, second) = world.two_turns(|world| {
            world.losses = losses;
            for (node, left) in forgotten {
                for ((holder, _), (_, past)) in &mut world.kept {
                    if *holder == NodeId([node; 32]) {
                        past.truncate(left);
                    }
                }
            }
        });
        prop_assert_eq!(second.text, second.alone);
    }

    #[test]
    fn the_text_is_the_same_whichever_stages_are_lost_whenever(
        seed: u64,
        losses in proptest::collection::vec((0u64..400, 1u8..10), 0..4),
    ) {
        // Three replicas of each stage, split in two ways: at most four are lost, but a stage can lose all of its own.
        let offers = vec![
            offer(1, 0, 2), offer(2, 2, 4), offer(3, 4, 6),
            offer(4, 0, 2), offer(5, 2, 4), offer(6, 4, 6),
            offer(7, 0, 2), offer(8, 2, 6), offer(9, 4, 6),
        ];
        let undisturbed = World::new(offers.clone(), 0).run();
        let mut world = World::new(offers, seed);
        world.losses = losses;
        world.returns = true;
        prop_assert_eq!(world.run(), undisturbed);
        prop_assert_eq!(world.done, Some(Why::Length));
    }
}

/// Nodes, messages under way, and a gateway.
struct World {
    now: Instant,
    offers: Vec<Offer>,
    seats: BTreeMap<(NodeId, SeatId), Fake>,
    homes: BTreeMap<SeatId, NodeId>,
    // Messages wait in one queue for each pair, so that they stay in order; which pair is next is random.
    wires: BTreeMap<(NodeId, NodeId, u8), VecDeque<Mail>>,
    random: Random,
    losses: Vec<(u64, u8)>,
    returns: bool,
    lost: u32,
    text: Vec<u32>,
    done: Option<Why>,
    prompt: Vec<u32>,
    shared: u32,
    reused: u32,
    kept: BTreeMap<(NodeId, BlockRange), Kept>,
    earliest: u32,
}

/// What a seat of an ended session had.
type Kept = (Journal, Vec<[u8; 4]>);

/// What came of one turn, and what comes of it without an earlier one.
struct Turn {
    text: Vec<u32>,
    alone: Vec<u32>,
    reused: u32,
}

struct Fake {
    machine: Seat,
    range: BlockRange,
    past: Vec<[u8; 4]>,
}

enum Mail {
    Open(SeatRequest),
    Told(SeatId, ToSeat),
    Said(SeatId, FromSeat),
    Fed(SeatId, Feed, Vec<u8>),
    Computed(SeatId, Computed),
}

const GATEWAY: NodeId = NodeId([0; 32]);

impl World {
    fn new(offers: Vec<Offer>, seed: u64) -> Self {
        Self {
            now: Instant(0),
            offers,
            seats: BTreeMap::new(),
            homes: BTreeMap::new(),
            wires: BTreeMap::new(),
            random: Random::from_seed(seed),
            losses: Vec::new(),
            returns: false,
            lost: 0,
            text: Vec::new(),
            done: None,
            prompt: vec![3, 1, 4, 1, 5],
            shared: 0,
            reused: 0,
            kept: BTreeMap::new(),
            earliest: 0,
        }
    }

    /// A question, something that happens to the world, and a question that goes on from the answer.
    fn two_turns(&mut self, between: impl FnOnce(&mut Self)) -> (Turn, Turn) {
        let whole = vec![offer(1, 0, 6)];
        let text = self.run();
        let first = Turn {
            alone: text.clone(),
            text,
            reused: self.reused,
        };
        for ((node, _), fake) in core::mem::take(&mut self.seats) {
            self.kept
                .insert((node, fake.range), (fake.machine.into_journal(), fake.past));
        }
        self.homes.clear();
        self.wires.clear();
        between(self);
        self.done = None;
        let answer = core::mem::take(&mut self.text);
        let said = [&self.prompt[..], &answer[..]].concat();
        self.shared = u32::try_from(said.len()).unwrap();
        self.prompt = [&said[..], &[9, 2, 6]].concat();
        let mut alone = World::new(whole, 0);
        alone.prompt = self.prompt.clone();
        let second = Turn {
            text: self.run(),
            alone: alone.run(),
            reused: self.reused,
        };
        (first, second)
    }

    fn run(&mut self) -> Vec<u32> {
        let request = Request {
            prompt: self.prompt.clone(),
            tokens_max: NEW_TOKENS,
            context_tokens_max: 64,
            end_tokens: Vec::new(),
            blocks: BLOCKS,
            looks_back: true,
            shared: self.shared,
        };
        let mut effects = Vec::new();
        let mut gateway = Generation::begin(self.now, request, Limits::default(), &mut effects);
        self.perform(&mut gateway, effects);
        for step in 0..20_000u64 {
            if self.done.is_some() {
                break;
            }
            for (at, node) in self.losses.clone() {
                if at == step {
                    self.lose(&mut gateway, NodeId([node; 32]));
                }
            }
            let ways = self.wires.len() as u64;
            let way = usize::try_from(self.random.below(ways)).unwrap();
            let Some(key) = self.wires.keys().nth(way).copied() else {
                let Some(wake_at) = gateway.wake_at() else { break };
                self.now = self.now.max(wake_at);
                let mut effects = Vec::new();
                gateway.step(self.now, Input::Wake, &mut effects);
                self.perform(&mut gateway, effects);
                continue;
            };
            self.now = self.now + Span::millis(1);
            let queue = self.wires.get_mut(&key).unwrap();
            let mail = queue.pop_front().unwrap();
            if queue.is_empty() {
                self.wires.remove(&key);
            }
            self.deliver(&mut gateway, key.0, key.1, mail);
        }
        self.reused = gateway.tokens_reused();
        self.text.clone()
    }

    /// A node dies with its seats and what is under way to it; the gateway sees its streams end.
    fn lose(&mut self, gateway: &mut Generation, node: NodeId) {
        self.wires.retain(|(from, to, _), _| *from != node && *to != node);
        self.seats.retain(|(holder, _), _| *holder != node);
        if !self.returns {
            self.offers.retain(|offer| offer.node != node);
        }
        let seats: Vec<SeatId> = self
            .homes
            .iter()
            .filter(|(_, home)| **home == node)
            .map(|(seat, _)| *seat)
            .collect();
        for seat in seats {
            self.homes.remove(&seat);
            self.lost += 1;
            let mut effects = Vec::new();
            let reason = "killed".into();
            gateway.step(self.now, Input::Lost { seat, reason }, &mut effects);
            self.perform(gateway, effects);
        }
    }

    fn perform(&mut self, gateway: &mut Generation, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Choose { gap, excluded } => {
                    let chain = route::choose(&self.offers, gap, BLOCKS, &RoutePolicy::default(), &excluded);
                    let mut effects = Vec::new();
                    gateway.step(self.now, Input::Chosen { gap, chain }, &mut effects);
                    self.perform(gateway, effects);
                }
                Effect::Open {
                    seat,
                    hop: Hop { node, range },
                    shared,
                } => {
                    self.homes.insert(seat, node);
                    let request = SeatRequest {
                        session: SessionId([0; 16]),
                        seat,
                        epoch: EpochId([0; 32]),
                        range,
                        context_tokens_max: 64,
                        sampling: Sampling {
                            presence_penalty: 0.5,
                            ..Sampling::GREEDY
                        },
                        grammar: None,
                        prompt_tokens: 0,
                        end_tokens: Vec::new(),
                        earlier: Some(Earlier {
                            session: SessionId([0; 16]),
                            positions: shared,
                        }),
                        keep: true,
                    };
                    self.post(GATEWAY, node, 0, Mail::Open(request));
                }
                Effect::Send { seat, message } => {
                    if let Some(node) = self.homes.get(&seat).copied() {
                        self.post(GATEWAY, node, 0, Mail::Told(seat, message));
                    }
                }
                Effect::Close { seat } => {
                    self.homes.remove(&seat);
                    self.seats.retain(|(_, id), _| *id != seat);
                }
                Effect::Emit { chosen, .. } => self.text.push(chosen.token),
                Effect::Done(why) => self.done = Some(why),
            }
        }
    }

    fn post(&mut self, from: NodeId, to: NodeId, lane: u8, mail: Mail) {
        self.wires.entry((from, to, lane)).or_default().push_back(mail);
    }

    fn deliver(&mut self, gateway: &mut Generation, from: NodeId, to: NodeId, mail: Mail) {
        let (seat, input) = match mail {
            Mail::Open(request) => {
                let mut fake = Fake {
                    machine: Seat::new(&request, BLOCKS, 1),
                    range: request.range,
                    past: Vec::new(),
                };
                let mut positions = 0;
                if let (Some(earlier), Some((journal, past))) =
                    (request.earlier, self.kept.remove(&(to, request.range)))
                {
                    let held = u32::try_from(past.len()).unwrap().min(earlier.positions);
                    positions = fake.machine.go_on_from(journal, held);
                    fake.past = past;
                    fake.past.truncate(usize::try_from(positions).unwrap());
                }
                self.seats.insert((to, request.seat), fake);
                let earliest = self.earliest.min(positions);
                let opened = FromSeat::Opened { positions, earliest };
                self.post(to, GATEWAY, 0, Mail::Said(request.seat, opened));
                return;
            }
            Mail::Said(seat, message) => {
                let mut effects = Vec::new();
                gateway.step(self.now, Input::Said { seat, message }, &mut effects);
                self.perform(gateway, effects);
                return;
            }
            Mail::Told(seat, ToSeat::Ping) => {
                self.post(to, GATEWAY, 0, Mail::Said(seat, FromSeat::Pong));
                return;
            }
            Mail::Told(seat, message) => (seat, SeatInput::Told(message)),
            Mail::Fed(seat, feed, payload) => (seat, SeatInput::Fed { from, feed, payload }),
            Mail::Computed(seat, computed) => (seat, SeatInput::Computed(computed)),
        };
        let Some(fake) = self.seats.get_mut(&(to, seat)) else {
            return;
        };
        let mut effects = Vec::new();
        fake.machine.step(input, &mut effects);
        let mut posts = Vec::new();
        for effect in effects {
            match effect {
                SeatEffect::Compute {
                    position,
                    tokens,
                    payload,
                    written,
                } => {
                    let computed = fake.compute(position, &tokens, &payload, &written);
                    posts.push((to, 1, Mail::Computed(seat, computed)));
                }
                SeatEffect::Say(message) => posts.push((GATEWAY, 0, Mail::Said(seat, message))),
                SeatEffect::Feed {
                    to,
                    seat,
                    feed,
                    payload,
                    ..
                } => posts.push((to, 2, Mail::Fed(seat, feed, payload))),
            }
        }
        for (target, lane, mail) in posts {
            self.post(to, target, lane, mail);
        }
    }
}

impl Fake {
    /// Each block turns a row into a hash of it and of all rows before it. The token also depends on the whole text.
    fn compute(&mut self, position: u32, tokens: &[u32], payload: &[u8], written: &[u32]) -> Computed {
        let position = usize::try_from(position).unwrap();
        assert!(position <= self.past.len(), "a gap in the cache");
        self.past.truncate(position);
        let (rows, _) = payload.as_chunks::<4>();
        self.past.extend(rows);
        self.past.extend(tokens.iter().map(|token| token.to_le_bytes()));
        let outputs = (position..self.past.len()).map(|row| {
            let mut past = self.past[..=row].to_vec();
            for _ in self.range.first..self.range.end {
                let mut before = Vec::new();
                for row in &mut past {
                    before.extend(*row);
                    let [a, b, c, d, ..] = digest(&before).0;
                    *row = [a, b, c, d];
                }
            }
            past[row]
        });
        let outputs: Vec<[u8; 4]> = outputs.collect();
        if self.range.end == BLOCKS {
            let mut all = outputs.last().unwrap().to_vec();
            all.extend(written.iter().flat_map(|token| token.to_le_bytes()));
            let [a, b, c, d, ..] = digest(&all).0;
            Computed::Token {
                chosen: Likely {
                    token: u32::from_le_bytes([a, b, c, d]) % 1000,
                    log_probability: 0.0,
                },
                alternatives: Vec::new(),
            }
        } else {
            Computed::Hidden(outputs.concat())
        }
    }
}

fn offer(id: u8, first: u32, end: u32) -> Offer {
    Offer {
        node: NodeId([id; 32]),
        institution: InstitutionId([id; 32]),
        range: BlockRange { first, end },
        token_micros: 1_000,
        latency_micros: u32::from(id),
        sessions_free: 1,
    }
}

#[test]
fn nobody_else_can_feed_a_seat() {
    let mut world = World::new(vec![offer(1, 0, 3), offer(2, 3, 6)], 1);
    let undisturbed = World::new(vec![offer(1, 0, 3), offer(2, 3, 6)], 1).run();
    let feed = Feed::Token {
        attempt: 1,
        position: 5,
        token: 999,
    };
    world.post(
        NodeId([9; 32]),
        NodeId([1; 32]),
        2,
        Mail::Fed(SeatId(0), feed, Vec::new()),
    );
    assert_eq!(world.run(), undisturbed);
}
