//! Decides which chunk of a blob to ask of which source.
//!
//! Rarest chunks first, ties broken by a seed so that nodes which start together do not all ask for the same chunk;
//! at most a few requests at a time for each source; chunks are taken back from sources that are slow or silent; near
//! the end, idle sources are asked for chunks that others still owe. A source that sends a wrong chunk is banned.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec;
use alloc::vec::Vec;

use super::chunks::ChunkSet;
use crate::hash::NodeId;
use crate::time::{Instant, Span};

/// What bounds a fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sources kept at once; more are not listened to.
    pub sources_max: usize,
    /// Requests in flight at one source.
    pub in_flight_max: usize,
    /// Requests in flight at all sources together.
    pub in_flight_all_max: usize,
    /// A source is asked for what it sends in so long at its own pace, within `in_flight_max`, and for two chunks at
    /// least: a fast one is kept busy, and of a slow one little has to be taken back.
    pub ahead: Span,
    /// How long a chunk may take before others are asked for it, unless the source's own pace allows longer.
    pub patience: Span,
    /// A source that owes chunks and has sent no byte for so long is dropped.
    pub silence: Span,
    /// With nothing else left to ask for, a chunk owed for so long is asked of a second source.
    pub end_game: Span,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // Beyond this many sources a fetch does not get faster, only its bookkeeping larger.
            sources_max: 64,
            // 16 MiB in flight fill 1 Gbit/s at 128 ms.
            in_flight_max: 16,
            in_flight_all_max: 64,
            ahead: Span::millis(800),
            // Twice what a chunk takes at 4 Mbit/s.
            patience: Span::seconds(4),
            // A lost packet costs less than a second, a phone's handover ten.
            silence: Span::seconds(10),
            // A few round trips between continents.
            end_game: Span::millis(400),
        }
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A source joined, or said anew what it has.
    Source {
        /// Who.
        source: NodeId,
        /// What it has.
        has: ChunkSet,
    },
    /// A source left.
    Gone {
        /// Who.
        source: NodeId,
    },
    /// Some bytes came from a source that owes chunks.
    Progress {
        /// Who.
        source: NodeId,
    },
    /// A chunk came and was verified, and is stored.
    Arrived {
        /// From whom.
        source: NodeId,
        /// Which.
        chunk: u32,
    },
    /// What came is not the chunk.
    Wrong {
        /// From whom.
        source: NodeId,
        /// Which.
        chunk: u32,
    },
    /// The source says that it does not have the chunk after all, or broke off.
    Refused {
        /// Who.
        source: NodeId,
        /// Which.
        chunk: u32,
    },
    /// Time passed.
    Wake,
}

/// What the driver must now do, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Ask for a chunk.
    Request {
        /// Of whom.
        source: NodeId,
        /// Which.
        chunk: u32,
    },
    /// Break off a request: the chunk came from elsewhere, or will be asked for elsewhere.
    Cancel {
        /// At whom.
        source: NodeId,
        /// Which.
        chunk: u32,
    },
    /// The source has been silent for too long; it may join again.
    Drop {
        /// Who.
        source: NodeId,
    },
    /// The source lied; it is not listened to again.
    Ban {
        /// Who.
        source: NodeId,
    },
    /// Every chunk is here.
    Done,
}

/// A fetch of one blob.
///
/// A chunk is in exactly one of three places: `have`, `unasked`, or in flight at one or two sources.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    seed: u64,
    have: ChunkSet,
    // Missing chunks that nobody has been asked for: (sources that have it, tie-break, chunk).
    unasked: BTreeSet<(u32, u32, u32)>,
    // By chunk: how many sources have it.
    available: Vec<u32>,
    // By chunk: how often it was taken back from a slow source. Each time doubles the patience for it.
    taken_back: BTreeMap<u32, u32>,
    // By chunk in flight: how many sources owe it.
    copies: BTreeMap<u32, u32>,
    sources: BTreeMap<NodeId, Source>,
    banned: BTreeSet<NodeId>,
    // What was due then has been done, or waits for another input.
    stepped_at: Option<Instant>,
    done: bool,
}

