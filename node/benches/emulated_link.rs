//! What the data plane does on a long path, both ends and the path in one process: the share of the link that a bulk
//! transfer gets, clean and with random loss, what it loses to its own overshoot, and the time of a 64 KiB echo, alone
//! and beside a bulk transfer.
//!
//! `cargo bench -p polder-node --bench emulated_link [-- MBIT...]`; for a link that exists, or that something else
//! emulates, `-- serve ADDRESS:PORT` at one end and `-- dial ADDRESS:PORT MBIT` at the other. As root on Linux,
//! `-- beside [MBIT...]` does so between two namespaces over a link of its own, with iperf3 in turn and at once.

#[cfg(target_os = "linux")]
mod beside;
#[cfg(target_os = "linux")]
mod emulator;
mod everybody;

use std::collections::VecDeque;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use everybody::Everybody;
use polder_node::data::{BlobStore, Class, DataConfig, DataPlane, Service};
use polder_protocol::hash::NodeId;
use serde::{Deserialize, Serialize};

const ROUND_TRIP: Duration = Duration::from_millis(80);
const QUEUE: Duration = Duration::from_millis(100);
const ECHO_BYTES: usize = 64 << 10;
const FRAME_BYTES: usize = 1 << 20;
const IDLE_TIME: Duration = Duration::from_secs(4);
const BULK_TIME: Duration = Duration::from_secs(8);

/// What was measured over one link.
#[derive(Debug, Serialize, Deserialize)]
struct Measured {
    /// Of the transfer, without headers.
    megabits: f64,
    /// Milliseconds of echoes, 50th and 95th percentile.
    idle: [f64; 2],
    beside_bulk: [f64; 2],
    /// Packets of the transfer that were sent, and lost.
    packets: [u64; 2],
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (idle, busy, [sent, lost]) = (self.idle, self.beside_bulk, self.packets);
        write!(
            f,
            "bulk {:>6.1} Mbit/s, {:.2} % of packets lost; echo p50/p95 {:.1}/{:.1} ms idle, {:.1}/{:.1} ms beside bulk",
            self.megabits,
            lost as f64 / sent.max(1) as f64 * 100.0,
            idle[0],
            idle[1],
            busy[0],
            busy[1],
        )
    }
}

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// What happened to packets on a path.
#[derive(Default)]
struct Counts {
    sent: AtomicU64,
    overflowed: AtomicU64,
}

/// A path to `target` for one client's socket: a rate with a queue that drops at its end, loss, and delay each way.
fn link(target: SocketAddr, megabits: f64, loss_per_mille: f64) -> Outcome<(SocketAddr, Arc<Counts>)> {
    let near = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let far = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    for socket in [&near, &far] {
        let socket = socket2::SockRef::from(socket);
        socket.set_recv_buffer_size(4 << 20)?;
        socket.set_send_buffer_size(4 << 20)?;
    }
    let address = near.local_addr()?;
    let counts = Arc::new(Counts::default());
    // The client's two connections share its socket.
    let client = Arc::new(Mutex::new(None));
    let (out, back) = (client.clone(), client);
    let there = (near.try_clone()?, far.try_clone()?);
    one_way(
        there.0,
        there.1,
        megabits,
        loss_per_mille,
        1,
        counts.clone(),
        move |from| {
            if let Ok(mut client) = out.lock() {
                *client = Some(from);
            }
            Some(target)
        },
    );
    one_way(far, near, megabits, loss_per_mille, 2, Arc::default(), move |_| {
        back.lock().ok().and_then(|client| *client)
    });
    Ok((address, counts))
}

