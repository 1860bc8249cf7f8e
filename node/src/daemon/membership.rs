//! Coming in, staying in, putting out: enrolment with an invite, renewal, and the spread of revocations and charters.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use polder_protocol::hash::{NodeId, digest};
use polder_protocol::invite::{Door, Invite};
use tokio::task::JoinHandle;

use super::acquaintances::Acquaintances;
use super::{Config, DaemonError};
use crate::control::{self, ControlConfig, ControlError, ControlHandle, PeerEvent, Service, is_multiaddress};
use crate::enrol::{self, Newcomer};
use crate::gate::Gate;
use crate::home::Home;
use crate::members::Members;

/// How often renewal is considered and files are read again, which `polder institution revoke` may have changed.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// How long peers have to hear of a revocation before those that it names are shown out.
const HEARD_TIME_MAX: Duration = Duration::from_secs(2);

/// Refusals that are remembered; whoever wants to fill this wastes only its own time.
const REFUSALS_MAX: usize = 64;

/// Doors of the charter that one node tries: if half of all are closed for good, one node in sixty thousand finds none.
const CHARTER_DOORS_TRIED_MAX: usize = 16;

/// Peers that turned this node away, and why: for `polder status`.
#[derive(Debug, Default)]
pub(crate) struct Refusals(Mutex<BTreeMap<NodeId, String>>);

impl Refusals {
    /// All of them.
    pub(super) fn list(&self) -> Vec<(NodeId, String)> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.iter().map(|(node, reason)| (*node, reason.clone())).collect()
    }

    fn note(&self, node: NodeId, reason: String) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() < REFUSALS_MAX || known.contains_key(&node) {
            known.insert(node, reason);
        }
    }

    fn forget(&self, node: NodeId) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&node);
    }
}

/// Shows the token of `invite` at its doors, one after the other, until one gateway certifies this node.
pub(super) async fn enrol(home: &Home, seed: [u8; 32], invite: &Invite, settings: &Config) -> Result<(), DaemonError> {
    let mut config = ControlConfig::loopback(seed);
    // Only to dial from: the node listens once it is a member.
    config.listen = Vec::new();
    config.proxy = settings.proxy()?;
    config.roots = settings.roots()?;
    let gate: Arc<dyn Gate> = Arc::new(Newcomer::new(invite));
    let (control, driver) = control::start(config, gate).await?;
    let mut last = None;
    for door in &invite.doors {
        let answer = control
            .request_at(door.node, &door.control, Service::Enrol, enrol::request(invite))
            .await;
        match answer {
            Ok(answer) => {
                let (home, invite) = (home.clone(), invite.clone());
                let accepted = blocking(move || enrol::accept(&home, &invite, &answer)).await;
                control.shutdown().await;
                driver.abort();
                accepted?;
                return Ok(());
            }
            Err(error) => last = Some(error),
        }
    }
    control.shutdown().await;
    driver.abort();
    Err(last.map_or(DaemonError::NoDoor, |source| DaemonError::Door { source }))
}

/// Answers newcomers, where this home holds an institution's key, and keeps this node's own membership fresh.
pub(super) fn keep(home: &Home, members: &Arc<Members>, control: &ControlHandle, refusals: &Arc<Refusals>) {
    let refusals = Arc::clone(refusals);
    answer_newcomers(home.clone(), Arc::clone(members), control);
    answer_revocations(home.clone(), Arc::clone(members), control);
    let (home, members, control) = (home.clone(), Arc::clone(members), control.clone());
    tokio::spawn(async move {
        let mut tick = tokio::time::interval(LOOK_EVERY);
        let mut events = control.events();
        loop {
            tokio::select! {
                _ = tick.tick() => {
                    reread(&home, &members, &control).await;
                    renew(&home, &members, &control).await;
                }
                event = events.recv() => match event {
                    Ok(PeerEvent::Joined(record)) => {
                        refusals.forget(record.node);
                        tell(&members, &control, record.node);
                    }
                    Ok(PeerEvent::RefusedBy { node, reason }) => refusals.note(node, reason),
                    Ok(_) | Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => {}
                    Err(tokio::sync::broadcast::error::RecvError::Closed) => return,
                },
            }
        }
    });
}

