//! A network that loses, doubles, delays and reorders, and that may be cut in two.

use polder_protocol::rng::Random;
use polder_protocol::time::Span;

/// How well messages come through.
#[derive(Debug, Clone, Copy)]
struct Quality {
    drop_ppm: u64,
    duplicate_ppm: u64,
    delay_micros_min: u64,
    delay_micros_max: u64,
}

/// An ordinary day on the internet.
const CALM: Quality = Quality {
    drop_ppm: 10_000,
    duplicate_ppm: 10_000,
    delay_micros_min: 5_000,
    delay_micros_max: 120_000,
};
/// A bad one: messages overtake each other by seconds.
const STORM: Quality = Quality {
    drop_ppm: 300_000,
    duplicate_ppm: 100_000,
    delay_micros_min: 5_000,
    delay_micros_max: 6_000_000,
};
/// None is lost.
const QUIET: Quality = Quality {
    drop_ppm: 0,
    duplicate_ppm: 0,
    delay_micros_min: 5_000,
    delay_micros_max: 50_000,
};

/// What carries messages between hosts.
#[derive(Debug)]
pub(crate) struct Network {
    quality: Quality,
    /// Hosts whose bit is set cannot reach the others.
    mask: u64,
    pub(crate) dropped: u64,
    pub(crate) duplicated: u64,
}

impl Network {
    pub(crate) fn new() -> Self {
        Self {
            quality: CALM,
            mask: 0,
            dropped: 0,
            duplicated: 0,
        }
    }

    pub(crate) fn calm(&mut self) {
        self.quality = CALM;
    }

    pub(crate) fn storm(&mut self) {
        self.quality = STORM;
    }

    pub(crate) fn cut(&mut self, mask: u64) {
        self.mask = mask;
    }

    /// Nothing goes wrong any more.
    pub(crate) fn heal(&mut self) {
        self.quality = QUIET;
        self.mask = 0;
    }

    pub(crate) fn connects(&self, one: usize, other: usize) -> bool {
        let side = |host: usize| self.mask.checked_shr(host as u32).unwrap_or(0) & 1;
        side(one) == side(other)
    }

    /// After how long each copy of a message arrives; none if it is lost.
    pub(crate) fn copies(&mut self, from: usize, to: usize, random: &mut Random) -> Vec<Span> {
        if !self.connects(from, to) || random.chance(self.quality.drop_ppm) {
            self.dropped += 1;
            return vec![];
        }
        let mut copies = vec![self.delay(random)];
        if random.chance(self.quality.duplicate_ppm) {
            self.duplicated += 1;
            copies.push(self.delay(random));
        }
        copies
    }

    fn delay(&self, random: &mut Random) -> Span {
        let Quality {
            delay_micros_min: min,
            delay_micros_max: max,
            ..
        } = self.quality;
        Span(min + random.below(max - min))
    }
}