#[derive(Debug)]
struct Source {
    has: ChunkSet,
    // Chunk to the time at which it was asked for.
    owes: BTreeMap<u32, Instant>,
    window: usize,
    heard_at: Instant,
    arrived_at: Option<Instant>,
    // Moving average of the time between arrivals while something is owed.
    pace: Option<Span>,
}

impl Source {
    /// Which of the chunks that it owes comes so-and-so-many-th: sources send in the order in which they were asked.
    fn place(&self, chunk: u32) -> usize {
        let asked_at = self.owes.get(&chunk).copied();
        let key = asked_at.map(|at| (at, chunk));
        let before = self
            .owes
            .iter()
            .filter(|(chunk, at)| key.is_some_and(|key| (**at, **chunk) < key));
        before.count().saturating_add(1)
    }

    /// In how many microseconds it will have sent so many chunks, at its pace.
    fn due(&self, now: Instant, chunks: usize) -> u64 {
        let pace = self.pace.map_or(0, |pace| pace.0);
        let chunks = u64::try_from(chunks).unwrap_or(u64::MAX);
        // A source that is late with its next chunk is slower than it was.
        let late = match (self.owes.is_empty(), self.arrived_at) {
            (false, Some(arrived_at)) => (now - arrived_at).0.saturating_sub(pace),
            _ => 0,
        };
        pace.max(late).saturating_mul(chunks)
    }
}

impl Scheduler {
    /// A fetch of the chunks that are not in `have`. `seed` breaks ties; give every node its own.
    pub fn new(limits: Limits, seed: u64, have: ChunkSet) -> Self {
        let chunks = have.chunks();
        Self {
            limits,
            seed,
            unasked: have.missing().map(|chunk| (0, tie_break(seed, chunk), chunk)).collect(),
            available: vec![0; usize::try_from(chunks).unwrap_or(0)],
            have,
            taken_back: BTreeMap::new(),
            copies: BTreeMap::new(),
            sources: BTreeMap::new(),
            banned: BTreeSet::new(),
            stepped_at: None,
            done: false,
        }
    }

    /// What is here.
    pub fn have(&self) -> &ChunkSet {
        &self.have
    }

    /// Sources that are listened to.
    pub fn sources(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.sources.keys().copied()
    }

    /// Whether `source` lied.
    pub fn is_banned(&self, source: NodeId) -> bool {
        self.banned.contains(&source)
    }

    /// Whether something is missing and nobody owes any of it: no present source has what is missing.
    pub fn is_starved(&self) -> bool {
        !self.done && self.copies.is_empty()
    }

    /// When to step with [`Input::Wake`], if nothing else happens first.
    pub fn wake_at(&self) -> Option<Instant> {
        if self.done {
            return None;
        }
        let end_game = self.unasked.is_empty();
        self.sources
            .values()
            .filter(|source| !source.owes.is_empty())
            .flat_map(|source| {
                let due = source.owes.iter().flat_map(move |(chunk, asked_at)| {
                    let late_at = *asked_at + self.allowed(source, *chunk);
                    let duplicate_at = end_game.then_some(*asked_at + self.limits.end_game);
                    [Some(late_at), duplicate_at].into_iter().flatten()
                });
                due.chain([source.heard_at + self.limits.silence])
            })
            // Near the end, whoever is late is looked for again and again.
            .chain(
                self.stepped_at
                    .filter(|_| end_game && !self.copies.is_empty())
                    .map(|at| at + self.limits.end_game),
            )
            .filter(|at| self.stepped_at.is_none_or(|stepped_at| *at > stepped_at))
            .min()
    }

