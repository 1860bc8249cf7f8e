//! Attackers against real daemons: whatever they do, honest members go on, and memory stays bounded.
//!
//! `POLDER_ATTACK=10` makes it ten times as large; the full run, 10,000 half-open handshakes of each kind and 1,000 Sybil
//! keys, is `POLDER_ATTACK=25`.

#[path = "support/attacker.rs"]
mod attacker;
mod support;

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use polder_node::control::{self, ControlConfig, ControlHandle, Service};
use polder_node::gate::Gate;
use polder_node::home::Home;
use polder_node::members::{Members, unix_now};
use polder_protocol::directory::{
    ANNOUNCEMENT_SECONDS, ANNOUNCEMENT_VERSION, Announcement, EpochNotice, Page, PageRequest,
};
use polder_protocol::hash::{BlobId, EpochId, FederationId, NodeId};
use polder_protocol::identity::{KeyPair, Signed};
use polder_protocol::time::UnixSeconds;
use polder_protocol::wire;
use serde_json::Value;
use support::{Node, federation, invite, wait_for};

/// Half-open handshakes at each port, and with them everything else, of the smallest run.
const HANDSHAKES: usize = 400;
const SYBILS: usize = 40;

/// What the attack may add to a daemon's resident memory.
const MEMORY_CAP_KIB: u64 = 256 << 10;

/// Echoes of one measurement.
const ECHOES: &str = "400";

