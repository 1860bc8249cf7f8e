//! Who may come to the door at all: shares of the places for strangers, a pace, and bans that expire.
//!
//! A flood from one network must leave room for newcomers from others, so no neighbourhood has more than a part of the
//! handshakes and of the places for strangers, and each may knock only so often. Whoever misbehaves by name stays out
//! for a minute, then two, up to an hour, and is forgotten when it has been quiet for as long again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use libp2p::PeerId;
use libp2p::swarm::ConnectionId;

use crate::neighbourhood::{Census, Neighbourhood};

/// Connections of strangers at a time: as many as there may be strangers.
pub(super) const STRANGERS_MAX: usize = super::meetings::STRANGERS_MAX;

/// Those from one neighbourhood.
const STRANGERS_SHARE_MAX: usize = STRANGERS_MAX / 4;

/// How many knocks a neighbourhood has saved at most: a room of machines that starts at once, each over TCP and QUIC.
const KNOCKS_SAVED_MAX: u32 = 240;

/// How many it earns in a second. A handshake costs a signature, some 0.2 ms.
const KNOCKS_PER_SECOND: u32 = 8;

/// Neighbourhoods whose knocks are counted. Beyond that those that have saved most are forgotten.
const PACES_MAX: usize = 4096;

/// Peers whose offences are remembered.
const OFFENDERS_MAX: usize = 4096;

/// Offences after which a peer is banned. A node whose certificate has expired hears why a few times.
const OFFENCES_MAX: u32 = 6;

/// The first ban. Each further one is twice as long.
const BAN_FIRST: Duration = Duration::from_secs(60);

/// The longest ban, and how long an offender must be quiet to be forgotten.
const BAN_MAX: Duration = Duration::from_secs(3600);

/// Why a connection is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum TurnedAway {
    #[error("its network has as many handshakes under way as it may")]
    Handshakes,
    #[error("the places that are left are for networks of members")]
    Reserved,
    #[error("its network knocks too often")]
    Pace,
    #[error("its network has as many strangers here as it may")]
    Strangers,
    #[error("it is banned for a while")]
    Banned,
}

/// What a neighbourhood has saved.
#[derive(Debug)]
struct Pace {
    saved: u32,
    since: Instant,
}

#[derive(Debug)]
struct Offender {
    offences: u32,
    bans: u32,
    last: Instant,
    until: Option<Instant>,
}

/// All of it. It holds nothing for a connection that has ended.
#[derive(Debug)]
pub(super) struct Turnstile {
    handshakes_max: usize,
    handshakes_share_max: usize,
    handshakes: BTreeMap<ConnectionId, Neighbourhood>,
    shaking: Census,
    strangers: BTreeMap<ConnectionId, (PeerId, Neighbourhood)>,
    strange: Census,
    /// Where members are: they may knock as often as they like.
    members: BTreeMap<ConnectionId, (PeerId, Option<IpAddr>)>,
    admitted: BTreeSet<PeerId>,
    /// Where members have been: a quarter of the handshakes is theirs, since a flood may come from many networks.
    familiar: BTreeSet<Neighbourhood>,
    paces: BTreeMap<Neighbourhood, Pace>,
    offenders: BTreeMap<PeerId, Offender>,
}

impl Turnstile {
    /// `handshakes_max` is how many may be under way in all.
    pub(super) fn new(handshakes_max: usize) -> Self {
        Self {
            handshakes_max,
            handshakes_share_max: (handshakes_max / 16).max(1),
            handshakes: BTreeMap::new(),
            shaking: Census::default(),
            strangers: BTreeMap::new(),
            strange: Census::default(),
            members: BTreeMap::new(),
            admitted: BTreeSet::new(),
            familiar: BTreeSet::new(),
            paces: BTreeMap::new(),
            offenders: BTreeMap::new(),
        }
    }

    /// A connection whose handshake begins.
    pub(super) fn knocks(&mut self, id: ConnectionId, ip: Option<IpAddr>, now: Instant) -> Result<(), TurnedAway> {
        let neighbourhood = Neighbourhood::of(ip);
        let known = ip.is_some() && self.members.values().any(|(_, at)| *at == ip);
        if !known && !self.keeps_pace(neighbourhood, now) {
            return Err(TurnedAway::Pace);
        }
        let open_to_all = self.handshakes_max - self.handshakes_max / 4;
        if self.handshakes.len() >= open_to_all && !self.familiar.contains(&neighbourhood) {
            return Err(TurnedAway::Reserved);
        }
        if !self.shaking.enter(neighbourhood, self.handshakes_share_max) {
            return Err(TurnedAway::Handshakes);
        }
        self.handshakes.insert(id, neighbourhood);
        Ok(())
    }