    /// Takes one input, and appends what the caller must now do, in order.
    pub fn step(&mut self, now: Instant, input: Input, effects: &mut Vec<Effect>) {
        if self.done {
            return;
        }
        self.stepped_at = Some(now);
        match input {
            Input::Source { source, has } => self.on_source(now, source, has, effects),
            Input::Gone { source } => self.remove_source(source, effects),
            Input::Progress { source } => {
                if let Some(source) = self.sources.get_mut(&source) {
                    source.heard_at = now;
                }
            }
            Input::Arrived { source, chunk } => self.on_arrived(now, source, chunk, effects),
            Input::Wrong { source, .. } => {
                // Remembered even of one that has left, but never more than could have been asked.
                if self.banned.len() < self.limits.sources_max.saturating_mul(4) && self.banned.insert(source) {
                    self.remove_source(source, effects);
                    effects.push(Effect::Ban { source });
                }
            }
            Input::Refused { source, chunk } => self.on_refused(now, source, chunk),
            Input::Wake => {}
        }
        if self.have.is_full() {
            self.done = true;
            effects.push(Effect::Done);
            return;
        }
        self.drop_silent(now, effects);
        self.take_back_late(now, effects);
        self.ask(now, effects);
    }

    fn on_source(&mut self, now: Instant, id: NodeId, has: ChunkSet, effects: &mut Vec<Effect>) {
        let known = self.sources.contains_key(&id);
        let room = known || self.sources.len() < self.limits.sources_max;
        if !room || has.chunks() != self.have.chunks() || self.banned.contains(&id) {
            return;
        }
        let before = match self.sources.get_mut(&id) {
            Some(source) => {
                source.heard_at = now;
                core::mem::replace(&mut source.has, has.clone())
            }
            None => {
                let source = Source {
                    has: has.clone(),
                    owes: BTreeMap::new(),
                    // Two, so that the second travels while the first is checked; it grows with success.
                    window: 2.min(self.limits.in_flight_max),
                    heard_at: now,
                    arrived_at: None,
                    pace: None,
                };
                self.sources.insert(id, source);
                ChunkSet::empty(has.chunks())
            }
        };
        for chunk in 0..has.chunks() {
            match (before.contains(chunk), has.contains(chunk)) {
                (false, true) => self.set_available(chunk, |count| count.saturating_add(1)),
                (true, false) => {
                    self.set_available(chunk, |count| count.saturating_sub(1));
                    if self.forget_request(id, chunk) {
                        effects.push(Effect::Cancel { source: id, chunk });
                    }
                }
                (true, true) | (false, false) => {}
            }
        }
    }

    fn on_arrived(&mut self, now: Instant, id: NodeId, chunk: u32, effects: &mut Vec<Effect>) {
        if let Some(source) = self.sources.get_mut(&id) {
            source.heard_at = now;
            if let Some(asked_at) = source.owes.get(&chunk).copied() {
                let since = source
                    .arrived_at
                    .map_or(asked_at, |arrived_at| arrived_at.max(asked_at));
                let took = now - since;
                source.pace = Some(match source.pace {
                    Some(pace) => Span((pace.0.saturating_mul(3).saturating_add(took.0)) / 4),
                    None => took,
                });
                source.arrived_at = Some(now);
                let pace = source.pace.map_or(1, |pace| pace.0.max(1));
                let ahead = usize::try_from(self.limits.ahead.0 / pace).unwrap_or(usize::MAX);
                let most = ahead.max(2).min(self.limits.in_flight_max);
                source.window = source.window.saturating_add(1).min(most);
            }
        }
        if !self.have.insert(chunk) {
            return;
        }
        let index = usize::try_from(chunk).unwrap_or(usize::MAX);
        let available = self.available.get(index).copied().unwrap_or(0);
        self.unasked.remove(&(available, tie_break(self.seed, chunk), chunk));
        self.copies.remove(&chunk);
        self.taken_back.remove(&chunk);
        for (other, source) in &mut self.sources {
            if source.owes.remove(&chunk).is_some() && *other != id {
                effects.push(Effect::Cancel { source: *other, chunk });
            }
        }
    }

    fn on_refused(&mut self, now: Instant, id: NodeId, chunk: u32) {
        let Some(source) = self.sources.get_mut(&id) else {
            return;
        };
        source.heard_at = now;
        if source.has.remove(chunk) {
            self.set_available(chunk, |count| count.saturating_sub(1));
        }
        self.forget_request(id, chunk);
    }