#[test]
fn honest_members_go_on_under_attack_and_memory_stays_bounded() {
    let scale: usize = std::env::var("POLDER_ATTACK")
        .ok()
        .map_or(1, |scale| scale.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let web = support::free_port();
    let also = format!("listen_also = [\"/ip4/127.0.0.1/tcp/{web}/ws\"]\ntrain = false\nserve = false\n");
    let idle = "train = false\nserve = false\n";
    let nodes = federation(
        folder.path(),
        "Leiden",
        &[("victim", &also), ("honest", idle), ("traitor", idle)],
    );
    let [victim, honest, mut traitor] = <[Node; 3]>::try_from(nodes).unwrap();
    let status = wait_for("the members to meet", Duration::from_secs(30), || {
        let status = victim.verb(&["status"]);
        (status["peers"].as_array()?.len() == 2).then_some(status)
    });
    let target = Target::of(&status, web);
    traitor.leave();

    let process = victim.process();
    let before = p95_micros(&honest, &target);
    fs::write(format!("/proc/{process}/clear_refs"), "5").ok();
    let resident = memory_kib(process, "VmRSS:");

    let attack = {
        let (target, home) = (target.clone(), traitor.home.clone());
        std::thread::spawn(move || {
            step_back();
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()
                .unwrap();
            let report = runtime.block_on(everything(&target, &home, scale));
            runtime.shutdown_timeout(Duration::from_secs(5));
            report
        })
    };
    let mut during = Vec::new();
    while !attack.is_finished() {
        during.push(p95_micros(&honest, &target));
    }
    let report = attack.join().unwrap();
    during.sort_unstable();
    let middle = during[during.len() / 2];
    let peak = memory_kib(process, "VmHWM:");
    println!(
        "attack × {scale}: {} half-open handshakes, {} Sybil keys ({} refused by name), {} slow TCP connections; {:.0} s",
        4 * HANDSHAKES * scale,
        SYBILS * scale,
        report.refused,
        report.slow,
        report.seconds
    );
    println!(
        "memory of the daemon: {} MiB before, {} MiB at its peak, {} MiB more (cap {} MiB)",
        resident / 1024,
        peak / 1024,
        peak.saturating_sub(resident) / 1024,
        MEMORY_CAP_KIB / 1024
    );
    println!(
        "honest 64 KiB echo, p95: {:.2} ms before, {:.2} ms during (median of {} measurements, worst {:.2} ms): ratio {:.2}",
        before as f64 / 1e3,
        middle as f64 / 1e3,
        during.len(),
        *during.last().unwrap() as f64 / 1e3,
        middle as f64 / before as f64
    );
    assert!(peak.saturating_sub(resident) < MEMORY_CAP_KIB, "memory is not bounded");
    assert_eq!(
        report.poison,
        Vec::<String>::new(),
        "the directory took what it must not take"
    );

    // Newcomers still come in, and nobody but them has.
    let mut newcomer = Node::prepare(folder.path(), "newcomer", idle);
    newcomer.start(&[&invite(&victim, "Leiden")]);
    let status = victim.verb(&["status"]);
    assert_eq!(status["process"], u64::from(process), "the daemon is another");
    let known = [&honest, &traitor, &newcomer].map(id_of);
    for peer in status["peers"].as_array().unwrap() {
        let id = peer["node"].as_str().unwrap();
        assert!(known.iter().any(|known| known == id), "a stranger is listed: {peer}");
    }
    for node in [&victim, &honest, &newcomer] {
        assert!(!node.log().contains("panicked"), "{}", node.last_words());
    }
}

/// Where the victim answers.
#[derive(Clone)]
struct Target {
    node: NodeId,
    tcp: SocketAddr,
    udp: SocketAddr,
    web: SocketAddr,
    data: SocketAddr,
}

impl Target {
    fn of(status: &Value, web: u16) -> Self {
        let addresses: Vec<&str> = status["control"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(Value::as_str)
            .collect();
        let port = |kind: &str| -> u16 {
            let address = addresses
                .iter()
                .find(|address| address.contains(kind) && !address.contains("/ws"))
                .unwrap();
            address.split('/').nth(4).unwrap().parse().unwrap()
        };
        let at = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        Self {
            node: status["node"].as_str().unwrap().parse().unwrap(),
            tcp: at(port("/tcp/")),
            udp: at(port("/udp/")),
            web: at(web),
            data: status["data"].as_str().unwrap().parse().unwrap(),
        }
    }
}

struct Report {
    refused: usize,
    slow: usize,
    poison: Vec<String>,
    seconds: f64,
}

/// All attacks at once.
async fn everything(target: &Target, traitor: &Path, scale: usize) -> Report {
    let began = Instant::now();
    let count = HANDSHAKES * scale;
    let loris = Duration::from_secs(15);
    let sybils = async {
        let mut refused = 0;
        let address = format!("/ip4/127.0.0.1/tcp/{}", target.tcp.port());
        let numbers: Vec<usize> = (0..SYBILS * scale).collect();
        for some in numbers.chunks(20) {
            let answers = some
                .iter()
                .map(|number| attacker::sybil(*number, target.node, address.clone()));
            let answers = futures::future::join_all(answers).await;
            if some[0] == 0 {
                println!("the first Sybils hear: {:?}", answers.first());
            }
            refused += answers
                .iter()
                .flatten()
                .filter(|answer| answer.contains("refuses us"))
                .count();
        }
        refused
    };
    let big = futures::future::join_all((0..24).map(|number| attacker::oversized(number, target.tcp, 64, loris)));
    let (_, _, tcp, web, (), (), (), (), refused, _, poison) = futures::join!(
        timed(
            "half-open data",
            attacker::half_open_quic(target.data, b"polder-data/1", count)
        ),
        timed(
            "half-open control",
            attacker::half_open_quic(target.udp, b"libp2p", count)
        ),
        timed(
            "slow TCP",
            attacker::slow_loris(target.tcp, b"\x13/multistream/1.0.0\n", count, loris)
        ),
        timed(
            "slow WebSocket",
            attacker::slow_loris(target.web, b"GET / HTTP/1.1\r\nHost: a\r\nX: y\r\n", count, loris)
        ),
        timed("TCP garbage", attacker::tcp_garbage(target.tcp, b"", count)),
        timed(
            "WebSocket garbage",
            attacker::tcp_garbage(target.web, b"GET / HTTP/1.1\r\nUpgrade: websocket\r\n", count)
        ),
        timed("UDP garbage at control", attacker::udp_garbage(target.udp, count)),
        timed("UDP garbage at data", attacker::udp_garbage(target.data, count)),
        timed("Sybils", sybils),
        timed("oversized", big),
        timed("poison", poison(target, traitor)),
    );
    Report {
        refused,
        slow: tcp + web,
        poison,
        seconds: began.elapsed().as_secs_f64(),
    }
}

/// Puts this thread, and those that it starts, behind others: real attackers have machines of their own.
fn step_back() {
    let thread = fs::read_link("/proc/thread-self").unwrap_or_default();
    let thread = thread.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    // Without it the figures are worse, and nothing else.
    let _ = Command::new("renice").args(["-n", "19", "-p", thread]).output();
}

async fn timed<T>(what: &str, attack: impl Future<Output = T>) -> T {
    let began = Instant::now();
    let result = attack.await;
    println!("{what}: {:.1} s", began.elapsed().as_secs_f64());
    result
}

/// A certified traitor tells what it must not tell. What of it the victim's directory then holds.
async fn poison(target: &Target, home: &Path) -> Vec<String> {
    let home = Home::open(home).unwrap();
    let key = home.node_key().unwrap();
    let members = Arc::new(Members::open(&home).unwrap());
    let federation = members.federation();
    let mut config = ControlConfig::loopback(key.seed());
    config.bootstrap = vec![(target.node, vec![format!("/ip4/127.0.0.1/tcp/{}", target.tcp.port())])];
    let (control, _) = control::start(config, Arc::clone(&members) as Arc<dyn Gate>)
        .await
        .unwrap();
    let credentials = members.credentials();
    let now = unix_now().0;
    let other = KeyPair::from_seed(&[0x77; 32]);
    let plain = |node: NodeId, sequence: u64, name: &str| Announcement {
        version: ANNOUNCEMENT_VERSION,
        federation,
        node,
        credentials: credentials.clone(),
        sequence,
        expires: UnixSeconds(now + ANNOUNCEMENT_SECONDS),
        stages: Vec::new(),
        epochs: vec![EpochNotice {
            epoch: EpochId([8; 32]),
            name: name.to_owned(),
            blocks: 2,
            manifest: BlobId([9; 32]),
            bytes: 100,
        }],
    };
    let base = now.saturating_mul(2_000_000);
    let true_one = plain(key.node(), base, "true");
    let lies = [
        // Of another node, with this one's certificate and key, and with a key that nobody certified.
        Signed::new(&key, &plain(target.node, base + 9, "in another's name")),
        Signed::new(&other, &plain(other.node(), base + 9, "without a certificate")),
        Signed::new(&other, &plain(key.node(), base + 9, "forged")),
        // Said before the true one.
        Signed::new(&key, &plain(key.node(), base - 9, "stale")),
        Signed::new(
            &key,
            &Announcement {
                expires: UnixSeconds(now - 4_000),
                ..plain(key.node(), base + 9, "expired")
            },
        ),
        Signed::new(
            &key,
            &Announcement {
                expires: UnixSeconds(now + 400_000),
                ..plain(key.node(), base + 9, "for ever")
            },
        ),
        Signed::new(
            &key,
            &Announcement {
                federation: FederationId([7; 32]),
                ..plain(key.node(), base + 9, "elsewhere")
            },
        ),
        Signed::new(&key, &plain(key.node(), base + 9, &"long".repeat(1_000))),
    ];
    let topic = format!("polder/{federation}/directory");
    let _heard = control.subscribe(&topic);
    let mut names = Vec::new();
    // The first words may find no mesh yet.
    for _ in 0..100 {
        publish(&control, &topic, Signed::new(&key, &true_one).to_bytes()).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        names = held(&control, target.node).await;
        if !names.is_empty() {
            break;
        }
    }
    for round in 0..8 {
        for lie in &lies {
            publish(&control, &topic, lie.to_bytes()).await;
        }
        publish(&control, &topic, attacker::noise(round, 16_000)).await;
        names = held(&control, target.node).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    control.shutdown().await;
    assert!(
        names.iter().any(|name| name == "true"),
        "the traitor was not heard at all: {names:?}"
    );
    names.retain(|name| name != "true");
    names
}

async fn publish(control: &ControlHandle, topic: &str, bytes: Vec<u8>) {
    for _ in 0..20 {
        match control.publish(topic, bytes.clone()).await {
            Ok(()) => return,
            Err(error) => println!("the traitor cannot publish: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Names of the epochs that the victim's directory tells others of.
async fn held(control: &ControlHandle, victim: NodeId) -> Vec<String> {
    let asked = wire::encode(&PageRequest::default());
    let Ok(answer) = control.request(victim, Service::Directory, asked).await else {
        return Vec::new();
    };
    let page: Page = wire::decode(&answer).unwrap();
    let announcements = page
        .announcements
        .iter()
        .filter_map(|bytes| Signed::<Announcement>::from_bytes(bytes).ok());
    let opened = announcements.filter_map(|signed| signed.open().ok());
    opened
        .flat_map(|announcement| announcement.epochs)
        .map(|notice| notice.name)
        .collect()
}

fn p95_micros(honest: &Node, target: &Target) -> u64 {
    let id = target.node.to_string();
    let report = honest.verb(&["bench", "net", "--peer", &id, "--bytes", "65536", "--count", ECHOES]);
    report["p95_micros"].as_u64().unwrap()
}

fn id_of(node: &Node) -> String {
    let home = Home::open(&node.home).unwrap();
    home.node_key().unwrap().node().to_string()
}

/// A line of the process's status.
fn memory_kib(process: u32, line: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let found = status.lines().find_map(|text| text.strip_prefix(line));
    found
        .and_then(|text| text.split_whitespace().next()?.parse().ok())
        .unwrap_or_default()
}
