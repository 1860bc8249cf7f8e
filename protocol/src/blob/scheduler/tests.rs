use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

const LIMITS: Limits = Limits {
    sources_max: 8,
    in_flight_max: 3,
    patience: Span::seconds(4),
    silence: Span::seconds(10),
    end_game: Span::millis(400),
    in_flight_all_max: 64,
    ahead: Span::seconds(1_000),
};

#[test]
fn two_sources_share_the_work_without_asking_twice() {
    let mut scheduler = Scheduler::new(LIMITS, 1, ChunkSet::empty(20));
    let mut effects = Vec::new();
    join(&mut scheduler, 0, 1, ChunkSet::full(20), &mut effects);
    join(&mut scheduler, 0, 2, ChunkSet::full(20), &mut effects);
    let asked = requests(&effects);
    assert_eq!(asked.len(), 4);
    let distinct: BTreeSet<u32> = asked.iter().map(|(_, chunk)| *chunk).collect();
    assert_eq!(distinct.len(), 4);
}

#[test]
fn the_rarest_chunk_is_asked_for_first() {
    let mut scheduler = Scheduler::new(LIMITS, 1, ChunkSet::empty(20));
    let mut effects = Vec::new();
    let mut all_but_seven = ChunkSet::full(20);
    all_but_seven.remove(7);
    // Two sources known before anything can be asked: their windows are full of what both have.
    join(&mut scheduler, 0, 1, all_but_seven, &mut effects);
    effects.clear();
    join(&mut scheduler, 0, 2, ChunkSet::full(20), &mut effects);
    assert_eq!(requests(&effects).first(), Some(&(node(2), 7)));
}

#[test]
fn what_is_here_already_is_not_asked_for() {
    let mut have = ChunkSet::full(10);
    have.remove(4);
    let mut scheduler = Scheduler::new(LIMITS, 1, have);
    let mut effects = Vec::new();
    join(&mut scheduler, 0, 1, ChunkSet::full(10), &mut effects);
    assert_eq!(requests(&effects), [(node(1), 4)]);
    effects.clear();
    let arrived = Input::Arrived {
        source: node(1),
        chunk: 4,
    };
    scheduler.step(Instant(1), arrived, &mut effects);
    assert_eq!(effects, [Effect::Done]);
}

#[test]
fn a_whole_blob_is_done_at_the_first_step() {
    let mut effects = Vec::new();
    Scheduler::new(LIMITS, 1, ChunkSet::empty(0)).step(Instant(0), Input::Wake, &mut effects);
    assert_eq!(effects, [Effect::Done]);
}

#[test]
fn a_liar_is_banned_and_its_chunks_are_asked_of_others() {
    let mut scheduler = Scheduler::new(LIMITS, 1, ChunkSet::empty(2));
    let mut effects = Vec::new();
    join(&mut scheduler, 0, 1, ChunkSet::full(2), &mut effects);
    join(&mut scheduler, 0, 2, ChunkSet::full(2), &mut effects);
    effects.clear();
    let wrong = Input::Wrong {
        source: node(1),
        chunk: 0,
    };
    scheduler.step(Instant(1), wrong, &mut effects);
    assert!(effects.contains(&Effect::Ban { source: node(1) }));
    assert_eq!(requests(&effects).len(), 2);
    assert!(requests(&effects).iter().all(|(source, _)| *source == node(2)));
    effects.clear();
    join(&mut scheduler, 2, 1, ChunkSet::full(2), &mut effects);
    assert_eq!(effects, []);
    assert!(scheduler.is_banned(node(1)));
}

