//! Keeps the file of this node's addresses as others are told of them, since invites name them: a router opens a port, a
//! machine gets another address, and the next invite leads there.

use std::sync::Arc;

use super::Shared;
use crate::control::Addresses;
use crate::home::KnownPeer;

/// Writes what changes, until the node stops.
pub(super) fn keep(shared: &Arc<Shared>) {
    let (mut told, shared) = (shared.control.told_addresses(), Arc::clone(shared));
    tokio::spawn(async move {
        loop {
            tokio::select! {
                changed = told.changed() => if changed.is_err() { return },
                () = shared.stop.cancelled() => return,
            }
            let own = told.borrow_and_update().clone();
            let Some(known) = for_invites(&shared, own) else {
                continue;
            };
            let home = shared.home.clone();
            match tokio::task::spawn_blocking(move || home.save_addresses(&known)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::warn!(%error, "cannot write this node's addresses down; invites name old ones")
                }
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            }
        }
    });
}

/// Those that lead somebody here who is no member yet: gateways relay for members alone. Without any, as while a cable is
/// out, the last ones stand.
fn for_invites(shared: &Shared, own: Addresses) -> Option<KnownPeer> {
    let straight = own
        .control
        .into_iter()
        .filter(|address| !address.contains("/p2p-circuit"));
    let control: Vec<String> = straight.collect();
    let data = match own.data.is_empty() {
        true => vec![shared.data.local_address()],
        false => own.data,
    };
    (!control.is_empty()).then(|| KnownPeer {
        node: shared.control.node().to_string(),
        control,
        data,
    })
}
