//! Being reached and reaching others where no straight way leads: reservations at gateways, detours through them, and
//! what to do when this machine's addresses change.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use libp2p::Multiaddr;
use libp2p::core::transport::ListenerId;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use polder_protocol::charter::Capabilities;
use polder_protocol::hash::NodeId;

use super::Driver;
use crate::control::address::{ip_of, is_of_this_machine_alone, is_public, is_relayed, peer_of, readable};
use crate::control::shared::lock;
use crate::control::{Path, PeerEvent, PeerRecord};

/// Gateways at which this node holds a reservation: one may go down.
const RELAYS_KEPT: usize = 2;

/// The first pause after a reservation that ended, and the longest. Gateways grant one every two minutes once the first
/// thirty are spent.
const RELAY_PAUSE_FIRST: Duration = Duration::from_secs(1);
/// See [`RELAY_PAUSE_FIRST`].
const RELAY_PAUSE_MAX: Duration = Duration::from_secs(120);

/// The head start of straight addresses over those through a gateway.
const STRAIGHT_FIRST: Duration = Duration::from_millis(400);

/// Changes of addresses come in groups: the cable is pulled, the radio is joined, the router tells a prefix.
const CHANGE_SETTLES: Duration = Duration::from_millis(300);

/// What the driver remembers of it.
pub(super) struct Reach {
    is_relay: bool,
    relays: BTreeMap<NodeId, ListenerId>,
    relays_again_at: Option<Instant>,
    /// Reservations that ended since one last held.
    relays_lost: u32,
    /// Dials that may go around, and from when on.
    around: BTreeMap<NodeId, (Instant, Vec<Multiaddr>)>,
    /// Dials that have neither arrived nor failed.
    under_way: BTreeMap<NodeId, u32>,
    /// Ports of a router that lead here.
    mapped: Vec<Multiaddr>,
    /// When to tell the others of new addresses.
    changed: Option<Instant>,
    /// Addresses that this machine has lost since it last told.
    lost: BTreeSet<IpAddr>,
}

impl Reach {
    pub(super) fn new(is_relay: bool) -> Self {
        Self {
            is_relay,
            relays: BTreeMap::new(),
            relays_again_at: None,
            relays_lost: 0,
            around: BTreeMap::new(),
            under_way: BTreeMap::new(),
            mapped: Vec::new(),
            changed: None,
            lost: BTreeSet::new(),
        }
    }

    /// Dials that have neither arrived nor failed.
    pub(super) fn dialling(&self) -> BTreeSet<NodeId> {
        self.under_way.keys().copied().collect()
    }

    /// A listener has ended; it may have been one at a gateway.
    pub(super) fn closed(&mut self, listener: ListenerId, now: Instant) {
        let before = self.relays.len();
        self.relays.retain(|_, kept| *kept != listener);
        if self.relays.len() < before {
            let pause = RELAY_PAUSE_FIRST
                .saturating_mul(1 << self.relays_lost.min(8))
                .min(RELAY_PAUSE_MAX);
            self.relays_lost = self.relays_lost.saturating_add(1);
            self.relays_again_at = Some(now + pause);
        }
    }
}

impl Driver {
    /// Looks after reservations, detours that are due, and changed addresses.
    pub(super) fn keep_reachable(&mut self, now: Instant) {
        let due: Vec<NodeId> = self
            .reach
            .around
            .iter()
            .filter(|(_, (at, _))| *at <= now)
            .map(|(node, _)| *node)
            .collect();
        for node in due {
            if let Some((_, addresses)) = self.reach.around.remove(&node)
                && !self.meetings.present.contains_key(&node)
            {
                self.go_around(node, addresses);
            }
        }
        if self.reach.changed.is_some_and(|at| at <= now) {
            self.reach.changed = None;
            self.on_changed_network();
        }
        self.reserve(now);
    }

    /// Listens through members that relay, so that others reach this node whatever stands before it.
    fn reserve(&mut self, now: Instant) {
        if self.reach.is_relay || self.reach.relays_again_at.is_some_and(|at| now < at) {
            return;
        }
        let relays = self.present_relays();
        self.reach
            .relays
            .retain(|node, _| self.meetings.present.contains_key(node));
        for record in relays {
            if self.reach.relays.len() >= RELAYS_KEPT {
                return;
            }
            if self.reach.relays.contains_key(&record.node) {
                continue;
            }
            let Some(circuit) = circuit(&record) else { continue };
            match self.swarm.listen_on(circuit) {
                Ok(listener) => {
                    self.reach.relays.insert(record.node, listener);
                }
                Err(error) => tracing::debug!(relay = %record.node.short(), %error, "no reservation"),
            }
        }
    }

    fn present_relays(&self) -> Vec<PeerRecord> {
        let relays = |record: &&PeerRecord| {
            Capabilities(record.capabilities).has(Capabilities::RELAY) && record.path == Path::Direct
        };
        lock(&self.shared.peers).values().filter(relays).cloned().collect()
    }

    /// Goes around in a moment, should the straight dial that has just begun not arrive by then.
    pub(super) fn go_around_later(&mut self, node: NodeId, told: Vec<Multiaddr>) {
        self.reach.around.insert(node, (Instant::now() + STRAIGHT_FIRST, told));
        self.reach.under_way.insert(node, 1);
    }

    /// Whether a dial that failed has a detour left, which is taken now.
    pub(super) fn goes_on_around(&mut self, node: NodeId) -> bool {
        let others = self
            .reach
            .under_way
            .get(&node)
            .map_or(0, |count| count.saturating_sub(1));
        if others > 0 {
            self.reach.under_way.insert(node, others);
        } else {
            self.reach.under_way.remove(&node);
        }
        let around = self.reach.around.remove(&node);
        around.is_some_and(|(_, told)| self.go_around(node, told)) || others > 0
    }

