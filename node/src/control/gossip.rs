//! Whether a gossip message is to be believed, passed on, or held against who sent it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use libp2p::gossipsub::{Message, MessageAcceptance};
use polder_protocol::hash::{Digest, NodeId, digest};
use polder_protocol::wire::{self, Envelope};

use super::Gossip;
use super::address::node_of;
use crate::gate::{Admitted, Gate};

/// Authors whose credentials were checked a short while ago.
const AUTHORS_MAX: usize = 1024;

/// How long a check holds. A revocation takes effect no later than this after it has arrived.
const CHECK_HOLDS: Duration = Duration::from_secs(10);

/// Checks authors, and remembers for a short while whom it has checked.
#[derive(Debug, Default)]
pub(super) struct Authors {
    checked: BTreeMap<NodeId, (Digest, Instant, Admitted)>,
}

impl Authors {
    /// Judges a message that a member passed on. Its signature was checked by gossipsub.
    pub(super) fn judge(
        &mut self,
        message: &Message,
        gate: &dyn Gate,
        now: Instant,
    ) -> (MessageAcceptance, Option<Gossip>) {
        let Some(from) = message.source.as_ref().and_then(node_of) else {
            return (MessageAcceptance::Reject, None);
        };
        // Whoever passes on what is no message did not check it: that is the sender's own fault.
        let Ok(envelope) = wire::decode::<Envelope>(&message.data) else {
            return (MessageAcceptance::Reject, None);
        };
        // Credentials may have expired on the way: nobody's fault.
        let Some(admitted) = self.check(from, &envelope.credentials, gate, now) else {
            return (MessageAcceptance::Ignore, None);
        };
        let gossip = Gossip {
            from,
            admitted,
            bytes: envelope.body,
        };
        (MessageAcceptance::Accept, Some(gossip))
    }

    fn check(&mut self, from: NodeId, credentials: &[u8], gate: &dyn Gate, now: Instant) -> Option<Admitted> {
        let hash = digest(credentials);
        if let Some((known, at, admitted)) = self.checked.get(&from)
            && *known == hash
            && now.saturating_duration_since(*at) < CHECK_HOLDS
        {
            return Some(admitted.clone());
        }
        let admitted = gate.admit(from, credentials).ok()?;
        if self.checked.len() >= AUTHORS_MAX {
            self.checked.clear();
        }
        self.checked.insert(from, (hash, now, admitted.clone()));
        Some(admitted)
    }
}
