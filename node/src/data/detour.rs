//! Ways to peers that no address leads to, which the control plane opens, and straight ways that are tried at its word.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{AsyncRead, AsyncWrite};
use polder_protocol::hash::NodeId;

use super::error::{Closing, DataError};
use super::greeting::close;
use super::links::Road;
use super::plane::{DataPlane, Way};
use super::roads::{Tunnel, is_tunnel};
use super::settings::{ADDRESSES_MAX, Class};
use crate::control::Path;

/// The head start of straight ways over a tunnel: two round trips between antipodes.
pub(super) const STRAIGHT_FIRST: Duration = Duration::from_millis(750);

/// A stream that carries packets.
pub trait TunnelStream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin + 'static> TunnelStream for S {}

/// Opens tunnels, and hears when one had to be taken.
pub trait Detour: Send + Sync + 'static {
    /// A tunnel to `peer`; the error is for people.
    fn open(&self, peer: NodeId) -> BoxFuture<'static, Result<Box<dyn TunnelStream>, String>>;

    /// How the control plane, whose streams tunnels are, is connected to `peer`.
    fn path(&self, peer: NodeId) -> Path;

    /// Whether a tunnel is likely to be the only way, so that it is tried at once.
    fn likely(&self, peer: NodeId) -> bool;

    /// A connection goes through a tunnel. Perhaps a straight way can be made.
    fn taken(&self, peer: NodeId);
}

impl DataPlane {
    /// Takes detours from now on. The first call counts.
    pub fn set_detour(&self, detour: Arc<dyn Detour>) {
        let _ = self.inner.detour.set(detour);
    }

    /// Carries the packets of a tunnel that `peer` opened, until it ends.
    pub fn carry<S: TunnelStream>(&self, peer: NodeId, stream: S) {
        match self.inner.roads.open(peer, self.path(peer)) {
            Some(tunnel) => {
                self.spawn(move |plane| async move { plane.carry_to_the_end(tunnel, stream).await });
            }
            None => tracing::warn!(peer = %peer.short(), "too many tunnels"),
        }
    }

    /// Opens a tunnel to `peer` and gives the address at which the endpoint finds it.
    pub(super) async fn dig(&self, peer: NodeId) -> Result<SocketAddr, DataError> {
        let unreachable = |tried: String| DataError::Unreachable { peer, tried };
        let detour = self.inner.detour.get().ok_or(DataError::NoAddress { peer })?;
        let stream = detour.open(peer).await.map_err(unreachable)?;
        let tunnel = self.inner.roads.open(peer, detour.path(peer));
        let tunnel = tunnel.ok_or_else(|| unreachable("there are too many tunnels".to_owned()))?;
        let address = tunnel.address;
        self.spawn(move |plane| async move { plane.carry_to_the_end(tunnel, stream).await });
        Ok(address)
    }

    fn path(&self, peer: NodeId) -> Path {
        self.inner
            .detour
            .get()
            .map_or(Path::Relayed, |detour| detour.path(peer))
    }

    async fn carry_to_the_end<S: TunnelStream>(self, tunnel: Tunnel, stream: S) {
        let address = tunnel.address;
        self.inner.roads.carry(tunnel, stream).await;
        // Nobody waits for what cannot come.
        for link in self.inner.links.all().iter().filter(|link| link.remote == address) {
            close(&link.connection, Closing::Replaced, "its tunnel has ended");
        }
    }

    /// Tries straight ways to `peer`, all at once, for so long. Streams that are opened later take the new connection.
    ///
    /// # Errors
    ///
    /// As [`DataPlane::open`]; [`DataError::Stalled`] when nothing answered in time.
    pub async fn dial_straight(
        &self,
        peer: NodeId,
        class: Class,
        addresses: &[SocketAddr],
        time_max: Duration,
    ) -> Result<SocketAddr, DataError> {
        let straight = addresses
            .iter()
            .filter(|address| !is_tunnel(**address))
            .take(ADDRESSES_MAX);
        let ways = straight
            .map(|address| (Duration::ZERO, Way::Straight(*address)))
            .collect();
        let raced = tokio::time::timeout(time_max, self.race(peer, class, ways)).await;
        let late = DataError::Stalled {
            peer,
            what: "to answer on a straight way",
            after: time_max,
        };
        raced.unwrap_or(Err(late)).map(|link| link.remote)
    }

    /// Takes a connection with `peer` that comes in the next seconds for the fruit of a punch.
    pub fn expect_punched(&self, peer: NodeId) {
        self.inner.links.expect_punched(peer);
    }

    /// Which way streams of `class` to `peer` go now, where a connection stands.
    pub fn road(&self, peer: NodeId, class: Class) -> Option<Road> {
        self.inner.links.find(peer, class).map(|link| link.road)
    }
}
