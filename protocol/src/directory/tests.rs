use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::hash::BlobId;
use crate::identity::KeyPair;
use crate::layout::BlockRange;
use crate::wire;

const NOW: UnixSeconds = UnixSeconds(1_000_000);

#[test]
fn an_announced_stage_is_offered_until_it_expires() {
    let mut directory = directory();
    assert_eq!(insert(&mut directory, NOW, &announcement(1, 1)), Ok(Change::Offers));
    let offers = directory.offers(epoch(7));
    assert_eq!(offers.len(), 1);
    assert_eq!(offers[0].node, key(1).node());
    assert_eq!(offers[0].institution, institution());
    assert_eq!(directory.wake_at(), Some(later(ANNOUNCEMENT_SECONDS)));
    assert!(!directory.expire(later(ANNOUNCEMENT_SECONDS - 1)));
    assert!(directory.expire(later(ANNOUNCEMENT_SECONDS)));
    assert!(directory.offers(epoch(7)).is_empty());
    // What was said before stays unsaid, as long as some clock may still believe it.
    let now = later(ANNOUNCEMENT_SECONDS);
    let stale = Announcement {
        expires: later(2 * ANNOUNCEMENT_SECONDS),
        ..announcement(1, 0)
    };
    assert_eq!(insert(&mut directory, now, &stale), Ok(Change::Nothing));
    assert_eq!(insert(&mut directory, now, &announcement(1, 1)), Ok(Change::Nothing));
    assert!(directory.offers(epoch(7)).is_empty());
    directory.expire(later(ANNOUNCEMENT_SECONDS + CLOCK_SKEW_SECONDS));
    assert!(directory.is_empty());
}

#[test]
fn nodes_speak_more_seldom_the_more_there_are() {
    assert_eq!(repeat_seconds(0), 30);
    assert_eq!(repeat_seconds(300), 30);
    assert_eq!(repeat_seconds(10_000), 1_000);
    assert_eq!(announcement_seconds(10_000), 3_000);
    assert_eq!(announcement_seconds(usize::MAX), ANNOUNCEMENT_SECONDS_MAX);
}

#[test]
fn an_institution_has_its_share_and_no_more() {
    let mut directory = directory();
    let place = |n: usize| {
        let mut id = [0; 32];
        id[..8].copy_from_slice(&(n as u64).to_le_bytes());
        NodeId(id)
    };
    insert(&mut directory, NOW, &announcement(1, 1)).unwrap();
    let entry = directory.entries.values().next().unwrap().clone();
    for n in 1..INSTITUTION_NODES_MAX {
        directory.entries.insert(place(n), entry.clone());
    }
    let crowded = insert(&mut directory, NOW, &announcement(2, 1));
    assert_eq!(
        crowded,
        Err(AnnouncementError::Share {
            institution: institution()
        })
    );
    directory.forget(place(3));
    assert_eq!(insert(&mut directory, NOW, &announcement(2, 1)), Ok(Change::Offers));
    assert_eq!(directory.sequence(place(3)), None);
}

#[test]
fn the_newest_announcement_of_a_node_holds_in_any_order() {
    let mut directory = directory();
    let withdrawn = Announcement {
        stages: vec![],
        epochs: vec![],
        ..announcement(1, 2)
    };
    assert_eq!(insert(&mut directory, NOW, &announcement(1, 1)), Ok(Change::Offers));
    assert_eq!(insert(&mut directory, NOW, &withdrawn), Ok(Change::Offers));
    assert_eq!(insert(&mut directory, NOW, &announcement(1, 1)), Ok(Change::Nothing));
    assert!(directory.offers(epoch(7)).is_empty());
    assert_eq!(insert(&mut directory, NOW, &announcement(1, 3)), Ok(Change::Offers));
    assert_eq!(insert(&mut directory, NOW, &announcement(1, 4)), Ok(Change::Renewed));
}

#[test]
fn a_node_that_left_returns_only_with_something_newer() {
    let mut directory = directory();
    insert(&mut directory, NOW, &announcement(1, 5)).unwrap();
    assert!(directory.forget(key(1).node()));
    assert!(!directory.forget(key(1).node()));
    assert_eq!(directory.page(PageRequest::default()), Page::default());
    assert_eq!(insert(&mut directory, NOW, &announcement(1, 5)), Ok(Change::Nothing));
    assert!(directory.offers(epoch(7)).is_empty());
    assert_eq!(insert(&mut directory, NOW, &announcement(1, 6)), Ok(Change::Offers));
}

#[test]
fn nobody_announces_for_another() {
    let signed = Signed::new(&key(2), &announcement(1, 1));
    let refused = directory().insert(NOW, signed, |_, _| Some(standing(Capabilities::ALL)));
    assert_eq!(refused, Err(AnnouncementError::WrongKey { node: key(1).node() }));
}

