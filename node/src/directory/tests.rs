//! Real control planes on the loopback interface.

use std::time::Duration;

use polder_protocol::hash::{BlobId, InstitutionId};
use polder_protocol::layout::BlockRange;

use super::*;
use crate::control::{self, ControlConfig};
use crate::gate::{Admitted, Refused};

const FEDERATION: FederationId = FederationId([3; 32]);

/// Lets everybody in.
struct Open;

impl Gate for Open {
    fn credentials(&self) -> Vec<u8> {
        b"dike".to_vec()
    }

    fn admit(&self, node: NodeId, _: &[u8]) -> Result<Admitted, Refused> {
        Ok(Admitted {
            node,
            institution: InstitutionId([1; 32]),
            capabilities: 63,
        })
    }
}

async fn node(seed: u8, bootstrap: &[&ControlHandle]) -> (ControlHandle, DirectoryHandle) {
    let mut config = ControlConfig::loopback([seed; 32]);
    config.bootstrap = bootstrap
        .iter()
        .map(|peer| (peer.node(), peer.listen_addresses()))
        .collect();
    let (control, _) = control::start(config, Arc::new(Open)).await.expect("started");
    let key = KeyPair::from_seed(&[seed; 32]);
    let directory = start(control.clone(), key, FEDERATION, Arc::new(Open));
    (control, directory)
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..400 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("not within 20 s: {what}");
}

fn epoch() -> EpochId {
    EpochId([7; 32])
}

fn stage(first: u32, end: u32) -> StageOffer {
    StageOffer {
        epoch: epoch(),
        range: BlockRange { first, end },
        token_micros: 900,
        sessions_free: 2,
        context_tokens_max: 2_048,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn offers_reach_others_change_at_once_and_go_with_their_node() {
    let (gateway, at_gateway) = node(61, &[]).await;
    let (_second, at_second) = node(62, &[&gateway]).await;
    at_second.announce(vec![stage(0, 4)]);
    at_second.publish_epoch(EpochNotice {
        epoch: epoch(),
        name: "a model".into(),
        blocks: 8,
        manifest: BlobId([9; 32]),
        bytes: 500,
    });
    let changed = at_gateway.changed();
    until("the gateway has heard", || at_gateway.offers(epoch()).len() == 1).await;
    assert!(*changed.borrow() > 0);
    assert_eq!(at_gateway.epochs().len(), 1);

    // A newcomer learns of a node that it has not met, in a page of one that it has.
    let (third, at_third) = node(63, &[&gateway]).await;
    until("the newcomer has learned", || at_third.offers(epoch()).len() == 1).await;

    at_second.announce(vec![stage(0, 4), stage(4, 8)]);
    let both = || at_third.offers(epoch()).len() == 2 && at_gateway.offers(epoch()).len() == 2;
    until("both have heard of the change", both).await;

    at_third.announce(vec![stage(0, 8)]);
    until("the third is heard", || at_gateway.offers(epoch()).len() == 3).await;
    third.shutdown().await;
    until("the third has gone", || at_gateway.offers(epoch()).len() == 2).await;

    at_second.shutdown().await;
    until("all is taken back", || {
        at_gateway.offers(epoch()).is_empty() && at_gateway.epochs().is_empty()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_echo_of_an_earlier_life_is_outbid() {
    let (_control, directory) = node(64, &[]).await;
    let own = KeyPair::from_seed(&[64; 32]);
    let before = directory.inner.own().open().expect("signed");
    let echo = Announcement {
        sequence: before.sequence + 1_000_000,
        ..before
    };
    assert_eq!(directory.inner.insert(Signed::new(&own, &echo)), Ok(Change::Nothing));
    let after = directory.inner.own().open().expect("signed");
    assert!(after.sequence > echo.sequence);
}