fn answer_newcomers(home: Home, members: Arc<Members>, control: &ControlHandle) {
    let mut asked = control.register(Service::Enrol);
    tokio::spawn(async move {
        while let Some(incoming) = asked.recv().await {
            let (home, members) = (home.clone(), Arc::clone(&members));
            let answer = blocking(move || enrol::handle(&home, &members, incoming.from, &incoming.body)).await;
            // The newcomer may have gone.
            let _ = incoming.reply.send(answer);
        }
    });
}

/// Takes charters and lists of revocations that members tell of.
fn answer_revocations(home: Home, members: Arc<Members>, control: &ControlHandle) {
    let mut asked = control.register(Service::Revocations);
    let control = control.clone();
    tokio::spawn(async move {
        while let Some(incoming) = asked.recv().await {
            if take(&members, &incoming.body) {
                let (home, members, control) = (home.clone(), Arc::clone(&members), control.clone());
                tokio::spawn(async move {
                    // Kept at once: whoever is shut out now may be stopped next.
                    let (folder, own) = (home, Arc::clone(&members));
                    if let Err(error) = blocking(move || own.reload(&folder)).await {
                        tracing::warn!(%error, "cannot keep news of the membership");
                    }
                    tell_all(&members, &control, Some(incoming.from)).await;
                });
            }
            // The teller may have gone.
            let _ = incoming.reply.send(Vec::new());
        }
    });
}

/// What members tell each other: the chain of charters, and each institution's newest list of revocations.
type News = (
    Vec<u8>,
    Vec<polder_protocol::identity::Signed<polder_protocol::charter::Revocation>>,
);

fn take(members: &Members, body: &[u8]) -> bool {
    let Ok((charters, lists)) = postcard::from_bytes::<News>(body) else {
        return false;
    };
    let mut changed =
        polder_protocol::charter::Charters::from_bytes(&charters).is_ok_and(|charters| members.update(charters));
    for list in lists {
        changed |= members.revoke(list).unwrap_or(false);
    }
    changed
}

/// News, as fuzz targets see them.
pub(super) fn untrusted_news(bytes: &[u8]) {
    use polder_protocol::charter::{Charters, Membership};

    let Ok((charters, lists)) = postcard::from_bytes::<News>(bytes) else {
        return;
    };
    let again = postcard::to_allocvec(&(&charters, &lists)).expect("bytes and lists of bytes");
    assert_eq!(
        postcard::from_bytes::<News>(&again).as_ref(),
        Ok(&(charters.clone(), lists.clone()))
    );
    if let Ok(charters) = Charters::from_bytes(&charters) {
        let mut membership = Membership::new(charters);
        for list in lists {
            let _ = membership.revoke(list);
        }
    }
}

/// Tells `to` what this node knows of the membership, on a task that ends when it has heard.
fn tell(members: &Members, control: &ControlHandle, to: NodeId) -> JoinHandle<()> {
    let news: News = (members.charters().to_bytes(), members.revocations());
    // News hold nothing that postcard cannot write.
    let body = postcard::to_allocvec(&news).unwrap_or_default();
    let control = control.clone();
    tokio::spawn(async move {
        if let Err(error) = control.request(to, Service::Revocations, body).await {
            tracing::debug!(peer = %to.short(), %error, "a peer did not take news of the membership");
        }
    })
}

/// Tells everybody who is present, those too that the news shut out: they are to know why. Then asks the gate anew.
async fn tell_all(members: &Members, control: &ControlHandle, but: Option<NodeId>) {
    let peers = control.present().into_iter().filter(|peer| Some(peer.node) != but);
    let told: Vec<_> = peers.map(|peer| tell(members, control, peer.node)).collect();
    // A peer that does not listen holds nobody up.
    let _ = tokio::time::timeout(HEARD_TIME_MAX, futures::future::join_all(told)).await;
    control.reintroduce().await;
}

/// Takes what commands changed on disk while the daemon ran, and keeps what peers told.
async fn reread(home: &Home, members: &Arc<Members>, control: &ControlHandle) {
    let (folder, own) = (home.clone(), Arc::clone(members));
    let changed = blocking(move || own.reload(&folder)).await;
    match changed {
        Ok(true) => {
            knock(members, control);
            tell_all(members, control, None).await;
        }
        Ok(false) => {}
        Err(error) => tracing::warn!(%error, "cannot read the membership again"),
    }
}

