//! A toy device, a store in a folder and streams in memory: what training does, without a network or a tensor library.

mod toy;
mod world;

use std::sync::Arc;
use std::time::Duration;

use polder_protocol::charter::Capabilities;
use polder_protocol::hash::{InstitutionId, NodeId};
use polder_protocol::layout::{BlockRange, Part};
use polder_protocol::log::{Contribution, ReplicaId, Round, Stage};
use polder_protocol::round::{Job, Outcome, RunMessage};
use polder_protocol::run::Codec;

use self::world::{Hub, Site};
use super::driver::heard;
use crate::gate::Admitted;

#[tokio::test]
async fn a_chain_of_two_stages_trains_exactly_as_one_node_does() {
    let hub = Hub::new(Codec::Raw);
    let [whole, first, second] = [1, 2, 3].map(|number| hub.site(number));
    let alone = stages(&[(&whole, 0, 2)]);
    let chain = stages(&[(&first, 0, 1), (&second, 1, 2)]);
    let (one, two, three) = tokio::join!(
        whole.jobs.run(train(&hub, &alone, 0)),
        first.jobs.run(train(&hub, &chain, 0)),
        second.jobs.run(train(&hub, &chain, 1)),
    );
    let (expected, tokens, loss) = trained(one);
    let (mut found, tokens_first, loss_first) = trained(two);
    let (rest, tokens_second, loss_second) = trained(three);
    found.extend(rest);
    assert_eq!((tokens_first, tokens_second), (tokens, tokens));
    assert_eq!((loss_first, loss_second), (loss, loss));
    // Frames also name the base of the node that wrote them; what they carry is the same.
    let bodies = |parts: &[(Part, polder_protocol::hash::BlobId)]| -> Vec<Vec<f32>> {
        let read = |(part, blob): &(Part, _)| hub.update(*part, *blob);
        parts.iter().map(read).collect()
    };
    assert_eq!(bodies(&found), bodies(&expected));
}

#[tokio::test]
async fn a_chain_whose_neighbour_does_not_come_fails_this_round_and_trains_the_next() {
    let hub = Hub::new(Codec::Raw);
    let [first, second] = [1, 2].map(|number| hub.site(number));
    let chain = stages(&[(&first, 0, 1), (&second, 1, 2)]);
    let outcome = second.jobs.run(train(&hub, &chain, 1)).await;
    let Outcome::Failed { reason } = outcome else {
        panic!("{outcome:?}")
    };
    assert!(reason.contains("did not come"), "{reason}");
    let (one, two) = tokio::join!(
        first.jobs.run(train(&hub, &chain, 0)),
        second.jobs.run(train(&hub, &chain, 1))
    );
    trained(one);
    trained(two);
}

#[tokio::test]
async fn a_chain_whose_neighbour_dies_in_the_middle_of_a_step_ends_its_round() {
    let hub = Hub::new(Codec::Raw);
    let [first, second] = [1, 2].map(|number| hub.site(number));
    second.toy.die_after(5);
    let chain = stages(&[(&first, 0, 1), (&second, 1, 2)]);
    let (one, two) = tokio::join!(
        first.jobs.run(train(&hub, &chain, 0)),
        second.jobs.run(train(&hub, &chain, 1))
    );
    assert!(
        matches!(&one, Outcome::Failed { reason } if reason.contains("lost")),
        "{one:?}"
    );
    assert!(matches!(&two, Outcome::Failed { .. }), "{two:?}");
}

