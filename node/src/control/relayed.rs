//! Caps of what a gateway relays: libp2p limits a circuit's bytes and its time, and no rates.
//!
//! A circuit is two streams, and whatever it carries is read from one of them. So every stream of a gateway is wrapped
//! where it leaves the multiplexer, and those that turn out to be ends of circuits wait before they are read further; the
//! sender's window fills up, and it slows down. What a stream is for is told by what this node itself says on it, in
//! clear, before any of its content: a peer cannot say otherwise.

use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures::{AsyncRead, AsyncWrite};
use libp2p::PeerId;
use libp2p::core::muxing::{StreamMuxer, StreamMuxerEvent};
use polder_protocol::hash::{InstitutionId, NodeId};
use tokio::time::Sleep;

use super::address::node_of;
use super::shared::{Shared, lock};
use crate::bucket::Bucket;

/// What is read at a time: small enough that everybody who waits gets on.
const SLICE_BYTES: usize = 16 << 10;

/// Buckets that are kept; those that owe nothing are dropped first.
const BUCKETS_MAX: usize = 4_096;

/// The stream on which a member asks this node for a circuit.
const HOP: &[u8] = b"/libp2p/circuit/relay/0.2.0/hop\n";

/// The stream on which this node hands a circuit on.
const STOP: &[u8] = b"/libp2p/circuit/relay/0.2.0/stop\n";

/// What is said before the name of a stream's protocol, on either side.
const PREAMBLES: [&[u8]; 2] = [b"/multistream/1.0.0\n", b"na\n"];

/// Caps in bytes per second of what comes out of circuits, both directions counted; 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RelayCaps {
    /// Of all circuits together.
    pub all: u64,
    /// Of what the members of one institution send.
    pub institution: u64,
    /// Of what one member sends.
    pub member: u64,
    /// Of each direction of one circuit.
    pub circuit: u64,
}

/// The buckets of a gateway, and how much it has relayed.
#[derive(Debug, Default)]
pub(super) struct Relayed(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    caps: RelayCaps,
    bytes: u64,
    buckets: BTreeMap<Whose, Bucket>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Whose {
    All,
    Institution(InstitutionId),
    Member(NodeId),
}

impl Relayed {
    /// Other caps from now on, also for circuits that stand.
    pub(super) fn set(&self, caps: RelayCaps) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).caps = caps;
    }

    /// Bytes so far.
    pub(super) fn bytes(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).bytes
    }

    /// Notes that `bytes` of `member` have come out of a circuit, and says how long to wait before the next are read.
    fn take(
        &self,
        now: Instant,
        member: NodeId,
        institution: Option<InstitutionId>,
        circuit: &mut Bucket,
        bytes: usize,
    ) -> Duration {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.bytes = state.bytes.saturating_add(bytes as u64);
        let caps = state.caps;
        let mut wait = Duration::ZERO;
        if caps.circuit > 0 {
            wait = circuit.take(now, bytes, caps.circuit);
        }
        for (whose, cap) in [
            (Some(Whose::All), caps.all),
            (institution.map(Whose::Institution), caps.institution),
            (Some(Whose::Member(member)), caps.member),
        ] {
            if let (Some(whose), true) = (whose, cap > 0) {
                if state.buckets.len() >= BUCKETS_MAX {
                    state.buckets.retain(|_, bucket| bucket.owes(now));
                }
                let bucket = state.buckets.entry(whose).or_insert_with(|| Bucket::new(now));
                wait = wait.max(bucket.take(now, bytes, cap));
            }
        }
        wait
    }
}

/// A connection whose streams are looked at.
pub(super) struct Metered<M> {
    muxer: M,
    peer: PeerId,
    // `None` on a node that relays nothing.
    shared: Option<Arc<Shared>>,
}

impl<M> Metered<M> {
    pub(super) fn new(muxer: M, peer: PeerId, shared: Option<Arc<Shared>>) -> Self {
        Self { muxer, peer, shared }
    }

    fn wrap<S>(&self, stream: S, ours: &'static [u8]) -> MeteredStream<S> {
        let meter = self
            .shared
            .as_ref()
            .zip(node_of(&self.peer))
            .map(|(shared, member)| Meter {
                shared: Arc::clone(shared),
                member,
                institution: None,
                ours,
                said: Said::default(),
                circuit: Bucket::new(Instant::now()),
                waits: None,
            });
        MeteredStream { stream, meter }
    }
}

