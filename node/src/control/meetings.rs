//! Whom this node is connected to, and how far they have come: strangers, members, and those that were shown the door.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use libp2p::Multiaddr;
use libp2p::swarm::ConnectionId;
use polder_protocol::hash::{InstitutionId, NodeId};
use polder_protocol::rng::Random;
use polder_protocol::wire::{ADDRESSES_MAX, Request};
use tokio::sync::oneshot;

use super::ControlError;
use super::address::source_for;
use crate::gate::Admitted;

/// How long a connection may go without a valid greeting. Enrolment takes two round trips and a signature.
pub(super) const STRANGER_STAYS: Duration = Duration::from_secs(30);

/// How long a refused peer stays, so that it can read why.
pub(super) const REFUSED_STAYS: Duration = Duration::from_millis(500);

/// Strangers at a time. One more, and the one that has been here longest goes.
pub(super) const STRANGERS_MAX: usize = 64;

/// Requests that wait for greetings, over all peers.
const WAITING_MAX: usize = 1024;

/// Nodes whose addresses are remembered in order to meet them.
const ACQUAINTANCES_MAX: usize = 4096;

/// The first pause after a dial that failed; each further one doubles it.
const PAUSE_FIRST: Duration = Duration::from_secs(2);

/// The longest pause between dials.
const PAUSE_MAX: Duration = Duration::from_secs(120);

/// The longest pause between dials of a node that the configuration names: through it, everybody else is found again.
const PAUSE_OF_BOOTSTRAP_MAX: Duration = Duration::from_secs(5);

/// Of the nodes that the configuration names, those that are met in its order: doors, which relay. The others are those that
/// were met last.
const ORDERED_MAX: usize = 32;

/// Where an answer goes.
pub(super) type Answer = oneshot::Sender<Result<Vec<u8>, ControlError>>;

/// A request that waits until its peer is a member; without one, the greeting itself was asked for.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) request: Option<Request>,
    pub(super) answer: Answer,
}

/// A connected peer.
#[derive(Debug)]
pub(super) struct Meeting {
    pub(super) since: Instant,
    /// Whether each connection goes through a relay.
    pub(super) connections: BTreeMap<ConnectionId, bool>,
    /// The address at which it is seen, where it is not relayed.
    pub(super) seen: Option<IpAddr>,
    /// The address of this machine over which it was met last, where it is not relayed.
    pub(super) local: Option<IpAddr>,
    /// Whether our greeting is under way.
    pub(super) greeting: bool,
    /// What it showed, once accepted.
    pub(super) member: Option<Member>,
    /// When the connection is closed, once it was refused.
    pub(super) closes: Option<Instant>,
}

/// A peer whose credentials were accepted.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) admitted: Admitted,
    pub(super) credentials: Vec<u8>,
    pub(super) greeted: Instant,
    /// As in [`polder_protocol::wire::Hello::instance`].
    pub(super) instance: u64,
}

/// A node that may be met.
#[derive(Debug, Default)]
struct Acquaintance {
    addresses: Vec<Multiaddr>,
    failures: u32,
    not_before: Option<Instant>,
    /// Named by the configuration: never forgotten. What counts of its place there, since those that come first are met first.
    bootstrap: Option<usize>,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Meetings {
    pub(super) present: BTreeMap<NodeId, Meeting>,
    waiting: BTreeMap<NodeId, VecDeque<Waiting>>,
    waiting_count: usize,
    acquaintances: BTreeMap<NodeId, Acquaintance>,
}

impl Meetings {
    /// Notes a new connection, and names a stranger that must make room.
    pub(super) fn connected(
        &mut self,
        node: NodeId,
        connection: ConnectionId,
        seen: Option<IpAddr>,
        now: Instant,
    ) -> Option<NodeId> {
        let meeting = self.present.entry(node).or_insert_with(|| Meeting {
            since: now,
            connections: BTreeMap::new(),
            seen: None,
            local: None,
            greeting: false,
            member: None,
            closes: None,
        });
        meeting.connections.insert(connection, seen.is_none());
        meeting.seen = seen.or(meeting.seen);
        meeting.local = seen.and_then(source_for).or(meeting.local);
        let strangers = || self.present.iter().filter(|(_, meeting)| meeting.member.is_none());
        if strangers().count() <= STRANGERS_MAX {
            return None;
        }
        strangers()
            .min_by_key(|(_, meeting)| meeting.since)
            .map(|(node, _)| *node)
    }