#[test]
fn a_late_chunk_is_taken_back_and_asked_of_another() {
    let mut scheduler = Scheduler::new(LIMITS, 1, ChunkSet::empty(4));
    let mut effects = Vec::new();
    let mut only_zero = ChunkSet::empty(4);
    only_zero.insert(0);
    join(&mut scheduler, 0, 1, only_zero.clone(), &mut effects);
    // The second has chunk 0 too, and room, so that the wake at the end of the patience moves it.
    join(&mut scheduler, 0, 2, only_zero, &mut effects);
    effects.clear();
    let mut now = Instant(0);
    for _ in 0..3 {
        now = scheduler.wake_at().expect("something is owed");
        scheduler.step(now, Input::Wake, &mut effects);
        if !effects.is_empty() {
            break;
        }
    }
    assert_eq!(now, Instant(0) + LIMITS.patience);
    assert_eq!(
        effects,
        [
            Effect::Cancel {
                source: node(1),
                chunk: 0
            },
            Effect::Request {
                source: node(2),
                chunk: 0
            },
        ]
    );
}

#[test]
fn in_the_end_game_an_idle_source_is_asked_for_what_another_owes() {
    let mut scheduler = Scheduler::new(LIMITS, 1, ChunkSet::empty(1));
    let mut effects = Vec::new();
    join(&mut scheduler, 0, 1, ChunkSet::full(1), &mut effects);
    join(&mut scheduler, 0, 2, ChunkSet::full(1), &mut effects);
    effects.clear();
    let now = scheduler.wake_at().expect("something is owed");
    assert_eq!(now, Instant(0) + LIMITS.end_game);
    scheduler.step(now, Input::Wake, &mut effects);
    assert_eq!(requests(&effects), [(node(2), 0)]);
    effects.clear();
    let arrived = Input::Arrived {
        source: node(2),
        chunk: 0,
    };
    scheduler.step(now, arrived, &mut effects);
    assert_eq!(
        effects,
        [
            Effect::Cancel {
                source: node(1),
                chunk: 0
            },
            Effect::Done
        ]
    );
}

#[test]
fn an_idle_source_takes_over_what_a_slow_one_has_not_begun_and_nothing_comes_twice() {
    // Ten chunks of two sources: one needs 10 ms for each, the other from its third on 3 s.
    let mut scheduler = Scheduler::new(LIMITS, 1, ChunkSet::empty(40));
    let mut effects = Vec::new();
    join(&mut scheduler, 0, 1, ChunkSet::full(40), &mut effects);
    join(&mut scheduler, 0, 2, ChunkSet::full(40), &mut effects);
    let mut queues: [Vec<u32>; 3] = Default::default();
    let mut sent = [0u64; 3];
    let mut busy_until = [0u64; 3];
    let (mut now, mut begun) = (0u64, 0);
    let mut done_at = None;
    while done_at.is_none() && now < 60_000_000 {
        for effect in effects.drain(..) {
            match effect {
                Effect::Request { source, chunk } => queues[index_of(source)].push(chunk),
                Effect::Cancel { source, chunk } => queues[index_of(source)].retain(|other| *other != chunk),
                Effect::Done => done_at = Some(now),
                Effect::Drop { .. } | Effect::Ban { .. } => panic!("{effect:?}"),
            }
        }
        now += 1_000;
        for source in [1, 2] {
            let Some(chunk) = queues[source].first().copied() else {
                busy_until[source] = 0;
                continue;
            };
            if busy_until[source] == 0 {
                let slow = source == 2 && sent[2] >= 2;
                busy_until[source] = now + if slow { 3_000_000 } else { 10_000 };
                begun += 1;
            }
            if busy_until[source] <= now {
                queues[source].remove(0);
                busy_until[source] = 0;
                sent[source] += 1;
                let input = Input::Arrived {
                    source: node(source),
                    chunk,
                };
                scheduler.step(Instant(now), input, &mut effects);
            }
        }
        if scheduler.wake_at().is_some_and(|at| at <= Instant(now)) {
            scheduler.step(Instant(now), Input::Wake, &mut effects);
        }
        for source in [1, 2] {
            let progress = Input::Progress { source: node(source) };
            scheduler.step(Instant(now), progress, &mut effects);
        }
    }
    assert!(done_at.is_some_and(|at| at < 2_000_000), "{done_at:?}");
    assert!(begun <= 41, "{begun} begun for 40 chunks");
}

