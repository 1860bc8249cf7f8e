//! What both planes ask before they answer a peer: may it be here, and where is it?

use std::net::SocketAddr;

use polder_protocol::hash::{InstitutionId, NodeId};
use thiserror::Error;

/// A peer that showed valid credentials.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admitted {
    /// The peer.
    pub node: NodeId,
    /// The institution that certified it.
    pub institution: InstitutionId,
    /// What it may do, as bits of the charter's capabilities.
    pub capabilities: u16,
}

/// Why a peer was turned away, in words that name which peer and which rule.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{reason}")]
pub struct Refused {
    /// For people, on both sides.
    pub reason: String,
}

/// Decides about peers. Implemented by the node's membership; both planes hold it as `Arc<dyn Gate>`.
pub trait Gate: Send + Sync + 'static {
    /// What this node shows to others: its federation, charter and certificate, encoded.
    fn credentials(&self) -> Vec<u8>;

    /// Checks what the authenticated peer `peer` showed.
    ///
    /// # Errors
    ///
    /// [`Refused`] for a stranger, another federation, an expired or a revoked certificate.
    fn admit(&self, peer: NodeId, credentials: &[u8]) -> Result<Admitted, Refused>;
}

/// Knows where peers answer on the data plane.
pub trait AddressBook: Send + Sync + 'static {
    /// Addresses of `peer`'s data endpoint, best first.
    fn data_addresses(&self, peer: NodeId) -> Vec<SocketAddr>;
}
