//! One blob from several sources, of which some go away and one becomes slow.
//!
//! `POLDER_MANY_SOURCES_MIB=1024 cargo test --release -p polder-node --lib many_sources -- --nocapture` is the large run.

use super::*;
use crate::data::UploadCaps;

/// What each source may upload, in bytes per second, and what the throttled one may.
const SOURCE: u64 = 6_000_000;
const THROTTLED: u64 = 1_250_000;

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_comes_whole_and_once_although_two_sources_of_four_die_and_one_is_throttled() {
    let mebibytes = std::env::var("POLDER_MANY_SOURCES_MIB").ok();
    let mebibytes: usize = mebibytes.map_or(64, |text| text.parse().unwrap());
    let town = Town::new();
    let here = town.node(1);
    let capped = |all| UploadCaps { all, institution: 0 };
    let sources: Vec<DataPlane> = (2..6)
        .map(|number| town.node_with(number, "member", |config| config.upload = capped(SOURCE)))
        .collect();
    // One source leaves without a word: its path leads nowhere.
    let path = Wire::new(sources[1].local_address(), 0);
    town.book.0.lock().unwrap().insert(sources[1].node(), path.address);
    let bytes = noise(mebibytes * CHUNK_BYTES);
    let mut blob = BlobId::default();
    for source in &sources {
        blob = source.blobs().put_bytes(&bytes).unwrap();
    }
    let ids: Vec<NodeId> = sources.iter().map(DataPlane::node).collect();

    let began = Instant::now();
    let fetch = here.start_fetch(blob, &ids);
    let middle = bytes.len() as u64 * 2 / 5;
    let mut progress = fetch.progress();
    let waited = timeout(
        Duration::from_secs(600),
        progress.wait_for(|now| now.bytes_done >= middle),
    );
    let done = waited.await.unwrap().unwrap().bytes_done;
    let first = began.elapsed();
    sources[0].shutdown().await;
    path.lead_to((Ipv4Addr::LOCALHOST, 9).into());
    sources[2].set_upload_caps(capped(THROTTLED));
    let path = timeout(Duration::from_secs(900), fetch.done()).await.unwrap().unwrap();
    let rest = began.elapsed() - first;

    assert_eq!(blake3::hash(&std::fs::read(path).unwrap()), blake3::hash(&bytes));
    let left = bytes.len() as u64 - done;
    let allowed = left as f64 / (SOURCE + THROTTLED) as f64;
    let received = here.bytes_received(Some(Class::Bulk));
    let twice = received.saturating_sub(bytes.len() as u64);
    println!(
        "{mebibytes} MiB: {:.1} s until two of four sources died and one was throttled, {:.1} s for the rest, {:.3} of \
         what the remaining capacity allows; {:.2} % came twice",
        first.as_secs_f64(),
        rest.as_secs_f64(),
        rest.as_secs_f64() / allowed,
        twice as f64 / bytes.len() as f64 * 100.0
    );
    // Of each source that died or became slow, the chunk that was halfway here.
    let most = bytes.len() as u64 / 50 + 3 * CHUNK_BYTES as u64;
    assert!(twice <= most, "{twice} bytes came twice");
}