    /// A connection that ended in any way, or was never made.
    pub(super) fn leaves(&mut self, id: ConnectionId) {
        if let Some(neighbourhood) = self.handshakes.remove(&id) {
            self.shaking.leave(neighbourhood);
        }
        if let Some((_, neighbourhood)) = self.strangers.remove(&id) {
            self.strange.leave(neighbourhood);
        }
        if let Some((peer, _)) = self.members.remove(&id)
            && !self.members.values().any(|(other, _)| *other == peer)
        {
            // It greets again when it comes back.
            self.admitted.remove(&peer);
        }
    }

    /// A connection whose handshake is done. Those that this node dialled take no place.
    pub(super) fn enters(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        ip: Option<IpAddr>,
        dialled: bool,
        now: Instant,
    ) -> Result<(), TurnedAway> {
        self.leaves(id);
        if self.is_banned(&peer, now) {
            return Err(TurnedAway::Banned);
        }
        if self.admitted.contains(&peer) {
            self.members.insert(id, (peer, ip));
            return Ok(());
        }
        let neighbourhood = Neighbourhood::of(ip);
        let share = if dialled { usize::MAX } else { STRANGERS_SHARE_MAX };
        if !dialled && self.strangers.len() >= STRANGERS_MAX || !self.strange.enter(neighbourhood, share) {
            return Err(TurnedAway::Strangers);
        }
        self.strangers.insert(id, (peer, neighbourhood));
        Ok(())
    }

    /// A stranger has shown its credentials; `ip` is where it is seen.
    pub(super) fn admit(&mut self, peer: PeerId, ip: Option<IpAddr>) {
        self.offenders.remove(&peer);
        self.admitted.insert(peer);
        if self.familiar.len() < PACES_MAX {
            self.familiar.insert(Neighbourhood::of(ip));
        }
        let own: Vec<ConnectionId> = self
            .strangers
            .iter()
            .filter(|(_, (who, _))| *who == peer)
            .map(|(id, _)| *id)
            .collect();
        for id in own {
            if let Some((_, neighbourhood)) = self.strangers.remove(&id) {
                self.strange.leave(neighbourhood);
            }
            self.members.insert(id, (peer, ip));
        }
    }

    /// A peer did what no honest one does. Whether it is banned now.
    pub(super) fn offended(&mut self, peer: PeerId, now: Instant) -> bool {
        if self.offenders.len() >= OFFENDERS_MAX && !self.offenders.contains_key(&peer) {
            let quietest = self.offenders.iter().min_by_key(|(_, offender)| offender.last);
            let quietest = quietest.map(|(peer, _)| *peer);
            quietest.map(|peer| self.offenders.remove(&peer));
        }
        let offender = self.offenders.entry(peer).or_insert(Offender {
            offences: 0,
            bans: 0,
            last: now,
            until: None,
        });
        if now.saturating_duration_since(offender.last) > BAN_MAX {
            (offender.offences, offender.bans) = (0, 0);
        }
        offender.last = now;
        offender.offences = offender.offences.saturating_add(1);
        if offender.offences < OFFENCES_MAX {
            return false;
        }
        offender.offences = 0;
        let ban = BAN_FIRST.saturating_mul(1 << offender.bans.min(16)).min(BAN_MAX);
        offender.bans = offender.bans.saturating_add(1);
        offender.until = Some(now + ban);
        true
    }

    /// Whether a peer must stay away for now.
    pub(super) fn is_banned(&self, peer: &PeerId, now: Instant) -> bool {
        let offender = self.offenders.get(peer);
        offender
            .and_then(|offender| offender.until)
            .is_some_and(|until| now < until)
    }

