//! Congestion control from what the path delivers, not from what it loses.
//!
//! Loss-based control stands still on a long path that loses packets at random: its rate falls with the square root of
//! the loss (Mathis and others 1997), 2 Mbit/s at 0.5 % and 80 ms. So the window here is what was delivered in a round
//! trip, times the shortest round trip, and a little more, as in BBR (Cardwell and others 2016); one control serves clean
//! and lossy paths. Unlike quinn's BBR it leaves the start as soon as a queue builds (HyStart, Ha and Rhee 2011), keeps the
//! queue at a tenth of a round trip, and takes back what it assumed when much is lost.

use std::any::Any;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory};
use quinn_proto::RttEstimator;

/// Rounds over which the best rate counts.
const ROUNDS: usize = 10;

/// A round is at least so long: on a LAN single acknowledgements would tell nothing.
const ROUND_MIN: Duration = Duration::from_millis(5);

/// The shortest round trip is measured anew after so long: paths change.
const ROUND_TRIP_LASTS: Duration = Duration::from_secs(10);

/// Samples of the round trip whose least one tells of a queue; one alone is jitter.
const SAMPLES: usize = 12;

/// More than the random loss of any usable path: somebody's queue overflows.
const LOSS_MAX: f64 = 0.05;

/// Rounds without probing after such a loss.
const CAREFUL_ROUNDS: u32 = 8;

/// What may always be under way: a few packets.
const WINDOW_MIN: u64 = 16 << 10;

/// quinn spreads a window over a round trip, and lets out at once what belongs to so much of it
/// (`BURST_INTERVAL_NANOS` of quinn-proto's pacing).
const PACED_AT_ONCE: Duration = Duration::from_millis(2);

/// Taken for the round trip before there is one.
const ROUND_TRIP_UNKNOWN: Duration = Duration::from_millis(100);

/// Makes [`Delivered`] for each connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct DeliveredConfig {
    /// What may be under way before anything is known, in bytes.
    pub(super) initial_bytes: u64,
    /// What an application that sends now and then may do, although it shows no rate.
    pub(super) room: Room,
}

/// What is allowed without having been earned by a rate, as long as nothing is lost. In bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Room {
    /// May be under way.
    pub(super) floor: u64,
    /// Leaves at once where nothing is under way: pacing a message of a few dozen packets would only delay its end.
    pub(super) burst: u64,
}

/// The room of a connection, shared with the clones of its control, since the class of a connection is known late.
#[derive(Debug, Clone)]
struct SharedRoom(Arc<[AtomicU64; 2]>);

impl SharedRoom {
    fn new(room: Room) -> Self {
        Self(Arc::new([room.floor.into(), room.burst.into()]))
    }

    fn set(&self, room: Room) {
        let [floor, burst] = &*self.0;
        floor.store(room.floor, Ordering::Relaxed);
        burst.store(room.burst, Ordering::Relaxed);
    }

    fn get(&self) -> Room {
        let [floor, burst] = &*self.0;
        Room {
            floor: floor.load(Ordering::Relaxed),
            burst: burst.load(Ordering::Relaxed),
        }
    }
}

impl ControllerFactory for DeliveredConfig {
    fn build(self: Arc<Self>, now: Instant, _current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Delivered::new(*self, now))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The window grows by what is acknowledged: it doubles every round trip.
    Start,
    /// The window follows the rate.
    Follow,
    /// Half a window, so that the queue drains and the shortest round trip shows.
    Drain,
}

/// What one round showed.
#[derive(Debug, Clone, Copy)]
struct Round {
    began: Instant,
    delivered: u64,
    lost: u64,
    hungry: bool,
}

impl Round {
    fn new(began: Instant) -> Self {
        Self {
            began,
            delivered: 0,
            lost: 0,
            hungry: false,
        }
    }
}

/// The control of one connection.
#[derive(Debug, Clone)]
pub(super) struct Delivered {
    config: DeliveredConfig,
    phase: Phase,
    window: u64,
    room: SharedRoom,
    // How often the room is halved, since so much was lost.
    halvings: u32,
    // Bytes that were sent and neither acknowledged nor lost.
    under_way: u64,
    round: Round,
    rounds: u32,
    // Bytes per second of the last rounds in which the window, not the application, was the limit.
    rates: VecDeque<f64>,
    // Rounds in which the rate grew little, while starting.
    level: u32,
    shortest: Option<(Duration, Instant)>,
    // The last samples of the round trip.
    samples: VecDeque<Duration>,
    careful: u32,
}