#[test]
fn a_silent_source_is_dropped_and_a_slow_one_that_sends_is_not() {
    let mut scheduler = Scheduler::new(LIMITS, 1, ChunkSet::empty(1));
    let mut effects = Vec::new();
    join(&mut scheduler, 0, 1, ChunkSet::full(1), &mut effects);
    effects.clear();
    scheduler.step(Instant(9_000_000), Input::Progress { source: node(1) }, &mut effects);
    scheduler.step(Instant(18_000_000), Input::Wake, &mut effects);
    assert_eq!(effects, []);
    scheduler.step(Instant(19_000_000), Input::Wake, &mut effects);
    assert!(effects.contains(&Effect::Drop { source: node(1) }));
    assert!(scheduler.is_starved());
}

#[test]
fn a_source_that_refuses_a_chunk_is_not_asked_for_it_again() {
    let mut scheduler = Scheduler::new(LIMITS, 1, ChunkSet::empty(1));
    let mut effects = Vec::new();
    join(&mut scheduler, 0, 1, ChunkSet::full(1), &mut effects);
    effects.clear();
    let refused = Input::Refused {
        source: node(1),
        chunk: 0,
    };
    scheduler.step(Instant(1), refused, &mut effects);
    assert_eq!(effects, []);
    assert!(scheduler.is_starved());
    join(&mut scheduler, 2, 1, ChunkSet::full(1), &mut effects);
    assert_eq!(requests(&effects), [(node(1), 0)]);
}

#[test]
fn input_about_strangers_and_chunks_that_do_not_exist_changes_nothing() {
    let mut scheduler = Scheduler::new(LIMITS, 1, ChunkSet::empty(2));
    let mut effects = Vec::new();
    let (source, chunk) = (node(9), u32::MAX);
    for input in [
        Input::Gone { source },
        Input::Progress { source },
        Input::Refused { source, chunk },
        Input::Arrived { source, chunk },
        Input::Source {
            source,
            has: ChunkSet::full(3),
        },
    ] {
        scheduler.step(Instant(0), input, &mut effects);
    }
    assert_eq!(effects, []);
    assert_eq!(scheduler.have().count(), 0);
}

/// A source of the simulated fetch below.
#[derive(Debug, Clone)]
struct Peer {
    chunk_micros: u64,
    dies_at: Option<u64>,
    lies: bool,
    has_all: bool,
}