impl<M: StreamMuxer + Unpin> StreamMuxer for Metered<M>
where
    M::Substream: Unpin,
{
    type Substream = MeteredStream<M::Substream>;
    type Error = M::Error;

    fn poll_inbound(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<Self::Substream, M::Error>> {
        let stream = ready!(Pin::new(&mut self.muxer).poll_inbound(context))?;
        Poll::Ready(Ok(self.wrap(stream, HOP)))
    }

    fn poll_outbound(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<Self::Substream, M::Error>> {
        let stream = ready!(Pin::new(&mut self.muxer).poll_outbound(context))?;
        Poll::Ready(Ok(self.wrap(stream, STOP)))
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<(), M::Error>> {
        Pin::new(&mut self.muxer).poll_close(context)
    }

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<StreamMuxerEvent, M::Error>> {
        Pin::new(&mut self.muxer).poll(context)
    }
}

/// A stream that waits where it must.
pub(super) struct MeteredStream<S> {
    stream: S,
    meter: Option<Meter>,
}

struct Meter {
    shared: Arc<Shared>,
    member: NodeId,
    institution: Option<InstitutionId>,
    /// The protocol that makes this stream the end of a circuit through this node.
    ours: &'static [u8],
    said: Said,
    circuit: Bucket,
    waits: Option<Pin<Box<Sleep>>>,
}

/// What this node has said on a stream so far.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    /// The beginning of a line: its length, then its bytes.
    Line(Vec<u8>),
    /// The name of the protocol, and whether it is the one that was looked for.
    Name(bool),
}

impl Default for Said {
    fn default() -> Self {
        Self::Line(Vec::new())
    }
}

impl Said {
    /// Reads on until the protocol has been named. Lines of multistream-select begin with their length, in one byte
    /// where they are as short as ours.
    fn hear(&mut self, bytes: &[u8], sought: &[u8]) {
        for byte in bytes {
            let Self::Line(line) = self else { return };
            line.push(*byte);
            let Some((length, text)) = line.split_first() else {
                return;
            };
            if *length >= 0x80 {
                *self = Self::Name(false);
            } else if text.len() == usize::from(*length) {
                *self = match PREAMBLES.contains(&text) {
                    true => Self::default(),
                    false => Self::Name(text == sought),
                };
            }
        }
    }
}

impl Meter {
    fn is_circuit(&self) -> bool {
        self.said == Said::Name(true)
    }

    fn poll_turn(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if let Some(waits) = &mut self.waits {
            ready!(waits.as_mut().poll(context));
            self.waits = None;
        }
        Poll::Ready(())
    }

    fn came(&mut self, bytes: usize) {
        if self.institution.is_none() {
            let peers = lock(&self.shared.peers);
            self.institution = peers.get(&self.member).map(|record| record.institution);
        }
        let relayed = &self.shared.relayed;
        let wait = relayed.take(Instant::now(), self.member, self.institution, &mut self.circuit, bytes);
        if !wait.is_zero() {
            self.waits = Some(Box::pin(tokio::time::sleep(wait)));
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for MeteredStream<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let Self { stream, meter } = &mut *self;
        let Some(meter) = meter.as_mut().filter(|meter| meter.is_circuit()) else {
            return Pin::new(stream).poll_read(context, buf);
        };
        ready!(meter.poll_turn(context));
        let end = buf.len().min(SLICE_BYTES);
        let slice = buf.get_mut(..end).unwrap_or_default();
        let bytes = ready!(Pin::new(stream).poll_read(context, slice))?;
        meter.came(bytes);
        Poll::Ready(Ok(bytes))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for MeteredStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(context, bytes))?;
        if let Some(meter) = &mut self.meter {
            meter.said.hear(bytes.get(..written).unwrap_or_default(), meter.ours);
        }
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_close(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn line(text: &[u8]) -> Vec<u8> {
        [&[text.len() as u8], text].concat()
    }

    fn said(bytes: &[u8], sought: &[u8]) -> Said {
        let mut said = Said::default();
        // As it may be written: byte by byte.
        bytes.iter().for_each(|byte| said.hear(&[*byte], sought));
        said
    }

    #[test]
    fn a_stream_is_what_this_node_named_it_first() {
        let preamble = [line(PREAMBLES[0]), line(b"na\n"), line(b"na\n")].concat();
        let circuit = [preamble.clone(), line(HOP), b"anything".to_vec()].concat();
        assert_eq!(said(&circuit, HOP), Said::Name(true));
        assert_eq!(said(&circuit, STOP), Said::Name(false), "a circuit of another gateway");
        let other = [preamble, line(b"/polder/1\n"), line(HOP)].concat();
        assert_eq!(said(&other, HOP), Said::Name(false), "content names nothing");
    }

    proptest! {
        #[test]
        fn whatever_is_said_little_is_kept(bytes: Vec<u8>) {
            if let Said::Line(line) = said(&bytes, HOP) {
                prop_assert!(line.len() <= 128);
            }
        }
    }

    /// Members that send as fast as they may, each on one circuit; bytes per second of all.
    fn rate(caps: RelayCaps, members: &[(u8, u8)]) -> f64 {
        let relayed = Relayed::default();
        relayed.set(caps);
        let (start, seconds) = (Instant::now(), 20.0);
        let mut free_at = vec![start; members.len()];
        let mut circuits = vec![Bucket::new(start); members.len()];
        loop {
            let next = (0..free_at.len()).min_by_key(|index| free_at[*index]).unwrap();
            let now = free_at[next];
            if now >= start + Duration::from_secs_f64(seconds) {
                return relayed.bytes() as f64 / seconds;
            }
            let (member, institution) = (NodeId([members[next].0; 32]), InstitutionId([members[next].1; 32]));
            let wait = relayed.take(now, member, Some(institution), &mut circuits[next], SLICE_BYTES);
            free_at[next] = now + wait.max(Duration::from_micros(100));
        }
    }

    #[test]
    fn caps_hold_for_circuits_members_institutions_and_all() {
        let none = RelayCaps::default();
        // Two circuits of one member, one of another of the same institution, one of another institution.
        let members = [(1, 1), (1, 1), (2, 1), (3, 2)];
        for (caps, expected) in [
            (RelayCaps { all: 1_000_000, ..none }, 1_000_000.0),
            (
                RelayCaps {
                    institution: 1_000_000,
                    ..none
                },
                2_000_000.0,
            ),
            (
                RelayCaps {
                    member: 1_000_000,
                    ..none
                },
                3_000_000.0,
            ),
            (
                RelayCaps {
                    circuit: 1_000_000,
                    ..none
                },
                4_000_000.0,
            ),
            (
                RelayCaps {
                    all: 2_500_000,
                    circuit: 1_000_000,
                    ..none
                },
                2_500_000.0,
            ),
        ] {
            let rate = rate(caps, &members);
            assert!(
                (rate / expected - 1.0).abs() < 0.03,
                "{rate} of {expected} with {caps:?}"
            );
        }
    }
}