    /// Notes a closed connection; returns the meeting when it was the last.
    pub(super) fn disconnected(&mut self, node: NodeId, connection: ConnectionId) -> Option<Meeting> {
        let meeting = self.present.get_mut(&node)?;
        meeting.connections.remove(&connection);
        if meeting.connections.is_empty() {
            self.present.remove(&node)
        } else {
            None
        }
    }

    /// The member `node`, where it is connected and accepted.
    pub(super) fn member(&self, node: NodeId) -> Option<&Member> {
        let meeting = self.present.get(&node)?;
        if meeting.closes.is_some() {
            return None;
        }
        meeting.member.as_ref()
    }

    pub(super) fn members(&self) -> usize {
        self.present.values().filter(|meeting| meeting.member.is_some()).count()
    }

    /// Peers that were shown this node's credentials and have not answered.
    pub(super) fn greeted(&self) -> usize {
        let greeted = |meeting: &&Meeting| meeting.greeting && meeting.member.is_none();
        self.present.values().filter(greeted).count()
    }

    /// Members of one institution.
    pub(super) fn of_institution(&self, institution: InstitutionId) -> usize {
        let members = self.present.values().filter_map(|meeting| meeting.member.as_ref());
        members
            .filter(|member| member.admitted.institution == institution)
            .count()
    }

    /// Keeps a request until its peer is a member; gives it back when too many wait.
    pub(super) fn wait(&mut self, node: NodeId, waiting: Waiting) -> Result<(), Waiting> {
        if self.waiting_count >= WAITING_MAX {
            return Err(waiting);
        }
        self.waiting_count += 1;
        self.waiting.entry(node).or_default().push_back(waiting);
        Ok(())
    }

    /// Takes what waits for `node`.
    pub(super) fn take_waiting(&mut self, node: NodeId) -> VecDeque<Waiting> {
        let waiting = self.waiting.remove(&node).unwrap_or_default();
        self.waiting_count = self.waiting_count.saturating_sub(waiting.len());
        waiting
    }

    pub(super) fn is_awaited(&self, node: NodeId) -> bool {
        self.waiting.contains_key(&node)
    }

    /// Drops requests whose askers have given up.
    pub(super) fn drop_abandoned(&mut self) {
        for waiting in self.waiting.values_mut() {
            waiting.retain(|waiting| !waiting.answer.is_closed());
        }
        self.waiting.retain(|_, waiting| !waiting.is_empty());
        self.waiting_count = self.waiting.values().map(VecDeque::len).sum();
    }

    /// Remembers where a node may be; what is new comes first.
    pub(super) fn remember(&mut self, node: NodeId, addresses: impl IntoIterator<Item = Multiaddr>) {
        if self.acquaintances.len() >= ACQUAINTANCES_MAX && !self.acquaintances.contains_key(&node) {
            let chance = self.acquaintances.iter().filter(|(_, known)| known.bootstrap.is_none());
            let worst = chance.max_by_key(|(_, known)| known.failures);
            let worst = worst.map(|(node, _)| *node);
            worst.map(|node| self.acquaintances.remove(&node));
        }
        let known = self.acquaintances.entry(node).or_default();
        for address in addresses {
            if !known.addresses.contains(&address) {
                known.addresses.insert(0, address);
            }
        }
        known.addresses.truncate(ADDRESSES_MAX);
    }

    pub(super) fn addresses(&self, node: NodeId) -> Vec<Multiaddr> {
        let known = self.acquaintances.get(&node);
        known.map(|known| known.addresses.clone()).unwrap_or_default()
    }

    /// Remembers a node that the configuration names.
    pub(super) fn remember_bootstrap(&mut self, node: NodeId, addresses: Vec<Multiaddr>) {
        self.remember(node, addresses);
        let place = self.acquaintances.len().min(ORDERED_MAX);
        if let Some(known) = self.acquaintances.get_mut(&node) {
            known.bootstrap.get_or_insert(place);
        }
    }

    /// Forgets a node that has left, unless the configuration names it.
    pub(super) fn forget(&mut self, node: NodeId) {
        self.acquaintances
            .retain(|known, how| *known != node || how.bootstrap.is_some());
    }

    /// Notes a dial or a greeting that failed, and pauses.
    pub(super) fn failed(&mut self, node: NodeId, now: Instant) {
        let Some(known) = self.acquaintances.get_mut(&node) else {
            return;
        };
        let pause = PAUSE_FIRST.saturating_mul(1 << known.failures.min(8));
        known.failures = known.failures.saturating_add(1);
        let longest = if known.bootstrap.is_some() {
            PAUSE_OF_BOOTSTRAP_MAX
        } else {
            PAUSE_MAX
        };
        known.not_before = Some(now + pause.min(longest));
    }

