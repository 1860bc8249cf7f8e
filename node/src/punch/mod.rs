//! Straight ways between data planes that routers stand between.
//!
//! Where a connection had to go through a tunnel, both nodes tell each other over the control plane at which addresses
//! gateways see them. An address that the machine itself has is dialled. Otherwise both send packets at the same moment,
//! so that each router takes the other's for answers. The connection counts only once its keys and its greeting are those
//! of the peer; until then, and where no hole can be made, the tunnel carries on.

mod addresses;
mod session;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use polder_protocol::charter::Capabilities;
use polder_protocol::hash::NodeId;
use polder_protocol::wire::Service;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::control::{ControlHandle, Path, PeerEvent};
use crate::data::{Class, DataPlane, Detour, TunnelStream};
use addresses::Own;

/// How often the connections to gateways and this node's own addresses are looked after.
const LOOK_EVERY: Duration = Duration::from_secs(3);

/// Gateways to which a data connection is kept, so that this node knows how it is seen.
const GATEWAYS_KEPT: usize = 2;

/// Peers that wait for a straight way.
const WANTED_MAX: usize = 256;

/// The first pause after punches that failed, and the longest.
const PAUSE_FIRST: Duration = Duration::from_secs(60);
/// See [`PAUSE_FIRST`].
const PAUSE_MAX: Duration = Duration::from_secs(30 * 60);

/// Makes straight ways, as long as it is held by its tasks.
pub struct Puncher {
    control: ControlHandle,
    data: DataPlane,
    /// What the operator says, in place of what is found out.
    told: Vec<SocketAddr>,
    look_now: Notify,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    own: Own,
    /// Peers with which an attempt is under way.
    busy: BTreeSet<NodeId>,
    /// Peers that are left alone for a while: how often it failed, and until when.
    paused: BTreeMap<NodeId, (u32, Instant)>,
    /// Where a router has opened the data port.
    mapped: Vec<SocketAddr>,
    /// Offers of initiators: nonce and candidates.
    offers: BTreeMap<NodeId, (u64, Vec<SocketAddr>)>,
}

impl std::fmt::Debug for Puncher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Puncher").finish_non_exhaustive()
    }
}

/// What the data plane asks for.
struct Around {
    control: ControlHandle,
    wanted: mpsc::Sender<NodeId>,
}

impl Detour for Around {
    fn open(&self, peer: NodeId) -> BoxFuture<'static, Result<Box<dyn TunnelStream>, String>> {
        let control = self.control.clone();
        async move {
            let stream = control.tunnel(peer).await.map_err(|error| error.to_string())?;
            Ok(Box::new(stream) as Box<dyn TunnelStream>)
        }
        .boxed()
    }

    fn path(&self, peer: NodeId) -> Path {
        self.control.peer(peer).map_or(Path::Relayed, |record| record.path)
    }

    fn likely(&self, peer: NodeId) -> bool {
        self.path(peer) == Path::Relayed
    }

    fn taken(&self, peer: NodeId) {
        // A full queue forgets it; the next connection asks again.
        let _ = self.wanted.try_send(peer);
    }
}

/// Lets the data plane go around, and makes straight ways, until `stop`.
pub fn start(control: ControlHandle, data: DataPlane, told: Vec<SocketAddr>, stop: CancellationToken) -> Arc<Puncher> {
    let (wanted, asked) = mpsc::channel(WANTED_MAX);
    data.set_detour(Arc::new(Around {
        control: control.clone(),
        wanted,
    }));
    let puncher = Arc::new(Puncher {
        control,
        data,
        told,
        look_now: Notify::new(),
        state: Mutex::default(),
    });
    let tasks = [
        Arc::clone(&puncher).take_tunnels().boxed(),
        Arc::clone(&puncher).answer().boxed(),
        Arc::clone(&puncher).look_around().boxed(),
        Arc::clone(&puncher).go_straight(asked).boxed(),
    ];
    for task in tasks {
        let stop = stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = task => {}
            }
        });
    }
    puncher
}

impl Puncher {
    /// How this node is seen from outside.
    pub fn own(&self) -> Own {
        self.state().own.clone()
    }