    /// Forgets a source and what it owes.
    fn remove_source(&mut self, id: NodeId, effects: &mut Vec<Effect>) {
        let Some(source) = self.sources.get(&id) else { return };
        let owed: Vec<u32> = source.owes.keys().copied().collect();
        for chunk in owed {
            self.forget_request(id, chunk);
            effects.push(Effect::Cancel { source: id, chunk });
        }
        let Some(source) = self.sources.remove(&id) else { return };
        for chunk in source.has.iter() {
            self.set_available(chunk, |count| count.saturating_sub(1));
        }
    }

    fn drop_silent(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let silence = self.limits.silence;
        let silent = |source: &Source| !source.owes.is_empty() && now >= source.heard_at + silence;
        let ids: Vec<NodeId> = self
            .sources
            .iter()
            .filter(|(_, source)| silent(source))
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            self.remove_source(id, effects);
            effects.push(Effect::Drop { source: id });
        }
    }

    /// Takes late chunks back where somebody else could send them.
    fn take_back_late(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let mut late = Vec::new();
        for (id, source) in &self.sources {
            for (chunk, asked_at) in &source.owes {
                let alone = self.copies.get(chunk) == Some(&1);
                if alone && now >= *asked_at + self.allowed(source, *chunk) {
                    late.push((*id, *chunk));
                }
            }
        }
        for (id, chunk) in late {
            let Some(other) = self.another(id, chunk) else { continue };
            self.forget_request(id, chunk);
            let times = self.taken_back.entry(chunk).or_insert(0);
            *times = times.saturating_add(1);
            if let Some(source) = self.sources.get_mut(&id) {
                source.window = 1;
            }
            effects.push(Effect::Cancel { source: id, chunk });
            self.request(now, other, chunk);
            effects.push(Effect::Request { source: other, chunk });
        }
    }

    /// A source other than `id` that has `chunk` and room for a request: the one that owes least.
    fn another(&self, id: NodeId, chunk: u32) -> Option<NodeId> {
        self.sources
            .iter()
            .filter(|(other, source)| **other != id && source.has.contains(chunk) && source.owes.len() < source.window)
            .min_by_key(|(_, source)| source.owes.len())
            .map(|(other, _)| *other)
    }

    /// How long `source` may take for `chunk`: its own pace for all that it owes, four times over, or the patience.
    fn allowed(&self, source: &Source, chunk: u32) -> Span {
        let owed = u64::try_from(source.owes.len()).unwrap_or(u64::MAX);
        let own = source
            .pace
            .map_or(0, |pace| pace.0.saturating_mul(owed).saturating_mul(4));
        let doublings = self.taken_back.get(&chunk).copied().unwrap_or(0).min(8);
        Span(own.max(self.limits.patience.0).saturating_mul(1 << doublings))
    }

    /// Fills the windows of all sources, one request each in turn so that none takes all rare chunks.
    fn ask(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let ids: Vec<NodeId> = self.sources.keys().copied().collect();
        let mut asked = true;
        while asked {
            asked = false;
            for id in &ids {
                if self.copies.len() >= self.limits.in_flight_all_max {
                    return;
                }
                if let Some((owner, chunk)) = self.steal(now, *id) {
                    self.forget_request(owner, chunk);
                    effects.push(Effect::Cancel { source: owner, chunk });
                    self.request(now, *id, chunk);
                    effects.push(Effect::Request { source: *id, chunk });
                    asked = true;
                    continue;
                }
                if let Some(chunk) = self.choose(now, *id) {
                    self.request(now, *id, chunk);
                    effects.push(Effect::Request { source: *id, chunk });
                    asked = true;
                }
            }
        }
    }

    fn choose(&self, now: Instant, id: NodeId) -> Option<u32> {
        let source = self.sources.get(&id)?;
        if source.owes.len() >= source.window {
            return None;
        }
        if let Some((_, _, chunk)) = self.unasked.iter().find(|(_, _, chunk)| source.has.contains(*chunk)) {
            return Some(*chunk);
        }
        if !self.unasked.is_empty() {
            return None;
        }
        // The end game: what has been owed longest, by one other source only, which would need longer for it.
        let own = source.due(now, source.owes.len().saturating_add(1));
        self.sources
            .iter()
            .filter(|(other, _)| **other != id)
            .flat_map(|(_, other)| other.owes.iter().map(move |owed| (other, owed)))
            .filter(|(other, (chunk, asked_at))| {
                source.has.contains(**chunk)
                    && self.copies.get(chunk) == Some(&1)
                    && now >= **asked_at + self.limits.end_game
                    && other
                        .pace
                        .is_none_or(|_| other.due(now, other.place(**chunk)) >= own.saturating_mul(2))
            })
            .min_by_key(|(_, (chunk, asked_at))| (**asked_at, **chunk))
            .map(|(_, (chunk, _))| *chunk)
    }

    /// With nothing left to ask for: a chunk that another source has not begun to send, and that this one, which is
    /// idle, would send in half the time. Nothing of it has been sent, so nothing is sent twice.
    fn steal(&self, now: Instant, id: NodeId) -> Option<(NodeId, u32)> {
        let source = self.sources.get(&id)?;
        if !self.unasked.is_empty() || source.owes.len() >= source.window || source.pace.is_none() {
            return None;
        }
        let own = source.due(now, source.owes.len().saturating_add(1));
        self.sources
            .iter()
            .filter(|(other, owner)| **other != id && owner.owes.len() > 1 && owner.pace.is_some())
            .filter_map(|(other, owner)| {
                let last = owner.owes.iter().filter(|(chunk, _)| {
                    source.has.contains(**chunk) && self.copies.get(chunk) == Some(&1) && owner.place(**chunk) > 1
                });
                let (chunk, _) = last.max_by_key(|(chunk, asked_at)| (**asked_at, **chunk))?;
                Some((owner.due(now, owner.place(*chunk)), *other, *chunk))
            })
            .filter(|(due, ..)| *due > own.saturating_mul(2))
            .max()
            .map(|(_, other, chunk)| (other, chunk))
    }

    fn request(&mut self, now: Instant, id: NodeId, chunk: u32) {
        let Some(source) = self.sources.get_mut(&id) else {
            return;
        };
        if source.owes.is_empty() {
            source.heard_at = now; // Silence counts from the first request on.
        }
        source.owes.insert(chunk, now);
        let available = usize::try_from(chunk).ok().and_then(|index| self.available.get(index));
        let available = available.copied().unwrap_or(0);
        self.unasked.remove(&(available, tie_break(self.seed, chunk), chunk));
        let copies = self.copies.entry(chunk).or_insert(0);
        *copies = copies.saturating_add(1);
    }

    /// Forgets that `id` owes `chunk`, which becomes unasked unless another owes it too. Says whether it did owe it.
    fn forget_request(&mut self, id: NodeId, chunk: u32) -> bool {
        let owed = self
            .sources
            .get_mut(&id)
            .is_some_and(|source| source.owes.remove(&chunk).is_some());
        if !owed {
            return false;
        }
        match self.copies.get_mut(&chunk) {
            Some(copies) if *copies > 1 => *copies -= 1,
            Some(_) | None => {
                self.copies.remove(&chunk);
                let available = usize::try_from(chunk).ok().and_then(|index| self.available.get(index));
                let available = available.copied().unwrap_or(0);
                self.unasked.insert((available, tie_break(self.seed, chunk), chunk));
            }
        }
        true
    }

    fn set_available(&mut self, chunk: u32, change: impl FnOnce(u32) -> u32) {
        let slot = usize::try_from(chunk)
            .ok()
            .and_then(|index| self.available.get_mut(index));
        let Some(slot) = slot else { return };
        let before = *slot;
        *slot = change(before);
        let after = *slot;
        let tie = tie_break(self.seed, chunk);
        if self.unasked.remove(&(before, tie, chunk)) {
            self.unasked.insert((after, tie, chunk));
        }
    }
}

/// Spreads chunks differently for every seed (SplitMix64's finaliser, Steele and others 2014).
fn tie_break(seed: u64, chunk: u32) -> u32 {
    let mut bits = seed ^ (u64::from(chunk).wrapping_add(1)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    u32::try_from(bits >> 32).unwrap_or(0)
}

#[cfg(test)]
mod tests;