/// Carries packets from one socket to the other until the process ends.
fn one_way(
    source: UdpSocket,
    sink: UdpSocket,
    megabits: f64,
    loss_per_mille: f64,
    seed: u64,
    counts: Arc<Counts>,
    to: impl Fn(SocketAddr) -> Option<SocketAddr> + Send + 'static,
) {
    let (sender, receiver) = std::sync::mpsc::channel::<(Instant, SocketAddr, Vec<u8>)>();
    std::thread::spawn(move || {
        for (at, to, packet) in receiver {
            let early = at.saturating_duration_since(Instant::now());
            if early > Duration::from_micros(100) {
                std::thread::sleep(early);
            }
            sink.send_to(&packet, to).ok();
        }
    });
    std::thread::spawn(move || {
        let mut packet = vec![0; 65_536];
        let (mut dice, mut free_at) = (seed, Instant::now());
        while let Ok((length, from)) = source.recv_from(&mut packet) {
            let (Some(to), Some(bytes)) = (to(from), packet.get(..length)) else {
                continue;
            };
            counts.sent.fetch_add(1, Ordering::Relaxed);
            let now = Instant::now();
            free_at = free_at.max(now);
            if free_at - now > QUEUE {
                counts.overflowed.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            // With the headers of Ethernet, IP and UDP.
            free_at += Duration::from_secs_f64((length + 42) as f64 * 8e-6 / megabits);
            dice = dice
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            if ((dice >> 33) % 100_000) as f64 >= loss_per_mille * 100.0
                && sender.send((free_at + ROUND_TRIP / 2, to, bytes.to_vec())).is_err()
            {
                return;
            }
        }
    });
}

#[tokio::main]
async fn main() -> Outcome<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [mode, address, rest @ ..] = words.as_slice()
        && let Ok(address) = address.parse::<SocketAddr>()
    {
        return one_end(mode, address, rest.iter().any(|word| word == "json")).await;
    }
    let mut rates: Vec<f64> = std::env::args().filter_map(|word| word.parse().ok()).collect();
    if rates.is_empty() {
        rates = vec![100.0, 300.0];
    }
    if words.iter().any(|word| word == "beside") {
        #[cfg(target_os = "linux")]
        return beside::run(&rates);
        #[cfg(not(target_os = "linux"))]
        return Err("namespaces are Linux's".into());
    }
    println!("round trip {ROUND_TRIP:?}, queue {QUEUE:?}; {BULK_TIME:?} of bulk from a cold start");
    for megabits in rates {
        for loss_per_mille in [0.0, 5.0] {
            one_path(megabits, loss_per_mille).await?;
        }
    }
    Ok(())
}

/// One end of a link between two machines or namespaces.
async fn one_end(mode: &str, address: SocketAddr, json: bool) -> Outcome<()> {
    let everybody = Arc::new(Everybody(Mutex::default()));
    let (home, other) = (tempfile::tempdir()?, tempfile::tempdir()?);
    if mode == "serve" {
        answer(start(&everybody, 2, home.path(), address)?).await;
        return Ok(());
    }
    let here = start(&everybody, 1, home.path(), (Ipv4Addr::UNSPECIFIED, 0).into())?;
    // Only to learn the other end's id.
    let peer = start(&everybody, 2, other.path(), (Ipv4Addr::LOCALHOST, 0).into())?.node();
    if let Ok(mut book) = everybody.0.lock() {
        book.insert(peer, address);
    }
    let measured = measure(&here, peer).await?;
    match json {
        true => println!("{}", serde_json::to_string(&measured)?),
        false => println!("{measured}"),
    }
    Ok(())
}

fn start(everybody: &Arc<Everybody>, seed: u8, home: &std::path::Path, listen: SocketAddr) -> Outcome<DataPlane> {
    let config = DataConfig::new([seed; 32], listen);
    let blobs = BlobStore::open(home)?;
    Ok(DataPlane::start(config, everybody.clone(), everybody.clone(), blobs)?)
}

async fn one_path(megabits: f64, loss_per_mille: f64) -> Outcome<()> {
    let everybody = Arc::new(Everybody(Mutex::default()));
    let homes = (tempfile::tempdir()?, tempfile::tempdir()?);
    let anywhere = (Ipv4Addr::LOCALHOST, 0).into();
    let here = start(&everybody, 1, homes.0.path(), anywhere)?;
    let there = start(&everybody, 2, homes.1.path(), anywhere)?;
    let (address, counts) = link(there.local_address(), megabits, loss_per_mille)?;
    if let Ok(mut book) = everybody.0.lock() {
        book.insert(there.node(), address);
    }
    let answering = tokio::spawn(answer(there.clone()));
    let measured = measure(&here, there.node()).await?;
    let sent = counts.sent.load(Ordering::Relaxed).max(1);
    let overflowed = counts.overflowed.load(Ordering::Relaxed);
    println!(
        "{megabits:>5} Mbit/s, loss {:.1} %: {measured}, {:.3} of the link, overshoot {:.2} %",
        loss_per_mille / 10.0,
        measured.megabits / megabits,
        overflowed as f64 / sent as f64 * 100.0
    );
    answering.abort();
    here.shutdown().await;
    there.shutdown().await;
    Ok(())
}