    /// Forgets all pauses: this machine's network has changed, so what failed may succeed.
    pub(super) fn forgive(&mut self) {
        for known in self.acquaintances.values_mut() {
            known.failures = 0;
            known.not_before = None;
        }
    }

    /// Notes that a node was met.
    pub(super) fn succeeded(&mut self, node: NodeId) {
        if let Some(known) = self.acquaintances.get_mut(&node) {
            known.failures = 0;
            known.not_before = None;
        }
    }

    /// Up to `count` nodes that are worth a dial now: those that the configuration names in its order, then any. If all
    /// nodes went through the others in one order, its first would have everybody for a neighbour.
    pub(super) fn worth_a_dial(&self, count: usize, now: Instant, random: &mut Random) -> Vec<NodeId> {
        let absent = self.acquaintances.iter().filter(|(node, known)| {
            !self.present.contains_key(node)
                && !known.addresses.is_empty()
                && known.not_before.is_none_or(|not_before| not_before <= now)
        });
        let mut drawn: Vec<((usize, u64), NodeId)> = absent
            .map(|(node, known)| ((known.bootstrap.unwrap_or(usize::MAX), random.next_u64()), *node))
            .collect();
        drawn.sort_unstable();
        drawn.into_iter().take(count).map(|(_, node)| node).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_does_not_answer_is_left_alone_for_a_while() {
        let mut meetings = Meetings::default();
        let mut random = Random::from_seed(1);
        let (node, now) = (NodeId([1; 32]), Instant::now());
        meetings.remember(node, ["/ip4/127.0.0.1/tcp/1".parse().expect("address")]);
        assert_eq!(meetings.worth_a_dial(8, now, &mut random), [node]);
        meetings.failed(node, now);
        assert_eq!(meetings.worth_a_dial(8, now, &mut random), []);
        assert_eq!(meetings.worth_a_dial(8, now + PAUSE_FIRST, &mut random), [node]);
    }

    #[test]
    fn a_node_that_the_configuration_names_is_neither_forgotten_nor_left_alone_for_long() {
        let mut meetings = Meetings::default();
        let (node, now) = (NodeId([1; 32]), Instant::now());
        meetings.remember_bootstrap(node, vec!["/ip4/127.0.0.1/tcp/1".parse().expect("address")]);
        (0..20).for_each(|_| meetings.failed(node, now));
        meetings.forget(node);
        assert_eq!(
            meetings.worth_a_dial(8, now + PAUSE_OF_BOOTSTRAP_MAX, &mut Random::from_seed(1)),
            [node]
        );
    }

    #[test]
    fn those_that_the_configuration_names_come_first_and_the_others_in_no_order() {
        let now = Instant::now();
        let mut meetings = Meetings::default();
        let address = || "/ip4/127.0.0.1/tcp/1".parse().expect("address");
        (0..40).for_each(|id| meetings.remember(NodeId([id; 32]), [address()]));
        meetings.remember_bootstrap(NodeId([200; 32]), vec![address()]);
        meetings.remember_bootstrap(NodeId([100; 32]), vec![address()]);
        let drawn = |seed| -> Vec<u8> {
            let nodes = meetings.worth_a_dial(8, now, &mut Random::from_seed(seed));
            nodes.iter().map(|node| node.0[0]).collect()
        };
        assert_eq!(drawn(1)[..2], [200, 100]);
        assert_ne!(drawn(1)[2..], drawn(2)[2..]);
    }

    #[test]
    fn the_longest_present_stranger_makes_room() {
        let mut meetings = Meetings::default();
        let now = Instant::now();
        for number in 0..=u8::try_from(STRANGERS_MAX).expect("small") {
            let connection = ConnectionId::new_unchecked(usize::from(number));
            let goes = meetings.connected(
                NodeId([number; 32]),
                connection,
                None,
                now + Duration::from_secs(number.into()),
            );
            let full = usize::from(number) == STRANGERS_MAX;
            assert_eq!(goes, full.then_some(NodeId([0; 32])));
        }
    }

    #[test]
    fn no_more_nodes_are_remembered_than_agreed() {
        let mut meetings = Meetings::default();
        for number in 0..ACQUAINTANCES_MAX + 10 {
            let mut id = [0; 32];
            id[..8].copy_from_slice(&number.to_le_bytes());
            meetings.remember(NodeId(id), ["/ip4/127.0.0.1/tcp/1".parse().expect("address")]);
        }
        assert_eq!(meetings.acquaintances.len(), ACQUAINTANCES_MAX);
    }
}
