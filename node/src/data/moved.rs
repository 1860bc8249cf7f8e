//! What becomes of connections when this machine loses an address.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::DataPlane;
use super::error::Closing;
use super::greeting::close;

impl DataPlane {
    /// Replaces connections that go out from addresses which this machine no longer has. Nothing passes through them, and both
    /// ends would wait for the idle time. These are the ones that the peer began: those that this node began follow it to
    /// another address by themselves (RFC 9000, section 9), and have no address of their own.
    pub fn leave(&self, lost: &[IpAddr]) {
        let over_lost = |ip: Option<IpAddr>| ip.is_some_and(|ip| lost.contains(&ip.to_canonical()));
        let mut again = BTreeSet::new();
        for link in self.inner.links.all() {
            if over_lost(link.connection.local_ip()) {
                self.inner.links.note_move(link.admitted.node);
                close(&link.connection, Closing::Replaced, "this machine has another address");
                again.insert((link.admitted.node, link.class));
            }
        }
        for (peer, class) in again {
            // At once, since only a new connection tells the peer that the old one is dead.
            self.spawn(move |plane| async move {
                if let Err(error) = plane.link(peer, class, &[]).await {
                    tracing::debug!(peer = %peer.short(), %error, "not met again from another address");
                }
            });
        }
    }
}
