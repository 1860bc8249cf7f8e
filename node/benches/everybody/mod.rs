//! A gate that lets everybody in, and the addresses of all: what both ends of a benchmark share.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Mutex;

use polder_node::gate::{AddressBook, Admitted, Gate, Refused};
use polder_protocol::hash::{InstitutionId, NodeId};

pub(crate) struct Everybody(pub(crate) Mutex<BTreeMap<NodeId, SocketAddr>>);

impl Gate for Everybody {
    fn credentials(&self) -> Vec<u8> {
        Vec::new()
    }

    fn admit(&self, node: NodeId, _credentials: &[u8]) -> Result<Admitted, Refused> {
        Ok(Admitted {
            node,
            institution: InstitutionId::default(),
            capabilities: 0,
        })
    }
}

impl AddressBook for Everybody {
    fn data_addresses(&self, peer: NodeId) -> Vec<SocketAddr> {
        let addresses = self.0.lock().map(|book| book.get(&peer).copied());
        addresses.ok().flatten().into_iter().collect()
    }
}
