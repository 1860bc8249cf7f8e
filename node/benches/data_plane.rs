//! What the data plane does on loopback, both ends in one process: throughput of one stream and of four, a blob with
//! hashing and disk, and the time of a 64 KiB echo.
//!
//! `cargo bench -p polder-node --bench data_plane`

mod everybody;

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use everybody::Everybody;
use polder_node::data::{BlobStore, Class, DataConfig, DataPlane, IncomingStream, Service};

const FRAME_BYTES: usize = 4 << 20;
const STREAM_BYTES: usize = 512 << 20;
const BLOB_BYTES: usize = 256 << 20;
const ECHO_BYTES: usize = 64 << 10;
const ECHOES: usize = 2_000;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

#[tokio::main]
async fn main() -> Outcome<()> {
    let everybody = Arc::new(Everybody(Mutex::default()));
    let homes = (tempfile::tempdir()?, tempfile::tempdir()?);
    let start = |seed: u8, home: &std::path::Path| -> Outcome<DataPlane> {
        let config = DataConfig::new([seed; 32], (Ipv4Addr::LOCALHOST, 0).into());
        let plane = DataPlane::start(config, everybody.clone(), everybody.clone(), BlobStore::open(home)?)?;
        if let Ok(mut book) = everybody.0.lock() {
            book.insert(plane.node(), plane.local_address());
        }
        Ok(plane)
    };
    let (here, there) = (start(1, homes.0.path())?, start(2, homes.1.path())?);

    let began = Instant::now();
    here.connect(there.node(), Class::Bulk).await?;
    here.connect(there.node(), Class::Act).await?;
    println!(
        "two connections, keys and greetings    {:>9.2} ms",
        millis(began.elapsed())
    );

    tokio::spawn(drain(there.serve(Service::Replica)));
    for streams in [1, 4] {
        let began = Instant::now();
        let sent = (0..streams).map(|_| pour(&here, &there, STREAM_BYTES / streams));
        futures::future::try_join_all(sent).await?;
        println!(
            "{streams} stream(s), 512 MiB                  {:>9.2} Gbit/s",
            gigabits(STREAM_BYTES, began)
        );
    }

    let blob = vec![5; BLOB_BYTES];
    let began = Instant::now();
    let id = there.blobs().put_bytes(&blob)?;
    println!(
        "256 MiB hashed and written             {:>9.2} Gbit/s",
        gigabits(BLOB_BYTES, began)
    );
    let began = Instant::now();
    here.fetch(id, &[there.node()]).await?;
    println!(
        "256 MiB blob, checked at both ends     {:>9.2} Gbit/s",
        gigabits(BLOB_BYTES, began)
    );

    let mut times = echoes(&here, &there).await?;
    times.sort();
    let percentile = |percent: usize| times.get(times.len() * percent / 100).copied().unwrap_or_default();
    println!(
        "64 KiB echo, p50                       {:>9.3} ms",
        millis(percentile(50))
    );
    println!(
        "64 KiB echo, p99                       {:>9.3} ms",
        millis(percentile(99))
    );
    here.shutdown().await;
    there.shutdown().await;
    Ok(())
}

/// Sends so many bytes, and waits until the other side has them all.
async fn pour(here: &DataPlane, there: &DataPlane, bytes: usize) -> Outcome<()> {
    let (mut sender, mut receiver) = here.open(there.node(), Class::Bulk, Service::Replica, vec![]).await?;
    let frame = Bytes::from(vec![3; FRAME_BYTES]);
    for _ in 0..bytes / FRAME_BYTES {
        sender.send(&[], frame.clone()).await?;
    }
    sender.finish();
    receiver.next().await?;
    Ok(())
}

/// Reads every stream to its end, and says so.
async fn drain(mut streams: tokio::sync::mpsc::Receiver<IncomingStream>) {
    while let Some(mut stream) = streams.recv().await {
        tokio::spawn(async move {
            while let Ok(Some(_)) = stream.receiver.next().await {}
            stream.sender.send(&[], Bytes::new()).await.ok();
        });
    }
}

async fn echoes(here: &DataPlane, there: &DataPlane) -> Outcome<Vec<Duration>> {
    let (mut sender, mut receiver) = here.open(there.node(), Class::Act, Service::Echo, vec![]).await?;
    let payload = Bytes::from(vec![1; ECHO_BYTES]);
    let mut times = Vec::with_capacity(ECHOES);
    for _ in 0..ECHOES {
        let began = Instant::now();
        sender.send(&[], payload.clone()).await?;
        receiver.next().await?;
        times.push(began.elapsed());
    }
    Ok(times)
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn gigabits(bytes: usize, began: Instant) -> f64 {
    bytes as f64 * 8e-9 / began.elapsed().as_secs_f64()
}
