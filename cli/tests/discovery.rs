//! Many real daemons on one machine: they find each other, and it is measured what that costs each of them.
//!
//! `POLDER_DAEMONS=200` makes it as large as a federation's first year.

mod support;

use std::fs;
use std::time::{Duration, Instant};

use support::{Node, invite, wait_for};

/// Daemons of the smallest run.
const DAEMONS: usize = 12;

/// How long traffic is counted.
const COUNTED: Duration = Duration::from_secs(30);

const IDLE: &str = "train = false\nserve = false\nthreads = 1\n";

#[test]
fn many_idle_daemons_find_each_other_at_a_bounded_cost() {
    let count: usize = std::env::var("POLDER_DAEMONS")
        .ok()
        .map_or(DAEMONS, |count| count.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let mut nodes = support::federation(folder.path(), "Leiden", &[("gateway", IDLE)]);
    let began = Instant::now();
    for number in 1..count {
        let mut node = Node::prepare(folder.path(), &format!("node-{number}"), IDLE);
        node.start(&[&invite(&nodes[0], "Leiden")]);
        nodes.push(node);
    }
    let started = began.elapsed();
    // Each dials until it has forty-eight; the others come by themselves.
    let enough = (count - 1).min(40);
    let peers = |node: &Node| -> usize {
        let status = node.try_verb(&["status"]).unwrap_or_default();
        status["peers"]
            .as_array()
            .map_or(0, |peers| peers.iter().filter(|peer| peer["path"] != "lost").count())
    };
    for node in &nodes {
        wait_for("enough peers", Duration::from_secs(120), || {
            (peers(node) >= enough).then_some(())
        });
    }
    let found = began.elapsed();
    let (bytes, packets) = loopback();
    let cpu: f64 = nodes.iter().map(|node| cpu_seconds(node.process())).sum();
    std::thread::sleep(COUNTED);
    let (bytes_after, packets_after) = loopback();
    let cpu_after: f64 = nodes.iter().map(|node| cpu_seconds(node.process())).sum();
    let each = |value: u64| value as f64 / count as f64 / COUNTED.as_secs_f64();
    let mut memory: Vec<u64> = nodes.iter().map(|node| resident_kib(node.process())).collect();
    memory.sort_unstable();
    println!(
        "{count} daemons: started one after another in {:.0} s; each has {enough} peers or more after {:.0} s",
        started.as_secs_f64(),
        found.as_secs_f64()
    );
    println!(
        "per daemon and second: {:.0} bytes in {:.1} packets on loopback, headers and both planes included; {:.1} ms of CPU",
        each(bytes_after - bytes),
        each(packets_after - packets),
        (cpu_after - cpu) / count as f64 / COUNTED.as_secs_f64() * 1e3
    );
    println!(
        "memory per daemon: {} MiB in the middle, {} MiB at most",
        memory[count / 2] / 1024,
        memory[count - 1] / 1024
    );
    assert!(each(bytes_after - bytes) < 64e3, "too much talk");
    assert!(memory[count / 2] < 256 << 10, "too much memory");
    for node in &nodes {
        assert!(!node.log().contains("panicked"), "{}", node.last_words());
    }
}

#[test]
fn any_one_of_the_invites_doors_last_known_peers_and_a_listed_name_leads_back() {
    let folder = tempfile::tempdir().unwrap();
    let [gateway, mut node] = <[Node; 2]>::try_from(support::federation(
        folder.path(),
        "Leiden",
        &[("gateway", IDLE), ("node", IDLE)],
    ))
    .unwrap();
    let met = |node: &Node| {
        wait_for("the gateway", Duration::from_secs(60), || {
            let status = node.try_verb(&["status"]).unwrap_or_default();
            let peers = status["peers"].as_array()?;
            peers.iter().any(|peer| peer["path"] == "direct").then_some(())
        });
    };
    let (doors, index) = (
        node.home.join("peers.json"),
        polder_node::home::Home::open(&node.home).unwrap().index(),
    );
    let forget = |what: &std::path::Path| {
        if what.is_dir() {
            fs::remove_dir_all(what).unwrap();
        } else if what.exists() {
            fs::remove_file(what).unwrap();
        }
    };
    met(&node);
    // The doors of the invite alone.
    node.leave();
    forget(&index);
    node.start(&[]);
    met(&node);
    // Whom it met last alone.
    node.leave();
    let kept = fs::read(&doors).unwrap();
    forget(&doors);
    node.start(&[]);
    met(&node);
    // A name in the configuration alone, which is looked up.
    node.leave();
    forget(&doors);
    forget(&index);
    let status = gateway.verb(&["status"]);
    let addresses = status["control"].as_array().unwrap();
    let port = addresses
        .iter()
        .find_map(|address| address.as_str()?.split("/tcp/").nth(1))
        .unwrap();
    let id = status["node"].as_str().unwrap();
    let config = node.home.join("config.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(
        &config,
        format!("{text}bootstrap = [\"{id}@/dns4/localhost/tcp/{port}\"]\n"),
    )
    .unwrap();
    node.start(&[]);
    met(&node);
    // And nothing of the three leads nowhere.
    node.leave();
    forget(&doors);
    forget(&index);
    fs::write(&config, text).unwrap();
    node.start(&[]);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(node.verb(&["status"])["peers"].as_array().unwrap().len(), 0);
    fs::write(&doors, kept).unwrap();
}

#[test]
fn the_charter_alone_leads_a_second_institutions_gateway_to_the_first() {
    let folder = tempfile::tempdir().unwrap();
    let [first] = <[Node; 1]>::try_from(support::federation(folder.path(), "Leiden", &[("first", IDLE)])).unwrap();
    let status = first.verb(&["status"]);
    let addresses = status["control"].as_array().unwrap();
    let address = addresses
        .iter()
        .find_map(|address| address.as_str().filter(|text| text.contains("/tcp/")));
    let door = format!("{}@{}", status["node"].as_str().unwrap(), address.unwrap());
    let mut second = Node::prepare(folder.path(), "second", IDLE);
    let key = second.verb(&["institution", "new", "Utrecht"])["key"]
        .as_str()
        .unwrap()
        .to_owned();
    // All that the second gateway gets is this file, by mail perhaps.
    let file = folder.path().join("next.charter");
    let file = file.to_str().unwrap();
    let entry = format!("{key}=Utrecht");
    let next = first.verb(&[
        "charter",
        "new",
        "--add-institution",
        &entry,
        "--door",
        &door,
        "--to",
        file,
    ]);
    assert_eq!(next["doors"][0], door);
    assert_eq!(second.verb(&["charter", "sign", file])["node_certified"], true);
    second.start(&[]);
    wait_for("the first gateway", Duration::from_secs(60), || {
        let status = second.try_verb(&["status"]).unwrap_or_default();
        let peers = status["peers"].as_array()?;
        peers.iter().any(|peer| peer["path"] == "direct").then_some(())
    });
    // Without the door it would have found nobody: the next charter takes it away, and the traces of the meeting go too.
    second.leave();
    let node = door.split('@').next().unwrap();
    first.verb(&["charter", "new", "--remove-door", node, "--to", file]);
    assert!(
        second.verb(&["charter", "sign", file])["doors"]
            .as_array()
            .unwrap()
            .is_empty()
    );
    fs::remove_dir_all(polder_node::home::Home::open(&second.home).unwrap().index()).unwrap();
    second.start(&[]);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(second.verb(&["status"])["peers"].as_array().unwrap().len(), 0);
}

/// Bytes and packets that have gone through the loopback interface.
fn loopback() -> (u64, u64) {
    let devices = fs::read_to_string("/proc/net/dev").unwrap_or_default();
    let line = devices.lines().find_map(|line| line.trim_start().strip_prefix("lo:"));
    let mut numbers = line
        .unwrap_or_default()
        .split_whitespace()
        .filter_map(|word| word.parse().ok());
    (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default())
}

/// Processor time of a process so far, in ticks of 10 ms.
fn cpu_seconds(process: u32) -> f64 {
    let text = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let after_name = text.rsplit(')').next().unwrap_or_default();
    let ticks = after_name.split_whitespace().skip(11).take(2);
    ticks.filter_map(|word| word.parse::<f64>().ok()).sum::<f64>() / 100.0
}

fn resident_kib(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|text| text.split_whitespace().next()?.parse().ok())
        .unwrap_or_default()
}