impl Delivered {
    fn new(config: DeliveredConfig, now: Instant) -> Self {
        Self {
            config,
            phase: Phase::Start,
            window: config.initial_bytes,
            room: SharedRoom::new(config.room),
            halvings: 0,
            under_way: 0,
            round: Round::new(now),
            rounds: 0,
            rates: VecDeque::new(),
            level: 0,
            shortest: None,
            samples: VecDeque::new(),
            careful: 0,
        }
    }

    /// Bytes per second.
    fn rate(&self) -> f64 {
        self.rates.iter().copied().fold(0.0, f64::max)
    }

    fn sample(&mut self, now: Instant, round_trip: Duration) {
        if self.samples.len() >= SAMPLES {
            self.samples.pop_front();
        }
        self.samples.push_back(round_trip);
        let shorter = self.shortest.is_none_or(|(shortest, _)| round_trip <= shortest);
        if shorter {
            self.shortest = Some((round_trip, now));
        }
    }

    /// How much longer than the shortest even the best of the last round trips was.
    fn queue(&self) -> Duration {
        let least = self.samples.iter().min().copied().unwrap_or_default();
        match self.shortest {
            Some((shortest, _)) if self.samples.len() >= SAMPLES => least.saturating_sub(shortest),
            _ => Duration::ZERO,
        }
    }

    fn end_round(&mut self, now: Instant) {
        let round = std::mem::replace(&mut self.round, Round::new(now));
        let seconds = now.saturating_duration_since(round.began).as_secs_f64().max(1e-6);
        let rate = round.delivered as f64 / seconds;
        let best = self.rate();
        self.rounds = self.rounds.wrapping_add(1);
        if !round.hungry || rate > best {
            if self.rates.len() >= ROUNDS {
                self.rates.pop_front();
            }
            self.rates.push_back(rate);
        }
        let sent = (round.lost + round.delivered).max(1);
        let much_lost = round.lost > WINDOW_MIN && round.lost as f64 > LOSS_MAX * sent as f64;
        if much_lost {
            self.rates.clear();
            self.rates.push_back(rate);
            self.careful = CAREFUL_ROUNDS;
            self.halvings = (self.halvings + 1).min(16);
        } else {
            self.careful = self.careful.saturating_sub(1);
            if round.lost == 0 {
                self.halvings = self.halvings.saturating_sub(1);
            }
        }
        match self.phase {
            Phase::Start => {
                if !round.hungry {
                    self.level = if rate < best * 1.25 { self.level + 1 } else { 0 };
                }
                if much_lost || self.level >= 3 {
                    self.phase = Phase::Follow;
                }
            }
            Phase::Follow => {
                if self
                    .shortest
                    .is_some_and(|(_, at)| now.saturating_duration_since(at) > ROUND_TRIP_LASTS)
                {
                    self.phase = Phase::Drain;
                    self.shortest = None;
                    self.samples.clear();
                }
            }
            Phase::Drain => self.phase = Phase::Follow,
        }
        self.follow();
    }

    /// Sets the window from the rate and the shortest round trip.
    fn follow(&mut self) {
        let Some((shortest, _)) = self.shortest else {
            self.window = (self.window / 2).max(WINDOW_MIN);
            return;
        };
        if self.phase == Phase::Start {
            return;
        }
        let gain = match self.rounds % 8 {
            _ if self.careful > 0 => 1.0,
            0 => 1.25,
            1 => 0.9,
            _ => 1.1,
        };
        let under_way = self.rate() * shortest.as_secs_f64();
        // Acknowledgements come for two packets at a time, and a sender that was held up finds several at once.
        let slack = WINDOW_MIN + (self.rate() * 0.002) as u64;
        self.window = ((under_way * gain) as u64 + slack).max(WINDOW_MIN);
    }
}

impl Controller for Delivered {
    fn on_sent(&mut self, _now: Instant, bytes: u64, _last_packet_number: u64) {
        self.under_way = self.under_way.saturating_add(bytes);
    }

    fn on_end_acks(&mut self, _now: Instant, in_flight: u64, _app_limited: bool, _largest: Option<u64>) {
        self.under_way = in_flight;
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, _rtt: &RttEstimator) {
        self.on_acknowledged(now, sent, bytes, app_limited);
    }

    fn on_congestion_event(&mut self, now: Instant, _sent: Instant, is_persistent: bool, lost_bytes: u64) {
        self.round.lost += lost_bytes;
        if is_persistent {
            *self = Self {
                window: WINDOW_MIN,
                room: self.room.clone(),
                halvings: 16,
                under_way: self.under_way,
                ..Self::new(self.config, now)
            };
        } else if self.phase == Phase::Start && self.round.lost > self.window / 8 {
            // Not to wait for the end of the round: each of its acknowledgements would still widen the window.
            self.phase = Phase::Follow;
            self.window = (self.window / 2).max(WINDOW_MIN);
        }
    }