    /// Says where a router has opened the data port, in place of what was said before.
    pub fn set_mapped(&self, mapped: Vec<SocketAddr>) {
        self.state().mapped = mapped;
        self.look_now.notify_one();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn take_tunnels(self: Arc<Self>) {
        let Some(mut tunnels) = self.control.tunnels() else {
            return;
        };
        while let Some((peer, stream)) = tunnels.next().await {
            self.data.carry(peer, stream);
        }
    }

    async fn answer(self: Arc<Self>) {
        let mut asked = self.control.register(Service::Punch);
        while let Some(incoming) = asked.recv().await {
            let answer = Arc::clone(&self).on_request(incoming.from, &incoming.body);
            // The initiator may have gone.
            let _ = incoming.reply.send(answer);
        }
    }

    /// Keeps connections to gateways, and tells members when this node is seen elsewhere.
    async fn look_around(self: Arc<Self>) {
        let mut tick = tokio::time::interval(LOOK_EVERY);
        let mut events = self.control.events();
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = self.look_now.notified() => {}
                event = events.recv() => match event {
                    Ok(PeerEvent::Joined(_)) | Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => {}
                    Ok(_) => continue,
                    Err(tokio::sync::broadcast::error::RecvError::Closed) => return,
                },
            }
            let present = self.control.present();
            let gateways = present
                .iter()
                .filter(|peer| peer.path == Path::Direct && Capabilities(peer.capabilities).has(Capabilities::RELAY));
            for gateway in gateways.take(GATEWAYS_KEPT) {
                if self.data.road(gateway.node, Class::Act).is_none() {
                    // One that does not answer is asked again at the next look.
                    let _ = self.data.connect(gateway.node, Class::Act).await;
                }
            }
            let told = if self.told.is_empty() {
                self.state().mapped.clone()
            } else {
                self.told.clone()
            };
            let own = Own::find(&self.control, &self.data, &told);
            let changed = {
                let mut state = self.state();
                let changed = state.own != own;
                if changed {
                    state.own = own.clone();
                    // Another network may let through what the last one did not.
                    state.paused.clear();
                }
                changed
            };
            if changed && self.told.is_empty() {
                self.control.set_data_addresses(own.candidates).await;
            }
        }
    }

    /// Makes straight ways to those to whom a tunnel was taken.
    async fn go_straight(self: Arc<Self>, mut asked: mpsc::Receiver<NodeId>) {
        let mut tick = tokio::time::interval(LOOK_EVERY);
        loop {
            tokio::select! {
                peer = asked.recv() => match peer {
                    Some(peer) => self.begin(peer),
                    None => return,
                },
                _ = tick.tick() => {
                    let links = self.data.links();
                    let around = links.iter().filter(|link| link.road.is_tunnel()).map(|link| link.peer);
                    for peer in around.collect::<BTreeSet<_>>() {
                        self.begin(peer);
                    }
                }
            }
        }
    }

    fn begin(self: &Arc<Self>, peer: NodeId) {
        let now = Instant::now();
        let stands = |class| self.data.road(peer, class).is_some_and(|road| !road.is_tunnel());
        if stands(Class::Act) && (stands(Class::Bulk) || self.data.road(peer, Class::Bulk).is_none()) {
            return;
        }
        {
            let mut state = self.state();
            let paused = state.paused.get(&peer).is_some_and(|(_, until)| *until > now);
            if paused || !state.busy.insert(peer) {
                return;
            }
        }
        let puncher = Arc::clone(self);
        tokio::spawn(async move {
            let made = puncher.attempt(peer).await;
            let mut state = puncher.state();
            state.busy.remove(&peer);
            if made {
                state.paused.remove(&peer);
            } else {
                let failures = state.paused.get(&peer).map_or(0, |(failures, _)| *failures);
                let pause = PAUSE_FIRST.saturating_mul(1 << failures.min(5)).min(PAUSE_MAX);
                state
                    .paused
                    .insert(peer, (failures.saturating_add(1), Instant::now() + pause));
            }
        });
    }
}
