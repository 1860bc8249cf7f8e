//! What a link carries: pours bytes to a peer that throws them away and says how many came.
//!
//! Whoever asks costs the other end bandwidth, so a node takes in one peer's measurement at a time, for a bounded time,
//! and rests as long after it. The sender keeps its upload caps.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use polder_protocol::hash::NodeId;
use tokio::time::{Instant, sleep, timeout_at};

use super::error::{DataError, StreamEnd};
use super::frames::{FrameReceiver, FrameSender};
use super::plane::DataPlane;
use super::settings::{Class, Service};

/// Streams of one measurement: one alone is held back by its window on long paths.
const STREAMS: usize = 4;

/// How long one peer's measurement may last where it is taken in.
const TAKEN_MAX: Duration = Duration::from_secs(30);

/// How long a sender goes on, whatever is left: less than [`TAKEN_MAX`], so that it hears how much came.
const SENDING_MAX: Duration = Duration::from_secs(20);

/// Bytes of one frame.
const FRAME_BYTES: usize = 256 << 10;

/// What one measurement showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Poured {
    /// Bytes that came, without headers.
    pub bytes: u64,
    /// From the first byte until the peer said that all are there.
    pub time: Duration,
    /// Packets sent on connections for bulk meanwhile.
    pub sent_packets: u64,
    /// Those of them that were lost, and sent again.
    pub lost_packets: u64,
    /// What the congestion control lets be under way, in bytes, at the end.
    pub window_bytes: u64,
    /// The smoothed round trip at the end, with whatever queue there is.
    pub round_trip: Duration,
}

/// Whose measurement is taken in.
#[derive(Debug, Default)]
pub(super) struct Sinks(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    current: Option<Current>,
    rests_until: Option<Instant>,
}

#[derive(Debug)]
struct Current {
    peer: NodeId,
    streams: usize,
    began: Instant,
}

impl Sinks {
    /// Takes a place for one stream, and says until when; `None` while another peer has it, or after it.
    fn enter(&self, now: Instant, peer: NodeId) -> Option<Instant> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(current) = &mut state.current {
            let until = current.began + TAKEN_MAX;
            let room = current.peer == peer && current.streams < STREAMS && now < until;
            current.streams += usize::from(room);
            return room.then_some(until);
        }
        if state.rests_until.is_some_and(|until| now < until) {
            return None;
        }
        state.current = Some(Current {
            peer,
            streams: 1,
            began: now,
        });
        Some(now + TAKEN_MAX)
    }

    fn leave(&self, now: Instant) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(current) = &mut state.current else {
            return;
        };
        current.streams = current.streams.saturating_sub(1);
        if current.streams == 0 {
            state.rests_until = Some(now + now.saturating_duration_since(current.began));
            state.current = None;
        }
    }
}

/// A place, until it is dropped.
struct Place<'a>(&'a Sinks);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.leave(Instant::now());
    }
}

impl DataPlane {
    /// Sends `bytes` to `peer`, or as many as go within 20 s, and hears how many came.
    ///
    /// # Errors
    ///
    /// As [`DataPlane::open`], and [`DataError`] for a peer that measures already or rests from it, or is of a version
    /// that cannot.
    pub async fn pour(&self, peer: NodeId, bytes: u64) -> Result<Poured, DataError> {
        let institution = self.connect(peer, Class::Bulk).await?.institution;
        let mut streams = Vec::new();
        for _ in 0..STREAMS {
            let (mut sender, mut receiver) = self.open(peer, Class::Bulk, Service::Sink, Vec::new()).await?;
            sender.send(&[], Bytes::new()).await?;
            // All are open before the first ends.
            self.hear(peer, &mut receiver).await?;
            streams.push((sender, receiver));
        }
        let before = self.bulk_packets(peer);
        let (began, frame) = (Instant::now(), Bytes::from(vec![0; FRAME_BYTES]));
        let share = bytes.div_ceil(STREAMS as u64);
        let pouring = streams.into_iter().map(|(mut sender, mut receiver)| {
            let frame = frame.clone();
            async move {
                let mut left = share;
                while left > 0 && began.elapsed() < SENDING_MAX {
                    let piece = frame.slice(..FRAME_BYTES.min(usize::try_from(left).unwrap_or(FRAME_BYTES)));
                    let wait = self
                        .inner
                        .uploads
                        .take(Instant::now().into_std(), institution, piece.len());
                    sleep(wait).await;
                    left -= piece.len() as u64;
                    sender.send(&[], piece).await?;
                }
                sender.finish();
                let count = self.hear(peer, &mut receiver).await?;
                <[u8; 8]>::try_from(count.as_ref())
                    .map(u64::from_le_bytes)
                    .map_err(|_| DataError::Malformed {
                        peer,
                        what: "a count of bytes".to_owned(),
                    })
            }
        });
        let came = futures::future::try_join_all(pouring).await?;
        let (time, after) = (began.elapsed(), self.bulk_packets(peer));
        let link = self
            .links()
            .into_iter()
            .rfind(|link| link.peer == peer && link.class == Class::Bulk);
        Ok(Poured {
            // A peer may say anything.
            bytes: came.into_iter().fold(0, u64::saturating_add).min(bytes),
            time,
            sent_packets: after.0.saturating_sub(before.0),
            lost_packets: after.1.saturating_sub(before.1),
            window_bytes: link.as_ref().map_or(0, |link| link.window_bytes),
            round_trip: link.map(|link| link.rtt).unwrap_or_default(),
        })
    }