#[tokio::test]
async fn two_nodes_apply_one_set_to_equal_states() {
    for codec in [
        Codec::Raw,
        Codec::Int8,
        Codec::E3m0,
        Codec::TopkQ2 {
            k: 64,
            error_decay: 0.9,
        },
    ] {
        let hub = Hub::new(codec);
        let [a, b] = [1, 2].map(|number| hub.site(number));
        let (one, two) = tokio::join!(
            a.jobs.run(train(&hub, &stages(&[(&a, 0, 2)]), 0)),
            b.jobs.run(train_as(&hub, &stages(&[(&b, 0, 2)]), 0, ReplicaId(1))),
        );
        let contribution = |replica, outcome| {
            let (parts, tokens, loss_ppm) = trained(outcome);
            Contribution {
                replica: ReplicaId(replica),
                base: Round(0),
                tokens,
                loss_ppm,
                parts: parts.into_iter().map(|(_, blob)| blob).collect(),
            }
        };
        let set = vec![contribution(0, one), contribution(1, two)];
        let (one, two) = tokio::join!(a.jobs.run(apply(&hub, &set)), b.jobs.run(apply(&hub, &set)));
        assert!(matches!(one, Outcome::Applied { .. }), "{one:?}");
        assert_eq!(one, two);
        let mut other = set.clone();
        other[1].base = Round(3);
        let refused = a.jobs.run(apply(&hub, &other)).await;
        assert!(matches!(refused, Outcome::Invalid { .. }), "{refused:?}");
    }
}

#[tokio::test]
async fn a_round_trained_again_after_a_crash_gives_the_same_sparse_update() {
    let hub = Hub::new(Codec::TopkQ2 { k: 1, error_decay: 0.9 });
    let site = hub.site(1);
    let alone = stages(&[(&site, 0, 2)]);
    let once = trained(site.jobs.run(train(&hub, &alone, 0)).await);
    // The same home, another process: everything in memory is gone.
    let again = hub.site_in(1, Arc::clone(&site.home));
    assert_eq!(trained(again.jobs.run(train(&hub, &alone, 0)).await), once);
}

#[tokio::test]
async fn what_an_optimiser_remembers_survives_a_restart() {
    let hub = Hub::new(Codec::Raw);
    let site = hub.site(1);
    let alone = stages(&[(&site, 0, 2)]);
    trained(site.jobs.run(train(&hub, &alone, 0)).await);
    // The same home, another process: everything in memory is gone.
    let again = hub.site_in(1, Arc::clone(&site.home));
    let restarted = trained(again.jobs.run(second(&hub, &alone)).await);
    // Without what it wrote, its steps would be larger.
    let afresh = hub.site(1);
    assert_ne!(trained(afresh.jobs.run(second(&hub, &alone)).await), restarted);
    assert_eq!(trained(site.jobs.run(second(&hub, &alone)).await), restarted);
}

#[tokio::test]
async fn whole_nodes_and_a_chain_train_one_run_through_a_kill_and_a_restart_of_all() {
    let hub = Hub::new(Codec::E3m0);
    let homes: Vec<tempfile::TempDir> = (0..4).map(|_| tempfile::tempdir().unwrap()).collect();
    let start = |number: usize| {
        // The last two hold one block each: together they are a replica.
        let blocks_max = if number < 2 { 0 } else { 1 };
        hub.node(number as u8 + 1, blocks_max, homes[number].path())
    };
    let mut nodes: Vec<_> = (0..4).map(start).collect();
    nodes[0].0.new_run(hub.new_run(8)).await.unwrap();
    nodes[0].0.start_run("toy").await.unwrap();
    rounds_done(&nodes[0].0, 2).await;
    // One dies without a word, and comes back with what it had written.
    nodes[1].1.abort();
    rounds_done(&nodes[0].0, 4).await;
    nodes[1] = start(1);
    rounds_done(&nodes[0].0, 5).await;
    for (_, task) in &nodes {
        task.abort();
    }
    let nodes: Vec<_> = (0..4).map(start).collect();
    for (node, _) in &nodes {
        rounds_done(node, 8).await;
    }
    let all: Vec<_> = nodes.iter().map(|(node, _)| node.status_of("toy").unwrap()).collect();
    for status in &all {
        assert_eq!(status.state_hash, all[0].state_hash);
        assert_eq!(status.rounds_diverged, 0, "{status:?}");
    }
    // What it saw before the restart of all is not forgotten.
    for status in &all {
        let agreed = status
            .recent
            .iter()
            .filter(|report| report.agreed == Some(true))
            .count();
        assert_eq!(status.rounds_agreed, agreed as u64, "{status:?}");
    }
    let seconds: Vec<f64> = all[0].recent.iter().map(|report| report.seconds).collect();
    // Of the round that was under way at the restart, only what came after it is known; that may be nothing.
    let timed = seconds.iter().filter(|seconds| **seconds > 0.0).count();
    assert!(seconds.len() == 8 && timed >= 7, "{seconds:?}");
    let folder = homes[3].path().join("exported");
    nodes[3].0.export("toy", &folder).await.unwrap();
    assert!(folder.join("model.safetensors").is_file());
}