    /// Dials through gateways: those that the node told of, and those that this node is connected to. Says whether a
    /// dial began.
    pub(super) fn go_around(&mut self, node: NodeId, told: Vec<Multiaddr>) -> bool {
        let Some(peer) = peer_of(node) else { return false };
        let own = self.present_relays().into_iter().filter(|relay| relay.node != node);
        let mut addresses: Vec<Multiaddr> = own
            .filter_map(|relay| circuit(&relay))
            .take(RELAYS_KEPT)
            .map(|way| way.with(Protocol::P2p(peer)))
            .collect();
        addresses.extend(told.into_iter().filter(is_relayed));
        if addresses.is_empty() {
            return false;
        }
        let options = DialOpts::peer_id(peer)
            .addresses(addresses)
            .condition(PeerCondition::Disconnected)
            .build();
        let begun = self.swarm.dial(options).is_ok();
        if begun {
            *self.reach.under_way.entry(node).or_default() += 1;
        }
        begun
    }

    /// A dial has arrived.
    pub(super) fn arrived(&mut self, node: NodeId) {
        self.reach.around.remove(&node);
        self.reach.under_way.remove(&node);
    }

    /// This node can be reached at a further address.
    pub(super) fn on_new_address(&mut self, address: Multiaddr, now: Instant) {
        let text = address.to_string();
        {
            let mut addresses = lock(&self.shared.listen_addresses);
            if addresses.contains(&text) {
                return;
            }
            addresses.push(text);
        }
        if is_relayed(&address) {
            self.reach.relays_lost = 0;
        } else if self.reach.is_relay && is_worth_telling(&address) {
            // Reservations carry the gateway's addresses, so it has to know them.
            self.swarm.add_external_address(address);
        }
        self.reach.changed = Some(now + CHANGE_SETTLES);
    }

    /// A router has opened these ports, and no others any more.
    pub(super) fn on_mapped(&mut self, addresses: Vec<Multiaddr>, now: Instant) {
        let before = std::mem::replace(&mut self.reach.mapped, addresses);
        for closed in before.iter().filter(|address| !self.reach.mapped.contains(address)) {
            self.swarm.remove_external_address(closed);
        }
        for opened in self.reach.mapped.iter().filter(|address| !before.contains(address)) {
            self.swarm.add_external_address(opened.clone());
        }
        self.reach.changed = Some(now + CHANGE_SETTLES);
    }

    /// This node can no longer be reached at an address. Where the machine has lost it, connections over it are dead.
    pub(super) fn on_lost_address(&mut self, address: &Multiaddr, now: Instant) {
        let text = address.to_string();
        lock(&self.shared.listen_addresses).retain(|known| *known != text);
        self.swarm.remove_external_address(address);
        if let Some(ip) = ip_of(address) {
            if !self.has_ip(ip) {
                self.reach.lost.insert(ip);
            }
            self.reach.changed = Some(now + CHANGE_SETTLES);
        }
    }

    fn has_ip(&self, ip: IpAddr) -> bool {
        self.swarm.listeners().any(|address| ip_of(address) == Some(ip))
    }

    /// Tells everybody where this node is now. Whoever was met over an address that is lost is dialled anew at once: to
    /// wait for the silence of such connections takes longer.
    fn on_changed_network(&mut self) {
        self.meetings.forgive();
        let lost: BTreeSet<IpAddr> = std::mem::take(&mut self.reach.lost)
            .into_iter()
            .filter(|ip| !self.has_ip(*ip))
            .collect();
        let over_lost = |local: Option<IpAddr>| local.is_some_and(|local| lost.contains(&local));
        let (dead, alive): (Vec<_>, Vec<_>) = self
            .meetings
            .present
            .iter()
            .map(|(node, meeting)| (*node, over_lost(meeting.local)))
            .partition(|(_, dead)| *dead);
        if !lost.is_empty() {
            tracing::info!(?lost, "this machine's addresses have changed");
            let lost = lost.iter().map(IpAddr::to_canonical).collect();
            self.shared.tell(PeerEvent::Moved { lost });
        }
        if !dead.is_empty() {
            // To the others this is as a restart: they close what leads to the old address.
            self.instance = getrandom::u64().unwrap_or(self.instance.wrapping_add(1));
        }
        dead.into_iter().for_each(|(node, _)| self.disconnect(node));
        alive.into_iter().for_each(|(node, _)| self.greet(node));
    }
}

/// Whether others can make anything of an address.
pub(super) fn is_worth_telling(address: &Multiaddr) -> bool {
    ip_of(address).is_none_or(|ip| !is_of_this_machine_alone(ip))
}

/// The way through a gateway: its public TCP address where it tells one, since that passes most firewalls.
fn circuit(relay: &PeerRecord) -> Option<Multiaddr> {
    let addresses: Vec<Multiaddr> = readable(&relay.control_addresses)
        .into_iter()
        .filter(|address| !is_relayed(address))
        .collect();
    let tcp = |address: &&Multiaddr| address.iter().any(|part| matches!(part, Protocol::Tcp(_)));
    let public = |address: &&Multiaddr| ip_of(address).is_none_or(is_public);
    let best = addresses.iter().find(|address| public(address) && tcp(address));
    // A gateway that only this machine can reach keeps nobody reachable.
    let address = best.or_else(|| addresses.iter().find(|address| is_worth_telling(address)))?;
    let bare: Multiaddr = address
        .iter()
        .filter(|part| !matches!(part, Protocol::P2p(_)))
        .collect();
    Some(
        bare.with(Protocol::P2p(peer_of(relay.node)?))
            .with(Protocol::P2pCircuit),
    )
}