/// Dials the doors that a new charter names: a node that knew nobody begins there, without being started anew.
fn knock(members: &Members, control: &ControlHandle) {
    let present = control.present();
    for (node, addresses) in charter_doors(members.node(), &members.charters().current().doors) {
        if present.iter().any(|peer| peer.node == node) {
            continue;
        }
        let control = control.clone();
        tokio::spawn(async move {
            if let Err(error) = control.dial(node, &addresses).await {
                tracing::debug!(peer = %node.short(), %error, "a door of the charter does not open");
            }
        });
    }
}

/// Asks the institution's gateway for a new certificate once half of the old one's life is over.
async fn renew(home: &Home, members: &Arc<Members>, control: &ControlHandle) {
    if !members.wants_renewal() {
        return;
    }
    let own = members.institution();
    for peer in control.present().into_iter().filter(|peer| peer.institution == own) {
        let Ok(answer) = control
            .request(peer.node, Service::Enrol, enrol::renewal_request(members))
            .await
        else {
            continue;
        };
        let (home, members) = (home.clone(), Arc::clone(members));
        match blocking(move || enrol::accept_renewal(&home, &members, &answer)).await {
            Ok(()) => return control.reintroduce().await,
            Err(error) => tracing::debug!(peer = %peer.node.short(), %error, "a peer does not renew the certificate"),
        }
    }
}

/// Peers to start from: those that the configuration lists, the doors of the invite, those of the charter, and those that
/// were met last. Any of them suffices. Doors relay, so they come first.
pub(super) fn bootstrap(
    home: &Home,
    members: &Members,
    known: &Acquaintances,
    listed: Vec<(NodeId, Vec<String>)>,
) -> Result<Vec<(NodeId, Vec<String>)>, DaemonError> {
    let mut peers = listed;
    let invited = home
        .peers()?
        .into_iter()
        .filter_map(|door| Some((door.id()?, door.control)));
    let doors = invited.chain(charter_doors(members.node(), &members.charters().current().doors));
    for (node, addresses) in doors.chain(known.latest()) {
        if peers.iter().all(|(known, _)| *known != node) {
            peers.push((node, addresses));
        }
    }
    Ok(peers)
}

/// The doors of a charter that this node tries: each node has its own few, so that a large federation's members do not all
/// hang on the same gateway. What is no address was written by founders, and must not keep the node from starting.
fn charter_doors(own: NodeId, doors: &[Door]) -> Vec<(NodeId, Vec<String>)> {
    let mut others: Vec<&Door> = doors.iter().filter(|door| door.node != own).collect();
    others.sort_by_cached_key(|door| digest(&[own.0, door.node.0].concat()));
    let addresses = |door: &Door| -> Vec<String> {
        let usable = door.control.iter().filter(|address| is_multiaddress(address));
        usable.cloned().collect()
    };
    let tried = others.into_iter().map(|door| (door.node, addresses(door)));
    tried
        .filter(|(_, addresses)| !addresses.is_empty())
        .take(CHARTER_DOORS_TRIED_MAX)
        .collect()
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

impl From<ControlError> for DaemonError {
    fn from(source: ControlError) -> Self {
        Self::Control(source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_tries_some_doors_of_a_long_charter_and_never_itself_or_what_is_no_address() {
        let door = |id: u8, address: &str| Door {
            node: NodeId([id; 32]),
            control: vec![address.to_owned()],
            data: Vec::new(),
        };
        let mut doors: Vec<Door> = (0..64).map(|id| door(id, "/ip4/192.0.2.1/tcp/4001")).collect();
        doors.push(door(99, "gateway.example.org"));
        let tried = |own: u8| charter_doors(NodeId([own; 32]), &doors);
        assert_eq!(tried(0).len(), CHARTER_DOORS_TRIED_MAX);
        assert_ne!(tried(0), tried(1), "not all try the same");
        for own in 0..64 {
            let nodes: Vec<u8> = tried(own).iter().map(|(node, _)| node.0[0]).collect();
            assert!(!nodes.contains(&own) && !nodes.contains(&99), "{nodes:?}");
        }
    }
}