#[test]
fn a_node_speaks_for_its_own_institution_and_trains_with_a_certificate_only() {
    let hub = Hub::new(Codec::Raw);
    let certified = |institution: u8, capabilities: Capabilities| Admitted {
        node: NodeId([1; 32]),
        institution: InstitutionId([institution; 32]),
        capabilities: capabilities.0,
    };
    let join = RunMessage::Join {
        run: hub.run,
        institution: InstitutionId([7; 32]),
        blocks_max: 2,
        languages: vec![],
        incarnation: 1,
        entries: 0,
    };
    let heard = |from: Admitted, message: &RunMessage| heard(&from, &message.to_bytes()).is_some();
    assert!(heard(certified(7, Capabilities::TRAIN), &join));
    assert!(!heard(certified(8, Capabilities::TRAIN), &join));
    assert!(!heard(certified(7, Capabilities::SERVE), &join));
    let ask = RunMessage::Ask { run: hub.run, from: 0 };
    assert!(heard(certified(8, Capabilities::SERVE), &ask));
}

async fn rounds_done(node: &super::TrainHandle, rounds: u64) {
    let done = async {
        while node.status_of("toy").map_or(0, |status| status.rounds_done) < rounds {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    if tokio::time::timeout(Duration::from_secs(90), done).await.is_err() {
        panic!("no {rounds} rounds: {:#?}", node.status());
    }
}

fn trained(outcome: Outcome) -> (Vec<(Part, polder_protocol::hash::BlobId)>, u64, u64) {
    match outcome {
        Outcome::Trained {
            parts,
            tokens,
            loss_ppm,
        } => (parts, tokens, loss_ppm),
        other => panic!("{other:?}"),
    }
}

fn stages(of: &[(&Site, u32, u32)]) -> Vec<Stage> {
    let stage = |(site, first, end): &(&Site, u32, u32)| Stage {
        node: site.node,
        institution: InstitutionId(site.node.0),
        range: BlockRange {
            first: *first,
            end: *end,
        },
        incarnation: 0,
    };
    of.iter().map(stage).collect()
}

fn train(hub: &Hub, stages: &[Stage], stage: usize) -> Job {
    train_as(hub, stages, stage, ReplicaId(0))
}

/// As [`train`] of the first stage, one round later.
fn second(hub: &Hub, stages: &[Stage]) -> Job {
    let mut job = train(hub, stages, 0);
    if let Job::Train { round, .. } = &mut job {
        *round = Round(1);
    }
    job
}

fn train_as(hub: &Hub, stages: &[Stage], stage: usize, replica: ReplicaId) -> Job {
    let parts = stages[stage].range.parts(hub.spec.layout.blocks());
    Job::Train {
        run: hub.run,
        spec: Arc::clone(&hub.spec),
        round: Round(0),
        replica,
        stages: stages.to_vec(),
        stage,
        base: parts
            .map(|part| (Part(part), hub.spec.initial[part as usize]))
            .collect(),
    }
}

/// The stages of a replica that is one node.
fn maker((node, replica): (u8, u64)) -> (ReplicaId, Vec<Stage>) {
    let stage = Stage {
        node: NodeId([node; 32]),
        institution: InstitutionId([node; 32]),
        range: BlockRange::whole(2),
        incarnation: 0,
    };
    (ReplicaId(replica), vec![stage])
}

fn apply(hub: &Hub, set: &[Contribution]) -> Job {
    Job::Apply {
        run: hub.run,
        spec: Arc::clone(&hub.spec),
        round: Round(0),
        base: (0..).map(Part).zip(hub.spec.initial.iter().copied()).collect(),
        set: set.to_vec(),
        makers: [(1, 0), (2, 1)].map(maker).into(),
        sources: vec![NodeId([1; 32])],
    }
}
