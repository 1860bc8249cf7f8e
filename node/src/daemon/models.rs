//! Which models this node knows, holds and tells of: its own epochs, those of others, and the stage that is needed most.

use std::sync::Arc;
use std::time::Duration;

use polder_protocol::charter::Capabilities;
use polder_protocol::directory::EpochNotice;
use polder_protocol::epoch::Epoch;
use polder_protocol::hash::EpochId;

use super::{Shared, Working};
use crate::epochs::Epochs;

/// How often files are looked at, which `polder model import` may have added, beside every change of the directory.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// The largest description of an epoch that is fetched: part ids of some thousand blocks and a chat template.
const EPOCH_BYTES_MAX: u64 = 4 << 20;

/// Keeps serving in step with the folder of epochs and the directory, until the node stops.
pub(super) fn keep(shared: &Arc<Shared>) {
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        let mut changed = shared.directory.changed();
        loop {
            look(&shared).await;
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                Ok(()) = changed.changed() => {}
                () = shared.stop.cancelled() => return,
            }
        }
    });
}

async fn look(shared: &Arc<Shared>) {
    let epochs = Epochs::of(shared.home.root());
    match epochs.list() {
        Ok(own) => {
            for (id, epoch) in own {
                tell(shared, id, &epoch);
                shared.serve.learn(epoch);
            }
        }
        Err(error) => tracing::warn!(%error, "cannot read this node's models"),
    }
    for known in shared.directory.epochs() {
        let id = known.notice.epoch;
        if epochs.has(id) || known.notice.bytes > EPOCH_BYTES_MAX || shared.serve.knows(id) {
            continue;
        }
        match fetch(shared, &known.notice, &known.holders).await {
            Ok(epoch) => {
                shared.serve.learn(epoch);
            }
            Err(reason) => tracing::warn!(epoch = %id.short(), reason, "cannot learn of a model"),
        }
    }
    hold(shared);
}

/// Tells others of an epoch, and keeps its description where they can fetch it.
fn tell(shared: &Shared, id: EpochId, epoch: &Epoch) {
    if shared.serve.knows(id) {
        return;
    }
    let bytes = epoch.to_bytes();
    let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    match shared.data.blobs().put_bytes(&bytes) {
        Ok(manifest) => shared.directory.publish_epoch(EpochNotice {
            epoch: id,
            name: epoch.name.clone(),
            blocks: epoch.blocks(),
            manifest,
            bytes: length,
        }),
        Err(error) => tracing::warn!(%error, "cannot keep the description of a model"),
    }
}

async fn fetch(
    shared: &Shared,
    notice: &EpochNotice,
    holders: &[polder_protocol::hash::NodeId],
) -> Result<Epoch, String> {
    let path = shared
        .data
        .fetch(notice.manifest, holders)
        .await
        .map_err(|error| error.to_string())?;
    let bytes = tokio::fs::read(path).await.map_err(|error| error.to_string())?;
    let epoch = Epoch::from_bytes(&bytes).map_err(|error| error.to_string())?;
    if epoch.id() == notice.epoch {
        Ok(epoch)
    } else {
        Err("its description is of another model".into())
    }
}

/// Holds a stage of every known model, where this node may serve.
fn hold(shared: &Shared) {
    let may = shared.config.serve && shared.members.capabilities().has(Capabilities::SERVE);
    if !may || *shared.working.borrow() != Working::Yes {
        return;
    }
    for (id, epoch, _) in shared.serve.models() {
        if shared.serve.wants(id) && !shared.serve.should_move(id) {
            continue;
        }
        let capacity = if shared.config.blocks_max == 0 {
            epoch.blocks()
        } else {
            shared.config.blocks_max
        };
        if let Err(error) = shared.serve.hold_most_needed(id, capacity) {
            tracing::warn!(epoch = %id.short(), %error, "cannot hold a stage");
        }
    }
}
