//! One attempt of two nodes to reach each other straight: offers, and the moment from which both send.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use polder_protocol::hash::NodeId;
use polder_protocol::wire::{self, Offer, Punch, Service, Standing};
use tokio::time::Instant;

use super::Puncher;
use crate::control::ControlError;
use crate::data::Class;

/// Attempts in a row; each names fresh candidates.
const ATTEMPTS: u32 = 3;

/// How long both send: a lost packet or two, and a router that is slow to open.
const SEND_FOR: Duration = Duration::from_secs(4);

/// The pauses between packets grow from the first to the last of these: the first ones open the way, later ones make up
/// for those that were lost.
const SEND_EVERY: (Duration, Duration) = (Duration::from_millis(15), Duration::from_millis(100));

/// What a plain dial of a public address gets before a firewall is taken to stand before it.
const PLAIN_DIAL_MAX: Duration = Duration::from_millis(1500);

/// What one question over a relayed connection may take.
const QUESTION_MAX: Duration = Duration::from_secs(5);

/// Offers that are remembered, one for each initiator.
const OFFERS_MAX: usize = 256;

impl Puncher {
    /// Tries to reach `peer` straight, and says whether that is no longer worth a try soon.
    pub(super) async fn attempt(self: &Arc<Self>, peer: NodeId) -> bool {
        for _ in 0..ATTEMPTS {
            match self.attempt_once(peer).await {
                Ok(Some(address)) => {
                    // The hole is there: the other connection goes through it as well.
                    let bulk = self.data.dial_straight(peer, Class::Bulk, &[address], SEND_FOR).await;
                    tracing::info!(peer = %peer.short(), %address, both = bulk.is_ok(), "a straight way");
                    return true;
                }
                // Symmetric on one side: the next attempt would end as this one.
                Ok(None) => return false,
                Err(Missed::Control(error)) => {
                    tracing::debug!(peer = %peer.short(), %error, "no talk about a straight way");
                    return false;
                }
                Err(Missed::Blocked) => tracing::debug!(peer = %peer.short(), "no straight way yet"),
            }
        }
        false
    }

    async fn attempt_once(self: &Arc<Self>, peer: NodeId) -> Result<Option<SocketAddr>, Missed> {
        let own = self.own();
        let nonce = getrandom::u64().unwrap_or_default();
        let offer = Punch::Offer(Offer {
            nonce,
            candidates: own.candidates.clone(),
            standing: own.standing,
        });
        let asked = Instant::now();
        let answer = self.ask(peer, &offer).await.map_err(Missed::Control)?;
        let rtt = asked.elapsed();
        let Ok(Punch::Offer(theirs)) = wire::decode::<Punch>(&answer) else {
            let reason = "its offer is none".to_owned();
            return Err(Missed::Control(ControlError::Unreachable { node: peer, reason }));
        };
        if theirs.standing == Standing::Public {
            let dialled = self
                .data
                .dial_straight(peer, Class::Act, &theirs.candidates, PLAIN_DIAL_MAX);
            if let Ok(address) = dialled.await {
                return Ok(Some(address));
            }
        } else if own.standing == Standing::Public
            && let Some(address) = self.is_met(peer, PLAIN_DIAL_MAX).await
        {
            return Ok(Some(address));
        }
        if [own.standing, theirs.standing].contains(&Standing::Symmetric) {
            return Ok(None);
        }
        self.data.expect_punched(peer);
        let go = {
            let (puncher, go) = (Arc::clone(self), Punch::Go { nonce });
            tokio::spawn(async move { puncher.ask(peer, &go).await })
        };
        tokio::time::sleep(rtt / 2).await;
        let sending = self.send_punches(peer, theirs.candidates.clone());
        let dialling = self.data.dial_straight(peer, Class::Act, &theirs.candidates, SEND_FOR);
        tokio::pin!(sending, dialling);
        let mut sent = false;
        let dialled = loop {
            tokio::select! {
                dialled = &mut dialling => break dialled,
                () = &mut sending, if !sent => sent = true,
            }
        };
        go.abort();
        match dialled {
            Ok(address) => Ok(Some(address)),
            Err(error) => {
                tracing::debug!(peer = %peer.short(), %error, "a punch missed");
                Err(Missed::Blocked)
            }
        }
    }

    /// Answers an initiator.
    pub(super) fn on_request(self: Arc<Self>, from: NodeId, body: &[u8]) -> Vec<u8> {
        match wire::decode::<Punch>(body) {
            Ok(Punch::Offer(theirs)) => {
                let own = self.own();
                let answer = Punch::Offer(Offer {
                    nonce: theirs.nonce,
                    candidates: own.candidates,
                    standing: own.standing,
                });
                {
                    let mut state = self.state();
                    if state.offers.len() >= OFFERS_MAX && !state.offers.contains_key(&from) {
                        state.offers.pop_first();
                    }
                    state.offers.insert(from, (theirs.nonce, theirs.candidates.clone()));
                }
                if theirs.standing == Standing::Public && own.standing != Standing::Public {
                    // The initiator cannot reach this node, which can reach the initiator.
                    tokio::spawn(async move {
                        let dialled = self
                            .data
                            .dial_straight(from, Class::Act, &theirs.candidates, PLAIN_DIAL_MAX);
                        if dialled.await.is_ok() {
                            let bulk = self
                                .data
                                .dial_straight(from, Class::Bulk, &theirs.candidates, PLAIN_DIAL_MAX);
                            let _ = bulk.await;
                        }
                    });
                }
                wire::encode(&answer)
            }
            Ok(Punch::Go { nonce }) => {
                let offered = self.state().offers.remove(&from);
                if let Some((_, candidates)) = offered.filter(|(offered, _)| *offered == nonce) {
                    self.data.expect_punched(from);
                    tokio::spawn(async move { self.send_punches(from, candidates).await });
                }
                Vec::new()
            }
            // The initiator speaks a later version, or nonsense.
            Err(_) => Vec::new(),
        }
    }

    /// Sends packets to all candidates until a straight way stands or the time is over.
    async fn send_punches(&self, peer: NodeId, candidates: Vec<SocketAddr>) {
        let until = Instant::now() + SEND_FOR;
        let (mut pause, longest) = SEND_EVERY;
        while Instant::now() < until && !self.is_straight(peer) {
            self.data.punch(&candidates);
            tokio::time::sleep(pause).await;
            pause = (pause * 5 / 4).min(longest);
        }
    }

    fn is_straight(&self, peer: NodeId) -> bool {
        self.data.road(peer, Class::Act).is_some_and(|road| !road.is_tunnel())
    }

    /// Waits for the peer's own dial.
    async fn is_met(&self, peer: NodeId, time_max: Duration) -> Option<SocketAddr> {
        let until = Instant::now() + time_max;
        while Instant::now() < until {
            let links = self.data.links();
            let mut straight = links
                .iter()
                .filter(|link| link.peer == peer && link.class == Class::Act);
            if let Some(address) = straight.find_map(|link| link.remote) {
                return Some(address);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        None
    }

    async fn ask(&self, peer: NodeId, punch: &Punch) -> Result<Vec<u8>, ControlError> {
        self.control
            .request_within(peer, Service::Punch, wire::encode(punch), QUESTION_MAX)
            .await
    }
}

/// Why there is no straight way.
enum Missed {
    Control(ControlError),
    Blocked,
}