#[test]
fn what_must_not_be_kept_is_refused_by_name() {
    let other = FederationId([9; 32]);
    let base = || announcement(1, 1);
    let cases = [
        (Announcement { version: 2, ..base() }, "format version 2"),
        (
            Announcement {
                federation: other,
                ..base()
            },
            "federation 0909",
        ),
        (
            Announcement {
                expires: UnixSeconds(NOW.0 - CLOCK_SKEW_SECONDS),
                ..base()
            },
            "expired at",
        ),
        (
            Announcement {
                expires: later(10_000),
                ..base()
            },
            "over the limit of 4917",
        ),
        (
            Announcement {
                stages: vec![stage(0, 1); STAGES_MAX + 1],
                ..base()
            },
            "33 stages",
        ),
        (
            Announcement {
                epochs: vec![notice(1, ""); EPOCHS_MAX + 1],
                ..base()
            },
            "33 epochs",
        ),
        (
            Announcement {
                epochs: vec![notice(1, &"x".repeat(129))],
                ..base()
            },
            "129 bytes of an epoch's name",
        ),
        (
            Announcement {
                stages: vec![stage(3, 3)],
                ..base()
            },
            "empty range",
        ),
        (
            Announcement {
                credentials: vec![0; 5_000],
                ..base()
            },
            "5000 bytes of credentials",
        ),
    ];
    for (case, words) in cases {
        let mut directory = directory();
        let refused = insert(&mut directory, NOW, &case).unwrap_err();
        assert!(format!("{refused}").contains(words), "{refused}");
        assert_eq!(directory.nodes().count(), 0);
    }
}

#[test]
fn a_stranger_is_refused_and_a_node_that_may_not_serve_offers_nothing() {
    let mut directory = directory();
    let signed = Signed::new(&key(1), &announcement(1, 1));
    let refused = directory.insert(NOW, signed.clone(), |_, _| None);
    assert_eq!(refused, Err(AnnouncementError::NotAdmitted { node: key(1).node() }));
    let taken = directory.insert(NOW, signed, |_, credentials| {
        assert_eq!(credentials, [1]);
        Some(standing(Capabilities::QUERY))
    });
    assert_eq!(taken, Ok(Change::Renewed));
    assert!(directory.offers(epoch(7)).is_empty() && directory.epochs().is_empty());
}

#[test]
fn an_epoch_is_known_with_those_who_hold_it() {
    let mut directory = directory();
    insert(&mut directory, NOW, &announcement(1, 1)).unwrap();
    insert(&mut directory, NOW, &announcement(2, 1)).unwrap();
    let liar = Announcement {
        epochs: vec![notice(7, "another name")],
        ..announcement(3, 1)
    };
    insert(&mut directory, NOW, &liar).unwrap();
    let known = directory.epochs();
    assert_eq!(known.len(), 2);
    let honest = known.iter().find(|known| known.notice == notice(7, "a model")).unwrap();
    assert_eq!(honest.holders.len(), 2);
}

#[test]
fn an_announcement_as_long_as_allowed_fits_its_limit() {
    let longest = Announcement {
        stages: vec![
            StageOffer {
                epoch: epoch(7),
                range: BlockRange {
                    first: u32::MAX - 1,
                    end: u32::MAX,
                },
                token_micros: u32::MAX,
                sessions_free: u32::MAX,
                context_tokens_max: u32::MAX,
            };
            STAGES_MAX
        ],
        epochs: vec![notice(7, &"x".repeat(64)); EPOCHS_MAX],
        credentials: vec![1; 2_000],
        ..announcement(1, u64::MAX)
    };
    assert_eq!(insert(&mut directory(), NOW, &longest), Ok(Change::Offers));
}