fn peers() -> impl Strategy<Value = Vec<Peer>> {
    let peer = (
        1_000u64..20_000_000,
        proptest::option::of(0u64..30_000_000),
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(|(chunk_micros, dies_at, lies, has_all)| Peer {
            chunk_micros,
            dies_at,
            lies,
            has_all,
        });
    proptest::collection::vec(peer, 0..5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever the others do, one honest source that stays is enough, and no rule is broken on the way.
    #[test]
    fn one_honest_source_is_enough(others in peers(), chunks in 0u32..40, seed in any::<u64>(), honest_micros in 1_000u64..3_000_000) {
        let honest = Peer { chunk_micros: honest_micros, dies_at: None, lies: false, has_all: true };
        let all: Vec<Peer> = others.into_iter().chain([honest]).collect();
        let mut scheduler = Scheduler::new(LIMITS, seed, ChunkSet::empty(chunks));
        let mut effects = Vec::new();
        let mut owed: HashMap<(NodeId, u32), u64> = HashMap::new();
        let mut free_at = vec![0u64; all.len()];
        let mut banned = BTreeSet::new();
        let mut now = 0u64;
        let mut done = chunks == 0;
        for (index, peer) in all.iter().enumerate() {
            let mut has = ChunkSet::empty(chunks);
            for chunk in 0..chunks {
                if peer.has_all || (u64::from(chunk) + seed).is_multiple_of(2) {
                    has.insert(chunk);
                }
            }
            let input = Input::Source { source: node(index), has };
            scheduler.step(Instant(0), input, &mut effects);
            done |= settle(&all, now, &mut effects, &mut owed, &mut free_at, &mut banned);
        }
        for _ in 0..20_000 {
            if done {
                break;
            }
            let next = owed.iter().filter(|(_, at)| **at != u64::MAX).min_by_key(|(key, at)| (**at, **key));
            let next = next.map(|(key, at)| (*key, *at));
            let wake = scheduler.wake_at().map_or(u64::MAX, |at| at.0);
            let input = match next {
                Some(((source, chunk), at)) if at <= wake => {
                    now = now.max(at);
                    owed.remove(&(source, chunk));
                    let lies = all[index_of(source)].lies;
                    if lies { Input::Wrong { source, chunk } } else { Input::Arrived { source, chunk } }
                }
                _ if wake < u64::MAX => {
                    now = now.max(wake);
                    Input::Wake
                }
                _ => break,
            };
            scheduler.step(Instant(now), input, &mut effects);
            done |= settle(&all, now, &mut effects, &mut owed, &mut free_at, &mut banned);
            for source in scheduler.sources() {
                let count = owed.keys().filter(|(id, _)| *id == source).count();
                prop_assert!(count <= LIMITS.in_flight_max);
            }
            for chunk in 0..chunks {
                prop_assert!(owed.keys().filter(|(_, owed)| *owed == chunk).count() <= 2);
            }
            prop_assert!(owed.keys().all(|(id, _)| !banned.contains(id)));
        }
        prop_assert!(done, "{} of {} chunks after {} s", scheduler.have().count(), chunks, now / 1_000_000);
        prop_assert!(scheduler.have().is_full());
    }
}

/// Plays the network: notes when each requested chunk will arrive, and says whether the fetch is done.
fn settle(
    all: &[Peer],
    now: u64,
    effects: &mut Vec<Effect>,
    owed: &mut HashMap<(NodeId, u32), u64>,
    free_at: &mut [u64],
    banned: &mut BTreeSet<NodeId>,
) -> bool {
    let mut done = false;
    for effect in effects.drain(..) {
        match effect {
            Effect::Request { source, chunk } => {
                let index = index_of(source);
                let at = free_at[index].max(now) + all[index].chunk_micros;
                free_at[index] = at;
                let dead = all[index].dies_at.is_some_and(|dies_at| dies_at < at);
                let before = owed.insert((source, chunk), if dead { u64::MAX } else { at });
                assert_eq!(before, None, "asked twice of one source");
            }
            Effect::Cancel { source, chunk } => {
                let index = index_of(source);
                let at = owed.remove(&(source, chunk)).filter(|at| *at != u64::MAX);
                // What was not sent yet is not sent, and what was asked for later comes so much earlier.
                if let Some(at) = at {
                    let spared = at.saturating_sub(now).min(all[index].chunk_micros);
                    let later = owed
                        .iter_mut()
                        .filter(|((owner, _), due)| *owner == source && **due != u64::MAX && **due > at);
                    later.for_each(|(_, due)| *due -= spared);
                    free_at[index] -= spared;
                }
            }
            Effect::Ban { source } => {
                banned.insert(source);
            }
            Effect::Drop { .. } => {}
            Effect::Done => done = true,
        }
    }
    done
}

fn node(index: usize) -> NodeId {
    let mut bytes = [0; 32];
    bytes[0] = u8::try_from(index).unwrap();
    NodeId(bytes)
}

fn index_of(node: NodeId) -> usize {
    usize::from(node.0[0])
}

fn join(scheduler: &mut Scheduler, now: u64, index: usize, has: ChunkSet, effects: &mut Vec<Effect>) {
    let source = node(index);
    scheduler.step(Instant(now), Input::Source { source, has }, effects);
}

fn requests(effects: &[Effect]) -> Vec<(NodeId, u32)> {
    let request = |effect: &Effect| match effect {
        Effect::Request { source, chunk } => Some((*source, *chunk)),
        _ => None,
    };
    effects.iter().filter_map(request).collect()
}