    fn on_mtu_update(&mut self, _new_mtu: u16) {}

    fn window(&self) -> u64 {
        let room = self.room.get();
        let window = self.window.max(room.floor >> self.halvings);
        let burst = room.burst >> self.halvings;
        match self.under_way < burst {
            true => window.max(self.window_that_lets_out(burst)),
            false => window,
        }
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.config.initial_bytes
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// Keeps so much room on a connection whose application sends now and then, now that it is known to be one.
pub(super) fn keep_room(connection: &quinn::Connection, room: Room) {
    // A clone, which shares the room with the control itself.
    if let Ok(control) = connection.congestion_state().into_any().downcast::<Delivered>() {
        control.room.set(room);
    }
}

impl Delivered {
    /// The window of which quinn's pacing lets out so many bytes at once.
    fn window_that_lets_out(&self, bytes: u64) -> u64 {
        // The longest of the last ones: the smoothed round trip, which quinn reckons with, is no longer than that.
        let round_trip = self.samples.iter().max().copied().unwrap_or(ROUND_TRIP_UNKNOWN);
        let intervals = round_trip.as_nanos().div_ceil(PACED_AT_ONCE.as_nanos());
        bytes
            .saturating_mul(u64::try_from(intervals).unwrap_or(1))
            .min(u32::MAX.into())
    }

    fn on_acknowledged(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool) {
        self.sample(now, now.saturating_duration_since(sent));
        self.round.delivered += bytes;
        self.round.hungry |= app_limited;
        if self.phase == Phase::Start {
            if !app_limited {
                self.window = self.window.saturating_add(bytes);
            }
            let shortest = self.shortest.map_or(Duration::ZERO, |(shortest, _)| shortest);
            if !app_limited && self.queue() > (shortest / 8).max(Duration::from_millis(8)) {
                self.phase = Phase::Follow;
                // What was under way when the queue began; the rate of this round will tell better.
                self.window = (self.window * 3 / 4).max(WINDOW_MIN);
            }
        }
        let over = sent >= self.round.began && now.saturating_duration_since(self.round.began) >= ROUND_MIN;
        if over {
            self.end_round(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKET: u64 = 1_200;

    /// A bottleneck with a queue, stepped packet by packet.
    struct Path {
        packets_per_second: f64,
        round_trip: Duration,
        queue: Duration,
        loss_per_mille: u64,
    }

    /// What came of a transfer of so many seconds.
    struct Outcome {
        share: f64,
        overflowed: f64,
        longest_queue: Duration,
    }

    impl Path {
        /// Keeps the window full, and reports from the third second on.
        fn run(&self, seconds: f64, control: &mut Delivered, start: Instant) -> Outcome {
            let gap = Duration::from_secs_f64(1.0 / self.packets_per_second);
            let mut under_way: VecDeque<(Instant, Instant, bool)> = VecDeque::new();
            let (mut now, mut free_at, mut dice) = (start, start, 7u64);
            let (mut sent, mut dropped, mut arrived) = (0u64, 0u64, 0u64);
            let (mut in_flight, mut longest_queue) = (0u64, Duration::ZERO);
            let mut send_at = start;
            let warm = start + Duration::from_secs(3);
            while now < start + Duration::from_secs_f64(seconds) {
                while in_flight + PACKET <= control.window() && send_at <= now {
                    // Paced as quinn does, at 1.25 windows a round trip.
                    let pace = self.round_trip.as_secs_f64() * PACKET as f64 / (control.window() as f64 * 1.25);
                    send_at = send_at.max(now - Duration::from_millis(1)) + Duration::from_secs_f64(pace);
                    free_at = free_at.max(now);
                    let wait = free_at - now;
                    sent += 1;
                    dice = dice
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    let overflows = wait > self.queue;
                    let lost = overflows || (dice >> 33) % 1000 < self.loss_per_mille;
                    dropped += u64::from(overflows);
                    if !overflows {
                        free_at += gap;
                    }
                    if now > warm {
                        longest_queue = longest_queue.max(wait);
                    }
                    in_flight += PACKET;
                    under_way.push_back((now, free_at + self.round_trip, lost));
                }
                let next = under_way.front().map(|(_, at, _)| *at);
                let may_send = in_flight + PACKET <= control.window();
                now = match next {
                    Some(at) if may_send => at.min(send_at).max(now),
                    Some(at) => at.max(now),
                    None => send_at.max(now),
                };
                while let Some((sent_at, at, lost)) = under_way.front().copied().filter(|(_, at, _)| *at <= now) {
                    under_way.pop_front();
                    in_flight -= PACKET;
                    if lost {
                        control.on_congestion_event(at, sent_at, false, PACKET);
                    } else {
                        arrived += u64::from(at > warm);
                        control.on_acknowledged(at, sent_at, PACKET, false);
                    }
                }
            }
            Outcome {
                share: arrived as f64 / (self.packets_per_second * (seconds - 3.0)),
                overflowed: dropped as f64 / sent as f64,
                longest_queue,
            }
        }
    }

    fn control(start: Instant) -> Delivered {
        let config = DeliveredConfig {
            initial_bytes: 256 << 10,
            room: Room {
                floor: WINDOW_MIN,
                burst: 0,
            },
        };
        Delivered::new(config, start)
    }

    #[test]
    fn paths_are_filled_with_random_loss_and_without_and_queues_stay_short() {
        for (megabits, millis, loss_per_mille) in [
            (100.0, 80, 0),
            (100.0, 80, 5),
            (100.0, 80, 20),
            (400.0, 80, 5),
            (10.0, 20, 0),
            (10.0, 200, 10),
        ] {
            let path = Path {
                packets_per_second: megabits * 1e6 / 8.0 / PACKET as f64,
                round_trip: Duration::from_millis(millis),
                queue: Duration::from_millis(100),
                loss_per_mille,
            };
            let start = Instant::now();
            let outcome = path.run(25.0, &mut control(start), start);
            println!(
                "{megabits} Mbit/s, {millis} ms, loss {loss_per_mille}: {:.3} of the path, {:.4} overflowed, {:?}",
                outcome.share, outcome.overflowed, outcome.longest_queue
            );
            let name = format!("{megabits} Mbit/s, {millis} ms, loss of {loss_per_mille} in a thousand");
            assert!(outcome.share > 0.88, "{name}: {:.3} of the path", outcome.share);
            assert!(
                outcome.overflowed < 0.03,
                "{name}: {:.4} overflowed",
                outcome.overflowed
            );
            let most = Duration::from_millis(millis * 6 / 10 + 25);
            assert!(
                outcome.longest_queue < most,
                "{name}: queue {:?}",
                outcome.longest_queue
            );
        }
    }

    #[test]
    fn a_small_initial_path_is_found_again_after_it_widens() {
        let start = Instant::now();
        let mut control = control(start);
        let mut path = Path {
            packets_per_second: 10e6 / 8.0 / PACKET as f64,
            round_trip: Duration::from_millis(40),
            queue: Duration::from_millis(100),
            loss_per_mille: 0,
        };
        path.run(6.0, &mut control, start);
        assert!(control.window() < 200_000, "{}", control.window());
        path.packets_per_second *= 10.0;
        let outcome = path.run(8.0, &mut control, start + Duration::from_secs(8));
        assert!(outcome.share > 0.85, "{:.3}", outcome.share);
    }

    #[test]
    fn an_application_that_sends_now_and_then_keeps_its_window() {
        let start = Instant::now();
        let config = DeliveredConfig {
            initial_bytes: 1 << 20,
            room: Room {
                floor: 1 << 20,
                burst: 0,
            },
        };
        let mut control = Delivered::new(config, start);
        for message in 0..200u32 {
            let sent = start + Duration::from_millis(100) * message;
            for packet in 0..54 {
                let at = sent + Duration::from_millis(80) + Duration::from_micros(100) * packet;
                control.on_acknowledged(at, sent, PACKET, true);
            }
            assert!(
                control.window() >= 1 << 20 || control.phase == Phase::Drain,
                "{message}"
            );
        }
    }

    #[test]
    fn a_message_leaves_at_once_where_nothing_is_under_way_and_what_follows_is_paced() {
        const BURST: u64 = 128 << 10;
        let start = Instant::now();
        let config = DeliveredConfig {
            initial_bytes: 256 << 10,
            room: Room {
                floor: 1 << 20,
                burst: BURST,
            },
        };
        let mut control = Delivered::new(config, start);
        let round_trip = Duration::from_millis(80);
        control.on_acknowledged(start + round_trip, start, PACKET, true);
        let at_once = |control: &Delivered| control.window() as f64 * 2.0 / 80.0;
        assert!(at_once(&control) >= BURST as f64, "{}", control.window());

        control.on_sent(start + round_trip, BURST, 100);
        assert_eq!(control.window(), 1 << 20, "the rest of a longer message is paced");
        control.on_end_acks(start + 2 * round_trip, 0, true, Some(100));
        assert!(at_once(&control) >= BURST as f64);

        for lost in 0..20 {
            let now = start + round_trip * (3 + lost);
            control.on_congestion_event(now, now - round_trip, false, 20 * PACKET);
            control.on_acknowledged(now, now - Duration::from_millis(70), 10 * PACKET, true);
        }
        assert!(
            at_once(&control) < BURST as f64 / 8.0,
            "a path that loses so much has no room for bursts"
        );
    }
}