#[test]
fn a_full_directory_takes_renewals_only() {
    let mut directory = directory();
    insert(&mut directory, NOW, &announcement(1, 1)).unwrap();
    let mut entry = directory.entries.values().next().unwrap().clone();
    for n in 0..u32::try_from(NODES_MAX).unwrap() - 1 {
        entry.institution = InstitutionId([(n % 9) as u8 + 100; 32]);
        let mut id = [0; 32];
        id[..4].copy_from_slice(&n.to_le_bytes());
        directory.entries.insert(NodeId(id), entry.clone());
    }
    assert_eq!(
        insert(&mut directory, NOW, &announcement(2, 1)),
        Err(AnnouncementError::Full)
    );
    assert_eq!(insert(&mut directory, NOW, &announcement(1, 2)), Ok(Change::Renewed));
    // And its pages are readable and end.
    let mut request = PageRequest::default();
    let mut seen = 0;
    loop {
        let page: Page = wire::decode(&wire::encode(&directory.page(request))).unwrap();
        seen += page.announcements.len();
        match page.next {
            Some(next) => request.after = Some(next),
            None => break,
        }
    }
    assert_eq!(seen, NODES_MAX);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn any_order_of_arrival_ends_in_the_same_directory(
        sent in proptest::collection::vec((1u8..5, 1u64..6), 1..16),
        swaps in proptest::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..16),
    ) {
        let mut shuffled = sent.clone();
        for (one, other) in swaps {
            shuffled.swap(one.index(sent.len()), other.index(sent.len()));
        }
        let fill = |order: &[(u8, u64)]| {
            let mut directory = directory();
            for (node, sequence) in order {
                insert(&mut directory, NOW, &announcement(*node, *sequence)).unwrap();
            }
            directory
        };
        let (one, other) = (fill(&sent), fill(&shuffled));
        prop_assert_eq!(one.page(PageRequest::default()), other.page(PageRequest::default()));
        let mut newest = BTreeMap::new();
        for (node, sequence) in sent {
            let known = newest.entry(key(node).node()).or_insert(0);
            *known = sequence.max(*known);
        }
        for (node, sequence) in newest {
            prop_assert_eq!(one.sequence(node), Some(sequence));
        }
    }

    #[test]
    fn one_who_joins_learns_all_from_pages(nodes in proptest::collection::btree_set(1u8..60, 0..12)) {
        let mut full = directory();
        for node in &nodes {
            insert(&mut full, NOW, &announcement(*node, 1)).unwrap();
        }
        let mut joiner = directory();
        for bytes in full.page(PageRequest::default()).announcements {
            let signed = Signed::from_bytes(&bytes).unwrap();
            joiner.insert(NOW, signed, |_, _| Some(standing(Capabilities::ALL))).unwrap();
        }
        prop_assert_eq!(joiner.offers(epoch(7)), full.offers(epoch(7)));
        prop_assert_eq!(joiner.epochs(), full.epochs());
    }

    #[test]
    fn nothing_is_believed_for_longer_than_its_time(ahead in -400i64..400, wait in 0u64..1_000) {
        let mut directory = directory();
        let expires = UnixSeconds(NOW.0.saturating_add_signed(ahead));
        let taken = insert(&mut directory, NOW, &Announcement { expires, ..announcement(1, 1) });
        directory.expire(later(wait));
        if taken.is_err() || wait >= ANNOUNCEMENT_SECONDS {
            prop_assert!(directory.offers(epoch(7)).is_empty());
        }
    }

    #[test]
    fn no_bytes_make_a_page_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = wire::decode::<Page>(&bytes);
        let _ = wire::decode::<PageRequest>(&bytes);
    }
}

fn directory() -> Directory {
    Directory::new(FederationId([3; 32]))
}

fn insert(directory: &mut Directory, now: UnixSeconds, what: &Announcement) -> Result<Change, AnnouncementError> {
    let signer = (0..=u8::MAX).map(key).find(|key| key.node() == what.node).unwrap();
    let signed = Signed::new(&signer, what);
    directory.insert(now, signed, |_, _| Some(standing(Capabilities::ALL)))
}

fn key(n: u8) -> KeyPair {
    KeyPair::from_seed(&[n; 32])
}

fn institution() -> InstitutionId {
    InstitutionId([5; 32])
}

fn standing(capabilities: Capabilities) -> Standing {
    Standing {
        institution: institution(),
        capabilities,
    }
}

fn epoch(n: u8) -> EpochId {
    EpochId([n; 32])
}

fn later(seconds: u64) -> UnixSeconds {
    UnixSeconds(NOW.0 + seconds)
}

fn stage(first: u32, end: u32) -> StageOffer {
    StageOffer {
        epoch: epoch(7),
        range: BlockRange { first, end },
        token_micros: 1_500,
        sessions_free: 4,
        context_tokens_max: 4_096,
    }
}

fn notice(n: u8, name: &str) -> EpochNotice {
    EpochNotice {
        epoch: epoch(n),
        name: String::from(name),
        blocks: 30,
        manifest: BlobId([n; 32]),
        bytes: 2_000,
    }
}

fn announcement(node: u8, sequence: u64) -> Announcement {
    let stages: Vec<StageOffer> = vec![stage(0, 2), stage(9, 12)];
    Announcement {
        version: ANNOUNCEMENT_VERSION,
        federation: FederationId([3; 32]),
        node: key(node).node(),
        credentials: vec![1],
        sequence,
        expires: later(ANNOUNCEMENT_SECONDS),
        stages: stages.into_iter().take(1).collect(),
        epochs: vec![notice(7, "a model")],
    }
}