/// Echoes on the idle link, a transfer from a cold start, and echoes beside it.
async fn measure(here: &DataPlane, peer: NodeId) -> Outcome<Measured> {
    here.connect(peer, Class::Bulk).await?;
    here.connect(peer, Class::Act).await?;
    let idle = echoes(here, peer, IDLE_TIME).await?;
    let before = received(here, peer).await?;
    let began = Instant::now();
    let pouring = (0..4).map(|_| pour(here, peer));
    let beside = async {
        tokio::time::sleep(BULK_TIME).await;
        let bytes = received(here, peer).await? - before;
        let got = bytes as f64 * 8e-6 / began.elapsed().as_secs_f64();
        Outcome::Ok((got, echoes(here, peer, Duration::from_secs(8)).await?))
    };
    let (megabits, busy) = tokio::select! {
        measured = beside => measured?,
        _ = futures::future::join_all(pouring) => return Err("the transfer ended early".into()),
    };
    let links = here.links();
    let bulk = links.iter().filter(|link| link.class == Class::Bulk);
    let packets = bulk.fold([0, 0], |[sent, lost], link| {
        [sent + link.sent_packets, lost + link.lost_packets]
    });
    let percentiles = |times: &[f64]| [percentile(times, 50), percentile(times, 95)];
    Ok(Measured {
        megabits,
        idle: percentiles(&idle),
        beside_bulk: percentiles(&busy),
        packets,
    })
}

/// What the peer has received of the transfer.
async fn received(here: &DataPlane, peer: NodeId) -> Outcome<u64> {
    let (_sender, mut receiver) = here.open(peer, Class::Act, Service::Session, vec![]).await?;
    let (_, count) = receiver.next().await?.ok_or("no count")?;
    Ok(u64::from_le_bytes(count.as_ref().try_into()?))
}

/// Reads transfers to their end, and says how much came.
async fn answer(plane: DataPlane) {
    let (mut transfers, mut questions) = (plane.serve(Service::Replica), plane.serve(Service::Session));
    loop {
        tokio::select! {
            Some(mut stream) = transfers.recv() => {
                tokio::spawn(async move { while let Ok(Some(_)) = stream.receiver.next().await {} });
            }
            Some(mut stream) = questions.recv() => {
                let count = plane.bytes_received(Some(Class::Bulk)).to_le_bytes();
                stream.sender.send(&[], Bytes::copy_from_slice(&count)).await.ok();
            }
            else => return,
        }
    }
}

/// Sends for as long as it is polled, as a blob is sent: chunks of 1 MiB, each on a stream of its own.
async fn pour(here: &DataPlane, peer: NodeId) -> Outcome<()> {
    let frame = Bytes::from(vec![3; FRAME_BYTES]);
    let mut waiting = VecDeque::new();
    loop {
        let (mut sender, receiver) = here.open(peer, Class::Bulk, Service::Replica, vec![]).await?;
        sender.send(&[], frame.clone()).await?;
        sender.finish();
        waiting.push_back((sender, receiver));
        if waiting.len() > 6
            && let Some((mut sender, _)) = waiting.pop_front()
        {
            sender.delivered().await?;
        }
    }
}

async fn echoes(here: &DataPlane, peer: NodeId, time: Duration) -> Outcome<Vec<f64>> {
    let (mut sender, mut receiver) = here.open(peer, Class::Act, Service::Echo, vec![]).await?;
    let payload = Bytes::from(vec![1; ECHO_BYTES]);
    let mut times = Vec::new();
    let until = Instant::now() + time;
    while Instant::now() < until {
        let began = Instant::now();
        sender.send(&[], payload.clone()).await?;
        receiver.next().await?;
        times.push(began.elapsed().as_secs_f64() * 1e3);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}

fn percentile(times: &[f64], percent: usize) -> f64 {
    times
        .get(times.len().saturating_sub(1) * percent / 100)
        .copied()
        .unwrap_or_default()
}
