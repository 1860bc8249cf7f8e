//! Real sockets on loopback.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use polder_protocol::blob::{CHUNK_BYTES, Manifest};
use polder_protocol::hash::{BlobId, InstitutionId};
use polder_protocol::time::Span;
use tempfile::TempDir;

use super::*;
use crate::data::{FetchError, Keep};
use crate::gate::Refused;

mod many_sources;

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_comes_back_from_the_echo() {
    let town = Town::new();
    let (here, there) = (town.node(1), town.node(2));
    for class in [Class::Act, Class::Bulk] {
        let (mut sender, mut receiver) = here.open(there.node(), class, Service::Echo, vec![]).await.unwrap();
        let payload = Bytes::from(vec![7; 3 << 20]);
        sender.send(b"first", payload.clone()).await.unwrap();
        sender.send(b"second", Bytes::new()).await.unwrap();
        sender.finish();
        assert_eq!(receiver.next().await.unwrap(), Some((b"first".to_vec(), payload)));
        assert_eq!(receiver.next().await.unwrap(), Some((b"second".to_vec(), Bytes::new())));
        assert_eq!(receiver.next().await.unwrap(), None);
    }
    assert_eq!(here.connected().len(), 2);
    assert!(here.bytes_sent(Some(Class::Act)) > 3 << 20);
    assert_eq!(
        here.bytes_sent(Some(Class::Act)),
        here.bytes_received(Some(Class::Act)) + 17
    );
    assert_eq!(here.seen_as()[0].1, here.local_address());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_reaches_whoever_serves_it_with_its_header_and_its_peer() {
    let town = Town::new();
    let (here, there) = (town.node(1), town.node(2));
    let mut sessions = there.serve(Service::Session);
    let (mut sender, mut receiver) = here
        .open(there.node(), Class::Act, Service::Session, b"reserve".to_vec())
        .await
        .unwrap();
    let mut incoming = sessions.recv().await.unwrap();
    assert_eq!((incoming.peer.node, incoming.class), (here.node(), Class::Act));
    assert_eq!(incoming.header, b"reserve");
    incoming.sender.send(b"granted", Bytes::new()).await.unwrap();
    assert_eq!(receiver.next().await.unwrap().unwrap().0, b"granted");
    sender.send(b"x", Bytes::from_static(b"activation")).await.unwrap();
    assert_eq!(incoming.receiver.next().await.unwrap().unwrap().1, "activation");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_nobody_serves_is_named_in_the_error() {
    let town = Town::new();
    let (here, there) = (town.node(1), town.node(2));
    let (_sender, mut receiver) = here
        .open(there.node(), Class::Act, Service::Replica, vec![])
        .await
        .unwrap();
    let expected = DataError::NotServed {
        peer: there.node(),
        service: Service::Replica,
    };
    assert_eq!(receiver.next().await, Err(expected));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_is_refused_with_the_reason_and_so_is_a_peer_that_the_dialler_does_not_know() {
    let town = Town::new();
    let member = town.node(1);
    let stranger = town.node_with(2, "stranger", |_| {});
    let refused = stranger
        .open(member.node(), Class::Act, Service::Echo, vec![])
        .await
        .unwrap_err();
    let reason = "shows \"stranger\", which is not of this federation".to_owned();
    assert_eq!(
        refused,
        DataError::RefusedByPeer {
            peer: member.node(),
            reason: reason.clone()
        }
    );
    let refuses = member
        .open(stranger.node(), Class::Act, Service::Echo, vec![])
        .await
        .unwrap_err();
    // Both ends refuse each other here; whoever is first tells.
    assert!(
        matches!(refuses, DataError::RefusedByUs { .. } | DataError::RefusedByPeer { .. }),
        "{refuses}"
    );
    assert_eq!(member.connected(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_at_a_wrong_address_is_not_taken_for_the_one_that_was_asked_for() {
    let town = Town::new();
    let (here, other) = (town.node(1), town.node(2));
    let absent = NodeId(
        ed25519_dalek::SigningKey::from_bytes(&[9; 32])
            .verifying_key()
            .to_bytes(),
    );
    let missing = here.open(absent, Class::Act, Service::Echo, vec![]).await.unwrap_err();
    assert_eq!(missing, DataError::NoAddress { peer: absent });
    let wrong = here
        .open_at(absent, &[other.local_address()], Class::Act, Service::Echo, vec![])
        .await;
    assert!(matches!(wrong, Err(DataError::Unreachable { .. })), "{wrong:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_an_error_that_names_it() {
    let town = Town::new();
    let first = town.node(1);
    let home = tempfile::tempdir().unwrap();
    let config = DataConfig::new([2; 32], first.local_address());
    let blobs = BlobStore::open(home.path()).unwrap();
    let second = DataPlane::start(config, town.gate("member"), town.book.clone(), blobs);
    assert!(matches!(second, Err(DataError::Listen { address, .. }) if address == first.local_address()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_was_revoked_loses_its_connections() {
    let town = Town::new();
    let (here, there) = (town.node(1), town.node(2));
    let (_sender, mut receiver) = here
        .open(there.node(), Class::Act, Service::Echo, vec![])
        .await
        .unwrap();
    town.revoked.lock().unwrap().push(here.node());
    there.recheck_now();
    let refused = receiver.next().await.unwrap_err();
    assert!(
        matches!(&refused, DataError::RefusedByPeer { reason, .. } if reason == "revoked"),
        "{refused}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_waits_for_a_peer_that_is_known_to_be_gone_learns_so_at_once() {
    let town = Town::new();
    let (here, there) = (town.node(1), town.node(2));
    let (_sender, mut receiver) = here
        .open(there.node(), Class::Act, Service::Echo, vec![])
        .await
        .unwrap();
    here.hang_up(there.node());
    assert!(matches!(receiver.next().await, Err(DataError::Lost { .. })));
    here.open(there.node(), Class::Act, Service::Echo, vec![])
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn from_another_address_both_ends_meet_anew_at_once() {
    let town = Town::new();
    let (here, there) = (town.node(1), town.node(2));
    for class in [Class::Act, Class::Bulk] {
        here.connect(there.node(), class).await.unwrap();
    }
    let old = |plane: &DataPlane| plane.inner.links.all();
    let (ours, theirs) = (old(&here), old(&there));
    there.leave(&[Ipv4Addr::new(192, 0, 2, 1).into()]);
    assert!(
        ours.iter()
            .chain(&theirs)
            .all(|link| link.connection.close_reason().is_none())
    );

    there.leave(&[Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]);
    timeout(Duration::from_secs(5), async {
        let closed = |link: &Arc<Link>| link.connection.close_reason().is_some();
        while !ours.iter().all(closed) || here.links().len() < 2 || there.links().len() < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
    assert!(theirs.iter().all(|link| link.connection.close_reason().is_some()));
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restart_the_peer_is_dialled_anew() {
    let town = Town::new();
    let here = town.node(1);
    let there = town.node(2);
    let id = there.node();
    here.connect(id, Class::Act).await.unwrap();
    there.shutdown().await;
    drop(there);
    let there = town.node(2);
    let (mut sender, mut receiver) = here
        .open(there.node(), Class::Act, Service::Echo, vec![])
        .await
        .unwrap();
    sender.send(b"again", Bytes::new()).await.unwrap();
    assert!(receiver.next().await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_the_port_changes_nothing() {
    let town = Town::new();
    let (here, there) = (town.node(1), town.node(2));
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    for length in 0..1_400usize {
        let noise: Vec<u8> = (0..length).map(|index| (index * 31 + length * 7) as u8).collect();
        socket.send_to(&noise, there.local_address()).unwrap();
    }
    here.punch(&[there.local_address()]);
    let (mut sender, mut receiver) = here
        .open(there.node(), Class::Act, Service::Echo, vec![])
        .await
        .unwrap();
    sender.send(b"still there", Bytes::new()).await.unwrap();
    assert_eq!(receiver.next().await.unwrap().unwrap().0, b"still there");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_does_not_open_in_time_is_broken_off() {
    let town = Town::new();
    let here = town.node(1);
    let there = town.node_with(2, "member", |config| config.opening_max = Duration::from_millis(100));
    let link = here.link(there.node(), Class::Act, &[]).await.unwrap();
    let (mut send, mut receive) = link.connection.open_bi().await.unwrap();
    send.write_all(b"P").await.unwrap();
    let end = receive.read_chunk(1, true).await.unwrap_err();
    assert_eq!(end, quinn::ReadError::Reset(StreamEnd::Stalled.code()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_that_never_ends_is_broken_off() {
    let town = Town::new();
    let here = town.node(1);
    let there = town.node_with(2, "member", |config| {
        config.frame_stall_max = Duration::from_millis(100)
    });
    let mut sessions = there.serve(Service::Session);
    let (mut sender, _receiver) = here
        .open(there.node(), Class::Act, Service::Session, vec![])
        .await
        .unwrap();
    let mut incoming = sessions.recv().await.unwrap();
    let half = polder_protocol::wire::FrameHeader::new(3, 0, 10, 0).unwrap().to_bytes();
    sender.raw().write_all(&half).await.unwrap();
    let stalled = incoming.receiver.next().await.unwrap_err();
    assert!(matches!(stalled, DataError::Stalled { .. }), "{stalled}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_length_over_the_limit_is_refused_before_memory_is_taken() {
    let town = Town::new();
    let (here, there) = (town.node(1), town.node(2));
    let mut sessions = there.serve(Service::Session);
    let too_long = polder_protocol::wire::FrameHeader::new(3, 0, 0, (64 << 20) + 1)
        .unwrap()
        .to_bytes();
    for bytes in [too_long.as_slice(), b"GET / HTTP/1.1\r\n\r\n"] {
        let (mut sender, _receiver) = here
            .open(there.node(), Class::Act, Service::Session, vec![])
            .await
            .unwrap();
        let mut incoming = sessions.recv().await.unwrap();
        sender.raw().write_all(bytes).await.unwrap();
        let refused = incoming.receiver.next().await.unwrap_err();
        assert!(matches!(refused, DataError::Malformed { .. }), "{refused}");
    }
    let (mut sender, _receiver) = here
        .open(there.node(), Class::Act, Service::Session, vec![])
        .await
        .unwrap();
    let refused = sender.send(&[0; 70_000], Bytes::new()).await.unwrap_err();
    assert!(matches!(refused, DataError::TooLong { .. }), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receive_that_is_dropped_halfway_goes_on_where_it_was() {
    let town = Town::new();
    let (here, there) = (town.node(1), town.node(2));
    let mut sessions = there.serve(Service::Session);
    let (mut sender, _receiver) = here
        .open(there.node(), Class::Act, Service::Session, vec![])
        .await
        .unwrap();
    let mut incoming = sessions.recv().await.unwrap();
    let mut bytes = polder_protocol::wire::FrameHeader::new(3, 0, 5, 9)
        .unwrap()
        .to_bytes()
        .to_vec();
    bytes.extend_from_slice(b"tokenactivated");
    for byte in bytes {
        sender.raw().write_all(&[byte]).await.unwrap();
        if let Ok(frame) = timeout(Duration::from_micros(300), incoming.receiver.next()).await {
            assert_eq!(
                frame.unwrap(),
                Some((b"token".to_vec(), Bytes::from_static(b"activated")))
            );
            return;
        }
    }
    let frame = incoming.receiver.next().await.unwrap();
    assert_eq!(frame, Some((b"token".to_vec(), Bytes::from_static(b"activated"))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_bulk_connection_does_not_hold_up_the_other() {
    let town = Town::new();
    let (here, there) = (town.node(1), town.node(2));
    let mut replicas = there.serve(Service::Replica);
    let (mut sender, _keep) = here
        .open(there.node(), Class::Bulk, Service::Replica, vec![])
        .await
        .unwrap();
    let _never_read = replicas.recv().await.unwrap();
    let stuck = sender.send(b"", Bytes::from(vec![0; 60 << 20]));
    let echo = async {
        let (mut sender, mut receiver) = here
            .open(there.node(), Class::Act, Service::Echo, vec![])
            .await
            .unwrap();
        for _ in 0..10 {
            sender.send(b"", Bytes::from(vec![1; 64 << 10])).await.unwrap();
            receiver.next().await.unwrap().unwrap();
        }
    };
    tokio::select! {
        _ = stuck => panic!("60 MiB went into a window of 8 MiB that nobody reads"),
        () = echo => {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_comes_from_three_sources_of_which_one_dies_and_one_lies() {
    let town = Town::new();
    let here = town.node_with(1, "member", impatient);
    let (good, dying, lying) = (town.node(2), town.node(3), town.node(4));
    let bytes = noise(24 * CHUNK_BYTES + 77);
    let blob = good.blobs().put_bytes(&bytes).unwrap();
    let manifest = Manifest::of(&bytes);
    tokio::spawn(dishonest(
        dying.clone(),
        bytes.clone(),
        manifest.clone(),
        Vice::StopsAfter(3),
    ));
    tokio::spawn(dishonest(lying.clone(), bytes.clone(), manifest, Vice::Lies));
    let fetch = here.start_fetch(blob, &[dying.node(), lying.node(), good.node()]);
    let path = fetch.done().await.unwrap();
    assert_eq!(std::fs::read(path).unwrap(), bytes);
    assert_eq!(here.blobs().read(blob).unwrap(), bytes);
    let progress = *fetch.progress().borrow();
    assert_eq!(
        (progress.bytes_done, progress.bytes_total),
        (bytes.len() as u64, bytes.len() as u64)
    );
    let liars_share = here
        .traffic()
        .iter()
        .find(|traffic| traffic.peer == lying.node())
        .unwrap()
        .bytes_received;
    assert!(liars_share < 5 << 20, "{liars_share} bytes of a liar");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fetch_goes_on_after_the_process_ended_in_its_middle() {
    let town = Town::new();
    let (good, stopping) = (town.node(2), town.node(3));
    let bytes = noise(10 * CHUNK_BYTES + 1);
    let blob = good.blobs().put_bytes(&bytes).unwrap();
    tokio::spawn(dishonest(
        stopping.clone(),
        bytes.clone(),
        Manifest::of(&bytes),
        Vice::StopsAfter(5),
    ));
    let home = tempfile::tempdir().unwrap();
    let first = town.node_at(1, home.path(), "member", impatient);
    let fetch = first.start_fetch(blob, &[stopping.node()]);
    fetch
        .progress()
        .wait_for(|progress| progress.bytes_done >= 4 << 20)
        .await
        .unwrap();
    first.shutdown().await;
    assert!(matches!(fetch.done().await, Err(FetchError::ShutDown { .. })));
    assert!(!first.blobs().has(blob));
    drop((first, fetch));

    let second = town.node_at(1, home.path(), "member", |_| {});
    let path = second.fetch(blob, &[good.node()]).await.unwrap();
    assert_eq!(std::fs::read(path).unwrap(), bytes);
    assert!(second.bytes_received(Some(Class::Bulk)) < 7 << 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_fetches_of_one_blob_are_one() {
    let town = Town::new();
    let (here, there) = (town.node(1), town.node(2));
    let bytes = noise(6 * CHUNK_BYTES);
    let blob = there.blobs().put_bytes(&bytes).unwrap();
    let sources = [there.node()];
    let (first, second) = tokio::join!(here.fetch(blob, &sources), here.fetch(blob, &sources));
    assert_eq!(first.unwrap(), second.unwrap());
    assert!(here.bytes_received(Some(Class::Bulk)) < 7 << 20);
    here.fetch(blob, &[]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_passes_on_the_chunks_that_it_has_while_it_still_fetches() {
    let town = Town::new();
    let (seed, middle, end) = (town.node(1), town.node(2), town.node(3));
    let bytes = noise(8 * CHUNK_BYTES);
    let blob = polder_protocol::blob::blob_id(&bytes);
    // The middle one has only the seed, the end has only the middle one, and both start before the seed has anything.
    let first = middle.start_fetch(blob, &[seed.node(), end.node()]);
    let second = end.start_fetch(blob, &[middle.node()]);
    seed.blobs().put_bytes(&bytes).unwrap();
    first.done().await.unwrap();
    let path = second.done().await.unwrap();
    assert_eq!(std::fs::read(path).unwrap(), bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_has_is_an_error_that_says_who_was_asked() {
    let town = Town::new();
    let here = town.node_with(1, "member", impatient);
    let there = town.node(2);
    let error = here.fetch(BlobId([7; 32]), &[there.node()]).await.unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains(&there.node().short()) && text.contains("does not have the blob"),
        "{text}"
    );
    let error = here.fetch(BlobId([7; 32]), &[]).await.unwrap_err();
    assert!(error.to_string().contains("no source is known"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_blobs_of_many_sizes_arrive_whole() {
    let town = Town::new();
    let (here, there) = (town.node(1), town.node(2));
    let sizes = [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1];
    let blobs: Vec<_> = (0..20).map(|index| noise(sizes[index % 5] + index / 5)).collect();
    let ids: Vec<_> = blobs
        .iter()
        .map(|bytes| there.blobs().put_bytes(bytes).unwrap())
        .collect();
    let sources = [there.node()];
    let fetched = futures::future::join_all(ids.iter().map(|id| here.fetch(*id, &sources))).await;
    for (fetched, bytes) in fetched.into_iter().zip(blobs) {
        assert_eq!(std::fs::read(fetched.unwrap()).unwrap(), bytes);
    }
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_an_error_and_leaves_nothing_that_counts_as_whole() {
    let town = Town::new();
    let home = tempfile::tempdir().unwrap();
    let here = town.node_at(1, home.path(), "member", |_| {});
    let there = town.node(2);
    let file = home.path().join("weights");
    std::fs::write(&file, noise(2 * CHUNK_BYTES)).unwrap();
    let blob = there.blobs().put_file(&file, Keep::Reference).unwrap();
    // Every write to this device says that it is full.
    let partial = home.path().join("blobs").join(format!("{blob}.partial"));
    std::os::unix::fs::symlink("/dev/full", &partial).unwrap();
    let error = here.fetch(blob, &[there.node()]).await.unwrap_err();
    assert!(matches!(&error, FetchError::Disk(_)), "{error}");
    assert!(error.to_string().contains("No space left"), "{error}");
    assert!(!here.blobs().has(blob));
    std::fs::remove_file(&partial).unwrap();
    here.fetch(blob, &[there.node()]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_was_killed_and_started_again_is_noticed_long_before_the_idle_time() {
    let town = Town::new();
    let (here, killed) = (town.node(1), town.node(2));
    let path = Wire::new(killed.local_address(), 0);
    town.book.0.lock().unwrap().insert(killed.node(), path.address);
    let (mut sender, mut receiver) = here
        .open(killed.node(), Class::Act, Service::Echo, vec![])
        .await
        .unwrap();
    sender.send(b"before", Bytes::new()).await.unwrap();
    receiver.next().await.unwrap().unwrap();
    // The same node in a new process: what the old one knew is gone.
    let started = town.node(2);
    path.lead_to(started.local_address());
    town.book.0.lock().unwrap().insert(started.node(), path.address);
    let began = Instant::now();
    sender.send(b"after", Bytes::new()).await.unwrap();
    let lost = receiver.next().await.unwrap_err();
    assert!(matches!(lost, DataError::Lost { .. }), "{lost}");
    assert!(began.elapsed() < Duration::from_secs(5));
    let (mut sender, mut receiver) = here
        .open(started.node(), Class::Act, Service::Echo, vec![])
        .await
        .unwrap();
    sender.send(b"again", Bytes::new()).await.unwrap();
    assert_eq!(receiver.next().await.unwrap().unwrap().0, b"again");
}

#[tokio::test(flavor = "multi_thread")]
async fn echo_and_blob_survive_a_path_that_loses_two_packets_of_a_hundred() {
    let town = Town::new();
    let (here, there) = (town.node(1), town.node(2));
    let path = Wire::new(there.local_address(), 20);
    town.book.0.lock().unwrap().insert(there.node(), path.address);
    let bytes = noise(5 * CHUNK_BYTES + 3);
    let blob = there.blobs().put_bytes(&bytes).unwrap();
    let fetched = here.fetch(blob, &[there.node()]).await.unwrap();
    assert_eq!(std::fs::read(fetched).unwrap(), bytes);
    let (mut sender, mut receiver) = here
        .open(there.node(), Class::Act, Service::Echo, vec![])
        .await
        .unwrap();
    let payload = Bytes::from(noise(3 << 20));
    sender.send(b"", payload.clone()).await.unwrap();
    assert_eq!(receiver.next().await.unwrap().unwrap().1, payload);
    assert!(path.lost.load(Ordering::Relaxed) > 10);
}

/// A path between one client and one server that may lose packets and may come to lead elsewhere.
struct Wire {
    address: SocketAddr,
    target: Arc<Mutex<SocketAddr>>,
    lost: Arc<AtomicUsize>,
}

impl Wire {
    fn new(target: SocketAddr, loss_per_mille: u64) -> Self {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = socket.local_addr().unwrap();
        let target = Arc::new(Mutex::new(target));
        let lost = Arc::new(AtomicUsize::new(0));
        let (leads_to, losses) = (target.clone(), lost.clone());
        // It ends with the process of the tests.
        std::thread::spawn(move || {
            let mut packet = vec![0; 65_536];
            let (mut client, mut dice) = (None, 1u64);
            while let Ok((length, from)) = socket.recv_from(&mut packet) {
                let target = *leads_to.lock().unwrap();
                dice = dice
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                if (dice >> 33) % 1000 < loss_per_mille {
                    losses.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                let to = if from == target { client } else { Some(target) };
                if from.port() != target.port() && client.is_none() {
                    client = Some(from);
                }
                // What a server that is gone still sends goes nowhere.
                if let Some(to) = to.filter(|_| from == target || Some(from) == client) {
                    socket.send_to(&packet[..length], to).ok();
                }
            }
        });
        Self { address, target, lost }
    }

    fn lead_to(&self, target: SocketAddr) {
        *self.target.lock().unwrap() = target;
    }
}

/// Nodes on loopback that know each other's addresses.
struct Town {
    book: Arc<Addresses>,
    revoked: Arc<Mutex<Vec<NodeId>>>,
    homes: Mutex<Vec<TempDir>>,
}

#[derive(Default)]
struct Addresses(Mutex<BTreeMap<NodeId, SocketAddr>>);

impl AddressBook for Addresses {
    fn data_addresses(&self, peer: NodeId) -> Vec<SocketAddr> {
        self.0.lock().unwrap().get(&peer).copied().into_iter().collect()
    }
}

struct Members {
    shows: String,
    revoked: Arc<Mutex<Vec<NodeId>>>,
}

impl Gate for Members {
    fn credentials(&self) -> Vec<u8> {
        self.shows.clone().into_bytes()
    }

    fn admit(&self, node: NodeId, credentials: &[u8]) -> Result<Admitted, Refused> {
        let reason = if self.revoked.lock().unwrap().contains(&node) {
            "revoked".to_owned()
        } else if credentials == b"member" {
            return Ok(Admitted {
                node,
                institution: InstitutionId([1; 32]),
                capabilities: u16::MAX,
            });
        } else {
            let shown = String::from_utf8_lossy(credentials);
            format!("shows {shown:?}, which is not of this federation")
        };
        Err(Refused { reason })
    }
}

impl Town {
    fn new() -> Self {
        Self {
            book: Arc::default(),
            revoked: Arc::default(),
            homes: Mutex::default(),
        }
    }

    fn gate(&self, shows: &str) -> Arc<dyn Gate> {
        Arc::new(Members {
            shows: shows.to_owned(),
            revoked: self.revoked.clone(),
        })
    }

    fn node(&self, number: u8) -> DataPlane {
        self.node_with(number, "member", |_| {})
    }

    fn node_with(&self, number: u8, shows: &str, set: impl FnOnce(&mut DataConfig)) -> DataPlane {
        let home = tempfile::tempdir().unwrap();
        let plane = self.node_at(number, home.path(), shows, set);
        self.homes.lock().unwrap().push(home);
        plane
    }

    fn node_at(&self, number: u8, home: &Path, shows: &str, set: impl FnOnce(&mut DataConfig)) -> DataPlane {
        let mut config = DataConfig::new([number; 32], (Ipv4Addr::LOCALHOST, 0).into());
        set(&mut config);
        let blobs = BlobStore::open(home).unwrap();
        let plane = DataPlane::start(config, self.gate(shows), self.book.clone(), blobs).unwrap();
        self.book.0.lock().unwrap().insert(plane.node(), plane.local_address());
        plane
    }
}

fn impatient(config: &mut DataConfig) {
    config.fetch.patience = Span::millis(500);
    config.fetch.silence = Span::millis(800);
    config.fetch_patience = Duration::from_secs(2);
}

/// Bytes of which no two chunks are alike.
fn noise(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new()
        .update(&length.to_le_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    bytes
}

#[derive(Clone, Copy)]
enum Vice {
    /// Sends other bytes than it should.
    Lies,
    /// Sends nothing any more after so many chunks, as a process that was stopped.
    StopsAfter(usize),
}

/// Serves one blob as no honest node would.
async fn dishonest(plane: DataPlane, bytes: Vec<u8>, manifest: Manifest, vice: Vice) {
    let mut streams = plane.serve(Service::Blob);
    let served = AtomicUsize::new(0);
    let mut kept = Vec::new();
    while let Some(mut stream) = streams.recv().await {
        let header = stream.header.clone();
        // The first byte of the ask is its case, the last ones are the chunk's number.
        match header.first() {
            Some(0) => {
                stream
                    .sender
                    .send(&[1], Bytes::from(manifest.to_bytes()))
                    .await
                    .unwrap();
                let has = polder_protocol::blob::ChunkSet::full(manifest.chunks());
                stream.sender.send(&[2], Bytes::from(has.to_bytes())).await.unwrap();
            }
            _ => {
                let (chunk, _) = postcard::take_from_bytes::<u32>(&header[33..]).unwrap();
                let start = chunk as usize * CHUNK_BYTES;
                let mut chunk = bytes[start..].to_vec();
                chunk.truncate(CHUNK_BYTES);
                match vice {
                    Vice::Lies => chunk[0] ^= 1,
                    Vice::StopsAfter(chunks) => {
                        if served.fetch_add(1, Ordering::Relaxed) >= chunks {
                            kept.push(stream);
                            continue;
                        }
                    }
                }
                stream.sender.send(&[3], Bytes::from(chunk)).await.ok();
            }
        }
    }
}