    fn keeps_pace(&mut self, neighbourhood: Neighbourhood, now: Instant) -> bool {
        if self.paces.len() >= PACES_MAX && !self.paces.contains_key(&neighbourhood) {
            // Whoever has saved most has knocked least.
            let richest = self
                .paces
                .iter()
                .max_by_key(|(_, pace)| pace.saved)
                .map(|(who, _)| *who);
            richest.map(|who| self.paces.remove(&who));
        }
        let pace = self.paces.entry(neighbourhood).or_insert(Pace {
            saved: KNOCKS_SAVED_MAX,
            since: now,
        });
        let seconds = now.saturating_duration_since(pace.since).as_secs();
        if seconds > 0 {
            let earned = u32::try_from(seconds)
                .unwrap_or(u32::MAX)
                .saturating_mul(KNOCKS_PER_SECOND);
            pace.saved = pace.saved.saturating_add(earned).min(KNOCKS_SAVED_MAX);
            pace.since = now;
        }
        match pace.saved.checked_sub(1) {
            Some(left) => {
                pace.saved = left;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_network_leaves_handshakes_for_others() {
        let (mut turnstile, now) = (Turnstile::new(256), Instant::now());
        let results: Vec<_> = (0..40).map(|n| turnstile.knocks(id(n), ip(1), now)).collect();
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 16);
        assert_eq!(results.last(), Some(&Err(TurnedAway::Handshakes)));
        assert_eq!(turnstile.knocks(id(100), ip(2), now), Ok(()));
        turnstile.leaves(id(0));
        assert_eq!(turnstile.knocks(id(101), ip(1), now), Ok(()));
    }

    #[test]
    fn many_networks_leave_handshakes_for_those_of_members() {
        let (mut turnstile, now) = (Turnstile::new(256), Instant::now());
        assert_eq!(turnstile.enters(id(0), peer(1), ip(200), false, now), Ok(()));
        turnstile.admit(peer(1), ip(200));
        let taken = (1..400)
            .filter(|n| turnstile.knocks(id(*n), ip((n % 100) as u8), now).is_ok())
            .count();
        assert_eq!(taken, 192);
        assert_eq!(turnstile.knocks(id(500), ip(150), now), Err(TurnedAway::Reserved));
        assert_eq!(turnstile.knocks(id(501), ip(200), now), Ok(()));
    }

    #[test]
    fn a_network_that_knocks_too_often_waits_and_one_with_a_member_does_not() {
        let (mut turnstile, now) = (Turnstile::new(64), Instant::now());
        let mut knock = |n: usize, at: Instant| {
            let knocked = turnstile.knocks(id(n), ip(1), at);
            turnstile.leaves(id(n));
            knocked
        };
        let early = (0..300).filter(|n| knock(*n, now).is_ok()).count();
        assert_eq!(early, KNOCKS_SAVED_MAX as usize);
        assert_eq!(knock(301, now), Err(TurnedAway::Pace));
        let later = now + Duration::from_secs(2);
        assert_eq!(
            (302..400).filter(|n| knock(*n, later).is_ok()).count(),
            2 * KNOCKS_PER_SECOND as usize
        );

        assert_eq!(turnstile.enters(id(500), peer(1), ip(1), false, later), Ok(()));
        turnstile.admit(peer(1), ip(1));
        assert_eq!(turnstile.knocks(id(501), ip(1), later), Ok(()));
    }

    #[test]
    fn strangers_of_one_network_have_a_quarter_of_the_places_until_they_are_admitted() {
        let (mut turnstile, now) = (Turnstile::new(64), Instant::now());
        let come = |turnstile: &mut Turnstile, n: usize| turnstile.enters(id(n), peer(n as u8), ip(1), false, now);
        for n in 0..STRANGERS_SHARE_MAX {
            assert_eq!(come(&mut turnstile, n), Ok(()));
        }
        assert_eq!(come(&mut turnstile, 60), Err(TurnedAway::Strangers));
        turnstile.admit(peer(0), ip(1));
        assert_eq!(come(&mut turnstile, 61), Ok(()));
        assert_eq!(turnstile.enters(id(200), peer(200), ip(2), false, now), Ok(()));
    }

    #[test]
    fn a_ban_begins_after_some_offences_doubles_and_expires() {
        let (mut turnstile, now) = (Turnstile::new(64), Instant::now());
        let offend =
            |turnstile: &mut Turnstile, at| (0..OFFENCES_MAX).filter(|_| turnstile.offended(peer(1), at)).count();
        assert_eq!(offend(&mut turnstile, now), 1);
        assert_eq!(
            turnstile.enters(id(1), peer(1), ip(1), false, now),
            Err(TurnedAway::Banned)
        );
        let after = now + BAN_FIRST;
        assert_eq!(turnstile.enters(id(1), peer(1), ip(1), false, after), Ok(()));
        offend(&mut turnstile, after);
        assert!(turnstile.is_banned(&peer(1), after + BAN_FIRST));
        assert!(!turnstile.is_banned(&peer(1), after + 2 * BAN_FIRST));
        let much_later = after + 2 * BAN_MAX;
        offend(&mut turnstile, much_later);
        assert!(!turnstile.is_banned(&peer(1), much_later + BAN_FIRST));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (mut turnstile, now) = (Turnstile::new(64), Instant::now());
        for n in 0..(PACES_MAX + 50) {
            let [a, b] = u16::try_from(n).expect("small").to_be_bytes();
            turnstile.knocks(id(n), Some(IpAddr::from([10, a, b, 1])), now).ok();
            turnstile.leaves(id(n));
            turnstile.offended(PeerId::random(), now);
        }
        assert!(turnstile.paces.len() <= PACES_MAX && turnstile.offenders.len() <= OFFENDERS_MAX);
        assert!(turnstile.handshakes.is_empty() && turnstile.strangers.is_empty());
    }

    fn id(n: usize) -> ConnectionId {
        ConnectionId::new_unchecked(n)
    }

    fn ip(network: u8) -> Option<IpAddr> {
        Some(IpAddr::from([192, 0, network, 7]))
    }

    fn peer(n: u8) -> PeerId {
        super::super::address::keypair([n; 32])
            .expect("a seed")
            .public()
            .to_peer_id()
    }
}
