//! What a link carries is measured between two planes on loopback, and not twice at once.

#[path = "../benches/everybody/mod.rs"]
mod everybody;

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use everybody::Everybody;
use polder_node::data::{BlobStore, Class, DataConfig, DataPlane};

fn start(everybody: &Arc<Everybody>, seed: u8, home: &std::path::Path) -> DataPlane {
    let config = DataConfig::new([seed; 32], (Ipv4Addr::LOCALHOST, 0).into());
    let blobs = BlobStore::open(home).unwrap();
    let plane = DataPlane::start(config, everybody.clone(), everybody.clone(), blobs).unwrap();
    everybody.0.lock().unwrap().insert(plane.node(), plane.local_address());
    plane
}

#[tokio::test(flavor = "multi_thread")]
async fn all_that_is_poured_comes_and_a_second_measurement_waits_its_turn() {
    const BYTES: u64 = (32 << 20) + 5;
    let everybody = Arc::new(Everybody(Mutex::default()));
    let homes: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
    let planes: Vec<_> = homes
        .iter()
        .zip(1..)
        .map(|(home, seed)| start(&everybody, seed, home.path()))
        .collect();
    let [here, there, other] = planes.as_slice() else {
        panic!("three planes");
    };
    let both = async {
        let first = here.pour(there.node(), BYTES);
        let second = async {
            while !there.connected().contains(&(here.node(), Class::Bulk)) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            // The first may have opened no stream yet.
            while there.bytes_received(Some(Class::Bulk)) < 1 << 20 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            other.pour(there.node(), BYTES).await
        };
        tokio::join!(first, second)
    };
    let (first, second) = tokio::time::timeout(Duration::from_secs(60), both)
        .await
        .expect("it ends");
    let poured = first.expect("it is taken in");
    assert_eq!(poured.bytes, BYTES);
    assert!(poured.sent_packets > 0 && poured.window_bytes > 0 && poured.time > Duration::ZERO);
    assert!(there.bytes_received(Some(Class::Bulk)) >= BYTES);
    let refused = second.expect_err("one at a time, and a rest after it").to_string();
    assert!(refused.contains("busy"), "{refused}");
}
