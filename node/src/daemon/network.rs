//! Between the planes.

use std::net::SocketAddr;
use std::sync::OnceLock;

use polder_protocol::hash::NodeId;

use crate::control::{ControlHandle, PeerEvent};
use crate::data::DataPlane;
use crate::gate::AddressBook;

/// The data plane starts before the control plane, whose peers tell it where to dial.
#[derive(Debug, Default)]
pub(super) struct LateBook(pub(super) OnceLock<ControlHandle>);

impl AddressBook for LateBook {
    fn data_addresses(&self, peer: NodeId) -> Vec<SocketAddr> {
        self.0
            .get()
            .map(|control| AddressBook::data_addresses(control, peer))
            .unwrap_or_default()
    }
}

/// Ends data connections to members that the control plane knows to be gone, and those from addresses that this machine has
/// lost, so that nobody waits for them.
pub(super) fn hang_up_on_the_lost(control: &ControlHandle, data: &DataPlane) {
    let (mut events, data) = (control.events(), data.clone());
    tokio::spawn(async move {
        loop {
            match events.recv().await {
                Ok(PeerEvent::Left { node, .. }) => data.hang_up(node),
                Ok(PeerEvent::Moved { lost }) => data.leave(&lost),
                Ok(_) | Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => {}
                Err(tokio::sync::broadcast::error::RecvError::Closed) => return,
            }
        }
    });
}