    /// The next answer of a sink.
    async fn hear(&self, peer: NodeId, receiver: &mut FrameReceiver) -> Result<Bytes, DataError> {
        let answer = timeout_at(Instant::now() + TAKEN_MAX, receiver.next_within(8)).await;
        let stalled = |_| DataError::Stalled {
            peer,
            what: "to say how much came",
            after: TAKEN_MAX,
        };
        let (_, payload) = answer.map_err(stalled)??.ok_or(DataError::Malformed {
            peer,
            what: "no count of bytes".to_owned(),
        })?;
        Ok(payload)
    }

    /// Packets sent and lost so far on the connections for bulk with a peer.
    fn bulk_packets(&self, peer: NodeId) -> (u64, u64) {
        let links = self.links();
        let bulk = links
            .iter()
            .filter(|link| link.peer == peer && link.class == Class::Bulk);
        bulk.fold((0, 0), |(sent, lost), link| {
            (sent + link.sent_packets, lost + link.lost_packets)
        })
    }

    /// Takes in one stream of a measurement.
    pub(super) async fn sink(&self, mut sender: FrameSender, mut receiver: FrameReceiver) {
        let Some(until) = self.inner.sinks.enter(Instant::now(), sender.peer()) else {
            receiver.stop(StreamEnd::Busy);
            sender.break_off(StreamEnd::Busy);
            return;
        };
        let _place = Place(&self.inner.sinks);
        let mut came = 0u64;
        let taken = timeout_at(until, async {
            while let Some((_, payload)) = receiver.next_within(FRAME_BYTES as u64).await? {
                if payload.is_empty() {
                    sender.send(&[], Bytes::new()).await?;
                }
                came += payload.len() as u64;
            }
            sender.send(&[], Bytes::copy_from_slice(&came.to_le_bytes())).await?;
            sender.finish();
            Ok::<(), DataError>(())
        });
        match taken.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "measurement not taken in"),
            Err(_) => {
                receiver.stop(StreamEnd::Stalled);
                sender.break_off(StreamEnd::Stalled);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_peer_at_a_time_is_taken_in_and_at_most_half_of_the_time() {
        let (sinks, start) = (Sinks::default(), Instant::now());
        let (one, other) = (NodeId([1; 32]), NodeId([2; 32]));
        for _ in 0..STREAMS {
            assert_eq!(sinks.enter(start, one), Some(start + TAKEN_MAX));
        }
        assert_eq!(sinks.enter(start, one), None, "a stream too many");
        assert_eq!(sinks.enter(start, other), None, "another peer");
        let end = start + Duration::from_secs(8);
        for _ in 0..STREAMS {
            sinks.leave(end);
        }
        assert_eq!(sinks.enter(end + Duration::from_secs(7), other), None, "it rests");
        let rested = end + Duration::from_secs(8);
        assert_eq!(sinks.enter(rested, other), Some(rested + TAKEN_MAX));
        // Who holds its place for longer gets no more streams.
        assert_eq!(sinks.enter(rested + TAKEN_MAX, other), None);
    }
}
